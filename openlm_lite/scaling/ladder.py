"""A ladder: the grid of small runs that a scaling law is fitted to, planned for a compute budget.

::

    LADDER.yaml   recipe:       what all runs share            rung  M = 4   8   16
                  rungs:        shapes, each with its batch     s      ■   ■   ■
                  multipliers:  tokens per parameter            m      ■   ■
                  target:       the run to be predicted         l      ■             … target

    every ■ is a plain recipe; FLOPs are 6 N D
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from openlm_lite import config
from openlm_lite.config import ConfigError, Tree, Value
from openlm_lite.errors import InputError
from openlm_lite.model.config import ModelConfig
from openlm_lite.run import RunConfig, with_base_model
from openlm_lite.scaling.laws import check_number, check_spread

TARGET_NAME = "target"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# What the plan sets: a recipe that has it too would be overruled without a word.
_SET_HERE = ("run.dir", "total_steps", "total_tokens", "global_batch_tokens")
_SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's size, and how it is trained."""

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int | None = None
    """null: as wide, for its d_model, as in the base architecture; a multiple of 8"""
    global_batch_tokens: int
    warmup_steps: int
    lr: float | None = None
    """null: optim.lr of the recipe"""

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise InputError(
                f"d_model = {self.d_model} is not a multiple of n_heads = {self.n_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class Rung(Shape):
    """A size of the grid."""

    multipliers: tuple[float, ...] | None = None
    """tokens per parameter; null: the ladder's"""


@dataclass(frozen=True, kw_only=True)
class Target(Shape):
    """The run that the grid is to predict."""

    multiplier: float


@dataclass(frozen=True)
class Ladder:
    """A LADDER.yaml without its recipe."""

    rungs: dict[str, Rung]
    target: Target
    multipliers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        found = [
            f"rungs.{name}: a name has letters, digits, _ and -, and is not {TARGET_NAME}"
            for name in self.rungs
            if not _NAME.fullmatch(name) or name == TARGET_NAME
        ]
        for name, rung in self.rungs.items():
            multipliers = self.multipliers_of(rung)
            if not multipliers:
                found.append(f"rungs.{name}: give multipliers, here or for the whole ladder")
            if any(m <= 0 for m in multipliers):
                found.append(f"rungs.{name}.multipliers = {list(multipliers)}: must be above 0")
        if self.target.multiplier <= 0:
            found.append(f"target.multiplier = {self.target.multiplier}: must be above 0")
        if found:
            raise ConfigError(found)

    def multipliers_of(self, rung: Rung) -> tuple[float, ...]:
        """The tokens per parameter at which a rung is trained."""
        return self.multipliers if rung.multipliers is None else rung.multipliers


@dataclass(frozen=True)
class PlannedRun:
    """One run of the plan."""

    name: str
    cfg: RunConfig
    recipe: str
    """YAML"""
    is_target: bool = False

    @property
    def N(self) -> int:
        """Parameters, as the laws count them."""
        return count_params(self.cfg.model.architecture)

    @property
    def D(self) -> int:
        """Tokens, in whole steps."""
        return self.cfg.tokens_at(self.cfg.steps)

    @property
    def flops(self) -> float:
        return 6.0 * self.N * self.D


@dataclass(frozen=True)
class Plan:
    """The runs of a ladder, cheapest first, and the target."""

    name: str
    runs: list[PlannedRun]
    target: PlannedRun


def count_params(model: ModelConfig) -> int:
    """N of arXiv:2403.08540: all parameters with the embeddings, without the gains of qk-norm."""
    return dataclasses.replace(model, qk_norm="none").n_params


def plan_ladder(source: str, out: str, budget: float | None = None) -> Plan:
    """The plan of a LADDER.yaml (path, or name of a shipped one), with its run folders in `out`.

    Raises InputError for mistakes in the file, and where the grid, without the target, needs more
    than `budget` FLOPs: it names what fits.
    """
    path = config.find_file(source, "recipes", ".yaml")
    tree = config.load_tree(path)
    recipe = tree.pop("recipe", None)
    if not isinstance(recipe, dict):
        raise InputError(
            f"{path}: no `recipe:` section with what all runs share; a ladder has recipe, rungs, "
            "multipliers and target"
        )
    _refuse_what_is_set_here(recipe, str(path))
    ladder = config.decode(Ladder, tree)
    base = _base_model(recipe)
    problems: list[str] = []
    runs = [
        _planned(f"{name}_{m:g}x", rung, m, recipe, base, out, problems)
        for name, rung in ladder.rungs.items()
        for m in ladder.multipliers_of(rung)
    ]
    target = ladder.target
    last = _planned(TARGET_NAME, target, target.multiplier, recipe, base, out, problems)
    if problems or last is None:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    grid = sorted((run for run in runs if run is not None), key=lambda run: run.flops)
    _check_grid(grid, str(path))
    if budget is not None:
        _check_budget(grid, budget)
    return Plan(path.stem, grid, dataclasses.replace(last, is_target=True))


def _refuse_what_is_set_here(recipe: Tree, path: str) -> None:
    flat = config.flatten(_plain(recipe)).keys()
    names = (*_SET_HERE, *(f"model.{size}" for size in _SIZES), "schedule.warmup_steps")
    given = [name for name in names if name in flat]
    if given:
        raise InputError(
            f"{path}: recipe: {', '.join(given)}: follows from the rungs; take it out there"
        )


def _base_model(recipe: Tree) -> ModelConfig:
    node = with_base_model(recipe).get("model", {})
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    # a name that is wrong here is found again, and said, when the recipes are decoded
    own = {k: v for k, v in node.items() if k in fields} if isinstance(node, dict) else {}
    return config.decode(ModelConfig, own)


def _planned(
    name: str,
    shape: Shape,
    multiplier: float,
    recipe: Tree,
    base: ModelConfig,
    out: str,
    problems: list[str],
) -> PlannedRun | None:
    """One run; what is wrong with it goes to `problems`."""
    try:
        sizes = _sizes(shape, base)
        architecture = dataclasses.replace(base, **sizes)
        tokens = multiplier * count_params(architecture)
        settings: dict[str, Any] = {
            "run": {"dir": f"{out}/{name}"},
            "model": sizes,
            "global_batch_tokens": shape.global_batch_tokens,
            "total_steps": max(1, round(tokens / max(1, shape.global_batch_tokens))),
            "schedule": {"warmup_steps": shape.warmup_steps},
        }
        if shape.lr is not None:
            settings["optim"] = {"lr": shape.lr}
        tree = config.merge(recipe, config.to_tree(settings, name))
        cfg = config.decode(RunConfig, with_base_model(tree))
    except ConfigError as e:
        problems += [f"{name}: {problem}" for problem in e.problems]
        return None
    except InputError as e:
        problems.append(f"{name}: {e}")
        return None
    return PlannedRun(name, cfg, config.dump_yaml(_plain(tree)))


def _sizes(shape: Shape, base: ModelConfig) -> dict[str, int]:
    """The fields of the architecture that a shape decides."""
    grouped = base.n_heads // base.n_kv_heads  # query heads per key/value head
    multi_query = base.n_kv_heads == 1 and base.n_heads > 1
    if not multi_query and shape.n_heads % grouped:
        raise InputError(
            f"n_heads = {shape.n_heads} is not a multiple of {grouped}, the base's query heads per "
            "key/value head"
        )
    d_ff = shape.d_ff or max(8, round(base.d_ff / base.d_model * shape.d_model / 8) * 8)
    return {
        "d_model": shape.d_model,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_kv_heads": 1 if multi_query else shape.n_heads // grouped,
        "head_dim": shape.d_model // shape.n_heads,
        "d_ff": d_ff,
    }


def _plain(tree: Tree) -> dict[str, Any]:
    """A tree without its origins."""
    return {k: v.value if isinstance(v, Value) else _plain(v) for k, v in tree.items()}


def _check_grid(grid: list[PlannedRun], path: str) -> None:
    """Raises InputError where the grid could not be fitted, however the losses come out."""
    seen: dict[tuple[int, int], str] = {}
    for run in grid:
        other = seen.setdefault((run.N, run.D), run.name)
        if other != run.name:
            raise InputError(f"{path}: {other} and {run.name} are one run: N {run.N}, D {run.D}")
    try:
        check_number("over-training", ("E", "a", "b", "eta"), len(grid))
        check_spread(np.array([float(r.N) for r in grid]), np.array([float(r.D) for r in grid]))
    except InputError as e:
        raise InputError(f"{path}: {e}") from None


def _check_budget(grid: list[PlannedRun], budget: float) -> None:
    total = sum(run.flops for run in grid)
    if not budget > 0:
        raise InputError(f"--budget {budget:g}: must be above 0, in FLOPs")
    if total <= budget:
        return
    fits, spent = [], 0.0
    for run in grid:
        if spent + run.flops <= budget:
            fits.append(run.name)
            spent += run.flops
    raise InputError(
        f"--budget {budget:.3g}: the {len(grid)} runs of the grid need {total:.3g} FLOPs; "
        + (f"{', '.join(fits)} fit ({spent:.3g})" if fits else f"not even {grid[0].name} fits")
        + "; take rungs or multipliers out of the file, or raise the budget"
    )
