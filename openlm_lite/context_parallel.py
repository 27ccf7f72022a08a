"""Context parallelism: each row of tokens is cut among the ranks of a cp group.

A row is cut into 2 cp pieces, and rank i has the pieces i and 2 cp - 1 - i: under a causal mask the
last piece sees the whole row, the first only itself, and each pair has the same work. cp = 2::

    piece   0  1  2  3           keys and values of all pieces are gathered, [B, K, T, H];
    rank    0  1  1  0           piece p of the queries attends to the first p + 1 pieces

Every attention gathers keys and values over the group (arXiv:2407.21783, section 3.3.2, did so too:
with grouped heads they are small beside the queries, and T^2 of attention hides them). Ring
attention, which torch has as an experiment, sends them round instead. It has kernels for CUDA alone
(flash, cuDNN, memory-efficient), needs each one's log-sum-exp, and would be a second numerics; this
is one `scaled_dot_product_attention` per piece, on any device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.attention.bias import causal_lower_right

from openlm_lite.model.attention import ungrouped
from openlm_lite.model.transformer import Transformer


def positions_of(T: int, cp: int, rank: int, device: torch.device | str = "cpu") -> Tensor:
    """Where the tokens of cp rank `rank` stand in their row of T, [T / cp]."""
    pieces = torch.arange(T, device=device).chunk(2 * cp)
    return torch.cat((pieces[rank], pieces[2 * cp - 1 - rank]))


def attend_over(mesh: DeviceMesh, q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    """Causal attention of this rank's two pieces of each row; a `Kernel`. Collective."""
    cp, rank = mesh.size(), mesh.get_local_rank()
    keys, values = gather_row(torch.stack((k_BKTH, v_BKTH)), mesh).unbind(0)
    pieces = [
        _attend_causal(q, keys[:, :, : (p + 1) * q.shape[2]], values[:, :, : (p + 1) * q.shape[2]])
        for p, q in zip((rank, 2 * cp - 1 - rank), q_BNTH.chunk(2, dim=2), strict=True)
    ]
    return torch.cat(pieces, dim=2)


def gather_row(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The tokens of all cp ranks in the order of the row; dimension -2 is T. Collective.

    Backward, each rank gets the sum of what all ranks have for its tokens (a reduce-scatter).
    """
    dim = x.dim() - 2
    shared = DTensor.from_local(x.contiguous(), mesh, (Shard(dim),), run_check=False)
    whole = shared.redistribute(placements=(Replicate(),)).to_local(grad_placements=(Partial(),))
    cp = mesh.size()
    pieces = whole.chunk(2 * cp, dim=dim)  # rank 0's two, rank 1's two, …
    return torch.cat((*pieces[0::2], *reversed(pieces[1::2])), dim=dim)


def _attend_causal(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    """The T queries are the last T of the S positions."""
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    k_BKSH, v_BKSH = ungrouped(q_BNTH, k_BKSH, v_BKSH)
    if T == S:
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True)
    if q_BNTH.device.type == "cuda" and not torch.compiler.is_compiling():
        bias = causal_lower_right(T, S)  # the flash kernel takes it as a flag
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=bias)
    seen_TS = torch.ones(T, S, dtype=torch.bool, device=q_BNTH.device).tril(diagonal=S - T)
    return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=seen_TS)


def cut_rows(model: Transformer, mesh: DeviceMesh) -> None:
    """Every attention of the model over the whole rows, of which each rank has a part."""
    blocks: list[Any] = list(model.layers)
    for block in blocks:
        block.attention.kernel = functools.partial(attend_over, mesh)
