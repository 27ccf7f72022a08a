"""`openlm report RUN…`: one HTML file about runs that opens without a network.

    recorded runs ── facts.py ──> texts and tables ─┐
                  └─ curves ────> points as JSON ───┴─ page.html + page.css + page.js ──> FILE.html

Everything that comes from a run is escaped by the template (autoescape) or by `_data`. A policy in
the page allows the one script and the one style that are ours, by their hashes, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import openlm_lite
from openlm_lite import curves, storage
from openlm_lite.curves import Axis, Curve
from openlm_lite.errors import InputError
from openlm_lite.recorded import Recorded, one_line, read_run
from openlm_lite.report import facts

_POINTS = 2000  # of one curve
_BUDGET = 110_000  # points of a page: about 1.3 MB
_LEAST_POINTS = 60
_KNOTS = 400  # of a run's axis: step -> tokens, seconds
_MAX_RUNS = 60
_MAX_CURVES_OF_A_PANEL = 12  # of one run
_MAX_MORE_PANELS = 12

# Panels: id, title, unit, keys. The others that a run has come behind them, by their prefix.
_PANELS = (
    ("loss", "Loss", "nats per token", ("train/loss",)),
    ("lr", "Learning rate", "", ("train/lr",)),
    ("grad_norm", "Gradient norm", "", ("train/grad_norm",)),
    ("speed", "Throughput", "tokens/s", ("perf/tokens_per_second",)),
    ("mfu", "Model FLOPs utilisation", "", ("perf/mfu",)),
    ("data_wait", "Wait for data", "s per step", ("perf/data_wait",)),
    ("memory", "Peak memory", "GiB", ("perf/peak_memory_gib",)),
)
_BY_LAYER = {"grad_norm": "Gradient norm by layer", "param_norm": "Weight norm by layer"}
_NOT_DRAWN = ("step", "tokens", "data/checksum", "perf/tokens_per_second_per_gpu")
_NOT_DRAWN_PREFIXES = ("guard/", "sample/")


def write_report(runs: Sequence[str], out: str | None = None, title: str | None = None) -> str:
    """Write the page about the run folders `runs`; returns its path.

    out: default report.html in the first run's folder. Raises InputError where a folder is absent,
    or where nothing can be written; a run is shown as far as its files go.
    """
    if len(runs) > _MAX_RUNS:
        raise InputError(f"{len(runs)} runs: a page holds up to {_MAX_RUNS}; name fewer")
    path = Path(out) if out is not None else Path(runs[0]) / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise InputError(f"--out {path}: must end with .html")
    if out is not None and not path.absolute().parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}")
    found = [read_run(Path(name), all_records=True) for name in runs]
    for run in found:
        for note in run.notes:
            print(f"openlm: {run.path}: {one_line(note)}", file=sys.stderr)
    storage.write_bytes(str(path), page(found, title).encode())
    return str(path)


def page(runs: Sequence[Recorded], title: str | None = None) -> str:
    """The HTML text."""
    import jinja2
    from markupsafe import Markup

    files = resources.files("openlm_lite.report")
    style, script, template = (
        (files / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html")
    )
    names = [one_line(label, 60) for label in curves.labels([run.path for run in runs])]
    axes = [curves.axis_of(run) for run in runs]
    summaries = [facts.summary(run, axis) for run, axis in zip(runs, axes, strict=True)]
    evaluations, eval_notes = facts.evaluations(runs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        title=one_line(title, 200) if title else _title(names),
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_data(runs, axes, names)),
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=openlm_lite.__version__,
        names=names,
        runs=[
            {
                "i": i,
                "name": name,
                "path": facts.folder_of(run.path),
                "state": run.state,
                "why": one_line(run.why),
                "notes": [one_line(note) for note in run.notes],
                "config": facts.config_text(run),
                "lineage": facts.lineage_of(run),
                "mix": facts.data_mix(run),
                "samples": facts.samples(run),
                "events": facts.events(run),
            }
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
        ],
        columns=list(dict.fromkeys(key for each in summaries for key in each)),
        summaries=summaries,
        diff=facts.config_diff(runs) if len(runs) > 1 else [],
        evaluations=evaluations,
        eval_notes=eval_notes,
        system=facts.system(runs),
    )


def _title(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _policy(style: str, script: str) -> str:
    def sha(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{sha(script)}'; "
        f"style-src 'sha256-{sha(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


# --- curves --------------------------------------------------------------------------------------


def _data(runs: Sequence[Recorded], axes: Sequence[Axis], names: Sequence[str]) -> str:
    """The points for page.js, as JSON that ends no script element."""
    drawn = [_curves(run) for run in runs]
    n_curves = sum(1 + _is_smoothed(key) for each in drawn for key in each)
    n_points = max(_LEAST_POINTS, min(_POINTS, _BUDGET // max(1, n_curves)))
    found = {
        "panels": _panels([key for each in drawn for key in each]),
        "runs": [
            _run_data(run, axis, name, each, n_points)
            for run, axis, name, each in zip(runs, axes, names, drawn, strict=True)
        ],
    }
    text = json.dumps(found, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _curves(run: Recorded) -> dict[str, Curve]:
    """Every number of the records by its name, without those that are no curves."""
    found = {key: curves.curve_of(run.records, key) for key in run.keys if _is_drawn(key)}
    return {key: curve for key, curve in found.items() if curve.step}


def _is_drawn(key: str) -> bool:
    return key not in _NOT_DRAWN and not key.startswith(_NOT_DRAWN_PREFIXES)


def _is_smoothed(key: str) -> bool:
    """What jumps from step to step: losses and norms of training, times."""
    return key.startswith(("train/", "perf/")) and key != "train/lr"


def _panels(keys: Sequence[str]) -> list[dict[str, Any]]:
    """Which curves are drawn together, in order."""
    there = list(dict.fromkeys(keys))
    panels: list[dict[str, Any]] = []
    for name, title, unit, wanted in _PANELS:
        if name == "loss":
            wanted += tuple(k for k in there if k.startswith("val/") and k.endswith("/loss"))
        if found := [key for key in wanted if key in there]:
            panels.append({"id": name, "title": title, "unit": unit, "keys": found})
    used = {key for panel in panels for key in panel["keys"]}
    groups: dict[str, list[str]] = {}
    for key in there:
        if key not in used:
            groups.setdefault(_group(key), []).append(key)
    for title, found in sorted(groups.items())[:_MAX_MORE_PANELS]:
        found = _spread(found, _MAX_CURVES_OF_A_PANEL)
        panels.append({"id": f"more-{len(panels)}", "title": title, "unit": "", "keys": found})
    return panels


def _spread(keys: list[str], most: int) -> list[str]:
    """All of them, or so many at equal distances, with the first and the last."""
    if len(keys) <= most:
        return keys
    return [keys[round(i * (len(keys) - 1) / (most - 1))] for i in range(most)]


def _group(key: str) -> str:
    """train/web/loss and train/code/loss are one panel, data/web/epoch another."""
    first, *rest = one_line(key, 80).split("/")
    if first == "train" and rest[-1:] == ["loss"]:
        return "Training loss by source"
    if first == "data" and rest:
        return {"epoch": "Epochs of each source", "tokens": "Tokens of each source"}.get(
            rest[-1], "Data"
        )
    if (first, *rest[:-1]) == ("perf", "seconds"):
        return "Seconds of each phase"
    if first in _BY_LAYER:
        return _BY_LAYER[first]
    return first if len(rest) < 2 else f"{first}: {rest[-1]}"


def _run_data(
    run: Recorded, axis: Axis, name: str, found: dict[str, Curve], n_points: int
) -> dict[str, Any]:
    n_steps = len(axis.step)
    window = curves.window_of(n_steps)
    series = {}
    for key, curve in found.items():
        series[key] = {"raw": _points(curves.thin(curve, n_points))}
        if _is_smoothed(key) and window > 1:
            smoothed = Curve(curve.step, curves.smooth(curve.value, window))
            series[key]["smooth"] = _points(curves.thin(smoothed, n_points // 2 or 4))
    knots = sorted({round(i * (n_steps - 1) / (_KNOTS - 1)) for i in range(_KNOTS)})
    knots = knots if n_steps else []
    steps = [0, *(axis.step[i] for i in knots)]
    return {
        "name": name,
        "window": window,
        "axis": {
            "step": steps,
            "tokens": _short(curves.at(axis, steps, "tokens", 0.0), 9),
            "seconds": _short(curves.at(axis, steps, "time", 0.0), 7),
        },
        "flops": run.sizes.flops_per_token if run.sizes else None,
        "series": series,
        "marks": facts.marks(run),
    }


def _points(curve: Curve) -> list[Sequence[float]]:
    """[differences of the steps, values]: half the size of pairs."""
    steps = [b - a for a, b in zip([0, *curve.step], curve.step, strict=False)]
    return [steps, _short(curve.value, 5)]


def _short(values: Sequence[float], digits: int) -> list[float]:
    found = [float(f"{value:.{digits}g}") for value in values]
    found = [v if abs(v) < float("inf") else value for v, value in zip(found, values, strict=True)]
    return [int(v) if abs(v) < 1e15 and v == int(v) else v for v in found]
