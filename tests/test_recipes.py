"""The shipped recipes: the published numbers, and two steps of each at toy size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from openlm_lite import config
from openlm_lite.cli import main
from openlm_lite.derived import derived
from openlm_lite.errors import InputError
from openlm_lite.log import read_metrics
from openlm_lite.optim.schedule import lr_at
from openlm_lite.plots import schedule_points
from openlm_lite.run import load_run
from openlm_lite.toy import HEADS, LAYERS, STEPS
from tests.train_server import TrainServer

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p.stem for p in config.assets("recipes").glob("*.yaml") if p.stem != "ladder")
SCALES = {
    "dclm_411m_1x": "411m-1x",
    "dclm_1b_1x": "1b-1x",
    "dclm_1b_5x": "1b-5x",
    "dclm_3b_1x": "3b-1x",
    "dclm_7b_1x": "7b-1x",
    "dclm_7b_2x": "7b-2x",
}
# dclm_recipes.json counts without the gains of qk-norm
PARAMETERS = {
    "411m": 411_665_408,
    "1b": 1_439_893_504,
    "3b": 2_796_096_000,
    "7b": 6_889_672_704,
}


@pytest.fixture(scope="module")
def published(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "dclm" / "dclm_recipes.json").read_text())


@pytest.mark.parametrize("recipe", SCALES)
def test_every_dclm_scale_has_the_published_numbers(recipe: str, published: dict[str, Any]) -> None:
    cfg, there = load_run(recipe), published[SCALES[recipe]]
    found = derived(cfg)
    assert found["n_params"] == PARAMETERS[SCALES[recipe].split("-")[0]]
    qk_norm = 2 * cfg.model.n_layers * cfg.model.n_heads * cfg.model.head_dim
    assert found["n_params"] - qk_norm == there["params"]
    assert found["total_tokens"] == there["total_tokens"]
    assert found["total_steps"] == there["steps"]
    assert cfg.global_batch_tokens == there["tokens_per_step"]
    assert cfg.global_batch == there["global_bs"]
    assert cfg.schedule.name == "cosine"
    assert cfg.schedule.warmup_steps == there["warmup"] and cfg.schedule.end_lr == there["cd"]
    optim = cfg.optim
    assert (optim.lr, optim.weight_decay) == (there["lr"], there["wd"])
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.95, 1e-8)
    assert optim.decay == "all" and optim.grad_clip == there["grad_clip"]
    assert cfg.loss.z_loss == there["z_loss"] and cfg.run.seed == there["seed"]
    pure_bf16 = "--fsdp-pure-bf16" in there["fsdp_flags"]
    assert cfg.parallel.reduce_dtype == ("bf16" if pure_bf16 else "fp32")


@pytest.mark.parametrize(
    ("trunk", "branches", "there"),
    [
        ("dclm_1b_v0_trunk", {"dclm_1b_v0_cooldown": "cooldown"}, "dclm-1b-v0"),
        (
            "dclm_7b_trunk",
            {"dclm_7b_cooldown_a": "cooldown_A", "dclm_7b_cooldown_b": "cooldown_B"},
            "dclm-7b",
        ),
    ],
)
def test_the_released_models_leave_their_trunk_at_the_rate_of_their_cooldowns(
    trunk: str, branches: dict[str, str], there: str, published: dict[str, Any]
) -> None:
    cfg, stage = load_run(trunk), published[there]["stage1"]
    assert cfg.schedule.length_tokens == stage["schedule_tokens"]
    assert (cfg.optim.lr, cfg.optim.weight_decay) == (stage["lr"], stage["wd"])
    assert cfg.schedule.end_lr == stage["cd"] and cfg.global_batch == stage["global_bs"]
    at_stop = lr_at(cfg.steps, cfg.steps, cfg.optim.lr, cfg.schedule_in_steps)
    for name, key in branches.items():
        branch, of = load_run(name), published[there][key]
        assert branch.optim.lr == of["lr"] == pytest.approx(at_stop, rel=1e-6)
        assert branch.total_tokens == of["tokens"] and branch.schedule.end_lr == of["cd"]
        assert branch.schedule.warmup_steps == of["warmup"]
        assert branch.loss.z_loss == of["z_loss"] and branch.run.seed == of.get("seed", 124)
        assert branch.optim.weight_decay == of["wd"] and branch.global_batch == of["global_bs"]
        assert branch.model.init_from.path == cfg.run.dir
        assert not branch.model.init_from.optimizer  # fresh, as there
        assert branch.model.architecture == cfg.model.architecture


def test_olmo_and_its_peers_have_the_settings_of_the_card() -> None:
    table = {
        # warm-up steps, peak, end, beta1, beta2, shape, rows, dtype of the gradients' sum
        "olmo_1b": (5000, 4e-4, 4e-5, 0.9, 0.95, "linear", 2048, "fp32"),
        "olmo_7b": (5000, 3e-4, 3e-5, 0.9, 0.95, "linear", 2160, "fp32"),
        "llama_2_7b": (2000, 3e-4, 3e-5, 0.9, 0.95, "cosine", 1024, "fp32"),
        "falcon_7b": (847, 6e-4, 1.2e-5, 0.99, 0.999, "cosine", 2304, "bf16"),  # 4B tokens
    }
    for name, (warmup, peak, end, beta1, beta2, shape, rows, dtype) in table.items():
        cfg = load_run(name)
        assert cfg.schedule_in_steps.warmup_steps == warmup
        assert (cfg.schedule.name, cfg.schedule.end_lr, cfg.optim.lr) == (shape, end, peak)
        assert (cfg.optim.beta1, cfg.optim.beta2, cfg.optim.eps) == (beta1, beta2, 1e-5)
        assert (cfg.optim.weight_decay, cfg.optim.grad_clip) == (0.1, 1.0)
        assert cfg.global_batch == rows and cfg.parallel.reduce_dtype == dtype
        assert 4e6 < cfg.global_batch_tokens < 5e6


def test_the_soup_in_the_recipes_is_of_the_cooldowns_and_what_the_long_context_starts_from() -> (
    None
):
    command = re.compile(r"openlm average (\S+) (\S+)=0\.8 (\S+)=0\.2")
    expected = tuple(f"runs/dclm_7b_{name}" for name in ("soup", "cooldown_b", "cooldown_a"))
    names = ["dclm_7b_cooldown_a", "dclm_7b_cooldown_b", "dclm_7b_8k"]
    texts = [(ROOT / "recipes" / f"{name}.yaml").read_text() for name in names]
    for text in [*texts, (ROOT / "docs" / "recipes.md").read_text()]:
        match = command.search(text)
        assert match is not None and match.groups() == expected
    assert load_run("dclm_7b_8k").model.init_from.path == expected[0]
    assert load_run("dclm_7b_cooldown_b").run.dir == expected[1]


def test_every_recipe_is_listed_in_the_docs() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    for name in RECIPES:
        assert f"`{name}`" in text, name


# --------------------------------------------------------------------------------------------
# scale: toy


def sources_of(name: str, data: str) -> list[str]:
    """Words that put the toy data where the recipe has its own."""
    cfg = load_run(name)
    words = [f"data.sources.{source}.path={data}/train" for source in cfg.data.sources]
    words += [f"data.val={{{name}: {data}/val}}" for name in cfg.data.val]
    return words or [f"data.train={data}/train"]


def toy_words(name: str, toy_recipe: Path, folder: Path, steps: int = 2) -> list[str]:
    cfg, data = load_run(name), str(toy_recipe.parent / "data")
    total = "total_steps" if cfg.total_steps else "total_tokens"
    size = steps if cfg.total_steps else steps * load_run(name, ["scale=toy"]).global_batch_tokens
    words = [name, "scale=toy", f"{total}={size}", f"run.dir={folder}"]
    # the data's vocabulary is small: so is the checkpoint
    words += ["model.vocab_size=304", "checkpoint.every_steps=1000"]
    words += sources_of(name, data)
    if cfg.data.train and cfg.data.val:
        words += [f"data.train={data}/train"]
    return words


# As another recipe but for its rates, sizes and lengths
ALIKE = {"dclm_411m_1x", "dclm_1b_5x", "dclm_3b_1x", "dclm_7b_1x", "dclm_7b_2x", "dclm_7b_trunk"}
ALIKE |= {"dclm_7b_cooldown_a", "dclm_7b_cooldown_b", "olmo_7b", "lawa_quickstart"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in ALIKE else []) for n in RECIPES]
)
def test_every_recipe_runs_for_two_steps_at_toy_size(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, name: str
) -> None:
    words = toy_words(name, toy_recipe, tmp_path / "run")
    log = tmp_path / "log.txt"
    init = load_run(name).model.init_from
    if init.path is not None:
        parent = [*toy_words(name, toy_recipe, tmp_path / "parent", 1), "model.init_from=null"]
        if init.layers is not None:
            parent += ["model.n_layers=2"]
        assert train_server.train(*parent, log=log)["codes"] == [0], log.read_text()
        words += [f"model.init_from.path={tmp_path / 'parent'}"]
    assert train_server.train(*words, log=log)["codes"] == [0], log.read_text()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2]
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert "scale" not in config.parse_yaml(written, "config.yaml")
    assert load_run(str(tmp_path / "run" / "config.yaml")) == load_run(words[0], words[1:])


@pytest.mark.parametrize("name", RECIPES)
def test_toy_changes_sizes_and_keeps_what_makes_the_recipe(name: str) -> None:
    full, toy = load_run(name), load_run(name, ["scale=toy"])
    assert toy.steps == STEPS and toy.model.n_layers <= LAYERS and toy.model.n_heads == HEADS
    assert toy.optim == full.optim and toy.loss == full.loss and toy.guard == full.guard
    assert toy.schedule.name == full.schedule.name and toy.schedule.end_lr == full.schedule.end_lr
    assert toy.model.vocab_size == full.model.vocab_size
    sizes = {"d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len"}
    ours, theirs = (config.to_plain(cfg.model.architecture) for cfg in (toy, full))
    assert {k for k in ours if ours[k] != theirs[k]} <= sizes
    for part in ("warmup_steps", "cooldown_steps", "length_steps"):
        here = (getattr(toy.schedule_in_steps, part) or 0) / toy.steps
        there = (getattr(full.schedule_in_steps, part) or 0) / full.steps
        assert abs(here - there) <= 1 / toy.steps
        assert bool(here) == bool(there)
    assert toy.run.dir == f"{full.run.dir}_toy"
    assert (toy.run.device, toy.parallel.precision, toy.parallel.compile) == ("cpu", "fp32", False)
    assert toy.data.paths == full.data.paths


def test_words_win_over_toy_and_shares_are_of_the_steps_that_they_ask_for() -> None:
    words = ["scale=toy", "total_steps=100", "model.d_model=32", "optim.lr=1"]
    cfg = load_run("quickstart", words)
    assert (cfg.steps, cfg.model.d_model, cfg.optim.lr) == (100, 32, 1.0)
    assert cfg.schedule.warmup_steps == round(100 * 30 / 340)
    assert cfg.schedule.cooldown_steps == round(100 * 85 / 340)
    assert load_run("quickstart", ["scale=null"]) == load_run("quickstart")


def test_a_batch_that_grows_does_so_at_toy_size(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    text = (ROOT / "recipes" / "quickstart.yaml").read_text()
    recipe.write_text(f"{text}\nbatch_warmup: {{start_tokens: 512, tokens: 150000}}\n")
    full, toy = load_run(str(recipe)), load_run(str(recipe), ["scale=toy"])
    for cfg in (full, toy):
        assert cfg.batch_at(0) * 4 == cfg.global_batch == cfg.batch_at(cfg.steps - 1)
    shares = [cfg.batch_sizes.warmup_steps / cfg.steps for cfg in (full, toy)]
    assert shares[0] == pytest.approx(shares[1], abs=2 / toy.steps)


def test_a_toy_branch_starts_from_the_toy_of_its_trunk() -> None:
    trunk, branch = (load_run(f"dclm_7b_{name}", ["scale=toy"]) for name in ("trunk", "cooldown_a"))
    assert branch.model.init_from.path == trunk.run.dir
    again = load_run("dclm_7b_8k", ["scale=toy", "model.init_from=runs/x@200"])
    assert again.model.init_from.path == "runs/x@200"  # a word is taken as it is


def test_scale_may_stand_in_a_recipe_and_is_toy_or_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    text = (ROOT / "recipes" / "quickstart.yaml").read_text()
    recipe.write_text(f"{text}\nscale: toy\n")
    assert load_run(str(recipe)) == load_run("quickstart", ["scale=toy"])
    assert load_run(str(recipe), ["scale=null"]) == load_run("quickstart")
    for wrong in ("small", "{a: 1}", "3"):
        with pytest.raises(InputError, match="must be toy"):
            load_run("quickstart", [f"scale={wrong}"])
    recipe.write_text("scale: toy\nrun: {dir: x}\n")
    with pytest.raises(InputError, match="whole by itself"):
        load_run(str(recipe))


# --------------------------------------------------------------------------------------------
# What is printed and drawn of a recipe


def test_config_prints_what_dclm_publishes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "recipes/dclm_1b_1x.yaml"]) == 0
    text = capsys.readouterr().out
    for line in ("total_tokens: 28,795,904,000", "total_steps: 54,923", "n_params: 1,439,893,504"):
        assert f"# {line}\n" in text


def test_schedules_of_several_recipes_are_drawn_over_each_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "lr.svg"
    words = ["dclm_7b_trunk", "quickstart", "schedule.warmup_steps=5", "olmo_1b"]
    assert main(["plot", "--schedule", *words, "--out", str(picture)]) == 0
    assert capsys.readouterr().out.strip() == str(picture)
    assert "quickstart schedule.warmup_steps=5" in picture.read_text()
    assert main(["plot", "--schedule", "optim.lr=1", "quickstart"]) == 2
    assert "stands before any recipe" in capsys.readouterr().err
    assert main(["plot", "--schedule", "quickstart", "--out", "lr.gif"]) == 2


@pytest.mark.parametrize("name", ["dclm_7b_trunk", "quickstart", "dclm_1b_1x"])
def test_the_drawn_points_have_the_bends_and_the_rates_of_the_run(name: str) -> None:
    cfg = load_run(name)
    points = dict(schedule_points(cfg))
    schedule = cfg.schedule_in_steps
    bends = {0, schedule.warmup_steps, cfg.steps - 1, cfg.steps - schedule.cooldown_steps - 1}
    for step in bends:
        rate = lr_at(step, cfg.steps, cfg.optim.lr, schedule)
        assert points[cfg.tokens_at(step)] == rate
    assert max(points.values()) == cfg.optim.lr and len(points) < 2100
