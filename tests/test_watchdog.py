"""Hangs end by themselves, with stacks and a name; nothing else is ended."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite import watchdog as watchdog_module
from openlm_lite.errors import InputError
from openlm_lite.stop import StopRequest
from openlm_lite.watchdog import HUNG, Watchdog, WatchdogConfig
from tests.train_server import ROOT

# What every program below begins with. The words of the command line are the config.
BEGINNING = """
import ctypes, itertools, json, logging, os, queue, signal, sys, threading, time
from pathlib import Path
from openlm_lite import stop as stop_module, watchdog as watchdog_module
from openlm_lite.stop import StopRequest
from openlm_lite.watchdog import Watchdog, WatchdogConfig

stop = StopRequest()
rank, folder, limits = int(os.environ.get("RANK", 0)), Path(sys.argv[1]), json.loads(sys.argv[2])
watchdog = Watchdog(WatchdogConfig(**limits), rank, 2, stop, folder)

def until_killed():  # in C code that takes part in nothing: no signal gets it out
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
LIMIT = 0.6


def start(tmp_path: Path, program: str, **limits: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BEGINNING + program, str(tmp_path), json.dumps(limits)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


def run(tmp_path: Path, program: str, **limits: float) -> tuple[int, str, str]:
    return ended(start(tmp_path, program, **limits))


HANGS = {
    "python": "while True: pass",
    "c": "time.sleep(1000)",
    "c_without_signals": "until_killed()",
    "batch": "queue.SimpleQueue().get()",
}


@pytest.mark.parametrize("kind", HANGS)
def test_a_hang_ends_with_its_name_and_all_stacks(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    phase = "batch" if kind == "batch" else "step"
    program = f"""
reader = threading.Thread(target=threading.Event().wait, name="the-reader", daemon=True)
reader.start()
def the_hang():
    {HANGS[kind]}
print(time.time(), flush=True)
watchdog.enter("{phase}", 17)
the_hang()
"""
    code, out, err = run(tmp_path, program, **{f"{phase}_seconds": LIMIT})
    took = time.time() - float(out)
    assert code == HUNG
    assert LIMIT < took < LIMIT + 5
    message = f"step 17: hung: {phase} takes longer than watchdog.{phase}_seconds = {LIMIT}"
    saved = (tmp_path / "stacks-rank1.txt").read_text()
    for text in (err, saved):
        assert "openlm: rank 1 of 2 on " in text and ", pid " in text and message in text
        assert text.index("thread MainThread") < text.index("in the_hang")
        assert "thread the-reader" in text and "in wait" in text


def test_a_hang_that_keeps_the_interpreters_lock_ends_too(tmp_path: Path) -> None:
    """No thread of Python can run then; the stacks come from faulthandler, and the exit code."""
    program = """
def the_hang():
    print(time.time(), flush=True)
    ctypes.PyDLL(None).sleep(1000)
watchdog.enter("step", 17)
the_hang()
"""
    code, out, err = run(tmp_path, program, step_seconds=LIMIT)
    assert code == 1
    assert time.time() - float(out) < LIMIT + 5 + 5
    assert "in the_hang" in err and 'File "<rank 0 of 2 on ' in err


def test_neither_a_full_pipe_nor_a_dead_disk_nor_a_lock_holds_the_end_up(tmp_path: Path) -> None:
    """All that the report goes through may be what hangs."""
    os.mkfifo(tmp_path / "stacks-rank0.txt")  # whoever opens it waits for a reader
    program = """
handler = logging.FileHandler(folder / "log.txt")
logging.getLogger("openlm_lite").addHandler(handler)
os.set_blocking(2, False)
try:
    while True:
        os.write(2, bytes(4096))
except BlockingIOError:
    os.set_blocking(2, True)
watchdog.enter("save")
print(time.time(), flush=True)
handler.acquire()
time.sleep(1000)
"""
    process = start(tmp_path, program, save_seconds=LIMIT)
    assert process.stdout is not None and process.stderr is not None
    began = float(process.stdout.readline())
    assert process.wait(60) == HUNG
    assert time.time() - began < LIMIT + 5 + 5
    assert "hung: save takes longer" in (tmp_path / "log.txt").read_text()
    process.communicate()


def test_a_save_behind_training_has_its_limit_too(tmp_path: Path) -> None:
    program = """
began = time.monotonic()
watchdog.watch_background(lambda: max(0, time.monotonic() - began - 0.5))
for step in itertools.count():
    watchdog.enter("step", step)
    time.sleep(0.01)
"""
    code, _, err = run(tmp_path, program, save_seconds=LIMIT)
    assert code == HUNG and "hung: save takes longer than watchdog.save_seconds" in err


def test_the_timer_behind_the_thread_goes_off_for_nothing_else(tmp_path: Path) -> None:
    program = """
watchdog_module._BACKUP_AFTER = 1.5  # with the limit: no busy machine keeps a thread away so long
began = time.monotonic()
while time.monotonic() - began < 3:
    watchdog.enter("step")
    time.sleep(0.01)
"""
    assert run(tmp_path, program, step_seconds=1) == (0, "", "")


def test_what_makes_progress_is_left_alone(tmp_path: Path) -> None:
    """A save inside a step has its own limit, a validation starts anew with each batch.

    By a clock of the test, so that a busy machine does not count; the thread looks all the while.
    """
    program = """
now = time.monotonic()
clock = type("Clock", (), {"monotonic": staticmethod(lambda: now)})
looks = iter(range(10**9))
watchdog._saving = lambda: next(looks) * 0.0
watchdog_module.time = clock
watchdog._tick = 0.02
def pass_(seconds):
    global now
    now += seconds
    seen = next(looks)
    while next(looks) < seen + 20:
        time.sleep(0.02)
watchdog.enter("step", 1)
pass_(60)
with watchdog.watch("save"):
    pass_(300)
pass_(60)
watchdog.enter("validation")
for _ in watchdog.each(range(4)):
    pass_(60)
watchdog.enter("batch")
pass_(10**6)
watchdog.close()
"""
    limits = {"step_seconds": 121, "save_seconds": 400, "validation_seconds": 90}
    assert run(tmp_path, program, **limits, batch_seconds=0) == (0, "", "")
    assert os.listdir(tmp_path) == []
    code, _, err = run(tmp_path, program, **limits | {"step_seconds": 119}, batch_seconds=0)
    assert code == HUNG and "hung: step takes longer than watchdog.step_seconds = 119" in err


def test_a_process_may_end_in_any_way_without_closing(tmp_path: Path) -> None:
    for ending in ("pass", "sys.exit(75)", "raise KeyboardInterrupt", "stop.release()"):
        code, _, err = run(tmp_path, f"watchdog.enter('step')\n{ending}")
        assert code == {"sys.exit(75)": 75, "raise KeyboardInterrupt": -signal.SIGINT}.get(
            ending, 0
        )
        assert "Fatal" not in err and "hung" not in err


def test_two_ctrl_cs_end_a_process_that_is_stuck_in_c(tmp_path: Path) -> None:
    program = """
watchdog_module._INSISTED = stop_module._ONE_PRESS_IN_PIPE = 0.5
watchdog._tick = 0.1
print("here", flush=True)
until_killed()
"""
    process = start(tmp_path, program)
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    while process.poll() is None:  # a busy machine: two that are read at once are one
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
    code, _, err = ended(process)
    assert code == 130
    assert "pid" in err and "ended at once, as asked" in err


# A launcher: starts the program as its child, says its pid, and waits.
LAUNCHER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
print(os.getpid(), flush=True)
time.sleep(1000)
"""


def orphan(tmp_path: Path, program: str, rank: str | None, **limits: float) -> tuple[str, float]:
    """What a child whose launcher is killed writes till its end, and how long it lives on."""
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    if rank is not None:
        environment["RANK"] = rank
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, BEGINNING + program, str(tmp_path), json.dumps(limits)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert launcher.stdout is not None
    while (line := launcher.stdout.readline()) != "ready\n":
        assert line, "the program ended before it was ready"
    launcher.kill()
    launcher.wait()
    began = time.monotonic()
    with launcher.stdout:
        text = launcher.stdout.read()  # to the end of the last process that has the pipe
    return text, time.monotonic() - began


@pytest.mark.parametrize(
    "limits",
    [{"orphan_seconds": 0.5}, pytest.param({}, marks=[pytest.mark.slow, pytest.mark.fault])],
)
def test_a_rank_whose_launcher_was_killed_is_gone(tmp_path: Path, limits: dict[str, float]) -> None:
    text, seconds = orphan(tmp_path, "print('ready', flush=True); until_killed()", "0", **limits)
    assert seconds < 15
    assert ") died; asking for a stop" in text and ") died; ended" in text


def test_a_rank_whose_launcher_was_killed_may_stop_by_itself(tmp_path: Path) -> None:
    program = """
print("ready", flush=True)
while not stop.requested:
    time.sleep(0.05)
print("saved", flush=True)
"""
    text, _ = orphan(tmp_path, program, "0", orphan_seconds=60)
    assert ") died; asking for a stop" in text and text.endswith("saved\n")


def test_a_save_under_way_is_let_finish_when_the_launcher_dies(tmp_path: Path) -> None:
    program = """
with watchdog.watch("save"):
    print("ready", flush=True)
    time.sleep(2)
    print("saved", flush=True)
until_killed()
"""
    text, seconds = orphan(tmp_path, program, "0", orphan_seconds=0.5)
    assert text.index("saved") < text.index(") died; ended")
    assert seconds < 15


def test_a_run_without_launcher_outlives_its_shell(tmp_path: Path) -> None:
    program = "print('ready', flush=True); time.sleep(1.5); print(stop.requested, flush=True)"
    text, _ = orphan(tmp_path, program, None, orphan_seconds=0.5)
    assert text == "False\n"


def torchrun(tmp_path: Path, program: str, **limits: float) -> subprocess.Popen[str]:
    script = tmp_path / "ranks.py"
    script.write_text(BEGINNING + program)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.Popen(
        [sys.executable, *words, str(tmp_path), json.dumps(limits)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.fault
def test_torchrun_tells_the_exit_code_of_the_rank_that_hung(tmp_path: Path) -> None:
    program = """
watchdog.enter("step", 3)
if rank == 1:
    time.sleep(1000)
while not stop.requested:
    watchdog.enter("step", 3)
    time.sleep(0.01)
print("rank 0 stops", flush=True)
"""
    code, out, _ = ended(torchrun(tmp_path, program, step_seconds=LIMIT))
    assert code == 1
    assert "rank 1 of 2 on" in out and "step 3: hung: step takes longer" in out
    assert "exitcode  : 76" in out and "rank 0 stops" in out


@pytest.mark.slow
@pytest.mark.fault
def test_no_rank_outlives_a_torchrun_that_was_killed(tmp_path: Path) -> None:
    program = """
(folder / f"pid{rank}").write_text(str(os.getpid()))
if rank == 1:
    until_killed()
while not stop.requested:
    time.sleep(0.01)
"""
    process = torchrun(tmp_path, program)
    deadline = time.monotonic() + 90
    while not all((tmp_path / f"pid{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    began = time.monotonic()
    assert process.stdout is not None
    with process.stdout:
        text = process.stdout.read()
    assert time.monotonic() - began < 15
    assert text.count("died; asking for a stop") == 2 and text.count(") died; ended") == 1


# Two ranks with gloo; rank 1 says its pid, and is stopped by the test.
RANKS = """
import os, subprocess, sys, time
import torch, torch.distributed as dist
from pathlib import Path
from openlm_lite.stop import StopRequest
from openlm_lite.watchdog import Watchdog, WatchdogConfig

folder = Path(sys.argv[1])
pids = []
for rank in range(2):
    pid = os.fork()
    if pid == 0:
        os.environ["RANK"] = str(rank)
        cfg = WatchdogConfig(step_seconds=2)
        watchdog = Watchdog(cfg, rank, 2, StopRequest(), folder)
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        for step in range(10**9):
            watchdog.enter("step", step)
            dist.all_reduce(torch.ones(3))
            if step == 10:
                (folder / f"pid{rank}").write_text(str(os.getpid()))
            time.sleep(0.01)
    pids.append(pid)
print(os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]), time.time(), flush=True)
print(os.waitstatus_to_exitcode(os.waitpid(pids[1], 0)[1]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.fault
def test_a_stopped_rank_is_found_by_the_other_one(tmp_path: Path) -> None:
    """The one that was stopped ends, too, as soon as it is let go on."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RANKS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    deadline = time.monotonic() + 90
    while not all((tmp_path / f"pid{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    stopped = int((tmp_path / "pid1").read_text())
    os.kill(stopped, signal.SIGSTOP)
    began = time.time()
    code, when = process.stdout.readline().split()
    os.kill(stopped, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert int(code) == HUNG
    assert 1 < float(when) - began < 2 + 5 + 10
    assert "rank 0 of 2" in err and "in all_reduce" in err
    assert "in all_reduce" in (tmp_path / "stacks-rank0.txt").read_text()


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 1e9])
def test_a_limit_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"watchdog.step_seconds = .*, must be 0 \(no limit\) to"):
        WatchdogConfig(step_seconds=value)


def test_the_process_groups_limit_is_later_than_all_of_ours() -> None:
    assert WatchdogConfig().group_seconds == 1860
    assert WatchdogConfig(batch_seconds=5000, save_seconds=1).group_seconds == 5060
    assert WatchdogConfig(step_seconds=0).group_seconds > 30_000_000


def test_a_store_that_is_down_is_given_up_before_the_wait_for_a_batch() -> None:
    """Else an outage that the reader survives would end the run."""
    from openlm_lite.retries import RETRY

    assert WatchdogConfig().batch_seconds >= RETRY.total_seconds + 2 * RETRY.attempt_seconds


ACTIONS = st.sampled_from(["enter", "watch", "leave", "next"])


@given(st.lists(st.tuples(ACTIONS, st.integers(0, 1000)), max_size=30))
def test_the_time_of_a_phase_is_its_own(actions: list[tuple[str, int]]) -> None:
    """Any nesting: each phase is charged what passed in it, not what passed in those inside."""
    clock = SimpleNamespace(now=1000.0)
    no_limits = WatchdogConfig(0, 0, 0, 0, 0, 0)
    found: list[StopRequest] = []  # of another thread: the signals stay with pytest
    thread = threading.Thread(target=lambda: found.append(StopRequest()))
    thread.start()
    thread.join()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
        with Watchdog(no_limits, 0, 1, found[0]) as watchdog:
            spent, open_phases, items = [0], [], watchdog.each(iter(int, 1))
            for action, seconds in actions:
                if action == "enter":
                    watchdog.enter("step")
                    spent[-1] = 0
                elif action == "watch":
                    open_phases.append(watchdog.watch("save"))
                    open_phases[-1].__enter__()
                    spent.append(0)
                elif action == "leave" and open_phases:
                    open_phases.pop().__exit__(None, None, None)
                    spent.pop()
                elif action == "next":
                    next(items)
                    spent[-1] = 0
                clock.now += seconds
                spent[-1] += seconds
                assert clock.now - watchdog._phase.since == spent[-1]
            assert watchdog._phase.name in ("start", "step", "save")
