"""The IsoFLOP form: where, for a given compute, the loss is lowest.

Hoffmann et al. (arXiv:2203.15556), approach 2::

    loss │ ╲_╱                 one parabola in log N for every budget C
         │    ╲__╱             its lowest point: N*(C), L*(C)
         │       ╲__╱          then N* = N_coefficient C^N_exponent,  D* = C / (6 N*)
         └──────────── log N        L* = E + L_coefficient C^-L_exponent
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from openlm_lite.scaling.laws import Array, UndeterminedError, fit_power

SAME_BUDGET = 0.05
"""runs whose FLOPs are at most this share apart belong to one budget"""


@dataclass(frozen=True)
class Budget:
    """Runs of one compute budget, and the parabola through their losses."""

    C: float
    N: Array
    loss: Array
    N_best: float
    loss_best: float
    curve: Array
    """coefficients of (log(N / N_best))^2, ^1, ^0"""

    @property
    def residuals(self) -> Array:
        return self.loss - np.polyval(self.curve, np.log(self.N / self.N_best))


@dataclass(frozen=True)
class IsoFlop:
    """The best size, and the loss there, as powers of the compute."""

    N_coefficient: float
    N_exponent: float
    E: float | None
    """these three are None with fewer than 3 budgets"""
    L_coefficient: float | None
    L_exponent: float | None
    FORM: ClassVar[str] = (
        "N* = N_coefficient C^N_exponent, D* = C / (6 N*), L* = E + L_coefficient C^-L_exponent"
    )

    def best_size(self, flops: float) -> float:
        """Parameters of the lowest loss for this many FLOPs."""
        return self.N_coefficient * flops**self.N_exponent

    def best_loss(self, flops: float) -> float | None:
        """The lowest loss for this many FLOPs; None where no curve was fitted."""
        if self.E is None or self.L_coefficient is None or self.L_exponent is None:
            return None
        return self.E + self.L_coefficient * flops**-self.L_exponent


def fit_isoflop(
    N: Array, D: Array, loss: Array, at: Sequence[float] = ()
) -> tuple[IsoFlop, list[Budget]]:
    """Fit the parabolas and the powers.

    Without `at`, runs of equal FLOPs make a budget. With it, these are the budgets, and the loss
    of every size there is read off the line between its two nearest runs, in log C and log L; a
    size whose runs do not enclose a budget has no part in it.
    Raises UndeterminedError for fewer than two budgets of at least three sizes each.
    """
    groups = _interpolated(N, D, loss, at) if at else _equal(N, D, loss)
    enough = {C: runs for C, runs in groups.items() if len(np.unique(runs[0])) >= 3}
    if len(enough) < 2:
        found = ", ".join(
            f"{C:.3g} ({len(np.unique(n))})" for C, (n, _) in list(groups.items())[:8]
        ) + (", …" if len(groups) > 8 else "")
        raise UndeterminedError(
            "isoflop needs at least 2 budgets with at least 3 different N each; found (FLOPs, "
            f"number of N): {found or 'none'}; "
            + (
                "choose other --budgets, which the runs of more sizes enclose"
                if at
                else "with --budgets C,C,… losses are read off between the runs of each size"
            )
        )
    budgets = [_parabola(C, *runs) for C, runs in enough.items()]
    log_C = np.log([b.C for b in budgets])
    slope, height = np.polyfit(log_C, np.log([b.N_best for b in budgets]), 1)
    E = coefficient = exponent = None
    if len(budgets) >= 3:
        E, coefficient, exponent = fit_power(
            np.exp(log_C), np.array([b.loss_best for b in budgets])
        )
    law = IsoFlop(float(np.exp(height)), float(slope), E, coefficient, exponent)
    return law, budgets


def _equal(N: Array, D: Array, loss: Array) -> dict[float, tuple[Array, Array]]:
    C = 6 * N * D
    order = np.argsort(C)
    cuts = np.flatnonzero(np.diff(np.log(C[order])) > SAME_BUDGET) + 1
    parts = np.split(order, cuts)
    return {float(np.exp(np.log(C[p]).mean())): (N[p], loss[p]) for p in parts}


def _interpolated(
    N: Array, D: Array, loss: Array, at: Sequence[float]
) -> dict[float, tuple[Array, Array]]:
    C, found = 6 * N * D, {}
    for budget in sorted(at):
        sizes, losses = [], []
        for size in np.unique(N):
            mine = np.flatnonzero(size == N)
            mine = mine[np.argsort(C[mine])]
            if C[mine[0]] <= budget <= C[mine[-1]]:
                sizes.append(size)
                losses.append(
                    np.exp(np.interp(np.log(budget), np.log(C[mine]), np.log(loss[mine])))
                )
        found[float(budget)] = (np.array(sizes), np.array(losses))
    return found


def _parabola(C: float, N: Array, loss: Array) -> Budget:
    middle = np.log(N).mean()
    a, b, c = np.polyfit(np.log(N) - middle, loss, 2)
    if a <= 0:
        raise UndeterminedError(
            f"isoflop: at {C:.3g} FLOPs the loss has no lowest point in N: the parabola through "
            f"{len(N)} runs of N {N.min():.3g} to {N.max():.3g} opens downwards; leave this budget "
            "out or add sizes"
        )
    x = -b / (2 * a)
    best = float(a * x * x + b * x + c)
    return Budget(C, N, loss, float(np.exp(middle + x)), best, np.array([a, 0.0, best]))


def notes_of(budgets: Sequence[Budget]) -> list[str]:
    """What to doubt, one sentence each."""
    return [
        f"at {b.C:.3g} FLOPs the best N, {b.N_best:.3g}, lies outside of the runs' "
        f"{b.N.min():.3g} to {b.N.max():.3g}"
        for b in budgets
        if not b.N.min() <= b.N_best <= b.N.max()
    ]
