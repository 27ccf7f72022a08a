"""Norms, rotary embedding, ALiBi's slopes and the feed-forward network.

Shapes: B batch, T position, D d_model, F d_ff, N query heads, K kv heads, H head_dim,
R rotary_dim (the features of a head that are turned).
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


def rope_tables(positions_T: Tensor, cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i/R), each [T, R], in fp32 (arXiv:2104.09864).

    Positions [B, T] give [B, T, R].

    The R/2 frequencies stand twice, for the two halves that `apply_rope` pairs. The tables are
    computed in the forward pass and stay fp32 under bf16: a bf16 frequency is off by radians at
    position 2,000 (`rope_freq_dtype` = bf16 rounds them all the same).
    """
    exponents = torch.arange(0, cfg.rotary_dim, 2, device=positions_T.device, dtype=torch.float32)
    frequencies = 1.0 / cfg.rope_theta ** (exponents / cfg.rotary_dim)
    if cfg.rope_freq_dtype == "bf16":
        frequencies = frequencies.bfloat16().float()
    angles = positions_T.float()[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x_BTNH: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
    """Turn the first R features of each head by the angle of their position; the rest stays.

    Feature i pairs with i + R/2 (GPT-NeoX). `interleaved` pairs 2i with 2i + 1 (GPT-J): the
    features are put in the other order first and stay there, which queries and keys share, so
    that their products are the same.
    """
    R = cos_TR.shape[-1]
    if x_BTNH.shape[-1] > R:
        turned = apply_rope(x_BTNH[..., :R], cos_TR, sin_TR, interleaved)
        return torch.cat((turned, x_BTNH[..., R:]), dim=-1)
    if interleaved:
        x_BTNH = torch.cat((x_BTNH[..., 0::2], x_BTNH[..., 1::2]), dim=-1)
    if not torch.compiler.is_compiling():
        return eager.Rotate.apply(x_BTNH, cos_TR, sin_TR)
    first, second = x_BTNH.float().chunk(2, dim=-1)
    cos, sin = cos_TR[..., None, : R // 2], sin_TR[..., None, : R // 2]  # the same for every head
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
    return turned.flatten(-2).to(x_BTNH.dtype)  # stacked: joined by cat, it is not fused


def alibi_slopes(n_heads: int, bias_max: float) -> list[float]:
    """What each head subtracts from a score per position of distance (arXiv:2108.12409).

    2^(-bias_max n / N) for n = 1 … N, where N is the number of heads if that is a power of two;
    else N is the next power, and every second slope is taken first.
    """
    n = 1 << (n_heads - 1).bit_length()
    slopes = [2.0 ** (-bias_max * i / n) for i in range(1, n + 1)]
    return slopes if n == n_heads else (slopes[1::2] + slopes[::2])[:n_heads]


class FeedForward(nn.Module):
    """w_down(act(w_gate x) * w_up x) (arXiv:2002.05202), or without gate w_down(act(w_up x))."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.activation = cfg.activation
        if cfg.is_gated:
            self.w_gate = nn.Linear(cfg.d_model, cfg.d_ff, bias=cfg.mlp_bias)
        self.w_up = nn.Linear(cfg.d_model, cfg.d_ff, bias=cfg.mlp_bias)
        self.w_down = nn.Linear(cfg.d_ff, cfg.d_model, bias=cfg.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        up = self.w_up(x_BTD)
        approximate = "tanh" if self.activation.endswith("tanh") else "none"
        if self.activation in ("gelu", "gelu_tanh"):
            return self.w_down(F.gelu(up, approximate=approximate))
        gate = self.w_gate(x_BTD)
        if self.activation != "swiglu":
            return self.w_down(F.gelu(gate, approximate=approximate) * up)
        if torch.compiler.is_compiling():
            return self.w_down(F.silu(gate) * up)
        return self.w_down(eager.SwiGLU.apply(gate, up))
