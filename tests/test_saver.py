"""Saving behind the back of training: what is saved, one at a time, and what a failure does."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openlm_lite import dist, saver
from openlm_lite.checkpoint import CheckpointConfig, CheckpointError, TrainState, load_checkpoint
from openlm_lite.commit import step_folders
from openlm_lite.errors import InputError
from openlm_lite.saver import Saver

WITH: dict[str, Any] = {"documents": {"config.yaml": "seed: 0\n"}, "facts": {}}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init("cpu")
    yield
    dist.close()


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def at(n: int) -> TrainState:
    return TrainState(n, n, n)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves wait for it before they write anything."""
    opened = threading.Event()
    write = saver.write_checkpoint

    def waits(*args: Any, **kwargs: Any) -> str:
        assert opened.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(saver, "write_checkpoint", waits)
    return opened


def test_what_is_saved_is_what_was_there_at_the_start(
    tmp_path: Path, gate: threading.Event
) -> None:
    model, optimizer = build()
    writer = Saver(str(tmp_path), CheckpointConfig())
    then = {k: v.clone() for k, v in model.state_dict().items()}
    moments = optimizer.state[model.weight]["exp_avg"].clone()
    assert writer.start(model, optimizer, at(1), **WITH) == []
    for _ in range(3):
        step(model, optimizer)
    assert writer.finished() == [] and writer.running_seconds() > 0
    gate.set()
    (saved,) = writer.finish()
    assert (saved.state.step, saved.problem) == (1, "")
    assert saved.seconds >= saved.stalled_seconds
    assert writer.finish() == writer.finished() == [] and writer.running_seconds() == 0

    other, its_optimizer = build()
    assert load_checkpoint(saved.path, other, its_optimizer) == at(1)
    assert all(torch.equal(v, then[k]) for k, v in other.state_dict().items())
    assert torch.equal(its_optimizer.state[other.weight]["exp_avg"], moments)
    assert not torch.equal(other.weight, model.weight)


def test_a_save_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    model, optimizer = build()
    writer = Saver(str(tmp_path), CheckpointConfig())
    writer.start(model, optimizer, at(1), **WITH)
    threading.Timer(0.2, gate.set).start()
    (first,) = writer.start(model, optimizer, at(2), **WITH)
    assert first.state == at(1) and os.path.exists(first.path)
    (second,) = writer.finish()
    assert second.state == at(2)
    assert [Path(path).name for path in step_folders(str(tmp_path))] == [
        "step_00000002",
        "step_00000001",
    ]


def test_in_the_foreground_it_is_there_at_once_and_nothing_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Saver, "_copied", None)
    model, optimizer = build()
    writer = Saver(str(tmp_path), CheckpointConfig(background=False))
    writer.start(model, optimizer, at(1), **WITH)
    assert (tmp_path / "step_00000001" / "COMMIT.json").exists()
    assert [saved.state for saved in writer.finished()] == [at(1)]


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def fails(*_: Any, **__: Any) -> str:
        assert error is not None
        raise error

    if error is None:
        monkeypatch.undo()
    else:
        monkeypatch.setattr("openlm_lite.checkpoint.write_synced", fails)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.fault
def test_failed_saves_are_told_and_only_so_many_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build()
    writer = Saver(str(tmp_path), CheckpointConfig(max_failures=3))
    writer.start(model, optimizer, at(1), **WITH)
    writer.finish()
    problems: list[str] = []

    def save(n: int) -> None:
        problems.extend(saved.problem for saved in writer.start(model, optimizer, at(n), **WITH))

    fail_with(monkeypatch, FULL)
    save(2)
    save(3)
    problems += [saved.problem for saved in writer.finish()]
    fail_with(monkeypatch, None)
    save(4)  # a success in between: the count begins anew
    assert len(problems) == 2 and all("No space left" in problem for problem in problems)
    (fine,) = writer.finish()
    assert fine.problem == "" and fine.state == at(4)
    fail_with(monkeypatch, FULL)
    for n in (5, 6, 7):
        save(n)
    with pytest.raises(CheckpointError, match=r"^3 saves in a row .*max_failures = 3.*No space"):
        save(8)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["step_00000001", "step_00000004"]


@pytest.mark.fault
def test_a_save_that_must_succeed_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build()
    writer = Saver(str(tmp_path), CheckpointConfig())
    fail_with(monkeypatch, FULL)
    writer.start(model, optimizer, at(1), **WITH)
    with pytest.raises(CheckpointError, match="No space left"):
        writer.finish(must_succeed=True)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_failure_of_saving_is_raised_where_training_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any, **__: Any) -> str:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(saver, "write_checkpoint", lost)
    model, optimizer = build()
    writer = Saver(str(tmp_path), CheckpointConfig())
    writer.start(model, optimizer, at(1), **WITH)
    with pytest.raises(RuntimeError, match="closed by peer"):
        writer.finish()


def test_wrong_limits_are_refused() -> None:
    with pytest.raises(InputError, match="max_failures = -1: must be at least 0"):
        CheckpointConfig(max_failures=-1)
