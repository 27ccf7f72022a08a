"""`openlm fit`: choose runs, fit the laws, predict, and say how far to trust it.

::

    rows ── where ──> runs ── fit_on ──> loss law L(N, D)  ──> predicted loss ─┐
                         └── error_on ─> error law Err(L)  <───────────────────┘──> predicted error
                     (with measured losses)

Predictions of the error go through the predicted loss, as in arXiv:2403.08540.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openlm_lite.errors import InputError
from openlm_lite.scaling import laws
from openlm_lite.scaling.conditions import number_in, parse_conditions
from openlm_lite.scaling.huber import fit_chinchilla
from openlm_lite.scaling.laws import Array, ErrorLaw, LossLaw, UndeterminedError
from openlm_lite.scaling.table import (
    LeftOut,
    Row,
    find_column,
    listed,
    loss_columns,
    numbers,
    read_rows,
    refuse_duplicates,
    select,
)

FitLoss = Callable[[Array, Array, Array], LossLaw]
LAWS: dict[str, FitLoss] = {
    "over-training": laws.fit_over_training,
    "chinchilla": fit_chinchilla,
}

# The runs that arXiv:2403.08540 fits on, as (N, M): four sizes at M = 20, the smallest at 320 too.
# Its error law has one more, 12 times as expensive as the most expensive of these.
PAPER_LOSS = ((10569312, 20), (78914048, 20), (153677376, 20), (411616256, 20), (10569312, 320))
PAPER_ERROR = (*PAPER_LOSS, (1439795200, 20))
SAME_RUN = 1e-3
"""a prediction is compared with a run whose N and D are at most this share away"""


@dataclass(frozen=True)
class FitRequest:
    """What `openlm fit` is asked for: its options, as words."""

    inputs: tuple[str, ...]
    where: tuple[str, ...] = ()
    loss: str | None = None
    error: str | None = None
    law: str = "over-training"
    predict: tuple[str, ...] = ()
    fit_on: tuple[str, ...] = ()
    """`paper`, `all`, or conditions; the runs of several words are put together"""
    error_on: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()
    """of isoflop: FLOPs at which the losses are read off between the runs of each size"""
    bootstrap: int = 0
    seed: int = 0
    leave_out: bool = False


@dataclass(frozen=True)
class Point:
    """A model to be predicted."""

    N: float
    D: float


@dataclass(frozen=True)
class Fitted:
    """The chosen runs and the laws that came out; what is printed and drawn."""

    rows: list[Row]
    left_out: list[LeftOut]
    loss_column: str
    error_column: str | None
    loss_rows: list[Row]
    loss_set: str
    error_rows: list[Row]
    law: LossLaw
    error_law: ErrorLaw | None
    points: list[Point]


def choose_rows(request: FitRequest) -> tuple[list[Row], list[LeftOut], str]:
    """The rows that --where leaves, those left out, and the loss column. Raises InputError."""
    rows, left_out = read_rows(request.inputs)
    rows = select(rows, parse_conditions(request.where, "--where"), "--where")
    for column in ("N", "D"):
        numbers(rows, column)
    refuse_duplicates(rows)
    if request.loss is not None:
        return rows, left_out, find_column(rows, request.loss, "--loss")
    columns = loss_columns(rows)
    if len(columns) != 1:
        raise InputError(
            f"give --loss COLUMN; there are {listed(columns) or 'none that look like a loss'}"
        )
    return rows, left_out, columns[0]


def fit(request: FitRequest) -> Fitted:
    """Fit the laws. Raises InputError; UndeterminedError for too few runs, or without spread."""
    if request.error_on and request.error is None:
        raise InputError("--error-on: goes with --error COLUMN")
    points = [parse_point(word) for word in request.predict]
    rows, left_out, loss_column = choose_rows(request)
    names = request.fit_on or (_default_set(request.law, rows),)
    loss_rows = fit_set(rows, names, "--fit-on", PAPER_LOSS, points)
    error_rows: list[Row] = []
    error_column, error_law = None, None
    try:
        law = LAWS[request.law](*arrays_of(loss_rows, loss_column))
        if request.error is not None:
            error_column = find_column(rows, request.error, "--error")
            error_names = request.error_on or names
            error_rows = fit_set(rows, error_names, "--error-on", PAPER_ERROR, points)
            error_law = laws.fit_error(
                numbers(error_rows, loss_column), numbers(error_rows, error_column, positive=False)
            )
    except UndeterminedError as e:
        hint = ", ".join(row.name for row in loss_rows[:6]) + (" …" if len(loss_rows) > 6 else "")
        missing = f"; {len(left_out)} more are left out as not finished" if left_out else ""
        raise UndeterminedError(f"{e} (fitting on {' '.join(names)}: {hint}{missing})") from None
    return Fitted(
        rows,
        left_out,
        loss_column,
        error_column,
        loss_rows,
        " + ".join(names),
        error_rows,
        law,
        error_law,
        points,
    )


def fit_set(
    rows: Sequence[Row],
    words: Sequence[str],
    option: str,
    paper: Sequence[tuple[int, int]],
    points: Sequence[Point],
) -> list[Row]:
    """The rows that the words of --fit-on or --error-on mean.

    `all` leaves out the runs that are predicted, so that a prediction is one; `paper` and
    conditions are taken as they are.
    """
    chosen: list[Row] = []
    for word in words:
        if word == "paper":
            found = [row for row in (_run_of_paper(rows, *pair) for pair in paper) if row]
            if len(found) < len(PAPER_LOSS):
                raise InputError(
                    f"{option} paper: the table has {len(found)} of the {len(paper)} runs that "
                    "arXiv:2403.08540 fits on; use conditions, such as M=20,N<5e8, or all"
                )
        elif word == "all":
            truths = [run_at(rows, point) for point in points]
            found = [row for row in rows if not any(row is truth for truth in truths)]
        else:
            found = select(rows, parse_conditions([word], option), option)
        chosen += [row for row in found if not any(row is other for other in chosen)]
    return chosen


def _default_set(law: str, rows: Sequence[Row]) -> str:
    """The paper's runs for the paper's law where the table is the paper's, else all."""
    has_them = all(_run_of_paper(rows, *pair) for pair in PAPER_LOSS)
    return "paper" if law == "over-training" and has_them else "all"


def _run_of_paper(rows: Sequence[Row], N: int, M: int) -> Row | None:
    return next((r for r in rows if r.cells["N"] == N and abs(r.cells["M"] / M - 1) < 1e-6), None)


def run_at(rows: Sequence[Row], point: Point) -> Row | None:
    """The run of this size and length, if it has been trained."""

    def distance(row: Row) -> float:
        ratios = row.cells["N"] / point.N, row.cells["D"] / point.D
        return float(np.abs(np.log(ratios)).max())

    nearest = min(rows, key=distance)
    return nearest if distance(nearest) < SAME_RUN else None


def parse_point(word: str) -> Point:
    """`N=…,D=…` or `N=…,M=…` as a model."""
    cells: dict[str, float | None] = {}
    for part in word.split(","):
        name, _, text = part.partition("=")
        cells[name.strip()] = number_in(text)
    N, D, M = cells.get("N"), cells.get("D"), cells.get("M")
    if N is not None and D is None and M is not None:
        D = M * N
    wrong = cells.keys() not in ({"N", "D"}, {"N", "M"})
    if wrong or N is None or D is None or not (0 < N < 1e30 and 0 < D < 1e30):
        raise InputError(
            f"--predict {word!r}: must be N=PARAMETERS,D=TOKENS or N=PARAMETERS,M=TOKENS_PER_"
            "PARAMETER, positive numbers such as 1439795200 or 1.4e9"
        )
    return Point(N, D)


def arrays_of(rows: Sequence[Row], loss_column: str) -> tuple[Array, Array, Array]:
    return numbers(rows, "N"), numbers(rows, "D"), numbers(rows, loss_column)
