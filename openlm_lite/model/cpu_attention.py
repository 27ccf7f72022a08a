"""Causal softmax attention on a CPU, a block of queries at a time against the keys before it.

The blocks are plain matrix products, which a CPU does at twice the speed of the tiled kernel behind
`scaled_dot_product_attention`, and nothing above the diagonal blocks is computed.

It is an operator of PyTorch, forward and backward, so that a compiled block is one graph with it
inside: what comes before writes in its order, and what to keep for the backward pass is chosen for
the block as a whole. torch.compile's cache on disk knows an operator by its name alone: change
`_VERSION` with what the operators take, or with the formula in `_differentiate`.

Shapes: B batch, T position, N heads, H head_dim, G = B*N.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
"""queries that are multiplied at once with the keys up to theirs; fastest on 1 and on 2 cores"""
_VERSION = 1


def causal_attention(
    q_BNTH: Tensor,
    k_BNTH: Tensor,
    v_BNTH: Tensor,
    seen_B1TT: Tensor | None = None,
    keep: bool = True,
) -> Tensor:
    """softmax(q k^T / sqrt(H)) v, where a query sees the keys up to its own.

    A mask, boolean [B, 1, T, T], says what is seen of that; every query sees itself. `keep` keeps
    the probabilities for the backward pass, B N T^2 / 2 numbers; without it they are computed
    again there, by the same operations.
    """
    scaled = q_BNTH * q_BNTH.shape[-1] ** -0.5
    inputs = (t.contiguous() for t in (scaled, k_BNTH, v_BNTH))
    return _forward(*inputs, seen_B1TT, keep)[0]


@torch.library.custom_op(
    f"openlm_lite::causal_attention_{_VERSION}", mutates_args=(), device_types="cpu"
)
def _forward(
    q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, seen_B1TT: Tensor | None, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """What attention puts out, and the probabilities by block, if they are kept; q is scaled."""
    B, N, T, H = q_BNTH.shape
    q, k, v = (t.view(B * N, T, H) for t in (q_BNTH, k_BNTH, v_BNTH))
    out_BNTH = _empty_out(q_BNTH)
    kept = []
    for start, end in _blocks(T):
        p = _probabilities(q, k, seen_B1TT, start, end)
        out_BNTH[:, :, start:end] = torch.bmm(p, v[:, :end]).view(B, N, -1, H)
        if keep:
            kept.append(p)
    return out_BNTH, kept


@_forward.register_fake
def _(
    q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, seen_B1TT: Tensor | None, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    B, N, T, _ = q_BNTH.shape
    blocks = _blocks(T) if keep else []
    return _empty_out(q_BNTH), [q_BNTH.new_empty(B * N, e - s, e) for s, e in blocks]


@torch.library.custom_op(
    f"openlm_lite::causal_attention_backward_{_VERSION}", mutates_args=(), device_types="cpu"
)
def _backward(
    d_out_BNTH: Tensor,
    row_sums_BNT1: Tensor,
    q_BNTH: Tensor,
    k_BNTH: Tensor,
    v_BNTH: Tensor,
    seen_B1TT: Tensor | None,
    kept: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (as scaled), k and v; `row_sums`: of the probabilities and their gradients."""
    (B, N, T, H) = shape = q_BNTH.shape
    d_out, q, k, v = (t.view(B * N, T, H) for t in (d_out_BNTH, q_BNTH, k_BNTH, v_BNTH))
    row_sums = row_sums_BNT1.view(B * N, T, 1)
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for i, (start, end) in reversed(list(enumerate(_blocks(T)))):
        p = kept[i] if kept else _probabilities(q, k, seen_B1TT, start, end)
        d_here = d_out[:, start:end]
        d_s = torch.bmm(d_here, v[:, :end].transpose(1, 2))
        d_s.sub_(row_sums[:, start:end]).mul_(p)
        d_q[:, start:end] = torch.bmm(d_s, k[:, :end])
        if end == T:  # the first in this order, with all keys: it writes, the others add
            torch.bmm(p.transpose(1, 2), d_here, out=d_v)
            torch.bmm(d_s.transpose(1, 2), q[:, start:end], out=d_k)
        else:  # not baddbmm_: into a slice it runs one product after the other
            d_v[:, :end] += torch.bmm(p.transpose(1, 2), d_here)
            d_k[:, :end] += torch.bmm(d_s.transpose(1, 2), q[:, start:end])
    return d_q.view(shape), d_k.view(shape), d_v.view(shape)


@_backward.register_fake
def _(
    d_out_BNTH: Tensor,
    row_sums_BNT1: Tensor,
    q_BNTH: Tensor,
    k_BNTH: Tensor,
    v_BNTH: Tensor,
    seen_B1TT: Tensor | None,
    kept: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BNTH), torch.empty_like(k_BNTH), torch.empty_like(v_BNTH)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    q, k, v, seen, _ = inputs
    out, kept = output
    ctx.save_for_backward(q, k, v, out, seen, *kept)


def _differentiate(ctx: Any, d_out_BNTH: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, seen, *kept = ctx.saved_tensors
    # softmax: ds = p (dp - sum(p dp)), and sum(p dp) = sum(out d_out)
    row_sums_BNT1 = (out * d_out_BNTH).sum(-1, keepdim=True)
    return *_backward(d_out_BNTH.contiguous(), row_sums_BNT1, q, k, v, seen, kept), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _empty_out(q_BNTH: Tensor) -> Tensor:
    B, N, T, H = q_BNTH.shape
    return q_BNTH.new_empty(B, T, N, H).transpose(1, 2)  # in the order of what comes next


def _probabilities(
    q_GTH: Tensor, k_GTH: Tensor, seen_B1TT: Tensor | None, start: int, end: int
) -> Tensor:
    """Of the queries from `start` to `end`, over the keys up to them: [G, end - start, end]."""
    scores = torch.bmm(q_GTH[:, start:end], k_GTH[:, :end].transpose(1, 2))
    if seen_B1TT is None:
        scores[:, :, start:] += _later(end - start)
    else:
        hidden = seen_B1TT[:, :, start:end, :end].logical_not()
        scores.view(len(hidden), -1, end - start, end).masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1, out=scores)


@functools.lru_cache(maxsize=4)  # a run has one or two lengths
def _later(size: int) -> Tensor:
    """Added to the scores of a block's own keys: -inf for those that come after the query."""
    return torch.full((size, size), -torch.inf).triu_(1)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
