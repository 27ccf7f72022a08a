"""Do two forms of a model compute the same? Both run on the same tokens, one after the other, so
that only one of them is in memory, once: transformers takes the tensors from us one by one, for
its own way maps the files and holds besides what it makes of them (the experts of OLMoE)."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from openlm_lite.errors import InputError
from openlm_lite.hf.source import build_model
from openlm_lite.hf.weights import Weights, open_weights
from openlm_lite.model.config import ModelConfig

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
    Raises InputError where transformers is absent or cannot load it.
    """
    require_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM

    stated = _config_of(folder)
    _refuse_kernels(folder, stated)
    if stated.get("model_type") == "openlm":
        import openlm_lite.hf as registered

        registered.OpenLMForCausalLM  # noqa: B018  (the first use registers it)
    plain = {"trust_remote_code": False, "local_files_only": True}
    try:
        with _quiet_and_in_order():
            if weights is None:
                return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **plain).eval()
            config = AutoConfig.from_pretrained(folder, **plain)
            with torch.device("meta"):
                made = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
            tensors = {name: _Unread(weights, name) for name in weights}
            return made.from_pretrained(None, config=config, dtype=dtype, state_dict=tensors).eval()
    except InputError:
        raise
    except Exception as e:  # a config.json can make it raise anything
        # torch's advice to unpickle without limits is not for strangers' files
        reason = str(e).partition("In PyTorch 2.6")[0]
        raise InputError(f"{folder}: transformers cannot load this folder: {reason}") from e


class _Unread:
    """A tensor that is read when it is taken, like the slices that transformers makes of a file."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weights, self._name = weights, name

    def __getitem__(self, everything: Any) -> Tensor:
        return self._weights[self._name][everything]


@contextmanager
def _quiet_and_in_order() -> Iterator[None]:
    """Without progress bars, and without the threads that read all tensors ahead of their use."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    ahead = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    logging.disable_progress_bar()
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if ahead is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = ahead
        if shown:
            logging.enable_progress_bar()


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
