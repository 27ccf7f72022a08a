"""Results of `openlm eval` that lie in a run's folder, as task -> score.

Looked for: every `result.json` below the folder, and JSON files named *eval*.json or in a folder
`eval/`, of the run and of its checkpoints. A result says its numbers under names; which of them is
a task's score, eval/aggregate.py knows of our files and DCLM's, the tables below of others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from openlm_lite.commit import step_of_folder
from openlm_lite.eval.aggregate import harness_scores, table_in
from openlm_lite.recorded import one_line

_GLOBS = (
    "*eval*.json",
    "eval/*.json",
    "checkpoints/step_*/*eval*.json",
    "checkpoints/step_*/eval/*.json",
    "**/result.json",
)
_MAX_BYTES = 16 << 20  # of a file
_MAX_SCORES = 300  # of a run
_SECTIONS = ("tasks", "results", "scores")  # of other programs, an entry per task
_SUMMARY = ("core", "extended", "aggregate")
_NO_TASKS = (*_SUMMARY, "aggregates", "categories", "lm_eval", "texts", "settings", "model")
_VALUES = ("score", "accuracy", "acc", "acc_norm", "exact_match", "value", "centered", "loss")


class Score(NamedTuple):
    value: float
    where: str
    """the step that was evaluated, or the file"""
    step: int | None = None


def scores_of(folder: Path) -> tuple[dict[str, Score], list[str]]:
    """Task -> its score in the newest file that has it; and what could not be read."""
    scores: dict[str, Score] = {}
    notes: list[str] = []
    for path in _files(folder):
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"is larger than {_MAX_BYTES} bytes")
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            notes.append(one_line(f"{path.name} cannot be read: {e}"))
            continue
        step = _step(path, found)
        where = one_line(path.name, 40) if step is None else f"step {step:,}"
        for task, value in _scores(found):
            if len(scores) < _MAX_SCORES:
                scores[one_line(task, 80)] = Score(value, where, step)
    return scores, notes


def _files(folder: Path) -> list[Path]:
    """The oldest first."""
    found: dict[Path, float] = {}
    for pattern in _GLOBS:
        for path in folder.glob(pattern):
            try:
                if path.is_file():
                    found[path] = path.stat().st_mtime
            except OSError:
                continue
    return sorted(found, key=lambda path: (found[path], path))


def _step(path: Path, found: Any) -> int | None:
    """Which step was evaluated, if file or folder say it."""
    found = found if isinstance(found, dict) else {}
    model = found.get("model")
    step = model.get("step") if isinstance(model, dict) else found.get("step")
    for part in path.parts:
        step = step_of_folder(part) if step_of_folder(part) is not None else step
    return step if type(step) is int else None


def _scores(found: Any) -> Iterator[tuple[str, float]]:
    if not isinstance(found, Mapping):
        return
    scale = 100 if "baselines" in found else 1  # `openlm eval` says the means in percent
    for name in _SUMMARY:
        value = _value(found.get(name))
        if value is not None:
            yield name, value / scale
    for name, number in harness_scores(found.get("lm_eval")).items():
        if (value := _value(number)) is not None:
            yield name, value
    if isinstance(texts := found.get("texts"), Mapping):
        yield from ((f"texts/{name}", value) for name, value in _entries(texts, named=True))
    table = table_in(found)
    if table is not found:
        yield from _entries(table, named=True)
        return
    sections = [found[s] for s in _SECTIONS if isinstance(found.get(s), Mapping | list)]
    for section in sections or [{k: v for k, v in found.items() if k not in _NO_TASKS}]:
        yield from _entries(section, named=bool(sections))


def _entries(section: Any, named: bool) -> Iterator[tuple[str, float]]:
    """Of {task: number}, {task: {…}} and [{"task": …, …}]; bare numbers only where they are named
    to be results, or lie between 0 and 1."""
    if isinstance(section, list):
        pairs = [(e.get("task", e.get("name")), e) for e in section if isinstance(e, Mapping)]
    else:
        pairs = list(section.items())
    for task, entry in pairs:
        if not isinstance(task, str):
            continue
        value = _value(entry)
        if value is not None and (named or isinstance(entry, Mapping) or 0 <= value <= 1):
            yield task, value


def _value(entry: Any) -> float | None:
    if isinstance(entry, Mapping):
        return next((v for k in _VALUES if (v := _value_of_name(entry, k)) is not None), None)
    if isinstance(entry, bool) or not isinstance(entry, int | float):
        return None
    return float(entry) if math.isfinite(entry) else None


def _value_of_name(entry: Mapping[str, Any], name: str) -> float | None:
    """`acc`, and `acc,none` as lm-eval writes it."""
    for key, value in entry.items():
        if key.split(",")[0] == name and not isinstance(value, Mapping):
            return _value(value)
    return None
