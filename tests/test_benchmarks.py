"""The benchmarks run: at sizes whose figures mean nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from openlm_lite.cost import MACHINES, Machine, Plan, _collective, estimate
from openlm_lite.layout import Sizes
from openlm_lite.memory import GPU_GIB
from openlm_lite.model.config import ModelConfig
from tests.train_server import ROOT


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the peers
def test_the_gpu_benchmark_runs_as_a_toy_with_peers_rates_and_roofline(tmp_path: Path) -> None:
    result = benchmark("gpu_step").main(["--toy", "--rounds", "3", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("gpu_step_toy_*.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    toy = result["sizes"]["toy"]
    assert {"openlm_lite", "transformers"} <= set(toy["subjects"]), toy["left_out"]
    assert toy["best_peer"] is not None
    assert toy["subjects"][toy["best_peer"]]["ratio_to_best_peer"] == 1.0
    assert all(row["mfu"] is None for row in toy["subjects"].values())  # no peak is known
    kernels = toy["attention, FLOP/s"]
    assert kernels["sdpa"] > 0 and kernels["blocks"] > 0
    assert "runs on CUDA devices" in kernels["flash_attn"]
    assert toy["roofline_seconds_total"] == sum(toy["roofline_seconds"].values()) > 0


def test_the_roofline_is_the_sum_of_flops_and_bytes_over_their_rates() -> None:
    gpu_step = benchmark("gpu_step")
    size = gpu_step.SIZES["1.4b"]
    rates = {
        "matmul, attention projections, FLOP/s": 7e14,
        "matmul, feed-forward, FLOP/s": 7e14,
        "matmul, output head, FLOP/s": 7e14,
        "copy, bytes/s (read and written)": 4e12,
    }
    parts = gpu_step.roofline(size, rates, 5e14)
    tokens = size.micro_batch * size.seq_len
    matrices = 24 * (4 * 2048**2 + 3 * 2048 * 5632) + 50_432 * 2048
    products = ("attention projections", "feed-forward", "output head")
    assert sum(parts[p] for p in products) == pytest.approx(6 * matrices * tokens / 7e14)
    scores = tokens * 2048 * 2048 / 2 * 24  # of the causal half: T^2 / 2 per sequence and feature
    assert parts["attention"] == pytest.approx(3.5 * 4 * scores / 5e14)
    n_params = matrices + 50_432 * 2048
    assert parts["optimizer, clipping, casts"] == pytest.approx(44 * n_params / 4e12)


def test_the_gpu_benchmark_leaves_out_what_does_not_fit_beside_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu_step = benchmark("gpu_step")
    # GiB held between steps and taken by one; 95 of 100 may be used
    needs = {"first": (20, 40), "too much in a step": (10, 70), "fails": None, "third": (30, 45)}

    def start(build: str, *_: Any) -> Any:
        need = needs[build]
        if need is None:
            raise RuntimeError("CUDA out of memory\nand more")
        return gpu_step.Subject(lambda: None, *(gib * 2**30 for gib in need))

    monkeypatch.setattr(gpu_step, "start", start)
    monkeypatch.setattr(gpu_step, "total_memory", lambda _: 100 * 2**30)
    builds = {name: name for name in needs}
    device = torch.device("cpu")
    found = gpu_step.measure(gpu_step.TOY["toy"], builds, device, math.inf, rounds=2)
    assert {n: row["peak_memory_gib"] for n, row in found["subjects"].items()} == {
        "first": 60,
        "third": 75,
    }
    assert found["left_out"] == {
        "too much in a step": "does not fit into the device's memory beside those before it",
        "fails": "RuntimeError: CUDA out of memory",
    }


def test_the_gpu_benchmark_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no CUDA device here; --toy checks the script"):
        benchmark("gpu_step").main([])


def script(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A benchmark in a process of its own: some set how a process gets its memory."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *words]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environ, capture_output=True, text=True)


@pytest.mark.slow
def test_the_operations_of_a_step_on_a_cpu_are_products_attention_and_the_rest() -> None:
    done = script("cpu_operations", "--steps", "1", "--vocab", "128", "--threads", "1")
    assert done.returncode == 0, done.stderr
    kinds = ("matrix products", "attention", "everything else")
    found = [re.search(rf"^ +{kind} +[\d.]+ s +([\d.]+)%$", done.stdout, re.M) for kind in kinds]
    shares = [float(one[1]) for one in found if one is not None]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=0.2) and min(shares) > 1


def test_the_flops_of_a_product_are_those_of_its_last_two_matrices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports its neighbour
    operations = benchmark("cpu_operations")
    assert operations.flops_of([(2, 3), (3, 5)]) == 2 * 2 * 3 * 5
    assert operations.flops_of([(7, 5), (7, 2), (2, 5)]) == 2 * 7 * 2 * 5  # addmm_: += a b
    names = ("aten.mm.default", "openlm_lite.causal_attention_1.default", "aten.add.Tensor")
    kinds = [operations.kind_of(name) for name in names]
    assert kinds == ["matrix products", "attention", "everything else"]


@pytest.mark.slow
def test_overheads_are_shares_of_a_step_and_a_start_that_fails_says_why(toy_recipe: Path) -> None:
    words = (str(toy_recipe), "schedule.cooldown_steps=2", "--steps", "6", "--starts", "1")
    done = script("overheads", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert 0 < found["share_in_all"] == pytest.approx(sum(found["share_of_a_step"].values()))
    assert found["start_up_cpu_seconds"]["ratio"] > 0
    done = script("overheads", str(toy_recipe), "data.train=nowhere", "--starts", "1")
    assert done.returncode == 1 and "exit code 2 of" in done.stderr
    assert "openlm: " in done.stderr.partition("exit code 2 of")[2]


def test_the_tables_of_docs_scale_are_those_of_the_cost_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    benchmark("step_cost").main()
    text = (ROOT / "docs" / "scale.md").read_text()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert [table.count("\n") for table in tables] == [26, 24]  # 25 rows, 23 rows
    for table in tables:
        assert f"\n\n{table}\n\n" in text


def test_the_summary_of_the_cost_model_is_that_of_its_rows() -> None:
    step_cost = benchmark("step_cost")
    ratios = [
        estimate(row.plan, row.machine).tokens_per_second_per_gpu / row.tokens_per_second_per_gpu
        for row in step_cost.PUBLISHED
        if row.note not in (step_cost.FITTED, step_cost.RING)
    ]
    worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
    said = f"Of the {len(ratios)} rows that were not used to choose a constant and are no ring"
    said += (
        f" attention, the median ratio is {statistics.median(ratios):.2f}, the worst {worst:.2f}."
    )
    assert said in (ROOT / "docs" / "scale.md").read_text()
    assert sum(row.note == step_cost.FITTED for row in step_cost.PUBLISHED) == 4


def test_memory_and_speed_are_known_of_the_same_gpus() -> None:
    assert MACHINES.keys() == GPU_GIB.keys()


def test_a_step_that_talks_to_nobody_takes_what_its_formulas_say() -> None:
    """By hand, for a machine of round numbers; no recomputation, one GPU, one pass."""
    model = ModelConfig(
        *(100, 8, 2, 2, 1, 4, 16, 64), positions="rope", norm="rms_norm", activation="swiglu"
    )
    m = Machine(flops=1e6, memory=1e6, of_flops=0.5, of_flops_attention=0.25, of_memory=0.5)
    step = estimate(Plan(model, Sizes(), 32, 3), m)
    tokens, matrices = 3 * 32, 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    products = 6 * (matrices + 100 * 8) * tokens / 0.5e6
    attention = 2 * 3.5 * 2 * 32 * 8 * tokens / 0.25e6  # two layers; 1 forward, 2.5 backward
    kept = 6 * 8 + 3 * 8 + 4 * 4 + 4 * 16
    moved = 2 * 8 * 2 * kept * tokens / 0.5e6
    assert step.compute == pytest.approx(products + attention + moved)
    assert step.exposed == step.tensor == step.context == step.fsdp == 0
    assert step.optimizer == pytest.approx(model.n_params * 36 / 0.5e6)
    assert step.tokens_per_second_per_gpu == pytest.approx(tokens / step.seconds)
    assert step.mfu == pytest.approx(
        step.tokens_per_second_per_gpu * model.flops_per_token(32) / m.flops
    )


def test_talk_is_a_ring_of_hops_and_bytes() -> None:
    """16 GPUs of two nodes gather over 15 hops, one of them between the nodes."""
    m = Machine(nvlink=400e9, network=50e9, of_links=0.5, start=1e-6, hop_in_node=2e-6)
    assert _collective(8e9, 1, 1, m) == 0
    one_node = 1e-6 + 7 * 2e-6 + 8e9 * 7 / 8 / 200e9
    assert _collective(8e9, 8, 1, m) == pytest.approx(one_node)
    two = 1e-6 + 14 * 2e-6 + m.hop_between + 8e9 * 15 / 16 / 200e9  # 8 adapters of 50 GB/s
    assert _collective(8e9, 16, 1, m) == pytest.approx(two)
    apart = 1e-6 + m.hop_between + 8e9 / 2 / 25e9  # neighbours on two nodes: one adapter
    assert _collective(8e9, 2, 8, m) == pytest.approx(apart)
