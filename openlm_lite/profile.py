"""Traces of a few steps, for chrome://tracing or Perfetto: where does the time of a step go?"""

from __future__ import annotations

import gzip
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from openlm_lite.dist import World
from openlm_lite.errors import InputError
from openlm_lite.log import logger


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps are traced; `profile/` in the run's folder gets one file per trace."""

    first_step: int | None = None
    """the first, from 0; null: none. The first steps of a run compile and fill caches: take 10"""
    steps: int = 3
    """in a row; a trace takes megabytes per step, and the steps are slower"""
    all_ranks: bool = False
    """else rank 0 alone"""

    def __post_init__(self) -> None:
        if self.first_step is not None and self.first_step < 0:
            raise InputError(f"profile.first_step = {self.first_step}, must not be negative")
        if self.steps < 1:
            raise InputError(f"profile.steps = {self.steps}, must be at least 1")


class Profiler:
    """Begins and ends the trace around the steps that the config names."""

    def __init__(self, cfg: ProfileConfig, folder: Path, world: World) -> None:
        self.cfg, self.folder, self.world = cfg, folder / "profile", world
        self._running: profile | None = None
        self._left = 0

    def begin(self, step: int) -> None:
        """Before the zero-based `step`."""
        mine = self.cfg.all_ranks or self.world.is_main
        if step == self.cfg.first_step and mine and self._running is None:
            self._running, self._left = start_trace(self.world.device), self.cfg.steps

    def end(self, steps_done: int) -> list[str]:
        """After a step; what there is to say of it."""
        if self._running is None:
            return []
        self._left -= 1
        if self._left:
            return []
        name = f"steps-{self.cfg.first_step}-to-{steps_done - 1}-rank{self.world.rank}.json.gz"
        path, running = self.folder / name, self._running
        self._running = None
        if not write_trace(running, path):
            return []
        return [f"traced {self.cfg.steps} steps: {path}"]

    def close(self) -> None:
        """End a trace that the end of the run cut short; it is not written."""
        if self._running is not None:
            self._running.stop()
            self._running = None


def start_trace(device: torch.device) -> profile:
    """A trace of this process, and of its GPU."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    trace = profile(activities=activities, record_shapes=True)
    trace.start()
    return trace


def write_trace(trace: profile, path: Path) -> bool:
    """End the trace and write it as `path`, by its name plain or compressed JSON.

    Where it cannot be written, nothing ends: the log says so, and False is returned.
    """
    trace.stop()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch raises nothing where it cannot write
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            trace.export_chrome_trace(file.name)
            content = Path(file.name).read_bytes()
        if not content.rstrip().endswith(b"}"):
            raise OSError(f"its JSON is cut off: is there room in {tempfile.gettempdir()}?")
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    except OSError as e:
        logger.warning("%s: no trace: %s", path, e)
        return False
    return True
