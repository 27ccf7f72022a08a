"""Where measurements go: `metrics.jsonl` (one JSON object per line), the console, `log.txt`."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from openlm_lite import redact
from openlm_lite.console import ConsoleHandler, OnceFilter, bar
from openlm_lite.errors import InputError

logger = logging.getLogger("openlm_lite")
_warnings = logging.getLogger("py.warnings")


class LogFile(logging.FileHandler):
    """`log.txt`. A full disk must not end a run, nor fill its console: that shows all messages."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # it may be opened here, by a rank on a machine without run.dir
            if self.stream is None:
                os.makedirs(os.path.dirname(self.baseFilename), exist_ok=True)
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def setup_console(log_file: Path | None = None, rank: int = 0) -> None:
    """Messages of this process on standard error and, with `log_file`, appended there too.

    Warnings of libraries go the same way, each once. Of a rank other than 0 only errors are shown:
    what it says besides is in its file, which is there once it says something.
    """
    close_console()
    formatter = redact.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    shown = ConsoleHandler()
    shown.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    handlers: list[logging.Handler] = [shown]
    if log_file is not None:
        handlers.append(LogFile(log_file, encoding="utf-8", delay=rank != 0))
    once = OnceFilter()
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
        _warnings.addHandler(handler)
    _warnings.addFilter(once)
    _warnings.propagate = False
    logging.captureWarnings(True)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def close_console() -> None:
    """Let go of the log file, and of the warnings."""
    logging.captureWarnings(False)
    _warnings.filters.clear()
    for each in (_warnings, logger):
        for handler in list(each.handlers):
            each.removeHandler(handler)
            handler.close()


def show_progress(record: Mapping[str, Any], total_steps: int, seconds_left: float) -> None:
    """The live line of a terminal; nothing elsewhere."""
    for handler in logger.handlers:
        if isinstance(handler, ConsoleHandler) and handler.is_live:
            step = record["step"]
            handler.show(
                f"{step:>{len(str(total_steps))}}/{total_steps} {bar(step, total_steps)} "
                f"{100 * step / total_steps:3.0f} %  loss {record['train/loss']:.4f}  "
                f"{human(record['perf/tokens_per_second'])} tokens/s  "
                f"left {duration(seconds_left)}"
            )


class MetricsFile:
    """`metrics.jsonl`: appended line by line; a resumed run first drops what it will redo."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Raises InputError where it cannot be written now; later on that is a warning."""
        self.path = path
        self._failed = False
        try:
            _keep_steps_until(path, resume_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as e:
            raise InputError(
                f"{path}: cannot be written ({e.strerror}); mend this (a resumed run writes it "
                "anew beside the old one) and launch the same command again"
            ) from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; whole lines only, so that a kill cuts at most the last one."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as e:  # a full disk must not stop a run whose checkpoints still fit
            self._fail(e)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as e:  # nor change how it ends
            self._fail(e)

    def _fail(self, error: OSError) -> None:
        """Say it, once."""
        if not self._failed:
            logger.warning("%s: not written: %s", self.path, error)
        self._failed = True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`; a last line that a kill cut off is left out."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; a run writes it from its first step on")
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: not a JSON object") from None
    return records


def _keep_steps_until(path: Path, step: int) -> None:
    """Rewrite the file with the records up to `step`: those after it are trained again."""
    if not path.is_file():
        return
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if record["step"] <= step:
                kept.append(record)
        except (ValueError, KeyError, TypeError):
            logger.warning("%s:%d: left out: not a record (cut off by a kill?)", path, number)
    temporary = path.with_suffix(".jsonl.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(record) + "\n" for record in kept)
            f.flush()
            os.fsync(f.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def step_line(record: Mapping[str, Any], total_steps: int, seconds_left: float) -> str:
    """One console line of a training step."""
    parts = [
        f"step {record['step']:>{len(str(total_steps))}}/{total_steps}",
        f"tokens {human(record['tokens'])}",
        f"loss {record['train/loss']:.4f}",
        f"lr {record['train/lr']:.2e}",
        f"grad_norm {record['train/grad_norm']:.2f}",
        f"{human(record['perf/tokens_per_second'])} tokens/s",
    ]
    if "perf/mfu" in record:
        parts.append(f"mfu {100 * record['perf/mfu']:.1f} %")
    parts.append(f"eta {duration(seconds_left)}")
    return "  ".join(parts)


def human(number: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.2f}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """3661 -> 1:01:01."""
    return (
        time.strftime("%-H:%M:%S", time.gmtime(seconds))
        if seconds < 86400
        else (f"{seconds / 86400:.1f} days")
    )
