"""The forms and their fits: known truth comes back; what runs do not determine is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_lite.scaling.huber import fit_chinchilla
from openlm_lite.scaling.isoflop import fit_isoflop
from openlm_lite.scaling.laws import (
    Chinchilla,
    ErrorLaw,
    OverTraining,
    UndeterminedError,
    fit_error,
    fit_over_training,
    notes_of,
    parameters_of,
)

seeds = st.integers(0, 2**32 - 1)


def grid(rng: np.random.Generator, sizes: int = 4, lengths: int = 3) -> tuple[np.ndarray, ...]:
    """N and D of a grid of runs, none of them twice."""
    N = np.exp(np.sort(rng.uniform(np.log(1e6), np.log(1e9), sizes)))
    M = np.exp(np.sort(rng.uniform(np.log(2), np.log(600), lengths)))
    N, M = (x.ravel() for x in np.meshgrid(N * np.geomspace(1, 4, sizes), M))
    return N, M * N


@given(
    seeds,
    st.floats(0.5, 3),
    st.floats(50, 500),
    st.floats(50, 500),
    st.floats(0.08, 0.3),
)
def test_over_training_comes_back_from_its_own_losses(
    seed: int, E: float, a: float, b: float, eta: float
) -> None:
    law = OverTraining(E, a, b, eta)
    N, D = grid(np.random.default_rng(seed))
    found = fit_over_training(N, D, law.loss(N, D))
    np.testing.assert_allclose(found.loss(N, D), law.loss(N, D), rtol=1e-6)
    for name, value in parameters_of(found).items():
        assert value == pytest.approx(getattr(law, name), rel=1e-3), name


@given(seeds)
@settings(max_examples=10)
def test_over_training_does_not_depend_on_the_order_of_the_runs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    N, D = grid(rng)
    loss = OverTraining(1.8, 200, 300, 0.14).loss(N, D) + 0.02 * rng.standard_normal(len(N))
    order = rng.permutation(len(N))
    first, second = (fit_over_training(N[i], D[i], loss[i]) for i in (slice(None), order))
    assert parameters_of(first) == pytest.approx(parameters_of(second), rel=1e-6)


@given(seeds)
@settings(max_examples=10)
def test_no_other_over_training_law_nearby_fits_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    N, D = grid(rng)
    loss = OverTraining(1.8, 200, 300, 0.14).loss(N, D) + 0.02 * rng.standard_normal(len(N))
    best = fit_over_training(N, D, loss)
    rest = ((best.loss(N, D) - loss) ** 2).sum()
    for name, value in parameters_of(best).items():
        for factor in (0.999, 1.001):
            other = OverTraining(**(parameters_of(best) | {name: value * factor}))
            assert ((other.loss(N, D) - loss) ** 2).sum() >= rest


@given(st.floats(0.7, 1), st.floats(0.5, 4), st.floats(0.3, 2), st.integers(4, 12))
def test_the_error_law_comes_back(epsilon: float, k: float, gamma: float, n: int) -> None:
    law = ErrorLaw(epsilon, k, gamma)
    loss = np.linspace(2.5, 5.5, n)
    found = fit_error(loss, law.error(loss))
    assert parameters_of(found) == pytest.approx(parameters_of(law), rel=1e-4)


@pytest.mark.parametrize(
    "law",
    [
        Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28),  # of Hoffmann et al.
        Chinchilla(1.8172, 482.01, 2085.43, 0.3478, 0.3658),  # of Besiroglu et al.
    ],
)
def test_chinchilla_comes_back_from_its_own_losses(law: Chinchilla) -> None:
    N, D = grid(np.random.default_rng(0), 5, 4)
    found = fit_chinchilla(N, D, law.loss(N, D))
    assert parameters_of(found) == pytest.approx(parameters_of(law), rel=1e-3)


def test_chinchilla_is_hardly_moved_by_one_run_that_failed() -> None:
    """What the Huber loss is for."""
    law = Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28)
    N, D = grid(np.random.default_rng(1), 5, 4)
    loss = law.loss(N, D)
    loss[7] *= 1.5
    found = fit_chinchilla(N, D, loss, start=law)
    others = np.arange(len(N)) != 7
    np.testing.assert_allclose(found.loss(N, D)[others], law.loss(N, D)[others], rtol=2e-3)


@given(st.floats(1e17, 1e24))
@settings(max_examples=20)
def test_the_best_size_is_a_minimum_along_its_budget(flops: float) -> None:
    for law in (OverTraining(1.8, 200, 300, 0.14), Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28)):
        best = law.best_size(flops)
        assert best is not None
        N = best * np.array([0.9, 1.0, 1.1])
        low, middle, high = law.loss(N, flops / (6 * N))
        assert middle < low and middle < high


def test_isoflop_finds_the_exponent_of_a_known_law() -> None:
    law = Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28)
    pairs = [(C, law.best_size(C)) for C in np.geomspace(1e18, 1e22, 6)]
    N = np.array([n * f for _, n in pairs for f in np.geomspace(0.6, 1.6, 7)])  # type: ignore
    D = np.repeat([C for C, _ in pairs], 7) / (6 * N)
    found, budgets = fit_isoflop(N, D, law.loss(N, D))
    assert len(budgets) == 6
    assert found.N_exponent == pytest.approx(0.28 / 0.62, rel=1e-3)
    best = law.best_size(1e24)
    assert best is not None and found.best_size(1e24) == pytest.approx(best, rel=0.02)
    truth = law.loss(np.array(best), np.array(1e24 / (6 * best)))
    assert found.best_loss(1e24) == pytest.approx(float(truth), rel=1e-3)


def test_isoflop_reads_losses_off_between_the_runs_of_a_size() -> None:
    law = Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28)
    N, M = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 9), np.geomspace(0.5, 1e4, 60)))
    at = (1e18, 3e18, 1e19)
    found, _ = fit_isoflop(N, N * M, law.loss(N, N * M), at)
    assert found.N_exponent == pytest.approx(0.28 / 0.62, abs=0.03)


def runs(*pairs: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    N, D = (np.array(x) for x in zip(*pairs, strict=True))
    return N, D, OverTraining(1.8, 200, 300, 0.14).loss(N, D)


@pytest.mark.parametrize("fit", [fit_over_training, fit_chinchilla])
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(1e6, 1e7), (1e7, 1e8), (1e8, 1e8)], "runs are needed"),
        ([(1e6, 1e6 * k) for k in range(1, 8)], "the same N"),
        ([(1e6 * k, 1e8) for k in range(1, 8)], "the same D"),
        ([(1e6 * k, 2e7 * k) for k in range(1, 8)], "the same M"),
    ],
)
def test_too_few_runs_or_no_spread_is_one_clear_error(fit, pairs, message: str) -> None:
    with pytest.raises(UndeterminedError, match=message):
        fit(*runs(*pairs))


def test_two_sizes_by_two_lengths_do_not_determine_four_parameters() -> None:
    """Any exponent fits them: a sum of a function of N and one of D has three values to choose."""
    with pytest.raises(UndeterminedError, match="many laws fit them equally well"):
        fit_over_training(*runs((1e6, 1e8), (1e6, 1e9), (1e7, 1e8), (1e7, 1e9)))


def test_the_error_law_needs_three_losses_and_an_error_that_changes() -> None:
    with pytest.raises(UndeterminedError, match="at least 3 runs"):
        fit_error(np.array([2.0, 3.0]), np.array([0.5, 0.6]))
    with pytest.raises(UndeterminedError, match="3 different losses"):
        fit_error(np.array([2.0, 3.0, 3.0]), np.array([0.5, 0.6, 0.6]))
    with pytest.raises(UndeterminedError, match="hardly changes"):
        fit_error(np.array([2.0, 3.0, 4.0]), np.array([0.5, 0.5, 0.5]))


def test_a_budget_needs_three_sizes() -> None:
    with pytest.raises(UndeterminedError, match="at least 3 different N"):
        fit_isoflop(*runs((1e6, 1e8), (1e7, 1e7), (2e6, 1e9), (2e7, 1e8)))


def test_doubtful_laws_are_noted() -> None:
    assert "below 0" in notes_of(OverTraining(-1.0, 1, 1, 0.1))[0]
    assert "edge" in notes_of(OverTraining(1.0, 1, 1, 0.75))[0]
    assert "rises" in notes_of(OverTraining(1.0, -1, 1, 0.1))[0]
    assert notes_of(OverTraining(1.8, 200, 300, 0.14)) == []
