"""The averages of a recipe: which, how often, and what share of each the weights take.

An average begins as the weights after step `start_step`. Its update t = 1, 2, … comes
t * every_steps optimizer steps later: a <- a + share * (w - a), with

    ema    share = 1 - min(decay, 1 - (1 + steps since the beginning)^(-warmup_power))
    poly   share = (eta + 1) / (eta + t)           (arXiv:1212.1824, eq. 10; OpenLM's poly_ETA_FREQ)
    lawa   the plain mean of the weights at the `snapshots` latest updates    (arXiv:2306.03241)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

KINDS = ("ema", "poly", "lawa")

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NEEDED = {"ema": ("decay",), "poly": ("eta",), "lawa": ("snapshots",)}
_OPTIONAL = {"ema": ("warmup_power",), "poly": (), "lawa": ()}


@dataclass(frozen=True)
class AverageConfig:
    """One average of a run. The fields of another kind stay null."""

    kind: Literal["ema", "poly", "lawa"]
    every_steps: int = 1
    """optimizer steps from one update to the next"""
    start_step: int = 0
    """it begins as the weights after this step"""
    decay: float | None = None
    """ema: what stays of the average at an update; in [0, 1)"""
    warmup_power: float | None = None
    """ema: holds the decay down at the beginning; above 0, null: not"""
    eta: float | None = None
    """poly: 0 is the mean of all weights so far, more of it favours the latest; at least 0"""
    snapshots: int | None = None
    """lawa: how many are averaged, and kept in memory; at least 2"""

    @property
    def copies(self) -> int:
        """Copies of the weights that it keeps."""
        return self.snapshots or 1

    def share(self, update: int, steps: int) -> float:
        """Of the weights in the average after `update` (from 1), `steps` after its beginning.

        For ema and poly; pure.
        """
        if self.kind == "poly":
            assert self.eta is not None
            return (self.eta + 1) / (self.eta + update)
        assert self.decay is not None
        if self.warmup_power is None:
            return 1 - self.decay
        return 1 - min(self.decay, 1 - (1 + steps) ** -self.warmup_power)


def check_averages(
    averages: Mapping[str, AverageConfig], total_steps: int, validations: Iterable[str]
) -> list[str]:
    """What is wrong with these; `validations` are the names of the validation sources."""
    problems = []
    for name, cfg in averages.items():
        problems += [f"averages.{name}{problem}" for problem in _problems(name, cfg)]
        if 0 < total_steps <= cfg.start_step:
            problems.append(
                f"averages.{name}: start_step = {cfg.start_step}, but the run has {total_steps} "
                "steps: it would never begin"
            )
    taken = {f"{source}/{name}" for source in validations for name in averages}
    problems += [
        f"data.val.{name}: is also what an average is called in val/{name}/loss; rename one"
        for name in sorted(taken.intersection(validations))
    ]
    return problems


def _problems(name: str, cfg: AverageConfig) -> Iterator[str]:
    if not _NAME.fullmatch(name):
        yield ": names are made of letters, digits, _ and - (they stand in checkpoints and metrics)"
    needed = _NEEDED[cfg.kind]
    for field in ("decay", "warmup_power", "eta", "snapshots"):
        value = getattr(cfg, field)
        if value is None and field in needed:
            yield f".{field}: missing; kind {cfg.kind} needs it"
        elif value is not None and field not in (*needed, *_OPTIONAL[cfg.kind]):
            yield f".{field} = {value}: kind {cfg.kind} has no such field; leave it out"
    for field, least in (("every_steps", 1), ("start_step", 0), ("eta", 0), ("snapshots", 2)):
        value = getattr(cfg, field)
        if value is not None and value < least:
            yield f".{field} = {value}, must be at least {least}"
    if cfg.decay is not None and not 0 <= cfg.decay < 1:
        yield f".decay = {cfg.decay}, must be in [0, 1)"
    if cfg.warmup_power is not None and not cfg.warmup_power > 0:
        yield f".warmup_power = {cfg.warmup_power}, must be above 0"
