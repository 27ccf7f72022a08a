"""`openlm export`: a checkpoint as a folder that transformers' own classes load, no remote code.

Every class below computes the same function as our model. Where ours has LayerNorm and the class
has RMSNorm, the weights are centred: LayerNorm(x) = RMSNorm(x - mean(x)), and the residual stream
is only ever read through norms, so taking the mean over D out of everything that writes to it
(embedding rows, `wo`, `w_down`) changes no logit and makes the stream zero-mean. In the same way
the rows of `wq` and `wk` are centred for qk-norm. A tied head is exported apart, as trained.

    norm                      qk_norm       class
    RMSNorm                   none          LlamaForCausalLM
                              per_head      Qwen3ForCausalLM
                              full          OlmoeForCausalLM with one expert
    LayerNorm without both    none          OlmoForCausalLM (eps 1e-5), else as the next line
    LayerNorm                 none          StableLmForCausalLM
    LayerNorm without bias    per_head      Qwen3ForCausalLM, centred
                              full (DCLM)   OlmoeForCausalLM with one expert, centred
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError
from openlm_lite.hf.names import ROUTER, names_of
from openlm_lite.hf.source import find_tokenizer, read_model
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.transformer import Transformer
from openlm_lite.storage import sync_folder, write_json

# A wrong mapping changes logits by about their own size, fp32 arithmetic by 1e-6 of it.
MAX_RELATIVE_DIFFERENCE = 1e-4
DEFAULT_SHARD_BYTES = 5 * 10**9
_OLMO_EPS = 1e-5  # fixed in its code
_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "OlmoForCausalLM": "olmo",
    "StableLmForCausalLM": "stablelm",
    "OlmoeForCausalLM": "olmoe",
}


@dataclass(frozen=True)
class ExportReport:
    """What was written. Differences are the largest over the logits of random tokens, in fp32.

    `max_logit_difference` is between our model and the native class with fp32 weights;
    `rounding_difference` what storing them in bf16 adds to it (0 for float32).
    """

    path: str
    native_class: str
    n_params: int
    max_logit_difference: float
    rounding_difference: float


# --- the architecture ----------------------------------------------------------------------------


def native_class_of(cfg: ModelConfig) -> str:
    """The transformers class that holds `cfg` exactly (table at the top).

    Raises InputError that names the field that none of them has.
    """
    native_class = _class_for_norms(cfg)
    fixed_head_dim = native_class not in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    if fixed_head_dim and cfg.head_dim * cfg.n_heads != cfg.d_model:
        raise InputError(
            f"model.head_dim = {cfg.head_dim} cannot be exported: {native_class} has "
            f"head_dim = d_model / n_heads = {cfg.d_model} / {cfg.n_heads}"
        )
    if native_class == "LlamaForCausalLM" and cfg.d_model % cfg.n_heads:
        raise InputError(
            f"model.n_heads = {cfg.n_heads} cannot be exported: {native_class} wants a divisor of "
            f"d_model = {cfg.d_model}"
        )
    return native_class


def _class_for_norms(cfg: ModelConfig) -> str:
    if cfg.qk_norm != "none":
        if cfg.norm_bias:
            raise InputError(
                f"model.norm_bias = true with model.qk_norm = {cfg.qk_norm} cannot be exported: no "
                "native class has biases in its norms and qk-norm; allowed is norm_bias = false"
            )
        return "Qwen3ForCausalLM" if cfg.qk_norm == "per_head" else "OlmoeForCausalLM"
    if cfg.norm == "rms_norm":
        return "LlamaForCausalLM"
    if not cfg.norm_gain and not cfg.norm_bias and cfg.norm_eps == _OLMO_EPS:
        return "OlmoForCausalLM"
    return "StableLmForCausalLM"


def is_centred(cfg: ModelConfig) -> bool:
    """Whether the export takes means out of the weights: LayerNorm where the class has RMSNorm."""
    return cfg.norm == "layer_norm" and cfg.qk_norm != "none"


def native_config(cfg: ModelConfig, eot_id: int, dtype: str) -> dict[str, Any]:
    """config.json. Rotary settings stand twice: transformers 5 reads `rope_parameters`;
    4.x and llama.cpp read the old keys and take wrong defaults where these are absent."""
    native_class = native_class_of(cfg)
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    config: dict[str, Any] = {
        "architectures": [native_class],
        "model_type": _MODEL_TYPES[native_class],
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "max_position_embeddings": cfg.max_seq_len,
        "hidden_act": "silu",
        "tie_word_embeddings": cfg.tie_embeddings and not is_centred(cfg),
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if native_class == "StableLmForCausalLM":
        rope["partial_rotary_factor"] = 1.0
        config |= {
            "layer_norm_eps": cfg.norm_eps,
            "partial_rotary_factor": 1.0,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
            "hidden_dropout": 0.0,
        }
        return config
    config["attention_bias"] = False
    if native_class == "OlmoForCausalLM":
        return config | {"clip_qkv": None}
    config["rms_norm_eps"] = cfg.norm_eps
    if native_class == "OlmoeForCausalLM":
        return config | {"clip_qkv": None, "num_experts": 1, "num_experts_per_tok": 1}
    config["head_dim"] = cfg.head_dim
    if native_class == "Qwen3ForCausalLM":
        return config | {"use_sliding_window": False, "sliding_window": None}
    return config | {"mlp_bias": False}


# --- the weights ---------------------------------------------------------------------------------


def native_weights(cfg: ModelConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(native name, fp32 tensor) of every tensor of the export, one at a time."""
    native_class = native_class_of(cfg)
    for ours, theirs in names_of(native_class, cfg):
        if ours == "output.weight" and cfg.tie_embeddings:
            if is_centred(cfg):
                yield theirs, weights["embedding.weight"].float()
            continue
        yield theirs, _native_tensor(cfg, ours, weights)
    if native_class == "OlmoeForCausalLM":
        for i in range(cfg.n_layers):
            yield ROUTER.replace("{i}", str(i)), torch.zeros(1, cfg.d_model)


def _native_tensor(cfg: ModelConfig, name: str, weights: Mapping[str, Tensor]) -> Tensor:
    if name not in weights:  # a norm without gain or bias, in a class that has one
        width = _norm_width(cfg, name)
        return torch.zeros(width) if name.endswith(".bias") else torch.ones(width)
    weight = weights[name].float()
    if not is_centred(cfg):
        return weight
    if name == "embedding.weight":  # [V, D]
        return _minus_mean(weight, dim=1)
    if name.endswith(("wo.weight", "w_down.weight")):  # [D, in]
        return _minus_mean(weight, dim=0)
    if name.endswith(("wq.weight", "wk.weight")):  # [heads * H, D]
        width = cfg.head_dim if cfg.qk_norm == "per_head" else weight.shape[0]
        return _minus_mean(weight.view(-1, width, cfg.d_model), dim=1).reshape(weight.shape)
    return weight


def _minus_mean(weight: Tensor, dim: int) -> Tensor:
    wide = weight.double()
    return (wide - wide.mean(dim, keepdim=True)).float()


def _norm_width(cfg: ModelConfig, name: str) -> int:
    if ".q_norm." not in name and ".k_norm." not in name:
        return cfg.d_model
    if cfg.qk_norm == "per_head":
        return cfg.head_dim
    return cfg.q_width if ".q_norm." in name else cfg.kv_width


# --- writing -------------------------------------------------------------------------------------


def write_weights(
    folder: str,
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """model.safetensors, or above `max_shard_bytes` numbered files and their index."""
    shards: list[dict[str, int]] = []  # per file: tensor name -> bytes
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        path = os.path.join(folder, f"shard-{len(shards)}")
        save_file(pending, path, metadata={"format": "pt"})
        shards.append({name: t.nbytes for name, t in pending.items()})
        pending.clear()

    for name, tensor in tensors:
        tensor = tensor.to(dtype).contiguous()
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = tensor
    flush()
    final_names = ["model.safetensors"]
    if len(shards) > 1:
        n = len(shards)
        final_names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        weight_map = {
            name: file for file, shard in zip(final_names, shards, strict=True) for name in shard
        }
        total = sum(sum(shard.values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(os.path.join(folder, "model.safetensors.index.json"), index)
    for i, file in enumerate(final_names):
        _settle(os.path.join(folder, f"shard-{i}"), os.path.join(folder, file))


def _settle(written: str, final: str) -> None:
    """Rename, on disk, and with the mode that the umask gives: safetensors makes files 0600."""
    with open(final, "xb"):
        mode = os.stat(final).st_mode & 0o777
    os.chmod(written, mode)
    descriptor = os.open(written, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(written, final)


def write_native(
    folder: str,
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Fill the existing, empty `folder`."""
    cfg, eot_id = model.cfg, tokenizer.eot_id
    write_json(os.path.join(folder, "config.json"), native_config(cfg, eot_id, dtype))
    ids = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    write_json(os.path.join(folder, "generation_config.json"), ids)
    tokenizer.save(folder)
    tensors = native_weights(cfg, model.state_dict())
    write_weights(folder, tensors, getattr(torch, dtype), max_shard_bytes)


# --- the check -----------------------------------------------------------------------------------


def load_native(folder: str, dtype: torch.dtype | Literal["auto"]) -> Any:
    """transformers' own class for `folder`, on the CPU, in evaluation mode; no remote code.

    Raises InputError where transformers is absent or cannot load the folder.
    """
    require_transformers()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, local_files_only=True
        ).eval()
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise InputError(f"{folder}: transformers cannot load this folder: {e}") from e
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.inference_mode()
def logit_difference(model: Transformer, folder: str) -> tuple[float, float]:
    """(largest difference, largest size) of the logits of `model` and of transformers' class.

    The class loads `folder` as it is on disk, in fp32; the tokens are random, always the same.
    """
    native = load_native(folder, torch.float32)
    shape = (2, min(64, model.cfg.max_seq_len))
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.cfg.vocab_size, shape, generator=generator)
    ours_BTV = model(tokens_BT)
    difference = (native(tokens_BT).logits - ours_BTV).abs().max().item()
    return difference, ours_BTV.abs().max().item()


def require_transformers() -> None:
    """Raises InputError with the install line where transformers is absent."""
    if importlib.util.find_spec("transformers") is None:
        raise InputError('transformers is not installed: pip install "openlm-lite[hf]"')


# --- the verb ------------------------------------------------------------------------------------


def export_checkpoint(
    checkpoint: str,
    out: str,
    *,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> ExportReport:
    """Write `checkpoint` (a run's or a step's folder) to the new folder `out`.

    `out` appears whole, or not at all: it is written beside its place, loaded by transformers and
    compared with our model, then renamed. Raises InputError for bad input before anything is
    written, and when the logits differ by more than MAX_RELATIVE_DIFFERENCE of their size.
    """
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise InputError(f"{out}: exists and is no empty folder; name a new one")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype = {dtype!r}: allowed are float32 and bfloat16")
    require_transformers()
    step_folder = resolve_checkpoint(checkpoint)
    model = read_model(step_folder)
    cfg = model.cfg
    native_class = native_class_of(cfg)
    words = find_tokenizer(step_folder, tokenizer, cfg.vocab_size)

    final = os.path.abspath(out)
    temporary = os.path.join(os.path.dirname(final), f".{os.path.basename(final)}.{os.getpid()}")
    os.makedirs(temporary)
    try:
        write_native(temporary, model, words, "float32", max_shard_bytes)
        difference, size = logit_difference(model, temporary)
        if not difference <= MAX_RELATIVE_DIFFERENCE * max(1.0, size):  # NaN is refused too
            raise InputError(
                f"{step_folder}: as {native_class} the logits differ by {difference:.2e} (their "
                f"size is {size:.2e}); the weights do not survive this export, nothing was written"
            )
        rounding = 0.0
        if dtype == "bfloat16":
            _empty(temporary)
            write_native(temporary, model, words, dtype, max_shard_bytes)
            rounding, _ = logit_difference(model, temporary)
        sync_folder(temporary)
        os.rename(temporary, final)  # replaces an empty folder
        sync_folder(os.path.dirname(final))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return ExportReport(out, native_class, cfg.n_params, difference, rounding)


def _empty(folder: str) -> None:
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))
