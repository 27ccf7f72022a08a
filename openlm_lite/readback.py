"""Numbers of a step and the time of its parts, read on the host without a wait of the device."""

from __future__ import annotations

import time
from typing import Any

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


def reads_late(device: torch.device) -> bool:
    """Whether the numbers of a step cost a wait: a CPU has computed them when it is asked."""
    return device.type == "cuda"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; the host goes on at once, which takes pinned memory on CUDA.

    PyTorch's cache of pinned memory hands a block out again only when the copy is done.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Laps:
    """Seconds of the parts of a step on its device; asked for without a wait.

    On a CPU by the clock. On CUDA by events, for the host only hands over what is to be done.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._names: list[str] = []
        self._marks: list[Any] = [self._mark()]

    def lap(self, name: str) -> None:
        """What began with the lap before ends here; a second one of a name adds to the first."""
        self._names.append(name)
        self._marks.append(self._mark())

    def seconds(self) -> dict[str, float] | None:
        """None as long as the device has not come to the end of the last one."""
        if self._cuda and not self._marks[-1].query():
            return None
        found: dict[str, float] = {}
        for name, begin, end in zip(self._names, self._marks, self._marks[1:], strict=False):
            took = begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            found[name] = found.get(name, 0.0) + took
        return found

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
