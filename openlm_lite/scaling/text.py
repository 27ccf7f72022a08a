"""The report of `openlm fit` as lines for people."""

from __future__ import annotations

from typing import Any


def lines_of(found: dict[str, Any]) -> list[str]:
    """The report of a loss law (and an error law) as text."""
    if found["law"] == "isoflop":
        return _isoflop_lines(found)
    n, law = len(found["fitted_on"]), found["law"]
    lines = [
        f"{law}, fitted on {n} of {found['n_runs']} runs ({found['fit_set']}): "
        f"{found['loss_column']}",
        f"  {found['form']}    (M = D / N, C = 6 N D)",
        f"  {_parameters(found, LOSS_PARAMETERS[law])}    rms residual {found['rms_residual']:.2g}",
    ]
    if "error_column" in found:
        lines += [
            f"error, fitted on {len(found['error_fitted_on'])} runs: {found['error_column']}",
            f"  {found['error_form']}",
            f"  {_parameters(found, ('epsilon', 'k', 'gamma'))}",
        ]
    for prediction in found["predictions"]:
        lines += _prediction_lines(prediction, found)
    if found["held_out"]:
        h = found["held_out"]
        lines.append(
            f"loss of the {h['n_runs']} runs that were not fitted on: off by "
            f"{100 * h['median_relative_error']:.3f} % in the median, "
            f"{100 * h['mean_relative_error']:.3f} % in the mean, at most "
            f"{100 * h['largest_relative_error']:.3f} % ({h['largest_is']})"
        )
    if "bootstrap" in found:
        lines += _bootstrap_lines(found["bootstrap"])
    if "leave_out" in found:
        lines.append("each run predicted from the others:")
        lines += [f"  {_left_one_line(entry)}" for entry in found["leave_out"]]
    return lines + _closing_lines(found)


LOSS_PARAMETERS = {
    "over-training": ("E", "a", "b", "eta"),
    "chinchilla": ("E", "A", "B", "alpha", "beta"),
}


def _parameters(found: dict[str, Any], names: tuple[str, ...]) -> str:
    return "  ".join(f"{name} {found[name]:.5g}" for name in names if found[name] is not None)


def _prediction_lines(p: dict[str, Any], found: dict[str, Any]) -> list[str]:
    lines = [
        f"N {p['N']:,.0f}  D {p['D']:,.0f}  M {p['M']:.4g}  C {p['C']:.3g} "
        f"({p['times_largest_fitted']:.3g} times the largest run that was fitted on)"
    ]
    for name, label in (("loss", found["loss_column"]), ("error", found.get("error_column"))):
        if name not in p:
            continue
        line = f"  {label}  predicted {p[name]:.4f}"
        if f"{name}_interval" in p:
            low, high = p[f"{name}_interval"]
            line += f" ({low:.4f} to {high:.4f})"
        if f"{name}_measured" in p:
            line += f"  measured {p[f'{name}_measured']:.4f}"
        if f"{name}_relative_error" in p:
            line += f"  off by {100 * p[f'{name}_relative_error']:.3f} %"
        lines.append(line)
    if p.get("is_fitted_on"):
        lines.append("  this run was fitted on: that is no prediction")
    if "best_N" in p:
        N = p["best_N"]
        lines.append(
            f"  for this C the law's best N is {N:.4g} (D {p['C'] / (6 * N):.4g}, "
            f"M {p['C'] / (6 * N * N):.4g})"
        )
    return lines


def _bootstrap_lines(b: dict[str, Any]) -> list[str]:
    lines = [f"95 % intervals, {b['draws']} draws: {b['method']}"]
    lines += [f"  {name} {low:.5g} to {high:.5g}" for name, (low, high) in b["intervals"].items()]
    if b["n_undetermined"]:
        lines.append(f"  {b['n_undetermined']} draws did not determine the law: drawn again")
    return lines


def _left_one_line(entry: dict[str, Any]) -> str:
    if "reason" in entry:
        return f"{entry['name']}: {entry['reason']}"
    return (
        f"{entry['name']}: {entry['predicted']:.4f}, measured {entry['loss']:.4f}, off by "
        f"{100 * entry['relative_error']:.3f} %"
    )


def _isoflop_lines(found: dict[str, Any]) -> list[str]:
    names = ("N_coefficient", "N_exponent", "E", "L_coefficient", "L_exponent")
    lines = [
        f"isoflop, fitted on {len(found['budgets'])} budgets ({found['fit_set']}): "
        f"{found['loss_column']}",
        f"  {found['form']}",
        f"  {_parameters(found, names)}",
    ]
    lines += [
        f"  C {b['C']:.3g}: best N {b['N_best']:.4g} of {b['n_sizes']} sizes, "
        f"loss {b['loss_best']:.4f}"
        for b in found["budgets"]
    ]
    for p in found["predictions"]:
        loss = f"  loss {p['loss']:.4f}" if "loss" in p else ""
        lines.append(f"C {p['C']:.3g}: N {p['N']:,.0f}  D {p['D']:,.0f}  M {p['M']:.4g}{loss}")
    return lines + _closing_lines(found)


def _closing_lines(found: dict[str, Any]) -> list[str]:
    left_out = found["left_out"]
    lines = [f"{len(left_out)} runs left out:"] if left_out else []
    lines += [f"  {run['name']}: {run['reason']}" for run in left_out]
    return lines + [f"note: {note}" for note in found["notes"]]
