"""The lock at a URL: one run at a time, and no run for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_lite import object_store, remote_lock
from openlm_lite.checkpoint_place import RemotePlace
from openlm_lite.errors import InputError, RunError
from openlm_lite.remote_lock import RemoteLock, this_process
from openlm_lite.retries import RefusedError
from tests.store_faults import ROOT, Memory, Rules, commit_of, objects, use_memory, wait_for
from tests.store_faults import memory as memory
from tests.store_faults import s3 as s3
from tests.store_faults import server as server

pytest.importorskip("moto")
pytest.importorskip("s3fs")


# --- the lock -------------------------------------------------------------------------------------


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lock, "BEAT_SECONDS", 0.05)


def elsewhere(**changes: Any) -> remote_lock.Owner:
    """A process on a machine that nothing is known of from here."""
    return replace(this_process("/runs/other"), machine="elsewhere", host="n2", **changes)


def test_a_second_run_is_refused_within_seconds_and_admitted_after_the_first(s3: Rules) -> None:
    first, second = (RemoteLock(ROOT, this_process(name)) for name in ("/runs/a", "/runs/b"))
    first.take()
    first.check()
    began = time.monotonic()
    with pytest.raises(
        InputError, match=rf"in use by another run \(run /runs/a, pid {os.getpid()}"
    ):
        second.take()
    assert time.monotonic() - began < 5
    first.release()
    second.take()
    second.check()
    second.release()
    assert sorted(objects()) == ["lock/00000001.json", "lock/00000002.json"]  # no clocks


def test_of_runs_that_start_at_once_one_gets_the_lock(s3: Rules) -> None:
    def take(number: int) -> RemoteLock | None:
        lock = RemoteLock(ROOT, this_process(f"/runs/{number}"))
        try:
            lock.take()
        except InputError:
            return None
        return lock

    with ThreadPoolExecutor(6) as pool:
        taken = [lock for lock in pool.map(take, range(6)) if lock]
    assert len(taken) == 1
    taken[0].check()
    taken[0].release()


@pytest.mark.parametrize("kind", ["lost", "503", "reset"])
def test_the_lock_is_taken_through_faults(kind: str, s3: Rules) -> None:
    s3.on("PUT", "lock/", kind, times=2)
    lock = RemoteLock(ROOT, this_process("/runs/a"))
    lock.take()
    lock.check()
    assert [name for name in objects() if "lock" in name] == ["lock/00000001.json"]
    lock.release()


def test_a_store_that_ignores_conditions_is_refused(s3: Rules) -> None:
    s3.knows_conditions = False
    with pytest.raises(RefusedError, match="this store overwrites where it was told not to"):
        RemoteLock(ROOT, this_process("/runs/a")).take()


def leave(owner: remote_lock.Owner) -> None:
    """The lock of a run that was killed: taken, never released, no sign of life any more."""
    lock = RemoteLock(ROOT, owner)
    lock.take()
    lock._end.set()
    assert lock._thread is not None
    lock._thread.join()


def test_a_run_that_gives_no_sign_of_life_is_succeeded_after_minutes_of_the_stores_clock(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(elsewhere())
    lock = RemoteLock(ROOT, this_process("/runs/a"))
    with pytest.raises(
        InputError, match=r"on n2; its last sign of life is \d+ s old\).*after 180 s"
    ):
        lock.take()
    monkeypatch.setattr(time, "time", lambda: 9e9)  # the clock of this machine does not matter
    memory.time += remote_lock.STALE_SECONDS - 10
    with pytest.raises(InputError, match=r"is 17\d s old"):
        lock.take()
    memory.time += 20
    lock.take()
    lock.release()


def test_signs_of_life_keep_the_lock(memory: Memory, quick_beats: None) -> None:
    first = RemoteLock(ROOT, elsewhere())
    first.take()
    for _ in range(4):
        memory.time += remote_lock.STALE_SECONDS + 1
        written = memory.time
        wait_for(
            lambda since=written: object_store.written_at(f"{ROOT}/lock/00000001.json") > since
        )
        with pytest.raises(InputError, match="in use by another run"):
            RemoteLock(ROOT, this_process("/runs/b")).take()
    first.check()
    first.release()


def test_a_run_whose_lock_was_taken_over_writes_nothing_more(
    memory: Memory, quick_beats: None, tmp_path: Path
) -> None:
    """It was asleep for minutes: its own place is another's when it wakes up."""
    asleep = RemoteLock(ROOT, elsewhere())
    asleep.take()
    with asleep._beat_lock:  # no sign of life in the meantime
        memory.time += remote_lock.STALE_SECONDS + 1
        awake = RemoteLock(ROOT, this_process("/runs/b"))
        awake.take()
    wait_for(lambda: asleep.lost)
    place = RemotePlace(ROOT, str(tmp_path), asleep)
    assert place.lost == "another run has taken it over"
    url = place.path_of(1)
    for act in (
        place.start,
        lambda: place.make_room(url),
        lambda: place.share(str(tmp_path), [], url),
        lambda: place.commit(commit_of(1, {}), url),
        lambda: place.put_aside(url, "x"),
        lambda: place.delete(url),
    ):
        with pytest.raises(RunError, match=r"no longer holds it \(another run has taken it over"):
            act()
    asleep.release()
    awake.check()
    assert RemotePlace(ROOT, str(tmp_path), awake).lost == ""
    assert sorted(objects()) == ["lock/00000001.json", "lock/00000002.json"]
    awake.release()


def test_an_owner_that_could_not_give_a_sign_in_time_asks_before_it_goes_on(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RemoteLock(ROOT, elsewhere())
    lock.take()
    lock._beaten_at -= 1000  # an outage; nobody came in the meantime
    calls = memory.calls
    lock.check()
    assert memory.calls > calls
    lock._beaten_at -= 1000
    memory.time += 1000
    other = RemoteLock(ROOT, this_process("/runs/b"))
    other.take()
    with pytest.raises(RunError, match="another run has taken it over"):
        lock.check()
    lock.release()
    other.release()


def test_what_shows_that_an_earlier_start_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    now = replace(
        this_process("/r"), slurm_job="7", slurm_restart=1, elastic_run="x", elastic_restart=1
    )
    far = {"machine": "elsewhere"}
    ended = {
        "released": replace(now, released=True),
        "dead": replace(now, pid=child.pid),
        "the pid is another process's": replace(now, started=now.started - 1),
        "requeued": replace(now, slurm_restart=0, **far),
        "ranks started again": replace(now, elastic_restart=0, **far),
    }
    alive = {
        "itself": now,
        "far away": replace(now, slurm_job="", **far),
        "another step of the same job": replace(now, **far),
        "another job": replace(now, slurm_job="8", slurm_restart=0, **far),
        "no name": replace(now, slurm_restart=1, elastic_run="none", elastic_restart=0, **far),
        "a process of somebody else": replace(now, pid=1, started=remote_lock._started(1) or 0),
    }
    for what, owner in ended.items():
        assert remote_lock.has_ended(owner, now), what
    for what, owner in alive.items():
        assert not remote_lock.has_ended(owner, now), what


def test_a_killed_run_is_succeeded_at_once_on_the_same_machine(memory: Memory) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    leave(replace(this_process("/runs/a"), pid=child.pid))
    lock = RemoteLock(ROOT, this_process("/runs/a"))
    lock.take()
    lock.release()


@given(n=st.integers(0, 300))
@settings(max_examples=20)
def test_the_newest_start_is_found_among_any_number(n: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        memory = use_memory(patch)
        for number in range(1, n + 1):
            memory.objects[remote_lock._url(ROOT, number)[5:]] = (b"", 0.0)
        assert remote_lock._newest_number(ROOT) == n
        assert memory.calls <= 20


def test_the_lock_holds_no_secret(s3: Rules) -> None:
    leave(elsewhere())
    with pytest.raises(InputError) as caught:
        RemoteLock(ROOT, this_process("/runs/a")).take()
    assert "canary" not in str(caught.value) + str(objects())
