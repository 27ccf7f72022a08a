"""What a step records beside its loss: norms by layer, the time of its parts, the GPUs' sensors."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from openlm_lite import dist, sensors, sinks, train
from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.errors import InputError
from openlm_lite.hf.weights import checkpoint_weights
from openlm_lite.log import read_metrics
from openlm_lite.readback import Laps
from openlm_lite.run import load_run
from openlm_lite.sensors import Sensors, read_gpus
from tests.test_train import losses
from tests.train_server import TrainServer

PARTS = ["embedding", "layers.0", "layers.1", "norm"]
EVERY_FIFTH = "log.norms_every=5"


def run(recipe: Path, folder: Path, *words: str) -> list[dict[str, Any]]:
    """The records of its steps."""
    try:
        assert train.train(load_run(str(recipe), [f"run.dir={folder}", *words])) == train.DONE
    finally:
        dist.close()
    return steps_of(folder)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r]


def norms(record: dict[str, Any], kind: str) -> dict[str, float]:
    return {k.partition("/")[2]: v for k, v in record.items() if k.startswith(f"{kind}/")}


@pytest.fixture(scope="module")
def plain(toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(toy_recipe, folder)
    return folder


@pytest.fixture(scope="module")
def measured(toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "run"
    run(toy_recipe, folder, EVERY_FIFTH, "optim.grad_clip=0.1")
    return folder


def test_norms_by_layer_come_at_their_interval_and_add_up_to_the_whole_gradients(
    measured: Path,
) -> None:
    """The gradient is the one before clipping, which is at work in each of these steps."""
    records = steps_of(measured)
    assert [r["step"] for r in records if norms(r, "grad_norm")] == [5, 10]
    for record in (records[4], records[9]):
        found = norms(record, "grad_norm")
        assert list(found) == list(norms(record, "param_norm")) == PARTS
        assert record["train/grad_norm"] > 0.1
        whole = sum(norm**2 for norm in found.values()) ** 0.5
        assert whole == pytest.approx(record["train/grad_norm"], rel=1e-5)


def test_norms_of_weights_are_those_that_the_step_began_with(measured: Path) -> None:
    squares = dict.fromkeys(PARTS, 0.0)
    step_4 = resolve_checkpoint(str(measured / "checkpoints" / "step_00000004"))
    for name, weight in checkpoint_weights(step_4).items():
        part = re.match(r"layers\.\d+|\w+", name)
        assert part is not None
        squares[part[0]] += float(weight.double().square().sum())
    found = norms(steps_of(measured)[4], "param_norm")
    assert found == pytest.approx({k: v**0.5 for k, v in squares.items()}, rel=1e-5)


def test_norms_change_no_bit_of_the_losses(toy_recipe: Path, tmp_path: Path, plain: Path) -> None:
    run(toy_recipe, tmp_path / "r", "log.norms_every=1")
    assert losses(tmp_path / "r") == losses(plain)


HSDP, TP, CP = "parallel.dp_replicate=2", "parallel.tp=2", "parallel.cp=2"
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (2, [TP]),
        pytest.param(3, ["parallel.dp_shard=3"], marks=SLOW),  # shards of unequal size
        pytest.param(2, ["parallel.dp_replicate=2", "parallel.dp_shard=1"], marks=SLOW),
        pytest.param(4, [HSDP], marks=SLOW),
        pytest.param(4, [HSDP, TP], marks=SLOW),
        pytest.param(4, [TP, CP], marks=SLOW),
    ],
    ids=lambda v: "+".join(w.split(".")[1] for w in v) if isinstance(v, list) else str(v),
)
def test_every_layout_of_the_ranks_has_the_norms_of_one_process(
    train_server: TrainServer,
    toy_recipe: Path,
    tmp_path: Path,
    world: int,
    words: list[str],
) -> None:
    words = ["total_steps=2", "schedule.cooldown_steps=0", "log.norms_every=1", *words]
    words += ["micro_batch_size=1", "schedule.warmup_steps=1", "schedule.name=cosine"]
    if world == 3:
        words += ["global_batch_tokens=288"]
    log = tmp_path / "log"
    for ranks, folder in ((1, "one"), (world, "many")):
        here = words if ranks > 1 else [w for w in words if not w.startswith("parallel.")]
        there = f"run.dir={tmp_path / folder}"
        done = train_server.train(str(toy_recipe), there, *here, world=ranks, log=log)
        assert set(done["codes"]) == {0}, log.read_text()
    for one, many in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "many"), strict=True):
        for kind in ("grad_norm", "param_norm"):
            assert list(norms(many, kind)) == PARTS
            assert norms(many, kind) == pytest.approx(norms(one, kind), rel=2e-5)


def test_a_negative_interval_of_norms_is_refused(toy_recipe: Path) -> None:
    with pytest.raises(InputError, match=r"log.norms_every = -1, must not be negative"):
        load_run(str(toy_recipe), ["log.norms_every=-1"])


# --- the time of the parts -----------------------------------------------------------------------


def seconds(record: dict[str, Any]) -> dict[str, float]:
    return {k.rpartition("/")[2]: v for k, v in record.items() if k.startswith("perf/seconds/")}


def test_the_parts_of_a_step_are_timed_and_are_no_more_than_the_step(plain: Path) -> None:
    for record in steps_of(plain):
        found = seconds(record)
        assert {"forward_backward", "clip", "optimizer"} <= found.keys()
        assert all(value > 0 for name, value in found.items() if name != "save")
        parts = found["forward_backward"] + found["clip"] + found["optimizer"]
        whole = 256 / record["perf/tokens_per_second"]
        assert parts + record["perf/data_wait"] <= whole * 1.001


def test_what_is_between_steps_is_timed_where_it_was(plain: Path) -> None:
    """A save in the record of the step after which it was whole, a validation in its own."""
    saved = [r["step"] for r in steps_of(plain) if "save" in seconds(r)]
    assert saved and min(saved) > 4 and len(saved) <= 2
    others = [r for r in read_metrics(plain / "metrics.jsonl") if "val/toy/loss" in r]
    assert [r["step"] for r in others] == [0, 5, 10, 12]
    assert all(set(seconds(r)) == {"validation"} for r in others)


class FakeEvent:
    """A CUDA event of a device that comes to it when `device_at` says so."""

    device_at = 0
    given = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.given += 1
        self.at = FakeEvent.given

    def query(self) -> bool:
        return self.at <= FakeEvent.device_at

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.query()
        return 1000.0 * (end.at - self.at)


def test_a_gpu_that_is_not_done_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record then has the parts of the step before, if that is done."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "given", 0)
    monkeypatch.setattr(FakeEvent, "device_at", 0)

    def step() -> Laps:
        laps = Laps(torch.device("cuda"))
        laps.lap("forward_backward")
        laps.lap("optimizer")
        return laps

    said = sinks.Sinks.__new__(sinks.Sinks)
    said.laps_before, said.between = None, {"save": 0.5}
    first, second, third = step(), step(), step()
    assert first.seconds() is None
    assert said._seconds(first) == {"perf/seconds/save": 0.5}
    FakeEvent.device_at = 3
    assert first.seconds() == {"forward_backward": 1.0, "optimizer": 1.0}
    shown = {"perf/seconds/forward_backward": 1.0, "perf/seconds/optimizer": 1.0}
    assert said._seconds(second) == shown  # of the first
    assert said._seconds(third) == {}  # the second is not done either
    FakeEvent.device_at = 9
    assert said._seconds(third) == shown


# --- the sensors ---------------------------------------------------------------------------------


def fake_gpus(monkeypatch: pytest.MonkeyPatch, **readings: list[float]) -> None:
    for name, values in readings.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, values=values: values[device])


def test_the_hottest_and_the_slowest_gpu_of_the_machine_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gpus(
        monkeypatch,
        temperature=[60, 71],
        clock_rate=[1980, 1200],
        power_draw=[400_000, 350_500],
        utilization=[100, 97],
    )
    assert read_gpus(range(2)) == {
        "gpu/temperature_c": 71.0,
        "gpu/sm_clock_mhz": 1200.0,
        "gpu/power_w": 750.5,
        "gpu/utilization_percent": 97.0,
    }
    fake_gpus(monkeypatch, power_draw=[])  # an IndexError
    assert "gpu/power_w" not in read_gpus(range(2)) and len(read_gpus(range(2))) == 3


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_sensors_are_read_again_and_again_beside_training() -> None:
    readings: list[Sequence[int]] = []

    def read(devices: Sequence[int]) -> dict[str, float]:
        readings.append(devices)
        return {"gpu/temperature_c": float(len(readings))}

    watched = Sensors(torch.device("cuda"), read, seconds=0.001)
    wait_until(lambda: watched.latest.get("gpu/temperature_c", 0) >= 3)
    watched.close()
    assert readings[0] == range(1) and not watched._thread.is_alive()


def test_a_gpu_that_tells_nothing_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def read(devices: Sequence[int]) -> dict[str, float]:
        raise ModuleNotFoundError("nvidia-ml-py")

    caplog.set_level(logging.INFO, "openlm_lite")
    watched = Sensors(torch.device("cuda"), read, seconds=0.001)
    wait_until(lambda: not watched._thread.is_alive())
    watched.close()
    assert watched.latest == {}
    (record,) = caplog.records
    assert record.getMessage() == (
        'temperature and clocks of the GPUs are not recorded: pip install "openlm-lite[gpu]"'
    )


def test_a_cpu_has_no_sensors_and_no_thread() -> None:
    watched = Sensors(torch.device("cpu"))
    assert not watched._thread.is_alive() and watched.latest == {}
    watched.close()


def test_readings_stand_in_the_records_of_the_steps_that_are_shown(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Warm(sensors.Sensors):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.latest = {"gpu/temperature_c": 60.0}

    monkeypatch.setattr(sinks, "Sensors", Warm)
    records = run(toy_recipe, tmp_path / "r", "total_steps=5", "schedule.cooldown_steps=1")
    assert [r["step"] for r in records if r.get("gpu/temperature_c") == 60.0] == [4, 5]
