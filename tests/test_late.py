"""A step whose numbers are read after the next one has begun: the same run, the same promises."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openlm_lite import dist, train
from openlm_lite.checkpoint import latest_checkpoint
from openlm_lite.guard import GuardConfig, NonFiniteError
from openlm_lite.optim.brake import Brake
from openlm_lite.optim.build import OptimConfig, build_optimizer
from openlm_lite.readback import Readback, to_device
from openlm_lite.run import load_run
from openlm_lite.saver import Saver
from tests.run_faults import BATCH_FAULTS
from tests.test_train import final_weights, losses, same_weights


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(train, "reads_late", lambda device: True)


class Device:
    """One that takes 10 s for a step, which the host hands over in 1 s; with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        """Under the steps of `module`, train or bench."""
        self.now = self.done_at = 0.0
        device, forward_backward = self, module.forward_backward

        def hand_over(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.done_at = max(self.now, self.done_at) + 10
            self.now += 1
            return forward_backward(*args, **kwargs)

        class Awaited(Readback):
            def __init__(self, values_N: torch.Tensor) -> None:
                super().__init__(values_N)
                self.there_at = device.done_at

            def numbers(self) -> list[float]:
                device.wait(self.there_at)
                return super().numbers()

        monkeypatch.setattr(module, "forward_backward", hand_over)
        monkeypatch.setattr(module, "Readback", Awaited)

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)


def run(recipe: Path, folder: Path, *words: str) -> int:
    try:
        return train.train(load_run(str(recipe), [f"run.dir={folder}", *words]))
    finally:
        dist.close()


def test_late_numbers_change_no_loss_no_record_and_no_weight(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("guard.spike_sigmas=6", "guard.spike_window=32", "eval.every_steps=3")
    assert run(toy_recipe, tmp_path / "now", *words) == train.DONE
    monkeypatch.setattr(train, "reads_late", lambda device: True)
    assert run(toy_recipe, tmp_path / "late", *words) == train.DONE
    assert same_weights(tmp_path / "now", tmp_path / "late")
    assert losses(tmp_path / "now") == losses(tmp_path / "late")
    records = [
        [
            {k: v for k, v in record.items() if not k.startswith("perf/")}
            for record in train.log.read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("now", "late")
    ]
    assert records[0] == records[1]


def test_a_step_takes_from_numbers_to_numbers_without_validations_and_saves(
    late: None, toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, train)

    def slow(*args: Any) -> float:
        device.now += 1000
        return 5.0

    def slow_start(saver: Saver, *args: Any, **kwargs: Any) -> Any:
        slow()
        return start(saver, *args, **kwargs)

    start = Saver.start
    monkeypatch.setattr(train, "monotonic", lambda: device.now)
    monkeypatch.setattr(train, "validation_loss", slow)
    monkeypatch.setattr(Saver, "start", slow_start)
    assert run(toy_recipe, tmp_path / "r", "eval.every_steps=3") == train.DONE
    records = train.log.read_metrics(tmp_path / "r" / "metrics.jsonl")
    rates = [r["perf/tokens_per_second"] for r in records if "train/loss" in r]
    assert rates == [256 / 10] * 12


def test_a_stop_that_is_heard_of_at_a_save_costs_no_further_step(
    late: None, toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = train.forward_backward

    def asked(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:  # the checkpoint of step 4 comes next
            kwargs["stop_requested"] = lambda: True
        return inner(*args, **kwargs)

    calls: list[int] = []
    monkeypatch.setattr(train, "forward_backward", asked)
    assert run(toy_recipe, tmp_path / "r", "checkpoint.every_steps=4") == train.STOPPED
    stopped = json.loads((tmp_path / "r" / "stopped.json").read_text())
    assert stopped["step"] == len(calls) == 4


@pytest.mark.parametrize(
    "fault", ["nan gradient", pytest.param("nan loss", marks=pytest.mark.slow)]
)
def test_a_non_finite_step_that_is_heard_of_late_has_not_touched_weights_or_checkpoints(
    fault: str, late: None, toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[train.Loop] = []
    inner_step, step = train.Loop.step, 6

    def remembered(loop: train.Loop) -> None:
        held[:] = [loop]
        if loop.state.step == step:
            held_before.update({n: p.detach().clone() for n, p in loop.model.named_parameters()})
        inner_step(loop)

    held_before: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(train.Loop, "step", remembered)
    monkeypatch.setattr(
        train, "forward_backward", BATCH_FAULTS[fault](step)(train.forward_backward)
    )
    with pytest.raises(NonFiniteError, match=f"step {step}"):
        run(toy_recipe, tmp_path / "r", "checkpoint.every_steps=1")
    loop = held[0]
    assert loop.state.step >= step  # it had gone on
    for name, p in loop.model.named_parameters():
        assert torch.equal(p, held_before[name]), name
    assert all(
        int(state["step"]) == step
        for optimizer in loop.optimizer
        for state in optimizer.state.values()
    )
    commit = latest_checkpoint(loop.place)
    assert commit is not None and commit.step == step
    assert all(w.isfinite().all() for w in final_weights(tmp_path / "r").values())
    monkeypatch.undo()
    again = load_run(str(toy_recipe), [f"run.dir={tmp_path / 'r'}", "checkpoint.every_steps=1"])
    assert train.train(again) == train.DONE  # without the fault: as if nothing had been
    dist.close()
    assert run(toy_recipe, tmp_path / "whole") == train.DONE
    assert same_weights(tmp_path / "r", tmp_path / "whole")


def test_only_a_guard_that_leaves_nothing_out_is_heard_late() -> None:
    assert GuardConfig().may_judge_late
    assert GuardConfig(spike_sigmas=6).may_judge_late
    assert not GuardConfig(on_nonfinite="skip").may_judge_late
    assert not GuardConfig(spike_sigmas=6, on_spike="skip").may_judge_late
    assert not GuardConfig(spike_sigmas=6, on_spike="rewind").may_judge_late


def sharded_by_one_rank() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init("cpu")
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


@pytest.mark.parametrize("sharded", [False, True])
def test_the_brake_holds_weights_moments_and_counts_from_the_first_bad_number_on(
    sharded: bool,
) -> None:
    torch.manual_seed(0)
    model = sharded_by_one_rank() if sharded else nn.Linear(4, 4)
    optimizers = build_optimizer(model, OptimConfig())
    brake = Brake(optimizers, torch.device("cpu"))

    def step(number: float) -> list[Any]:
        model(torch.ones(1, 4)).sum().backward()
        brake.look(torch.tensor([1.0, number]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        state = [t for o in optimizers for s in o.state.values() for t in s.values()]
        return [
            getattr(t, "_local_tensor", t).detach().clone() for t in (*model.parameters(), *state)
        ]

    try:
        first, second = step(2.0), step(2.0)
        assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for number in (float("nan"), float("inf"), 1.0):  # a good one after it, too
            for a, b in zip(second, step(number), strict=True):
                assert torch.equal(a, b)
    finally:
        dist.close()


def test_muon_looks_at_no_brake() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
    assert not Brake.holds(build_optimizer(model, OptimConfig(name="muon")))
    assert Brake.holds(build_optimizer(model, OptimConfig()))


def test_numbers_come_back_as_they_were() -> None:
    values = torch.tensor([1.5, float("inf"), -2.0])
    assert Readback(values).numbers() == [1.5, float("inf"), -2.0]
    assert to_device(values, torch.device("cpu")) is values


def test_a_cycle_that_outlived_a_young_collection_is_freed_in_a_pause() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    with train.collected_between_steps() as collect:
        cycle = Cycle()
        freed = weakref.ref(cycle)
        collect(50, False)  # it is old now
        del cycle
        assert freed() is not None
        collect(51, True)
        assert freed() is None


def test_the_garbage_collector_rests_during_steps_and_is_as_before_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collected: list[int] = []
    with train.collected_between_steps() as collect:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        monkeypatch.setattr(gc, "collect", lambda generation=2: collected.append(generation))
        for step in range(1, 101):
            collect(step, step in (10, 100))  # in a pause, what is old too
    assert collected == [2, 1, 2]
    assert gc.isenabled() and gc.get_freeze_count() == 0
