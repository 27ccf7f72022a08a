"""L2 norms of gradients and parameters, layer by layer, of a model that may lie on many ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openlm_lite.parameter_names import plain_name
from openlm_lite.readback import to_device


class Norms(NamedTuple):
    """Of each part of the model: `layers.N`, `embedding`, `norm`, `output`, …"""

    gradients: dict[str, float]
    parameters: dict[str, float]


def parts_of(model: nn.Module) -> list[str]:
    """The names of the parts, in the model's order."""
    return list(dict.fromkeys(_part(name) for name, _ in model.named_parameters()))


@torch.no_grad()
def squared_norms(model: nn.Module) -> Tensor:
    """[2 * parts] sums of squares over all ranks, fp32: gradients, then parameters; collective.

    On the model's device, which nothing here waits for. One reduction for all of them: each rank
    adds up the squares of what it holds, divided by the number of ranks that hold the same.
    """
    parts = {part: i for i, part in enumerate(parts_of(model))}
    tensors: list[Tensor] = []
    places: list[int] = []
    shares: list[float] = []
    for name, parameter in model.named_parameters():
        for at, tensor in ((0, parameter.grad), (len(parts), parameter)):
            if tensor is None:
                continue
            local, copies = _own_part(tensor)
            if local.numel():
                tensors.append(local)
                places.append(at + parts[_part(name)])
                shares.append(1 / copies)
    device = next(model.parameters()).device
    found = torch.zeros(2 * len(parts), device=device)
    if tensors:  # a rank of many may hold nothing of a small model
        norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors])
        index = to_device(torch.tensor(places), device)
        found.index_add_(0, index, norms.square() * to_device(torch.tensor(shares), device))
    torch.distributed.all_reduce(found)
    return found


def norms_of(squares: list[float], parts: list[str]) -> Norms:
    """From the numbers of `squared_norms`, once they are on the host."""
    roots = [math.sqrt(square) for square in squares]
    n = len(parts)
    return Norms(dict(zip(parts, roots[:n], strict=True)), dict(zip(parts, roots[n:], strict=True)))


def _part(name: str) -> str:
    first, *rest = plain_name(name).split(".")
    return f"{first}.{rest[0]}" if first == "layers" else first


def _own_part(tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, and how many ranks of the run hold the same."""
    n_ranks = torch.distributed.get_world_size()
    if not isinstance(tensor, DTensor):
        return tensor, n_ranks
    pieces = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        assert not placement.is_partial()  # neither parameters nor what backward leaves of them
        if not placement.is_replicate():
            pieces *= size
    return tensor.to_local(), n_ranks // pieces
