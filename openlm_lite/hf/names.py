"""Which transformers class holds an architecture exactly, and what it calls our parameters.

`{i}` is the layer. Left our name, right the name in the file that transformers, vLLM, SGLang and
llama.cpp read.
"""

from __future__ import annotations

from collections.abc import Iterator

from openlm_lite.model.config import ModelConfig

_TABLES = {
    "embedding.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {
    "layers.{i}.attention.wq.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.attention.wk.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.attention.wv.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.attention.wo.weight": "model.layers.{i}.self_attn.o_proj.weight",
}
_FEED_FORWARD = {
    "layers.{i}.feed_forward.w_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.feed_forward.w_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.feed_forward.w_down.weight": "model.layers.{i}.mlp.down_proj.weight",
}
_GAINS = {
    "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
}
_BIASES = {
    "layers.{i}.attention_norm.bias": "model.layers.{i}.input_layernorm.bias",
    "layers.{i}.ffn_norm.bias": "model.layers.{i}.post_attention_layernorm.bias",
    "norm.bias": "model.norm.bias",
}
_QK_GAINS = {
    "layers.{i}.attention.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "layers.{i}.attention.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
}
_ONE_EXPERT = {
    "layers.{i}.feed_forward.w_gate.weight": "model.layers.{i}.mlp.experts.0.gate_proj.weight",
    "layers.{i}.feed_forward.w_up.weight": "model.layers.{i}.mlp.experts.0.up_proj.weight",
    "layers.{i}.feed_forward.w_down.weight": "model.layers.{i}.mlp.experts.0.down_proj.weight",
}

NAMES: dict[str, dict[str, str]] = {
    "LlamaForCausalLM": _TABLES | _ATTENTION | _FEED_FORWARD | _GAINS,
    "Qwen3ForCausalLM": _TABLES | _ATTENTION | _FEED_FORWARD | _GAINS | _QK_GAINS,
    "OlmoForCausalLM": _TABLES | _ATTENTION | _FEED_FORWARD,
    "StableLmForCausalLM": _TABLES | _ATTENTION | _FEED_FORWARD | _GAINS | _BIASES,
    "OlmoeForCausalLM": _TABLES | _ATTENTION | _ONE_EXPERT | _GAINS | _QK_GAINS,
}
"""native class -> (our name -> its name)"""

# OLMoE's router. The softmax over its one expert is 1 whatever the weights are.
ROUTER = "model.layers.{i}.mlp.gate.weight"


def names_of(native_class: str, cfg: ModelConfig) -> Iterator[tuple[str, str]]:
    """(our name, the native class's name) of every parameter that the class has, layer by layer.

    `output.weight` is among them also for tied embeddings.
    """
    for ours, theirs in NAMES[native_class].items():
        if "{i}" not in ours:
            yield ours, theirs
            continue
        for i in range(cfg.n_layers):
            yield ours.replace("{i}", str(i)), theirs.replace("{i}", str(i))
