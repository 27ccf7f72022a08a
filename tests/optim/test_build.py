"""Which parameter is trained by which optimizer, at which rate and decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from openlm_lite.config import ConfigError
from openlm_lite.errors import InputError
from openlm_lite.model.transformer import Transformer
from openlm_lite.optim.build import OptimConfig, build_optimizer, set_lr
from openlm_lite.optim.groups import GroupConfig
from openlm_lite.optim.muon import Muon
from openlm_lite.run import load_run
from tests.tiny_run import tiny_config, tiny_model

MATRIX = {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"}


def treated(model: Transformer, cfg: OptimConfig) -> dict[str, tuple[str, float, float]]:
    """Parameter -> (optimizer, learning rate at a peak of 1, weight decay)."""
    names = {p: name for name, p in model.named_parameters()}
    optimizers = build_optimizer(model, cfg, model.cfg.d_model)
    set_lr(optimizers, 1.0)
    return {
        names[p]: (type(optimizer).__name__, group["lr"], group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(tiny_config(norm="rms_norm"))


def rule(**fields: Any) -> dict[str, GroupConfig]:
    return {"rule": GroupConfig(**fields)}


def test_adamw_decays_matrices_and_spares_the_embedding_and_the_norms(model: Transformer) -> None:
    found = treated(model, OptimConfig(weight_decay=0.3))
    assert len(found) == len(list(model.named_parameters()))
    for name, treatment in found.items():
        decayed = name == "output.weight" or name.split(".")[-2] in MATRIX
        assert treatment == ("AdamW", 1.0, 0.3 if decayed else 0.0), name


def test_decay_all_is_one_group_of_all_parameters(model: Transformer) -> None:
    (optimizer,) = build_optimizer(model, OptimConfig(decay="all"))
    assert len(optimizer.param_groups) == 1
    assert set(treated(model, OptimConfig(decay="all")).values()) == {("AdamW", 1.0, 0.1)}


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = tiny_model(tiny_config(positions="learned", attn_bias="all", mlp_bias=True))
    found = treated(model, OptimConfig(name="muon", muon_lr_scale=2.0))
    on_muon = {name for name, (optimizer, _, _) in found.items() if optimizer == "Muon"}
    layers = range(model.cfg.n_layers)
    assert len(on_muon) == len(MATRIX) * len(layers)
    for name in on_muon:
        assert name.split(".")[-2:][0] in MATRIX and name.endswith(".weight"), name
    assert {rate for _, rate, _ in found.values()} == {1.0, 2.0}
    assert all((found[name][1] == 2.0) == (name in on_muon) for name in found)
    assert {"embedding.weight", "position_embedding.weight", "output.weight"} <= found.keys()


def test_a_default_run_takes_the_steps_of_plain_adamw_to_the_bit() -> None:
    ours, theirs = tiny_model(tiny_config()), tiny_model(tiny_config())
    (optimizer,) = build_optimizer(ours, OptimConfig())
    exempt = [p for n, p in theirs.named_parameters() if p.ndim < 2 or "embedding" in n]
    decayed = [p for n, p in theirs.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": exempt, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
    generator = torch.Generator().manual_seed(0)
    for lr in (1e-3, 3e-3, 2.9e-3):
        set_lr((optimizer,), lr)
        for group in plain.param_groups:
            group["lr"] = lr
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        optimizer.step()
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_rule_scales_the_rate_and_sets_the_decay_of_what_it_names(model: Transformer) -> None:
    groups = rule(match="layers.*.attention.w?.*", lr_scale=0.5, weight_decay=0.0)
    for name, found in treated(model, OptimConfig(groups=groups)).items():
        named = ".attention.w" in name
        assert (found[1] == 0.5) == named, name
        assert not named or found[2] == 0.0, name


def test_the_last_rule_that_fits_decides_alone(model: Transformer) -> None:
    groups = {
        "wide": GroupConfig("layers.*", lr_scale=0.5, weight_decay=0.7),
        "narrow": GroupConfig("layers.1.*", lr_scale=3.0),
    }
    found = treated(model, OptimConfig(groups=groups))
    assert found["layers.0.attention.wq.weight"] == ("AdamW", 0.5, 0.7)
    assert found["layers.1.attention.wq.weight"] == ("AdamW", 3.0, 0.1)
    assert found["layers.1.attention_norm.weight"] == ("AdamW", 3.0, 0.0)


def test_rules_hold_for_muon_and_for_decay_all_too(model: Transformer) -> None:
    groups = rule(match="*.wo.weight", lr_scale=0.5, weight_decay=0.0)
    found = treated(model, OptimConfig(name="muon", decay="all", groups=groups))
    assert found["layers.0.attention.wo.weight"] == ("Muon", 0.5, 0.0)
    assert found["norm.weight"] == ("AdamW", 1.0, 0.1)


def test_rules_that_decide_on_nothing_are_one_error_that_lists_what_there_is(
    model: Transformer,
) -> None:
    groups = {
        "typo": GroupConfig("layers.*.atention.*"),
        "early": GroupConfig("norm.weight"),
        "late": GroupConfig("*norm.weight"),
    }
    with pytest.raises(InputError) as caught:
        build_optimizer(model, OptimConfig(groups=groups))
    message = str(caught.value)
    assert "optim.groups.typo: match = 'layers.*.atention.*': no parameter has such" in message
    assert "optim.groups.early: match = 'norm.weight': later rules decide on all" in message
    assert "groups.late" not in message
    assert "there are embedding.weight, layers.N.attention_norm.weight, " in message


def test_a_rule_is_checked_with_the_recipe_before_anything_runs(toy_recipe: Path) -> None:
    words = ["optim.groups={heads: {match: head.*}}", "micro_batch_size=0"]
    with pytest.raises(ConfigError) as caught:
        load_run(str(toy_recipe), words)
    assert len(caught.value.problems) == 2
    assert "optim.groups.heads: match = 'head.*': no parameter" in str(caught.value)
    cfg = load_run(str(toy_recipe), ["optim.groups={norms: {match: '*norm*', lr_scale: 2}}"])
    assert cfg.optim.groups == {"norms": GroupConfig("*norm*", lr_scale=2.0)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"muon_momentum": 1.0, "lr": 0.0}, "lr = 0.0, must be positive; muon_momentum = 1.0"),
        ({"muon_lr_scale": 2.0}, "muon_lr_scale = 2.0 needs name = muon"),
        ({"mup_base_width": 0}, "mup_base_width = 0, must be at least 1"),
    ],
)
def test_impossible_settings_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OptimConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"match": ""}, "match is empty"),
        ({"match": "*", "lr_scale": -1.0}, "lr_scale = -1.0, must not be negative"),
        ({"match": "*", "weight_decay": -0.1}, "weight_decay = -0.1, must not be negative"),
    ],
)
def test_impossible_rules_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GroupConfig(**fields)


def test_names_are_those_without_activation_checkpointing() -> None:
    from openlm_lite import dist
    from openlm_lite.layout import build_layout
    from openlm_lite.parallel import ParallelConfig, parallelize
    from tests.tiny_run import process_group

    model = tiny_model(tiny_config())
    with process_group():
        cfg = ParallelConfig(precision="fp32", activation_checkpointing=True)
        parallelize(model, build_layout(cfg, dist.World(0, 1, 0, torch.device("cpu"))), cfg)
    groups = rule(match="layers.0.attention.wq.weight", lr_scale=0.5)
    optimizers = build_optimizer(model, OptimConfig(name="muon", groups=groups))
    (muon,) = [one for one in optimizers if isinstance(one, Muon)]
    assert {group["lr_scale"] for group in muon.param_groups} == {0.5, 1.0}
