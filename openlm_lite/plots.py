"""Pictures: of runs, from their `metrics.jsonl`, and of schedules, from their recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openlm_lite import run
from openlm_lite.errors import InputError
from openlm_lite.log import read_metrics
from openlm_lite.optim.schedule import lr_at
from openlm_lite.run import RunConfig

_POINTS = 2000  # of a curve; more than a picture is wide


def plot_runs(runs: Sequence[str], out: str | None = None) -> str:
    """Draw training loss (raw and smoothed) and validation losses against tokens.

    Returns the path of the picture: `out`, or loss.png in the first run's folder.
    Raises InputError for a folder without a metrics.jsonl, or without matplotlib.
    """
    records = {name: read_metrics(Path(name) / "metrics.jsonl") for name in runs}
    path = _picture(out or Path(runs[0]) / "loss.png")
    figure, axes = _figure()
    for name, rows in records.items():
        train = [(r["tokens"], r["train/loss"]) for r in rows if "train/loss" in r]
        if not train:
            raise InputError(f"{name}: its metrics.jsonl holds no training step yet")
        tokens, loss = [t for t, _ in train], [v for _, v in train]
        label = Path(name).name
        (line,) = axes.plot(tokens, loss, linewidth=0.6, alpha=0.35)
        axes.plot(tokens, _smooth(loss), color=line.get_color(), label=f"{label} train")
        for key in sorted({k for r in rows for k in r if k.startswith("val/")}):
            points = [(r["tokens"], r[key]) for r in rows if key in r]
            axes.plot(*zip(*points, strict=True), "o--", markersize=4, label=f"{label} {key}")
    axes.set_ylabel("loss (nats per token)")
    return _save(figure, axes, path)


def plot_schedules(words: Sequence[str], out: str | None = None) -> str:
    """Draw the learning rates of recipes against tokens, all in one picture.

    words: recipes, each with the `a.b=c` words behind it. Returns the path of the picture: `out`,
    or schedule.png. Raises InputError as `load_run` does, or without matplotlib.
    """
    curves: list[tuple[str, list[str]]] = []
    for word in words:
        if "=" not in word:
            curves.append((word, []))
        elif not curves:
            raise InputError(f"{word}: stands before any recipe; put it behind the one it is of")
        else:
            curves[-1][1].append(word)
    found = [
        (" ".join([Path(name).stem, *overrides]), schedule_points(run.load_run(name, overrides)))
        for name, overrides in curves
    ]
    path = _picture(out or "schedule.png")
    figure, axes = _figure()
    for label, points in found:
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    return _save(figure, axes, path)


def schedule_points(cfg: RunConfig) -> list[tuple[int, float]]:
    """(tokens before it, learning rate) of steps all over the run, with those at its bends."""
    schedule, last = cfg.schedule_in_steps, cfg.steps - 1
    steps = {round(i * last / (_POINTS - 1)) for i in range(_POINTS)}
    bends = (schedule.warmup_steps, cfg.steps - schedule.cooldown_steps)
    steps |= {step for bend in bends for step in (bend - 1, bend) if 0 <= step <= last}
    return [(cfg.tokens_at(s), lr_at(s, cfg.steps, cfg.optim.lr, schedule)) for s in sorted(steps)]


def _picture(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"{path}: the picture can be .png or .svg")
    return path


def _figure() -> tuple[Any, Any]:
    """matplotlib's figure and axes, drawn without a screen."""
    try:
        import matplotlib
    except ImportError:
        raise InputError('plots need matplotlib: pip install "openlm-lite[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(8, 5), constrained_layout=True)


def _save(figure: Any, axes: Any, path: Path) -> str:
    from matplotlib import pyplot as plt

    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=120, format=path.suffix[1:])
    plt.close(figure)
    temporary.replace(path)
    return str(path)


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start (as in Adam)."""
    smoothed, average = [], 0.0
    for i, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**i))
    return smoothed
