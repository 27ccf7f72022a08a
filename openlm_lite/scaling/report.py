"""What `openlm fit` says: parameters, predictions beside measurements, intervals, doubts."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from openlm_lite.errors import InputError
from openlm_lite.scaling import isoflop, laws, trust
from openlm_lite.scaling.conditions import number_in
from openlm_lite.scaling.fit import (
    LAWS,
    FitRequest,
    Fitted,
    Point,
    arrays_of,
    choose_rows,
    fit_set,
    run_at,
)
from openlm_lite.scaling.huber import fit_chinchilla
from openlm_lite.scaling.laws import Chinchilla
from openlm_lite.scaling.table import LeftOut, as_number, numbers


def report(fitted: Fitted, request: FitRequest) -> dict[str, Any]:
    """All that was found, as plain values for JSON."""
    f = fitted
    N, D, loss = arrays_of(f.loss_rows, f.loss_column)
    notes = laws.notes_of(f.law)  # type: ignore[arg-type]
    found: dict[str, Any] = {
        "law": request.law,
        "form": f.law.FORM,
        **laws.parameters_of(f.law),
        "loss_column": f.loss_column,
        "n_runs": len(f.rows),
        "fit_set": f.loss_set,
        "fitted_on": [row.name for row in f.loss_rows],
        "rms_residual": float(np.sqrt(((f.law.loss(N, D) - loss) ** 2).mean())),
        "left_out": _left_out(f.left_out),
    }
    if f.error_law is not None and f.error_column is not None:
        found |= laws.parameters_of(f.error_law) | {
            "error_form": f.error_law.FORM,
            "error_column": f.error_column,
            "error_fitted_on": [row.name for row in f.error_rows],
        }
        notes += laws.notes_of(f.error_law)
    found["predictions"] = [predict(f, point) for point in f.points]
    found["held_out"] = _held_out(f)
    if len(f.loss_rows) == len(laws.parameters_of(f.law)):
        notes.append("as many runs as parameters: the law goes through all of them")
    if request.bootstrap:
        refit = LAWS[request.law]
        if isinstance(f.law, Chinchilla):  # from where it is, not from 4,500 starts
            refit = functools.partial(fit_chinchilla, start=f.law)
        drawn = trust.bootstrap(f, refit, request.bootstrap, request.seed)
        trust.add_intervals(found, drawn, f)
    if request.leave_out:
        found["leave_out"] = trust.leave_one_out(f, LAWS[request.law])
    found["notes"] = notes
    return found


def predict(f: Fitted, point: Point) -> dict[str, Any]:
    """Loss and error of a model, with what was measured where it has been trained."""
    loss = float(f.law.loss(np.array(point.N), np.array(point.D)))
    C = 6 * point.N * point.D
    largest = max(row.cells["C"] for row in f.loss_rows)
    found = {
        "N": point.N,
        "D": point.D,
        "M": point.D / point.N,
        "C": C,
        "times_largest_fitted": C / largest,
        "loss": loss,
    }
    if f.error_law is not None:
        found["error"] = float(f.error_law.error(np.array(loss)))
    best = f.law.best_size(C)
    if best is not None:
        found["best_N"] = best
    run = run_at(f.rows, point)
    if run is None:
        return found
    found["measured_run"] = run.name
    found["is_fitted_on"] = any(run is row for row in f.loss_rows)
    for name, column in (("loss", f.loss_column), ("error", f.error_column)):
        if column is None:
            continue
        truth = float(numbers([run], column, positive=False)[0])
        found[f"{name}_measured"] = truth
        if truth:
            found[f"{name}_relative_error"] = abs(found[name] - truth) / abs(truth)
    return found


def _held_out(f: Fitted) -> dict[str, Any] | None:
    """How far off the law is on the other runs of the table."""
    others = [
        row
        for row in f.rows
        if not any(row is used for used in f.loss_rows)
        and as_number(row.cells.get(f.loss_column)) is not None
    ]
    if not others:
        return None
    N, D, loss = arrays_of(others, f.loss_column)
    off = np.abs(f.law.loss(N, D) / loss - 1)
    worst = int(np.argmax(off))
    return {
        "n_runs": len(others),
        "mean_relative_error": float(off.mean()),
        "median_relative_error": float(np.median(off)),
        "largest_relative_error": float(off[worst]),
        "largest_is": others[worst].name,
    }


def _left_out(runs: list[LeftOut]) -> list[dict[str, str]]:
    return [{"name": run.name, "reason": run.reason} for run in runs]


def isoflop_report(request: FitRequest) -> dict[str, Any]:
    """The same for `--law isoflop`, whose predictions are of the best model for a compute."""
    wrong = {
        "--error": request.error,
        "--error-on": request.error_on,
        "--bootstrap": request.bootstrap,
        "--leave-out": request.leave_out,
    }
    given = [name for name, value in wrong.items() if value]
    if given:
        raise InputError(f"{', '.join(given)}: not with --law isoflop")
    flops = [_parse_flops(word) for word in request.predict]
    rows, left_out, column = choose_rows(request)
    names = request.fit_on or ("all",)
    chosen = fit_set(rows, names, "--fit-on", (), [])
    law, budgets = isoflop.fit_isoflop(*arrays_of(chosen, column), request.budgets)
    predictions = []
    for C in flops:
        N = law.best_size(C)
        best_loss = law.best_loss(C)
        found = {"C": C, "N": N, "D": C / (6 * N), "M": C / (6 * N * N)}
        predictions.append(found if best_loss is None else found | {"loss": best_loss})
    return {
        "law": "isoflop",
        "form": law.FORM,
        **laws.parameters_of(law),
        "loss_column": column,
        "n_runs": len(rows),
        "fit_set": " + ".join(names),
        "budgets": [
            {"C": b.C, "n_sizes": len(b.N), "N_best": b.N_best, "loss_best": b.loss_best}
            for b in budgets
        ],
        "left_out": _left_out(left_out),
        "predictions": predictions,
        "notes": isoflop.notes_of(budgets),
    }


def _parse_flops(word: str) -> float:
    name, _, text = word.partition("=")
    C = number_in(text)
    if name.strip() != "C" or C is None or not 0 < C < 1e40:
        raise InputError(
            f"--predict {word!r}: with --law isoflop it must be C=FLOPS, such as C=1e21: the law "
            "knows the best model only"
        )
    return C
