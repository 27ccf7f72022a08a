"""Causal grouped-query attention, its masks, and the cache of keys and values for generation.

Shapes: B batch, T position, S all positions seen, N query heads, K kv heads, H head_dim,
J blocks of positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from openlm_lite.errors import InputError
from openlm_lite.model import cpu_attention
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


class FlexMask(NamedTuple):
    """What FlexAttention takes instead of a mask of T x S numbers."""

    blocks: BlockMask
    slopes_N: Tensor | None
    """ALiBi's; None without"""


Mask = Tensor | FlexMask
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""causal attention of (q_BNTH, k_BKTH, v_BKTH): see `kernels.py`"""


def attend(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: Mask | None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Softmax attention, causal where no mask is given; N is a multiple of K.

    A mask is boolean ([T, S], or [B, 1, T, S] by document), or added to the scores ([N, T, S], or
    [B, N, T, S] by document), or a FlexMask. `kernel` computes what is plainly causal; without
    one, and with a mask of ours, a CPU in fp32 trains by `train_on_cpu`, the rest by `sdpa`.
    """
    grouped = k_BKSH.shape[1] != q_BNTH.shape[1]
    if isinstance(mask, FlexMask):
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        score_mod = None if mask.slopes_N is None else _alibi_score_mod(mask.slopes_N)
        return flex(  # pyright: ignore[reportReturnType]
            q_BNTH,
            k_BKSH,
            v_BKSH,
            score_mod=score_mod,
            block_mask=mask.blocks,
            enable_gqa=grouped,
        )
    if kernel is not None and kernel is not train_on_cpu and mask is None:
        return kernel(q_BNTH, k_BKSH, v_BKSH)
    on_cpu = q_BNTH.device.type == "cpu" and q_BNTH.dtype == torch.float32
    ours = mask is None or (mask.dtype == torch.bool and mask.dim() == 4)
    if ours and on_cpu and q_BNTH.requires_grad and kernel in (None, train_on_cpu):
        return train_on_cpu(q_BNTH, k_BKSH, v_BKSH, mask)
    return sdpa(q_BNTH, k_BKSH, v_BKSH, mask)


def sdpa(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention, by the kernel that it picks."""
    grouped = k_BKSH.shape[1] != q_BNTH.shape[1]
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def train_on_cpu(
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, mask: Tensor | None = None
) -> Tensor:
    """`cpu_attention.causal_attention`, with a head of keys and values for each of the queries.

    A compiled block keeps less in everything, and does not keep the probabilities either.
    """
    k, v = ungrouped(q_BNTH, k_BKTH, v_BKTH)
    keep = not torch.compiler.is_compiling()
    return cpu_attention.causal_attention(q_BNTH, k, v, mask, keep)


def ungrouped(q_BNTH: Tensor, *others: Tensor) -> list[Tensor]:
    """Keys and values, one head for each query head: for kernels that know no groups."""
    repeats = q_BNTH.shape[1] // others[0].shape[1]
    return [t if repeats == 1 else t.repeat_interleave(repeats, dim=1) for t in others]


@functools.cache
def _compiled_flex() -> Any:
    """FlexAttention for a model that is not compiled: as it is, it would write out all scores.

    Not `dynamic`: a run has one or two shapes of batch, and fixed sizes are faster.
    """
    return torch.compile(flex_attention, dynamic=False)


def _alibi_score_mod(slopes_N: Tensor) -> Any:
    def subtract(score: Tensor, b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes_N[n] * (query - key)

    return subtract


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
    query_T, key_S = torch.arange(start, S, device=device), torch.arange(S, device=device)
    distance_TS = (query_T[:, None] - key_S).float().masked_fill(~seen_TS, torch.inf)
    return (-_slopes(cfg, device)[:, None, None] * distance_TS).to(dtype)


def _slopes(cfg: ModelConfig, device: torch.device) -> Tensor:
    return torch.tensor(alibi_slopes(cfg.n_heads, cfg.alibi_bias_max), device=device)


def causal_flex_mask(cfg: ModelConfig | None, T: int, device: torch.device) -> FlexMask:
    """Plainly causal, for FlexAttention; with the slopes of `cfg`, if it has ALiBi."""
    slopes_N = _slopes(cfg, device) if cfg is not None and cfg.positions == "alibi" else None
    return FlexMask(_causal_blocks(T, device), slopes_N)


@functools.lru_cache(maxsize=4)  # a run has one or two lengths
def _causal_blocks(T: int, device: torch.device) -> BlockMask:
    def causal(b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(causal, None, None, T, T, device=device, BLOCK_SIZE=_FLEX_BLOCK)


# --- continuations inside a row ------------------------------------------------------------------


class Branches(NamedTuple):
    """Several continuations of each row's cached tokens, side by side in one row of new ones.

    A row with 3 cached tokens, in a cache that is 4 long for its longest row, and the branches
    "a b" and "c"::

        branch_BT              0 0 1
        positions_BT           3 4 3         as if each came alone behind the cached tokens
        cached_positions_BS    0 1 2 -1      -1: padding, seen by none
    """

    branch_BT: Tensor
    """which branch a token is of, integers; equal ones stand together"""
    positions_BT: Tensor
    cached_positions_BS: Tensor


def branch_mask(cfg: ModelConfig, branches: Branches, dtype: torch.dtype) -> Tensor:
    """The mask of the new tokens over the S cached ones and themselves, for `attend`.

    The row drawn at `Branches` (x: seen)::

               cached     new
               0 1 2 -   a b c
           a   x x x     x
           b   x x x     x x
           c   x x x         x

    Boolean [B, 1, T, S + T], with ALiBi [B, N, T, S + T] in `dtype`.
    """
    branch_BT, positions_BT, cached_BS = branches
    T = branch_BT.shape[1]
    own_BTT = (branch_BT[:, :, None] == branch_BT[:, None, :]).tril()
    seen = torch.cat(((cached_BS >= 0)[:, None].expand(-1, T, -1), own_BTT), dim=-1)
    if cfg.positions != "alibi":
        return seen[:, None]
    keys = torch.cat((cached_BS, positions_BT), dim=1)
    distance = (positions_BT[:, :, None] - keys[:, None, :]).float().masked_fill(~seen, torch.inf)
    return (-_slopes(cfg, branch_BT.device)[:, None, None] * distance[:, None]).to(dtype)


# --- documents inside a row ----------------------------------------------------------------------

_FLEX_BLOCK = 128  # positions that FlexAttention skips, or computes unmasked, together


def document_mask(cfg: ModelConfig, doc_ids_BT: Tensor, dtype: torch.dtype) -> Mask:
    """The mask of rows that hold several documents, for `attend`: causal, and none sees another.

    `doc_ids_BT` (integers) never decrease along a row. A row of documents 0 0 0 1 1 2 (x: seen)::

             S 0 1 2 3 4 5
        T 0    x
          1    x x
          2    x x x
          3          x
          4          x x
          5              x

    On CUDA a FlexMask, which takes B (T / 128)^2 numbers; else (and for heads under 16 wide, which
    FlexAttention has no kernel for) boolean [B, 1, T, T], with ALiBi [B, N, T, T] in `dtype`.
    """
    if uses_flex(cfg, doc_ids_BT.device):
        slopes_N = _slopes(cfg, doc_ids_BT.device) if cfg.positions == "alibi" else None
        return FlexMask(_document_blocks(doc_ids_BT), slopes_N)
    seen_BTT = (doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]).tril_()
    bias_NTT = causal_mask(cfg, 0, doc_ids_BT.shape[1], doc_ids_BT.device, dtype)
    if bias_NTT is None:
        return seen_BTT[:, None]
    return bias_NTT.masked_fill(~seen_BTT[:, None], -torch.inf)


def uses_flex(cfg: ModelConfig, device: torch.device) -> bool:
    """Whether documents are kept apart by FlexAttention (rather than by a whole mask)."""
    return device.type == "cuda" and cfg.head_dim >= 16


def _document_blocks(doc_ids_BT: Tensor) -> BlockMask:
    """What `create_block_mask` makes of these documents, without its [B, T, T] numbers.

    Ids do not decrease, so the first and the last id of a block say all: an earlier block of keys
    is seen if its last id is the queries' first, and wholly if its first id is their last.
    """
    T = doc_ids_BT.shape[1]
    starts_J = torch.arange(0, T, _FLEX_BLOCK, device=doc_ids_BT.device)
    ends_J = (starts_J + _FLEX_BLOCK - 1).clamp(max=T - 1)
    first_BJ, last_BJ = doc_ids_BT[:, starts_J], doc_ids_BT[:, ends_J]
    whole_J = ends_J - starts_J == _FLEX_BLOCK - 1
    earlier_JJ = starts_J[:, None] > starts_J
    full_BJJ = earlier_JJ & (last_BJ[:, :, None] == first_BJ[:, None, :]) & whole_J[:, None]
    seen_BJJ = earlier_JJ & (first_BJ[:, :, None] == last_BJ[:, None, :])
    seen_BJJ |= starts_J[:, None] == starts_J

    def same_document(b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (doc_ids_BT[b, query] == doc_ids_BT[b, key])

    return BlockMask.from_kv_blocks(
        *_listed(seen_BJJ & ~full_BJJ),
        *_listed(full_BJJ),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=same_document,
        seq_lengths=(T, T),
    )


def _listed(blocks_BJJ: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: they come first in its row."""
    blocks_B1JJ = blocks_BJJ[:, None].int()
    order = blocks_B1JJ.argsort(dim=-1, descending=True, stable=True)
    return blocks_B1JJ.sum(-1, dtype=torch.int32), order.int()


def positions_in_documents(doc_ids_BT: Tensor) -> Tensor:
    """The position of every token within its document, [B, T], from 0."""
    positions_T = torch.arange(doc_ids_BT.shape[1], device=doc_ids_BT.device)
    begins_BT = F.pad(doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1], (1, 0))
    return positions_T - (begins_BT * positions_T).cummax(dim=1).values


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(H) + mask) V, with N query heads on K key/value heads.

    Between projection and heads: qk-norm over all heads, then clip_qkv; on the heads: qk-norm of
    each, then rotary embedding.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.kernel: Kernel | None = None  # set by `kernels.set_attention`, or by the layout
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
        mask: Mask | None,
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
        y_BNTH = attend(q_BNTH, k_BKSH, v_BKSH, mask, self.kernel if cache is None else None)
        return self.wo(y_BNTH.transpose(1, 2).reshape(B, T, -1))
