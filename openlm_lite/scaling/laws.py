"""The forms of scaling laws, and how each is fitted to finished runs.

N parameters, D tokens, M = D / N, C = 6 N D FLOPs; losses in nats per token::

    over-training   L = E + (a M^eta + b M^-eta) C^-eta      least squares on L
    chinchilla      L = E + A N^-alpha + B D^-beta           Huber on log L
    error           Err = epsilon - k exp(-gamma L)          least squares on Err

The first and the last are of Gadre et al., "Language models scale reliably with over-training and
on downstream tasks" (arXiv:2403.08540), whose code uses scipy's curve_fit from many starts. Both
are linear in all parameters but one, so here that one is searched (on ever finer grids)
and the others are solved for exactly: the global minimum, without starts and without scipy. The
second is of Hoffmann et al., "Training compute-optimal large language models" (arXiv:2203.15556),
approach 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from openlm_lite.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]
LOG_6 = float(np.log(6.0))


class UndeterminedError(InputError):
    """The runs do not determine the law: too few of them, or without spread."""


class LossLaw(Protocol):
    """A loss as a function of parameters and tokens."""

    FORM: ClassVar[str]

    def loss(self, N: Array, D: Array) -> Array: ...
    def best_size(self, flops: float) -> float | None: ...


@dataclass(frozen=True)
class OverTraining:
    """L = E + (a M^eta + b M^-eta) C^-eta: parallel lines, one for every M, in log (L - E)."""

    E: float
    a: float
    b: float
    eta: float
    FORM: ClassVar[str] = "L = E + (a M^eta + b M^-eta) C^-eta"

    def loss(self, N: Array, D: Array) -> Array:
        M, C = D / N, 6.0 * N * D
        return self.E + (self.a * M**self.eta + self.b * M**-self.eta) * C**-self.eta

    def best_size(self, flops: float) -> float | None:
        """Parameters of the lowest loss for this many FLOPs; None where there is no lowest."""
        if self.a <= 0 or self.b <= 0:
            return None
        best_M = (self.b / self.a) ** (0.5 / self.eta)
        return float(np.sqrt(flops / (6.0 * best_M)))


@dataclass(frozen=True)
class Chinchilla:
    """L = E + A N^-alpha + B D^-beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    FORM: ClassVar[str] = "L = E + A N^-alpha + B D^-beta"

    def loss(self, N: Array, D: Array) -> Array:
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    def best_size(self, flops: float) -> float | None:
        """Parameters of the lowest loss for this many FLOPs; None where there is no lowest."""
        if self.alpha <= 0 or self.beta <= 0:
            return None
        both = self.alpha + self.beta
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        return float(scale * (flops / 6.0) ** (self.beta / both))


@dataclass(frozen=True)
class ErrorLaw:
    """Err = epsilon - k exp(-gamma L): the mean error on tasks, from the loss."""

    epsilon: float
    k: float
    gamma: float
    FORM: ClassVar[str] = "Err = epsilon - k exp(-gamma L)"

    def error(self, loss: Array) -> Array:
        return self.epsilon - self.k * np.exp(-self.gamma * loss)


def parameters_of(law: Any) -> dict[str, float]:
    """Names and values of a law's parameters."""
    return asdict(law)


ETA_RANGE = (0.01, 0.75)
GAMMA_RANGE = (1e-3, 50.0)


def fit_over_training(N: Array, D: Array, loss: Array) -> OverTraining:
    """The law with the least squared residuals of the loss.

    Args: parameters, tokens and loss of each run. Raises UndeterminedError.
    """
    check_number("over-training", ("E", "a", "b", "eta"), len(loss))
    check_spread(N, D)
    n, d = np.log(N), np.log(D)
    n_mid, d_mid = n.mean(), d.mean()
    n, d = n - n_mid, d - d_mid  # else the columns are alike but for a factor of 1e3 and more

    def columns(eta: Array) -> Array:  # (G,) -> (G, runs, 3)
        power = -2 * eta[:, None]
        return np.stack([np.exp(power * n), np.exp(power * d), np.ones((len(eta), len(n)))], -1)

    eta, (u, v, E) = _least_squares(loss, columns, ETA_RANGE)
    x = columns(np.array([eta]))[0]
    check_identified(np.column_stack([x, -2 * (u * x[:, 0] * n + v * x[:, 1] * d)]), N, D)
    a, b = u * np.exp(eta * (LOG_6 + 2 * n_mid)), v * np.exp(eta * (LOG_6 + 2 * d_mid))
    return OverTraining(E, float(a), float(b), eta)


def fit_error(loss: Array, error: Array) -> ErrorLaw:
    """The law with the least squared residuals of the error. Raises UndeterminedError."""
    check_number("the error law", ("epsilon", "k", "gamma"), len(loss))
    if len(np.unique(loss)) < 3:
        raise UndeterminedError("the error law needs runs of at least 3 different losses")
    middle = loss.mean()
    x = loss - middle

    def columns(gamma: Array) -> Array:  # (G,) -> (G, runs, 2)
        return np.stack([np.ones((len(gamma), len(x))), -np.exp(-gamma[:, None] * x)], -1)

    gamma, (epsilon, k) = _least_squares(error, columns, GAMMA_RANGE)
    jacobian = np.column_stack([columns(np.array([gamma]))[0], k * x * np.exp(-gamma * x)])
    if not _has_full_rank(jacobian):
        raise UndeterminedError(
            "the error law is not determined: the error hardly changes with the loss in these "
            "runs; add runs of other losses"
        )
    return ErrorLaw(epsilon, float(k * np.exp(gamma * middle)), gamma)


def fit_power(x: Array, y: Array) -> tuple[float, float, float]:
    """E, k, p with the least squared residuals of y = E + k x^-p (at least 3 points)."""
    log_x = np.log(x)
    middle = log_x.mean()

    def columns(p: Array) -> Array:  # (G,) -> (G, points, 2)
        return np.stack([np.ones((len(p), len(x))), np.exp(-p[:, None] * (log_x - middle))], -1)

    p, (E, k) = _least_squares(y, columns, ETA_RANGE)
    return E, float(k * np.exp(p * middle)), p


def notes_of(law: OverTraining | Chinchilla | ErrorLaw) -> list[str]:
    """What to doubt in a fitted law, one sentence each."""
    found = []
    if isinstance(law, OverTraining) and _is_at_edge(law.eta, ETA_RANGE):
        found.append(
            f"eta = {law.eta:.4g} is at the edge of what is searched, {ETA_RANGE[0]} to "
            f"{ETA_RANGE[1]}: these runs do not show the curve"
        )
    if isinstance(law, ErrorLaw) and _is_at_edge(law.gamma, GAMMA_RANGE):
        found.append(
            f"gamma = {law.gamma:.4g} is at the edge of what is searched, {GAMMA_RANGE[0]} to "
            f"{GAMMA_RANGE[1]}: these runs do not show the curve"
        )
    if not isinstance(law, ErrorLaw) and law.E < 0:
        found.append(f"E = {law.E:.4g}: a loss below 0 in the limit is impossible")
    negative = [n for n in ("a", "b", "k") if getattr(law, n, 1.0) < 0]
    if negative:
        found.append(f"{', '.join(negative)} below 0: the law rises where it should fall")
    return found


def _is_at_edge(value: float, limits: tuple[float, float]) -> bool:
    return value < limits[0] * 1.01 or value > limits[1] / 1.01


def _least_squares(
    y: Array, columns: Callable[[Array], Array], limits: tuple[float, float]
) -> tuple[float, list[float]]:
    """The nonlinear parameter g in `limits`, and coefficients c, that minimise |y - columns(g) c|.

    Variable projection: for a given g the best c is linear least squares, so that only g is
    searched, on a grid even in log g and then on finer ones around the best point.
    """

    def rest(log_g: Array) -> Array:  # (G,) -> squared residuals (G,)
        Q, _ = np.linalg.qr(columns(np.exp(log_g)))
        residual = y - (Q @ (y @ Q)[..., None])[..., 0]
        return (residual**2).sum(-1)

    low, high = np.log(limits[0]), np.log(limits[1])
    best = low
    for n_points in (201, *[17] * 11):  # each narrows the interval 8 times
        grid = np.linspace(low, high, n_points)
        i = int(np.argmin(rest(grid)))
        best, low, high = grid[i], grid[max(0, i - 1)], grid[min(n_points - 1, i + 1)]
    g = float(np.exp(best))
    coefficients, *_ = np.linalg.lstsq(columns(np.array([g]))[0], y, rcond=None)
    return g, [float(c) for c in coefficients]


def check_number(what: str, names: tuple[str, ...], n_runs: int) -> None:
    if n_runs < len(names):
        raise UndeterminedError(
            f"{what} has {len(names)} parameters ({', '.join(names)}): at least {len(names)} runs "
            f"are needed to fit it on, and there {'is' if n_runs == 1 else 'are'} {n_runs}"
        )


def check_spread(N: Array, D: Array) -> None:
    """Raises UndeterminedError where N, D or M has one value only."""
    for name, values, remedy in (
        ("N (parameters)", N, "add runs of another size"),
        ("D (tokens)", D, "add runs of another length"),
        ("M = D / N", D / N, "add runs with another number of tokens per parameter"),
    ):
        if np.ptp(np.log(values)) < 1e-3:
            raise UndeterminedError(
                f"all {len(N)} runs to fit on have the same {name}, {values[0]:.6g}: what it does "
                f"to the loss cannot be told; {remedy}"
            )


def check_identified(jacobian: Array, N: Array, D: Array) -> None:
    if not _has_full_rank(jacobian):
        raise UndeterminedError(
            f"{len(N)} runs with {len(np.unique(N))} different N and {len(np.unique(D))} different "
            f"D do not determine {jacobian.shape[1]} parameters: many laws fit them equally well; "
            "add runs of other sizes and lengths"
        )


def _has_full_rank(jacobian: Array) -> bool:
    """Whether every parameter moves the fitted values in a way of its own, up to rounding."""
    norms = np.linalg.norm(jacobian, axis=0)
    if not np.isfinite(norms).all() or (norms < 1e-9 * norms.max()).any():
        return False
    singular = np.linalg.svd(jacobian / norms, compute_uv=False)
    return bool(singular[-1] > 1e-7 * singular[0])
