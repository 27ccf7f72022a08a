"""The classes of transformers that hold architectures of ours: their config.json and ours.

One table per class says which key of its config.json is which field of ours, and what is fixed.
`native.py` reads and writes configs by it, and finds the class that an architecture needs. The
order of FAMILIES is the order of preference between classes that hold one equally well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from openlm_lite.model.config import ModelConfig


class Key(NamedTuple):
    """A key of their config.json (dotted where nested) and the field that it decides."""

    theirs: str
    ours: str
    default: Any
    """what their class takes where the file has no such key"""
    values: Mapping[Any, Any] | None = None
    """their value -> ours, the first that means ours being written; None: the same values"""


class Must(NamedTuple):
    """A key of theirs with only one value that we compute, and what their class takes unasked."""

    value: Any
    default: Any


@dataclass(frozen=True)
class Family:
    """One class. A field of ours that no line of its table names must have our default."""

    hf_class: str
    model_type: str
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """our field -> the value that this class always has"""
    must: Mapping[str, Must] = field(default_factory=dict)
    writes: Mapping[str, Any] = field(default_factory=dict)
    """their key -> value, written and never read"""
    rotary_key: str | None = None
    """their key of the part that is turned; None: all of it"""
    rotary_default: float = 1.0
    misfits: Callable[[ModelConfig], list[str]] = lambda _: []
    """relations between sizes that the class fixes, as sentences"""
    adjust: Callable[[ModelConfig], Mapping[str, Any]] = lambda _: {}
    """our field -> the value that it must have because of others"""

    def allowed(self, name: str) -> tuple[Any, ...] | None:
        """The values of our field that the class holds, the preferred first; None: any."""
        for key in self.keys:
            if key.ours == name:
                return None if key.values is None else tuple(dict.fromkeys(key.values.values()))
        if name in self.fixed:
            return (self.fixed[name],)
        if self.hf_class == "FalconForCausalLM" and name == "block":
            return FALCON_BLOCKS
        if name == "rope_theta" or (name == "rotary_pct" and self.rotary_key):
            return None
        return None if name in _SIZES else (DEFAULTS[name],)


_SIZES = ("n_kv_heads", "head_dim", "d_ff")
"""where no key says them, `misfits` says what they must be"""
DEFAULTS = {f.name: f.default for f in fields(ModelConfig)}
FALCON_BLOCKS = ("parallel_shared_norm", "parallel", "sequential")

_GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
_GELU = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_GPT2_GELU = {"gelu_new": "gelu_tanh", **_GELU}  # written as GPT-2's own name
_LAYER_NORM = {"norm": "layer_norm", "norm_gain": True, "norm_bias": True}
_RMS_NORM = {"norm": "rms_norm", "norm_gain": True, "norm_bias": False}
_ALL_OR_NONE = {False: "none", True: "all"}


def _llama_like(
    eps: float | None = None,
    context: int = 2048,
    n_kv_heads: int | None = None,
    act: Mapping[str, str] = _GATED,
) -> tuple[Key, ...]:
    """The keys that most classes share, with the class's own defaults."""
    keys = (
        Key("vocab_size", "vocab_size", None),
        Key("hidden_size", "d_model", None),
        Key("intermediate_size", "d_ff", None),
        Key("num_hidden_layers", "n_layers", None),
        Key("num_attention_heads", "n_heads", None),
        Key("num_key_value_heads", "n_kv_heads", n_kv_heads),
        Key("max_position_embeddings", "max_seq_len", context),
        Key("hidden_act", "activation", next(iter(act)), act),
        Key("tie_word_embeddings", "tie_embeddings", False),
    )
    return keys if eps is None else (*keys, Key("rms_norm_eps", "norm_eps", eps))


def _heads_make_the_width(cfg: ModelConfig) -> list[str]:
    if cfg.head_dim * cfg.n_heads == cfg.d_model:
        return []
    return [f"head_dim = {cfg.head_dim}: it has d_model / n_heads = {cfg.d_model} / {cfg.n_heads}"]


def _width_divides(cfg: ModelConfig) -> list[str]:
    if cfg.d_model % cfg.n_heads == 0:
        return []
    return [f"n_heads = {cfg.n_heads}: it wants a divisor of d_model = {cfg.d_model}"]


def _one_kv_head_each(cfg: ModelConfig) -> list[str]:
    found = _heads_make_the_width(cfg)
    if cfg.n_kv_heads != cfg.n_heads:
        found.append(f"n_kv_heads = {cfg.n_kv_heads}: it has one for each of {cfg.n_heads} heads")
    return found


def _four_times_wide(cfg: ModelConfig) -> list[str]:
    found = _one_kv_head_each(cfg)
    if cfg.d_ff != 4 * cfg.d_model:
        found.append(f"d_ff = {cfg.d_ff}: it has 4 d_model = {4 * cfg.d_model}")
    return found


def _falcon_misfits(cfg: ModelConfig) -> list[str]:
    found = _heads_make_the_width(cfg)
    if cfg.block == "sequential" and cfg.n_kv_heads not in (1, cfg.n_heads):
        found.append(
            f"n_kv_heads = {cfg.n_kv_heads}: with sequential blocks it has 1 or n_heads = "
            f"{cfg.n_heads}"
        )
    return found


def _falcon_biases(cfg: ModelConfig) -> dict[str, Any]:
    """One switch for all biases."""
    wanted = cfg.mlp_bias or cfg.attn_bias != "none"
    return {"attn_bias": "all" if wanted else "none", "mlp_bias": wanted}


_NO_WINDOW = {"use_sliding_window": Must(False, False)}

FAMILIES: tuple[Family, ...] = (
    Family(
        "OlmoForCausalLM",
        "olmo",
        (
            *_llama_like(),
            Key("attention_bias", "attn_bias", False, _ALL_OR_NONE),
            Key("clip_qkv", "clip_qkv", None),
        ),
        fixed={"norm": "layer_norm", "norm_gain": False, "norm_bias": False, "norm_eps": 1e-5},
        misfits=_heads_make_the_width,
    ),
    Family(
        "StableLmForCausalLM",
        "stablelm",
        (
            *_llama_like(context=4096, n_kv_heads=32),
            Key("layer_norm_eps", "norm_eps", 1e-5),
            Key("use_qkv_bias", "attn_bias", False, {False: "none", True: "qkv"}),
            Key(
                "use_parallel_residual",
                "block",
                False,
                {False: "sequential", True: "parallel_shared_norm"},
            ),
        ),
        fixed=_LAYER_NORM,
        must={"qk_layernorm": Must(False, False)},
        rotary_key="partial_rotary_factor",
        rotary_default=0.25,
        misfits=_heads_make_the_width,
    ),
    Family(
        "LlamaForCausalLM",
        "llama",
        (
            *_llama_like(1e-6),
            Key("head_dim", "head_dim", None),
            Key("attention_bias", "attn_bias", False, _ALL_OR_NONE),
            Key("mlp_bias", "mlp_bias", False),
        ),
        fixed=_RMS_NORM,
        misfits=_width_divides,
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        (*_llama_like(1e-6, context=131_072, n_kv_heads=8), Key("head_dim", "head_dim", None)),
        fixed=_RMS_NORM,
        must={"sliding_window": Must(None, 4096)},
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        _llama_like(1e-6, context=32_768, n_kv_heads=32),
        fixed={**_RMS_NORM, "attn_bias": "qkv"},
        must=_NO_WINDOW,
        writes={"sliding_window": None},
        misfits=_heads_make_the_width,
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        (
            *_llama_like(1e-6, context=32_768, n_kv_heads=32),
            Key("head_dim", "head_dim", 128),
            Key("attention_bias", "attn_bias", False, _ALL_OR_NONE),
        ),
        fixed={**_RMS_NORM, "qk_norm": "per_head"},
        must=_NO_WINDOW,
        writes={"sliding_window": None},
    ),
    Family(
        "Olmo2ForCausalLM",
        "olmo2",
        (*_llama_like(1e-5), Key("attention_bias", "attn_bias", False, _ALL_OR_NONE)),
        fixed={**_RMS_NORM, "qk_norm": "full", "block": "sequential_post_norm"},
        misfits=_heads_make_the_width,
    ),
    Family(
        "OlmoeForCausalLM",
        "olmoe",
        (
            *_llama_like(1e-5, context=4096),
            Key("attention_bias", "attn_bias", False, _ALL_OR_NONE),
            Key("clip_qkv", "clip_qkv", None),
        ),
        fixed={**_RMS_NORM, "qk_norm": "full"},
        must={"num_experts": Must(1, 64), "num_experts_per_tok": Must(1, 8)},
        misfits=_heads_make_the_width,
    ),
    Family(
        "FalconForCausalLM",
        "falcon",
        (
            Key("vocab_size", "vocab_size", None),
            Key("hidden_size", "d_model", None),
            Key("num_hidden_layers", "n_layers", None),
            Key("num_attention_heads", "n_heads", None),
            Key("ffn_hidden_size", "d_ff", None),
            Key("max_position_embeddings", "max_seq_len", 2048),
            Key("layer_norm_epsilon", "norm_eps", 1e-5),
            Key("activation", "activation", "gelu", _GELU),
            Key("bias", "attn_bias", False, _ALL_OR_NONE),
            Key("bias", "mlp_bias", False),
            Key("tie_word_embeddings", "tie_embeddings", True),
        ),
        fixed=_LAYER_NORM,
        must={"alibi": Must(False, False)},
        misfits=_falcon_misfits,
        adjust=_falcon_biases,
    ),
    Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        (
            *(k for k in _llama_like(act=_GELU) if k.ours != "n_kv_heads"),
            Key("layer_norm_eps", "norm_eps", 1e-5),
            Key("attention_bias", "attn_bias", True, _ALL_OR_NONE),
            Key("use_parallel_residual", "block", True, {True: "parallel", False: "sequential"}),
        ),
        fixed={**_LAYER_NORM, "mlp_bias": True},
        rotary_key="rotary_pct",
        rotary_default=0.25,
        misfits=_one_kv_head_each,
    ),
    Family(
        "MptForCausalLM",
        "mpt",
        (
            Key("vocab_size", "vocab_size", None),
            Key("d_model", "d_model", None),
            Key("n_layers", "n_layers", None),
            Key("n_heads", "n_heads", None),
            Key("max_seq_len", "max_seq_len", 2048),
            Key("layer_norm_epsilon", "norm_eps", 1e-5),
            Key("attn_config.clip_qkv", "clip_qkv", None),
            Key("tie_word_embeddings", "tie_embeddings", True),
        ),
        fixed={
            "norm": "layer_norm",
            "norm_gain": True,
            "norm_bias": False,
            "activation": "gelu",
            "positions": "alibi",
            "alibi_bias_max": 8.0,
        },
        must={
            "attn_config.alibi": Must(True, True),
            "attn_config.alibi_bias_max": Must(8, 8),
            "attn_config.softmax_scale": Must(None, None),
            "attn_config.qk_ln": Must(False, False),
            "expansion_ratio": Must(4, 4),
            "no_bias": Must(True, True),
            "logit_scale": Must(None, None),
        },
        misfits=_four_times_wide,
    ),
    Family(
        "BloomForCausalLM",
        "bloom",
        (
            Key("vocab_size", "vocab_size", None),
            Key("hidden_size", "d_model", None),
            Key("n_layer", "n_layers", None),
            Key("n_head", "n_heads", None),
            Key("seq_length", "max_seq_len", 2048),
            Key("layer_norm_epsilon", "norm_eps", 1e-5),
            Key("tie_word_embeddings", "tie_embeddings", True),
        ),
        fixed={
            **_LAYER_NORM,
            "embedding_norm": True,
            "activation": "gelu_tanh",
            "attn_bias": "all",
            "mlp_bias": True,
            "positions": "alibi",
            "alibi_bias_max": 8.0,
        },
        must={"apply_residual_connection_post_layernorm": Must(False, False)},
        misfits=_four_times_wide,
    ),
    Family(
        "GPT2LMHeadModel",
        "gpt2",
        (
            Key("vocab_size", "vocab_size", None),
            Key("n_embd", "d_model", None),
            Key("n_layer", "n_layers", None),
            Key("n_head", "n_heads", None),
            Key("n_inner", "d_ff", None),
            Key("n_positions", "max_seq_len", 1024),
            Key("layer_norm_epsilon", "norm_eps", 1e-5),
            Key(
                "activation_function", "activation", "gelu_new", {"gelu_new": "gelu_tanh", **_GELU}
            ),
            Key("tie_word_embeddings", "tie_embeddings", True),
        ),
        fixed={**_LAYER_NORM, "attn_bias": "all", "mlp_bias": True, "positions": "learned"},
        must={
            "scale_attn_weights": Must(True, True),
            "scale_attn_by_inverse_layer_idx": Must(False, False),
            "add_cross_attention": Must(False, False),
        },
        writes={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        misfits=_one_kv_head_each,
    ),
)

BY_CLASS = {family.hf_class: family for family in FAMILIES}
BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}
