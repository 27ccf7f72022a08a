"""Bad numbers on one of two real ranks: stopped, left out or undone, whatever kill comes."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.cli import main
from openlm_lite.commit import read_commit
from tests.run_faults import Fault, fault
from tests.test_train import final_weights, losses, measured, same_weights
from tests.train_server import TrainServer

pytestmark = pytest.mark.fault

ROWS = 8  # of a global batch of the toy recipe
SKIP = ["total_steps=24", "guard.on_nonfinite=skip", "guard.max_skips=2"]
BAD = [fault("nan gradient", 1, "batch", 9), fault("nan loss", 0, "batch", 17)]
REWIND = [
    *("total_steps=36", "checkpoint.every_steps=10", "guard.on_nonfinite=skip"),
    *("guard.spike_sigmas=6", "guard.spike_window=32", "guard.on_spike=rewind"),
    "guard.rewind_skip=3",
]
SPIKES = [fault("large gradient", 1, "batch", 26), fault("nan gradient", 0, "batch", 22)]


def run(server: TrainServer, recipe: Path, folder: Path, *words: str, **more: Any) -> list[int]:
    more = {"world": 2, "patience": 20.0, **more}
    return server.train(str(recipe), f"run.dir={folder}", *words, **more)["codes"]


def state_of(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint says of the run, and of what the guard did."""
    state = read_commit(resolve_checkpoint(str(folder))).state
    return {"step": state.step, "next_sample": state.next_sample, **state.guard}


def events(folder: Path) -> list[tuple[int, str, int, int]]:
    """(step, event, first batch, end) of what the guard did."""
    return [
        (
            record["step"],
            record["guard/event"],
            record["guard/first_sample"] // ROWS,
            record["guard/end_sample"] // ROWS,
        )
        for record in measured(folder)
        if "guard/event" in record
    ]


def same_run(a: Path, b: Path) -> bool:
    return same_weights(a, b) and measured(a) == measured(b) and state_of(a) == state_of(b)


def inspected(folder: Path, step: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(folder), "--step", str(step), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("what", ["nan gradient", pytest.param("nan loss", marks=pytest.mark.slow)])
def test_one_bad_rank_stops_the_run_with_one_message_and_finite_weights(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, what: str
) -> None:
    folder, said = tmp_path / "r", tmp_path / "said.txt"
    faults = [fault(what, 1, "batch", 10)]
    assert run(train_server, toy_recipe, folder, faults=faults, log=said) == [1, 1]
    text = said.read_text()
    assert text.count("openlm: ") == 1 and "Traceback" not in text
    (message,) = (line for line in text.splitlines() if line.startswith("openlm: "))
    assert message.startswith("openlm: step 10: loss ") and "samples 80 to 87;" in message
    assert "nan" in message and "guard.on_nonfinite=skip" in message
    assert len(losses(folder)) == 10
    assert state_of(folder) == {"step": 8, "next_sample": 64}
    assert all(w.isfinite().all() for w in final_weights(folder).values())


@pytest.fixture(scope="module")
def skipped(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The uninterrupted run that left out two batches, one for each rank."""
    folder = tmp_path_factory.mktemp("skipped") / "r"
    assert run(train_server, toy_recipe, folder, *SKIP, faults=BAD) == [0, 0]
    return folder


def test_bad_batches_are_left_out_and_on_record(
    skipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert events(skipped) == [(10, "left out", 9, 10), (17, "left out", 17, 18)]
    assert len(losses(skipped)) == 24
    state = state_of(skipped)
    assert (state["step"], state["next_sample"], state["skips"]) == (24, 26 * ROWS, 2)
    assert state["left_out"] == [[72, 80], [136, 144]]
    assert all(w.isfinite().all() for w in final_weights(skipped).values())
    assert "step 9: left out: samples 72 to 79: " in (skipped / "log.txt").read_text()
    checksums = [r["data/checksum"] for r in measured(skipped) if "train/loss" in r]
    for step, batch in ((8, 8), (9, 10), (15, 16), (16, 18), (23, 25)):
        shown = inspected(skipped, step, capsys)
        assert [row["sample"] for row in shown["rows"]] == list(range(batch * 8, batch * 8 + 8))
        assert shown["data/checksum"] == checksums[step]


def test_exactly_max_skips_batches_are_left_out_and_a_larger_limit_goes_on(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, skipped: Path
) -> None:
    folder, said = tmp_path / "r", tmp_path / "said.txt"
    faults = [*BAD, fault("nan gradient", 0, "batch", 22)]
    assert run(train_server, toy_recipe, folder, *SKIP, faults=faults, log=said) == [1, 1]
    text = said.read_text()
    assert text.count("openlm: step 20: loss ") == 1 and "Traceback" not in text
    assert "batches left out before: 2 (guard.max_skips = 2)" in text
    assert losses(folder) == losses(skipped)[:20]
    raised = [*SKIP, "guard.max_skips=3"]
    assert run(train_server, toy_recipe, folder, *raised, faults=faults) == [0, 0]
    assert events(folder) == [*events(skipped), (21, "left out", 22, 23)]
    assert state_of(folder)["next_sample"] == 27 * ROWS


def kill_and_resume(
    server: TrainServer,
    recipe: Path,
    folder: Path,
    words: list[str],
    kill: Any,
    faults: list[Fault],
) -> None:
    """Killed at an event, or by a fault; then launched again, the same batches being bad."""
    codes = run(server, recipe, folder, *words, kill=kill, faults=faults, patience=0.2)
    assert -signal.SIGKILL in codes
    bad = [each for each in faults if each["at"] == "batch"]
    assert run(server, recipe, folder, *words, faults=bad) == [0, 0]


@pytest.mark.slow
def test_a_kill_at_any_instant_changes_nothing_in_a_run_that_leaves_batches_out(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, skipped: Path
) -> None:
    rng = random.Random(20)
    for i in range(20):
        kill = (rng.randrange(2), rng.randint(60, 190))  # of about 220 events
        kill_and_resume(train_server, toy_recipe, tmp_path / str(i), SKIP, kill, BAD)
        assert same_run(tmp_path / str(i), skipped), kill


@pytest.fixture(scope="module")
def rewound(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The uninterrupted run that left out a batch, and then went back from a spike."""
    folder = tmp_path_factory.mktemp("rewound") / "r"
    assert run(train_server, toy_recipe, folder, *REWIND, faults=SPIKES) == [0, 0]
    return folder


def test_a_spike_is_undone_and_what_led_to_it_is_left_out(
    rewound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoint after step 20; batch 22 left out; spike in batch 26, with three before it."""
    assert events(rewound) == [(21, "left out", 22, 23), (21, "rewind", 23, 27)]
    state = state_of(rewound)
    assert (state["step"], state["next_sample"]) == (36, 41 * ROWS)
    assert (state["skips"], state["rewinds"]) == (1, 1)
    assert state["left_out"] == [[22 * ROWS, 27 * ROWS]]
    steps = [r["step"] for r in measured(rewound) if "train/loss" in r]
    assert steps == list(range(1, 37))
    checksums = [r["data/checksum"] for r in measured(rewound) if "train/loss" in r]
    for step, batch in ((21, 21), (22, 27), (35, 40)):
        shown = inspected(rewound, step, capsys)
        assert shown["rows"][0]["sample"] == batch * ROWS
        assert shown["data/checksum"] == checksums[step]


@pytest.mark.slow
def test_what_is_trained_again_after_a_rewind_is_what_it_was(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, rewound: Path
) -> None:
    """The batches 20 and 21 are trained on twice, before and after the load."""
    clean = tmp_path / "clean"
    assert run(train_server, toy_recipe, clean, "total_steps=36") == [0, 0]
    assert losses(rewound)[:22] == losses(clean)[:22]
    assert losses(rewound)[22] != losses(clean)[22]


KILLS = {
    "before the load": fault("SIGKILL", 1, "load"),
    "after the load": fault("SIGKILL", 0, "after load"),
    "in the first step again": fault("SIGKILL", 1, "step", 28),
    "in the update after what is left out": fault("SIGKILL", 0, "update", 28),
}


@pytest.mark.parametrize(
    "when",
    [
        pytest.param(when, marks=[] if when == "after the load" else pytest.mark.slow)
        for when in KILLS
    ],
)
def test_a_kill_in_the_middle_of_a_rewind_changes_nothing(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, rewound: Path, when: str
) -> None:
    faults = [*SPIKES, KILLS[when]]
    kill_and_resume(train_server, toy_recipe, tmp_path / "r", REWIND, None, faults)
    assert same_run(tmp_path / "r", rewound)


@pytest.mark.slow
def test_a_kill_at_any_instant_changes_nothing_in_a_run_that_rewinds(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, rewound: Path
) -> None:
    rng = random.Random(5)
    for i in range(20):
        kill = (rng.randrange(2), rng.randint(20, 290))  # of about 330 events
        kill_and_resume(train_server, toy_recipe, tmp_path / str(i), REWIND, kill, SPIKES)
        assert same_run(tmp_path / str(i), rewound), kill


@pytest.mark.slow
def test_two_rewinds_in_a_row_end_the_run_where_only_one_is_allowed(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    """The second spike follows the first before there is a checkpoint between them."""
    folder, said = tmp_path / "r", tmp_path / "said.txt"
    faults = [fault("large gradient", 1, "batch", batch) for batch in (25, 31)]
    one = [*REWIND, "guard.max_rewinds=1", "guard.rewind_skip=0"]
    assert run(train_server, toy_recipe, folder, *one, faults=faults, log=said) == [1, 1]
    text = said.read_text()
    assert "rewinds before: 1" in text and "samples 248 to 255;" in text
    assert text.count("openlm: step 30: ") == 1 and "Traceback" not in text
    two = [*one, "guard.max_rewinds=2"]
    assert run(train_server, toy_recipe, folder, *two, faults=faults) == [0, 0]
    state = state_of(folder)
    assert (state["next_sample"], state["rewinds"]) == (38 * ROWS, 2)
    assert state["left_out"] == [[200, 208], [248, 256]]


def test_a_spike_before_the_first_periodic_checkpoint_goes_back_to_the_start(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    words = [*REWIND, "total_steps=24", "checkpoint.every_steps=1000"]
    faults = [fault("large gradient", 0, "batch", 20)]
    assert run(train_server, toy_recipe, tmp_path / "r", *words, world=1, faults=faults) == [0]
    assert events(tmp_path / "r") == [(1, "rewind", 17, 21)]
    assert state_of(tmp_path / "r")["next_sample"] == 28 * ROWS
