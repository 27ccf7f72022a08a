"""Random members of each family, and the table of what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from openlm_lite.hf.families import BY_CLASS, DEFAULTS, Family
from openlm_lite.hf.native import fit, write_config
from openlm_lite.model.config import ModelConfig

MEASURED: dict[str, dict[str, float]] = {}
"""class -> {"in": largest difference on import, "out": on export}, of all examples"""


def note(hf_class: str, direction: str, difference: float) -> None:
    row = MEASURED.setdefault(hf_class, {})
    row[direction] = max(difference, row.get(direction, 0.0))


@st.composite
def members(draw: st.DrawFn, family: Family) -> ModelConfig:
    """An architecture that the class holds as it is: every field that is free is drawn."""
    # transformers runs experts by a grouped product, which wants rows of 16 bytes: widths of 4
    kv, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    head_dim = draw(st.sampled_from([8, 16]))
    choices: dict[str, Any] = {}
    for name in DEFAULTS:
        allowed = family.allowed(name)
        if allowed is not None:
            choices[name] = draw(st.sampled_from(allowed))
    free = {
        "vocab_size": draw(st.integers(290, 330)),
        "n_layers": draw(st.integers(1, 2)),
        "n_heads": kv * group,
        "n_kv_heads": kv,
        "head_dim": head_dim,
        "d_model": kv * group * head_dim,
        "d_ff": 4 * draw(st.integers(3, 20)),
        "max_seq_len": draw(st.sampled_from([24, 40])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "rope_theta": draw(st.sampled_from([1e4, 5e5])),
        "rotary_pct": draw(st.sampled_from([1.0, 0.25, 0.5])),
        "clip_qkv": draw(st.sampled_from([None, 0.3])),
        "mlp_bias": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "norm_gain": True,
        "norm_bias": True,
        "embedding_norm": False,
    }
    for name, value in free.items():
        choices.setdefault(name, value)
    if choices["positions"] != "rope":  # what nothing reads has its default
        choices |= {"rope_theta": 1e4, "rotary_pct": 1.0, "rope_style": "half"}
        choices["rope_freq_dtype"] = "fp32"
    cfg = ModelConfig(**choices)
    cfg = replace(cfg, **family.adjust(cfg))
    for change in ({}, {"n_kv_heads": cfg.n_heads}, {"d_ff": 4 * cfg.d_model}):
        cfg = replace(cfg, **change)
        if not fit(cfg, family).misfits:
            return cfg
    raise AssertionError(fit(cfg, family).misfits)


def their_model(config: dict[str, Any], seed: int) -> Any:
    """transformers' model of a config.json, with random weights in every parameter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    made = AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(plain)))
    made.pad_token_id = None
    model = AutoModelForCausalLM.from_config(made).eval()
    randomize(model, seed)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Matrices N(0, 1/fan_in), gains around 1, biases around 0: a missing one shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim >= 2:
            p.copy_(noise / p.shape[-1] ** 0.5)
        else:
            p.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))


def hub_folder(path: Path, model: Any) -> Path:
    """What `save_pretrained` writes."""
    model.save_pretrained(path)
    return path


def write_and_read(hf_class: str, cfg: ModelConfig) -> dict[str, Any]:
    return json.loads(json.dumps(write_config(BY_CLASS[hf_class], cfg)))
