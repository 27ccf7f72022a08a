"""One run per URL: an object in the store that says who runs, and that it is still alive.

    URL/lock/00000001.json   {"token", "run", "host", "pid", …, "released": true}
    URL/lock/00000002.json   the newest one is the owner's; it alone writes it again, every 30 s

    take    the newest is released, its process is dead, or it was not written for 180 s
            --> create the next number, by one request that the store refuses to all but the first
    alive?  the age of the owner's object by the store's own clock: those of machines differ
    lost    a next number exists, or the owner could not write for 150 s: it stops by itself

Numbers are never reused, and the objects stay (a few hundred bytes for each start of the run): so
no two runs can hold the same one, whatever is late, and no compare-and-swap is needed. Where the
store ignores the condition of a request, that is found at the start, and it is refused.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

from openlm_lite import object_store
from openlm_lite.errors import InputError, RunError
from openlm_lite.retries import ExistsError, RefusedError

log = logging.getLogger(__name__)

BEAT_SECONDS = 30.0
STALE_SECONDS = 180.0  # without a sign of life, by the store's clock, others may take over …
LEASE_SECONDS = 150.0  # … and the owner counts itself out before that, by its own stopwatch
_TRIES = 5
_PAD_BYTES = 2048  # of one length, so that a reader never sees the size of one and bytes of another


@dataclass(frozen=True)
class Owner:
    """Who holds the lock. Everything that can show that its process has ended."""

    token: str  # of this very start
    run: str  # the run folder
    host: str
    machine: str  # its boot and the namespace of its processes: where `pid` means something
    pid: int
    started: int  # of the process, in ticks since the boot: another one may get the same pid
    slurm_job: str
    slurm_restart: int
    elastic_run: str
    elastic_restart: int
    released: bool = False

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"run {self.run}, pid {self.pid} on {self.host}{job}"


def this_process(run: str) -> Owner:
    return Owner(
        token=uuid.uuid4().hex,
        run=run,
        host=os.uname().nodename,
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
        slurm_job=os.environ.get("SLURM_JOB_ID", ""),
        slurm_restart=_count("SLURM_RESTART_COUNT"),
        elastic_run=os.environ.get("TORCHELASTIC_RUN_ID", ""),
        elastic_restart=_count("TORCHELASTIC_RESTART_COUNT"),
    )


def _count(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 0


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # then only its age shows that an owner is dead


def _started(pid: int) -> int | None:
    """When the process began, in ticks since the boot; -1 if it has ended; None if not to be told.

    A process of somebody else may be hidden in /proc, so that its absence there proves nothing.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except PermissionError:
        pass
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])


def has_ended(owner: Owner, now: Owner) -> str:
    """Why the process of `owner` cannot be alive, as `now` knows it; empty where it may be.

    The same Slurm job alone would prove nothing: one allocation can run two steps at a time.
    """
    if owner.released:
        return "it has ended"
    same_machine = owner.machine and owner.machine == now.machine
    if same_machine and _started(owner.pid) not in (owner.started, None):
        return f"its process {owner.pid} on this machine is dead"
    if owner.slurm_job and owner.slurm_job == now.slurm_job:
        if owner.slurm_restart < now.slurm_restart:
            return f"Slurm has started job {owner.slurm_job} again since"
        same_agent = owner.elastic_run == now.elastic_run not in ("", "none")
        if same_agent and owner.elastic_restart < now.elastic_restart:
            return "torchrun has started its ranks again since"
    return ""


class RemoteLock:
    """The right of one run to write below `root`, from `take` to `release`."""

    def __init__(self, root: str, owner: Owner) -> None:
        self.root = root
        self.owner = owner
        self._number = 0
        self._lost = ""
        self._beaten_at = 0.0  # by the monotonic clock
        self._beat_lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Hold the lock, and a thread that keeps it. Raises InputError where another run has it."""
        for _ in range(_TRIES):
            newest = _newest_number(self.root)
            if newest:
                self._check_free(_url(self.root, newest))
            began = time.monotonic()
            try:
                object_store.create(_url(self.root, newest + 1), self._content())
            except ExistsError:
                continue  # somebody was quicker: is it alive?
            self._number, self._beaten_at = newest + 1, began
            self._check_store_obeys()
            self._thread = threading.Thread(target=self._beat_on, name="lock", daemon=True)
            self._thread.start()
            return
        raise InputError(f"checkpoint.dir: {self.root}: several runs want it at once; start one")

    def _check_free(self, url: str) -> None:
        owner = _read_owner(url)
        ended = has_ended(owner, self.owner)
        if not ended:
            age = object_store.clock(self.root) - object_store.written_at(url)
            if age <= STALE_SECONDS:
                raise InputError(
                    f"checkpoint.dir: {self.root} is in use by another run ({owner}; its last sign "
                    f"of life is {max(age, 0):.0f} s old); stop it or use another checkpoint.dir; "
                    f"of a run that was killed it is free after {STALE_SECONDS:.0f} s"
                )
            ended = f"its last sign of life is {age:.0f} s old"
        if not owner.released:
            log.warning("%s: taken over from an earlier start (%s): %s", self.root, owner, ended)

    def _check_store_obeys(self) -> None:
        """Create again what is there: a store that knows conditions refuses."""
        try:
            object_store.create_strictly(_url(self.root, self._number), self._content())
        except ExistsError:
            return
        raise RefusedError(
            f"checkpoint.dir: {self.root}: this store overwrites where it was told not to "
            "(If-None-Match), so that two runs could not be kept apart; use one that has "
            "conditional writes (Amazon S3, Google Cloud Storage, newer MinIO), or a local folder"
        )

    def check(self) -> None:
        """Raises RunError where the lock was lost; asks the store if the last sign is not fresh."""
        if not self._lost and time.monotonic() - self._beaten_at > 2 * BEAT_SECONDS:
            self._beat()
        if not self._lost and time.monotonic() - self._beaten_at > LEASE_SECONDS:
            self._lost = f"the store could not be written for {LEASE_SECONDS:.0f} s"
        if self._lost:
            raise RunError(lost_message(self.root, self._lost))

    @property
    def lost(self) -> str:
        """Why the lock is no longer held, as far as the thread knows; empty while it is."""
        return self._lost

    def release(self) -> None:
        """Let others in at once. Without it, they wait until this run's last sign is old."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT_SECONDS)
        if self._number and not self._lost and not (self._thread and self._thread.is_alive()):
            try:
                object_store.put(_url(self.root, self._number), self._content(released=True))
            except (InputError, RunError) as error:
                log.warning("%s: the lock could not be released: %s", self.root, error)
        self._number, self._thread = 0, None

    def _beat_on(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            try:
                self._beat()
            except (InputError, RunError) as error:
                log.warning("%s: no sign of life could be given: %s", self.root, error)
            if self._lost:
                log.error("%s: this run no longer holds it: %s", self.root, self._lost)
                return

    def _beat(self) -> None:
        """Write a sign of life, and see that nobody took over before it was there."""
        with self._beat_lock:
            for _ in range(_TRIES):  # one that got through late, in an outage, is written again
                began = time.monotonic()
                object_store.put(_url(self.root, self._number), self._content())
                if object_store.exists(_url(self.root, self._number + 1)):
                    self._lost = "another run has taken it over"
                    return
                self._beaten_at = began
                if time.monotonic() - began < BEAT_SECONDS:
                    return

    def _content(self, released: bool = False) -> bytes:
        text = json.dumps(asdict(self.owner) | {"released": released}, indent=1)
        return text.encode().ljust(_PAD_BYTES) + b"\n"


def lost_message(root: str, why: str) -> str:
    return (
        f"checkpoint.dir: {root}: this run no longer holds it ({why}); nothing more is written "
        "there, and what was committed is whole; run one run at a time"
    )


def _url(root: str, number: int) -> str:
    return f"{root}/lock/{number:08d}.json"


def _newest_number(root: str) -> int:
    """The highest number there is; 0 for none. By names alone, in steps that double."""
    below, above = 0, 1
    while object_store.exists(_url(root, above)):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        if object_store.exists(_url(root, middle)):
            below = middle
        else:
            above = middle
    return below


def _read_owner(url: str) -> Owner:
    content = object_store.read(url)
    try:
        values: Any = json.loads(content or b"")
        return Owner(**values)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"checkpoint.dir: {url}: does not say who uses this folder ({error}); if no run does, "
            "delete this object"
        ) from None
