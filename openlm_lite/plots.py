"""Pictures: of runs, from their `metrics.jsonl`, and of schedules, from their recipes.

What any picture needs is here too, for those of a room of its own: where it is written, and how.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openlm_lite import curves
from openlm_lite.curves import Curve, X
from openlm_lite.errors import InputError
from openlm_lite.optim.schedule import lr_at
from openlm_lite.recorded import Recorded, one_line, read_run

if TYPE_CHECKING:
    from openlm_lite.run import RunConfig

_POINTS = 2000  # of a curve; more than a picture is wide
_X_LABELS = {
    "step": "step",
    "tokens": "tokens",
    "flops": "FLOPs",
    "time": "training time (hours)",
}
_SMALL = {  # panel under the loss: key, label
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "perf/tokens_per_second": "tokens/s",
}


def plot_runs(
    runs: Sequence[str], out: str | None = None, x: X = "tokens", window: int | None = None
) -> str:
    """Draw training loss (raw and smoothed), validation losses, rate, gradient norm and speed.

    x: what they are drawn against. window: steps that the smoothing looks back over; None: a
    fiftieth of each run. Returns the path of the picture: `out`, or loss.png in the first run's
    folder. Raises InputError where no run has a training step, or without matplotlib.
    """
    found = [read_run(Path(name), all_records=True) for name in runs]
    path = picture_path(out or Path(runs[0]) / "loss.png")
    for run in found:
        for note in run.notes:
            print(f"openlm: {run.path}: {one_line(note)}", file=sys.stderr)
    drawn = [run for run in found if run.trained]
    if missing := [str(run.path) for run in found if not run.trained]:
        text = f"{', '.join(missing)}: no metrics.jsonl with a training step yet"
        if not drawn:
            raise InputError(text)
        print(f"openlm: {text}", file=sys.stderr)
    figure, axes = _panels()
    for run, label in zip(drawn, curves.labels([run.path for run in drawn]), strict=True):
        _draw_run(axes, run, one_line(label, 60), x, window)
    axes["loss"].set_ylabel("loss (nats per token)")
    _legend(axes["loss"], fontsize=8)
    for key, label in _SMALL.items():
        axes[key].set_ylabel(label, fontsize=9)
        axes[key].tick_params(labelsize=8)
        if axes[key].lines and key != "train/lr":
            _limit(axes[key])
    for each in axes.values():
        each.set_xlabel(_X_LABELS[x], fontsize=9)
        each.grid(alpha=0.3)
    return save(figure, path)


def _draw_run(axes: dict[str, Any], run: Recorded, label: str, x: X, window: int | None) -> None:
    axis = curves.axis_of(run)
    flops = run.sizes.flops_per_token if run.sizes else None
    if x == "flops" and flops is None:
        raise InputError(f"{run.path}: its FLOPs are not known; use --x tokens, step or time")

    def points(curve: Curve) -> tuple[list[float], list[float]]:
        curve = curves.thin(curve, _POINTS)
        places = curves.at(axis, curve.step, x, flops or 0.0)
        return [p / 3600 if x == "time" else p for p in places], curve.value

    window = window or curves.window_of(len(axis.step))
    loss = curves.curve_of(run.records, "train/loss")
    smoothed = Curve(loss.step, curves.smooth(loss.value, window))
    (line,) = axes["loss"].plot(*points(loss), linewidth=0.6, alpha=0.35)
    colour = line.get_color()
    axes["loss"].plot(*points(smoothed), color=colour, label=f"{label} train")
    keys = {k for r in run.records for k in r if k.startswith("val/") and k.endswith("/loss")}
    for key in sorted(keys):
        curve = curves.curve_of(run.records, key)
        axes["loss"].plot(*points(curve), "o--", markersize=4, label=f"{label} {key}")
    for key in _SMALL:
        curve = curves.curve_of(run.records, key)
        if key == "train/lr":
            axes[key].plot(*points(curve), color=colour)
            continue
        axes[key].plot(*points(curve), color=colour, linewidth=0.5, alpha=0.35)
        smoothed = Curve(curve.step, curves.smooth(curve.value, window))
        axes[key].plot(*points(smoothed), color=colour, linewidth=1.2)


def _limit(axes: Any) -> None:
    """The y axis for nearly all values: one odd step must not press the others to a line."""
    values = sorted(v for line in axes.lines for v in line.get_ydata())
    low, high = values[len(values) // 200], values[-1 - len(values) // 200]
    if high > low:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))


def plot_schedules(words: Sequence[str], out: str | None = None) -> str:
    """Draw the learning rates of recipes against tokens, all in one picture.

    words: recipes, each with the `a.b=c` words behind it. Returns the path of the picture: `out`,
    or schedule.png. Raises InputError as `load_run` does, or without matplotlib.
    """
    from openlm_lite.run import load_run  # slow: torch

    recipes: list[tuple[str, list[str]]] = []
    for word in words:
        if "=" not in word:
            recipes.append((word, []))
        elif not recipes:
            raise InputError(f"{word}: stands before any recipe; put it behind the one it is of")
        else:
            recipes[-1][1].append(word)
    found = [
        (" ".join([Path(name).stem, *overrides]), schedule_points(load_run(name, overrides)))
        for name, overrides in recipes
    ]
    path = picture_path(out or "schedule.png")
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for label, points in found:
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3)
    _legend(axes)
    return save(figure, path)


def schedule_points(cfg: RunConfig) -> list[tuple[int, float]]:
    """(tokens before it, learning rate) of steps all over the run, with those at its bends."""
    schedule, last = cfg.schedule_in_steps, cfg.steps - 1
    steps = {round(i * last / (_POINTS - 1)) for i in range(_POINTS)}
    bends = (schedule.warmup_steps, cfg.steps - schedule.cooldown_steps)
    steps |= {step for bend in bends for step in (bend - 1, bend) if 0 <= step <= last}
    return [(cfg.tokens_at(s), lr_at(s, cfg.steps, cfg.optim.lr, schedule)) for s in sorted(steps)]


def _panels() -> tuple[Any, dict[str, Any]]:
    """A figure with a large panel, `loss`, and a row of small ones under it."""
    small = list(_SMALL)
    return pyplot().subplot_mosaic(
        [["loss"] * len(small), ["loss"] * len(small), small],
        figsize=(10, 7.5),
        constrained_layout=True,
    )


def _legend(axes: Any, **how: Any) -> None:
    """What stands in a name is no mathematics."""
    for text in axes.legend(**how).get_texts():
        text.set_parse_math(False)


def picture_path(path: str | Path, setting: str = "") -> Path:
    """`path`, which `setting` named. Raises InputError where no picture could be written there."""
    named, path = f"{setting} {path}".strip(), Path(path)
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"{named}: the picture can be .png or .svg")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{named}: there is no folder {path.parent}")
    return path


def pyplot() -> Any:
    """matplotlib, drawing without a screen. Raises InputError where it is absent."""
    try:
        import matplotlib
    except ImportError:
        raise InputError('plots need matplotlib: pip install "openlm-lite[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path) -> str:
    """Write the picture, whole or not at all; returns its path."""
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=120, format=path.suffix[1:])
    pyplot().close(figure)
    temporary.replace(path)
    return str(path)
