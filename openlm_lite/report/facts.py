"""What a report says in words and tables: plain values about runs, ready to be shown.

Every text in it is masked (`redact`) and of one line; escaping is the page's matter.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openlm_lite import config, lineage, run_files
from openlm_lite.curves import Axis, smooth, window_of
from openlm_lite.log import duration, human
from openlm_lite.recorded import Recorded, number, one_line
from openlm_lite.redact import redacted, redacted_tree
from openlm_lite.report.scores import Score, scores_of

_MAX_EVENTS = 200  # of a run that are listed
_MAX_SAMPLES = 40
_MAX_SAMPLE_CHARACTERS = 2000
# What a run may have measured of its machine: metric, name, unit, digits.
_SYSTEM = (
    ("perf/tokens_per_second", "tokens/s", "", 3),
    ("perf/tokens_per_second_per_gpu", "tokens/s per device", "", 3),
    ("perf/mfu", "MFU", "%", 3),
    ("perf/data_wait", "wait for data per step", "s", 3),
    ("perf/peak_memory_gib", "peak memory", "GiB", 4),
)
_SYSTEM_PREFIXES = ("perf/", "gpu/", "system/")

Row = list[str]


def summary(run: Recorded, axis: Axis) -> dict[str, str]:
    """The figures of a run's row in the first table; what is not known is a dash."""
    loss = [v for r in run.trained if (v := number(r, "train/loss")) is not None]
    speeds = _values(run, "perf/tokens_per_second")
    mfu, sizes = _values(run, "perf/mfu"), run.sizes
    tokens = axis.tokens[-1] if axis.tokens else None
    step = run.trained[-1]["step"] if run.trained else 0
    total = sizes.total_steps if sizes else None
    flops = tokens * sizes.flops_per_token if tokens is not None and sizes else None
    shown = {
        "state": run.state,
        "step": f"{step:,} of {total:,}" if total is not None else f"{step:,}",
        "tokens": _or_dash(tokens, human),
        "parameters": _or_dash(sizes and sizes.n_params, human),
        "FLOPs": _or_dash(flops, lambda x: f"{x:.2e}"),
        "train loss": _or_dash(loss, lambda x: f"{smooth(x, window_of(len(x)))[-1]:.4f}"),
    }
    for key, (last, best) in val_losses(run).items():
        shown[key.removesuffix("/loss")] = f"{last:.4f}" + (
            f" (best {best:.4f})" if best < last else ""
        )
    if mfu:
        shown["MFU"] = f"{100 * statistics.median(mfu):.1f} %"
    shown["tokens/s"] = _or_dash(speeds, lambda x: human(statistics.median(x)))
    shown["training time"] = _or_dash(axis.seconds, lambda x: duration(x[-1]))
    shown["last checkpoint"] = f"step {run.checkpoint.step:,}" if run.checkpoint else "–"
    return shown


def val_losses(run: Recorded) -> dict[str, tuple[float, float]]:
    """Metric -> its last value and its best."""
    found = {}
    for key in run.keys:
        if key.startswith("val/") and key.endswith("/loss"):
            values = [v for r in run.records if (v := number(r, key)) is not None]
            if values:
                found[one_line(key, 80)] = (values[-1], min(values))
    return found


def config_diff(runs: Sequence[Recorded]) -> list[Row]:
    """[key, its value in each run] of the settings in which the runs differ."""
    flat = [config.flatten(redacted_tree(run.config)) for run in runs]
    keys = sorted({key for each in flat for key in each})
    rows = [[key, *(_setting(each[key]) if key in each else "–" for each in flat)] for key in keys]
    return [[one_line(key, 120), *values] for key, *values in rows if len(set(values)) > 1]


def config_text(run: Recorded) -> str:
    """The whole config.yaml, masked."""
    if not run.config:
        return ""
    return redacted(config.dump_yaml(redacted_tree(run.config)))


def lineage_of(run: Recorded) -> list[str]:
    """The run's ancestors, the parent first, a line each; empty for fresh weights."""
    try:
        text = (run.path / run_files.INIT_FROM).read_text(encoding="utf-8")
        ancestors = lineage.ancestors(json.loads(text))
        before = lineage.tokens_before(json.loads(text))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return [f"{run_files.INIT_FROM} cannot be read"]
    lines = []
    for one in ancestors:
        step, tokens = one["step"], one["tokens"]
        known = isinstance(step, int) and isinstance(tokens, int)
        at = f"step {step:,}, {human(tokens)} tokens" if known else one["kind"]
        lines.append(one_line(f"{one['path']} ({at})"))
    if isinstance(before, int):
        lines.append(f"{human(before)} tokens seen before")
    return lines


def data_mix(run: Recorded) -> list[dict[str, Any]]:
    """Each source: tokens read, its part of all of them, epochs, last loss on it."""
    last: dict[str, float] = {}
    for record in run.trained[-1:]:
        last = {k: v for k in record if (v := number(record, k)) is not None}
    names = sorted(
        {k.split("/", 1)[1].removesuffix("/epoch") for k in last if k.endswith("/epoch")}
    )
    tokens = {n: last.get(f"data/{n}/tokens") for n in names}
    if len(names) == 1 and tokens[names[0]] is None:
        tokens[names[0]] = last.get("tokens")
    total = sum(t or 0 for t in tokens.values())
    return [
        {
            "name": one_line(name, 60),
            "tokens": _or_dash(tokens[name], human),
            "share": (tokens[name] or 0) / total if total else 0.0,
            "epochs": f"{last[f'data/{name}/epoch']:.3f}",
            "loss": _or_dash(_recent(run, f"train/{name}/loss"), lambda x: f"{x:.4f}"),
        }
        for name in names
        if f"data/{name}/epoch" in last
    ]


def samples(run: Recorded) -> list[dict[str, Any]]:
    """Generated texts, the newest first: step, prompt, text."""
    found = [r for r in run.records if isinstance(r.get("sample/text"), str)]
    return [
        {
            "step": f"{r['step']:,}",
            "prompt": redacted(str(r.get("sample/prompt", "")))[:_MAX_SAMPLE_CHARACTERS],
            "text": redacted(r["sample/text"])[:_MAX_SAMPLE_CHARACTERS],
        }
        for r in reversed(found[-_MAX_SAMPLES:])
    ]


def evaluations(runs: Sequence[Recorded]) -> tuple[list[Row], list[str]]:
    """[task, score of each run], and what could not be read.

    A score of a file is shown, as somebody asked for it, unless the run has one of a later step.
    """
    found: list[dict[str, Score]] = []
    notes: list[str] = []
    for run in runs:
        scores, problems = scores_of(run.path)
        for name, (step, value) in _recorded_scores(run).items():
            there = scores.get(name)
            if there is None or (there.step is not None and step > there.step):
                scores[name] = Score(value, f"step {step:,}", step)
        found.append(scores)
        notes += [f"{one_line(run.name, 60)}: {text}" for text in problems]
    tasks = sorted({task for scores in found for task in scores})
    rows = []
    for task in tasks:
        shown = [scores.get(task) for scores in found]
        rows.append([task, *(f"{s.value:.4f} ({s.where})" if s else "–" for s in shown)])
    return rows, notes


def _recorded_scores(run: Recorded) -> dict[str, tuple[int, float]]:
    """Task -> step, score: the last that was taken while the run trained."""
    found = {}
    for key in run.keys:
        if key.startswith("eval/"):
            name = one_line(key.removeprefix("eval/").removesuffix("/accuracy"), 80)
            for record in run.records:
                if (value := number(record, key)) is not None:
                    found[name] = (record["step"], value)
    return found


def system(runs: Sequence[Recorded]) -> list[Row]:
    """[name, value of each run]: the machine, and the median of what was measured of it."""
    rows: list[Row] = []
    for key, name in (
        ("host", "host"),
        ("device", "device"),
        ("world_size", "devices"),
        ("precision", "precision"),
        ("torch", "torch"),
        ("version", "openlm_lite"),
    ):
        rows.append([name, *(one_line(_last_start(run).get(key, "–"), 80) for run in runs)])
    known = [key for key, *_ in _SYSTEM]
    more = {
        k for run in runs for r in run.trained[-1:] for k in r if k.startswith(_SYSTEM_PREFIXES)
    }
    entries = [*_SYSTEM, *((key, key, "", 4) for key in sorted(more - set(known)))]
    for key, name, unit, digits in entries:
        medians = [_median(run, key) for run in runs]
        cells = ["–" if m is None else _figure(m, unit, digits) for m in medians]
        rows.append([one_line(name, 80), *cells])
    return [row for row in rows if set(row[1:]) != {"–"}]


def events(run: Recorded) -> tuple[list[Row], int]:
    """[when, step, what] of the run's last events, and how many there were before these.

    Starts, saves and ends have the time of day; what the guard saw has its step.
    """
    found: list[tuple[float, int, Row]] = []
    for i, event in enumerate(run.events):
        after = run.events[i + 1 : i + 2]
        if event["event"] == "launched" and after and after[0]["event"] == "start":
            continue  # which says more
        at, step = number(event, "time"), event.get("step")
        when = "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
        place = step if type(step) is int else -1
        shown = f"{step:,}" if type(step) is int else ""
        found.append((place, i, [when, shown, _said(event)]))
    for record in run.records:
        if isinstance(record.get("guard/event"), str):
            reason = one_line(record.get("guard/reason", ""))
            text = f"{one_line(record['guard/event'], 40)}: {reason}"
            found.append((record["step"], -1, ["", f"{record['step']:,}", text]))
    in_order = [row for _, _, row in _merged(found)]
    return in_order[-_MAX_EVENTS:], max(0, len(in_order) - _MAX_EVENTS)


def _merged(found: list[tuple[float, int, Row]]) -> list[tuple[float, int, Row]]:
    """History in its own order; guard records before the first event of a later step."""
    history = [f for f in found if f[1] >= 0]
    guards = sorted((f for f in found if f[1] < 0), key=lambda f: f[0])
    merged: list[tuple[float, int, Row]] = []
    for event in history:
        while guards and 0 <= guards[0][0] <= event[0]:
            merged.append(guards.pop(0))
        merged.append(event)
    return merged + guards


def marks(run: Recorded) -> list[dict[str, Any]]:
    """Steps that a curve is marked at: restarts, and what the guard saw."""
    found = []
    for event in run.events:
        if event["event"] == "start" and event.get("resumed") and type(event.get("step")) is int:
            found.append({"step": event["step"], "kind": "restart", "text": "restart"})
    for record in run.records:
        if isinstance(kind := record.get("guard/event"), str):
            text = f"{kind}: {record.get('guard/reason', '')}"
            found.append({"step": record["step"], "kind": "guard", "text": one_line(text, 120)})
    return found[-_MAX_EVENTS:]


def _said(event: Mapping[str, Any]) -> str:
    kind = event["event"]
    if kind == "start":
        what = "resumed" if event.get("resumed") else "started"
        text = f"{what} on {event.get('world_size', '?')} x {event.get('device', '?')}"
        return one_line(f"{text}, {event.get('host', '?')}")
    if kind in ("saved", "save failed"):
        text = event.get("path") if kind == "saved" else event.get("problem")
        took, waited = number(event, "seconds"), number(event, "stalled_seconds")
        times = "" if took is None else f" in {took:.1f} s"
        times += "" if waited is None else f", training waited {waited:.1f} s"
        return one_line(f"{kind}: {text}{times}")
    if kind == "failed":
        return one_line(f"failed: {event.get('error', '')}")
    return one_line({"done": "done", "stopped": "stopped on request"}.get(kind, kind), 80)


def _last_start(run: Recorded) -> dict[str, Any]:
    return next((e for e in reversed(run.events) if e["event"] == "start"), {})


def _values(run: Recorded, key: str) -> list[float]:
    return [v for r in run.trained if (v := number(r, key)) is not None]


def _median(run: Recorded, key: str) -> float | None:
    values = _values(run, key)
    return statistics.median(values) if values else None


def _recent(run: Recorded, key: str, n: int = 20) -> float | None:
    """Mean over the last steps that have it."""
    values = _values(run, key)[-n:]
    return sum(values) / len(values) if values else None


def _figure(value: float, unit: str, digits: int) -> str:
    value = 100 * value if unit == "%" else value
    return f"{human(value) if abs(value) >= 1e3 else f'{value:.{digits}g}'} {unit}".strip()


def _setting(value: Any) -> str:
    """As YAML would have it: null, true, [1, 2]."""
    return one_line(value if isinstance(value, str) else json.dumps(value, default=str))


def _or_dash(value: Any, show: Any) -> str:
    empty = value is None or (isinstance(value, Iterable) and not value)
    return "–" if empty else show(value)


def folder_of(path: Path) -> str:
    return one_line(path, 200)
