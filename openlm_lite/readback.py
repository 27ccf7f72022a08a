"""Numbers of a step, read on the host without making the device wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """A few numbers on their way from the device; begun at once, waited for by `numbers`.

    A plain `tolist()` waits for everything that the device was given meanwhile, the next step
    included. This waits for what came before the numbers, no more.
    """

    def __init__(self, values_N: Tensor) -> None:
        if values_N.device.type == "cuda":
            self._values = torch.empty(values_N.shape, dtype=values_N.dtype, pin_memory=True)
            self._values.copy_(values_N, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._values, self._arrived = values_N, None

    def numbers(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; the host goes on at once, which takes pinned memory on CUDA.

    PyTorch's cache of pinned memory hands a block out again only when the copy is done.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
