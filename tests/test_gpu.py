"""The same promises on a CUDA device: bf16 training, compile, exact resume, NCCL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_train import final_weights, losses, same_weights
from tests.train_server import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def train(recipe: Path, run: Path, *words: str, processes: int = 1) -> None:
    command = [sys.executable, str(ROOT / "train.py")]
    if processes > 1:
        command = ["torchrun", "--standalone", f"--nproc-per-node={processes}", command[1]]
    words = (str(recipe), f"run.dir={run}", "parallel.precision=bf16", *words)
    subprocess.run(command + list(words), check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("words", [[], ["parallel.compile=true"]])
def test_bf16_on_a_gpu_follows_the_golden_losses(
    toy_recipe: Path, tmp_path: Path, words: list[str]
) -> None:
    train(toy_recipe, tmp_path / "r", *words)
    golden = (Path(__file__).parent / "golden" / "toy_losses.txt").read_text().split()
    assert losses(tmp_path / "r") == pytest.approx([float(x) for x in golden], rel=0.02)
    assert all(w.dtype == torch.float32 for w in final_weights(tmp_path / "r").values())


def test_a_resumed_run_is_bit_identical_when_deterministic(
    toy_recipe: Path, tmp_path: Path
) -> None:
    words = ["run.deterministic=true", "checkpoint.keep_last=10"]
    train(toy_recipe, tmp_path / "whole", *words)
    train(toy_recipe, tmp_path / "parts", *words)
    for name in ("step_00000008", "step_00000012"):  # as if it had been killed after step 4
        folder = tmp_path / "parts" / "checkpoints" / name
        folder.rename(tmp_path / name)
    train(toy_recipe, tmp_path / "parts", *words)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_follow_one(toy_recipe: Path, tmp_path: Path) -> None:
    train(toy_recipe, tmp_path / "1")
    train(toy_recipe, tmp_path / "2", processes=2)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-3)
