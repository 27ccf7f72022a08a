"""Pieces of the model with a backward pass of their own, for runs without torch.compile.

Eager PyTorch reads and writes memory once per operation, which on a CPU is where a step's time
goes besides the matrix products. Each function here makes fewer passes than the operations that
it replaces, and keeps fewer tensors for the backward pass; the formulas are the textbook's.
`torch.compile` fuses by itself and is given the plain operations (see `layers.py`). Measured by
`benchmarks/cpu_step.py`.

Shapes: B batch, T position, N heads, H head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps), over the last dimension.

    With D features: dx = r w dy - x r^3 sum(w dy x) / D, dw = sum(r dy x) over the positions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        y = x * r
        return (y if weight is None else y.mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, r = ctx.saved_tensors
        t = (dy * x).float()
        if weight is None:
            dw, sums = None, t.sum(-1, keepdim=True)
            dx = dy * r
        else:  # the two sums of t are products with a vector, which read it once each
            rows = t.flatten(0, -2)
            dw = (r.flatten() @ rows).to(weight.dtype)
            sums = (rows @ weight.float()).view_as(r)
            dx = torch.mul(dy, weight, out=t).mul_(r)
        return dx.addcmul_(x, sums * r.pow(3), value=-1 / x.shape[-1]).to(x.dtype), dw, None


class Rotate(torch.autograd.Function):
    """Rotary embedding; its gradient is the turn back."""

    @staticmethod
    def forward(ctx: Any, x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        # or [B, T, H], where the rows have positions of their own
        ctx.save_for_backward(cos_TH, sin_TH)
        return _turn(x_BTNH, cos_TH, sin_TH, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_TH, sin_TH = ctx.saved_tensors
        return _turn(grads[0], cos_TH, sin_TH, -1), None, None


def _turn(x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, direction: int) -> Tensor:
    half = x_BTNH.shape[-1] // 2
    cos, sin = cos_TH[..., None, :half], sin_TH[..., None, :half]
    x = x_BTNH.float()
    first, second = x[..., :half], x[..., half:]
    B, T, N, H = x.shape
    if x.device.type != "cpu":
        out = torch.empty_like(x)
    elif x.is_contiguous():  # in memory as attention multiplies it: B, N, T, H
        out = x.new_empty(B, N, T, H).transpose(1, 2)
    else:  # and the gradient back as it was
        out = x.new_empty(B, T, N, H)
    torch.mul(first, cos, out=out[..., :half])
    out[..., :half].addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out[..., half:])
    out[..., half:].addcmul_(first, sin, value=direction)
    return out.to(x_BTNH.dtype)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping the two inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward.default(dy * up, gate)
        return d_gate, F.silu(gate).mul_(dy)
