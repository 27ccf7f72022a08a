"""What the guard promises: verdicts are a function of the numbers, and survive a cut anywhere."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite.errors import InputError, RunError
from openlm_lite.guard import (
    Guard,
    GuardConfig,
    NonFiniteError,
    SpikeError,
    Verdict,
    first_sample_of,
)

N = 8  # samples of a batch
WATCHES = GuardConfig(spike_sigmas=6.0, spike_window=32)
SPIKE, NAN = 50.0, math.nan


def spikes(on_spike: Any, **changes: Any) -> GuardConfig:
    return GuardConfig(spike_sigmas=6.0, spike_window=32, on_spike=on_spike, **changes)


def calm(i: int) -> float:
    """A loss around 3 that is never a spike of another."""
    return 3.0 + 0.01 * (i * 7 % 11)


def judge_all(guard: Guard, losses: list[float], first: int = 0) -> list[Verdict]:
    """One batch after the other, from batch `first` on."""
    return [
        guard.judge(i, i * N, N, loss, loss / 3.0) for i, loss in enumerate(losses, start=first)
    ]


def with_level(cfg: GuardConfig) -> Guard:
    """A guard that has seen a window of calm batches."""
    guard = Guard(cfg)
    assert {v.event for v in judge_all(guard, [calm(i) for i in range(cfg.spike_window)])} == {""}
    return guard


def reopened(guard: Guard) -> Guard:
    return Guard(guard.cfg, json.loads(json.dumps(guard.state(), allow_nan=False)))


def outcome(guard: Guard, i: int, loss: float, norm: float) -> Verdict | str:
    """The verdict on batch i, or the error."""
    try:
        return guard.judge(i, i * N, N, loss, norm)
    except RunError as error:
        return f"{type(error).__name__}: {error}"


# Losses and gradient norms as they come, with outliers of both and what is not finite.
VALUES = st.one_of(
    st.floats(2.9, 3.1), st.floats(2.9, 3.1), st.floats(), st.sampled_from([0.0, SPIKE, NAN])
)
CONFIGS = st.builds(
    GuardConfig,
    on_nonfinite=st.sampled_from(["stop", "skip"]),
    max_skips=st.integers(1, 20),
    spike_sigmas=st.sampled_from([3.0, 6.0]),
    spike_window=st.integers(32, 40),
    on_spike=st.sampled_from(["log", "skip", "rewind"]),
    rewind_skip=st.integers(0, 5),
    max_rewinds=st.integers(1, 4),
)


@given(CONFIGS, st.lists(st.tuples(VALUES, VALUES), min_size=20, max_size=120), st.data())
def test_a_cut_anywhere_changes_no_verdict(
    cfg: GuardConfig, values: list[tuple[float, float]], data: st.DataObject
) -> None:
    cuts = data.draw(st.sets(st.integers(0, len(values))))
    whole, cut = Guard(cfg), Guard(cfg)
    for i, (loss, norm) in enumerate(values):
        if i in cuts:
            assert cut.state() == json.loads(json.dumps(cut.state()))
            cut = reopened(cut)
        assert outcome(cut, i, loss, norm) == outcome(whole, i, loss, norm)
        assert cut.state() == whole.state()


@given(CONFIGS, st.lists(st.tuples(st.floats(), st.floats()), max_size=100))
def test_nothing_non_finite_enters_the_state_which_stays_small(
    cfg: GuardConfig, values: list[tuple[float, float]]
) -> None:
    guard = Guard(cfg)
    for i, (loss, norm) in enumerate(values):
        result = outcome(guard, i, loss, norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            assert isinstance(result, str) or result.event == "left out"
        state = guard.state()
        json.dumps(state, allow_nan=False)
        if state:
            assert len(state["window"]) <= cfg.spike_window
            assert len(state["spiked_at"]) <= cfg.spike_window // 16
            assert len(state["left_out"]) <= cfg.max_skips + cfg.max_rewinds


def test_a_guard_with_nothing_to_remember_leaves_nothing_in_the_checkpoint() -> None:
    guard = Guard(GuardConfig())
    assert {v.event for v in judge_all(guard, [3.0, 1e9, 0.0])} == {""}
    assert guard.state() == {} == Guard(GuardConfig(), {}).state() == Guard(WATCHES, None).state()


@pytest.mark.parametrize("bad", [(NAN, 1.0), (3.0, NAN), (math.inf, 1.0), (3.0, math.inf)])
def test_a_non_finite_loss_or_gradient_stops_the_run_by_default(bad: tuple[float, float]) -> None:
    with pytest.raises(NonFiniteError) as caught:
        Guard(GuardConfig()).judge(7, 56, N, *bad)
    message = str(caught.value)
    assert message.startswith(f"step 7: loss {bad[0]}, gradient norm {bad[1]}, samples 56 to 63;")
    assert "`openlm inspect RUN --step 7`" in message and "guard.on_nonfinite=skip" in message


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 5))
def test_exactly_max_skips_batches_are_left_out_and_the_next_one_stops(
    bad: list[bool], max_skips: int
) -> None:
    guard = Guard(GuardConfig(on_nonfinite="skip", max_skips=max_skips))
    met = 0
    for i, is_bad in enumerate(bad):
        result = outcome(guard, i, NAN if is_bad else 3.0, 1.0)
        met += is_bad
        if not is_bad:
            assert result == Verdict()
        elif met <= max_skips:
            assert isinstance(result, Verdict) and result.samples == (i * N, (i + 1) * N)
            assert result.event == "left out" and guard.leaves_out(i * N, N)
        else:
            assert isinstance(result, str) and result.startswith("NonFiniteError: step ")
            assert (
                f"; batches left out before: {max_skips} (guard.max_skips = {max_skips})" in result
            )
            assert "a larger guard.max_skips" in result and not guard.leaves_out(i * N, N)
        guard = reopened(guard)


def test_spikes_and_non_finite_values_share_max_skips() -> None:
    guard = with_level(spikes("skip", on_nonfinite="skip", max_skips=2))
    events = [v.event for v in judge_all(guard, [NAN, 3.0, SPIKE], first=32)]
    assert events == ["left out", "", "left out"]
    with pytest.raises(SpikeError, match=r"guard.on_spike=log or a larger guard.max_skips"):
        guard.judge(36, 36 * N, N, SPIKE, 1.0)
    with pytest.raises(NonFiniteError):
        guard.judge(36, 36 * N, N, NAN, 1.0)


# --------------------------------------------------------------------------------------------
# Spikes


def training_curve(rng: random.Random, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of a healthy run: a fast fall, then a slow one; noise on both.

    Now and then a gradient is 7 times its usual size, as measured.
    """
    fall, noise, scatter = rng.uniform(10, 80), rng.uniform(0.01, 0.05), rng.uniform(0.05, 0.4)
    curve = []
    for i in range(steps):
        loss = 2.5 + 4.0 * math.exp(-i / fall) + 2.0 * (1 + i / fall) ** -0.5
        norm = (0.3 + 3.0 * math.exp(-i / fall)) * min(1.0, (i + 5) / 25)
        norm *= 7.0 if rng.random() < 0.003 else math.exp(rng.gauss(0.0, scatter))
        curve.append((loss + rng.gauss(0.0, noise * loss), norm))
    return curve


def test_no_false_alarm_in_200_healthy_training_curves() -> None:
    cfg = GuardConfig(spike_sigmas=6.0)
    for seed in range(200):
        guard = Guard(cfg)
        for i, (loss, norm) in enumerate(training_curve(random.Random(seed), 200)):
            assert guard.judge(i, i * N, N, loss, norm) == Verdict(), (seed, i)


@pytest.mark.parametrize(("loss_factor", "norm_factor"), [(2.0, 1.0), (1.0, 20.0), (2.0, 20.0)])
def test_a_spike_in_a_noisy_falling_curve_is_found(loss_factor: float, norm_factor: float) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        curve, at = training_curve(rng, 500), rng.randrange(320, 500)
        curve[at] = (curve[at][0] * loss_factor, curve[at][1] * norm_factor)
        guard = Guard(GuardConfig(spike_sigmas=6.0))
        verdicts = {i: guard.judge(i, i * N, N, *curve[i]) for i in range(200, 500)}
        events = {i: verdict for i, verdict in verdicts.items() if verdict.event}
        assert list(events) == [at], seed
        assert ("loss" in events[at].reason) == (loss_factor > 1)
        assert ("gradient norm" in events[at].reason) == (norm_factor > 1)
        assert events[at].samples == (at * N, (at + 1) * N)


def test_there_is_no_verdict_before_half_the_window_is_there() -> None:
    for seen, event in ((15, ""), (16, "spike")):
        guard = Guard(WATCHES)
        judge_all(guard, [calm(i) for i in range(seen)])
        assert guard.judge(seen, seen * N, N, SPIKE, 1.0).event == event


def test_a_fall_is_no_spike() -> None:
    guard = with_level(WATCHES)
    assert guard.judge(32, 32 * N, N, 0.5, 1e-6) == Verdict()


def test_rounding_around_a_constant_loss_is_no_spike() -> None:
    guard = Guard(WATCHES)
    judge_all(guard, [3.0] * 32)
    assert judge_all(guard, [3.0 + 1e-6, 3.0 - 1e-6, 3.001], first=32) == [Verdict()] * 3
    assert guard.judge(35, 35 * N, N, 4.0, 1.0).event == "spike"


def test_a_gradient_norm_below_ten_times_the_usual_one_is_no_spike() -> None:
    """Clipping is made for these: healthy runs have them, without any trace in the loss."""
    for factor, event in ((9.5, ""), (10.5, "spike")):
        guard = with_level(WATCHES)
        assert guard.judge(32, 32 * N, N, calm(0), factor * calm(4) / 3.0).event == event


def test_a_batch_without_targets_is_used_and_enters_nothing() -> None:
    guard = with_level(WATCHES)
    before = guard.state()
    assert guard.judge(32, 32 * N, N, 0.0, 0.0) == Verdict()
    assert guard.state() == before


def test_a_spike_does_not_enter_the_statistics() -> None:
    for policy in ("log", "skip", "rewind"):
        guard = with_level(spikes(policy))
        window = guard.state()["window"]
        guard.judge(32, 32 * N, N, SPIKE, 1.0)
        assert guard.state()["window"] == window


@pytest.mark.parametrize("policy", ["log", "skip"])
def test_a_new_level_is_no_endless_series_of_spikes(policy: str) -> None:
    guard = with_level(spikes(policy, max_skips=100))
    events = [v.event for v in judge_all(guard, [5.0 + calm(i) for i in range(200)], first=32)]
    spike = "spike" if policy == "log" else "left out"
    assert events == [spike] * 2 + ["new level"] + [""] * 197
    assert guard.judge(999, 999 * N, N, SPIKE, 1.0).event == spike  # of the new level


def test_two_kinds_of_batches_are_no_endless_series_of_spikes() -> None:
    """The higher kind comes now and then, not in a row, and was not there before."""
    guard = with_level(spikes("skip", max_skips=100))
    losses = [calm(i) + (5.0 if i % 4 == 0 else 0.0) for i in range(400)]
    events = [v.event for v in judge_all(guard, losses, first=32)]
    assert events.count("left out") == 2 and events.count("new level") == 1


def test_rare_spikes_never_make_a_new_level() -> None:
    guard = with_level(WATCHES)
    losses = [SPIKE if i % 20 == 0 else calm(i) for i in range(400)]
    events = [v.event for v in judge_all(guard, losses, first=32)]
    assert events == ["spike" if i % 20 == 0 else "" for i in range(400)]


# --------------------------------------------------------------------------------------------
# Ranges and rewinds


def test_a_rewind_leaves_out_the_spike_and_the_batches_before_it() -> None:
    guard = with_level(spikes("rewind", rewind_skip=3))
    verdict = guard.judge(32, 32 * N, N, SPIKE, 1.0)
    assert verdict.event == "rewind" and verdict.samples == (29 * N, 33 * N)
    assert verdict.record(31 * N) == {
        "guard/event": "rewind",
        "guard/first_sample": 31 * N,
        "guard/end_sample": 33 * N,
        "guard/reason": verdict.reason,
    }
    assert "loss 50 above " in verdict.reason and "(6 sigmas)" in verdict.reason
    back = guard.rewound({}, next_sample=31 * N)
    assert back.left_out == ((31 * N, 33 * N),), "what the checkpoint was trained on stays"
    left_out = [i for i in range(40) if back.leaves_out(i * N, N)]
    assert left_out == [31, 32]


def test_exactly_max_rewinds_rewinds_are_made_and_the_next_spike_stops() -> None:
    cfg = spikes("rewind", max_rewinds=2, rewind_skip=0)
    checkpoint = with_level(cfg).state()
    guard = Guard(cfg, checkpoint)
    for i in range(2):
        assert guard.judge(32, (32 + i) * N, N, SPIKE, 1.0).event == "rewind"
        guard = reopened(guard.rewound(checkpoint, 32 * N))
        assert guard.state()["window"] == checkpoint["window"]
    with pytest.raises(SpikeError, match=r"; rewinds before: 2 \(guard.max_rewinds = 2\)"):
        guard.judge(32, 34 * N, N, SPIKE, 1.0)
    assert guard.left_out == ((32 * N, 34 * N),)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 6)), max_size=8),
    st.integers(1, 13),
    st.integers(0, 60),
)
def test_another_batch_size_leaves_out_every_batch_with_such_a_sample(
    made: list[tuple[int, int]], n_samples: int, step: int
) -> None:
    guard = Guard(GuardConfig(on_nonfinite="skip", max_skips=8))
    for first, n in made:
        guard.judge(0, first, n, NAN, 1.0)
    samples = samples_of((first, first + n) for first, n in made)
    assert samples_of(guard.left_out) == samples
    assert all(a < b for a, b in guard.left_out)
    assert all(a[1] < b[0] for a, b in zip(guard.left_out, guard.left_out[1:], strict=False))
    used = []
    for batch in range(200):
        own = range(batch * n_samples, (batch + 1) * n_samples)
        leaves_out = guard.leaves_out(own.start, n_samples)
        assert leaves_out == bool(samples & set(own))
        if not leaves_out:
            used.append(own.start)
    assert first_sample_of(step, n_samples, guard.left_out) == used[step]


# --------------------------------------------------------------------------------------------
# The loop with saves, kills and rewinds, as train.py runs it, on a model that is a list of batches


@dataclass
class Checkpoint:
    step: int = 0
    next_sample: int = 0
    trained: tuple[int, ...] = ()  # batches: these are the weights
    guard: str = "{}"


@dataclass
class ToyRun:
    """`kills`: how often each is judged before the process dies, once each."""

    cfg: GuardConfig
    value: Callable[[int, tuple[int, ...]], float]  # of a batch under these weights
    steps: int
    save_every: int
    kills: list[int]
    records: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl
    left_out: list[dict[str, Any]] = field(default_factory=list)  # of them, by this process

    def run(self) -> Checkpoint | str:
        saved = [Checkpoint()]
        kills = list(self.kills)
        while True:
            left = kills.pop(0) if kills else -1
            try:
                result = self._process(saved, left)
            except RunError as error:
                return f"{type(error).__name__}: {error}"
            if result is not None:
                return result

    def _process(self, saved: list[Checkpoint], left: int) -> Checkpoint | None:
        state = saved[-1]
        guard = Guard(self.cfg, json.loads(state.guard))
        self._cut(state.step)
        self.left_out = []
        batch = state.next_sample // N
        while state.step < self.steps:
            while guard.leaves_out(batch * N, N):
                batch += 1
            if left == 0:
                return None
            left -= 1
            value = self.value(batch, state.trained)
            verdict = guard.judge(state.step, batch * N, N, value, 1.0)
            if verdict.event == "rewind":
                state = saved[-1]
                guard = guard.rewound(json.loads(state.guard), state.next_sample)
                batch = state.next_sample // N
                self._rewind(state.step)
            if verdict.event:
                record = verdict.record(state.next_sample)
                self.records.append({"step": state.step + 1, **record})
                if verdict.event in ("left out", "rewind"):
                    self.left_out.append(self.records[-1])
            if verdict.event == "rewind":
                continue
            batch += 1
            if verdict.event == "left out":
                continue
            trained = (*state.trained, batch - 1)
            state = Checkpoint(state.step + 1, batch * N, trained)
            self.records.append({"step": state.step, "loss": value})
            if state.step % self.save_every == 0 or state.step == self.steps:
                state.guard = json.dumps(guard.state())
                saved.append(state)
        return state

    def _cut(self, step: int) -> None:
        self.records = [record for record in self.records if record["step"] <= step]

    def _rewind(self, step: int) -> None:
        self._cut(step)
        for record in self.left_out:
            if record["step"] > step:
                record["step"] = step + 1
                self.records.append(record)


def samples_of(ranges: Iterable[tuple[int, int]]) -> set[int]:
    return {sample for first, end in ranges for sample in range(first, end)}


@given(
    cfg=CONFIGS,
    bad=st.dictionaries(st.integers(0, 90), st.sampled_from([NAN, SPIKE, 8.0]), max_size=8),
    poisons=st.lists(st.integers(30, 80), max_size=3),
    save_every=st.integers(1, 30),
    kills=st.lists(st.integers(0, 60), max_size=6),
)
def test_kills_change_neither_the_batches_trained_nor_the_records(
    cfg: GuardConfig,
    bad: dict[int, float],
    poisons: list[int],
    save_every: int,
    kills: list[int],
) -> None:
    """`poisons`: batches after which the next two spike, if these were trained on."""

    def value(batch: int, trained: tuple[int, ...]) -> float:
        poisoned = any(p in trained and batch - 2 <= p < batch for p in poisons)
        return bad.get(batch, SPIKE if poisoned else calm(batch))

    whole = ToyRun(cfg, value, 70, save_every, [])
    killed = ToyRun(cfg, value, 70, save_every, kills)
    expected = whole.run()
    assert killed.run() == expected
    assert killed.records == whole.records
    if isinstance(expected, Checkpoint):
        assert len(expected.trained) == 70 and len(set(expected.trained)) == 70
        assert not any(not math.isfinite(bad.get(batch, 0.0)) for batch in expected.trained)
        left_out = Guard(cfg, json.loads(expected.guard)).left_out
        assert samples_of(left_out) == samples_of(
            (record["guard/first_sample"], record["guard/end_sample"])
            for record in whole.records
            if record.get("guard/event") in ("left out", "rewind")
        )
        starts = [first_sample_of(step, N, left_out) for step in range(70)]
        assert starts == [batch * N for batch in expected.trained]


def test_a_rewind_gets_past_a_batch_that_spoils_those_after_it() -> None:
    def value(batch: int, trained: tuple[int, ...]) -> float:
        return SPIKE if 50 in trained and batch > 52 else calm(batch)

    run = ToyRun(spikes("rewind", rewind_skip=4), value, 80, 20, [])
    done = run.run()
    assert isinstance(done, Checkpoint)
    assert done.trained == tuple(i for i in range(85) if not 49 <= i <= 53)
    events = [record for record in run.records if "guard/event" in record]
    assert [(e["step"], e["guard/first_sample"] // N) for e in events] == [(41, 49)]


# --------------------------------------------------------------------------------------------
# What is read and configured


def full_state() -> dict[str, Any]:
    guard = with_level(spikes("skip", on_nonfinite="skip"))
    judge_all(guard, [SPIKE, 3.0, NAN], first=32)
    return guard.state()


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("window", [[3.0, 1.0, 1.0]], "a list of pairs"),
        ("window", [[3.0, math.nan]], "of finite numbers"),
        ("window", [[math.inf, 1.0]], "of finite numbers"),
        ("window", [[3, 1.0]], "of finite numbers"),
        ("window", [[3.0, True]], "of finite numbers"),
        ("window", [[3.0, 0.0]], "gradient norm > 0"),
        ("window", {"a": 1}, "a list"),
        ("judged", -1, "a whole number >= 0"),
        ("judged", 1.0, "a whole number >= 0"),
        ("skips", True, "a whole number >= 0"),
        ("rewinds", None, "a whole number >= 0"),
        ("spiked_at", [2, 2], "rising whole numbers"),
        ("spiked_at", [10**9], "rising whole numbers up to `judged`"),
        ("spiked_at", ["3"], "rising whole numbers"),
        ("left_out", [[8, 8]], "rising pairs"),
        ("left_out", [[0, 16], [8, 24]], "rising pairs"),
        ("left_out", [[-8, 8]], "rising pairs"),
        ("left_out", [8, 16], "a list of pairs"),
        ("left_out", "abc", "a list"),
    ],
)
def test_a_state_that_no_guard_wrote_is_refused_by_name(name: str, value: Any, rule: str) -> None:
    Guard(WATCHES, full_state())
    with pytest.raises(InputError) as caught:
        Guard(WATCHES, full_state() | {name: value}, "step_00000032")
    assert str(caught.value).startswith(f"step_00000032: guard: {name} = ")
    assert rule in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.sampled_from(sorted(full_state())), ANYTHING)
def test_any_other_value_is_refused_or_read_as_it_is(name: str, value: Any) -> None:
    state = full_state() | {name: value}
    try:
        guard = Guard(spikes("skip"), state)
    except InputError as error:
        assert str(error).startswith("checkpoint: guard: ")
    else:
        Guard(spikes("skip"), guard.state())


@pytest.mark.parametrize("state", [{"skips": 1}, {**full_state(), "more": 1}, [], 0, "", [1]])
def test_a_state_with_other_names_is_refused(state: Any) -> None:
    with pytest.raises(InputError, match=r"checkpoint: guard: has .*; must have window, judged, "):
        Guard(GuardConfig(), state)


def test_reading_a_state_does_not_tie_the_guard_to_it() -> None:
    state = full_state()
    copy = json.loads(json.dumps(state))
    guard = Guard(spikes("skip", on_nonfinite="skip"), state)
    judge_all(guard, [3.0, NAN, SPIKE, 3.0], first=40)
    assert state == copy != guard.state()


def test_another_configuration_keeps_counts_and_ranges_and_what_fits_the_window() -> None:
    state = full_state()
    assert (state["skips"], len(state["window"]), len(state["left_out"])) == (2, 32, 2)
    off = Guard(GuardConfig(), state)
    assert off.state()["window"] == [] and off.state()["left_out"] == state["left_out"]
    with pytest.raises(NonFiniteError, match="; batches left out before: 2 "):
        off.judge(40, 40 * N, N, NAN, 1.0)
    wider = Guard(GuardConfig(spike_sigmas=6.0, spike_window=64), state)
    assert wider.judge(40, 40 * N, N, SPIKE, 1.0).event == "spike"
    longer = Guard(GuardConfig(spike_sigmas=6.0, spike_window=64))
    judge_all(longer, [calm(i) for i in range(64)])
    assert len(Guard(WATCHES, longer.state()).state()["window"]) == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_skips": 0}, "max_skips = 0, must be at least 1"),
        ({"max_rewinds": 0}, "max_rewinds = 0, must be at least 1"),
        ({"rewind_skip": -1}, "rewind_skip = -1, must be at least 0"),
        ({"spike_window": 31}, "spike_window = 31, must be at least 32"),
        ({"spike_sigmas": -1.0}, "spike_sigmas = -1.0, must be 0"),
        ({"spike_sigmas": math.nan}, "spike_sigmas = nan, must be 0"),
        ({"on_spike": "rewind"}, "on_spike = rewind needs spike_sigmas above 0; 6 is usual"),
    ],
)
def test_a_configuration_without_meaning_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        GuardConfig(**fields)
    assert str(caught.value).startswith("guard: ") and message in str(caught.value)
