"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from openlm_lite.errors import InputError


@dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, main part, cooldown. Steps are optimizer steps; rates are absolute, not shares.

    ::

        lr ┤    ╭──────╮ cosine (or constant)
           │   ╱        ╲___ end_lr, not under floor_lr
           │  ╱ warm-up     ╲ cooldown to end_lr
           └─┴──────────────┴──── step

    `cosine` falls from the peak to `end_lr` over all steps after the warm-up. `cosine_cooldown`
    follows that cosine and, over the last `cooldown_steps`, goes from where it then stands down
    to `end_lr`, on the curve of `cooldown_power`. `constant_cooldown` does so from the peak.
    """

    name: Literal["cosine", "cosine_cooldown", "constant", "constant_cooldown", "linear"] = "cosine"
    warmup_steps: int = 0
    end_lr: float = 0.0
    floor_lr: float = 0.0
    """the main part does not go under this (OpenLM's force-min-lr); warm-up and cooldown may"""
    cooldown_steps: int = 0
    cooldown_power: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if self.warmup_steps < 0:
            problems.append(f"warmup_steps = {self.warmup_steps}, must not be negative")
        if self.end_lr < 0 or self.floor_lr < 0:
            problems.append("end_lr and floor_lr must not be negative")
        if self.cooldown_power <= 0:
            problems.append(f"cooldown_power = {self.cooldown_power}, must be positive")
        cools = self.name.endswith("_cooldown")
        if cools and self.cooldown_steps < 1:
            problems.append(f"name = {self.name} needs cooldown_steps of at least 1")
        if not cools and self.cooldown_steps:
            problems.append(
                f"cooldown_steps = {self.cooldown_steps} has no meaning for name = {self.name}; "
                f"use cosine_cooldown or constant_cooldown"
            )
        if problems:
            raise InputError("schedule: " + "; ".join(problems))

    def check_length(self, total_steps: int) -> None:
        """Raises InputError where warm-up and cooldown do not fit into the run."""
        needed = self.warmup_steps + self.cooldown_steps
        if needed > total_steps:
            raise InputError(
                f"schedule: warmup_steps {self.warmup_steps} + cooldown_steps "
                f"{self.cooldown_steps} = {needed} are more than the run's {total_steps} steps; "
                "shorten them or train longer"
            )


def lr_at(step: int, total_steps: int, peak: float, cfg: ScheduleConfig) -> float:
    """Learning rate of the zero-based `step`; beyond the last step it stays at the last value.

    Warm-up: peak (s + 1) / W. Cosine, e = s - W, E = S - W:
    end + (1 + cos(pi e / E)) / 2 (peak - end). Cooldown from step C = S - cooldown_steps:
    end + (start - end) (1 - (s - C) / cooldown_steps)^power (OpenLM's formulas; unlike there the
    tail is clamped: neither does the cosine rise again nor the cooldown go under its end).
    """
    step = max(0, min(step, total_steps))
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    start = total_steps - cfg.cooldown_steps
    if cfg.name.endswith("_cooldown") and step >= start:
        left = 1.0 - (step - start) / cfg.cooldown_steps
        top = _main_part(max(start, cfg.warmup_steps), total_steps, peak, cfg)
        return cfg.end_lr + (top - cfg.end_lr) * left**cfg.cooldown_power
    return _main_part(step, total_steps, peak, cfg)


def _main_part(step: int, total_steps: int, peak: float, cfg: ScheduleConfig) -> float:
    if cfg.name.startswith("constant"):
        return max(peak, cfg.floor_lr)
    done = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
    share = 1.0 - done if cfg.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return max(cfg.end_lr + share * (peak - cfg.end_lr), cfg.floor_lr)
