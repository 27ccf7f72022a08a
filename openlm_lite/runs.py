"""`openlm runs DIR`: a table of the runs below a folder, once or again and again."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openlm_lite.log import duration, human
from openlm_lite.recorded import (
    RECENT_STEPS,
    Recorded,
    ago,
    find_runs,
    number,
    one_line,
    printable,
    read_run,
)

_HEAD = ("run", "state", "step", "loss", "tokens/s", "left", "checkpoint", "changed")
_RIGHT = {"loss", "tokens/s", "left"}
_CLEAR = "\x1b[H\x1b[2J"
_COLOURS = {"running": "36", "done": "32", "failed": "31", "stopped": "33"}


def table(folder: str) -> dict[str, Any]:
    """What `--json` prints: one row per run. Raises InputError where there is no such folder."""
    root = Path(folder).expanduser()
    rows = [row_of(read_run(path, all_records=False), root) for path in find_runs(root)]
    return {"folder": folder, "runs": rows}


def row_of(run: Recorded, root: Path) -> dict[str, Any]:
    """Plain values about one run; what is not known is null."""
    trained = run.trained
    last = trained[-1] if trained else {}
    speeds = [s for r in trained[-RECENT_STEPS:] if (s := number(r, "perf/tokens_per_second"))]
    speed = statistics.median(speeds) if speeds else None
    tokens = number(last, "tokens")
    left = None
    if run.state == "running" and run.sizes and speed and tokens is not None:
        left = max(0.0, run.sizes.total_tokens - tokens) / speed
    return {
        "run": str(run.path.relative_to(root)) if run.path != root else run.name,
        "path": str(run.path),
        "state": run.state,
        "why": one_line(run.why),
        "step": last.get("step"),
        "total_steps": run.sizes.total_steps if run.sizes else None,
        "tokens": None if tokens is None else int(tokens),
        "loss": number(last, "train/loss"),
        "tokens_per_second": speed,
        "seconds_left": left,
        "checkpoint": run.checkpoint.path if run.checkpoint else None,
        "checkpoint_step": run.checkpoint.step if run.checkpoint else None,
        "changed_at": run.changed_at,
        "notes": [one_line(text) for text in run.notes],
    }


def text_of(found: dict[str, Any], *, colours: bool = False) -> str:
    """The table for people; under a row, what is to be said of it."""
    rows = found["runs"]
    if not rows:
        return f"{printable(found['folder'])}: no runs\n"
    cells = [_cells(row) for row in rows]
    widths = [max(len(head), *(len(c[i]) for c in cells)) for i, head in enumerate(_HEAD)]

    def line(texts: tuple[str, ...]) -> str:
        placed = [
            text.rjust(width) if head in _RIGHT else text.ljust(width)
            for head, text, width in zip(_HEAD, texts, widths, strict=True)
        ]
        return "  ".join(placed).rstrip()

    lines = [line(_HEAD)]
    for row, texts in zip(rows, cells, strict=True):
        shown = line(texts)
        if colours and row["state"] in _COLOURS:
            start = widths[0] + 2
            end = start + len(row["state"])
            coloured = f"\x1b[{_COLOURS[row['state']]}m{shown[start:end]}\x1b[0m"
            shown = shown[:start] + coloured + shown[end:]
        lines.append(shown)
        lines += [f"  {text}" for text in ([row["why"]] if row["why"] else []) + row["notes"]]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    step, total, loss = row["step"], row["total_steps"], row["loss"]
    speed, left, changed = row["tokens_per_second"], row["seconds_left"], row["changed_at"]
    return (
        printable(row["run"]),
        row["state"],
        f"{0 if step is None else step}/{'?' if total is None else total}",
        "" if loss is None else f"{loss:.4f}",
        "" if speed is None else human(speed),
        "" if left is None else duration(left),
        "" if row["checkpoint_step"] is None else f"step {row['checkpoint_step']}",
        "" if changed is None else f"{ago(time.time() - changed)} ago",
    )


def watch(folder: str, every: float, as_json: bool, out: Any = None) -> None:
    """The table again every `every` seconds, until Ctrl-C; on a terminal in one place."""
    out = out or sys.stdout
    on_terminal: bool = out.isatty() and not as_json
    while True:
        print_table(table(folder), as_json, out, clear=on_terminal)
        time.sleep(every)


def print_table(
    found: dict[str, Any], as_json: bool, out: Any = None, *, clear: bool = False
) -> None:
    """Once: a JSON line, or the table."""
    out = out or sys.stdout
    write: Callable[[str], Any] = out.write
    if as_json:
        write(json.dumps(found) + "\n")
    else:
        stamp = time.strftime("%H:%M:%S  ") + "Ctrl-C ends\n" if clear else ""
        write((_CLEAR if clear else "") + text_of(found, colours=out.isatty()) + stamp)
    out.flush()
