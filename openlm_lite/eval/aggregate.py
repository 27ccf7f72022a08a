"""CORE, EXTENDED and the means of the categories, as DCLM takes them, from accuracies of tasks.

    centered = (accuracy - baseline) / (1 - baseline)       0: guessing, 1: all right
    CORE     = mean of centered over 22 tasks
    EXTENDED = mean of centered over all 53

A mean exists only where every one of its tasks has a score. Source: DCLM's
eval/aggregated_metrics.py (361714b).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openlm_lite.errors import InputError
from openlm_lite.eval.tasks import Baselines, Task, all_tasks
from openlm_lite.storage import read_bytes


@dataclass(frozen=True)
class Aggregates:
    """Percent; None where a task is missing."""

    baselines: Baselines
    core: float | None
    extended: float | None
    categories: dict[str, float | None]
    """centered, as the two above"""
    core_uncentered: float | None
    extended_uncentered: float | None
    missing: list[str]
    """labels of the 53 without a score"""
    missing_of_core: list[str]
    unknown: list[str]
    """labels that are none of the 53; they count nowhere"""
    centered: dict[str, float]
    """per task"""


def aggregate(scores: Mapping[str, float], baselines: Baselines = "v2") -> Aggregates:
    """The means of `scores`: label -> accuracy from 0 to 1."""
    tasks = all_tasks()
    known = {task.label for task in tasks}
    centered = {
        task.label: 100 * task.centered(scores[task.label], baselines)
        for task in tasks
        if task.label in scores
    }
    plain = {label: 100 * scores[label] for label in centered}
    core = [task for task in tasks if task.core]
    categories = sorted({task.category for task in tasks})
    return Aggregates(
        baselines=baselines,
        core=_mean(core, centered),
        extended=_mean(tasks, centered),
        categories={c: _mean([t for t in tasks if t.category == c], centered) for c in categories},
        core_uncentered=_mean(core, plain),
        extended_uncentered=_mean(tasks, plain),
        missing=[task.label for task in tasks if task.label not in scores],
        missing_of_core=[task.label for task in core if task.label not in scores],
        unknown=sorted(set(scores) - known),
        centered=centered,
    )


def _mean(tasks: Sequence[Task], values: Mapping[str, float]) -> float | None:
    if not all(task.label in values for task in tasks):
        return None
    return math.fsum(values[task.label] for task in tasks) / len(tasks)


def read_scores(path: str) -> dict[str, float]:
    """The accuracies in a JSON file: label -> number, DCLM's form, or a result of `openlm eval`.

        {"copa": 0.79, …}      {"eval_metrics": {"icl": {…}}}      {"input": one of these}
        {"tasks": {"copa": {"accuracy": 0.79, …}, …}}

    A task whose score is null or NaN has none. Raises InputError for anything else, and for a
    number outside 0 to 1.
    """
    try:
        found = json.loads(read_bytes(path))
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e}); give a file of scores") from None
    scores = table_in(found)
    if not scores:
        raise InputError(
            f"{path}: holds no scores; it must be {{task: accuracy}}, DCLM's eval JSON "
            "(eval_metrics.icl), or a result of openlm eval"
        )
    checked = {}
    for label, entry in scores.items():
        value: Any = entry["accuracy"] if isinstance(entry, dict) and "accuracy" in entry else entry
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= 1:
            raise InputError(
                f"{path}: the score of {label} is {value!r}; an accuracy is from 0 to 1 "
                "(divide percent by 100)"
            )
        checked[label] = float(value)
    return checked


def table_in(found: Any) -> dict[str, Any]:
    """label -> number, or -> object with `accuracy`, where a parsed file of scores has them.

    `found` itself, with whatever else it holds, where it is none of the nested forms.
    """
    while isinstance(found, dict) and isinstance(found.get("input"), dict):
        found = found["input"]
    if not isinstance(found, dict):
        return {}
    metrics = found.get("eval_metrics")
    if isinstance(metrics, dict):
        return metrics["icl"] if isinstance(metrics.get("icl"), dict) else {}
    return found["tasks"] if isinstance(found.get("tasks"), dict) else found


def harness_scores(result: Any) -> dict[str, float]:
    """`lm-eval/<task>/<metric>` -> value, of what `run_harness` returned (as JSON, too).

    Standard errors are no scores, nor is a task's version, which is a number as well.
    """
    tasks = result.get("tasks") if isinstance(result, dict) else None
    return {
        f"lm-eval/{task}/{name}": value
        for task, values in (tasks.items() if isinstance(tasks, dict) else ())
        for name, value in (values.items() if isinstance(values, dict) else ())
        if isinstance(value, float) and name != "version" and "stderr" not in name
    }
