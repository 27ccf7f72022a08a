"""What becomes of a batch whose loss or gradient is not as it should be: used, left out, undone.

    loss, gradient norm ─ NaN or infinite? ── on_nonfinite: stop │ skip
                        └ a spike? ────────── on_spike: log │ skip │ rewind
                        └ else: used, and part of the statistics

Both numbers are the same on every rank, and a verdict is a function of the numbers so far: all
ranks decide alike, and a resumed run, with `Guard.state` from its checkpoint, as the uninterrupted
one. A batch that is left out is not a step: weights, optimizer, step and tokens stay, and the next
batch is tried for the same step. Its samples are remembered as a range [first, end).

A rewind goes back to the newest checkpoint and leaves out what led to the spike:

    batches   … c-1 │ c  c+1 … s-r-1   s-r … s   s+1 …      c: the checkpoint's next batch
                    │ trained again    left out  trained    s: the spike, r: rewind_skip
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from openlm_lite.errors import InputError, SharedError

_LEAST_STD = 1e-3  # of the mean loss: where nothing varies, rounding must not be a spike
_LEAST_LOG_RISE = math.log(10)  # of the gradient norm: healthy runs had steps of 7 times
_LEAST_WINDOW = 32
_EXCEPTIONS = 16  # one batch in so many may be a spike; where more are, it is the level

Range = tuple[int, int]
"""samples [first, end)"""


class NonFiniteError(SharedError):
    """The loss or the gradient is NaN or infinite; the weights were not touched."""


class SpikeError(SharedError):
    """More spikes than the run may leave out or undo; the weights were not touched."""


@dataclass(frozen=True)
class GuardConfig:
    """What to do about non-finite values and about spikes of the loss or the gradient.

    A spike is a loss above mean + `spike_sigmas` x standard deviation of those of the last
    `spike_window` used batches, or a gradient norm that is so by its logarithm and ten times their
    (geometric) mean. There is no verdict before half the window is there. OLMo-core's
    SkipStepOptimizer looks at the same two, with 128 and 6. Here a fall is no spike, and norms have
    to stand out more: in healthy runs, they are at times 19 sigmas high even by their logarithm.
    """

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """stop: the run ends; skip: the batch is left out"""
    max_skips: int = 10
    """batches that a run may leave out, for non-finite values and spikes together"""
    spike_sigmas: float = 0.0
    """0: spikes are not looked for"""
    spike_window: int = 128
    on_spike: Literal["log", "skip", "rewind"] = "log"
    """log: the batch is used; skip: it is left out; rewind: back to the newest checkpoint"""
    rewind_skip: int = 100
    """batches before the spike that a rewind leaves out too, as far as they follow the checkpoint
    (PaLM, arXiv:2204.02311, section 5.1: those seen before and during the spike)"""
    max_rewinds: int = 3

    def __post_init__(self) -> None:
        problems = []
        least = {"max_skips": 1, "rewind_skip": 0, "max_rewinds": 1, "spike_window": _LEAST_WINDOW}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                problems.append(f"{name} = {getattr(self, name)}, must be at least {bound}")
        if not (math.isfinite(self.spike_sigmas) and self.spike_sigmas >= 0):
            problems.append(f"spike_sigmas = {self.spike_sigmas}, must be 0 (off) or above")
        elif self.on_spike != "log" and not self.spike_sigmas:
            problems.append(f"on_spike = {self.on_spike} needs spike_sigmas above 0; 6 is usual")
        if problems:
            raise InputError("guard: " + "; ".join(problems))

    @property
    def may_judge_late(self) -> bool:
        """Whether every verdict either ends the run or has the batch used.

        Then the next step may begin before it, if a non-finite one is kept from the weights
        otherwise (`optim.brake`). A batch that is left out decides on the next step's batch.
        """
        return self.on_nonfinite == "stop" and self.on_spike == "log"


@dataclass(frozen=True)
class Verdict:
    """What becomes of a batch: it is used, unless the event is "left out" or "rewind"."""

    event: Literal["", "spike", "new level", "left out", "rewind"] = ""
    """empty: there is nothing to say of it"""
    reason: str = ""
    samples: Range = (0, 0)
    """of the batch; of a rewind, all that it leaves out from `rewind_skip` batches before on"""

    def record(self, next_sample: int = 0) -> dict[str, Any]:
        """For metrics.jsonl. `next_sample`: where a rewind went back to; nothing before it."""
        return {
            "guard/event": self.event,
            "guard/first_sample": max(self.samples[0], next_sample),
            "guard/end_sample": self.samples[1],
            "guard/reason": self.reason,
        }


@dataclass
class _Memory:
    """What the checkpoint keeps, under these names."""

    window: list[tuple[float, float]] = field(default_factory=list)
    """(loss, gradient norm) of the last used batches, oldest first"""
    judged: int = 0
    """batches that were looked at for a spike"""
    spiked_at: list[int] = field(default_factory=list)
    """what `judged` was at the spikes among the last `spike_window` of these"""
    skips: int = 0
    rewinds: int = 0
    left_out: list[Range] = field(default_factory=list)
    """sorted; they do not touch"""


class Guard:
    """Judges one batch after the other; remembers the last used ones, and what was left out."""

    def __init__(
        self, cfg: GuardConfig, state: Mapping[str, Any] | None = None, place: str = "checkpoint"
    ) -> None:
        """`state`: of a checkpoint (`place` names it in errors); empty or None: a fresh guard.

        A state from under another configuration is fine: counts and ranges stay, and the
        statistics as far as the window reaches. Raises InputError for what is no guard's state.
        """
        self.cfg = cfg
        self._memory = _Memory() if state is None or state == {} else _read(state, place)
        if not cfg.spike_sigmas:
            self._memory.window, self._memory.spiked_at = [], []
        self._forget_oldest()

    @property
    def left_out(self) -> tuple[Range, ...]:
        """Samples of the run that are not trained on; sorted ranges that do not touch."""
        return tuple(self._memory.left_out)

    def leaves_out(self, first_sample: int, n_samples: int) -> bool:
        """Whether the batch of these samples, or a part of it, was to be left out.

        A part, where the batch size is not the one under which the range was made.
        """
        end = first_sample + n_samples
        return any(a < end and first_sample < b for a, b in self._memory.left_out)

    def judge(
        self, step: int, first_sample: int, n_samples: int, loss: float, grad_norm: float
    ) -> Verdict:
        """What becomes of the batch tried for `step` (from 0), before the optimizer's step.

        Raises NonFiniteError or SpikeError where the run has to end.
        """
        memory, cfg = self._memory, self.cfg
        samples = (first_sample, first_sample + n_samples)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._non_finite(step, samples, f"loss {loss}, gradient norm {grad_norm}")
        if not cfg.spike_sigmas or grad_norm <= 0:  # no gradient: a batch without targets
            return Verdict()
        memory.judged += 1
        verdict = Verdict()
        if why := self._spike(loss, grad_norm):
            memory.spiked_at.append(memory.judged)
            self._forget_oldest()
            n = len(memory.spiked_at)
            if n <= cfg.spike_window // _EXCEPTIONS:
                return self._on_spike(step, samples, why)
            # they never enter the statistics, and would be spikes for ever
            why += f"; {n} such batches of the last {cfg.spike_window}: the statistics begin anew"
            verdict = Verdict("new level", why, samples)
            memory.window, memory.spiked_at = [], []
        memory.window.append((loss, grad_norm))
        self._forget_oldest()
        return verdict

    def rewound(
        self, state: Mapping[str, Any], next_sample: int, place: str = "checkpoint"
    ) -> Guard:
        """The guard after a return to a checkpoint: its `state`, and its next sample.

        The statistics are the checkpoint's. The counts stay, and so do the ranges that lie ahead:
        the checkpoint is older than they are.
        """
        guard = Guard(self.cfg, state, place)
        new, old = guard._memory, self._memory
        ahead = [(max(first, next_sample), end) for first, end in old.left_out if end > next_sample]
        new.left_out = _merged([*new.left_out, *ahead])
        new.skips, new.rewinds = old.skips, old.rewinds
        return guard

    def state(self) -> dict[str, Any]:
        """JSON values for the checkpoint; empty where there is nothing to remember.

        At most `spike_window` pairs of numbers and `max_skips` + `max_rewinds` ranges.
        """
        if self._memory == _Memory():
            return {}
        values = vars(self._memory)
        pairs = {name: [list(pair) for pair in values[name]] for name in _PAIRS}
        return values | {"spiked_at": list(self._memory.spiked_at)} | pairs

    def _non_finite(self, step: int, samples: Range, what: str) -> Verdict:
        policy = self.cfg.on_nonfinite
        if policy == "skip" and self._memory.skips < self.cfg.max_skips:
            return self._leave_out(samples, what)
        remedy = "guard.on_nonfinite=skip" if policy == "stop" else "a larger guard.max_skips"
        raise NonFiniteError(self._last_words(step, samples, what, remedy))

    def _on_spike(self, step: int, samples: Range, why: str) -> Verdict:
        memory, cfg = self._memory, self.cfg
        if cfg.on_spike == "log":
            return Verdict("spike", why, samples)
        if cfg.on_spike == "skip" and memory.skips < cfg.max_skips:
            return self._leave_out(samples, why)
        if cfg.on_spike == "rewind" and memory.rewinds < cfg.max_rewinds:
            memory.rewinds += 1
            before = cfg.rewind_skip * (samples[1] - samples[0])
            samples = (max(0, samples[0] - before), samples[1])
            memory.left_out = _merged([*memory.left_out, samples])
            return Verdict("rewind", why, samples)
        budget = "max_skips" if cfg.on_spike == "skip" else "max_rewinds"
        remedy = f"guard.on_spike=log or a larger guard.{budget}"
        raise SpikeError(self._last_words(step, samples, why, remedy))

    def _leave_out(self, samples: Range, why: str) -> Verdict:
        self._memory.skips += 1
        self._memory.left_out = _merged([*self._memory.left_out, samples])
        return Verdict("left out", why, samples)

    def _last_words(self, step: int, samples: Range, what: str, remedy: str) -> str:
        memory, cfg = self._memory, self.cfg
        used = ""
        if memory.skips:
            used += f"; batches left out before: {memory.skips} (guard.max_skips = {cfg.max_skips})"
        if memory.rewinds:
            used += f"; rewinds before: {memory.rewinds} (guard.max_rewinds = {cfg.max_rewinds})"
        return (
            f"step {step}: {what}, samples {samples[0]} to {samples[1] - 1}; this step updated "
            f"nothing{used}. `openlm inspect RUN --step {step}` shows the samples; a new run.dir "
            "with a lower optim.lr or longer schedule.warmup_steps may get past it, and so may "
            f"{remedy}"
        )

    def _spike(self, loss: float, grad_norm: float) -> str:
        """Which of the two is too high, and above what; empty: neither."""
        window, sigmas = self._memory.window, self.cfg.spike_sigmas
        if 2 * len(window) < self.cfg.spike_window:
            return ""
        found = []
        mean, std = _mean_and_std([loss for loss, _ in window])
        limit = mean + sigmas * max(std, _LEAST_STD * abs(mean))
        if loss > limit:
            found.append(f"loss {loss:.6g} above {limit:.6g}")
        mean, std = _mean_and_std([math.log(norm) for _, norm in window])
        limit = mean + max(sigmas * std, _LEAST_LOG_RISE)
        if math.log(grad_norm) > limit:
            found.append(f"gradient norm {grad_norm:.6g} above {math.exp(limit):.6g}")
        return f"{' and '.join(found)} ({sigmas:g} sigmas)" if found else ""

    def _forget_oldest(self) -> None:
        memory, n = self._memory, self.cfg.spike_window
        memory.window = memory.window[-n:]
        memory.spiked_at = [at for at in memory.spiked_at if at > memory.judged - n]


def first_sample_of_last(stages: Sequence[tuple[int, int]], left_out: Iterable[Range]) -> int:
    """First sample of the last step of `stages`: (steps, samples of each), in the run's order.

    A stage begins behind the last batch of the one before, whatever its size.
    """
    ranges, start, first = list(left_out), 0, 0
    for n_steps, n_samples in stages:
        ahead = [(max(a - start, 0), end - start) for a, end in ranges if end > start]
        first = start + first_sample_of(n_steps - 1, n_samples, ahead)
        start = first + n_samples
    return first


def first_sample_of(step: int, n_samples: int, left_out: Iterable[Range]) -> int:
    """First sample of the batch of `step` (from 0), in a run that left out `left_out`.

    True for runs that kept one batch size, `n_samples`, from sample 0 on.
    """
    batch = step
    batches = _merged((first // n_samples, -(-end // n_samples)) for first, end in left_out)
    for first, end in batches:
        if first > batch:
            break
        batch += end - first
    return batch * n_samples


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """The same samples as sorted ranges that do not touch."""
    merged: list[Range] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    deviation = math.hypot(*(value - mean for value in values))  # squares do not overflow in it
    return mean, deviation / math.sqrt(len(values) - 1)


_PAIRS = ("window", "left_out")


def _read(state: Mapping[str, Any], place: str) -> _Memory:
    """The memory that `Guard.state` wrote. Raises InputError for anything else."""
    names = [f.name for f in dataclasses.fields(_Memory)]
    if not isinstance(state, Mapping) or set(state) != set(names):
        found = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise InputError(f"{place}: guard: has {found[:80]}; must have {', '.join(names)}")

    def need(right: bool, name: str, rule: str) -> None:
        if not right:
            raise InputError(f"{place}: guard: {name} = {str(state[name])[:80]}: must be {rule}")

    for name in ("judged", "skips", "rewinds"):
        need(_is_count(state[name]), name, "a whole number >= 0")
    for name in ("spiked_at", *_PAIRS):
        need(isinstance(state[name], list), name, "a list")
    for name in _PAIRS:
        pairs = all(isinstance(pair, list) and len(pair) == 2 for pair in state[name])
        need(pairs, name, "a list of pairs")
    numbers = [number for pair in state["window"] for number in pair]
    finite = all(type(number) is float and math.isfinite(number) for number in numbers)
    need(finite, "window", "pairs [loss, gradient norm] of finite numbers")
    need(all(norm > 0 for norm in numbers[1::2]), "window", "pairs [loss, gradient norm > 0]")
    spikes = (
        _is_rising(state["spiked_at"]) and max(state["spiked_at"], default=0) <= state["judged"]
    )
    need(spikes, "spiked_at", "rising whole numbers up to `judged`")
    ends = [end for pair in state["left_out"] for end in pair]
    need(_is_rising(ends), "left_out", "rising pairs [first sample, end]")
    pairs = {name: [tuple(pair) for pair in state[name]] for name in _PAIRS}
    return _Memory(**{**state, "spiked_at": list(state["spiked_at"]), **pairs})


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_rising(values: list[Any]) -> bool:
    """Whole numbers, each above the one before."""
    return all(map(_is_count, values)) and all(a < b for a, b in pairwise(values))
