"""Equal numbers with OpenLM: logits, losses, gradients, ten optimizer steps, initial weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer
from openlm_lite.optim.build import OptimConfig, build_optimizer, clip_gradients, set_lr
from openlm_lite.optim.schedule import ScheduleConfig, lr_at
from tests import openlm_reference as reference

VARIANTS = [
    "default",
    "default_tied",
    "dclm",
    "dclm_tied",
    "dclm_noqk",
    "rms_norm_qk",
    "no_wb_layer_norm_qk",
    "dclm_gelu",
    "dclm_llama_rotary",
    "dclm_head_rotary",
    "llama2_style",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_parameter_count_equal_openlm(shared_data: Path, variant: str) -> None:
    folder = shared_data / "openlm" / variant
    model, facts = reference.load_model(folder), reference.facts(folder)
    io = load_file(folder / "io.safetensors")
    with torch.no_grad():
        logits = model(io["inputs"])
        sums = model(io["inputs"], io["targets"], z_weight=1e-4)
    assert (logits - io["logits"]).abs().max() <= 1e-5
    n = io["targets"].numel()
    assert sums.ce.item() / n == pytest.approx(facts["loss"], rel=1e-6)
    assert sums.total.item() / n == pytest.approx(facts["loss_with_zloss_1e4"], rel=1e-6)
    assert model.cfg.n_params == sum(p.numel() for p in model.parameters()) == facts["n_params"]


@pytest.mark.parametrize("variant", ["dclm", "rms_norm_qk"])
def test_gradients_equal_openlm(shared_data: Path, variant: str) -> None:
    folder = shared_data / "openlm" / variant
    model = reference.load_model(folder)
    io = load_file(folder / "io.safetensors")
    sums = model(io["inputs"], io["targets"])
    (sums.total / sums.n_targets).backward()
    expected = reference.renamed(load_file(folder / "grads.safetensors"))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert difference <= 1e-5, name


def test_ten_optimizer_steps_equal_openlm(shared_data: Path) -> None:
    folder = shared_data / "openlm"
    log = json.loads((folder / "train10" / "log.json").read_text())
    h = log["hparams"]
    model = reference.load_model(folder / "dclm", "../train10/init.safetensors")
    optim = OptimConfig(lr=h["lr"], weight_decay=h["wd"], decay="all", grad_clip=h["clip"])
    (optimizer,) = build_optimizer(model, optim)
    schedule = ScheduleConfig("cosine", warmup_steps=h["warmup"], end_lr=h["min_lr"])
    tokens = load_file(folder / "train10" / "tokens.safetensors")["tokens"]
    for step, expected in enumerate(log["steps"]):
        lr = lr_at(step, h["total_steps"], h["lr"], schedule)
        assert lr == pytest.approx(expected["lr"], rel=1e-12)
        set_lr((optimizer,), lr)
        sums = model(tokens[step, :, :-1], tokens[step, :, 1:], z_weight=h["z_loss"])
        loss = sums.total / sums.n_targets
        assert loss.item() == pytest.approx(expected["loss_with_z"], abs=1e-5)
        loss.backward()
        norm = clip_gradients(model, optim.grad_clip)
        assert norm.item() == pytest.approx(expected["grad_norm_before_clip"], rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    final = reference.renamed(load_file(folder / "train10" / "final.safetensors"))
    for name, parameter in model.named_parameters():
        # Where a gradient is near Adam's eps, rounding decides its whole step (up to lr = 3e-3):
        # nearly all elements are equal, and those few stay within a step.
        difference = (parameter.detach() - final[name]).abs()
        assert difference.max() <= 1e-3, name
        assert (difference > 1e-5).float().mean() <= 1e-3, name


def test_initial_weights_have_openlms_spread(shared_data: Path) -> None:
    cases = json.loads((shared_data / "openlm" / "init_stats_d512.json").read_text())
    checked = 0
    for case in cases:
        if case["ffn"] != "swiglu_torch":
            continue
        stats = case["stats"]
        vocab, width = stats["tok_embeddings.weight"]["shape"]
        hidden = stats["layers.0.feed_forward.w3.weight"]["shape"][1]
        layers = 1 + max(int(k.split(".")[1]) for k in stats if k.startswith("layers."))
        cfg = ModelConfig(
            vocab, width, layers, 8, 8, width // 8, hidden, 64, "layer_norm", qk_norm="full"
        )
        model = Transformer(cfg)
        init_weights(model, seed=7)
        theirs = {k: torch.empty(s["shape"]) for k, s in stats.items() if "norm" not in k}
        for name, rows in reference.renamed(theirs).items():
            weight = model.get_parameter(name)
            source = _openlm_name(name)
            expected = stats[source]
            assert weight.shape == rows.shape
            # the standard error of a standard deviation is about std / sqrt(2 n)
            error = 6 * expected["std"] / (2 * weight.numel()) ** 0.5
            assert weight.std().item() == pytest.approx(expected["std"], abs=2 * error), name
            assert weight.abs().max().item() == pytest.approx(expected["absmax"], rel=0.02), name
            checked += 1
        assert all(p.eq(1).all() for n, p in model.named_parameters() if "norm" in n)
    assert checked > 10


def _openlm_name(name: str) -> str:
    name = name.replace("embedding", "tok_embeddings").replace("wo.", "out_proj.")
    for part in ("wq", "wk", "wv"):
        name = name.replace(part, "in_proj")
    for part in ("w_gate", "w_up"):
        name = name.replace(part, "w12")
    return name.replace("w_down", "w3")
