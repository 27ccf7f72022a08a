"""One bar over all tasks of a suite, with the time that is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tqdm import tqdm

from openlm_lite.eval.prompts import Data
from openlm_lite.eval.tasks import Task


class Progress:
    """One bar over all tasks. Its unit is a row's text, so that the time left is about right."""

    def __init__(
        self,
        tasks: Sequence[Task],
        data: Mapping[str, Data],
        limit: int | None,
        *,
        enabled: bool,
    ) -> None:
        self._rows = {task.label: _rows_asked(data[task.label], limit) for task in tasks}
        self._weights = {task.label: _row_weight(task, data[task.label]) for task in tasks}
        total = sum(self._rows[label] * weight for label, weight in self._weights.items())
        self._bar = tqdm(
            total=total,
            disable=not enabled,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed} < {remaining}{postfix}",
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, task: Task) -> None:
        self._left = self._rows[task.label]
        self._bar.set_description(task.label, refresh=False)
        self._bar.set_postfix_str(f"{self._left} rows left")

    def add(self, task: Task, rows: int) -> None:
        rows = min(rows, self._left)
        self._left -= rows
        self._bar.set_postfix_str(f"{self._left} rows left", refresh=False)
        self._bar.update(rows * self._weights[task.label])

    def skip(self, task: Task) -> None:
        self.add(task, self._left)


def _rows_asked(data: Data, limit: int | None) -> int:
    return sum(
        len(rows) if limit is None else min(limit, len(rows)) for rows in data.categories.values()
    )


def _row_weight(task: Task, data: Data) -> int:
    """Characters that the model reads per row, about."""
    rows = [row for rows in data.categories.values() for row in rows]
    texts = ("query", "context", "continuation", "chain_of_thought", "answer")
    lists = ("choices", "context_options")
    n = sum(len(row.get(name, "")) for row in rows for name in texts)
    n += sum(len(text) for row in rows for name in lists for text in row.get(name, ()))
    return 1 + n * (1 + task.shots) // len(rows)
