"""Causal grouped-query attention, its mask, and the cache of keys and values for generation.

Shapes: B batch, T position, S all positions seen, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openlm_lite.errors import InputError
from openlm_lite.model import eager
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.layers import Norm, alibi_slopes, apply_rope


class KVCache:
    """Keys and values of all layers, [n_layers, 2, B, K, max_len, H], and how many are filled.

    The model fills `length` onwards in one forward pass, then `length` moves on.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (cfg.n_layers, 2, batch_size, cfg.n_kv_heads, max_len, cfg.head_dim)
        self.table = torch.zeros(shape, device=device, dtype=dtype)
        self.max_len = max_len
        self.length = 0

    def extend(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer; returns all positions so far, [B, K, S, H]."""
        end = self.length + k_BKTH.shape[2]
        if end > self.max_len:
            raise InputError(f"the cache holds {self.max_len} positions, {end} are needed")
        keys, values = self.table[layer]
        keys[:, :, self.length : end] = k_BKTH
        values[:, :, self.length : end] = v_BKTH
        return keys[:, :, :end], values[:, :, :end]


def attend(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, causal where no mask is given; N is a multiple of K.

    A mask is boolean [T, S], or [N, T, S] and added to the scores.
    """
    grouped = k_BKSH.shape[1] != q_BNTH.shape[1]
    on_cpu = q_BNTH.device.type == "cpu" and q_BNTH.dtype == torch.float32
    if mask is None and on_cpu and q_BNTH.requires_grad:
        return _train_on_cpu(q_BNTH, k_BKSH, v_BKSH)  # pyright: ignore[reportCallIssue]
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


@torch.compiler.disable  # a compiled block is two graphs around it
def _train_on_cpu(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    repeats = q_BNTH.shape[1] // k_BKTH.shape[1]
    if repeats > 1:
        k_BKTH, v_BKTH = (t.repeat_interleave(repeats, dim=1) for t in (k_BKTH, v_BKTH))
    return eager.CausalAttention.apply(q_BNTH, k_BKTH, v_BKTH)


def causal_mask(
    cfg: ModelConfig, start: int, T: int, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """The mask of T positions after `start` cached ones, for `attend`; None: plainly causal.

    T = 4 after 2 (x: seen)::

             S 0 1 2 3 4 5
        T 0    x x x
          1    x x x x
          2    x x x x x
          3    x x x x x x

    With ALiBi it is [N, T, S] in `dtype`: -slope * distance where seen, else -inf.
    """
    if cfg.positions != "alibi" and start == 0:
        return None
    S = start + T
    seen_TS = torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=start)
    if cfg.positions != "alibi":
        return seen_TS
    slopes_N = torch.tensor(alibi_slopes(cfg.n_heads, cfg.alibi_bias_max), device=device)
    query_T, key_S = torch.arange(start, S, device=device), torch.arange(S, device=device)
    distance_TS = (query_T[:, None] - key_S).float().masked_fill(~seen_TS, torch.inf)
    return (-slopes_N[:, None, None] * distance_TS).to(dtype)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(H) + mask) V, with N query heads on K key/value heads.

    Between projection and heads: qk-norm over all heads, then clip_qkv; on the heads: qk-norm of
    each, then rotary embedding.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.head_dim = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        qkv_bias = cfg.attn_bias != "none"
        self.wq = nn.Linear(cfg.d_model, cfg.q_width, bias=qkv_bias)
        self.wk = nn.Linear(cfg.d_model, cfg.kv_width, bias=qkv_bias)
        self.wv = nn.Linear(cfg.d_model, cfg.kv_width, bias=qkv_bias)
        self.wo = nn.Linear(cfg.q_width, cfg.d_model, bias=cfg.attn_bias == "all")
        self.clip_qkv = cfg.clip_qkv
        self.interleaved = cfg.rope_style == "interleaved"
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm != "none":
            per_head = cfg.qk_norm == "per_head"
            self.q_norm = Norm(cfg, cfg.head_dim if per_head else cfg.q_width)
            self.k_norm = Norm(cfg, cfg.head_dim if per_head else cfg.kv_width)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = self.wq(x_BTD), self.wk(x_BTD), self.wv(x_BTD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip_qkv is not None:
            q, k, v = (t.clamp(-self.clip_qkv, self.clip_qkv) for t in (q, k, v))
        q_BTNH = q.view(B, T, self.n_heads, self.head_dim)
        k_BTKH = k.view(B, T, self.n_kv_heads, self.head_dim)
        v_BTKH = v.view(B, T, self.n_kv_heads, self.head_dim)
        if self.qk_norm == "per_head":
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if rope is not None:
            q_BTNH = apply_rope(q_BTNH, *rope, self.interleaved)
            k_BTKH = apply_rope(k_BTKH, *rope, self.interleaved)

        q_BNTH, k_BKSH, v_BKSH = (t.transpose(1, 2) for t in (q_BTNH, k_BTKH, v_BTKH))
        if cache is not None:
            k_BKSH, v_BKSH = cache.extend(self.layer, k_BKSH, v_BKSH)
        y_BNTH = attend(q_BNTH, k_BKSH, v_BKSH, mask)
        return self.wo(y_BNTH.transpose(1, 2).reshape(B, T, -1))
