"""Do two forms of a model compute the same? Both run on the same tokens, one after the other, so
that only one of them is in memory, once: transformers takes the tensors from us one by one, for
its own way maps the files and holds besides what it makes of them (the experts of OLMoE)."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from openlm_lite.errors import InputError
from openlm_lite.hf.source import build_model
from openlm_lite.hf.weights import Weights, open_weights
from openlm_lite.model.config import ModelConfig

log = logging.getLogger(__name__)

# A wrong mapping changes logits by about their own size, fp32 arithmetic by 1e-6 of it.
MAX_RELATIVE_DIFFERENCE = 1e-4


def probe_tokens(vocab_size: int, max_seq_len: int) -> Tensor:
    """[2, T <= 64] random tokens, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (2, min(64, max_seq_len)), generator=generator)


@torch.inference_mode()
def our_logits(cfg: ModelConfig, weights: Mapping[str, Tensor]) -> Tensor:
    """Logits [2, T, V] of our model on `probe_tokens`, fp32."""
    logits = build_model(cfg, weights)(probe_tokens(cfg.vocab_size, cfg.max_seq_len))
    assert isinstance(logits, Tensor)
    return logits


@torch.inference_mode()
def their_logits(folder: str, cfg: ModelConfig) -> Tensor:
    """The same of the class that transformers loads for `folder`, its weights taken as fp32."""
    model = load_hf(folder, torch.float32, weights=open_weights(folder))
    return model(probe_tokens(cfg.vocab_size, cfg.max_seq_len), use_cache=False).logits


def difference(ours: Tensor, theirs: Tensor, what: str) -> float:
    """The largest difference of logits.

    Raises InputError above MAX_RELATIVE_DIFFERENCE of their size, and for NaN.
    """
    found = (ours - theirs).abs().max().item()
    size = ours.abs().max().item()
    if not found <= MAX_RELATIVE_DIFFERENCE * max(1.0, size):
        raise InputError(
            f"{what} the logits differ by {found:.2e} (their size is {size:.2e}); "
            "nothing was written"
        )
    return found


def load_hf(
    folder: str, dtype: torch.dtype | Literal["auto"], weights: Weights | None = None
) -> Any:
    """transformers' own class, or ours for model_type openlm, on the CPU, in evaluation mode.

    No code from the folder runs. With `weights` its tensors are taken from there, one at a time.
    Raises InputError where transformers is absent or cannot load it, and where weights of the
    class are not in the folder or have another shape: transformers would draw them at random.
    """
    require_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM

    stated = _config_of(folder)
    _refuse_kernels(folder, stated)
    if stated.get("model_type") == "openlm":
        import openlm_lite.hf as registered

        registered.OpenLMForCausalLM  # noqa: B018  (the first use registers it)
    plain = {"trust_remote_code": False, "local_files_only": True}
    # mismatched: told below by name, where transformers' own error has none
    how: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    how["ignore_mismatched_sizes"] = True
    try:
        with _quiet_and_in_order():
            if weights is None:
                loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **how, **plain)
            else:
                config = AutoConfig.from_pretrained(folder, **plain)
                with torch.device("meta"):
                    made = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
                tensors = {name: _Unread(weights, name) for name in weights}
                loaded = made.from_pretrained(None, config=config, state_dict=tensors, **how)
        model, found = loaded
        _refuse_incomplete(folder, type(model).__name__, found)
        return model.eval()
    except InputError:
        raise
    except Exception as e:  # a config.json can make it raise anything
        # torch's advice to unpickle without limits is not for strangers' files
        reason = str(e).partition("In PyTorch 2.6")[0]
        raise InputError(f"{folder}: transformers cannot load this folder: {reason}") from e


_ANY_LENGTH = 1 << 30


def max_positions(config: Any) -> int:
    """The tokens that a class of transformers takes, of its config; 2**30 where it states no limit.

    MPT calls it max_seq_len; BLOOM states none, as ALiBi has none.
    """
    names = ("max_position_embeddings", "max_seq_len")
    stated = (getattr(config, name, None) for name in names)
    return next((n for n in stated if n is not None), _ANY_LENGTH)


def _refuse_incomplete(folder: str, hf_class: str, found: Mapping[str, Any]) -> None:
    """Raises InputError for weights that were not in the folder as the class has them.

    `found`: transformers' loading info, which leaves out what is tied or computed. Tensors that
    the class has no place for are told in a warning.
    """
    problems = [f"{name} is not there" for name in sorted(found["missing_keys"])]
    problems += [
        f"{name} is {list(there)} there, {list(expected)} by its config.json"
        for name, there, expected in sorted(found["mismatched_keys"])
    ]
    if problems:
        raise InputError(
            f"{folder}: its weights are not those of {hf_class}, which config.json names: "
            f"{_listed(problems)}; get the folder again, or the config.json that belongs to it"
        )
    if spare := sorted(found["unexpected_keys"]):
        log.warning("%s: %s has no place for %s", folder, hf_class, _listed(spare))


def _listed(texts: Sequence[str], most: int = 8) -> str:
    more = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {more} more" if more > 0 else "")


class _Unread:
    """A tensor that is read when it is taken, like the slices that transformers makes of a file."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weights, self._name = weights, name

    def __getitem__(self, everything: Any) -> Tensor:
        return self._weights[self._name][everything]


@contextmanager
def _quiet_and_in_order() -> Iterator[None]:
    """Without progress bars and the table of keys, and without threads that read tensors ahead."""
    from transformers.utils import logging as their_logging

    shown = their_logging.is_progress_bar_enabled()
    ahead = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    their_logging.disable_progress_bar()
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(_is_no_table)
    try:
        yield
    finally:
        reporter.removeFilter(_is_no_table)
        if ahead is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = ahead
        if shown:
            their_logging.enable_progress_bar()


def _is_no_table(record: logging.LogRecord) -> bool:
    """transformers' report of keys, which `_refuse_incomplete` replaces; its errors of conversion
    point to it."""
    text = record.getMessage()
    return "LOAD REPORT" not in text or "CONVERSION" in text


def _config_of(folder: str) -> dict[str, Any]:
    """config.json; nothing where it cannot be read, which transformers will say."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


_PLAIN_ATTENTION = (None, "eager", "sdpa")


def _refuse_kernels(place: str, config: Any) -> None:
    """Raises InputError for an attention that is code from the hub.

    `attn_implementation: someone/kernel` in a config.json makes transformers fetch and run it
    (with the package `kernels`), whatever trust_remote_code says; `flash_attention_2` may, too.
    """
    for key, value in config.items() if isinstance(config, dict) else ():
        if "attn_implementation" in key and value not in _PLAIN_ATTENTION:
            raise InputError(
                f"{place}: {key} = {value!r} in its config.json may fetch code and run it; allowed "
                "are eager and sdpa: remove the key"
            )
        _refuse_kernels(place, value)


def require_transformers() -> None:
    """Raises InputError with the install line where transformers is absent."""
    if importlib.util.find_spec("transformers") is None:
        raise InputError('transformers is not installed: pip install "openlm-lite[hf]"')
