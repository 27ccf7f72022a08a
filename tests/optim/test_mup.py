"""µP: nothing changes at the base width, the table's factors elsewhere, movements that stay."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from openlm_lite.config import ConfigError
from openlm_lite.coordinate_check import growth, movements
from openlm_lite.errors import InputError
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_std, init_weights
from openlm_lite.model.transformer import Transformer
from openlm_lite.optim.build import OptimConfig, build_optimizer
from openlm_lite.run import load_run

WIDTHS = (32, 64, 128, 256)


def model_of(width: int) -> ModelConfig:
    return ModelConfig(64, width, 2, width // 16, width // 16, 16, 2 * width, 32)


def test_at_the_base_width_it_is_the_standard_parametrisation_to_the_bit() -> None:
    cfg = model_of(48)
    models = [Transformer(cfg) for _ in range(2)]
    for model, base in zip(models, (None, 48), strict=True):
        init_weights(model, 3, base)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    for name in ("adamw", "muon"):
        standard, mup = (
            [
                {key: value for key, value in group.items() if key != "params"}
                for one in build_optimizer(model, OptimConfig(name=name, mup_base_width=base), 48)
                for group in one.param_groups
            ]
            for model, base in zip(models, (None, 48), strict=True)
        )
        assert standard == mup


def test_deviations_and_rates_are_those_of_the_table() -> None:
    cfg, base = model_of(64), 16
    assert init_std(cfg, "embedding.weight", base) == pytest.approx(16**-0.5)
    assert init_std(cfg, "position_embedding.weight", base) == pytest.approx(16**-0.5)
    assert init_std(cfg, "output.weight", base) == pytest.approx(64**-0.5 * (16 / 64) ** 0.5)
    for name in ("layers.1.attention.wq.weight", "layers.1.feed_forward.w_down.weight"):
        assert init_std(cfg, name, base) == init_std(cfg, name)
    model = Transformer(cfg)
    init_weights(model, 0, base)
    names = {p: name for name, p in model.named_parameters()}
    expected = {
        "adamw": {"embedding": 1.0, "norm": 1.0, "layers.0.attention.wq": 0.25, "output": 0.25},
        "muon": {"embedding": 1.0, "norm": 1.0, "layers.0.attention.wq": 0.5, "output": 0.25},
    }
    for optimizer, scales in expected.items():
        optim = OptimConfig(name=optimizer, mup_base_width=base, weight_decay=0.1, decay="all")
        found = {
            names[p].removesuffix(".weight"): (group["lr_scale"], group["weight_decay"])
            for one in build_optimizer(model, optim, cfg.d_model)
            for group in one.param_groups
            for p in group["params"]
        }
        for name, scale in scales.items():
            assert found[name][0] == scale, name
        # what decay takes off the weights in a step is the same at every width
        assert all(math.isclose(scale * decay, 0.1) for scale, decay in found.values())


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """Five batches of rows that repeat: there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(64, (64,), generator=generator)
    starts = torch.randint(0, 31, (5 * 4,), generator=generator).tolist()
    return torch.stack([text[start : start + 33] for start in starts]).view(5, 4, 33)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_coordinates_move_alike_at_every_width_with_mup_only(
    optimizer: str, tokens: torch.Tensor
) -> None:
    powers: dict[str, dict[str, float]] = {}
    for name, base in (("standard", None), ("mup", WIDTHS[0])):
        optim = OptimConfig(name=optimizer, lr=4e-3, mup_base_width=base)
        runs = [movements(model_of(width), optim, tokens) for width in WIDTHS]
        powers[name] = {
            place: growth(WIDTHS, [run[place][-1] for run in runs]) for place in runs[0]
        }
    standard, mup = powers["standard"], powers["mup"]
    for block in ("layers.0", "layers.1"):
        assert standard[block] > 0.25 and abs(mup[block]) < 0.2, powers
    # what the head's first weights make of it fades as 1/sqrt(width)
    assert standard["logits"] > 0.2 and mup["logits"] < 0.05, powers
    assert abs(standard["embedding"]) < 0.1 and abs(mup["embedding"]) < 0.1, powers


def test_a_growth_is_a_power_of_the_width() -> None:
    assert growth([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    with pytest.raises(InputError, match="two widths"):
        growth([8, 8], [1.0, 1.0])


def test_what_cannot_be_transferred_is_refused_with_the_recipe(toy_recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(str(toy_recipe), ["optim.mup_base_width=20"])
    assert "needs an output matrix of its own" in str(caught.value)
    assert "model.n_heads = 4 at model.d_model = 32 make 2.5 heads there" in str(caught.value)
    load_run(str(toy_recipe), ["optim.mup_base_width=16", "model.tie_embeddings=false"])
