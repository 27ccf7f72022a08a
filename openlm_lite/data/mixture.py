"""Which source sample i comes from: an exact, periodic pattern per phase, computed once.

    weights   {web: 0.7, code: 0.3}   -> whole counts over a period:   {web: 7, code: 3} of 10
    pattern   0 0 1 0 0 1 0 0 1 0     in the first n samples, each source is within 1 of n w
    sample i  -> phase (curriculum) -> place in the pattern -> (source, number within the source)

The pattern is the schedule of Baruah, Cohen, Plaxton and Varvel ("Proportionate progress", 1996):
sample k (from 0) of a source of weight w may stand at places floor(k / w) to ceil((k + 1) / w) - 1,
and of the sources that may, the one whose last place comes first is taken. All deadlines are met,
which is what keeps each count within one of its share.

Weights are taken as the decimal fractions that were written. Where their common period is longer
than MAX_PERIOD (token budgets often are), they are rounded to multiples of 1 / MAX_PERIOD, and
`effective_weights` says to what.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite, lcm
from typing import NamedTuple

import numpy as np

from openlm_lite.data.order import distinct
from openlm_lite.errors import InputError

MAX_PERIOD = 100_000


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture. Its share: `weight`, `tokens` or `epochs`; exactly one of them.

    Budgets (`tokens`, `epochs`) are what the whole run reads of the source; what they leave of the
    run is shared among the sources with a `weight`, in proportion.
    """

    path: str  # dataset folder, as data.train
    weight: float | None = None  # relative to the other weights
    tokens: int | None = None  # of the run's tokens
    epochs: float | None = None  # how often the source is read; more than 1 repeats it

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if k != "path" and v is not None}
        if len(given) != 1:
            raise InputError(
                f"source {self.path}: {', '.join(given) or 'no share'} given; give one of "
                "weight, tokens, epochs"
            )
        ((name, value),) = given.items()
        if not (isfinite(value) and value >= 0) or (name != "weight" and value == 0):
            least = "at least 0" if name == "weight" else "above 0"
            raise InputError(f"source {self.path}: {name} = {value}, must be {least}")


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of a curriculum: from this token of the run on, these weights."""

    from_tokens: int
    weights: dict[str, float]  # source -> weight; a source that is left out is not read


class Origins(NamedTuple):
    """Where samples come from; int64 arrays of one length."""

    source: np.ndarray  # number of the source
    number: np.ndarray  # of the sample within the source, from 0 over all epochs


class Pattern:
    """The order of the sources under fixed weights; pure, O(1) per sample."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        """`weights` are not negative and sum to 1."""
        counts = _whole_counts(weights)
        self.period = sum(counts)
        self.effective_weights = [Fraction(n, self.period) for n in counts]
        self._per_period = np.array(counts)
        self._source = _schedule(counts)
        self._number = np.empty(self.period, dtype=np.int64)
        for source, count in enumerate(counts):
            self._number[self._source == source] = np.arange(count)

    def locate(self, indices: np.ndarray) -> Origins:
        """The origins of the samples `indices` (int64, >= 0) of this pattern."""
        periods, places = np.divmod(np.asarray(indices, dtype=np.int64), self.period)
        source = self._source[places].astype(np.int64)
        return Origins(source, periods * self._per_period[source] + self._number[places])

    def counts(self, n: int) -> np.ndarray:
        """How many of the first `n` samples each source gives."""
        periods, rest = divmod(n, self.period)
        in_rest = np.bincount(self._source[:rest], minlength=len(self._per_period))
        return periods * self._per_period + in_rest


class Mixture:
    """Patterns one after the other: phase p begins at sample `starts[p]`; a source goes on."""

    def __init__(self, names: Sequence[str], phases: Sequence[tuple[int, Pattern]]) -> None:
        self.names = tuple(names)
        self._patterns = [pattern for _, pattern in phases]
        self._starts = np.array([start for start, _ in phases], dtype=np.int64)
        self._before = [np.zeros(len(names), dtype=np.int64)]  # of each phase, per source
        for p, pattern in enumerate(self._patterns[:-1]):
            length = int(self._starts[p + 1] - self._starts[p])
            self._before.append(self._before[p] + pattern.counts(length))

    def locate(self, indices: np.ndarray) -> Origins:
        """The origins of the samples `indices` (int64, >= 0, any order) of the run."""
        indices = np.asarray(indices, dtype=np.int64)
        phases = np.searchsorted(self._starts, indices, side="right") - 1
        source, number = np.empty_like(indices), np.empty_like(indices)
        for p in distinct(phases):
            here = phases == p
            source[here], number[here] = self._patterns[p].locate(indices[here] - self._starts[p])
            number[here] += self._before[p][source[here]]
        return Origins(source, number)

    def counts(self, n: int) -> np.ndarray:
        """How many of the first `n` samples of the run each source gives, int64."""
        p = int(np.searchsorted(self._starts, max(n, 0), side="right")) - 1
        return self._before[p] + self._patterns[p].counts(n - int(self._starts[p]))

    def describe(self) -> list[tuple[int, dict[str, float]]]:
        """(first sample, source -> share as it is kept) of every phase."""
        shares = [[float(w) for w in pattern.effective_weights] for pattern in self._patterns]
        return [
            (start, dict(zip(self.names, share, strict=True)))
            for start, share in zip(self._starts.tolist(), shares, strict=True)
        ]


def mixture_of(
    sources: Mapping[str, SourceConfig],
    curriculum: Mapping[str, PhaseConfig],
    *,
    tokens_per_epoch: Mapping[str, int],
    total_tokens: int,
    seq_len: int,
) -> Mixture:
    """The mixture of a run of `total_tokens`.

    Without a curriculum the sources' own shares hold from the first token to the last; with one,
    they hold until its first phase begins. Raises InputError for shares that do not fit the run.
    """
    names = list(sources)
    first = _shares(sources, tokens_per_epoch, total_tokens)
    phases = [(0, first)]
    for name, phase in sorted(curriculum.items(), key=lambda item: item[1].from_tokens):
        if phase.from_tokens % seq_len:
            raise InputError(
                f"data.curriculum.{name}: from_tokens = {phase.from_tokens} is no multiple of "
                f"data.seq_len = {seq_len}; the next one is "
                f"{-(-phase.from_tokens // seq_len) * seq_len}"
            )
        phases.append((phase.from_tokens // seq_len, _normal(phase.weights, names)))
    if len(phases) > 1 and phases[1][0] == 0:
        del phases[0]
    return Mixture(names, [(start, Pattern(weights)) for start, weights in phases])


def check_mixture(
    sources: Mapping[str, SourceConfig], curriculum: Mapping[str, PhaseConfig]
) -> list[str]:
    """What is wrong with these, apart from the run's size."""
    problems: list[str] = []
    if sources and not any(s.weight is None or s.weight > 0 for s in sources.values()):
        problems.append("sources: the weights sum to nothing; give at least one above 0")
    if curriculum and not sources:
        problems.append("curriculum: needs data.sources, whose weights it changes")
    if curriculum and any(s.weight is None for s in sources.values()):
        problems.append("curriculum: goes with weights, not with tokens or epochs")
    begins: dict[int, str] = {}
    for name, phase in curriculum.items():
        place = f"curriculum.{name}"
        other = begins.setdefault(phase.from_tokens, name)
        if other != name:
            problems.append(f"{place}: begins at {phase.from_tokens} tokens, as {other} does")
        if phase.from_tokens < 0:
            problems.append(f"{place}: from_tokens = {phase.from_tokens}, must not be negative")
        unknown = sorted(phase.weights.keys() - sources.keys())
        if sources and unknown:
            known = ", ".join(sources)
            problems.append(f"{place}: no source {', '.join(unknown)}; there are {known}")
        if not all(isfinite(w) and w >= 0 for w in phase.weights.values()):
            problems.append(f"{place}: weights must be at least 0")
        elif not any(phase.weights.values()):
            problems.append(f"{place}: the weights sum to nothing; give at least one above 0")
    return problems


def _shares(
    sources: Mapping[str, SourceConfig], tokens_per_epoch: Mapping[str, int], total_tokens: int
) -> list[Fraction]:
    """The share of the run of each source, exactly; they sum to 1."""
    budgets = {
        name: Fraction(source.tokens)
        if source.tokens is not None
        else _exact(source.epochs) * tokens_per_epoch[name]
        for name, source in sources.items()
        if source.weight is None
    }
    weights = {name: s.weight for name, s in sources.items() if s.weight is not None}
    budget = sum(budgets.values(), start=Fraction(0))
    left = total_tokens - budget
    listed = ", ".join(f"{name} {float(tokens):,.0f}" for name, tokens in budgets.items())
    if left < 0:
        raise InputError(
            f"data.sources: the budgets ({listed}) are {float(-left):,.0f} tokens more than the "
            f"run's {total_tokens:,}; lower them, or raise total_tokens"
        )
    if not any(weights.values()):
        # whole steps: a run may be shorter than its budgets by part of one
        if left > 0 and left * 1000 > total_tokens:
            raise InputError(
                f"data.sources: the budgets ({listed}) leave {float(left):,.0f} of the run's "
                f"{total_tokens:,} tokens to nobody; give one source a weight, or set total_tokens "
                f"= {float(budget):.0f}"
            )
        return [budgets.get(name, Fraction(0)) / budget for name in sources]
    shared = dict(zip(weights, _normal(weights, list(weights)), strict=True))
    return [
        budgets[name] / total_tokens if name in budgets else shared[name] * left / total_tokens
        for name in sources
    ]


def _normal(weights: Mapping[str, float | None], names: Sequence[str]) -> list[Fraction]:
    exact = [_exact(weights.get(name)) for name in names]
    return [weight / sum(exact) for weight in exact]


def _exact(value: float | None) -> Fraction:
    """The decimal that was written: 0.1 is 1/10."""
    return Fraction(repr(value)) if value is not None else Fraction(0)


def _whole_counts(weights: Sequence[Fraction]) -> list[int]:
    """Counts in proportion to `weights`: exactly, if MAX_PERIOD samples can hold that."""
    period = lcm(*(weight.denominator for weight in weights))
    if period <= MAX_PERIOD:
        return [int(weight * period) for weight in weights]
    counts = [int(weight * MAX_PERIOD) for weight in weights]
    # the largest remainders are rounded up, and no source with a weight is lost
    counts = [max(n, int(w > 0)) for n, w in zip(counts, weights, strict=True)]
    by_remainder = sorted(range(len(weights)), key=lambda s: counts[s] - weights[s] * MAX_PERIOD)
    for source in by_remainder[: max(0, MAX_PERIOD - sum(counts))]:
        counts[source] += 1
    return counts


def _schedule(counts: Sequence[int]) -> np.ndarray:
    """The source at each place of a period (module docstring), int32."""
    period = sum(counts)
    order = np.empty(period, dtype=np.int32)
    # (first place, last place, source, sample): waiting ones by the first, ready ones by the last
    waiting = [(0, -(-period // n) - 1, source, 0) for source, n in enumerate(counts) if n]
    ready: list[tuple[int, int, int]] = []
    heapq.heapify(waiting)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, last, source, k = heapq.heappop(waiting)
            heapq.heappush(ready, (last, source, k))
        last, source, k = heapq.heappop(ready)
        assert last >= place
        order[place] = source
        if k + 1 < (n := counts[source]):
            first, last = (k + 1) * period // n, -(-(k + 2) * period // n) - 1
            heapq.heappush(waiting, (first, last, source, k + 1))
    return order
