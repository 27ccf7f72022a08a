"""The growing batch: a pure function of the step, and runs that keep to it."""

from __future__ import annotations

import csv
import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite.cli import main
from openlm_lite.config import ConfigError
from openlm_lite.guard import first_sample_of, first_sample_of_last
from openlm_lite.log import read_metrics
from openlm_lite.optim.batch_size import BatchSizes, BatchWarmupConfig
from openlm_lite.run import load_run
from tests.run_faults import fault
from tests.train_server import TrainServer


@st.composite
def batch_sizes(draw: st.DrawFn) -> BatchSizes:
    seq_len, start_rows = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    full = seq_len * start_rows * 2 ** draw(st.integers(1, 6))
    start = seq_len * start_rows
    tokens = full - start + draw(st.integers(0, 20 * full))
    warmup = BatchWarmupConfig(start, tokens)
    assert warmup.problems(full, seq_len) == []
    sizes = BatchSizes.of(full, warmup)
    assert sizes.before(sizes.warmup_steps) <= tokens
    return sizes


@given(sizes=batch_sizes(), steps=st.integers(0, 400))
def test_tokens_add_up_and_sizes_double_up_to_the_full_one(sizes: BatchSizes, steps: int) -> None:
    of_steps = [sizes.at(step) for step in range(steps)]
    assert sizes.before(steps) == sum(of_steps)
    for a, b in pairwise(of_steps):
        assert b in (a, 2 * a)
    assert sizes.at(0) == sizes.start and sizes.at(sizes.warmup_steps) == sizes.full
    assert sizes.at(sizes.warmup_steps - 1) == sizes.full // 2
    flat = [tokens for n, tokens in sizes.stages(steps) for _ in range(n)]
    assert flat == of_steps


@given(sizes=batch_sizes(), tokens=st.integers(0, 10**5))
def test_the_steps_of_a_budget_are_the_most_that_it_pays(sizes: BatchSizes, tokens: int) -> None:
    steps = sizes.steps_for(tokens)
    assert sizes.before(steps) <= tokens < sizes.before(steps + 1)


@given(full=st.integers(1, 10**6), step=st.integers(0, 10**6))
def test_without_a_warmup_all_steps_are_the_same(full: int, step: int) -> None:
    sizes = BatchSizes.of(full, BatchWarmupConfig())
    assert (sizes.at(step), sizes.before(step)) == (full, full * step)
    assert sizes.steps_for(full * step) == step and sizes.warmup_steps == 0


@given(data=st.data(), sizes=batch_sizes(), step=st.integers(0, 120))
def test_the_first_sample_of_a_step_is_where_a_run_that_left_some_out_stands(
    data: st.DataObject, sizes: BatchSizes, step: int
) -> None:
    rows = sizes.start  # as if seq_len were 1
    starts = data.draw(st.lists(st.integers(0, 300), max_size=4))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=4, max_size=4))
    left_out = [(rows * a, rows * (a + n)) for a, n in zip(starts, lengths, strict=False)]
    first = sample = 0
    for done in range(step + 1):  # what the loop does
        first, n = sample, sizes.at(done)
        while any(a < first + n and first < b for a, b in left_out):
            first += n
        sample = first + n
    stages = list(sizes.stages(step + 1))
    assert first_sample_of_last(stages, left_out) == first
    if not left_out:
        assert first == sizes.before(step)


def test_one_stage_is_a_run_of_one_size() -> None:
    assert first_sample_of_last([(8, 4)], [(8, 16)]) == first_sample_of(7, 4, [(8, 16)])


WARMUP = ("batch_warmup={start_tokens: 64, tokens: 600}", "total_tokens=2240", "total_steps=null")
# 64 tokens x 3 steps, 128 x 3, 256 x 6: 2,112 tokens; another step would be more than the 2,240
SIZES = [64] * 3 + [128] * 3 + [256] * 6


def measured(run: Path) -> list[dict[str, Any]]:
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [r for r in measured(run) if "train/loss" in r]


@pytest.fixture(scope="module")
def reference(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("warmup") / "run"
    words = (str(toy_recipe), *WARMUP, f"run.dir={run}")
    assert train_server.train(*words, world=2)["codes"] == [0, 0]
    return run


def test_a_run_takes_the_tokens_that_its_config_announces(
    reference: Path, toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = steps_of(reference)
    totals = [sum(SIZES[: i + 1]) for i in range(len(SIZES))]
    assert [r["tokens"] for r in found] == totals
    table = tmp_path / "schedule.csv"
    words = ["config", str(toy_recipe), *WARMUP, "--json", "--schedule", str(table)]
    assert main(words) == 0
    derived = json.loads(capsys.readouterr().out)
    assert (derived["total_steps"], derived["trained_tokens"]) == (12, totals[-1])
    assert derived["batch_warmup_steps"] == 6
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["tokens"]) for row in rows] == [0, *totals[:-1]]
    # and its rate is that of the step
    assert [float(row["lr"]) for row in rows] == pytest.approx([r["train/lr"] for r in found])


def test_only_how_many_samples_a_step_takes_changes_not_their_order(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, reference: Path
) -> None:
    words = ("global_batch_tokens=64", "micro_batch_size=2", "total_steps=33", "optim.lr=1e-9")
    assert train_server.train(str(toy_recipe), *words, f"run.dir={tmp_path / 'r'}")["codes"] == [0]
    small = [r["data/checksum"] for r in steps_of(tmp_path / "r")]
    together, first = [], 0
    for size in SIZES:
        together.append(sum(small[first : first + size // 64]))
        first += size // 64
    assert [r["data/checksum"] for r in steps_of(reference)] == together


def test_one_rank_has_the_losses_of_two(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, reference: Path
) -> None:
    words = (str(toy_recipe), *WARMUP, f"run.dir={tmp_path / 'r'}", "micro_batch_size=2")
    assert train_server.train(*words)["codes"] == [0]
    for a, b in zip(measured(tmp_path / "r"), measured(reference), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("step", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_or_stopped_anywhere_goes_on_as_if_not(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, reference: Path, step: int
) -> None:
    words = (str(toy_recipe), *WARMUP, f"run.dir={tmp_path / 'r'}")
    stop = [fault("SIGTERM", 1, "step", step)]
    assert train_server.train(*words, world=2, faults=stop)["codes"] == [75, 75]
    kill = [fault("SIGKILL", 0, "step", 2)]
    codes = train_server.train(*words, world=2, faults=kill)["codes"]
    assert codes[0] == -signal.SIGKILL
    assert train_server.train(*words, world=2)["codes"] == [0, 0]
    assert steps_of(tmp_path / "r") == steps_of(reference)


def test_inspect_shows_what_a_step_read_also_after_a_batch_was_left_out(
    train_server: TrainServer,
    toy_recipe: Path,
    tmp_path: Path,
    reference: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "r"
    words = (str(toy_recipe), *WARMUP, f"run.dir={run}", "guard.on_nonfinite=skip")
    bad = [fault("nan gradient", 0, "batch", 0)]
    assert train_server.train(*words, faults=bad)["codes"] == [0]
    for folder in (reference, run):
        for step, record in enumerate(steps_of(folder)):
            assert main(["inspect", str(folder), "--step", str(step), "--json"]) == 0
            found = json.loads(capsys.readouterr().out)
            assert found["data/checksum"] == record["data/checksum"], (folder, step)
            assert len(found["rows"]) == SIZES[step] // 32
    left_out = [r for r in measured(run) if r.get("guard/event") == "left out"]
    assert [(r["guard/first_sample"], r["guard/end_sample"]) for r in left_out] == [(0, 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch_warmup.start_tokens=96"], "start_tokens = 96: must be global_batch_tokens = 256"),
        (["batch_warmup.start_tokens=256"], "in whole rows of data.seq_len = 32: 32, 64, 128"),
        (["batch_warmup.tokens=500"], "batch_warmup.tokens needs batch_warmup.start_tokens"),
        (
            ["batch_warmup={start_tokens: 64, tokens: 100}"],
            "batch_warmup.tokens = 100: one step of each size under the full one takes 192",
        ),
    ],
)
def test_impossible_warmups_are_refused_with_the_recipe(
    toy_recipe: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(str(toy_recipe), words)
    assert message in str(caught.value)


def test_ranks_that_do_not_divide_the_first_batches_are_refused_before_the_run(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    words = (str(toy_recipe), f"run.dir={tmp_path / 'r'}", "micro_batch_size=2")
    warmup = "batch_warmup={start_tokens: 64, tokens: 600}"
    codes = train_server.train(*words, warmup, world=4, log=log)["codes"]
    assert codes == [2] * 4
    assert "batch_warmup: steps of 64 tokens are 2 sequences, which 4 ranks x" in log.read_text()
    assert not (tmp_path / "r").exists()
