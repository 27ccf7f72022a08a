"""OpenLM's reference numerics in this project's names: used by the parity tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from openlm_lite.model.config import ModelConfig
from openlm_lite.model.transformer import Transformer

_NORMS: dict[str, dict[str, Any]] = {
    "default_layer_norm": {"norm": "layer_norm", "norm_gain": True, "norm_bias": True},
    "gain_only_lp_layer_norm": {"norm": "layer_norm", "norm_gain": True, "norm_bias": False},
    "no_wb_layer_norm": {"norm": "layer_norm", "norm_gain": False, "norm_bias": False},
    "rms_norm": {"norm": "rms_norm", "norm_gain": True, "norm_bias": False},
}

_RENAMED = {
    "out_proj": "wo",
    "w3": "w_down",
    "_ff_w1": "feed_forward.w_up",
    "_ff_w2": "feed_forward.w_down",
}
_POSITIONS: dict[str, dict[str, Any]] = {
    "rotary": {"positions": "rope"},
    "llama_rotary": {"positions": "rope", "rope_style": "interleaved"},
    "head_rotary": {"positions": "none"},
}


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def model_config(folder: Path) -> ModelConfig:
    found = facts(folder)
    theirs = found["open_lm_config"]
    return ModelConfig(
        vocab_size=theirs["vocab_size"],
        d_model=theirs["hidden_dim"],
        n_layers=theirs["n_layers"],
        n_heads=theirs["n_heads"],
        n_kv_heads=theirs["n_heads"],
        head_dim=theirs["hidden_dim"] // theirs["n_heads"],
        d_ff=found["ffn_hidden"],
        max_seq_len=theirs["seq_len"],
        norm_eps=found["norm_eps"],
        qk_norm="full" if theirs["qk_norm"] else "none",
        tie_embeddings=theirs["weight_tying"],
        activation="gelu" if theirs["ffn_type"] == "gelu" else "swiglu",
        **_POSITIONS[theirs["positional_embedding_type"]],
        **_NORMS[theirs["model_norm"]],
    )


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenLM keeps q, k, v in one matrix, and gate and up in another."""
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name.endswith("inv_freq") or ".feed_forward.0." in name or ".feed_forward.2." in name:
            continue  # the second pair of names is the first one's: OpenLM saves GELU weights twice
        name = name.replace("tok_embeddings", "embedding")
        if "in_proj" in name:
            for part, rows in zip(("wq", "wk", "wv"), tensor.chunk(3), strict=True):
                ours[name.replace("in_proj", part)] = rows
        elif "w12" in name:
            for part, rows in zip(("w_gate", "w_up"), tensor.chunk(2), strict=True):
                ours[name.replace("w12", part)] = rows
        else:
            for old, new in _RENAMED.items():
                name = name.replace(old, new)
            ours[name] = tensor

    return ours


def load_model(folder: Path, weights: str = "state_dict.safetensors") -> Transformer:
    cfg = model_config(folder)
    model = Transformer(cfg)
    state = renamed(load_file(folder / weights))
    if cfg.tie_embeddings:
        assert torch.equal(state.pop("output.weight"), state["embedding.weight"])
    model.load_state_dict(state)
    return model
