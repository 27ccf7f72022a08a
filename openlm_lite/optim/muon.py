"""Muon: momentum whose every update of a matrix is made orthogonal, on sharded parameters too.

    gradient shard ─ momentum, Nesterov ─┐ all-to-all: the rows of a matrix meet at its owner
                                         owner: Newton-Schulz, singular values to about 1
    weight shard ←── rows of the update ─┘ all-to-all: each rank gets its rows back

Jordan et al. 2024 (kellerjordan.github.io/posts/muon). The scale of the update and the weight decay
are those of Moonlight (arXiv:2502.16982), so that learning rates of AdamW fit. It is torch's own
Muon, with a step of its own for matrices that lie on several ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at 0; the published ones
_STEPS = 5
_LEAST_NORM = 1e-7
_RMS_OF_ADAM = 0.2  # what entries of AdamW's update measure, in units of the learning rate


class _Job(NamedTuple):
    """A matrix with a gradient, and the group that it is in."""

    parameter: Tensor
    group: dict[str, Any]


class Muon(torch.optim.Muon):
    """For matrices only; a group has `lr` and `weight_decay`.

    Whole matrices in bf16 have torch's own step. The step below is the same, to the bit, and takes
    what torch's does not do well: shards (there every product of Newton-Schulz is a collective over
    DTensors, and its result hangs on the number of ranks), and fp32.

    With gradient G, momentum mu, weights W [n, m]::

        B <- mu B + (1 - mu) G;  U = mu B + (1 - mu) G                      (Nesterov)
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(n, m)) orthogonalize(U)

    An orthogonal n x m matrix has entries of size 1/sqrt(max(n, m)), so those of the update measure
    0.2 lr, as AdamW's do.

    What the ranks send: W ranks take W matrices at a time (the costliest first), and each rank
    makes one of them orthogonal. Its rows come from the other ranks and go back to them, in the
    dtype of the computation: 2 (W - 1) / W of a rank's own shards per step, and no matrix is worked
    on twice. A rank holds one whole matrix at a time.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype`: of Newton-Schulz; None: bf16 on a GPU, fp32 on a CPU.

        Raises ValueError for a parameter that is no matrix, or is not sharded by its rows.
        """
        for p in (p for group in groups for p in group["params"]):
            if p.ndim != 2 or not _is_whole_or_by_rows(p):
                raise ValueError(f"Muon takes matrices, whole or by rows: {tuple(p.shape)}")
        super().__init__(groups, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
        self.dtype = dtype
        self.is_torchs = all(
            not isinstance(p, DTensor) and self._dtype_on(p.device) == torch.bfloat16
            for group in self.param_groups
            for p in group["params"]
        )
        """whether a step is torch's own"""

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], float] | None = None
    ) -> None:
        """One step; collective. A group with a rate of 0 moves its momentum only, without talk."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        if self.is_torchs:
            super().step()
            return
        jobs = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                self._buffer(p).lerp_(_local(p.grad), 1 - group["momentum"])
                if group["lr"] != 0:
                    jobs.append(_Job(p, group))
        jobs.sort(key=lambda job: -_cost(job.parameter.shape))  # stable: every rank has this order
        world = _group_of(jobs[0].parameter) if jobs else None
        at_once = dist.get_world_size(world) if world is not None else 1
        for start in range(0, len(jobs), at_once):
            self._update(jobs[start : start + at_once], world)

    def _update(self, jobs: Sequence[_Job], world: dist.ProcessGroup | None) -> None:
        """Step with as many matrices as there are ranks, or fewer."""
        directions = []
        for p, group in jobs:
            assert p.grad is not None
            direction = _local(p.grad).lerp(self._buffer(p), group["momentum"])
            directions.append(direction.to(self._dtype_on(direction.device)))
        if world is None:
            updates = [orthogonalize(direction) for direction in directions]
        else:
            shapes = [p.shape for p, _ in jobs]
            updates = orthogonalize_shards(directions, shapes, world)
        for (p, group), update in zip(jobs, updates, strict=True):
            lr, weights = group["lr"], _local(p)
            weights.mul_(1 - lr * group["weight_decay"])
            weights.add_(update, alpha=-lr * _RMS_OF_ADAM * math.sqrt(max(p.shape)))

    def _buffer(self, p: Tensor) -> Tensor:
        """This rank's part of the momentum."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return _local(state["momentum_buffer"])

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U V^T of matrix = U S V^T, in its own dtype: singular values between 0.7 and 1.2.

    Five steps of x <- a x + b x^3 + c x^5 on the singular values (Newton-Schulz), of which only
    products of matrices are needed. Those under about 1e-3 of the largest stay small; a matrix of
    zeros stays as it is.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix  # the product x x^T is the smaller one
    x = x / x.norm().clamp(min=_LEAST_NORM)
    for _ in range(_STEPS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x


def orthogonalize_shards(
    shards: Sequence[Tensor], shapes: Sequence[torch.Size], group: dist.ProcessGroup
) -> list[Tensor]:
    """This rank's rows of the matrices made orthogonal; collective.

    shards: this rank's rows of each matrix; shapes: of the whole matrices. Rank j makes matrix j
    orthogonal: there are as many as ranks, or fewer.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    sent = [shard.numel() for shard in shards] + [0] * (world_size - len(shards))
    got = [0] * world_size
    if rank < len(shapes):
        n, m = shapes[rank]
        got = [m * _rows_of(r, n, world_size) for r in range(world_size)]
    rows = _exchange(torch.cat([shard.reshape(-1) for shard in shards]), sent, got, group)
    if rank < len(shapes):
        rows = orthogonalize(rows.view(shapes[rank])).reshape(-1)
    parts = _exchange(rows, got, sent, group).split(sent)[: len(shards)]
    return [part.view_as(shard) for part, shard in zip(parts, shards, strict=True)]


def _exchange(values: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send `sent[r]` values, in order, to each rank r, and get `got[r]` from it."""
    received = values.new_empty(sum(got))
    dist.all_to_all_single(received, values.contiguous(), got, sent, group)
    return received


def _rows_of(rank: int, n: int, world_size: int) -> int:
    """How many of `n` rows FSDP gives to `rank`: equal parts, the last ones shorter or empty."""
    part = -(-n // world_size)
    return max(0, min(part, n - rank * part))


def _cost(shape: torch.Size) -> int:
    """Newton-Schulz's, in proportion."""
    return min(shape) * math.prod(shape)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_whole_or_by_rows(parameter: Tensor) -> bool:
    """Rows over the last dimension of its mesh; with HSDP the first one has copies of that."""
    if not isinstance(parameter, DTensor):
        return True
    return parameter.placements in ((Shard(0),), (Replicate(), Shard(0)))


def _group_of(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that share the parameter; None where this one has all of it.

    Each copy of HSDP's works for itself: their gradients, and so their updates, are the same bits.
    """
    if not isinstance(parameter, DTensor):
        return None
    shards = parameter.device_mesh.ndim - 1
    return (
        parameter.device_mesh.get_group(shards) if parameter.device_mesh.size(shards) > 1 else None
    )
