"""The hand-written backward passes equal autograd through the plain operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openlm_lite.model import eager
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.cpu_attention import causal_attention
from openlm_lite.model.layers import rope_tables


def check(ours: Any, plain: Any, *inputs: Tensor) -> None:
    """Equal outputs and equal gradients for random weights on the outputs."""
    a, b = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(a)
    for left, right in zip(
        torch.autograd.grad((a * weights).sum(), inputs),
        torch.autograd.grad((b * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 16), (2, 3, 4, 6)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    check(
        lambda x, w: eager.RMSNorm.apply(x, w, 1e-5),
        lambda x, w: F.rms_norm(x, shape[-1:], w, 1e-5),
        x,
        w,
    )
    check(
        lambda x: eager.RMSNorm.apply(x, None, 1e-5),
        lambda x: F.rms_norm(x, shape[-1:], None, 1e-5),
        x,
    )


def test_rotary_keeps_lengths_and_turns_back() -> None:
    cos, sin = rope_tables(torch.arange(7), ModelConfig(5, 8, 1, 1, 1, 8, 8, 7))
    x = torch.randn(2, 7, 3, 8, requires_grad=True)

    def plain(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x * cos[:, None] + turned * sin[:, None]

    check(lambda x: eager.Rotate.apply(x, cos, sin), plain, x)
    torch.testing.assert_close(eager.Rotate.apply(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


def test_swiglu() -> None:
    gate, up = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    check(eager.SwiGLU.apply, lambda g, u: F.silu(g) * u, gate, up)


def test_between_rotary_embedding_and_projections_nothing_is_copied() -> None:
    """Heads come first in memory where attention multiplies, positions elsewhere; both ways."""
    cos, sin = rope_tables(torch.arange(7), ModelConfig(5, 8, 1, 1, 1, 8, 8, 7))
    x_BTNH = torch.randn(2, 7, 3, 8, requires_grad=True)
    turned = eager.Rotate.apply(x_BTNH, cos, sin).transpose(1, 2)
    assert turned.is_contiguous()
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    out = causal_attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    turned.backward(torch.randn(2, 3, 7, 8))
    out.square().sum().backward()
    for t in (x_BTNH, q, k, v):
        assert t.grad is not None and t.grad.is_contiguous()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inner workings
def test_a_compiled_model_has_the_losses_of_the_eager_one() -> None:
    from openlm_lite.model.init import init_weights
    from openlm_lite.model.transformer import Transformer
    from tests.model.test_transformer import TINY

    tokens = torch.randint(50, (2, 33))
    found = []
    for compiled in (False, True):
        model = Transformer(TINY)
        init_weights(model, 0)
        if compiled:
            for block in model.layers:
                block.compile()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.total.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        found.append((loss.total.item(), torch.stack(norms)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
