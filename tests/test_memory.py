"""The estimate of a GPU's memory, and what `openlm config` makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openlm_lite.cli import main
from openlm_lite.derived import memory_need
from openlm_lite.memory import kept_per_token, parts_of
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_weights
from openlm_lite.model.loss import linear_cross_entropy
from openlm_lite.model.transformer import Transformer
from openlm_lite.run import load_run
from tests.model.test_loss import Largest
from tests.tiny_run import bytes_kept

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


BLOCKS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "rms norm": {"norm": "rms_norm"},
    "post norm": {"block": "sequential_post_norm"},
    "parallel": {"block": "parallel"},
    "shared norm": {"block": "parallel_shared_norm"},
    "qk norm": {"qk_norm": "per_head"},
    "multi head": {"n_kv_heads": 8},
    "geglu": {"activation": "geglu"},
    "gelu": {"activation": "gelu"},
}


@pytest.mark.parametrize("which", BLOCKS)
def test_the_estimate_of_the_activations_is_what_a_block_keeps(which: str) -> None:
    """In bf16, as on a GPU. A CPU's flash attention puts out what has to be copied once more."""
    B, T = 2, 256
    shape = {"norm": "layer_norm", "n_kv_heads": 4, **BLOCKS[which]}
    model = ModelConfig(
        vocab_size=64, d_model=256, n_layers=1, n_heads=8, head_dim=32, d_ff=688, max_seq_len=T,
        **shape,
    )  # fmt: skip

    def kept(n_layers: int) -> int:
        built = Transformer(replace(model, n_layers=n_layers))
        init_weights(built, 0)
        built.to(torch.bfloat16)
        return bytes_kept(built, torch.randint(64, (B, T + 1)))

    measured = (kept(3) - kept(1)) / 2 / (2 * B * T)
    estimate = kept_per_token(model) + model.q_width
    assert estimate <= measured < 1.02 * estimate


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width"), [(16, 32), (1, 32), (1, 256)])
def test_the_estimate_of_the_loss_is_what_it_takes(
    precision: str, rows: int, width: int, toy_recipe: Path
) -> None:
    """Where there are more logits than numbers in the head, as many, and fewer."""
    words = [f"parallel.precision={precision}", "model.vocab_size=4000"]
    words += [f"micro_batch_size={rows}", f"model.d_model={width}"]
    cfg = load_run(str(toy_recipe), words)
    vocab = cfg.model.vocab_size
    tokens = cfg.micro_batch_size * cfg.data.seq_len
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    head = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    with Largest() as largest:
        linear_cross_entropy(
            hidden, head, torch.zeros(tokens, dtype=torch.long), chunk_tokens=tokens
        )
    estimate = parts_of(memory_need(cfg, 1)).loss
    measured = largest.bytes - head.nbytes
    assert 0.9 * measured < estimate < 1.1 * measured
