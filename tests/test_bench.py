"""openlm bench, traces, MFU: what is measured, and what is honestly left out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from openlm_lite import bench as bench_module
from openlm_lite import cli, train
from openlm_lite.cli_bench import take_large_pages
from openlm_lite.errors import InputError
from openlm_lite.log import read_metrics
from openlm_lite.metrics import peak_flops, peak_flops_of, throughput
from openlm_lite.run import load_run
from tests.test_late import run


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


def test_large_pages_are_asked_for_unless_the_user_has_said_something() -> None:
    environ: dict[str, str] = {}
    take_large_pages(environ)
    assert environ == {"THP_MEM_ALLOC_ENABLE": "1"}
    environ = {"THP_MEM_ALLOC_ENABLE": "0"}
    take_large_pages(environ)
    assert environ == {"THP_MEM_ALLOC_ENABLE": "0"}
