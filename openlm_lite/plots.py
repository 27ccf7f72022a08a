"""Pictures of runs, from their `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from openlm_lite.errors import InputError
from openlm_lite.log import read_metrics


def plot_runs(runs: Sequence[str], out: str | None = None) -> str:
    """Draw training loss (raw and smoothed) and validation losses against tokens.

    Returns the path of the picture: `out`, or loss.png in the first run's folder.
    Raises InputError for a folder without a metrics.jsonl, or without matplotlib.
    """
    records = {name: read_metrics(Path(name) / "metrics.jsonl") for name in runs}
    path = Path(out) if out else Path(runs[0]) / "loss.png"
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"{path}: the picture can be .png or .svg")
    try:
        import matplotlib
    except ImportError:
        raise InputError('plots need matplotlib: pip install "openlm-lite[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
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
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
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
