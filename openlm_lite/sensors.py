"""Temperature, clocks and power of the GPUs of this machine, beside training.

    gpu/temperature_c      of the hottest
    gpu/sm_clock_mhz       of the slowest: a GPU that is too hot, or short of power, lowers it
    gpu/power_w            of all together
    gpu/utilization_percent    of the least busy

Read by a thread every few seconds, through NVIDIA's management library (nvidia-ml-py): a call may
take milliseconds, which no step waits for.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence

import torch

logger = logging.getLogger("openlm_lite")

SECONDS = 10.0
"""between two readings"""

Reading = dict[str, float]


def read_gpus(devices: Sequence[int]) -> Reading:
    """Of the GPUs by their numbers for torch; what one of them does not tell is left out.

    Raises ModuleNotFoundError without nvidia-ml-py, and others where there is no driver.
    """
    sources: dict[str, tuple[Callable[[int], float], Callable[[list[float]], float]]] = {
        "gpu/temperature_c": (torch.cuda.temperature, max),
        "gpu/sm_clock_mhz": (torch.cuda.clock_rate, min),
        "gpu/power_w": (lambda device: torch.cuda.power_draw(device) / 1000, sum),
        "gpu/utilization_percent": (torch.cuda.utilization, min),
    }
    found: Reading = {}
    problem: Exception | None = None
    for name, (read, combine) in sources.items():
        try:
            found[name] = float(combine([float(read(device)) for device in devices]))
        except Exception as e:  # one that this model of GPU does not have
            problem = e
    if not found and problem is not None:
        raise problem
    return found


class Sensors:
    """The latest reading on this machine; empty before the first, and where there is none."""

    def __init__(
        self,
        device: torch.device,
        read: Callable[[Sequence[int]], Reading] = read_gpus,
        seconds: float = SECONDS,
    ) -> None:
        """Reads from here on if `device` is a GPU; says once, and gives up, where that fails."""
        self.latest: Reading = {}
        self._read, self._seconds = read, seconds
        # torchrun tells how many ranks are on this machine: they have the first so many GPUs
        self._devices = range(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sensors", daemon=True)
        if device.type == "cuda":
            self._thread.start()

    def close(self) -> None:
        """End the thread; one that hangs in the driver is left behind."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _watch(self) -> None:
        while not self._closing.is_set():
            try:
                self.latest = self._read(self._devices)
            except Exception as e:
                self.latest = {}
                missing = isinstance(e, ModuleNotFoundError)
                mend = ': pip install "openlm-lite[gpu]"' if missing else f" ({e})"
                logger.info("temperature and clocks of the GPUs are not recorded%s", mend)
                return
            self._closing.wait(self._seconds)
