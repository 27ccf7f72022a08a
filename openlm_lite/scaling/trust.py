"""How far to trust a fitted law: bootstrap intervals, and each run predicted from the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from openlm_lite.errors import InputError
from openlm_lite.scaling import laws
from openlm_lite.scaling.laws import Array, ErrorLaw, LossLaw, UndeterminedError
from openlm_lite.scaling.table import numbers

if TYPE_CHECKING:
    from openlm_lite.scaling.fit import FitLoss, Fitted

LEVEL = (2.5, 97.5)
"""percentiles of an interval"""
_FEW = 3
"""with fewer runs than this times the parameters, most resamples do not determine the law"""


class Drawn(NamedTuple):
    """The laws of the bootstrap, in the order of the draws."""

    laws: list[LossLaw]
    error_laws: list[ErrorLaw]
    method: str
    n_undetermined: int


def bootstrap(f: Fitted, refit: FitLoss, n: int, seed: int) -> Drawn:
    """Fit again on `n` draws of the runs.

    Runs are drawn with replacement. Where there are fewer than three per parameter, the draws are
    parametric instead: the fitted losses plus normal noise of the residuals' deviation
    (sum of squares / (runs - parameters)). Loss law and error law are drawn independently.
    Raises InputError where there are no residuals to draw from.
    """
    rng = np.random.default_rng(seed)
    N, D, loss = (numbers(f.loss_rows, c) for c in ("N", "D", f.loss_column))
    fitted = f.law.loss(N, D)
    n_params = len(laws.parameters_of(f.law))
    draw, method = _draws("the loss law", loss, fitted, n_params, rng)

    def again() -> LossLaw:
        index, y = draw()
        return refit(N[index], D[index], y)

    found, failed = _repeat(again, n)
    errors: list[ErrorLaw] = []
    if f.error_law is not None and f.error_column is not None:
        x = numbers(f.error_rows, f.loss_column)
        y = numbers(f.error_rows, f.error_column, positive=False)
        draw_error, _ = _draws("the error law", y, f.error_law.error(x), 3, rng)

        def error_again() -> ErrorLaw:
            index, drawn = draw_error()
            return laws.fit_error(x[index], drawn)

        errors, more = _repeat(error_again, n)
        failed += more
    return Drawn(found, errors, method, failed)


Draw = Callable[[], tuple[Array, Array]]


def _draws(
    what: str, y: Array, fitted: Array, n_params: int, rng: np.random.Generator
) -> tuple[Draw, str]:
    """A function that draws (indices of runs, their values), and how it does."""
    n = len(y)
    if n >= _FEW * n_params:

        def resampled() -> tuple[Array, Array]:
            index = rng.integers(0, n, n)
            return index, y[index]

        return resampled, "runs drawn with replacement"
    if n == n_params:
        raise InputError(
            f"--bootstrap: {what} has {n_params} parameters and {n} runs: it goes through all of "
            "them, and nothing says how far they scatter; fit on more runs"
        )
    deviation = np.sqrt(((y - fitted) ** 2).sum() / (n - n_params))

    def noisy() -> tuple[Array, Array]:
        return np.arange(n), fitted + deviation * rng.standard_normal(n)

    return noisy, "normal noise of the residuals' deviation (few runs)"


def _repeat(fit_again: Callable[[], Any], n: int) -> tuple[list[Any], int]:
    """`n` fits; draws that do not determine the law are drawn again, and counted."""
    found: list[Any] = []
    failed = 0
    while len(found) < n:
        try:
            found.append(fit_again())
        except UndeterminedError as e:
            failed += 1
            if failed > 5 * n + 20:
                raise UndeterminedError(
                    f"--bootstrap: {failed} of {failed + len(found)} draws of the runs do not "
                    f"determine the law ({e}); fit on more runs"
                ) from None
    return found, failed


def add_intervals(found: dict[str, Any], drawn: Drawn, f: Fitted) -> None:
    """Put 95 % intervals of parameters and predictions into the report.

    They are those of the law: a new run scatters around it besides.
    """
    intervals = _intervals_of(drawn.laws) | _intervals_of(drawn.error_laws)
    found["bootstrap"] = {
        "draws": len(drawn.laws),
        "method": drawn.method,
        "n_undetermined": drawn.n_undetermined,
        "intervals": intervals,
    }
    for point, prediction in zip(f.points, found["predictions"], strict=True):
        N, D = np.array(point.N), np.array(point.D)
        losses = np.array([float(law.loss(N, D)) for law in drawn.laws])
        prediction["loss_interval"] = _interval(losses)
        if drawn.error_laws:
            errors = [e.error(x) for e, x in zip(drawn.error_laws, losses, strict=True)]
            prediction["error_interval"] = _interval(np.array(errors))


def _intervals_of(found: list[Any]) -> dict[str, list[float]]:
    if not found:
        return {}
    each = [laws.parameters_of(law) for law in found]
    return {name: _interval(np.array([p[name] for p in each])) for name in each[0]}


def _interval(values: Array) -> list[float]:
    return [float(v) for v in np.percentile(values, LEVEL)]


def leave_one_out(f: Fitted, refit: FitLoss) -> list[dict[str, Any]]:
    """Each fitted run predicted from the others; with the reason where they do not suffice."""
    N, D, loss = (numbers(f.loss_rows, c) for c in ("N", "D", f.loss_column))
    found = []
    for i, row in enumerate(f.loss_rows):
        others = np.arange(len(loss)) != i
        entry: dict[str, Any] = {"name": row.name, "N": N[i], "D": D[i], "loss": loss[i]}
        try:
            law = refit(N[others], D[others], loss[others])
            predicted = float(law.loss(N[i], D[i]))
            entry |= {"predicted": predicted, "relative_error": abs(predicted / loss[i] - 1)}
        except UndeterminedError as e:
            entry["reason"] = f"not determined without it: {e}"
        found.append(entry)
    return found
