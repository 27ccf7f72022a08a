"""Fitting Chinchilla's parametric form as Hoffmann et al. did (arXiv:2203.15556, appendix D.3).

::

    log L(N, D) = log-sum-exp(a - alpha log N, b - beta log D, e)      A = e^a, B = e^b, E = e^e
    minimise    sum over the runs of Huber(log L(N, D) - log loss), delta 1e-3, by L-BFGS
    from        a, b in 0, 5 … 25,  e in -1, -0.5 … 1,  alpha, beta in 0, 0.5 … 2
"""

from __future__ import annotations

import numpy as np

from openlm_lite.scaling.laws import (
    Array,
    Chinchilla,
    check_identified,
    check_number,
    check_spread,
)

HUBER_DELTA = 1e-3
_TRIED, _FOLLOWED = 8, 3


def fit_chinchilla(N: Array, D: Array, loss: Array, start: Chinchilla | None = None) -> Chinchilla:
    """The law with the least Huber loss (delta 1e-3) of log predicted - log observed.

    Of the 4,500 starts, the best for each pair of exponents is kept, and the 8 best of these are
    followed, first with a wide delta, which makes it least squares. The 3 best ends go on to 1e-3,
    or the linear solution for a pair of exponents, where it is better than they.
    `start`: follow this one only (a law fitted to nearly the same runs). Raises UndeterminedError.
    """
    check_number("chinchilla", ("E", "A", "B", "alpha", "beta"), len(loss))
    check_spread(N, D)
    n, d, y = np.log(N), np.log(D), np.log(loss)
    n_mid, d_mid = n.mean(), d.mean()
    n, d = n - n_mid, d - d_mid  # else a and alpha (b and beta) are nearly one direction

    def value_of(theta: Array) -> float:
        return _huber(theta, n, d, y, HUBER_DELTA)[0]

    if start is None:
        starts = _hoffmann_starts()  # (exponents 25, others 180, 5)
        starts[..., 0] -= starts[..., 3] * n_mid
        starts[..., 1] -= starts[..., 4] * d_mid
        starts = [min(group, key=value_of) for group in starts]
        starts = [_minimised(s, n, d, y, 1.0) for s in sorted(starts, key=value_of)[:_TRIED]]
        starts += _linear_starts(n, d, np.exp(y))
        starts = sorted(starts, key=value_of)[:_FOLLOWED]
    else:
        a, b = np.log(start.A) - start.alpha * n_mid, np.log(start.B) - start.beta * d_mid
        starts = [np.array([a, b, np.log(start.E), start.alpha, start.beta])]
    for delta in (0.03, HUBER_DELTA, HUBER_DELTA):  # again: L-BFGS's memory misleads at corners
        starts = [_minimised(s, n, d, y, delta) for s in starts]
    theta = min(starts, key=value_of)
    shares = _shares(theta, n, d)[1]
    jacobian = np.column_stack([shares.T, -shares[0] * n, -shares[1] * d])
    check_identified(jacobian, N, D)
    a, b, e, alpha, beta = (float(t) for t in theta)
    A, B = np.exp(a + alpha * n_mid), np.exp(b + beta * d_mid)
    return Chinchilla(float(np.exp(e)), float(A), float(B), alpha, beta)


def _hoffmann_starts() -> Array:
    """(25 pairs of alpha, beta; 180 of the others; 5): a, b, e, alpha, beta."""
    logs, exponents = np.arange(0.0, 26.0, 5.0), np.arange(0.0, 2.1, 0.5)
    axes = (exponents, exponents, logs, logs, np.arange(-1.0, 1.1, 0.5))
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    return grid.reshape(25, 180, 5)[..., [2, 3, 4, 0, 1]]


def _linear_starts(n: Array, d: Array, loss: Array) -> list[Array]:
    """For the best of 20 x 20 exponents: the others, solved by least squares. None if not > 0."""
    alpha, beta = (x.ravel() for x in np.meshgrid(*2 * [np.geomspace(0.05, 1.5, 20)]))
    terms = [np.exp(-alpha[:, None] * n), np.exp(-beta[:, None] * d), np.ones((400, len(n)))]
    X = np.stack(terms, -1) / loss[:, None]  # relative residuals are about those of the log
    coefficients = np.linalg.pinv(X).sum(-1)  # (400, 3)
    residual = np.abs(np.einsum("gnk,gk->gn", X, coefficients) - 1).sum(-1)
    residual[(coefficients <= 0).any(-1)] = np.inf
    best = int(np.argmin(residual))
    if not np.isfinite(residual[best]):
        return []
    return [np.array([*np.log(coefficients[best]), alpha[best], beta[best]])]


def _shares(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """log L of each run, and each term's share of L (3, runs)."""
    a, b, e, alpha, beta = theta
    parts = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
    log_sum = np.logaddexp.reduce(parts, axis=0)
    return log_sum, np.exp(parts - log_sum)


def _huber(theta: Array, n: Array, d: Array, y: Array, delta: float) -> tuple[float, Array]:
    """Sum of Huber losses over the runs, and its gradient, both over delta squared."""
    log_sum, shares = _shares(theta, n, d)
    r = (log_sum - y) / delta
    value = np.where(np.abs(r) <= 1, r * r / 2, np.abs(r) - 0.5).sum()
    slope = np.clip(r, -1, 1) * shares / delta
    gradient = [*slope.sum(1), -(slope[0] * n).sum(), -(slope[1] * d).sum()]
    return float(value), np.array(gradient)


def _minimised(theta: Array, n: Array, d: Array, y: Array, delta: float) -> Array:
    """Where L-BFGS ends."""
    import torch

    point = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=60 if delta == 1.0 else 200,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        value, gradient = _huber(point.detach().numpy(), n, d, y, delta)
        point.grad = torch.from_numpy(gradient)
        return torch.tensor(value, dtype=torch.float64)

    optimizer.step(closure)
    return point.detach().numpy().copy()
