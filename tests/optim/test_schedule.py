"""The learning rate: OpenLM's numbers, and what holds for every schedule."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_lite.errors import InputError
from openlm_lite.optim.schedule import ScheduleConfig, lr_at


def from_openlm(fn: str, args: dict[str, float]) -> tuple[ScheduleConfig, int]:
    name = {"cosine_lr": "cosine", "const_lr": "constant", "const_lr_cooldown": "constant_cooldown"}
    cfg = ScheduleConfig(
        name=name[fn],  # type: ignore[arg-type]
        warmup_steps=int(args["warmup_length"]),
        end_lr=args.get("min_lr", args.get("cooldown_end_lr", 0.0)),
        floor_lr=args.get("force_min_lr", 0.0),
        cooldown_steps=int(args.get("cooldown_steps", 0)),
        cooldown_power=args.get("cooldown_power", 1.0),
    )
    return cfg, int(args.get("steps", 10**9))


def test_every_step_before_the_end_equals_openlm(shared_data: Path) -> None:
    cases = json.loads((shared_data / "openlm" / "schedules.json").read_text())["cases"]
    assert len(cases) == 11
    for case in cases:
        cfg, steps = from_openlm(case["fn"], case["args"])
        for step, expected in enumerate(case["lr"][:steps]):
            found = lr_at(step, steps, case["args"]["base_lr"], cfg)
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-18), (case["args"], step)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleConfig, int, float]:
    total = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, total))
    name = draw(st.sampled_from(NAMES))
    cools = name.endswith("cooldown")
    if cools and warmup == total:
        warmup -= 1
    cooldown = draw(st.integers(1, total - warmup)) if cools else 0
    peak = draw(st.floats(1e-5, 1e-1))
    end = draw(st.floats(0, 1)) * peak
    power = draw(st.sampled_from([0.5, 1.0, 2.0]))
    return ScheduleConfig(name, warmup, end, 0.0, cooldown, power), total, peak  # type: ignore


NAMES = ["cosine", "cosine_cooldown", "constant", "constant_cooldown", "linear"]


@settings(max_examples=150, deadline=None)
@given(case=schedules())
def test_bounded_rising_then_falling_and_clamped(case: tuple[ScheduleConfig, int, float]) -> None:
    cfg, total, peak = case
    rates = [lr_at(step, total, peak, cfg) for step in range(total + 1)]
    slack = 1e-12 * peak
    assert all(0 < rate <= peak + slack for rate in rates[:-1])
    warmup = rates[: cfg.warmup_steps]
    assert warmup == sorted(warmup)
    after = rates[cfg.warmup_steps :]
    assert all(a >= b - slack for a, b in itertools.pairwise(after))
    assert all(rate >= cfg.end_lr - slack for rate in after)
    if cfg.name != "constant" and cfg.warmup_steps < total:
        assert rates[total] == pytest.approx(cfg.end_lr, abs=slack)
    assert lr_at(total + 1000, total, peak, cfg) == rates[total]


@settings(max_examples=60, deadline=None)
@given(case=schedules())
def test_no_jumps_where_the_parts_meet(case: tuple[ScheduleConfig, int, float]) -> None:
    """Ten times as many steps make each move about ten times smaller (power >= 1)."""
    cfg, _, peak = case
    if cfg.cooldown_power < 1:
        return  # a root falls with infinite slope at its end
    fine = ScheduleConfig(
        cfg.name, 1000, cfg.end_lr, 0.0, 2000 if cfg.cooldown_steps else 0, cfg.cooldown_power
    )
    rates = [lr_at(step, 6000, peak, fine) for step in range(6001)]
    moves = [abs(a - b) for a, b in itertools.pairwise(rates)]
    assert max(moves) <= peak * 2e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cosine_cooldown"}, "needs cooldown_steps of at least 1"),
        ({"name": "cosine", "cooldown_steps": 5}, "has no meaning for name = cosine"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"cooldown_power": 0.0}, "must be positive"),
    ],
)
def test_senseless_schedules_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScheduleConfig(**arguments)  # type: ignore[arg-type]


def test_a_warmup_and_cooldown_longer_than_the_run_are_refused() -> None:
    cfg = ScheduleConfig("constant_cooldown", warmup_steps=60, cooldown_steps=50)
    with pytest.raises(InputError, match="110 are more than the run's 100 steps"):
        cfg.check_length(100)
