"""`openlm eval --table`: runs beside each other and beside published models.

`published.json` has what model cards print, one object per model and protocol:

    dclm      DCLM's suite, as `openlm eval` runs it: comparable with our runs
    olmo      OLMo's model cards: other prompts, no shots; sciq and the rest are no tasks of ours
    openlm    OpenLM's README: llm-foundry of 2023, mostly without shots

Numbers of different protocols are printed under each other and mean different things.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openlm_lite import run_files
from openlm_lite.errors import InputError
from openlm_lite.eval.aggregate import aggregate, read_scores
from openlm_lite.eval.tasks import Baselines, all_tasks


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    name: str
    protocol: str
    source: str
    accuracies: dict[str, float]
    """from 0 to 1"""
    params: str = ""
    tokens: str = ""
    core_v1: float | None = None
    """percent, where a card states it without the scores of the tasks"""
    extended_v1: float | None = None

    def means(self, baselines: Baselines) -> tuple[float | None, float | None]:
        """CORE and EXTENDED, percent; None where they cannot be had."""
        if self.protocol not in ("dclm", "ours"):
            return None, None
        if baselines == "v1" and self.core_v1 is not None:
            return self.core_v1, self.extended_v1
        found = aggregate(self.accuracies, baselines)
        return found.core, found.extended


@dataclass(frozen=True)
class Table:
    """What is printed; `columns` are labels of tasks that several lines have."""

    baselines: Baselines
    columns: list[str]
    entries: list[Entry] = field(default_factory=list)


def published() -> list[Entry]:
    """The models of `published.json`."""
    rows: list[dict[str, Any]] = json.loads(
        (Path(__file__).parent / "published.json").read_text(encoding="utf-8")
    )
    return [Entry(**row) for row in rows]


def make_table(runs: Sequence[str], baselines: Baselines = "v1") -> Table:
    """The runs, then the published models.

    A run is a result.json, a file of scores, or a folder that has some within. Raises InputError
    for one without.
    """
    ours = [
        Entry(_name(path), "ours", path, read_scores(path))
        for run in runs
        for path in _results_of(run)
    ]
    entries = [*ours, *published()]
    order = [task.label for task in all_tasks()]
    counts = {
        label: sum(label in entry.accuracies for entry in entries)
        for entry in entries
        for label in entry.accuracies
    }
    shown = [
        label for label, n in counts.items() if n > 1 or any(label in e.accuracies for e in ours)
    ]
    shown.sort(key=lambda label: (order.index(label) if label in order else len(order), label))
    return Table(baselines, shown, entries)


def _results_of(run: str) -> list[str]:
    if os.path.isfile(run):
        return [run]
    found = sorted(str(path) for path in Path(run).glob("**/result.json"))
    if not found:
        what = "holds no result.json" if os.path.isdir(run) else "no such file or folder"
        raise InputError(
            f"--table {run}: {what}; give what `openlm eval … --out FOLDER` wrote, or a file of "
            "scores"
        )
    return found


def _name(path: str) -> str:
    """The model's own path where the result states it, else the file's place."""
    with open(path, encoding="utf-8") as f:
        found = json.load(f)
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        return (
            os.path.basename(os.path.dirname(os.path.abspath(path))) + "/" + os.path.basename(path)
        )
    parts = Path(model["path"]).parts
    average = model.get("average")
    named = f" ({average['name']})" if isinstance(average, dict) and "name" in average else ""
    kept = [part for part in parts[-3:] if part != run_files.CHECKPOINTS]
    return "/".join(kept[-2:]) + named


def table_plain(table: Table) -> dict[str, Any]:
    """The table as JSON values: percent for the means, 0 to 1 for accuracies."""
    models = []
    for entry in table.entries:
        core, extended = entry.means(table.baselines)
        models.append(
            {
                "name": entry.name,
                "protocol": entry.protocol,
                "source": entry.source,
                "params": entry.params,
                "tokens": entry.tokens,
                "core": core,
                "extended": extended,
                "accuracies": entry.accuracies,
            }
        )
    return {"baselines": table.baselines, "models": models}


def table_lines(table: Table) -> list[str]:
    """The table as text: a line per model, the means first, then accuracies in percent."""
    heads = ["model", "protocol", f"CORE {table.baselines}", f"EXT {table.baselines}"]
    rows = [[*heads, *(_short(label) for label in table.columns)]]
    for entry in table.entries:
        means = [_percent(value) for value in entry.means(table.baselines)]
        values = [entry.accuracies.get(label) for label in table.columns]
        cells = [_percent(None if value is None else 100 * value) for value in values]
        rows.append([entry.name, entry.protocol, *means, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        rest = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*first, *rest]).rstrip())
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _short(label: str) -> str:
    return label.removeprefix("bigbench_").removeprefix("agi_eval_")
