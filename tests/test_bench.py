"""openlm bench, traces, MFU: what is measured, and what is honestly left out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from openlm_lite import bench as bench_module
from openlm_lite import cli, dist, log, train
from openlm_lite.errors import InputError
from openlm_lite.layout import Layout, Sizes
from openlm_lite.log import read_metrics
from openlm_lite.metrics import peak_flops, peak_flops_of, throughput
from openlm_lite.profile import ProfileConfig, Profiler, start_trace, write_trace
from openlm_lite.run import load_run
from tests.test_late import Device, run

MIXTURE = (
    "data.train=null",
    "data.sources={a: {path: nowhere, weight: 0.5}, b: {path: nowhere, weight: 0.5}}",
)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_of_known_devices_and_none_for_others(name: str, tflops: int | None) -> None:
    assert peak_flops_of(name) == (None if tflops is None else tflops * 1e12)


def test_mfu_is_tokens_times_flops_over_the_peak_and_absent_where_that_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu) is None
    unknown = throughput(1000, 2.0, 4, 10**9, cpu)
    assert "perf/mfu" not in unknown and unknown["perf/peak_memory_gib"] > 0
    monkeypatch.setattr("openlm_lite.metrics.peak_flops", lambda device: 1e12)
    assert throughput(1000, 2.0, 4, 10**9, cpu)["perf/mfu"] == 500 * 1e9 / (4 * 1e12)


def test_bench_times_whole_steps_and_phases_and_saves_nothing(
    toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    words = [str(toy_recipe), f"run.dir={tmp_path / 'run'}", f"--trace={trace}"]
    for data in ("synthetic", "real"):
        assert (
            cli.main(["bench", *words, "--steps=2", "--warmup=1", f"--data={data}", "--json"]) == 0
        )
        found = json.loads(capsys.readouterr().out)
        assert found["data"] == data and found["steps"] == 2
        assert found["tokens_per_step"] == 256 and found["micro_batches"] == 2
        assert found["attention"] == "blocks" and found["peak_flops_of_device"] is None
        cfg = load_run(str(toy_recipe))
        assert found["flops_per_token"] == cfg.model.flops_per_token(32)
        rate = found["perf/tokens_per_second"]
        assert found["tflops_per_second_per_device"] == pytest.approx(
            rate * found["flops_per_token"] / 1e12
        )
        phases = ["data", "agree", "forward and backward", "clip", "optimizer"]
        assert list(found["phases_seconds"]) == phases
        assert 0 <= found["data_wait_share"] < 1
        assert 4 < found["loss_of_last_step"] < 8
        events = json.loads(trace.read_text())["traceEvents"]
        assert any("mm" in event.get("name", "") for event in events)
        trace.unlink()
    assert not (tmp_path / "run").exists()


def test_synthetic_batches_have_the_documents_and_the_sources_of_the_recipe(
    toy_recipe: Path,
) -> None:
    plain = load_run(str(toy_recipe))
    layout = Layout(Sizes(), 0, blocks=None, tables=None, tp=None, cp=None)  # pyright: ignore[reportArgumentType]
    batch = next(bench_module.synthetic_batches(plain, layout))
    assert batch.doc_ids_BT is None and batch.sources_B is None
    words = ["data.document_masking=true", "data.seq_len=8192", "model.max_seq_len=8192"]
    words += ["global_batch_tokens=65536", *MIXTURE]
    cfg = load_run(str(toy_recipe), words)
    batch = next(bench_module.synthetic_batches(cfg, layout))
    assert batch.doc_ids_BT is not None and batch.sources_B is not None
    assert batch.doc_ids_BT.shape == (8, 8192) and (batch.doc_ids_BT.diff() >= 0).all()
    assert 4 < batch.doc_ids_BT[:, -1].float().mean() < 14  # 7.2 are expected
    assert batch.sources_B.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_the_losses_of_a_mixture_by_source_are_part_of_a_timed_step(
    toy_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(forward_backward(*args, **kwargs))
        return found[-1]

    found: list[torch.Tensor] = []
    forward_backward = bench_module.forward_backward
    monkeypatch.setattr(bench_module, "forward_backward", counted)
    bench_module.bench(load_run(str(toy_recipe), MIXTURE), steps=1, warmup=0)
    _, by_source, _ = found[0].split([2, 4, 1])
    assert (by_source > 0).all()


def test_each_timed_step_takes_what_the_device_takes_for_it(
    toy_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, bench_module)
    monkeypatch.setattr(bench_module, "reads_late", lambda device: True)
    monkeypatch.setattr(bench_module, "time", SimpleNamespace(perf_counter=lambda: device.now))
    monkeypatch.setattr(bench_module.Stepper, "wait", lambda stepper: device.wait(device.done_at))
    found = bench_module.bench(load_run(str(toy_recipe)), steps=3, warmup=1)
    assert found["seconds_min"] == found["seconds_max"] == 10
    assert found["perf/tokens_per_second"] == 256 / 10
    assert found["phases_seconds"]["forward and backward"] == 10
    assert sum(found["phases_seconds"].values()) == 10


def test_a_bench_that_cannot_be_is_one_error(toy_recipe: Path, tmp_path: Path) -> None:
    cfg = load_run(str(toy_recipe), [f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(InputError, match="--steps 0 --warmup 3: at least 1 and 0"):
        bench_module.bench(cfg, steps=0)
    with pytest.raises(InputError, match=r"--trace x.txt: must end with .json or .json.gz"):
        bench_module.bench(cfg, trace="x.txt")


def test_a_run_traces_the_steps_that_it_was_asked_for(toy_recipe: Path, tmp_path: Path) -> None:
    words = ("total_steps=6", "schedule.cooldown_steps=2", "profile.first_step=3")
    assert run(toy_recipe, tmp_path / "r", *words, "profile.steps=2") == train.DONE
    (path,) = (tmp_path / "r" / "profile").iterdir()
    assert path.name == "steps-3-to-4-rank0.json.gz"
    with gzip.open(path, "rt") as f:
        events = json.load(f)["traceEvents"]
    updates = [e for e in events if e.get("name") == "aten::_fused_adamw_"]
    assert len(updates) == 4  # two groups a step
    assert str(path) in (tmp_path / "r" / "log.txt").read_text()


def test_a_trace_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(log.logger, "warning", lambda text, *args: said.append(text % args))
    (tmp_path / "profile").touch()  # no folder
    world = dist.World(0, 1, 0, torch.device("cpu"))
    profiler = Profiler(ProfileConfig(first_step=1, steps=1), tmp_path, world)
    for step in range(4):
        profiler.begin(step)
        assert profiler.end(step + 1) == []
    profiler.close()
    (line,) = said
    assert "steps-1-to-1-rank0.json.gz: no trace: [Errno 17] File exists" in line


def test_a_trace_that_is_cut_off_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says nothing of a full disk."""
    trace = start_trace(torch.device("cpu"))
    monkeypatch.setattr(trace, "export_chrome_trace", lambda path: Path(path).write_text('{"a": 1'))
    said: list[str] = []
    monkeypatch.setattr(log.logger, "warning", lambda text, *args: said.append(text % args))
    assert not write_trace(trace, tmp_path / "t.json")
    (line,) = said
    assert line.startswith(f"{tmp_path}/t.json: no trace: its JSON is cut off: is there room in /")
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_step": -1}, "profile.first_step = -1, must not be negative"),
        ({"steps": 0}, "profile.steps = 0, must be at least 1"),
    ],
)
def test_steps_that_cannot_be_traced_are_one_error(fields: dict[str, int], message: str) -> None:
    with pytest.raises(InputError) as caught:
        ProfileConfig(**fields)  # pyright: ignore[reportArgumentType]
    assert str(caught.value) == message


def test_every_record_has_memory_and_every_log_the_attention(
    toy_recipe: Path, tmp_path: Path
) -> None:
    assert run(toy_recipe, tmp_path / "r", "total_steps=4", "schedule.cooldown_steps=1") == 0
    steps = [r for r in read_metrics(tmp_path / "r" / "metrics.jsonl") if "train/loss" in r]
    assert all(record["perf/peak_memory_gib"] > 0 for record in steps)
    assert "attention by blocks (auto)" in (tmp_path / "r" / "log.txt").read_text()
    (commit,) = (tmp_path / "r" / "checkpoints").glob("*/COMMIT.json")
    assert json.loads(commit.read_text())["facts"]["attention"] == "blocks"


def test_a_backend_that_is_not_for_this_machine_is_one_error_before_anything_is_written(
    toy_recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"kernels.attention = flash_attn: runs on CUDA devices"):
        run(toy_recipe, tmp_path / "r", "kernels.attention=flash_attn")
    assert not (tmp_path / "r").exists()
