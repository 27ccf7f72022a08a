"""Pictures of a fit: loss against FLOPs with a curve per M, and error against loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from openlm_lite import plots
from openlm_lite.scaling.fit import Fitted
from openlm_lite.scaling.table import Row, as_number


def check_plot_path(path: str) -> None:
    """Raises InputError, before anything is fitted, where no picture could be written there."""
    plots.picture_path(path, "--plot")
    plots.pyplot()


def plot_fit(f: Fitted, path: str) -> None:
    """Draw the laws, the runs fitted on (filled), the others (hollow) and the predictions (x)."""
    panels = 2 if f.error_law is not None else 1
    figure, axes = plots.pyplot().subplots(
        1, panels, figsize=(7 * panels, 5), constrained_layout=True, squeeze=False
    )
    _draw_loss(axes[0, 0], f)
    if panels == 2:
        _draw_error(axes[0, 1], f)
    plots.save(figure, Path(path))


def _draw_loss(axes: Any, f: Fitted) -> None:
    import matplotlib
    from matplotlib import ticker

    rows = [row for row in f.rows if as_number(row.cells.get(f.loss_column)) is not None]
    ratios = sorted({_rounded(row.cells["M"]) for row in rows})
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(ratios)))
    costs = [row.cells["C"] for row in rows] + [6 * p.N * p.D for p in f.points]
    C = np.geomspace(min(costs) / 1.5, max(costs) * 1.5, 200)
    for M, colour in zip(ratios, colours, strict=True):
        if len(ratios) <= 16:
            N = np.sqrt(C / (6 * M))
            axes.plot(C, f.law.loss(N, M * N), color=colour, linewidth=1, label=f"M = {M:.3g}")
        for row in rows:
            if _rounded(row.cells["M"]) == M:
                _dot(
                    axes,
                    row.cells["C"],
                    as_number(row.cells.get(f.loss_column)),
                    colour,
                    row,
                    f.loss_rows,
                )
    for point in f.points:
        loss = float(f.law.loss(np.array(point.N), np.array(point.D)))
        axes.plot(6 * point.N * point.D, loss, "x", color="crimson", markersize=9)
    measured = [row.cells[f.loss_column] for row in rows]
    axes.set_ylim(0.95 * min(measured), 1.05 * max(measured))
    axes.set(xscale="log", yscale="log", xlabel="C = 6 N D (FLOPs)", ylabel=f.loss_column)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(8))  # losses span less than a decade
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{f.law.FORM}\nfilled: fitted on; hollow: not; x: predicted", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    if 1 < len(ratios) <= 16:
        axes.legend(fontsize=8)


def _draw_error(axes: Any, f: Fitted) -> None:
    if f.error_law is None or f.error_column is None:
        return
    rows = [
        row
        for row in f.rows
        if None
        not in (as_number(row.cells.get(f.loss_column)), as_number(row.cells.get(f.error_column)))
    ]
    losses = [row.cells[f.loss_column] for row in rows]
    line = np.linspace(0.97 * min(losses), 1.03 * max(losses), 200)
    axes.plot(line, f.error_law.error(line), color="grey", linewidth=1)
    for row in rows:
        x, y = row.cells[f.loss_column], row.cells[f.error_column]
        _dot(axes, x, y, "steelblue", row, f.error_rows)
    for point in f.points:
        loss = f.law.loss(np.array(point.N), np.array(point.D))
        axes.plot(float(loss), float(f.error_law.error(loss)), "x", color="crimson", markersize=9)
    axes.set(xlabel=f.loss_column, ylabel=f.error_column)
    axes.set_title(f.error_law.FORM, fontsize=9)
    axes.grid(alpha=0.3)


def _dot(axes: Any, x: float, y: Any, colour: Any, row: Row, used: list[Row]) -> None:
    face = colour if any(row is other for other in used) else "none"
    axes.plot(x, y, "o", markeredgecolor=colour, markerfacecolor=face, markersize=6)


def _rounded(M: float) -> float:
    """To two digits: M of runs whose tokens were rounded to whole steps is meant to be one."""
    return float(f"{M:.2g}")
