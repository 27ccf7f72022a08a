"""Averages of real runs: no trace of kills, ranks and rewinds; losses of the averaged models."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openlm_lite.average.saved import FACTS_KEY
from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.cli import main
from openlm_lite.commit import read_commit, step_folders
from openlm_lite.data.sources import open_sources
from openlm_lite.data.stream import val_batches
from openlm_lite.eval.loss import validation_loss
from openlm_lite.hf.source import open_source, read_model
from openlm_lite.hf.weights import checkpoint_weights
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer
from openlm_lite.run import load_run
from tests.run_faults import fault
from tests.test_train import losses, measured, same_weights
from tests.tiny_run import process_group
from tests.train_server import ROOT, TrainServer

AVERAGES = (
    "averages={fast: {kind: ema, decay: 0.8, warmup_power: 0.6}, "
    "poly: {kind: poly, eta: 2, every_steps: 2}, "
    "lawa: {kind: lawa, snapshots: 3, every_steps: 2, start_step: 2}}"
)
NAMES = ("fast", "poly", "lawa")
KEPT = ["checkpoint.every_steps=1", "checkpoint.keep_last=100"]


def run(server: TrainServer, recipe: Path, folder: Path, *words: str, **more: Any) -> list[int]:
    return server.train(str(recipe), f"run.dir={folder}", *words, **more)["codes"]


@pytest.fixture(scope="module")
def reference(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The uninterrupted run on two ranks, with the weights after every step."""
    folder = tmp_path_factory.mktemp("averages") / "run"
    assert run(train_server, toy_recipe, folder, AVERAGES, *KEPT, world=2) == [0, 0]
    return folder


def average_of(folder: Path, name: str) -> dict[str, Tensor]:
    return dict(checkpoint_weights(resolve_checkpoint(str(folder)), name))


def same_averages(a: Path, b: Path) -> bool:
    facts = [read_commit(resolve_checkpoint(str(f))).facts[FACTS_KEY] for f in (a, b)]
    pairs = [(average_of(a, name), average_of(b, name)) for name in facts[0]]
    return facts[0] == facts[1] and all(
        left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
        for left, right in pairs
    )


def val_losses(folder: Path, name: str = "") -> dict[int, float]:
    key = f"val/toy/{name}/loss" if name else "val/toy/loss"
    return {r["step"]: r[key] for r in measured(folder) if key in r}


def weights_by_step(recipe: Path, folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """After every step; at 0 the initial ones, which no checkpoint has."""
    cfg = load_run(str(recipe))
    model = Transformer(cfg.model.architecture)
    init_weights(model, cfg.run.seed)
    found = {0: {n: p.detach().double().numpy() for n, p in model.named_parameters()}}
    for path in step_folders(str(folder / "checkpoints")):
        tensors = dict(checkpoint_weights(path))
        found[read_commit(path).step] = {n: t.double().numpy() for n, t in tensors.items()}
    return found


def test_the_averages_of_a_run_are_those_of_the_weights_that_it_saved(
    toy_recipe: Path, reference: Path
) -> None:
    weights = weights_by_step(toy_recipe, reference)
    assert set(weights) == set(range(13))
    averages = {name: average_of(reference, name) for name in NAMES}
    for name in weights[0]:
        w = [weights[step][name] for step in range(13)]
        ema, poly = w[0], w[0]
        for step in range(1, 13):
            share = 1 - min(0.8, 1 - (1 + step) ** -0.6)
            ema = ema * (1 - share) + w[step] * share
        for t in range(1, 7):
            poly = poly * (1 - 3 / (2 + t)) + w[2 * t] * 3 / (2 + t)
        lawa = (w[8] + w[10] + w[12]) / 3
        for kind, expected in (("fast", ema), ("poly", poly), ("lawa", lawa)):
            np.testing.assert_allclose(averages[kind][name].numpy(), expected, atol=1e-6)


def test_averages_do_not_change_a_bit_of_the_run(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, reference: Path
) -> None:
    assert run(train_server, toy_recipe, tmp_path / "r", world=2) == [0, 0]
    assert losses(tmp_path / "r") == losses(reference)
    assert val_losses(tmp_path / "r") == val_losses(reference)
    assert same_weights(tmp_path / "r", reference)


@pytest.mark.slow
@pytest.mark.parametrize("tries", [1, 20])
def test_a_kill_at_any_instant_leaves_no_trace_in_the_averages(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, reference: Path, tries: int
) -> None:
    rng = random.Random(tries)
    for i in range(tries):
        folder, kill = tmp_path / str(i), (rng.randrange(2), rng.randint(20, 200))
        codes = run(train_server, toy_recipe, folder, AVERAGES, *KEPT, world=2, kill=kill)
        assert -signal.SIGKILL in codes
        assert run(train_server, toy_recipe, folder, AVERAGES, *KEPT, world=2) == [0, 0]
        assert measured(folder) == measured(reference)
        assert same_weights(folder, reference) and same_averages(folder, reference)


def test_one_process_has_the_averages_of_two_ranks(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, reference: Path
) -> None:
    assert run(train_server, toy_recipe, tmp_path / "r", AVERAGES) == [0]
    for name in NAMES:
        one, two = average_of(tmp_path / "r", name), average_of(reference, name)
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, two[key], rtol=1e-4, atol=1e-6)
        ours, theirs = val_losses(tmp_path / "r", name), val_losses(reference, name)
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 1), (2, 1, 4)])
def test_averages_move_from_two_ranks_to_one_and_to_four(
    train_server: TrainServer,
    toy_recipe: Path,
    tmp_path: Path,
    reference: Path,
    worlds: tuple[int, ...],
) -> None:
    folder, words = tmp_path / "r", [AVERAGES, "micro_batch_size=2"]
    for i, world in enumerate(worlds, 1):
        faults = [] if i == len(worlds) else [fault("SIGTERM", 0, "step", 5)]
        codes = run(train_server, toy_recipe, folder, *words, world=world, faults=faults)
        assert codes == [75 if faults else 0] * world
    for name in NAMES:
        ours, theirs = val_losses(folder, name), val_losses(reference, name)
        assert ours == pytest.approx(theirs, rel=1e-6)
        for key, tensor in average_of(folder, name).items():
            torch.testing.assert_close(
                tensor, average_of(reference, name)[key], rtol=1e-4, atol=1e-6
            )


# --- validation ----------------------------------------------------------------------------------


def loss_of(model: Transformer, recipe: Path) -> float:
    """Of the toy validation set, in this process."""
    cfg = load_run(str(recipe))
    _, sets = open_sources(cfg.data, cfg.model.vocab_size)
    batches = val_batches(
        sets["toy"],
        seq_len=cfg.data.seq_len,
        batch_size=cfg.micro_batch_size,
        max_tokens=cfg.eval.tokens,
        rank=0,
        world_size=1,
        masks=cfg.data,
    )
    with process_group():
        return validation_loss(model, batches, torch.device("cpu"))


def test_averages_are_validated_when_the_run_is_and_from_their_first_update_on(
    reference: Path,
) -> None:
    assert set(val_losses(reference)) == {0, 5, 10, 12}
    assert all(set(val_losses(reference, name)) == {5, 10, 12} for name in NAMES)
    said = (reference / "log.txt").read_text()
    assert all(f"step 10: val/toy/{name}/loss " in said for name in NAMES)


@pytest.mark.parametrize("reshard", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_the_loss_of_an_average_is_that_of_the_model_that_it_is(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, reference: Path, reshard: str
) -> None:
    """Also where FSDP keeps weights gathered from one validation to the next."""
    folder = reference
    if reshard == "false":
        folder = tmp_path / "r"
        words = [AVERAGES, "parallel.reshard_after_forward=false"]
        assert run(train_server, toy_recipe, folder, *words, world=2) == [0, 0]
        assert losses(folder) == losses(reference)
    found = {name: val_losses(folder, name)[12] for name in NAMES}
    assert len({round(loss, 4) for loss in (*found.values(), val_losses(folder)[12])}) == 4
    for name, loss in found.items():
        model = read_model(resolve_checkpoint(str(folder)), name)
        assert loss == pytest.approx(loss_of(model, toy_recipe), rel=1e-6)


@pytest.mark.slow
def test_validation_in_bf16_under_fsdp_sees_the_average_and_leaves_the_run_as_it_is(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    words = ["parallel.precision=bf16", "eval.every_steps=3"]
    assert run(train_server, toy_recipe, tmp_path / "a", *words, AVERAGES) == [0]
    assert run(train_server, toy_recipe, tmp_path / "b", *words) == [0]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert val_losses(tmp_path / "a") == val_losses(tmp_path / "b")
    for name in NAMES:
        model = read_model(resolve_checkpoint(str(tmp_path / "a")), name)
        seen = val_losses(tmp_path / "a", name)[12]
        assert seen == pytest.approx(loss_of(model, toy_recipe), rel=3e-3)
        assert abs(seen - val_losses(tmp_path / "a")[12]) > 6e-3 * seen


@pytest.mark.slow
def test_compiled_blocks_see_the_average(toy_recipe: Path, tmp_path: Path) -> None:
    """In a process of its own: the compiler's workers do not outlive a fork."""
    words = ["run.dir=" + str(tmp_path / "run"), AVERAGES, "parallel.compile=true"]
    done = subprocess.run(
        [sys.executable, "-m", "openlm_lite", "train", str(toy_recipe), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        model = read_model(resolve_checkpoint(str(tmp_path / "run")), name)
        seen = val_losses(tmp_path / "run", name)[12]
        assert seen == pytest.approx(loss_of(model, toy_recipe), rel=1e-5)


def test_an_exported_average_has_the_loss_that_the_run_saw(
    toy_recipe: Path, tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "hf"
    assert main(["export", str(reference), str(out), "--average", "lawa", "--json"]) == 0
    source = open_source(str(out))
    from openlm_lite.hf.source import build_model

    model = build_model(source.cfg, source.weights)
    assert loss_of(model, toy_recipe) == pytest.approx(val_losses(reference, "lawa")[12], rel=1e-6)
    assert "average `lawa` (lawa)" in (out / "README.md").read_text()
    capsys.readouterr()
    assert main(["export", str(out), str(tmp_path / "no"), "--average", "lawa"]) == 2
    assert "holds one set of weights" in capsys.readouterr().err
    assert main(["generate", str(out), "a", "--average", "lawa"]) == 2
    assert "has no average 'lawa'" in capsys.readouterr().err


def test_generate_takes_an_average_and_lists_them_for_a_wrong_name(
    reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(reference), "ab", "--max-new-tokens", "4", "--json"]
    assert main([*words, "--average", "fast"]) == 0
    assert '"text"' in capsys.readouterr().out
    assert main([*words, "--average", "slow"]) == 2
    said = capsys.readouterr().err
    assert "the average 'slow' is not in this checkpoint; it holds fast, poly, lawa" in said


# --- what a run may change -----------------------------------------------------------------------


def test_another_average_is_refused_on_resume_unless_allowed_and_then_begins_there(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    folder, said = tmp_path / "r", tmp_path / "said.txt"
    stop = [fault("SIGTERM", 0, "step", 5)]
    old = "averages.old={kind: poly, eta: 1}"
    assert run(train_server, toy_recipe, folder, old, faults=stop) == [75]
    new = "averages.new={kind: ema, decay: 0.5}"
    assert run(train_server, toy_recipe, folder, new, log=said) == [2]
    text = said.read_text()
    assert "averages.new.kind: absent there, ema now" in text
    assert "averages.old.kind: poly there, absent now" in text
    allowed = [new, *KEPT, "--allow-change", "averages"]
    assert run(train_server, toy_recipe, folder, *allowed) == [0]
    text = (folder / "log.txt").read_text()
    assert "average new: not in the checkpoint: begins with the weights of step 5" in text
    assert "average old: in the checkpoint, but no more in the configuration: given up" in text
    weights = weights_by_step(toy_recipe, folder)
    found = average_of(folder, "new")
    for name, first in weights[5].items():
        expected = first
        for step in range(6, 13):
            expected = (expected + weights[step][name]) / 2
        np.testing.assert_allclose(found[name].numpy(), expected, atol=1e-6)


# --- batches that are left out -------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.slow
def test_a_rewind_takes_the_averages_back_and_skipped_batches_leave_them_alone(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    """Batches 22 to 26 left out by a rewind, or one by one: the same averages."""
    words = ["total_steps=36", "checkpoint.every_steps=10", "guard.on_nonfinite=skip"]
    rewinding = [
        *("guard.spike_sigmas=6", "guard.spike_window=32", "guard.on_spike=rewind"),
        "guard.rewind_skip=3",
    ]
    spikes = [fault("large gradient", 1, "batch", 26), fault("nan gradient", 0, "batch", 22)]
    bad = [fault("nan gradient", 0, "batch", batch) for batch in range(22, 27)]
    ranks: dict[str, Any] = {"world": 2, "patience": 20.0}
    undone, skipped = tmp_path / "undone", tmp_path / "skipped"
    codes = run(
        train_server, toy_recipe, undone, AVERAGES, *words, *rewinding, faults=spikes, **ranks
    )
    assert codes == [0, 0]
    assert run(train_server, toy_recipe, skipped, AVERAGES, *words, faults=bad, **ranks) == [0, 0]
    assert losses(undone) == losses(skipped)
    assert same_weights(undone, skipped) and same_averages(undone, skipped)
