"""The model: causality, cache, grouped heads, construction without memory, counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_lite.errors import InputError
from openlm_lite.model.attention import KVCache
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=50,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    d_ff=24,
    max_seq_len=32,
)


@st.composite
def architectures(draw: st.DrawFn) -> ModelConfig:
    norm = draw(st.sampled_from(["layer_norm", "rms_norm"]))
    kv = draw(st.sampled_from([1, 2, 3]))
    blocks = ["sequential", "sequential_post_norm", "parallel", "parallel_shared_norm"]
    head_dim, rotary_pct = draw(
        st.sampled_from([(2, 1.0), (4, 1.0), (4, 0.5), (8, 0.25), (6, 0.5)])
    )
    if rotary_pct * head_dim % 2:
        rotary_pct = 1.0
    return ModelConfig(
        vocab_size=draw(st.integers(5, 40)),
        d_model=draw(st.integers(3, 20)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=kv * draw(st.integers(1, 3)),
        n_kv_heads=kv,
        head_dim=head_dim,
        d_ff=draw(st.integers(1, 30)),
        max_seq_len=16,
        norm=norm,
        norm_gain=draw(st.booleans()),
        norm_bias=norm == "layer_norm" and draw(st.booleans()),
        qk_norm=draw(st.sampled_from(["none", "full", "per_head"])),
        block=draw(st.sampled_from(blocks)),
        embedding_norm=draw(st.booleans()),
        activation=draw(st.sampled_from(["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"])),
        mlp_bias=draw(st.booleans()),
        attn_bias=draw(st.sampled_from(["none", "qkv", "all"])),
        clip_qkv=draw(st.sampled_from([None, 0.5])),
        positions=draw(st.sampled_from(["rope", "alibi", "learned", "none"])),
        rotary_pct=rotary_pct,
        rope_style=draw(st.sampled_from(["half", "interleaved"])),
        rope_freq_dtype=draw(st.sampled_from(["fp32", "bf16"])),
        tie_embeddings=draw(st.booleans()),
    )


def build(cfg: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(cfg)
    init_weights(model, seed)
    return model


@settings(max_examples=60, deadline=None)
@given(cfg=architectures(), data=st.data())
def test_every_architecture_counts_caches_and_is_causal(cfg: ModelConfig, data: Any) -> None:
    # a norm over a handful of features magnifies rounding by the inverse of their spread
    model = build(dataclasses.replace(cfg, norm_eps=0.1))
    assert sum(p.numel() for p in model.parameters()) == cfg.n_params
    tokens = torch.randint(cfg.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens)
        cut = data.draw(st.integers(1, 8))
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % cfg.vocab_size
        torch.testing.assert_close(model(changed)[:, :cut], logits[:, :cut])

        cache = KVCache(cfg, 2, 9)
        parts = [model(tokens[:, :cut], cache=cache), model(tokens[:, cut:], cache=cache)]
        torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-4, atol=1e-5)
        assert cache.length == 9


def test_grouped_heads_equal_repeated_key_value_heads() -> None:
    grouped = build(TINY)
    full = Transformer(dataclasses.replace(TINY, n_kv_heads=TINY.n_heads))
    state = grouped.state_dict()
    for name, weight in state.items():
        if ".wk." in name or ".wv." in name:
            heads = weight.view(TINY.n_kv_heads, TINY.head_dim, -1)
            state[name] = heads.repeat_interleave(2, dim=0).reshape(-1, TINY.d_model)
    full.load_state_dict(state)
    tokens = torch.randint(50, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(grouped(tokens), full(tokens), rtol=1e-4, atol=1e-5)


def test_meta_construction_takes_no_memory_and_gives_the_same_weights() -> None:
    with torch.device("meta"):
        model = Transformer(TINY)
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())
    model.to_empty(device="cpu")
    init_weights(model, seed=3)
    for a, b in zip(model.parameters(), build(TINY, 3).parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model.embedding.weight, build(TINY, 4).embedding.weight)


def test_bf16_rotary_angles_are_exact() -> None:
    """Frequencies rounded to bf16 are off by radians at the end of a long context."""
    from openlm_lite.model.layers import rope_tables

    cos, sin = rope_tables(torch.tensor([2047]), ModelConfig(5, 8, 1, 1, 1, 128, 8, 4096))
    positions = torch.tensor(2047.0, dtype=torch.float64)
    exact = positions * 10_000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert (cos[0, :64].double() - exact.cos()).abs().max() < 1e-3
    assert (sin[0, 64:].double() - exact.sin()).abs().max() < 1e-3


def test_rotary_tables_stay_fp32_under_bf16_training() -> None:
    from openlm_lite import dist
    from openlm_lite.layout import build_layout
    from openlm_lite.parallel import ParallelConfig, build_sharded_model

    world = dist.init()
    try:
        cfg = ParallelConfig(precision="bf16")
        model = build_sharded_model(TINY, build_layout(cfg, world), cfg, world.device, 0)
        seen: list[torch.dtype] = []
        attention = model.layers[0].attention
        attention.register_forward_pre_hook(
            lambda _module, args: seen.extend((args[0].dtype, *(t.dtype for t in args[1])))
        )
        tokens = torch.zeros(1, 8, dtype=torch.long)
        model(tokens, tokens).total.backward()
    finally:
        dist.close()
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


def test_too_many_positions_are_refused() -> None:
    with pytest.raises(InputError, match="33 positions are longer than max_seq_len = 32"):
        build(TINY)(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 3}, "n_heads = 4 is not a multiple of n_kv_heads = 3"),
        ({"head_dim": 5}, "turns 5 features"),
        ({"norm_bias": True}, "rms_norm has no bias"),
        ({"d_ff": 0}, "d_ff = 0, must be at least 1"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0, must be positive"),
    ],
)
def test_impossible_architectures_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **change)


def test_flops_per_token_follow_the_stated_formula() -> None:
    cfg = ModelConfig(100, 8, 1, 1, 1, 8, 10, 32)
    matrices = 4 * 8 * 8 + 3 * 8 * 10
    assert cfg.flops_per_token(32) == 6 * (matrices + 100 * 8) + 12 * 1 * 8 * 32
