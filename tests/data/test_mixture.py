"""The mixture: every prefix holds the weights, a sample's origin is a function of its index."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_lite.data.mixture import (
    MAX_PERIOD,
    Mixture,
    Pattern,
    PhaseConfig,
    SourceConfig,
    check_mixture,
    mixture_of,
)
from openlm_lite.errors import InputError

WEIGHTS = st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any)


def pattern_of(weights: list[int]) -> Pattern:
    return Pattern([Fraction(w, sum(weights)) for w in weights])


def mix(weights: dict[str, float], **more: object) -> Mixture:
    sources = {name: SourceConfig(f"data/{name}", weight=w) for name, w in weights.items()}
    given: dict = {"tokens_per_epoch": {}, "total_tokens": 10**9, "seq_len": 1, **more}
    return mixture_of(sources, given.pop("curriculum", {}), **given)


@given(WEIGHTS)
def test_every_prefix_holds_each_weight_to_less_than_one_sample(weights: list[int]) -> None:
    pattern = pattern_of(weights)
    n = 2 * pattern.period + 3
    sources = pattern.locate(np.arange(n)).source
    for source, weight in enumerate(weights):
        counts = np.concatenate([[0], np.cumsum(sources == source)])
        error = counts * sum(weights) - np.arange(n + 1) * weight
        assert np.abs(error).max() < sum(weights)
        assert pattern.counts(n)[source] == counts[-1]


@given(WEIGHTS, st.integers(0, 10**9))
def test_a_sources_samples_are_numbered_without_gaps(weights: list[int], first: int) -> None:
    pattern = pattern_of(weights)
    source, number = pattern.locate(np.arange(first, first + 500))
    before = pattern.counts(first)
    for s in range(len(weights)):
        mine = number[source == s]
        assert mine.tolist() == list(range(before[s], before[s] + len(mine)))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-7, 1.0), min_size=2, max_size=5))
def test_weights_with_no_short_period_are_kept_to_its_grain(weights: list[float]) -> None:
    mixture = mix({str(i): w for i, w in enumerate(weights)})
    ((start, shares),) = mixture.describe()
    assert start == 0 and sum(shares.values()) == pytest.approx(1.0)
    for share, weight in zip(shares.values(), weights, strict=True):
        assert share > 0
        assert abs(share - weight / math.fsum(weights)) <= len(weights) / MAX_PERIOD


def test_decimals_are_taken_as_they_are_written() -> None:
    assert Pattern([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]).period == 10
    assert [s for _, s in mix({"a": 0.7, "b": 0.2, "c": 0.1}).describe()] == [
        {"a": 0.7, "b": 0.2, "c": 0.1}
    ]


def test_a_sample_far_away_is_found_at_once() -> None:
    mixture = mix({"web": 0.12345, "code": 0.87655})
    at = 2_500_000_000
    source, number = mixture.locate(np.array([at]))
    assert mixture.counts(at)[source[0]] == number[0]


@given(
    st.lists(
        st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=1, max_size=4
    ),
    st.lists(st.integers(1, 300), min_size=3, max_size=3),
)
def test_a_curriculum_changes_the_weights_at_its_token_counts_and_repeats_nothing(
    phases: list[list[int]], lengths: list[int]
) -> None:
    names = ["a", "b", "c"]
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()[: len(phases)]
    first, *rest = (dict(zip(names, map(float, p), strict=True)) for p in phases)
    later = zip(starts[1:], rest, strict=True)
    curriculum = {str(s): PhaseConfig(8 * s, p) for s, p in later}
    mixture = mix(first, curriculum=curriculum, seq_len=8)
    total = starts[-1] + 100
    source, number = mixture.locate(np.arange(total))
    for s in range(3):  # each source is read on, across the phases
        assert number[source == s].tolist() == list(range((source == s).sum()))
        assert mixture.counts(total)[s] == (source == s).sum()
    for start, end, weights in zip(starts, [*starts[1:], total], phases, strict=True):
        for s, weight in enumerate(weights):
            count = (source[start:end] == s).sum()
            assert abs(count - (end - start) * weight / sum(weights)) < 1


def test_budgets_take_their_tokens_and_weights_share_the_rest() -> None:
    sources = {
        "books": SourceConfig("b", epochs=2.5),
        "math": SourceConfig("m", tokens=100_000),
        "web": SourceConfig("w", weight=3.0),
        "code": SourceConfig("c", weight=1.0),
    }
    mixture = mixture_of(
        sources, {}, tokens_per_epoch={"books": 40_000}, total_tokens=1_000_000, seq_len=10
    )
    assert mixture.counts(100_000).tolist() == [10_000, 10_000, 60_000, 20_000]


def test_budgets_that_do_not_fit_the_run_are_refused_with_the_numbers() -> None:
    for tokens, total, message in (
        (2000, 1000, "1,000 tokens more than the run's 1,000"),
        (500, 1000, r"leave 500 of the run's 1,000 tokens to nobody.*total_tokens = 500"),
    ):
        sources = {"math": SourceConfig("m", tokens=tokens)}
        with pytest.raises(InputError, match=message):
            mixture_of(sources, {}, tokens_per_epoch={}, total_tokens=total, seq_len=1)


@pytest.mark.parametrize("share", [{"weight": -0.1}, {"weight": math.nan}, {"tokens": 0}, {}])
def test_a_share_that_is_none_is_refused(share: dict[str, float]) -> None:
    with pytest.raises(InputError, match="source data/a"):
        SourceConfig("data/a", **share)  # pyright: ignore[reportArgumentType]


def test_weights_that_sum_to_nothing_and_unknown_names_are_all_named() -> None:
    sources = {"a": SourceConfig("a", weight=0.0)}
    curriculum = {"x": PhaseConfig(10, {"b": 1.0}), "y": PhaseConfig(10, {"a": 0.0})}
    problems = check_mixture(sources, curriculum)
    assert len(problems) == 4
    assert "sum to nothing" in problems[0] and "no source b; there are a" in problems[1]
    with pytest.raises(InputError, match=r"from_tokens = 12 .*the next one is 16"):
        mix({"a": 1.0}, curriculum={"late": PhaseConfig(12, {"a": 1.0})}, seq_len=8)
