"""Norms, rotary embedding and the gated feed-forward network.

Shapes: B batch, T position, D d_model, F d_ff, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openlm_lite.model import eager
from openlm_lite.model.config import ModelConfig


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last `width` features, with or without gain and bias.

    LayerNorm: (x - mean) / sqrt(var + eps) (arXiv:1607.06450).
    RMSNorm: x / sqrt(mean(x^2) + eps) (arXiv:1910.07467).
    """

    def __init__(self, cfg: ModelConfig, width: int) -> None:
        super().__init__()
        self.kind, self.eps, self.shape = cfg.norm, cfg.norm_eps, (width,)
        self.weight = nn.Parameter(torch.empty(width)) if cfg.norm_gain else None
        self.bias = nn.Parameter(torch.empty(width)) if cfg.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms_norm":
            if x.device.type == "cpu" and not torch.compiler.is_compiling():
                return eager.RMSNorm.apply(x, self.weight, self.eps)
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i/H), each [T, H], in fp32 (arXiv:2104.09864).

    The H/2 frequencies stand twice, for the two halves that `apply_rope` pairs. The tables are
    computed in the forward pass and stay fp32 under bf16: a bf16 frequency is off by radians at
    position 2,000.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (exponents / head_dim)
    angles = torch.outer(positions_T.float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Turn feature i and i + H/2 of each head by the angle of its position (GPT-NeoX pairing)."""
    if not torch.compiler.is_compiling():
        return eager.Rotate.apply(x_BTNH, cos_TH, sin_TH)
    first, second = x_BTNH.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    cos, sin = cos_TH.unsqueeze(1), sin_TH.unsqueeze(1)  # the same for every head
    return (x_BTNH.float() * cos + turned * sin).to(x_BTNH.dtype)


class FeedForward(nn.Module):
    """SwiGLU: w_down(silu(w_gate x) * w_up x) (arXiv:2002.05202)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.w_gate = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.w_up = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.w_down = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.w_gate(x_BTD), self.w_up(x_BTD)
        if torch.compiler.is_compiling():
            return self.w_down(F.silu(gate) * up)
        return self.w_down(eager.SwiGLU.apply(gate, up))
