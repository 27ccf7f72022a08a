"""The benchmarks run: at sizes whose figures mean nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_the_gpu_benchmark_without_a_gpu_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no CUDA device here; --toy checks the script"):
        benchmark("gpu_step").main([])
