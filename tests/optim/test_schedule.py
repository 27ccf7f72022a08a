"""The learning rate: OpenLM's numbers, and what holds for every schedule."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
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


def test_the_parts_that_openlm_has_no_function_for_have_its_values_where_they_meet() -> None:
    """Linear, inverse square root and the cosine-shaped cooldown, by formulas of their own."""
    linear = ScheduleConfig("linear", warmup_steps=10, end_lr=0.2)
    assert lr_at(55, 100, 1.0, linear) == pytest.approx(0.6, rel=1e-12)  # half the way down
    # Vaswani et al.: d^-0.5 min(s^-0.5, s W^-1.5) with s from 1, whose peak is d^-0.5 W^-0.5
    noam = ScheduleConfig("inverse_sqrt", warmup_steps=40)
    for step in range(400):
        s = step + 1
        expected = min(s**-0.5, s * 40**-1.5) / 40**-0.5
        assert lr_at(step, 400, 1.0, noam) == pytest.approx(expected, rel=1e-12)
    shaped = ScheduleConfig("constant_cooldown", cooldown_steps=10, cooldown_shape="cosine")
    found = [lr_at(s, 20, 1.0, shaped) for s in range(21)]
    assert found[:10] == [1.0] * 10 and found[20] == 0
    assert found[15] == pytest.approx(0.5) and found[12] == pytest.approx(0.904508497187)


def test_linear_is_the_first_power() -> None:
    one = ScheduleConfig("cosine_cooldown", cooldown_steps=7, end_lr=1e-3)
    other = ScheduleConfig(
        "cosine_cooldown", cooldown_steps=7, end_lr=1e-3, cooldown_shape="linear"
    )
    for step in range(31):
        assert lr_at(step, 30, 1.0, one) == lr_at(step, 30, 1.0, other)


NAMES = ["cosine", "cosine_cooldown", "constant", "constant_cooldown", "linear"]
NAMES += ["inverse_sqrt", "inverse_sqrt_cooldown"]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleConfig, int, float]:
    total = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, total))
    name = draw(st.sampled_from(NAMES))
    cools = name.endswith("cooldown")
    if cools and warmup == total:
        warmup -= 1
    peak = draw(st.floats(1e-5, 1e-1))
    shape = draw(st.sampled_from(["power", "linear", "cosine"]))
    longer = name in ("cosine", "cosine_cooldown", "linear") and draw(st.booleans())
    cfg = ScheduleConfig(
        name,  # type: ignore[arg-type]
        warmup,
        end_lr=draw(st.floats(0, 1)) * peak,
        cooldown_steps=draw(st.integers(1, total - warmup)) if cools else 0,
        cooldown_power=draw(st.sampled_from([0.5, 1.0, 2.0])) if shape == "power" else 1.0,
        cooldown_shape=shape,  # type: ignore[arg-type]
        length_steps=total + draw(st.integers(0, 300)) if longer else None,
    )
    return cfg, total, peak


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
    ends_there = cfg.cools or cfg.name in ("cosine", "linear")
    left_early = not cfg.cools and (cfg.length_steps or total) > total
    if ends_there and not left_early and cfg.warmup_steps < total:
        assert rates[total] == pytest.approx(cfg.end_lr, abs=slack)
    assert lr_at(total + 1000, total, peak, cfg) == rates[total]


@settings(max_examples=60, deadline=None)
@given(case=schedules())
def test_no_jumps_where_the_parts_meet(case: tuple[ScheduleConfig, int, float]) -> None:
    """Ten times as many steps make each move about ten times smaller (power >= 1)."""
    cfg, _, peak = case
    if cfg.cooldown_power < 1:
        return  # a root falls with infinite slope at its end
    fine = replace(
        cfg,
        warmup_steps=1000,
        cooldown_steps=2000 if cfg.cooldown_steps else 0,
        length_steps=cfg.length_steps and 9000,
    )
    rates = [lr_at(step, 6000, peak, fine) for step in range(6001)]
    moves = [abs(a - b) for a, b in itertools.pairwise(rates)]
    assert max(moves) <= peak * 2e-3


@settings(max_examples=60, deadline=None)
@given(case=schedules(), extra=st.integers(0, 200))
def test_a_run_that_leaves_a_schedule_early_has_its_rates_until_then(
    case: tuple[ScheduleConfig, int, float], extra: int
) -> None:
    """Before any cooldown, the rate is that of the run which goes to the schedule's end."""
    cfg, total, peak = case
    length = cfg.length_steps or total + extra
    plain = replace(cfg, name=cfg.name.removesuffix("_cooldown"), cooldown_steps=0)  # type: ignore
    plain = replace(plain, cooldown_power=1.0, cooldown_shape="power", length_steps=None)
    early = cfg if cfg.name not in ("cosine", "cosine_cooldown", "linear") else None
    early = early or replace(cfg, length_steps=length)
    for step in range(total - early.cooldown_steps):
        assert lr_at(step, total, peak, early) == lr_at(step, length, peak, plain)


@given(case=schedules(), batch=st.integers(1, 1000), part=st.integers(0, 999))
def test_lengths_in_tokens_are_those_in_steps(
    case: tuple[ScheduleConfig, int, float], batch: int, part: int
) -> None:
    cfg, total, _ = case
    part %= batch  # tokens that make no whole step
    tokens = replace(
        cfg,
        warmup_steps=0,
        warmup_tokens=cfg.warmup_steps * batch + part if cfg.warmup_steps else None,
        cooldown_steps=0,
        cooldown_tokens=cfg.cooldown_steps * batch - part if cfg.cooldown_steps else None,
        length_steps=None,
        length_tokens=cfg.length_steps * batch + part if cfg.length_steps else None,
    )
    found = tokens.in_steps(lambda n: n // batch, total * batch)
    assert found == cfg
    assert found.in_steps(lambda n: n // batch, total * batch) is found
    if tokens != cfg:
        with pytest.raises(ValueError, match="in_steps"):
            lr_at(0, total, 1.0, tokens)


def test_a_schedule_of_trillions_of_tokens_stops_at_the_rate_of_the_released_cooldown(
    shared_data: Path,
) -> None:
    recipes = json.loads((shared_data / "dclm" / "dclm_recipes.json").read_text())
    for name, warmup, cooldown, batch, step in (
        ("dclm-1b-v0", 5000, "cooldown", 512 * 2048, 2_154_958),
        ("dclm-7b", 10_000, "cooldown_A", 2048 * 2048, 478_207),
    ):
        trunk, branch = recipes[name]["stage1"], recipes[name][cooldown]
        cfg = ScheduleConfig(
            "cosine", warmup, trunk["cd"], length_steps=trunk["schedule_tokens"] // batch
        )
        assert lr_at(step, step, trunk["lr"], cfg) == pytest.approx(branch["lr"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cosine_cooldown"}, "needs cooldown_steps of at least 1"),
        ({"name": "cosine", "cooldown_steps": 5}, "has no meaning for name = cosine"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"cooldown_power": 0.0}, "must be positive"),
        ({"warmup_steps": 5, "warmup_tokens": 5}, "are both given; give one of them"),
        ({"length_steps": 5, "length_tokens": 5}, "are both given; give one of them"),
        ({"warmup_tokens": 0}, "warmup_tokens = 0, must be at least 1"),
        ({"cooldown_tokens": 9}, "cooldown_tokens = 9 has no meaning for name = cosine"),
        ({"name": "constant", "length_steps": 9}, "a length has no meaning for name = constant"),
        (
            {"name": "cosine_cooldown", "cooldown_steps": 2, "cooldown_shape": "cosine"}
            | {"cooldown_power": 2.0},
            "cooldown_power = 2.0 is of cooldown_shape = power",
        ),
    ],
)
def test_senseless_schedules_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScheduleConfig(**arguments)  # type: ignore[arg-type]


def test_a_warmup_and_cooldown_longer_than_the_run_are_refused() -> None:
    cfg = ScheduleConfig("constant_cooldown", warmup_steps=60, cooldown_steps=50)
    with pytest.raises(InputError, match="110 are more than the run's 100 steps"):
        cfg.check_length(100)


def test_a_length_shorter_than_the_run_is_refused() -> None:
    with pytest.raises(InputError, match="50 steps is shorter than the run's 100"):
        ScheduleConfig(length_steps=50).check_length(100)


def test_tokens_that_fit_no_step_or_no_run_are_told_together() -> None:
    cfg = ScheduleConfig("cosine_cooldown", warmup_tokens=9, cooldown_tokens=1001, length_tokens=8)
    with pytest.raises(InputError) as caught:
        cfg.in_steps(lambda n: n // 10, 1000)
    for part in (
        "warmup_tokens = 9 is less than one step",
        "length_tokens = 8 is less than one step",
        "cooldown_tokens = 1001 are more than the run's 1000 tokens",
    ):
        assert part in str(caught.value)
