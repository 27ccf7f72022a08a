"""Finished runs as rows of cells, from tables and from run folders.

::

    table.json, table.csv  ─┐
    run folder              ├─> Row(name, cells) ── where ──> chosen rows ── numbers ──> arrays
    folder of run folders   │
    ladder (ladder.json)   ─┘

Every row has N (parameters) and D (tokens); M = D / N and C = 6 N D are added.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openlm_lite import run_files
from openlm_lite.errors import InputError
from openlm_lite.scaling.conditions import Condition
from openlm_lite.scaling.laws import Array

MANIFEST_NAME = "ladder.json"
_MOST_SHOWN = 12


@dataclass(frozen=True)
class Row:
    """A finished run: `name` for messages, and its cells by column."""

    name: str
    cells: Mapping[str, Any]


@dataclass(frozen=True)
class LeftOut:
    """A run that is not there to be fitted, and why."""

    name: str
    reason: str


def read_rows(inputs: Sequence[str]) -> tuple[list[Row], list[LeftOut]]:
    """The rows of tables and run folders, and the runs that have no result yet.

    Raises InputError for what is neither, or has no finished run at all.
    """
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = _runs_in(path)
            rows += [run for run in found if isinstance(run, Row)]
            left_out += [run for run in found if isinstance(run, LeftOut)]
        elif path.suffix.lower() in (".json", ".csv") and path.is_file():
            rows += read_table(path)
        else:
            what = "cannot be read as a table" if path.exists() else "no such file or folder"
            raise InputError(
                f"{given}: {what}; give tables (.json: a list of objects, .csv), run folders, or "
                "a folder of them"
            )
    if not rows:
        reasons = "".join(f"\n  {run.name}: {run.reason}" for run in left_out[:_MOST_SHOWN])
        raise InputError(f"{', '.join(inputs)}: no finished run{':' if reasons else ''}{reasons}")
    return rows, left_out


def read_table(path: Path) -> list[Row]:
    """The rows of a JSON list of flat objects, or of a CSV file with a line of names."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        plain = json.loads(text) if path.suffix.lower() == ".json" else _csv_rows(text)
    except (OSError, ValueError, RecursionError, csv.Error) as e:
        raise InputError(f"{path}: cannot be read as a table: {e}") from None
    if not isinstance(plain, list) or not all(isinstance(cells, dict) for cells in plain):
        raise InputError(f"{path}: must hold a list of objects, one per run: [{{…}}, {{…}}]")
    rows = []
    for i, cells in enumerate(plain, 1):
        name = cells.get("name")
        rows.append(_row(name if isinstance(name, str) and name else f"{path.name} row {i}", cells))
    return rows


def _csv_rows(text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(text.splitlines(), strict=True)
    rows = []
    for cells in reader:
        if None in cells or None in cells.values():
            raise ValueError(f"line {reader.line_num} has not as many cells as the first line")
        rows.append({key.strip(): _csv_cell(value.strip()) for key, value in cells.items()})
    return rows


def _csv_cell(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text or None


def _row(name: str, cells: Mapping[str, Any]) -> Row:
    N, D = as_number(cells.get("N")), as_number(cells.get("D"))
    if N is not None and D is not None and N > 0 and D > 0:
        cells = {**cells, "M": D / N, "C": 6.0 * N * D}
    return Row(name, cells)


def as_number(cell: Any) -> float | None:
    """A cell as a number, or None where it is missing, no number or not finite."""
    if not isinstance(cell, int | float) or isinstance(cell, bool):
        return None
    try:
        return float(cell) if math.isfinite(cell) else None
    except OverflowError:  # a whole number of 309 digits and more
        return None


def _runs_in(folder: Path) -> list[Row | LeftOut]:
    """The runs of a ladder, of a run folder, or of the run folders in a folder."""
    if (folder / MANIFEST_NAME).is_file():
        return [
            _read_run(folder / run["folder"], run["name"])
            for run in read_manifest(folder)["runs"]
            if not run["is_target"] or (folder / run["folder"]).is_dir()
        ]
    if (folder / run_files.CONFIG).is_file():
        return [_read_run(folder, str(folder))]
    inner = sorted(p.parent for p in folder.glob("*/config.yaml"))
    if not inner:
        raise InputError(
            f"{folder}: neither a run folder (config.yaml, metrics.jsonl) nor one that holds run "
            f"folders or a ladder ({MANIFEST_NAME})"
        )
    return [_read_run(path, str(path)) for path in inner]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The `ladder.json` of a planned ladder."""
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for run in manifest["runs"]:
            if not (isinstance(run["name"], str) and isinstance(run["is_target"], bool)):
                raise TypeError(f"the run {run}")
            if Path(run["folder"]).name != run["folder"]:
                raise ValueError(f"the folder {run['folder']!r}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: not a plan of `openlm fit --plan`: {e!r}") from None
    return manifest


def _read_run(folder: Path, name: str) -> Row | LeftOut:
    """One run of ours: N by the paper's count, D tokens, the losses after its last step."""
    if not (folder / run_files.CONFIG).is_file() or not (folder / run_files.METRICS).is_file():
        return LeftOut(name, "not begun")
    from openlm_lite import config, run
    from openlm_lite.log import read_metrics

    cfg = run.parse_run(
        (folder / run_files.CONFIG).read_text(encoding="utf-8"), str(folder / run_files.CONFIG)
    )
    records = read_metrics(folder / run_files.METRICS)
    last = max((record.get("step", 0) for record in records), default=0)
    if last < cfg.steps:
        return LeftOut(name, f"unfinished: step {last:,} of {cfg.steps:,}")
    if cfg.model.init_from.path is not None:
        return LeftOut(name, "its weights come from another run: D is not all that it has seen")
    final = [record for record in records if record.get("step") == cfg.steps]
    measured = {k: v for record in final for k, v in record.items()}
    if not any(key.startswith("val/") for key in measured):
        return LeftOut(name, "no validation loss after the last step (data.val names the sets)")
    from openlm_lite.scaling.ladder import count_params

    cells = config.flatten(config.to_plain(cfg)) | measured
    N, D = count_params(cfg.model.architecture), measured["tokens"]
    return _row(name, cells | {"name": name, "N": N, "D": D})


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All columns, in the order in which they appear."""
    return list(dict.fromkeys(key for row in rows for key in row.cells))


def find_column(rows: Sequence[Row], name: str, option: str) -> str:
    """The column that the user means; `stdlib` is val/stdlib/loss where that exists.

    Raises InputError with the nearest name, or with those that there are.
    """
    columns = columns_of(rows)
    for candidate in (name, f"val/{name}/loss"):
        if candidate in columns:
            return candidate
    close = difflib.get_close_matches(name, columns, n=1)
    if close:
        raise InputError(f"{option} {name}: no such column; did you mean {close[0]}?")
    shown = loss_columns(rows) if option == "--loss" else columns
    raise InputError(f"{option} {name}: no such column; there are {listed(shown)}")


def loss_columns(rows: Sequence[Row]) -> list[str]:
    """Columns that look like the loss on a validation set."""
    return [
        c
        for c in columns_of(rows)
        if (c.startswith("val/") and c.endswith("/loss"))
        or (c.startswith("loss_") and not c.startswith(("loss_lower_", "loss_upper_")))
    ]


def select(rows: Sequence[Row], conditions: Sequence[Condition], option: str) -> list[Row]:
    """The rows that fulfil all conditions. Raises InputError where none does."""
    columns = columns_of(rows)
    for condition in conditions:
        if condition.column not in columns:
            find_column(rows, condition.column, option)
    found = [row for row in rows if all(c.holds(row.cells.get(c.column)) for c in conditions)]
    if found or not conditions:
        return found
    values = "".join(
        f"\n  {column}: {listed(_values_of(rows, column))}"
        for column in dict.fromkeys(c.column for c in conditions)
    )
    text = ",".join(map(str, conditions))
    raise InputError(f"{option} {text}: no run matches; the values are{values}")


def _values_of(rows: Sequence[Row], column: str) -> list[str]:
    cells = [row.cells.get(column) for row in rows]
    values = {cell if isinstance(cell, int | float) else str(cell) for cell in cells}
    numbers = sorted(v for v in values if isinstance(v, int | float))
    others = sorted(v for v in values if isinstance(v, str))
    return [f"{v:.12g}" for v in numbers] + others


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _MOST_SHOWN
    return ", ".join(names[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def numbers(rows: Sequence[Row], column: str, *, positive: bool = True) -> Array:
    """A column as numbers. Raises InputError naming every cell that is none."""
    found, bad = [], []
    for row in rows:
        cell = row.cells.get(column)
        number = as_number(cell)
        if number is None or (positive and number <= 0):
            bad.append(f"{row.name}: {'missing' if cell is None else repr(cell)}")
        else:
            found.append(number)
    if bad:
        raise InputError(
            f"column {column}: {len(bad)} of {len(rows)} runs have no "
            f"{'positive ' if positive else ''}number there; mend the table, or leave them out "
            "with --where:\n  "
            + "\n  ".join(bad[:_MOST_SHOWN])
            + (f"\n  and {len(bad) - _MOST_SHOWN} more" if len(bad) > _MOST_SHOWN else "")
        )
    return np.array(found)


def refuse_duplicates(rows: Sequence[Row]) -> None:
    """Raises InputError where two rows have the same N and D: which one is meant?"""
    seen: dict[tuple[Any, Any], Row] = {}
    for row in rows:
        other = seen.setdefault((row.cells["N"], row.cells["D"]), row)
        if other is row:
            continue
        differing = [
            f"{key} ({other.cells.get(key)} and {value})"
            for key, value in row.cells.items()
            if isinstance(value, str) and key != "name" and other.cells.get(key) != value
        ]
        hint = f"they differ in {', '.join(differing[:3])}" if differing else "they look alike"
        raise InputError(
            f"two runs have N = {row.cells['N']:.12g} and D = {row.cells['D']:.12g}: {other.name} "
            f"and {row.name}; {hint}; keep one of them with --where"
        )
