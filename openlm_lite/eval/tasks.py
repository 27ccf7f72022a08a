"""The tasks of DCLM's suite as data: `tasks.json`, one object per task, in DCLM's order.

    label                    DCLM's name
    kind                     how it is asked and scored (Kind)
    shots                    solved examples before the question
    file, rows               of the data, in DCLM's layout; how many rows that has
    category, core           one of six; whether CORE counts it
    has_categories           the rows name categories, and the score is the plain mean over them
    prelimiter, continuation_delimiter, cot_delimiter, stop      strings around question and answer
    baseline_v1, baseline_v2 accuracy of guessing, percent, in DCLM's two tables

Sources: DCLM's eval/heavy.yaml, eval_meta_data.csv and additional_aggregation.json (361714b).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openlm_lite.errors import InputError

Kind = Literal["multiple_choice", "language_modeling", "schema", "generation_task_with_answers"]
Baselines = Literal["v1", "v2"]
"""v1: DCLM's publications up to September 2025; v2: its present default"""

SUITES = ("core", "extended")


@dataclass(frozen=True)
class Task:
    """One task; the fields are explained at the top of this file."""

    label: str
    kind: Kind
    shots: int
    file: str
    category: str
    core: bool
    rows: int
    baseline_v1: float
    baseline_v2: float
    has_categories: bool = False
    prelimiter: str = ""
    continuation_delimiter: str = " "
    cot_delimiter: str = ""
    stop: tuple[str, ...] = ()

    def baseline(self, version: Baselines) -> float:
        """The accuracy of guessing, from 0 to 1."""
        return (self.baseline_v1 if version == "v1" else self.baseline_v2) / 100

    def centered(self, accuracy: float, version: Baselines) -> float:
        """0 for guessing, 1 for all right."""
        b = self.baseline(version)
        return (accuracy - b) / (1 - b)


@functools.cache
def all_tasks() -> tuple[Task, ...]:
    """The 53 tasks of EXTENDED."""
    rows: list[dict[str, Any]] = json.loads(
        (Path(__file__).parent / "tasks.json").read_text(encoding="utf-8")
    )
    return tuple(Task(**{**row, "stop": tuple(row.get("stop", ()))}) for row in rows)


def task_named(label: str) -> Task:
    """The task of that name. Raises InputError that lists those that are alike."""
    import difflib

    known = {task.label: task for task in all_tasks()}
    if label not in known:
        near = difflib.get_close_matches(label, known, n=3) or sorted(known)
        raise InputError(
            f"task {label!r}: not known; "
            + (f"did you mean {', '.join(near)}" if len(near) <= 3 else f"one of {', '.join(near)}")
        )
    return known[label]


def tasks_of(suite: str) -> tuple[Task, ...]:
    """The tasks of `core`, `extended`, or a comma-separated list of these and of labels.

    In DCLM's order, each once. Raises InputError for a name that is neither.
    """
    wanted: set[str] = set()
    for name in (word.strip() for word in suite.split(",")):
        if name == "core":
            wanted |= {task.label for task in all_tasks() if task.core}
        elif name == "extended":
            wanted |= {task.label for task in all_tasks()}
        elif not name:
            raise InputError(
                f"--suite {suite!r}: an empty name; give core, extended, or tasks separated by "
                "commas"
            )
        else:
            wanted.add(task_named(name).label)
    return tuple(task for task in all_tasks() if task.label in wanted)
