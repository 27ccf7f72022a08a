"""What a run promises: the same losses at every split, and no trace of a kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from openlm_lite import train as train_module
from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.cli import main
from openlm_lite.hf.weights import checkpoint_weights
from openlm_lite.log import read_metrics
from tests.train_server import ROOT, TrainServer

GOLDEN = Path(__file__).parent / "golden" / "toy_losses.txt"


def measured(run: Path) -> list[dict[str, Any]]:
    """The records of a run without what depends on the clock."""
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def losses(run: Path) -> list[float]:
    return [r["train/loss"] for r in measured(run) if "train/loss" in r]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint_weights(resolve_checkpoint(str(run))))


def same_weights(a: Path, b: Path) -> bool:
    left, right = final_weights(a), final_weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def reference(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The uninterrupted run on two ranks."""
    run = tmp_path_factory.mktemp("reference") / "run"
    done = train_server.train(str(toy_recipe), f"run.dir={run}", world=2)
    assert done["codes"] == [0, 0]
    return run


def test_one_process_has_the_losses_of_two_over_50_steps(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    words = [str(toy_recipe), "total_steps=50", "checkpoint.every_steps=50"]
    for world in (1, 2):
        done = train_server.train(*words, f"run.dir={tmp_path / str(world)}", world=world)
        assert set(done["codes"]) == {0}
    one, two = measured(tmp_path / "1"), measured(tmp_path / "2")
    assert len(one) == len(two) > 50
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_accumulation_does_not_change_the_losses(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    for size in (1, 2, 8):
        train_server.train(
            str(toy_recipe), f"micro_batch_size={size}", f"run.dir={tmp_path / str(size)}"
        )
    whole = losses(tmp_path / "8")
    assert len(whole) == 12
    for size in (1, 2):
        assert losses(tmp_path / str(size)) == pytest.approx(whole, rel=1e-6)


def test_activation_checkpointing_does_not_change_a_bit(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, reference: Path
) -> None:
    words = [str(toy_recipe), "parallel.activation_checkpointing=true", f"run.dir={tmp_path / 'r'}"]
    assert train_server.train(*words, world=2)["codes"] == [0, 0]
    assert losses(tmp_path / "r") == losses(reference)
    assert same_weights(tmp_path / "r", reference)


def test_bf16_keeps_fp32_master_weights_and_follows_fp32(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, reference: Path
) -> None:
    words = [str(toy_recipe), "parallel.precision=bf16", f"run.dir={tmp_path / 'r'}"]
    assert train_server.train(*words, world=2)["codes"] == [0, 0]
    assert all(w.dtype == torch.float32 for w in final_weights(tmp_path / "r").values())
    assert losses(tmp_path / "r") == pytest.approx(losses(reference), rel=0.01)


def test_losses_are_the_golden_ones(reference: Path) -> None:
    """A change to the numerics shows here first; regenerate only with a reason in the commit."""
    expected = [float(line) for line in GOLDEN.read_text().split()]
    assert losses(reference) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 0.5


def kill_and_resume(
    server: TrainServer, recipe: Path, run: Path, kill: tuple[int, int], world: int = 2
) -> None:
    words = [str(recipe), f"run.dir={run}"]
    killed = server.train(*words, world=world, kill=kill)
    assert killed["codes"][kill[0]] == -signal.SIGKILL
    assert server.train(*words, world=world)["codes"] == [0] * world


@pytest.fixture(scope="module")
def events(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[int]:
    """How many instants for a kill each of two ranks passes."""
    run = tmp_path_factory.mktemp("count") / "r"
    done = train_server.train(str(toy_recipe), f"run.dir={run}", world=2)
    assert done["codes"] == [0, 0]
    return done["events"]


@pytest.mark.parametrize("tries", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_kill_at_any_instant_leaves_no_trace(
    train_server: TrainServer,
    toy_recipe: Path,
    tmp_path: Path,
    reference: Path,
    events: list[int],
    tries: int,
) -> None:
    rng = random.Random(tries)
    for i in range(tries):
        rank = rng.randrange(2)
        run = tmp_path / str(i)
        kill_and_resume(train_server, toy_recipe, run, (rank, rng.randint(1, events[rank])))
        assert measured(run) == measured(reference)
        assert same_weights(run, reference)


def test_resume_on_fewer_ranks_keeps_the_batches_and_the_losses(
    train_server: TrainServer,
    toy_recipe: Path,
    tmp_path: Path,
    reference: Path,
    events: list[int],
) -> None:
    words = [str(toy_recipe), f"run.dir={tmp_path / 'r'}"]
    train_server.train(*words, world=2, kill=(0, events[0] * 2 // 3))
    assert train_server.train(*words, world=1)["codes"] == [0]
    assert losses(tmp_path / "r") == pytest.approx(losses(reference), rel=1e-6)


def test_a_resumed_run_may_move_its_data_and_change_its_validation(
    train_server: TrainServer,
    toy_recipe: Path,
    tmp_path: Path,
    reference: Path,
    events: list[int],
) -> None:
    run, data = tmp_path / "r", tmp_path / "moved"
    words = [str(toy_recipe), f"run.dir={run}"]
    train_server.train(*words, world=2, kill=(0, events[0] * 2 // 3))
    data.symlink_to(toy_recipe.parent / "data" / "train")
    done = train_server.train(*words, f"data.train={data}", "data.val={}", world=2)
    assert done["codes"] == [0, 0]
    assert losses(run) == losses(reference)


def test_a_finished_run_is_left_as_it_is(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    words = [str(toy_recipe), f"run.dir={run}", "total_steps=5", "schedule.cooldown_steps=1"]
    assert train_server.train(*words)["codes"] == [0]
    before = (run / "metrics.jsonl").read_bytes()
    assert train_server.train(*words)["codes"] == [0]
    assert (run / "metrics.jsonl").read_bytes() == before


def start(recipe: Path, *words: str) -> subprocess.Popen[str]:
    """One real process, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), str(recipe), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(run: Path, steps: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len(losses(run)) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


def test_sigterm_saves_and_exits_75_and_the_same_command_resumes(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    words = ["total_steps=100000", "checkpoint.every_steps=100000", "eval.every_steps=0"]
    process = start(toy_recipe, f"run.dir={run}", *words)
    wait_for(run, 20)
    refused = train_server.train(
        str(toy_recipe), f"run.dir={run}", *words, log=tmp_path / "second.txt"
    )
    assert refused["codes"] == [2]
    assert "is in use by another run (pid" in (tmp_path / "second.txt").read_text()
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=240)
    assert process.returncode == train_module.STOPPED == 75
    stopped_at = len(losses(run))
    assert f"stopped on request after step {stopped_at}" in message
    assert Path(resolve_checkpoint(str(run))).name == f"step_{stopped_at:08}"
    word = json.loads((run / "stopped.json").read_text())
    assert word == {"step": stopped_at, "tokens": 256 * stopped_at}
    again = train_server.train(str(toy_recipe), f"run.dir={run}", *words, kill=(0, 60))
    assert again["codes"] == [-signal.SIGKILL]  # it was under way, and the word was gone
    assert not (run / "stopped.json").exists()
    assert f"resuming {run} after step {stopped_at}" in (run / "log.txt").read_text()


def test_a_non_finite_loss_never_reaches_the_weights(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "r", tmp_path / "log.txt"
    words = [str(toy_recipe), f"run.dir={run}", "optim.lr=1e30", "schedule.warmup_steps=0"]
    codes = train_server.train(*words, "checkpoint.every_steps=1", world=2, log=log)["codes"]
    assert 0 not in codes
    assert "openlm: step " in log.read_text() and "Traceback" not in log.read_text()
    assert "ended by NonFiniteError: step " in (run / "log.txt").read_text()
    assert all(w.isfinite().all() for w in final_weights(run).values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["global_batch_tokens=100"], "global_batch_tokens = 100 is not a multiple of"),
        (["data.seq_len=128"], "data.seq_len = 128 is longer than model.max_seq_len = 64"),
        (["data.seq_len=64", "model.n_heads=3"], "n_heads = 3 is not a multiple of n_kv_heads"),
        (
            ["data.seq_len=48", "global_batch_tokens=192"],
            "data.seq_len: 48 does not divide the 512",
        ),
        (["data.train=nowhere"], "nowhere: no such dataset folder"),
        (["model.vocab_size=200"], "model.vocab_size: 200 is smaller than the 300 ids"),
        (["micro_batch_size=3"], "1 ranks x micro_batch_size = 3 do not divide"),
        (["total_steps=2"], "more than the run's 2 steps"),
        (["total_tokens=5000"], "give total_tokens or total_steps, one of them"),
        (["optim.lr=fast"], "optim.lr: expected a number, got 'fast'"),
        (["nonsense"], "'nonsense' is not of the form name=value"),
        (["data.shuffle_shards=0"], "shuffle_shards = 0, must be at least 1"),
        (["run.device=cuda"], "run.device = cuda, but torch finds no CUDA device here"),
    ],
)
def test_bad_input_is_one_error_and_writes_nothing(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    log = tmp_path / "log.txt"
    done = train_server.train(str(toy_recipe), f"run.dir={tmp_path / 'r'}", *words, log=log)
    assert done["codes"] == [2]
    assert message in log.read_text()
    assert log.read_text().startswith("openlm: ") and "Traceback" not in log.read_text()
    assert not (tmp_path / "r").exists()


def test_a_run_dir_that_cannot_be_made_is_one_error(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    done = train_server.train(str(toy_recipe), "run.dir=/proc/foo/bar", world=2, log=log)
    assert done["codes"] == [2, 2]
    assert log.read_text().startswith("openlm: run.dir: /proc/foo/bar cannot be used")
    assert log.read_text().count("\n") == 1


def test_a_bad_shard_on_one_rank_is_reported_by_that_rank(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy_recipe.parent / "data" / "train", data)
    for shard in data.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[3000] ^= 1
        shard.write_bytes(content)
    log = tmp_path / "log.txt"
    words = [str(toy_recipe), f"run.dir={tmp_path / 'r'}", f"data.train={data}", "data.val={}"]
    codes = train_server.train(*words, world=2, log=log)["codes"]
    assert 2 in codes and 0 not in codes
    assert "shard-00000" in log.read_text() and "crc32" in log.read_text()


def test_the_folder_of_another_run_is_refused_and_untouched(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, reference: Path
) -> None:
    log = tmp_path / "log.txt"
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*")}
    words = [str(toy_recipe), f"run.dir={reference}", "model.n_layers=3", "optim.lr=1e-3"]
    assert train_server.train(*words, world=2, log=log)["codes"] == [2, 2]
    text = log.read_text()
    assert text.count("holds a run with another configuration") == 1
    assert "model.n_layers: 2 there, 3 now" in text and "optim.lr: 0.005 there, 0.001 now" in text
    assert {p: p.stat().st_mtime_ns for p in reference.rglob("*")} == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    done = train_server.train(str(toy_recipe), f"run.dir={foreign}", log=log)
    assert done["codes"] == [2]
    assert "holds other things (thesis.tex) and no run" in log.read_text()
    assert os.listdir(foreign) == ["thesis.tex"]


def test_other_data_under_a_resumed_run_is_refused(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    val = toy_recipe.parent / "data" / "val"
    data.symlink_to(toy_recipe.parent / "data" / "train")
    words = [str(toy_recipe), f"run.dir={tmp_path / 'r'}", f"data.train={data}"]
    assert train_server.train(*words)["codes"] == [0]
    data.unlink()
    data.symlink_to(val)
    log = tmp_path / "log.txt"
    assert train_server.train(*words, log=log)["codes"] == [2]
    assert "its manifest is not the one that this run was trained on" in log.read_text()


def test_a_run_trains_again_from_its_own_resolved_config(
    train_server: TrainServer, tmp_path: Path, reference: Path
) -> None:
    config = reference / "config.yaml"
    done = train_server.train(str(config), f"run.dir={tmp_path / 'r'}", world=2)
    assert done["codes"] == [0, 0]
    assert measured(tmp_path / "r") == measured(reference)


def test_a_kill_before_the_config_is_there_does_not_block_the_folder(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    run.mkdir()
    for name in ("lock", "log.txt", ".config.yaml.1234.tmp"):
        (run / name).write_text("")
    words = ["total_steps=1", "schedule.warmup_steps=0", "schedule.cooldown_steps=1"]
    assert train_server.train(str(toy_recipe), f"run.dir={run}", *words)["codes"] == [0]


def test_inspect_shows_the_run_its_checkpoints_and_what_a_step_reads(
    reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(reference), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == found["total_steps"] == 12
    assert [c["step"] for c in found["checkpoints"]] == [12, 8, 4]
    assert all(c["whole"] for c in found["checkpoints"])
    assert main(["inspect", found["resumes_from"], "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["next_sample"] == 12 * 8
    assert main(["inspect", str(reference), "--step", "11", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["sample"] for row in rows] == list(range(88, 96))
    assert all(row["text"] for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "nowhere"], "nowhere: found nothing; give a dataset"),
        (["export", "nowhere", "out"], "nowhere: found nothing; give a run, a checkpoint"),
        (["generate", "nowhere", "hello"], "nowhere: found nothing; give a run, a checkpoint"),
        (["plot", "nowhere"], "nowhere: no such folder; give the folder of a run"),
        (["prepare", "nowhere", "--out", "x", "--train-tokenizer", "300"], "nowhere"),
    ],
)
def test_a_wrong_path_is_one_error_for_every_verb(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("openlm: ") and message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_plot_draws_a_run(reference: Path, tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    assert main(["plot", str(reference), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
