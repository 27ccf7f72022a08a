"""Attention by blocks of queries equals the whole, and is one operator in a compiled block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openlm_lite import dist
from openlm_lite.layout import build_layout
from openlm_lite.model import cpu_attention
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.cpu_attention import causal_attention
from openlm_lite.model.init import init_weights
from openlm_lite.model.layers import rope_tables
from openlm_lite.model.transformer import Transformer
from openlm_lite.parallel import ParallelConfig, parallelize
from tests.tiny_run import process_group


def inputs(length: int = 150, heads: int = 3, width: int = 5) -> list[Tensor]:
    return [torch.randn(2, heads, length, width, requires_grad=True) for _ in range(3)]


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 300),
    heads=st.integers(1, 3),
    width=st.integers(1, 9),
    block=st.sampled_from([1, 7, 64, 128]),
    keep=st.booleans(),
)
def test_blocks_equal_the_whole(
    length: int, heads: int, width: int, block: int, keep: bool
) -> None:
    qkv = inputs(length, heads, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "BLOCK", min(block, length) if length > 60 else block)
        ours = causal_attention(*qkv, keep=keep)
        plain = F.scaled_dot_product_attention(*qkv, is_causal=True)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        weights = torch.randn_like(ours)
        for a, b in zip(
            torch.autograd.grad((ours * weights).sum(), qkv),
            torch.autograd.grad((plain * weights).sum(), qkv),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_probabilities_that_are_computed_again_are_the_kept_ones(masked: bool) -> None:
    """To the bit; and nothing of their size is kept."""
    qkv = inputs()
    seen = torch.ones(2, 1, 150, 150, dtype=torch.bool).tril_() if masked else None
    found, largest = [], []
    for keep in (True, False):
        kept: list[int] = []

        def note(t: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = causal_attention(*qkv, seen, keep=keep)
        found.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
        largest.append(max(n for n in kept if n != 2 * 150 * 150))  # not the mask
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert largest == [6 * 128 * 128, qkv[0].numel()]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_an_operator_as_pytorch_wants_them(masked: bool, keep: bool) -> None:
    """Shapes and strides without numbers, the gradient's registration, and no hidden aliases."""
    seen = torch.ones(2, 1, 150, 150, dtype=torch.bool).tril_() if masked else None
    torch.library.opcheck(cpu_attention._forward, (*inputs(), seen, keep))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inner workings
def test_a_compiled_block_is_one_graph_and_keeps_what_products_put_out() -> None:
    """And its gradients are those of the eager block."""
    B, T, D, F = 2, 150, 32, 48
    cfg = ModelConfig(50, D, 1, 2, 2, 16, F, T)
    x_BTD, weights = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    rope = rope_tables(torch.arange(T), cfg)
    found = []
    with process_group():
        layout = build_layout(ParallelConfig(), dist.World(0, 1, 0, torch.device("cpu")))
        for compiled in (False, True):
            model = Transformer(cfg)
            init_weights(model, 0)
            parallelize(model, layout, ParallelConfig(precision="fp32", compile=compiled))
            others = {t.data_ptr() for t in (*model.parameters(), *rope, x_BTD)}
            kept: dict[int, int] = {}

            def note(t: Tensor, others: Any = others, kept: Any = kept) -> Tensor:
                if t.untyped_storage().data_ptr() not in others:
                    kept[t.untyped_storage().data_ptr()] = t.numel()
                return t

            torch._dynamo.utils.counters.clear()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                y_BTD = model.layers[0](x_BTD, rope, None, None)
            found.append(
                torch.autograd.grad((y_BTD * weights).sum(), (x_BTD, *model.layers.parameters()))
            )
            if compiled:
                assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
                # q, k, v, what attention put out and its projection; gate and up; two norms' r
                assert sum(kept.values()) == B * T * (5 * D + 2 * F + 2)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
