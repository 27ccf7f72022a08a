"""How sure is a measured mean or rate? Intervals of 95 %."""

from __future__ import annotations

import math

import numpy as np

_BINS = 1024  # values that the bootstrap tells apart


def bootstrap_mean(
    values: np.ndarray, iterations: int = 10_000, seed: int = 42
) -> tuple[float, float]:
    """The 2.5 and 97.5 percentile of the mean of `values` [n] resampled with replacement.

    What OpenLM reports of a validation loss, over its sequences and over its tokens. How often each
    value is drawn is multinomial, so one draw of n counts stands for n draws. More than 1,024
    values are put into as many bins of equal size, each counted with its mean: what varies inside
    a bin is lost, less than a thousandth of the interval's width for losses.
    """
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no values has no interval")
    parts = np.array_split(np.sort(values.astype(np.float64)), min(n, _BINS))
    means = np.array([part.mean() for part in parts])
    shares = np.array([len(part) for part in parts]) / n
    rng = np.random.default_rng(seed)
    found = np.concatenate(
        [
            rng.multinomial(n, shares, size=min(1000, iterations - start)) @ means / n
            for start in range(0, iterations, 1000)
        ]
    )
    lower, upper = np.percentile(found, (2.5, 97.5))
    return float(lower), float(upper)


def beta_interval(successes: int, trials: int) -> tuple[float, float]:
    """The central 95 % of a rate after `successes` of `trials`: the posterior of a uniform prior.

    That is Beta(successes + 1, failures + 1), whose quantiles are found by bisection of its
    distribution function: the chance that trials + 1 draws of rate p succeed more than `successes`
    times. Without trials it is (0.025, 0.975).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials}")
    return _quantile(0.025, successes, trials), _quantile(0.975, successes, trials)


def _quantile(probability: float, successes: int, trials: int) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        if _more_than(successes, trials + 1, p) < probability:
            low = p
        else:
            high = p
    return (low + high) / 2


def _more_than(successes: int, trials: int, p: float) -> float:
    """The chance of more than `successes` of `trials` at rate p."""
    if not 0 < p < 1:
        return float(p >= 1)
    odds = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(p)
        + (trials - k) * math.log1p(-p)
        for k in range(successes + 1, trials + 1)
    )
    return min(1.0, math.fsum(math.exp(x) for x in odds))
