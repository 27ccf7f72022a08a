"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from openlm_lite.errors import InputError

_SHAPED_BY_LENGTH = ("cosine", "cosine_cooldown", "linear")  # the others go on as long as they may


@dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, main part, cooldown. Steps are optimizer steps; rates are absolute, not shares.

    ::

        lr ┤    ╭──────╮ cosine, linear, inverse_sqrt or constant
           │   ╱        ╲___ end_lr, not under floor_lr
           │  ╱ warm-up     ╲ cooldown to end_lr
           └─┴──────────────┴──── step

    `cosine` and `linear` fall from the peak to `end_lr` over all steps after the warm-up.
    `inverse_sqrt` falls with 1 / sqrt(step) (Vaswani et al., arXiv:1706.03762, section 5.3).
    The `…_cooldown` names follow the main part and, over the last `cooldown_steps` of the run, go
    from where it then stands down to `end_lr`. With a length the main part is that of a longer
    run, which this one leaves early::

        lr ┤  ╭────╮
           │ ╱      ╲·
           │╱        ╲ ·  ·  main part of `length_steps`
           └──────────┴─────·──── step
                 end of the run
    """

    name: Literal[
        "cosine",
        "cosine_cooldown",
        "constant",
        "constant_cooldown",
        "linear",
        "inverse_sqrt",
        "inverse_sqrt_cooldown",
    ] = "cosine"
    warmup_steps: int = 0
    end_lr: float = 0.0
    floor_lr: float = 0.0
    """the main part does not go under this (OpenLM's force-min-lr); warm-up and cooldown may"""
    cooldown_steps: int = 0
    cooldown_power: float = 1.0
    cooldown_shape: Literal["power", "linear", "cosine"] = "power"
    warmup_tokens: int | None = None
    """instead of the steps: the whole steps that fit into these tokens"""
    cooldown_tokens: int | None = None
    """instead of the steps: of the run's last tokens, up to whole steps"""
    length_steps: int | None = None
    """of the whole schedule, where the run ends before it; null: of the run"""
    length_tokens: int | None = None
    """instead of the steps"""

    def __post_init__(self) -> None:
        problems = [*self._bad_values(), *self._misfits()]
        if problems:
            raise InputError("schedule: " + "; ".join(problems))

    def _bad_values(self) -> list[str]:
        problems = []
        if self.warmup_steps < 0:
            problems.append(f"warmup_steps = {self.warmup_steps}, must not be negative")
        if self.cooldown_steps < 0:
            problems.append(f"cooldown_steps = {self.cooldown_steps}, must not be negative")
        if self.end_lr < 0 or self.floor_lr < 0:
            problems.append("end_lr and floor_lr must not be negative")
        if self.cooldown_power <= 0:
            problems.append(f"cooldown_power = {self.cooldown_power}, must be positive")
        for name in ("warmup_tokens", "cooldown_tokens", "length_steps", "length_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} = {value}, must be at least 1 (or null)")
        return problems

    def _misfits(self) -> list[str]:
        """What is right by itself, but not beside the rest."""
        problems = [
            f"{part}_steps = {steps} and {part}_tokens = {tokens} are both given; give one of them"
            for part in ("warmup", "cooldown", "length")
            if (steps := getattr(self, f"{part}_steps"))
            and (tokens := getattr(self, f"{part}_tokens")) is not None
        ]
        given = [f for f in ("cooldown_steps", "cooldown_tokens") if getattr(self, f)]
        if self.cools and not given:
            problems.append(
                f"name = {self.name} needs cooldown_steps of at least 1, or cooldown_tokens"
            )
        if not self.cools and given:
            problems.append(
                f"{given[0]} = {getattr(self, given[0])} has no meaning for name = {self.name}; "
                "use a name that ends in _cooldown"
            )
        if self.cooldown_shape != "power" and self.cooldown_power != 1:
            problems.append(
                f"cooldown_power = {self.cooldown_power} is of cooldown_shape = power, not of "
                f"{self.cooldown_shape}"
            )
        if self.name not in _SHAPED_BY_LENGTH and (self.length_steps or self.length_tokens):
            problems.append(
                f"a length has no meaning for name = {self.name}, which is the same in a longer "
                f"run; it is for {', '.join(_SHAPED_BY_LENGTH)}"
            )
        return problems

    @property
    def cools(self) -> bool:
        return self.name.endswith("_cooldown")

    def in_steps(self, steps_for: Callable[[int], int], trained_tokens: int) -> ScheduleConfig:
        """This schedule with every length in steps, for a run of `trained_tokens`.

        steps_for: the whole steps that so many tokens from the start of the run make. A cooldown
        is counted from the run's end, and has at least its tokens.
        Raises InputError for less than one step, and for a cooldown of more tokens than the run's.
        """
        steps: dict[str, int] = {}
        if self.warmup_tokens is not None:
            steps["warmup_steps"] = steps_for(self.warmup_tokens)
        if self.length_tokens is not None:
            steps["length_steps"] = steps_for(self.length_tokens)
        problems = [
            f"{name}_tokens = {getattr(self, f'{name}_tokens')} is less than one step"
            for name in ("warmup", "length")
            if steps.get(f"{name}_steps") == 0
        ]
        if self.cooldown_tokens is not None:
            before = trained_tokens - self.cooldown_tokens
            if before < 0:
                problems.append(
                    f"cooldown_tokens = {self.cooldown_tokens} are more than the run's "
                    f"{trained_tokens} tokens; shorten the cooldown or train longer"
                )
            steps["cooldown_steps"] = steps_for(trained_tokens) - steps_for(max(0, before))
        if problems:
            raise InputError("schedule: " + "; ".join(problems))
        if not steps:
            return self
        return replace(self, warmup_tokens=None, cooldown_tokens=None, length_tokens=None, **steps)

    def check_length(self, total_steps: int) -> None:
        """Raises InputError where warm-up and cooldown do not fit into the run. All in steps."""
        needed = self.warmup_steps + self.cooldown_steps
        if needed > total_steps:
            raise InputError(
                f"schedule: warmup_steps {self.warmup_steps} + cooldown_steps "
                f"{self.cooldown_steps} = {needed} are more than the run's {total_steps} steps; "
                "shorten them or train longer"
            )
        if self.length_steps is not None and self.length_steps < total_steps:
            raise InputError(
                f"schedule: a length of {self.length_steps} steps is shorter than the run's "
                f"{total_steps}; make it at least as long, or leave it out"
            )


def lr_at(step: int, total_steps: int, peak: float, cfg: ScheduleConfig) -> float:
    """Learning rate of the zero-based `step`; beyond the last step it stays at the last value.

    Warm-up: peak (s + 1) / W. Main part, with e = s - W and E = L - W, L the length of the
    schedule (S steps of the run where none is given): cosine end + (1 + cos(pi e / E)) / 2
    (peak - end), linear end + (1 - e / E) (peak - end), inverse square root
    peak sqrt(W / (s + 1)). Cooldown from step C = S - cooldown_steps, with x = (s - C) /
    cooldown_steps: end + (start - end) f(x), f = (1 - x)^power, 1 - x or (1 + cos(pi x)) / 2.
    (OpenLM's formulas where it has the shape; unlike there the tail is clamped: neither does the
    cosine rise again nor the cooldown go under its end.)
    """
    if (cfg.warmup_tokens, cfg.cooldown_tokens, cfg.length_tokens) != (None, None, None):
        raise ValueError("the schedule has lengths in tokens; ask in_steps() first")
    step = max(0, min(step, total_steps))
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    start = total_steps - cfg.cooldown_steps
    length = cfg.length_steps or total_steps
    if cfg.cools and step >= start:
        top = _main_part(max(start, cfg.warmup_steps), length, peak, cfg)
        left = _left_of_cooldown((step - start) / cfg.cooldown_steps, cfg)
        return cfg.end_lr + (top - cfg.end_lr) * left
    return _main_part(step, length, peak, cfg)


def _main_part(step: int, length: int, peak: float, cfg: ScheduleConfig) -> float:
    if cfg.name.startswith("constant"):
        return max(peak, cfg.floor_lr)
    warmup = cfg.warmup_steps
    if cfg.name.startswith("inverse_sqrt"):
        return max(peak * math.sqrt(max(1, warmup) / (step + 1)), cfg.end_lr, cfg.floor_lr)
    done = (step - warmup) / max(1, length - warmup)
    share = 1.0 - done if cfg.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return max(cfg.end_lr + share * (peak - cfg.end_lr), cfg.floor_lr)


def _left_of_cooldown(done: float, cfg: ScheduleConfig) -> float:
    """Share of the way down that is still to go, 1 to 0."""
    if cfg.cooldown_shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return (1.0 - done) ** cfg.cooldown_power
