"""What each Hugging Face class calls our modules, and how it lays their tensors out.

Left the class's module, right ours; `{i}` is the layer. Where several of ours make one of theirs,
the layout says how:

    rows       one below the other                          (OpenLM, MPT)
    grouped    per key/value head its queries, key, value   (GPT-NeoX, BLOOM, Falcon)
    columns    rows, and the matrix transposed              (GPT-2's Conv1D)

A module stands for its weight and, where ours has one, its bias.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openlm_lite.model.config import ModelConfig
from openlm_lite.model.transformer import Transformer


class Module(NamedTuple):
    """One module of theirs, made of one or several of ours."""

    theirs: str
    ours: tuple[str, ...]
    layout: str = "rows"


class Rule(NamedTuple):
    """One tensor of theirs, made of one or several of ours."""

    theirs: str
    ours: tuple[str, ...]
    layout: str


_QKV = tuple(f"layers.{{i}}.attention.{w}" for w in ("wq", "wk", "wv"))
_GATE_UP = ("layers.{i}.feed_forward.w_gate", "layers.{i}.feed_forward.w_up")


def _modules(prefix: str, names: dict[str, str]) -> list[Module]:
    """{their name behind `prefix`: our name behind `layers.{i}.`} of one block."""
    return [
        Module(f"{prefix}.{theirs}", (f"layers.{{i}}.{ours}",)) for theirs, ours in names.items()
    ]


_LLAMA_ENDS = [
    Module("model.embed_tokens", ("embedding",)),
    Module("model.norm", ("norm",)),
    Module("lm_head", ("output",)),
]
_LLAMA_ATTENTION = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
}
_LLAMA_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_LLAMA_MLP = {
    "mlp.gate_proj": "feed_forward.w_gate",
    "mlp.up_proj": "feed_forward.w_up",
    "mlp.down_proj": "feed_forward.w_down",
}
_LLAMA = [
    *_LLAMA_ENDS,
    *_modules("model.layers.{i}", _LLAMA_ATTENTION | _LLAMA_NORMS | _LLAMA_MLP),
]

MODULES: dict[str, list[Module]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "StableLmForCausalLM": _LLAMA,
    "OlmoForCausalLM": _LLAMA,
    "Olmo2ForCausalLM": [
        *_LLAMA_ENDS,
        *_modules(
            "model.layers.{i}",
            _LLAMA_ATTENTION
            | {
                "post_attention_layernorm": "attention_norm",
                "post_feedforward_layernorm": "ffn_norm",
            }
            | _LLAMA_MLP,
        ),
    ],
    "OlmoeForCausalLM": [
        *_LLAMA_ENDS,
        *_modules(
            "model.layers.{i}",
            _LLAMA_ATTENTION
            | _LLAMA_NORMS
            | {k.replace("mlp.", "mlp.experts.0."): v for k, v in _LLAMA_MLP.items()},
        ),
    ],
    "GPTNeoXForCausalLM": [
        Module("gpt_neox.embed_in", ("embedding",)),
        *_modules(
            "gpt_neox.layers.{i}",
            {
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "ffn_norm",
                "attention.dense": "attention.wo",
                "mlp.dense_h_to_4h": "feed_forward.w_up",
                "mlp.dense_4h_to_h": "feed_forward.w_down",
            },
        ),
        Module("gpt_neox.layers.{i}.attention.query_key_value", _QKV, "grouped"),
        Module("gpt_neox.final_layer_norm", ("norm",)),
        Module("embed_out", ("output",)),
    ],
    "FalconForCausalLM": [
        Module("transformer.word_embeddings", ("embedding",)),
        *_modules(
            "transformer.h.{i}",
            {
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "ffn_norm",
                "self_attention.dense": "attention.wo",
                "mlp.dense_h_to_4h": "feed_forward.w_up",
                "mlp.dense_4h_to_h": "feed_forward.w_down",
            },
        ),
        Module("transformer.h.{i}.self_attention.query_key_value", _QKV, "grouped"),
        Module("transformer.ln_f", ("norm",)),
        Module("lm_head", ("output",)),
    ],
    "BloomForCausalLM": [
        Module("transformer.word_embeddings", ("embedding",)),
        Module("transformer.word_embeddings_layernorm", ("embedding_norm",)),
        *_modules(
            "transformer.h.{i}",
            {
                "input_layernorm": "attention_norm",
                "post_attention_layernorm": "ffn_norm",
                "self_attention.dense": "attention.wo",
                "mlp.dense_h_to_4h": "feed_forward.w_up",
                "mlp.dense_4h_to_h": "feed_forward.w_down",
            },
        ),
        Module("transformer.h.{i}.self_attention.query_key_value", _QKV, "grouped"),
        Module("transformer.ln_f", ("norm",)),
        Module("lm_head", ("output",)),
    ],
    "MptForCausalLM": [
        Module("transformer.wte", ("embedding",)),
        *_modules(
            "transformer.blocks.{i}",
            {
                "norm_1": "attention_norm",
                "norm_2": "ffn_norm",
                "attn.out_proj": "attention.wo",
                "ffn.up_proj": "feed_forward.w_up",
                "ffn.down_proj": "feed_forward.w_down",
            },
        ),
        Module("transformer.blocks.{i}.attn.Wqkv", _QKV),
        Module("transformer.norm_f", ("norm",)),
        Module("lm_head", ("output",)),
    ],
    "GPT2LMHeadModel": [
        Module("transformer.wte", ("embedding",)),
        Module("transformer.wpe", ("position_embedding",)),
        *_modules("transformer.h.{i}", {"ln_1": "attention_norm", "ln_2": "ffn_norm"}),
        Module("transformer.h.{i}.attn.c_attn", _QKV, "columns"),
        Module("transformer.h.{i}.attn.c_proj", ("layers.{i}.attention.wo",), "columns"),
        Module("transformer.h.{i}.mlp.c_fc", ("layers.{i}.feed_forward.w_up",), "columns"),
        Module("transformer.h.{i}.mlp.c_proj", ("layers.{i}.feed_forward.w_down",), "columns"),
        Module("transformer.ln_f", ("norm",)),
        Module("lm_head", ("output",)),
    ],
    "OpenLMForCausalLM": [
        Module("model.tok_embeddings", ("embedding",)),
        Module("model.position_embeddings", ("position_embedding",)),
        Module("model.post_embed_norm", ("embedding_norm",)),
        *_modules(
            "model.layers.{i}",
            {
                "attention_norm": "attention_norm",
                "attention.q_norm": "attention.q_norm",
                "attention.k_norm": "attention.k_norm",
                "attention.out_proj": "attention.wo",
                "ffn_norm": "ffn_norm",
            },
        ),
        Module("model.layers.{i}.attention.in_proj", _QKV),
        Module("model.norm", ("norm",)),
        Module("model.output", ("output",)),
    ],
}
"""all but OpenLM's feed-forward networks, which `_OPENLM_FFN` has"""

_OPENLM_BLOCK = "model.layers.{i}.feed_forward"
_OPENLM_GEGLU = [
    Module(f"{_OPENLM_BLOCK}.gate_proj", ("layers.{i}.feed_forward.w_gate",)),
    Module(f"{_OPENLM_BLOCK}.up_proj", ("layers.{i}.feed_forward.w_up",)),
    Module(f"{_OPENLM_BLOCK}.down_proj", ("layers.{i}.feed_forward.w_down",)),
]
_OPENLM_GELU = [
    Module(f"{_OPENLM_BLOCK}.0", ("layers.{i}.feed_forward.w_up",)),
    Module(f"{_OPENLM_BLOCK}.2", ("layers.{i}.feed_forward.w_down",)),
]
_OPENLM_FFN = {
    "swiglu": [
        Module(f"{_OPENLM_BLOCK}.w12", _GATE_UP),
        Module(f"{_OPENLM_BLOCK}.w3", ("layers.{i}.feed_forward.w_down",)),
    ],
    "geglu": _OPENLM_GEGLU,
    "geglu_tanh": _OPENLM_GEGLU,
    "gelu": _OPENLM_GELU,
    "gelu_tanh": _OPENLM_GELU,
}

_FALCON_TWO_NORMS = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}


@functools.cache
def parameter_shapes(cfg: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Our parameters' names and shapes, in the model's order."""
    with torch.device("meta"):
        model = Transformer(cfg)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def rules_of(hf_class: str, cfg: ModelConfig) -> list[Rule]:
    """Every tensor that the class has for `cfg`, layer by layer; ours are each used once.

    A tied head has no tensor.
    """
    ours = parameter_shapes(cfg)
    rules = []
    own_ffn = _OPENLM_FFN[cfg.activation] if hf_class == "OpenLMForCausalLM" else []
    for module in [*MODULES[hf_class], *own_ffn]:
        theirs = module.theirs
        if hf_class == "FalconForCausalLM" and cfg.block == "parallel":
            for old, new in _FALCON_TWO_NORMS.items():
                theirs = theirs.replace(old, new)
        for i in range(cfg.n_layers) if "{i}" in theirs else (0,):
            for part in ("weight", "bias"):
                names = tuple(f"{name.replace('{i}', str(i))}.{part}" for name in module.ours)
                if all(name in ours for name in names):
                    their_name = f"{theirs.replace('{i}', str(i))}.{part}"
                    rules.append(Rule(their_name, names, module.layout))
    used = [name for rule in rules for name in rule.ours]
    assert sorted(used) == sorted(ours), set(ours) ^ set(used)
    return rules


def pack(layout: str, cfg: ModelConfig, parts: Sequence[Tensor]) -> Tensor:
    """Their tensor from ours."""
    if layout == "grouped":
        q, k, v = parts
        K, H, rest = cfg.n_kv_heads, cfg.head_dim, q.shape[1:]
        heads = [part.reshape(K, -1, H, *rest) for part in (q, k, v)]
        return torch.cat(heads, dim=1).reshape(-1, *rest)
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole.t() if layout == "columns" and whole.ndim == 2 else whole


def unpack(
    layout: str, cfg: ModelConfig, whole: Tensor, shapes: Sequence[tuple[int, ...]]
) -> list[Tensor]:
    """Our tensors, of these shapes, from theirs."""
    if layout == "grouped":
        K, H, rest = cfg.n_kv_heads, cfg.head_dim, whole.shape[1:]
        heads = whole.reshape(K, -1, H, *rest)
        parts = heads.split([cfg.n_heads // K, 1, 1], dim=1)
        return [part.reshape(-1, *rest) for part in parts]
    if layout == "columns" and whole.ndim == 2:
        whole = whole.t()
    return list(whole.split([shape[0] for shape in shapes]))


def packed_shape(rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of their tensor, given those of ours."""
    rows = sum(shapes[name][0] for name in rule.ours)
    whole = (rows, *shapes[rule.ours[0]][1:])
    return whole[::-1] if rule.layout == "columns" else whole
