"""Worker processes for `openlm prepare`, and a sign of life on standard error.

The workers are forked from a server that has imported what they need and done nothing else: a
worker starts in a hundredth of a second, and inherits no thread, lock or open file of the caller.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any, TypeVar

from openlm_lite import redact

Job = TypeVar("Job")
Result = TypeVar("Result")

_SECONDS_BETWEEN_LINES = 30.0
# What the jobs of this worker process share (a tokenizer is too big to send with each).
_shared: tuple[Any, ...] = ()


def get_ready(module: str) -> None:
    """Begin to import what the workers of this process will need, beside what it does next.

    The first call decides; without one, the first workers import for themselves.
    """
    if _method() == "forkserver":
        multiprocessing.get_context("forkserver").set_forkserver_preload([module])
        forkserver.ensure_running()


def each_done(
    function: Callable[..., Result], jobs: Sequence[Job], shared: tuple[Any, ...], workers: int
) -> Iterator[tuple[Job, Result]]:
    """(job, function(job, *shared)) as the jobs get done, by up to `workers` processes.

    One worker or one job runs here, without a process. The first error ends the rest.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield job, function(job, *shared)
        return
    mask = os.umask(0o077)  # to read it is to set it: for a moment to the narrowest
    os.umask(mask)
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context(_method()),
        initializer=_start,
        initargs=(shared, dict(os.environ), mask),
    )
    try:
        futures = {pool.submit(_work, function, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed (out of memory?); run the same command again, with fewer "
            "--workers: it goes on where it was"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _method() -> str:
    # the server listens at a socket in the temporary folder, whose path has to fit into 108 bytes
    return "forkserver" if len(os.fsencode(tempfile.gettempdir())) < 64 else "spawn"


def _start(shared: tuple[Any, ...], environment: dict[str, str], mask: int) -> None:
    global _shared
    _shared = shared
    os.umask(mask)  # as the environment is: the server's may be older
    os.environ.clear()
    os.environ.update(environment)
    redact.guard_output()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a worker blocked on its queue would outlive a killed parent


def _work(function: Callable[..., Result], job: Any) -> Result:
    return function(job, *_shared)


class Progress:
    """How far a stage is: a bar on a terminal, else a line every half minute."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._tokens = 0
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True)

    def add(self, done: int, tokens: int) -> None:
        """Count finished work (in units) and the tokens that came of it."""
        self._done += done
        self._tokens += tokens
        now = time.monotonic()
        rate = self._tokens / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
            self._bar.update(done)
        elif now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            print(
                f"{self._what}: {self._done / max(self._total, 1):.0%} of {self._total:,} "
                f"{self._unit}, {self._tokens:,} tokens, {rate / 1e6:.2f}M tokens/s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
