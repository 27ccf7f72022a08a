"""The estimate of a GPU's memory, and what `openlm config` makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openlm_lite.cli import main
from openlm_lite.memory import parts_of
from openlm_lite.model.transformer import Transformer
from openlm_lite.run import load_run, memory_need

HSDP, TP = "parallel.dp_replicate=2", "parallel.tp=2"


def test_config_says_what_fits_a_gpu_and_what_to_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["config", "dclm_7b_2x", "--gpus", "8", "--json"]
    assert main([*words, "--gpu", "A100-40"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits_A100-40"] == "no" and "A100-40" not in found["fits"].split(", ")
    first = found["would_fit_with"].split("; ")[0]
    changes = first.split(": ")[0].split()
    assert main([*words[:2], *changes, *words[2:], "--gpu", "A100-40"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["fits_A100-40"] == "yes"
    assert again["memory_gib_per_gpu"] == pytest.approx(float(first.split()[-2]), abs=0.06)
    assert main([*words, "--gpu", "H1000"]) == 2
    assert "there are A100-40, A100-80, H100, H200, B200" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["parallel.tp=8"],
        ["parallel.cp=4"],
        ["parallel.activation_checkpointing=selective"],
        ["parallel.reduce_every_micro_batch=true"],
        ["micro_batch_size=1"],
    ],
)
def test_the_memory_estimate_knows_what_saves_memory(words: list[str]) -> None:
    def total(*words: str) -> int:
        return parts_of(memory_need(load_run("dclm_7b_2x", words), 64)).total

    assert total(*words) < total() < total("parallel.dp_replicate=8")


def test_the_estimate_of_the_states_is_what_the_ranks_hold(toy_recipe: Path) -> None:
    cfg = load_run(str(toy_recipe), [TP])
    n = sum(p.numel() for p in Transformer(cfg.model.architecture).parameters())
    assert parts_of(memory_need(cfg, 2)).states == 16 * n // 2
    hsdp = load_run(str(toy_recipe), [HSDP])
    assert parts_of(memory_need(hsdp, 4)).states == 16 * n // 2
