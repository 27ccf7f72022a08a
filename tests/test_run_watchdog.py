"""Ranks that hang, launchers that die, requests to stop at any instant: in the loop itself."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from openlm_lite.commit import check_contents, read_commit, step_folders
from openlm_lite.stop import INTERRUPTED
from openlm_lite.train import DONE, STOPPED
from openlm_lite.watchdog import HUNG
from tests.run_faults import Fault, fault
from tests.test_train import losses, measured, same_weights, wait_for
from tests.train_server import ROOT, TrainServer, alive, listens

pytestmark = pytest.mark.fault

LIMIT = 2.0  # s


def run(server: TrainServer, recipe: Path, folder: Path, *words: str, **more: Any) -> list[int]:
    more = {"world": 2, "patience": 20.0, **more}
    return server.train(str(recipe), f"run.dir={folder}", *words, **more)["codes"]


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints, newest first; every one verified to the last byte."""
    commits = [read_commit(path) for path in step_folders(str(folder / "checkpoints"))]
    for commit in commits:
        check_contents(commit)
    return [commit.step for commit in commits]


@pytest.fixture(scope="module")
def whole(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("whole") / "r"
    assert run(train_server, toy_recipe, folder) == [DONE, DONE]
    return folder


def same_run(a: Path, b: Path) -> bool:
    return same_weights(a, b) and measured(a) == measured(b)


HANGS = {  # what hangs: where, at which call; the phase, the rank, words
    "step": ("step", 6, "step", 1, []),
    "first step": ("step", 1, "start", 1, []),
    "batch": ("read", 8, "batch", 0, []),
    "validation": ("validation", 2, "validation", 1, []),
    "save": ("save", 1, "save", 1, ["checkpoint.background=false"]),
    "save behind": ("save", 2, "save", 0, ["checkpoint.background=true"]),
}


@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=[] if what == "step" else pytest.mark.slow) for what in HANGS],
)
def test_a_rank_that_hangs_ends_with_its_stacks_and_the_same_command_resumes(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, whole: Path, what: str
) -> None:
    place, n, phase, rank, words = HANGS[what]
    folder, said = tmp_path / "r", tmp_path / "said.txt"
    # a start begins with the process, a save waits for the disk
    limit = {"start": 6.0, "save": 5.0}.get(phase, LIMIT)
    codes = run(
        train_server,
        toy_recipe,
        folder,
        *words,
        f"watchdog.{phase}_seconds={limit}",
        faults=[fault("hang", rank, place, n)],
        log=said,
    )
    ended_at = time.time()
    assert codes[rank] == HUNG
    assert codes[1 - rank] != DONE
    text, stacks = said.read_text(), (folder / f"stacks-rank{rank}.txt").read_text()
    found = re.search(r"hangs at ([\d.]+)", text)
    assert found and ended_at - float(found[1]) < limit + 5 + 10
    for report in (text, stacks):
        assert f"rank {rank} of 2 on " in report
        assert f"hung: {phase} takes longer than watchdog.{phase}_seconds = {limit:g}" in report
    assert "in _hang" in stacks and "thread MainThread" in stacks
    assert run(train_server, toy_recipe, folder, *words) == [DONE, DONE]
    assert same_run(folder, whole)


REQUESTS: dict[str, tuple[list[Fault], int]] = {  # faults, and the step after which it ends
    "while the ranks agree": ([fault("SIGTERM", 1, "agree", 6)], 6),
    "in a step": ([fault("SIGUSR1", 1, "step", 6)], 6),
    "in the update, three times on two ranks": (
        [fault("SIGTERM SIGUSR1", 1, "update", 6), fault("SIGINT", 0, "update", 6)],
        7,
    ),
    "in the first validation": ([fault("SIGTERM", 0, "validation")], 1),
    "in a periodic save": ([fault("SIGTERM", 1, "save", 1)], 5),
    "in the last step": ([fault("SIGTERM", 1, "step", 12)], 12),
    "in the last save": ([fault("SIGTERM SIGTERM", 0, "save", 3)], 12),
}


@pytest.mark.parametrize(
    "when",
    [
        pytest.param(when, marks=[] if when == "in a step" else pytest.mark.slow)
        for when in REQUESTS
    ],
)
def test_a_request_to_one_rank_ends_all_after_at_most_one_step_and_a_save(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, whole: Path, when: str
) -> None:
    folder = tmp_path / "r"
    faults, last = REQUESTS[when]
    words = ["checkpoint.background=false"]  # the save of step 4 is over before step 5
    code = DONE if last == 12 else STOPPED
    assert run(train_server, toy_recipe, folder, *words, faults=faults) == [code, code]
    assert len(losses(folder)) == last and saved_steps(folder)[0] == last
    if code == STOPPED:
        word = json.loads((folder / "stopped.json").read_text())
        assert word == {"step": last, "tokens": 256 * last}
        assert run(train_server, toy_recipe, folder, *words) == [DONE, DONE]
    assert not (folder / "stopped.json").exists()
    assert same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("where", [("step", 26), ("after load", 1), ("update", 24)])
def test_a_request_while_a_batch_is_left_out_or_undone_changes_nothing(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, where: tuple[str, int]
) -> None:
    """Batch 22 is left out, and batch 25 is a spike that goes back to step 20."""
    words = ["total_steps=30", "checkpoint.every_steps=10", "guard.on_nonfinite=skip"]
    words += ["guard.spike_sigmas=6", "guard.spike_window=32", "guard.on_spike=rewind"]
    bad = [fault("nan loss", 1, "batch", 22), fault("large gradient", 0, "batch", 25)]
    assert run(train_server, toy_recipe, tmp_path / "whole", *words, faults=bad) == [DONE, DONE]
    asked = [*bad, fault("SIGTERM", 1, *where)]
    assert run(train_server, toy_recipe, tmp_path / "r", *words, faults=asked) == [STOPPED] * 2
    assert run(train_server, toy_recipe, tmp_path / "r", *words, faults=bad) == [DONE, DONE]
    assert same_run(tmp_path / "r", tmp_path / "whole")


@pytest.mark.parametrize(
    "place",
    [
        "step",
        pytest.param("validation", marks=pytest.mark.slow),
        pytest.param("update", marks=pytest.mark.slow),
    ],
)
def test_a_second_ctrl_c_ends_at_once_and_what_is_saved_stays_whole(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, whole: Path, place: str
) -> None:
    """A terminal sends it to all ranks; half a second lies between the two."""
    folder, said = tmp_path / "r", tmp_path / "said.txt"
    n = 3 if place == "validation" else 10  # both in step 10
    faults = [fault("SIGINT SIGINT", rank, place, n) for rank in (0, 1)]
    codes = run(train_server, toy_recipe, folder, faults=faults, log=said)
    assert codes == [INTERRUPTED, INTERRUPTED]
    assert "Traceback" not in said.read_text()
    assert saved_steps(folder) == [8, 4]
    assert not (folder / "stopped.json").exists()
    assert run(train_server, toy_recipe, folder) == [DONE, DONE]
    assert same_run(folder, whole)


@contextmanager
def started(*command: str, said: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real process; what it writes goes to the file `said`."""
    with said.open("ab") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def python(recipe: Path, folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command that a user gives."""
    script = (sys.executable, *launcher, str(ROOT / "train.py"))
    return [*script, str(recipe), f"run.dir={folder}", *words]


LONG = ["total_steps=300", "checkpoint.every_steps=50", "eval.every_steps=100"]


@pytest.fixture(scope="module")
def long_run(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("long") / "r"
    assert run(train_server, toy_recipe, folder, *LONG, world=1) == [DONE]
    return folder


@pytest.fixture(scope="module")
def seconds_of_a_run(toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """From the start of the process to its end."""
    folder = tmp_path_factory.mktemp("timed")
    began = time.monotonic()
    with started(*python(toy_recipe, folder / "r", *LONG), said=folder / "said.txt") as process:
        assert process.wait(240) == DONE
    return time.monotonic() - began


SERIES = {  # signals, each with the seconds after the one before
    "SIGTERM": [("SIGTERM", 0.0)],
    "SIGUSR1": [("SIGUSR1", 0.0)],
    "SIGINT": [("SIGINT", 0.0)],
    "SIGTERM twice": [("SIGTERM", 0.0), ("SIGTERM", 0.05)],
    "mixed": [("SIGUSR1", 0.0), ("SIGTERM", 0.3), ("SIGINT", 0.0), ("SIGTERM", 0.5)],
}


@pytest.mark.slow
@pytest.mark.parametrize("which", SERIES)
def test_a_request_at_any_instant_of_a_real_process_ends_with_a_checkpoint(
    train_server: TrainServer,
    toy_recipe: Path,
    tmp_path: Path,
    long_run: Path,
    seconds_of_a_run: float,
    which: str,
) -> None:
    """The first instant is the one at which the process listens, long before torch is there."""
    rng = random.Random(which)
    for i in range(4):
        folder, said = tmp_path / str(i), tmp_path / f"said{i}.txt"
        wait = 0.0 if i == 0 else rng.uniform(0, seconds_of_a_run)
        with started(*python(toy_recipe, folder, *LONG), said=said) as process:
            while process.poll() is None and not listens(process.pid):
                time.sleep(0.005)
            time.sleep(wait)
            for name, pause in SERIES[which]:
                time.sleep(pause)
                process.send_signal(signal.Signals[name])
            code = process.wait(240)
        text = said.read_text()
        assert code in (STOPPED, DONE), (wait, code, text)
        assert "Traceback" not in text
        steps = saved_steps(folder)
        if code == STOPPED:
            assert json.loads((folder / "stopped.json").read_text())["step"] == steps[0]
            assert i > 0 or steps == [1]  # not one step more than asked for
            assert run(train_server, toy_recipe, folder, *LONG, world=1) == [DONE]
        assert saved_steps(folder)[0] == 300
        assert same_run(folder, long_run)


@pytest.mark.slow
def test_a_request_that_the_shell_had_ignored_is_heard(toy_recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    words = ["total_steps=100000", "schedule.cooldown_steps=4", "eval.every_steps=0"]
    shell = ("bash", "-c", "trap '' USR1; exec \"$@\"", "bash")
    command = [*shell, *python(toy_recipe, folder, *words)]
    with started(*command, said=tmp_path / "said.txt") as process:
        wait_for(folder, 3)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == STOPPED
    assert saved_steps(folder)[0] == len(losses(folder))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["importing", "training"])
def test_a_second_ctrl_c_ends_a_real_process(toy_recipe: Path, tmp_path: Path, when: str) -> None:
    folder, said = tmp_path / "r", tmp_path / "said.txt"
    words = ["total_steps=1000", "checkpoint.every_steps=1", "eval.every_steps=0"]
    words.append("global_batch_tokens=65536")  # a step of seconds: none ends between the two
    with started(*python(toy_recipe, folder, *words), said=said) as process:
        while not listens(process.pid):
            time.sleep(0.005)
        if when == "training":
            wait_for(folder, 3)
        process.send_signal(signal.SIGINT)
        while "Ctrl-C again ends at once" not in said.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == INTERRUPTED
    assert "Traceback" not in said.read_text()
    assert not (folder / "stopped.json").exists()
    if when == "training":
        trained = len(losses(folder))
        assert saved_steps(folder)[0] in (trained - 1, trained)


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_no_rank_outlives_a_torchrun_that_was_killed_and_the_same_command_resumes(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    words = ["total_steps=600", "checkpoint.every_steps=50", "eval.every_steps=0"]
    folder, said = tmp_path / "r", tmp_path / "said.txt"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = python(toy_recipe, folder, *words, launcher=launcher)
    with started(*command, said=said) as process:
        wait_for(folder, 60)
        ranks = children(process.pid)
        assert len(ranks) == 2
        process.kill()
        process.wait()
    began = time.monotonic()
    while any(map(alive, ranks)):
        assert time.monotonic() - began < 15
        time.sleep(0.1)
    assert "died; asking for a stop" in said.read_text()
    stopped_at = len(losses(folder))
    assert 60 <= stopped_at < 600
    assert saved_steps(folder)[0] >= 50
    # the lock is free, and the steps are the same
    assert run(train_server, toy_recipe, folder, *words) == [DONE, DONE]
    assert run(train_server, toy_recipe, tmp_path / "whole", *words) == [DONE, DONE]
    assert same_run(folder, tmp_path / "whole")
