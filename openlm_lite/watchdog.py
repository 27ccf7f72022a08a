"""A thread in every rank that ends it when it hangs, with the stacks of all its threads.

    main thread    enter("batch") ─ enter("step") ─ watch("save") … : one assignment each
    this thread    once a second:  phase over its limit?  -> stacks, exit code HUNG
                                   launcher dead?         -> ask for a stop, then exit code ORPHANED
                                   Ctrl-C twice?          -> exit code INTERRUPTED
    faulthandler   a timer in C, set anew by this thread once a second: goes off when that did not
                   happen for the limit of the phase (C code keeps the interpreter's lock)
                                                       -> stacks, exit code 1 (it knows no other)

A rank that was stopped (SIGSTOP, a frozen machine) reports nothing. The others wait for it in a
collective, go over their own limits there, and the launcher ends the whole group.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import math
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from logging import FileHandler
from pathlib import Path
from types import FrameType, FunctionType, TracebackType
from typing import Literal, NamedTuple, NoReturn, TypeVar

from openlm_lite import history
from openlm_lite.errors import InputError
from openlm_lite.stop import INTERRUPTED, StopRequest

HUNG, ORPHANED = 76, 77
"""exit codes: ended by its watchdog in a phase over its limit; ended because its launcher died"""

Name = Literal["start", "batch", "step", "validation", "save"]
T = TypeVar("T")

_YEAR = 365 * 86400
_TICK = 1.0  # s between two looks
_LAST_WORDS = 1.0  # s for standard error, and as much for the files: either may be what hangs
_BACKUP_AFTER = 4.0  # s after a limit: it is for this thread to report what it can
_INSISTED = 5.0  # s that a second Ctrl-C has to get through by itself


@dataclass(frozen=True)
class WatchdogConfig:
    """Seconds that the phases of a rank may take; 0: no limit."""

    start_seconds: float = 1800.0
    """from the start to the end of the first step: the meeting of the ranks, loading, compiling"""
    batch_seconds: float = 1200.0
    """until every rank has its batch; a store that is down is asked for 900 s before"""
    step_seconds: float = 600.0
    """forward, backward, optimizer, with all that the ranks exchange in it"""
    validation_seconds: float = 600.0
    """from one batch of a validation to the next"""
    save_seconds: float = 1800.0
    """a save, or the wait for one in the background"""
    orphan_seconds: float = 8.0
    """what a rank whose launcher died has to end by itself; a save under way is let finish"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= _YEAR:  # NaN too
                raise InputError(
                    f"watchdog.{field.name} = {value}, must be 0 (no limit) to {_YEAR} (a year)"
                )

    @property
    def limits(self) -> dict[Name, float]:
        """Seconds of each phase, infinite where there is no limit."""
        seconds: dict[Name, float] = {
            "start": self.start_seconds,
            "batch": self.batch_seconds,
            "step": self.step_seconds,
            "validation": self.validation_seconds,
            "save": self.save_seconds,
        }
        return {name: value or math.inf for name, value in seconds.items()}

    @property
    def group_seconds(self) -> float:
        """For the process group's own time limit: later than all of these, which tell more."""
        return min(max(self.limits.values()), _YEAR) + 60


class _Phase(NamedTuple):
    name: Name
    step: int | None
    limit: float
    since: float


class Watchdog:
    """Watches this process from its construction to `close()`.

    What a rank does is always one phase, "start" at first. `enter` goes on to another one; `watch`
    is for a phase inside, whose time does not count for the one around it. Only the main thread
    calls these.

    `stacks_folder` may be set later, once the folder is known to be the run's own: there the stacks
    are appended to `stacks-rank<N>.txt`. The message goes to the files of `log` too.

    The launcher is watched where RANK is in the environment: torchrun and its like set it. A run
    that was started without them may outlive its shell.

    There is one per process: faulthandler has but one timer.
    """

    def __init__(
        self,
        cfg: WatchdogConfig,
        rank: int,
        world_size: int,
        stop: StopRequest,
        stacks_folder: Path | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        self.stacks_folder = stacks_folder
        self._rank, self._stop, self._pid = rank, stop, os.getpid()
        self._who = f"rank {rank} of {world_size} on {socket.gethostname()}, pid {self._pid}"
        self._log = log or logging.getLogger("openlm_lite")
        self._limits = cfg.limits
        self._orphan_seconds = cfg.orphan_seconds if "RANK" in os.environ else 0.0
        self._orphan_ends = self._insisted_ends = math.inf
        self._armed = math.inf
        self._saving: Callable[[], float] = float
        self.enter("start")
        self._tick = min(_TICK, min(cfg.orphan_seconds or math.inf, *self._limits.values()) / 4)
        self._closed = threading.Event()
        # A thread that still lives while the interpreter is taken down can abort it.
        atexit.register(self.close)
        # faulthandler names files and functions, no more: this frame is where it names the rank.
        code = Watchdog._run.__code__.replace(co_filename=f"<{self._who}>", co_name="watchdog")
        run = FunctionType(code, globals())
        self._thread = threading.Thread(target=run, args=(self,), name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, name: Name, step: int | None = None) -> None:
        """The phase that this process is in from now on."""
        limit = self._limits[name]
        self._phase = _Phase(name, step, limit, time.monotonic())
        if limit < self._armed:  # seldom: the thread does it once a second
            self._arm_backup(limit)

    @contextmanager
    def watch(self, name: Name, step: int | None = None) -> Iterator[None]:
        """A phase inside the present one, which goes on afterwards as if no time had passed."""
        outer, began = self._phase, time.monotonic()
        self.enter(name, outer.step if step is None else step)
        try:
            yield
        finally:
            self._phase = outer._replace(since=outer.since + time.monotonic() - began)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the limit of the present phase holds from one to the next."""
        for item in items:
            self.beat()
            yield item
        self.beat()

    def beat(self) -> None:
        """The limit of the present phase holds from here on."""
        self._phase = self._phase._replace(since=time.monotonic())

    def watch_background(self, saving: Callable[[], float]) -> None:
        """Also watch a save behind training: `saving()` is its seconds so far, 0 if there is none.

        It is called in the watchdog's thread, and must not wait.
        """
        self._saving = saving

    def close(self) -> None:
        """End the watch; a second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        atexit.unregister(self.close)
        if os.getpid() != self._pid:
            return  # a fork has neither thread
        try:
            self._thread.join(5)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed.wait(self._tick):
            phase, now = self._phase, time.monotonic()
            saving = self._saving()
            behind = _Phase("save", None, self._limits["save"], now - saving)
            for each in (phase, behind):
                if now - each.since > each.limit:
                    self._end(HUNG, _said(each), _stacks())
            self._look_for_insistence(now)
            if self._orphan_seconds:
                self._look_for_launcher(now, phase.name == "save" or saving > 0)
            self._arm_backup(phase.limit)

    def _look_for_insistence(self, now: float) -> None:
        if self._insisted_ends == math.inf and self._stop.insisted():
            self._insisted_ends = now + _INSISTED
        if now > self._insisted_ends:
            self._end(INTERRUPTED, "ended at once, as asked")

    def _look_for_launcher(self, now: float, saving: bool) -> None:
        """A launcher that died cannot end its ranks, and they would keep GPUs and run.dir."""
        if self._orphan_ends == math.inf:
            if os.getppid() == self._stop.parent:
                return
            self._stop.ask()
            self._orphan_ends = now + self._orphan_seconds
            text = f"the launcher (pid {self._stop.parent}) died; asking for a stop"
            _write(2, f"openlm: {self._who}: {text}\n".encode(), _LAST_WORDS)
        if saving:  # has its own limit
            self._orphan_ends = now + self._orphan_seconds
        if now > self._orphan_ends:
            self._end(ORPHANED, f"the launcher (pid {self._stop.parent}) died; ended")

    def _arm_backup(self, limit: float) -> None:
        """Set faulthandler's timer anew (0.1 ms). It measures how long this thread does not run.

        Not the phase: that may end while C code, which may take its time, keeps this thread away.
        """
        self._armed = limit
        if limit == math.inf:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(limit + _BACKUP_AFTER, exit=True, file=2)

    def _end(self, code: int, text: str, stacks: str = "") -> NoReturn:
        """Say why, and end this process: nothing that hangs in it, or in the disk, can stop it."""
        try:
            # a write may block after all; that of the timer must not
            quiet = os.open(os.devnull, os.O_WRONLY)
            faulthandler.dump_traceback_later(2 * _LAST_WORDS + 1, exit=True, file=quiet)
            text = f"openlm: {self._who}: {text}\n"
            _write(2, (text + stacks).encode(errors="backslashreplace"), _LAST_WORDS)
            files = threading.Thread(target=self._keep, args=(text, stacks), daemon=True)
            files.start()
            files.join(_LAST_WORDS)
        finally:
            os._exit(code)

    def _keep(self, text: str, stacks: str) -> None:
        """The same into files; past the log's handlers, whose locks the main thread may hold."""
        paths = [Path(h.baseFilename) for h in self._log.handlers if isinstance(h, FileHandler)]
        texts = dict.fromkeys(paths, f"{time.strftime('%H:%M:%S')} {text}")
        if stacks and self.stacks_folder is not None:
            path = self.stacks_folder / f"stacks-rank{self._rank}.txt"
            texts[path] = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}{stacks}\n"
        for path, lines in texts.items():
            with (
                suppress(OSError),
                path.open("a", encoding="utf-8", errors="backslashreplace") as f,
            ):
                f.write(lines)
        if stacks and self.stacks_folder is not None:  # last: where it fails, it tells the log
            history.note(self.stacks_folder, "failed", error=text.strip(), rank=self._rank)


def _said(phase: _Phase) -> str:
    where = "" if phase.step is None else f"step {phase.step}: "
    return (
        f"{where}hung: {phase.name} takes longer than watchdog.{phase.name}_seconds = "
        f"{phase.limit:g} (if it is only slow, allow more); all threads:"
    )


def _stacks() -> str:
    """What every thread but this one does, the main one first; the latest call last.

    Read from the frames, not from the source files: their disk may be what hangs.
    """
    threads = {t.ident: t for t in threading.enumerate()}
    texts: list[str] = []
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        thread = threads.get(ident)
        text = f"thread {thread.name if thread else ident}:\n{_stack(frame)}"
        texts.insert(0 if thread is threading.main_thread() else len(texts), text)
    return "".join(texts)


def _stack(frame: FrameType | None) -> str:
    lines: list[str] = []
    while frame is not None:
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n')
        frame = frame.f_back
    return "".join(reversed(lines))


def _write(fd: int, data: bytes, seconds: float) -> None:
    """As much of `data` as goes out in `seconds`: a pipe that nobody reads must not hold us up."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    until = time.monotonic() + seconds
    with suppress(OSError):  # closed
        # what poll promises room for is PIPE_BUF
        while data and poll.poll(max(0.0, until - time.monotonic()) * 1000):
            data = data[os.write(fd, data[: select.PIPE_BUF]) :]
