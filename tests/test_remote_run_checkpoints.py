"""`openlm train checkpoint.dir=s3://…` as users run it: real ranks, an S3 server that fails."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from openlm_lite import object_store, remote_checkpoints, remote_lock
from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.cli import main
from openlm_lite.data.tokenizer import TOKENIZER_NAMES, load_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.hf.weights import checkpoint_weights
from openlm_lite.inspection import inspect_path
from openlm_lite.recorded import read_run
from openlm_lite.remote_lock import RemoteLock, this_process
from openlm_lite.run_folder import take_lock
from tests import s3_faults
from tests.s3_faults import CUTS, ERRORS, s3_with_faults
from tests.store_faults import RULES, Proxy, Rules, hurry
from tests.test_train import final_weights, losses, measured, same_weights
from tests.train_server import ROOT, TrainServer

pytest.importorskip("moto")
pytest.importorskip("s3fs")
pytestmark = pytest.mark.fault

RUNS = "s3://bucket/runs"
# The fork server of train_server.py, with short waits between attempts and signs of life, and with
# each request to the store as two more events to be killed at.
SERVER = """
import s3fs
from openlm_lite import remote, remote_lock, retries
from tests import train_server

remote_lock.BEAT_SECONDS = 1.0

retries.RETRY = retries.Retry(
    total_seconds=12, first_wait=0.01, longest_wait=0.2, idle_seconds=2, alarm_seconds=1
)

class Events(train_server._Events):
    def instrument(self):
        super().instrument()
        self._around(remote, "perform")
        self._around(remote, "put_file")

train_server._Events = Events
train_server._serve()
"""


class RemoteTrainServer(TrainServer):
    """Ranks whose stores are at the endpoint of this moment's environment."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(s3_faults, "_Proxy", Proxy)
        RULES.clear()
        with s3_with_faults(), RemoteTrainServer() as server:
            yield server


@pytest.fixture
def store(ranks: TrainServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rules]:
    """The store without faults, and empty."""
    RULES.clear()
    hurry(monkeypatch)
    object_store.delete(object_store.files(RUNS))
    yield RULES
    RULES.clear()


@pytest.fixture(scope="module")
def whole(ranks: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with checkpoints in its folder, uninterrupted, on two ranks."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert ranks.train(str(toy_recipe), f"run.dir={run}", world=2)["codes"] == [0, 0]
    return run


def steps_of(url: str) -> list[int]:
    return remote_checkpoints.committed_steps(url)


def weights_at(url: str) -> dict[str, torch.Tensor]:
    return dict(checkpoint_weights(resolve_checkpoint(url)))


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What a verb prints with --json."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def resumed_from(run: Path) -> int:
    return measured(run)[0]["step"] - 1


# --- at a URL ------------------------------------------------------------------------------------


def test_a_run_whose_checkpoints_are_at_a_url_ends_as_one_with_a_local_folder(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path, whole: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, url = tmp_path / "run", f"{RUNS}/plain"
    words = [str(toy_recipe), f"run.dir={run}", f"checkpoint.dir={url}/"]
    assert ranks.train(*words, world=2)["codes"] == [0, 0]
    assert measured(run) == measured(whole) and same_weights(run, whole)
    assert steps_of(url) == [12, 8, 4] and list((run / "checkpoints").iterdir()) == []
    assert f"saved {url}/step_00000012 in " in (run / "log.txt").read_text()

    found = answer(capsys, "inspect", str(run), "--verify")
    there = answer(capsys, "inspect", url)
    assert [c["step"] for c in found["checkpoints"] if c["whole"]] == [12, 8, 4]
    assert found["checkpoints"] == there["checkpoints"]
    assert found["resumes_from"] == there["resumes_from"] == f"{url}/step_00000012"
    one = answer(capsys, "inspect", f"{url}/step_00000008/", "--verify")
    assert (one["step"], one["model"]["d_model"]) == (8, 32)
    with pytest.raises(InputError, match="found none of them; give a dataset"):
        inspect_path(f"{RUNS}/nothing")


@pytest.mark.slow
def test_another_machine_goes_on_from_the_url_and_refuses_another_config(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path, whole: Path
) -> None:
    url, said = f"{RUNS}/moved", tmp_path / "said.txt"
    words = [str(toy_recipe), f"checkpoint.dir={url}"]
    first = [f"run.dir={tmp_path / 'first'}", "checkpoint.every_steps=2"]
    store.on("PUT", "step_00000008/COMMIT", "403", times=s3_faults.ALWAYS)
    codes = ranks.train(*words, *first, "checkpoint.max_failures=1", world=2)["codes"]
    assert 1 in codes
    store.clear()
    shutil.rmtree(tmp_path / "first")
    assert steps_of(url)[0] == 6

    words += [f"run.dir={tmp_path / 'second'}"]
    assert ranks.train(*words, "optim.lr=1e-3", log=said)["codes"] == [2]
    text = said.read_text()
    assert f"{url}/step_00000006: holds a run with another configuration" in text
    assert "optim.lr: 0.005 there, 0.001 now" in text and "set checkpoint.dir to a new" in text
    assert "Traceback" not in text
    assert ranks.train(*words, world=2)["codes"] == [0, 0]
    assert same_weights(tmp_path / "second", whole)
    assert measured(tmp_path / "second") == [r for r in measured(whole) if r["step"] > 6]


@pytest.mark.slow
def test_random_kills_with_and_without_the_run_folder_change_no_weight(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path
) -> None:
    whole, rng, url = tmp_path / "whole", random.Random(3), f"{RUNS}/killed"
    words = [str(toy_recipe), "total_steps=40", "checkpoint.every_steps=3"]
    assert ranks.train(*words, f"run.dir={whole}", world=2)["codes"] == [0, 0]
    words += [f"checkpoint.dir={url}"]
    run = tmp_path / "run"
    for number in range(20):
        if number % 2:  # the next machine: nothing is here but the store
            shutil.rmtree(run, ignore_errors=True)
        kill = (rng.randrange(2), rng.randrange(1, 260))
        codes = ranks.train(*words, f"run.dir={run}", world=2, kill=kill)["codes"]
        assert codes[kill[0]] in (-signal.SIGKILL, 0), codes
    assert ranks.train(*words, f"run.dir={run}", world=2)["codes"] == [0, 0]
    assert same_weights(run, whole)
    tail = measured(run)
    assert tail == measured(whole)[len(measured(whole)) - len(tail) :]
    folders, _ = object_store.folder(url)
    assert len(folders) == len(steps_of(url)) + 1  # and lock/: no leftovers


@pytest.mark.parametrize(
    "method", ["PUT", *(pytest.param(m, marks=pytest.mark.slow) for m in ("GET", "HEAD"))]
)
def test_faults_of_the_store_during_saves_cost_nothing(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path, whole: Path, method: str
) -> None:
    run, url = tmp_path / "run", f"{RUNS}/faults"
    kinds = [*ERRORS, *ERRORS, "503", "503", "hang", "reset"]
    kinds += ["lost"] if method == "PUT" else [c for c in CUTS if method == "GET" and c != "hang"]
    store.on(method, "step_", *kinds, times=len(kinds))
    words = [str(toy_recipe), f"run.dir={run}", f"checkpoint.dir={url}"]
    assert ranks.train(*words, world=2)["codes"] == [0, 0]
    assert store.hits == len(kinds)
    assert measured(run) == measured(whole) and same_weights(run, whole)
    assert steps_of(url) == [12, 8, 4]
    assert "ALARM" not in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("403", "not allowed"), pytest.param("503", "given up after", marks=pytest.mark.slow)],
)
def test_a_store_that_stays_down_or_refuses_costs_that_save_and_no_training(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path, whole: Path,
    kind: str, message: str,
) -> None:  # fmt: skip
    run, url = tmp_path / "run", f"{RUNS}/down"
    store.on("PUT", "step_00000008/__1_0", kind, times=s3_faults.ALWAYS)  # of rank 1
    words = [str(toy_recipe), f"run.dir={run}", f"checkpoint.dir={url}"]
    assert ranks.train(*words, world=2)["codes"] == [0, 0]
    text = (run / "log.txt").read_text()
    assert text.count("ALARM: the checkpoint of step 8 could not be saved: ") == 1
    assert text.count("ALARM") == 1 and message in text and "training goes on" in text
    assert measured(run) == measured(whole) and same_weights(run, whole)
    assert steps_of(url) == [12, 4]


@pytest.mark.slow
def test_the_last_save_must_succeed_and_the_same_command_goes_on(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path, whole: Path
) -> None:
    run, url, said = tmp_path / "run", f"{RUNS}/last", tmp_path / "said.txt"
    store.on("PUT", "step_00000012/COMMIT", "403", times=s3_faults.ALWAYS)
    words = [str(toy_recipe), f"run.dir={run}", f"checkpoint.dir={url}"]
    assert ranks.train(*words, log=said, world=2)["codes"][0] == 1
    assert "openlm: " in said.read_text() and "not allowed" in said.read_text()
    assert "Traceback" not in said.read_text() and steps_of(url) == [8, 4]
    store.clear()
    assert ranks.train(*words, world=2)["codes"] == [0, 0]
    assert same_weights(run, whole) and measured(run) == measured(whole)


def test_a_second_run_at_the_same_url_is_refused(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path
) -> None:
    url, said = f"{RUNS}/shared", tmp_path / "said.txt"
    first = RemoteLock(url, this_process("the first"))
    first.take()
    words = [str(toy_recipe), f"run.dir={tmp_path / 'second'}", f"checkpoint.dir={url}"]
    try:
        assert ranks.train(*words, log=said, world=2)["codes"] == [2, 2]
    finally:
        first.release()
    message = f"openlm: checkpoint.dir: {url} is in use by another run (run the first, pid "
    assert said.read_text().count(message) == 1 and "Traceback" not in said.read_text()
    assert steps_of(url) == []


def test_a_run_whose_place_was_taken_over_ends_at_its_next_step(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As one that was asleep for minutes: to the other run it seemed dead."""
    run, url, said = tmp_path / "run", f"{RUNS}/taken", tmp_path / "said.txt"
    words = [str(toy_recipe), f"run.dir={run}", f"checkpoint.dir={url}", "eval.every_steps=0"]
    words += ["total_steps=5000", "checkpoint.every_steps=5000"]
    monkeypatch.setattr(remote_lock, "STALE_SECONDS", -1.0)
    other = RemoteLock(url, this_process("the other"))
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(ranks.train, *words, log=said, world=2)
        while not ended.done() and not ((run / "metrics.jsonl").is_file() and losses(run)):
            time.sleep(0.05)
        other.take()
        assert ended.result()["codes"] == [1, 1]
    assert 0 < len(losses(run)) < 5000
    text = said.read_text()
    message = f"openlm: checkpoint.dir: {url}: this run no longer holds it (another run has taken "
    assert text.count(message) == 1 and "Traceback" not in text and "ALARM" not in text
    assert f"ended by SharedError: checkpoint.dir: {url}: this run" in (run / "log.txt").read_text()
    assert not (run / "stopped.json").exists()
    other.check()  # nothing was done to what the other run has
    assert sorted(object_store.files(url)) == [f"{url}/lock/0000000{i}.json" for i in (1, 2)]
    other.release()


@pytest.mark.slow
def test_a_newest_checkpoint_damaged_in_the_store_gives_way_to_the_one_before(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path, whole: Path
) -> None:
    run, url = tmp_path / "run", f"{RUNS}/damaged"
    words = [str(toy_recipe), f"checkpoint.dir={url}"]
    assert ranks.train(*words, f"run.dir={tmp_path / 'old'}", world=2)["codes"] == [0, 0]
    place = f"{url}/step_00000012/__1_0.distcp"
    data = bytearray(object_store.read(place) or b"")
    data[len(data) // 2] ^= 1
    object_store.put(place, bytes(data))
    assert ranks.train(*words, f"run.dir={run}", world=2)["codes"] == [0, 0]
    assert same_weights(run, whole) and resumed_from(run) == 8
    assert steps_of(url) == [12, 8, 4]
    assert object_store.read(f"{url}/bad-step_00000012/__1_0.distcp") == bytes(data)


@pytest.mark.slow
def test_generate_and_export_find_the_checkpoints_at_a_url(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path, whole: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, url = tmp_path / "run", f"{RUNS}/verbs"
    words = [str(toy_recipe), f"run.dir={run}", f"checkpoint.dir={url}"]
    assert ranks.train(*words, world=2)["codes"] == [0, 0]
    how = ["abc", "--temperature", "0", "--max-new-tokens", "4"]
    expected = answer(capsys, "generate", str(whole), *how)
    for path in (str(run), url, f"{url}/step_00000012"):
        assert answer(capsys, "generate", path, *how) == expected
    assert main(["export", str(run), str(tmp_path / "hf"), "--bundled"]) == 0
    for path in (url, f"{url}/step_00000012"):  # a copy, or word of what to give
        code = main(["export", path, str(tmp_path / path.rsplit("/", 1)[-1]), "--bundled"])
        assert code == 0 or "models are read from local folders" in capsys.readouterr().err


# --- in another local folder ---------------------------------------------------------------------


@pytest.mark.slow
def test_another_local_folder_holds_the_checkpoints_and_the_verbs_follow(
    ranks: TrainServer, toy_recipe: Path, tmp_path: Path, whole: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, kept = tmp_path / "run", tmp_path / "kept"
    words = [str(toy_recipe), f"checkpoint.dir={kept}", "checkpoint.keep_last=2"]
    words += ["checkpoint.every_steps=3"]
    first = [*words, f"run.dir={tmp_path / 'first'}"]
    events = ranks.train(*words[:1], f"run.dir={tmp_path / 'count'}", world=2)["events"][0]
    assert ranks.train(*first, world=2, kill=(0, events * 3 // 4))["codes"][0] == -signal.SIGKILL
    shutil.rmtree(tmp_path / "first")

    words += [f"run.dir={run}"]
    assert ranks.train(*words, "optim.lr=1e-3")["codes"] == [2]
    assert ranks.train(*words, world=2)["codes"] == [0, 0]
    assert resumed_from(run) > 0 and same_weights(run, whole)
    assert sorted(p.name for p in kept.iterdir()) == ["lock", "step_00000009", "step_00000012"]
    assert not (run / "checkpoints").exists()

    found = answer(capsys, "inspect", str(run), "--verify")
    assert [c["step"] for c in found["checkpoints"]] == [12, 9]
    assert found["resumes_from"] == resolve_checkpoint(str(run)) == str(kept / "step_00000012")
    kept.rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"its config.yaml says checkpoint.dir = .*kept, where no"):
        resolve_checkpoint(str(run))


@pytest.mark.parametrize("place", ["local", pytest.param("url", marks=pytest.mark.slow)])
def test_a_checkpoint_elsewhere_has_its_tokenizer_when_run_folder_and_data_are_gone(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], place: str,
) -> None:  # fmt: skip
    run, out = tmp_path / "run", tmp_path / "hf"
    data = shutil.copytree(toy_recipe.parent / "data" / "train", tmp_path / "data")
    kept = f"{RUNS}/tokenizer" if place == "url" else str(tmp_path / "kept")
    words = [str(toy_recipe), f"run.dir={run}", f"data.train={data}", f"checkpoint.dir={kept}"]
    assert ranks.train(*words, world=2)["codes"] == [0, 0]
    how = ["abc", "--temperature", "0", "--max-new-tokens", "4"]
    expected = answer(capsys, "generate", str(run), *how)
    whole = {name: (data / name).read_bytes() for name in TOKENIZER_NAMES}
    for folder in (run, data):
        shutil.rmtree(folder)
    step = f"{kept}/step_00000012"
    assert answer(capsys, "generate", step, *how) == expected
    assert main(["export", step, str(out)]) == 0
    assert load_tokenizer(str(out)).encode("abc abc").tolist()
    kept_at = Path(resolve_checkpoint(step))
    assert {name: (kept_at / name).read_bytes() for name in TOKENIZER_NAMES} == whole


def test_two_runs_cannot_share_a_local_folder_of_checkpoints(
    ranks: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    kept, said = tmp_path / "a" / "checkpoints", tmp_path / "said.txt"
    kept.mkdir(parents=True)
    words = [str(toy_recipe), f"run.dir={tmp_path / 'b'}", f"checkpoint.dir={kept}"]
    with take_lock(kept, "checkpoint.dir"):
        assert ranks.train(*words, log=said, world=2)["codes"] == [2, 2]
    message = f"openlm: checkpoint.dir: {kept} is in use by another run (pid {os.getpid()} on "
    assert said.read_text().count(message) == 1
    assert sorted(p.name for p in kept.iterdir()) == ["lock"]
    assert ranks.train(*words)["codes"] == [0]
    with take_lock(kept, "checkpoint.dir"):  # a run that was done is not done by this launch
        assert ranks.train(*words)["codes"] == [2]
    found = read_run(tmp_path / "b", all_records=False)
    assert found.state == "failed" and "is in use by another run" in found.why


@pytest.mark.slow
@pytest.mark.parametrize("inner", [".", "checkpoints", "x/y"])
def test_checkpoints_may_lie_anywhere_in_the_run_folder(
    ranks: TrainServer, toy_recipe: Path, tmp_path: Path, whole: Path, inner: str
) -> None:
    run = tmp_path / "run"
    words = [str(toy_recipe), f"run.dir={run}", f"checkpoint.dir={run / inner}"]
    events = ranks.train(str(toy_recipe), f"run.dir={tmp_path / 'count'}")["events"][0]
    ranks.train(*words, kill=(0, events // 2), world=2)
    assert ranks.train(*words, world=2)["codes"] == [0, 0]
    assert losses(run) == losses(whole) and same_weights(run, whole)


def test_a_run_does_not_begin_anew_because_checkpoint_dir_was_changed(
    ranks: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    run, said = tmp_path / "run", tmp_path / "said.txt"
    words = [str(toy_recipe), f"run.dir={run}"]
    assert ranks.train(*words)["codes"] == [0]
    before, there = (run / "metrics.jsonl").read_bytes(), final_weights(run)
    moved = [*words, f"checkpoint.dir={tmp_path / 'moved'}"]
    assert ranks.train(*moved, log=said)["codes"] == [2]
    assert f"no checkpoint is in {tmp_path / 'moved'}, but this run has some" in said.read_text()
    assert (run / "metrics.jsonl").read_bytes() == before
    shutil.copytree(run / "checkpoints", tmp_path / "moved", dirs_exist_ok=True)
    assert ranks.train(*moved)["codes"] == [0]
    assert (run / "metrics.jsonl").read_bytes() == before
    assert all(torch.equal(v, there[k]) for k, v in final_weights(run).items())


# --- a first model -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["local", pytest.param("url", marks=pytest.mark.slow)])
def test_a_run_that_resumes_from_elsewhere_needs_its_first_model_no_more(
    ranks: TrainServer, store: Rules, toy_recipe: Path, tmp_path: Path, whole: Path, place: str
) -> None:
    source = shutil.copytree(whole, tmp_path / "source")
    kept = f"{RUNS}/inherited" if place == "url" else str(tmp_path / "kept")
    words = [str(toy_recipe), f"checkpoint.dir={kept}", f"model.init_from={source}"]
    assert ranks.train(*words, f"run.dir={tmp_path / 'first'}")["codes"] == [0]
    shutil.rmtree(source)
    assert ranks.train(*words, f"run.dir={tmp_path / 'second'}")["codes"] == [0]
    assert same_weights(tmp_path / "first", tmp_path / "second")
