"""Faults that a real run meets: full disks, changed settings, damage, random kills."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from openlm_lite.commit import check_contents, read_commit, step_folders
from tests.test_train import final_weights, losses, measured, same_weights
from tests.train_server import TrainServer

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
