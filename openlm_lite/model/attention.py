"""Causal grouped-query attention, and the cache of keys and values for generation.

Shapes: B batch, T position, S all positions seen, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openlm_lite.errors import InputError
from openlm_lite.model import eager
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.layers import Norm, apply_rope


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


def attend(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_TS: Tensor | None) -> Tensor:
    """Softmax attention, causal where no mask is given; N is a multiple of K."""
    grouped = k_BKSH.shape[1] != q_BNTH.shape[1]
    on_cpu = q_BNTH.device.type == "cpu" and q_BNTH.dtype == torch.float32
    if mask_TS is None and on_cpu and q_BNTH.requires_grad:
        return _train_on_cpu(q_BNTH, k_BKSH, v_BKSH)  # pyright: ignore[reportCallIssue]
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=mask_TS, is_causal=mask_TS is None, enable_gqa=grouped
    )


@torch.compiler.disable  # a compiled block is two graphs around it
def _train_on_cpu(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    repeats = q_BNTH.shape[1] // k_BKTH.shape[1]
    if repeats > 1:
        k_BKTH, v_BKTH = (t.repeat_interleave(repeats, dim=1) for t in (k_BKTH, v_BKTH))
    return eager.CausalAttention.apply(q_BNTH, k_BKTH, v_BKTH)


class Attention(nn.Module):
    r"""softmax(Q K^T / sqrt(H) + causal mask) V, with N query heads on K key/value heads.

    The mask of T = 4 new positions after 2 cached ones (x: seen)::

             S 0 1 2 3 4 5
        T 0    x x x
          1    x x x x
          2    x x x x x
          3    x x x x x x
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.head_dim = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        self.wq = nn.Linear(cfg.d_model, cfg.q_width, bias=False)
        self.wk = nn.Linear(cfg.d_model, cfg.kv_width, bias=False)
        self.wv = nn.Linear(cfg.d_model, cfg.kv_width, bias=False)
        self.wo = nn.Linear(cfg.q_width, cfg.d_model, bias=False)
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm != "none":
            per_head = cfg.qk_norm == "per_head"
            self.q_norm = Norm(cfg, cfg.head_dim if per_head else cfg.q_width)
            self.k_norm = Norm(cfg, cfg.head_dim if per_head else cfg.kv_width)

    def forward(
        self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = self.wq(x_BTD), self.wk(x_BTD), self.wv(x_BTD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTNH = q.view(B, T, self.n_heads, self.head_dim)
        k_BTKH = k.view(B, T, self.n_kv_heads, self.head_dim)
        v_BTKH = v.view(B, T, self.n_kv_heads, self.head_dim)
        if self.qk_norm == "per_head":
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH = apply_rope(q_BTNH, cos_TH, sin_TH)
        k_BTKH = apply_rope(k_BTKH, cos_TH, sin_TH)

        q_BNTH, k_BKSH, v_BKSH = (t.transpose(1, 2) for t in (q_BTNH, k_BTKH, v_BTKH))
        mask_TS = None
        if cache is not None:
            start = cache.length
            k_BKSH, v_BKSH = cache.extend(self.layer, k_BKSH, v_BKSH)
            S = k_BKSH.shape[2]
            mask_TS = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=start)
        y_BNTH = attend(q_BNTH, k_BKSH, v_BKSH, mask_TS)
        return self.wo(y_BNTH.transpose(1, 2).reshape(B, T, -1))
