"""OpenLM's description of an architecture, in every spelling, as the fields of `ModelConfig`.

Standard library only, and nothing of this package: exported folders carry a copy of this file
beside `modeling_openlm.py`. The spellings:

    model JSON     {"hidden_dim": …, "n_layers": …, "model_norm": …, "qk_norm": …}
    HF layout A    {"model_type": "openlm", "dim": …, "norm_type": …, "apply_qk_norm": …}
    HF layout B    {"model_type": "openlm", "params": null, "params_args_dict": {"dim": …}}
    our own        {"model_type": "openlm", "d_model": …, "norm": …, "positions": …}

OpenLM reads hidden_dim | dim, model_norm | norm_type and qk_norm | apply_qk_norm as one field each;
so do we, in both places of a file that holds A and B. A null is an absent field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

AUTO_MAP = {
    "AutoConfig": "modeling_openlm.OpenLMConfig",
    "AutoModel": "modeling_openlm.OpenLMModel",
    "AutoModelForCausalLM": "modeling_openlm.OpenLMForCausalLM",
}
"""`auto_map` of an exported config.json: where transformers finds the classes in the folder"""

SIZES = (
    "vocab_size",
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "d_ff",
    "max_seq_len",
)
DEFAULTS: dict[str, Any] = {
    "block": "sequential",
    "norm": "rms_norm",
    "norm_gain": True,
    "norm_bias": False,
    "norm_eps": 1e-5,
    "qk_norm": "none",
    "embedding_norm": False,
    "activation": "swiglu",
    "mlp_bias": False,
    "attn_bias": "none",
    "clip_qkv": None,
    "positions": "rope",
    "rope_theta": 10_000.0,
    "rotary_pct": 1.0,
    "rope_style": "half",
    "rope_freq_dtype": "fp32",
    "alibi_bias_max": 8.0,
    "tie_embeddings": False,
}
"""what the other fields of `ModelConfig` are where a description in our names leaves them out"""

CHOICES: dict[str, tuple[str, ...]] = {
    "block": ("sequential", "sequential_post_norm", "parallel", "parallel_shared_norm"),
    "norm": ("layer_norm", "rms_norm"),
    "qk_norm": ("none", "full", "per_head"),
    "activation": ("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"),
    "attn_bias": ("none", "qkv", "all"),
    "positions": ("rope", "alibi", "learned", "none"),
    "rope_style": ("half", "interleaved"),
    "rope_freq_dtype": ("fp32", "bf16"),
}

# --- OpenLM's values in our fields ---------------------------------------------------------------

_GAIN_AND_BIAS = {"norm": "layer_norm", "norm_gain": True, "norm_bias": True}
_GAIN_ONLY = {"norm": "layer_norm", "norm_gain": True, "norm_bias": False}
_NORMS = {
    "default_layer_norm": _GAIN_AND_BIAS,
    "lp_layer_norm": _GAIN_AND_BIAS,
    "gain_only_lp_layer_norm": _GAIN_ONLY,
    "gain_only_layer_norm": _GAIN_ONLY,
    "no_wb_layer_norm": {"norm": "layer_norm", "norm_gain": False, "norm_bias": False},
    "rms_norm": {"norm": "rms_norm", "norm_gain": True, "norm_bias": False},
}
_FEED_FORWARDS = {
    "swiglu": {"activation": "swiglu", "mlp_bias": False},
    "swiglu_torch": {"activation": "swiglu", "mlp_bias": False},
    "gelu": {"activation": "gelu", "mlp_bias": False},
    "gemma_geglu": {"activation": "geglu", "mlp_bias": True},
}
# head_rotary turns all of one head's queries and keys by the same angle: no position is left.
_POSITIONS = {
    "rotary": {"positions": "rope", "rope_style": "half"},
    "llama_rotary": {"positions": "rope", "rope_style": "interleaved"},
    "head_rotary": {"positions": "none", "rope_style": "half"},
    "none": {"positions": "none", "rope_style": "half"},
}
_QK_NORMS = {True: "full", False: "none"}
_FLAGS = {True: True, False: False}
_ATTENTIONS = dict.fromkeys(
    ("auto", "torch_attn", "xformers_attn", "xformers_attn_variable_length"), "softmax"
)

OPENLM_KEYS = frozenset(
    {
        "dim",
        "hidden_dim",
        "seq_len",
        "post_embed_norm",
        "weight_tying",
        "norm_type",
        "model_norm",
        "apply_qk_norm",
        "positional_embedding_type",
        "ffn_type",
        "attn_name",
        "attn_activation",
        "attn_seq_scalar",
        "attn_seq_scalar_alpha",
        "moe_freq",
        "moe_num_experts",
        "moe_top_k",
        "moe_capacity_factor",
        "moe_loss_weight",
        "moe_weight_parallelism",
        "moe_expert_model_parallelism",
        "params",
        "params_args_dict",
    }
)
"""keys of a config.json that are OpenLM's alone: once read, they are not kept"""

Source = tuple[str, Mapping[str, Any]]  # ("" or "params_args_dict.", the fields there)


def model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of `ModelConfig`, from `config` in any of the spellings above.

    What a file of sizes alone leaves open is OpenLM's default: LayerNorm with gain and bias, no
    qk-norm, SwiGLU, rotary embedding, eps 1e-5. Raises ValueError, with the field, its value and
    what is allowed, for what `ModelConfig` cannot hold and for fields that contradict each other.
    """
    nested = config.get("params_args_dict")
    sources: list[Source] = [("", config)]
    if isinstance(nested, Mapping):
        sources.append(("params_args_dict.", nested))
    _refuse_other_architectures(sources)
    return _own_fields(config) if "d_model" in config else _openlm_fields(sources)


def _openlm_fields(sources: list[Source]) -> dict[str, Any]:
    d_model = _read(sources, ("dim", "hidden_dim"), _size)
    n_heads = _read(sources, ("n_heads",), _size)
    feed_forward = _read(sources, ("ffn_type",), _one_of(_FEED_FORWARDS), "swiglu")
    norm = _read(sources, ("norm_type", "model_norm"), _one_of(_NORMS), "default_layer_norm")
    positions = _read(sources, ("positional_embedding_type",), _one_of(_POSITIONS), "rotary")
    is_gated = feed_forward["activation"] != "gelu"
    return DEFAULTS | {
        "vocab_size": _read(sources, ("vocab_size",), _size),
        "d_model": d_model,
        "n_layers": _read(sources, ("n_layers",), _size),
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": d_model // n_heads,
        # of gated ones 8/3 d, rounded up to a multiple of 256
        "d_ff": 256 * ((8 * d_model // 3 + 255) // 256) if is_gated else 4 * d_model,
        "max_seq_len": _read(sources, ("seq_len",), _size),
        "norm_eps": _read(sources, ("norm_eps",), _positive, 1e-5),
        "qk_norm": _read(sources, ("apply_qk_norm", "qk_norm"), _one_of(_QK_NORMS), False),
        "embedding_norm": _read(sources, ("post_embed_norm",), _one_of(_FLAGS), False),
        "tie_embeddings": _read(sources, ("weight_tying",), _one_of(_FLAGS), False),
        **norm,
        **feed_forward,
        **positions,
    }


def _own_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {name: _read([("", config)], (name,), _size) for name in SIZES}
    rest = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    for name, allowed in CHOICES.items():
        _one_of(dict.fromkeys(allowed))(name, rest[name])
    return sizes | rest


def _refuse_other_architectures(sources: list[Source]) -> None:
    for place, source in sources:
        if source.get("n_layer") is not None or "mamba" in str(source.get("model")).lower():
            named = "n_layer" if source.get("n_layer") is not None else "model"
            raise ValueError(
                f"{place}{named} = {source[named]!r}: this is Mamba; allowed are Transformers"
            )
        if source.get("moe_freq"):
            raise ValueError(
                f"{place}moe_freq = {source['moe_freq']!r}: a mixture of experts; "
                "allowed is 0, dense feed-forward networks"
            )
        if source.get("attn_name") is not None:
            _one_of(_ATTENTIONS)(f"{place}attn_name", source["attn_name"])
        if source.get("attn_activation") is not None:
            raise ValueError(
                f"{place}attn_activation = {source['attn_activation']!r}: attention without "
                "softmax; allowed is null"
            )
        if source.get("rotary_old"):
            raise ValueError(
                f"{place}rotary_old = {source['rotary_old']!r}: a name of old versions; say "
                "positional_embedding_type = head_rotary"
            )


# --- reading one field ---------------------------------------------------------------------------


def _read(
    sources: list[Source],
    spellings: tuple[str, ...],
    parse: Callable[[str, Any], Any],
    default: Any = None,
) -> Any:
    """`parse(name, value)` of a field; all places and spellings that state it must agree.

    `default` is a value as a file would state it; None: the field must be there.
    """
    stated = [
        (place + name, source[name], parse(place + name, source[name]))
        for place, source in sources
        for name in spellings
        if source.get(name) is not None
    ]
    if not stated:
        if default is None:
            raise ValueError(f"{' or '.join(spellings)}: absent; state it")
        return parse(spellings[0], default)
    name, value, meaning = stated[0]
    for other_name, other_value, other_meaning in stated[1:]:
        if other_meaning != meaning:
            raise ValueError(
                f"{name} = {value!r} and {other_name} = {other_value!r} contradict each other"
            )
    return meaning


def _size(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} = {value!r}, must be a positive integer")
    return value


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name} = {value!r}, must be a positive number")
    return value


def _one_of(table: Mapping[Any, Any]) -> Callable[[str, Any], Any]:
    def parse(name: str, value: Any) -> Any:
        # by type too: 1 == True, and a list has no hash
        if not any(value == key and type(value) is type(key) for key in table):
            raise ValueError(f"{name} = {value!r}, must be one of: {', '.join(map(str, table))}")
        return table[value]

    return parse
