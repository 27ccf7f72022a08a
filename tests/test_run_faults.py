"""Faults that a real run meets: full disks, changed settings, damage, random kills."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from openlm_lite.checkpoint import latest_checkpoint
from openlm_lite.commit import check_contents, read_commit, step_folders
from openlm_lite.data.dataset import BadShardError, open_dataset
from openlm_lite.data.verify import verify_dataset
from openlm_lite.run_folder import take_lock
from openlm_lite.stop import INTERRUPTED
from openlm_lite.train import DONE, STOPPED
from tests.run_faults import fault
from tests.test_run_watchdog import python, started
from tests.test_train import final_weights, losses, measured, same_weights
from tests.train_server import TrainServer, free_port, listens

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def whole(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The uninterrupted run on one rank."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train_server.train(str(toy_recipe), f"run.dir={run}")["codes"] == [0]
    return run


def steps_in(run: Path) -> list[int]:
    """The steps of the checkpoints there, every one verified to the last byte."""
    commits = [read_commit(path) for path in step_folders(str(run / "checkpoints"))]
    for commit in commits:
        check_contents(commit)
    return [commit.step for commit in commits]


def test_a_full_disk_costs_saves_then_the_run_but_no_checkpoint(
    train_server: TrainServer, toy_recipe: Path, small_disk: Path, tmp_path: Path, whole: Path
) -> None:
    """720 KiB hold one checkpoint or two of the toy model, and no other beside them."""
    run = small_disk / "run"
    words = [str(toy_recipe), f"run.dir={run}", "checkpoint.every_steps=1"]
    subprocess.run(["mount", "-o", "remount,size=720k", str(small_disk)], check=True)
    said = tmp_path / "said.txt"
    assert train_server.train(*words, log=said)["codes"] == [1]
    text = said.read_text()
    assert text.count("ALARM: the checkpoint of step ") in (2, 3)  # the third ends the run
    assert "Traceback" not in text
    assert "openlm: 3 saves in a row have failed (checkpoint.max_failures = 3)" in text
    kept = steps_in(run)
    assert kept and not list((run / "checkpoints").glob(".tmp-*"))
    assert len(losses(run)) >= kept[0] + 3  # training went on without them

    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert train_server.train(*words)["codes"] == [0]
    assert same_weights(run, whole) and losses(run) == losses(whole)


@pytest.mark.slow
def test_a_full_disk_under_the_run_folder_costs_records_and_not_the_run(
    train_server: TrainServer, toy_recipe: Path, small_disk: Path, tmp_path: Path
) -> None:
    """The checkpoints lie elsewhere; the folder is full after some hundred steps."""
    run, full, said = small_disk / "run", small_disk / "full", tmp_path / "said.txt"
    words = [str(toy_recipe), "total_steps=200", "checkpoint.every_steps=50", "eval.every_steps=0"]
    subprocess.run(["mount", "-o", "remount,size=64k", str(small_disk)], check=True)
    stop = [fault("SIGTERM", 0, "step", 180)]
    elsewhere = f"checkpoint.dir={tmp_path / 'stopped'}"
    done = train_server.train(*words, f"run.dir={run}", elsewhere, faults=stop, log=said)
    assert done["codes"] == [STOPPED]
    text = said.read_text()
    assert text.count("metrics.jsonl: not written: [Errno 28] No space left on device") == 1
    assert "stopped on request after step 180" in text and "Traceback" not in text
    assert 50 < len(losses(run)) < 180

    subprocess.run(["mount", "-o", "remount,size=96k", str(small_disk)], check=True)
    records = (run / "metrics.jsonl").read_bytes()
    done = train_server.train(*words, f"run.dir={run}", elsewhere, log=said)
    assert done["codes"] == [2]  # no room for what a resume writes anew
    assert "metrics.jsonl: cannot be written (No space left on device); mend" in said.read_text()
    assert (run / "metrics.jsonl").read_bytes() == records

    subprocess.run(["mount", "-o", "remount,size=160k", str(small_disk)], check=True)
    done = train_server.train(*words, f"run.dir={run}", elsewhere, log=said)
    assert done["codes"] == [DONE]
    other = f"checkpoint.dir={tmp_path / 'whole'}"
    done = train_server.train(*words, f"run.dir={full}", other, log=said)
    assert done["codes"] == [DONE] and len(losses(full)) < 200
    assert "Traceback" not in said.read_text()
    assert same_weights(run, full)


def checksums(run: Path) -> list[int]:
    """Of the rows of each step."""
    return [r["data/checksum"] for r in measured(run) if "data/checksum" in r]


def kill_often(
    server: TrainServer, words: list[str], kills: int, worlds: tuple[int, ...], seed: int
) -> int:
    """Launch the run again and again, a random rank killed at a random event; then let it end.

    Returns how many launches were killed.
    """
    rng = random.Random(seed)
    killed = 0
    while killed < kills:
        world = rng.choice(worlds)
        kill = (rng.randrange(world), rng.randrange(1, 60))
        codes = server.train(*words, world=world, kill=kill)["codes"]
        if codes == [0] * world:
            return killed
        assert codes[kill[0]] == -signal.SIGKILL, codes
        killed += 1
    assert server.train(*words, world=worlds[0])["codes"] == [0] * worlds[0]
    return killed


LONGER = ["total_steps=160", "checkpoint.every_steps=1", "eval.every_steps=0", "optim.lr=1e-3"]


@pytest.mark.parametrize(
    ("steps", "kills"),
    [(16, 3), pytest.param(160, 100, marks=pytest.mark.slow)],
)
def test_random_kills_at_random_world_sizes_change_no_batch_and_hardly_the_loss(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, steps: int, kills: int
) -> None:
    words = [str(toy_recipe), *LONGER, f"total_steps={steps}", "micro_batch_size=2"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_server.train(*words, f"run.dir={whole}")["codes"] == [0]
    killed = kill_often(train_server, [*words, f"run.dir={run}"], kills, (1, 2, 4), seed=5)
    assert killed == kills
    assert checksums(run) == checksums(whole)
    assert losses(run)[-1] == pytest.approx(losses(whole)[-1], rel=1e-6)
    steps_in(run)


@pytest.mark.slow
def test_random_kills_at_one_world_size_change_no_bit(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    words = [str(toy_recipe), *LONGER, "total_steps=60"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_server.train(*words, f"run.dir={whole}", world=2)["codes"] == [0, 0]
    assert kill_often(train_server, [*words, f"run.dir={run}"], 30, (2,), seed=6) == 30
    assert measured(run) == measured(whole) and same_weights(run, whole)


# --- requests to stop -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One request to stop: the same signal twice, `apart` seconds in between."""

    name: str
    after: float  # s since all ranks listen
    apart: float  # s; a second Ctrl-C in less than half a second is no other
    ranks: tuple[int, ...]

    @property
    def signals(self) -> list[tuple[float, int, str]]:
        moments = (self.after, self.after + self.apart)
        return [(moment, rank, self.name) for moment in moments for rank in self.ranks]


def some_request(rng: random.Random, name: str, seconds: float) -> Asked:
    """At any instant of a run of two ranks that lasts `seconds`, to one of them or to both."""
    ranks = rng.choice([(0,), (1,), (0, 1)])
    return Asked(name, rng.uniform(0, seconds), rng.choice([0.0, 0.01, 0.1]), ranks)


def ends_as_documented(asked: Asked, codes: list[int], run: Path, said: Path) -> None:
    text = said.read_text()
    if INTERRUPTED in codes:  # a machine so slow that the two Ctrl-C were heard half a second apart
        assert asked.name == "SIGINT" and set(codes) <= {INTERRUPTED, 1, -signal.SIGKILL}, text
        return
    assert codes in ([STOPPED] * 2, [DONE] * 2), (asked, codes, text)
    assert "Traceback" not in text
    assert (run / "stopped.json").exists() == (codes[0] == STOPPED)
    nothing_is_left_behind(run)


def nothing_is_left_behind(run: Path) -> None:
    """No temporary file or folder, and the lock is free."""
    assert not [path for path in run.rglob("*") if "tmp" in path.name]
    take_lock(run, "run.dir").close()


@dataclass(frozen=True)
class Uninterrupted:
    folder: Path
    seconds: float  # since all ranks listen


@pytest.fixture(scope="module")
def whole_of_two(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Uninterrupted:
    folder = tmp_path_factory.mktemp("whole_of_two")
    seconds = 0.0
    for name in ("first", "run"):  # the first one also waits until the server has imported
        began = time.monotonic()
        words = [str(toy_recipe), f"run.dir={folder / name}"]
        assert train_server.train(*words, world=2)["codes"] == [DONE, DONE]
        seconds = time.monotonic() - began
    return Uninterrupted(folder / "run", seconds)


def resumes_to_the_same_end(
    server: TrainServer, recipe: Path, run: Path, whole: Uninterrupted
) -> None:
    assert server.train(str(recipe), f"run.dir={run}", world=2)["codes"] == [DONE, DONE]
    assert checksums(run) == checksums(whole.folder)
    assert losses(run)[-1] == pytest.approx(losses(whole.folder)[-1], rel=1e-6)
    assert measured(run) == measured(whole.folder) and same_weights(run, whole.folder)
    assert steps_in(run)[0] == 12
    nothing_is_left_behind(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGINT", "SIGTERM"])
def test_requests_at_20_random_instants_of_two_ranks_change_no_bit(
    train_server: TrainServer,
    toy_recipe: Path,
    tmp_path: Path,
    whole_of_two: Uninterrupted,
    name: str,
) -> None:
    """From the first line of the program to its end; imports are behind these ranks."""
    rng, stopped = random.Random(name), 0
    for number in range(20):
        run, said = tmp_path / str(number), tmp_path / f"said{number}.txt"
        asked = some_request(rng, name, whole_of_two.seconds)
        done = train_server.train(
            str(toy_recipe), f"run.dir={run}", world=2, signals=asked.signals, log=said,
            patience=20.0,
        )  # fmt: skip
        ends_as_documented(asked, done["codes"], run, said)
        stopped += (run / "stopped.json").exists()
        resumes_to_the_same_end(train_server, toy_recipe, run, whole_of_two)
    assert stopped > 0


def launch_two(recipe: Path, run: Path, said: Path, asked: Asked | None) -> list[int]:
    """Exit codes of two real processes, asked to stop at that time, imports and all."""
    port = free_port()
    with ExitStack() as stack:
        processes = []
        for rank in (0, 1):
            place = f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2 MASTER_ADDR=127.0.0.1"
            command = ["env", *place.split(), f"MASTER_PORT={port}", *python(recipe, run)]
            processes.append(stack.enter_context(started(*command, said=said)))
        while asked and not all(listens(process.pid) for process in processes):
            assert all(process.poll() is None for process in processes), said.read_text()
            time.sleep(0.005)
        began = time.monotonic()
        for moment, rank, name in sorted(asked.signals) if asked else ():
            time.sleep(max(0.0, began + moment - time.monotonic()))
            processes[rank].send_signal(signal.Signals[name])
        return wait_for_both(processes)


def wait_for_both(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes; where one fails, the other one has a minute, and is killed as by a launcher."""
    ends = time.monotonic() + 400
    while any(process.poll() is None for process in processes):
        if any(process.poll() not in (None, DONE, STOPPED) for process in processes):
            ends = min(ends, time.monotonic() + 60)
        if time.monotonic() > ends:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return [process.returncode for process in processes]


@pytest.fixture(scope="module")
def seconds_of_two(toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """From the start of two real processes to their end."""
    folder = tmp_path_factory.mktemp("timed")
    began = time.monotonic()
    assert launch_two(toy_recipe, folder / "run", folder / "said.txt", None) == [DONE, DONE]
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGINT", "SIGTERM"])
def test_requests_at_random_instants_of_two_real_processes_change_no_bit(
    train_server: TrainServer,
    toy_recipe: Path,
    tmp_path: Path,
    whole_of_two: Uninterrupted,
    seconds_of_two: float,
    name: str,
) -> None:
    """Most of such a short run's time are imports; two of the instants are in its end."""
    rng = random.Random(name)
    for number in range(6):
        run, said = tmp_path / str(number), tmp_path / f"said{number}.txt"
        asked = some_request(rng, name, seconds_of_two)
        if number >= 4:
            asked = replace(asked, after=rng.uniform(0.8, 1.0) * seconds_of_two)
        ends_as_documented(asked, launch_two(toy_recipe, run, said, asked), run, said)
        resumes_to_the_same_end(train_server, toy_recipe, run, whole_of_two)


# --- other settings and other data ----------------------------------------------------------------


def test_a_changed_setting_is_refused_unless_it_is_allowed_by_name(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    run, said = tmp_path / "run", tmp_path / "said.txt"
    words = [str(toy_recipe), f"run.dir={run}"]
    events = train_server.train(*words, f"run.dir={tmp_path / 'count'}")["events"][0]
    train_server.train(*words, kill=(0, events // 2))
    before = losses(run)
    words += ["optim.lr=1e-3", "schedule.end_lr=2e-4"]
    assert train_server.train(*words, log=said)["codes"] == [2]
    flags = ["--allow-change", "optim.lr", "--allow-change", "schedule.end_lr"]
    assert " ".join(flags) in said.read_text()
    assert train_server.train(*words, *flags[:2], log=said)["codes"] == [2]
    wrong = ["--allow-change", "optim.learning_rate"]
    assert train_server.train(*words, *wrong, log=said)["codes"] == [2]
    assert "--allow-change optim.learning_rate: no such key" in said.read_text()
    assert losses(run) == before

    assert train_server.train(*words, "--allow-change", "optim", *flags[2:])["codes"] == [0]
    assert len(losses(run)) == 12
    told = (run / "log.txt").read_text()
    assert "changed on resume: optim.lr: 0.005 there, 0.001 now" in told
    rates = [r["train/lr"] for r in measured(run) if "train/lr" in r]
    assert rates[3] > 4e-3 and rates[-1] <= 1e-3
    assert train_server.train(*words)["codes"] == [0]  # it is this run's configuration now


def test_other_data_is_read_on_where_that_is_allowed_by_name(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.symlink_to(toy_recipe.parent / "data" / "train")
    words = [str(toy_recipe), f"run.dir={run}", f"data.train={data}"]
    events = train_server.train(*words, f"run.dir={tmp_path / 'count'}")["events"][0]
    train_server.train(*words, kill=(0, events // 2))
    data.unlink()
    data.symlink_to(toy_recipe.parent / "data" / "val")
    assert train_server.train(*words)["codes"] == [2]
    assert train_server.train(*words, "--allow-change", "data.train")["codes"] == [0]
    assert "its manifest is not the one that this run" in (run / "log.txt").read_text()
    assert all(w.isfinite().all() for w in final_weights(run).values())
    assert train_server.train(*words)["codes"] == [0]


def change_a_byte(path: Path, rng: random.Random) -> bytes:
    """Change one random byte of the file; returns what it held before."""
    before = path.read_bytes()
    content = bytearray(before)
    content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    path.write_bytes(content)
    return before


def test_300_random_changes_of_a_byte_are_found_and_the_checkpoint_before_is_used(
    whole: Path, tmp_path: Path
) -> None:
    root, rng = tmp_path / "checkpoints", random.Random(0)
    shutil.copytree(whole / "checkpoints", root)
    newest, before = root / "step_00000012", root / "step_00000008"
    files = sorted(newest.iterdir())
    for _ in range(300):
        path = rng.choice(files)
        content = change_a_byte(path, rng)
        found = latest_checkpoint(str(root))
        assert found is not None and Path(found.path) == before, path.name
        (root / "bad-step_00000012").rename(newest)
        path.write_bytes(content)
    found = latest_checkpoint(str(root))
    assert found is not None and Path(found.path) == newest  # whole again: nothing was lost


def test_300_random_changes_of_a_byte_of_a_shard_are_found(
    toy_recipe: Path, tmp_path: Path
) -> None:
    folder, rng = tmp_path / "data", random.Random(1)
    shutil.copytree(toy_recipe.parent / "data" / "train", folder)
    shards = sorted(folder.glob("*.tar"))
    for _ in range(300):
        number = rng.randrange(len(shards))
        content = change_a_byte(shards[number], rng)
        with pytest.raises(BadShardError, match=shards[number].name):
            open_dataset(str(folder)).blocks(number)
        shards[number].write_bytes(content)
    verify_dataset(str(folder))


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group whose processes the kernel kills beyond 1.2 GB together."""
    root = Path("/sys/fs/cgroup")
    parent = root / "memory" if (root / "memory").is_dir() else root
    limit = "memory.limit_in_bytes" if parent != root else "memory.max"
    folder = parent / f"openlm-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(1_200_000_000))
        with suppress(OSError):  # absent where the kernel does not count swap
            (folder / limit.replace("memory.", "memory.memsw.")).write_text(str(1_200_000_000))
    except OSError as e:
        with suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no control group for memory can be made here ({e.strerror})")
    yield folder
    folder.rmdir()


@pytest.mark.slow
def test_a_run_that_the_kernel_kills_for_its_memory_goes_on_with_smaller_micro_batches(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, little_memory: Path
) -> None:
    words = [str(toy_recipe), "global_batch_tokens=262144", "total_steps=3", "eval.tokens=1024"]
    words += ["checkpoint.every_steps=1", "schedule.warmup_steps=0", "schedule.cooldown_steps=1"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    fits = "micro_batch_size=512"
    assert train_server.train(*words, fits, f"run.dir={whole}")["codes"] == [0]
    events = train_server.train(*words, fits, f"run.dir={tmp_path / 'count'}")["events"][0]
    train_server.train(*words, fits, f"run.dir={run}", kill=(0, events // 2))
    before = steps_in(run)
    assert before
    script = f"""
import os, sys
open({str(little_memory / "cgroup.procs")!r}, "w").write(str(os.getpid()))
from openlm_lite.cli import main
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "train", *words, "micro_batch_size=8192", f"run.dir={run}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL
    assert steps_in(run) == before
    assert train_server.train(*words, fits, f"run.dir={run}")["codes"] == [0]
    assert losses(run) == losses(whole) and same_weights(run, whole)
