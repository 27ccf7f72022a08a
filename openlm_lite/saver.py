"""Periodic checkpoints while training goes on: copy, write behind its back, ask how it went.

    training thread      start(): copy this rank's tensors to memory  | next steps …  | finished()
    thread of the save                                                | write, commit, delete old

One save at a time: a new one waits for the one before. The copies need as much memory of the host
as the rank's share of the checkpoint, and keep it; on a GPU they are pinned.

A periodic save that fails (a full disk, an outage, a refusal of the store) leaves the earlier
checkpoints as they were; it is told, and training goes on. After `checkpoint.max_failures` of them
in a row the run ends: it would train for nothing. A save at a stop or at the end must succeed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from openlm_lite import dist
from openlm_lite.checkpoint import (
    NO_TENSORS,
    CheckpointConfig,
    CheckpointError,
    TrainState,
    tensors_of,
    write_checkpoint,
)
from openlm_lite.checkpoint_place import Place
from openlm_lite.errors import InputError
from openlm_lite.safe_dcp import Optimizers


@dataclass(frozen=True)
class Saved:
    """How a save went."""

    state: TrainState
    path: str  # the committed folder; empty: it failed
    problem: str
    seconds: float  # from its start to its end
    stalled_seconds: float  # of these, training waited


class Saver:
    """The checkpoints of a run; all ranks call every method at the same step."""

    def __init__(self, root: str | Place, cfg: CheckpointConfig) -> None:
        """Collective: makes the process group in which the saving threads meet."""
        self._root, self._cfg = root, cfg
        self._group = dist.background_group()
        self._failures = 0  # in a row
        self._stager: DefaultStager | None = None
        self._save: _Save | None = None

    def start(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        state: TrainState,
        *,
        documents: Mapping[str, str],
        facts: Mapping[str, Any],
        averages: Mapping[str, torch.Tensor] = NO_TENSORS,
    ) -> list[Saved]:
        """Begin to save; returns when model and optimizer may change again.

        Waits for the save before, and returns how it went. Raises CheckpointError, on every rank,
        where `max_failures` saves in a row have failed.
        """
        started = time.monotonic()
        before = self.finish()
        tensors = {**tensors_of(model, optimizer), **averages}
        if self._cfg.background:
            tensors = self._copied(tensors)

        def write() -> str:
            return write_checkpoint(
                self._root,
                tensors,
                state,
                documents=documents,
                facts=facts,
                cfg=self._cfg,
                group=self._group,
            )

        self._save = _Save(write, state, started)
        self._save.start()
        if not self._cfg.background:
            self._save.join()
        self._save.stalled_seconds = time.monotonic() - started
        return before

    def finished(self) -> list[Saved]:
        """How the last save went, once, when it is over; to be asked at every step. Never waits.

        Ranks may get it at different steps: it is for the log.
        """
        if self._save is None or self._save.is_alive():
            return []
        save, self._save = self._save, None
        outcome = save.outcome()
        self._failures = self._failures + 1 if outcome.problem else 0
        return [outcome]

    def finish(self, must_succeed: bool = False) -> list[Saved]:
        """Wait for the save that is running; returns as `finished` does.

        Raises CheckpointError, on every rank, if `max_failures` saves in a row have failed, or if
        this one failed that `must_succeed`.
        """
        if self._save is not None:
            self._save.join()
        found = self.finished()
        problem = found[0].problem if found else ""
        if must_succeed and problem:
            raise CheckpointError(problem)
        if self._cfg.max_failures and self._failures >= self._cfg.max_failures:
            raise CheckpointError(
                f"{self._failures} saves in a row have failed (checkpoint.max_failures = "
                f"{self._cfg.max_failures}){': ' if problem else ''}{problem}; the earlier "
                "checkpoints are whole: mend this and launch the same command again"
            )
        return found

    def running_seconds(self) -> float:
        """For how long a save has been running behind training; 0 if none is."""
        save = self._save
        return time.monotonic() - save.started if save is not None and save.is_alive() else 0.0

    def close(self, seconds: float = 60.0) -> None:
        """Give a save that is running some time to end, after an error of the training thread."""
        if self._save is not None:
            self._save.join(seconds)

    def _copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in the memory of the host, the same memory for every save."""
        if self._stager is None:
            cuda = torch.cuda.is_available()
            options = StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=cuda,
            )
            self._stager = DefaultStager(options)
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)  # not a future: staging was not asked to be asynchronous
        return staged


class _Save(threading.Thread):
    """One save in a thread of its own."""

    def __init__(self, write: Callable[[], str], state: TrainState, started: float) -> None:
        super().__init__(name="openlm-save", daemon=True)
        self.started = started
        self.stalled_seconds = 0.0
        self._write, self._state = write, state
        self._path = ""
        self._error: Exception | None = None
        self._seconds = 0.0

    def run(self) -> None:
        try:
            self._path = self._write()
        except Exception as e:
            self._error = e
        self._seconds = time.monotonic() - self.started

    def outcome(self) -> Saved:
        """Raises what is no failure of the saving itself, such as the loss of another rank.

        An InputError is one: the store refuses (credentials that have expired, a right withdrawn),
        which can be mended while training goes on.
        """
        if self._error is not None and not isinstance(self._error, CheckpointError | InputError):
            raise self._error
        problem = "" if self._error is None else str(self._error)
        return Saved(self._state, self._path, problem, self._seconds, self.stalled_seconds)
