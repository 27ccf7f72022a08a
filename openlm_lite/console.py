"""The console of a run: lines for logs, and on a terminal one live line below them.

    17:53:45 step  20/340  tokens 40.96k  loss 6.5855  …        lines: also in log.txt
    17:54:41 step 85: val/stdlib/loss 5.4677
     97/340 ━━━━━━━━─────────────────  28 %  loss 5.3121  2.31k tokens/s  left 0:03:24

The live line is rewritten in place, a few times a second, and is gone when the run ends. It is
drawn where standard error is a terminal that can do so: not in a pipe, a file, or a Slurm job.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TextIO

_REDRAW_SECONDS = 0.2
_ERASE = "\r\x1b[K"
_BAR = 16  # characters


def is_live(stream: TextIO) -> bool:
    """Whether a line on `stream` can be rewritten, and somebody may be looking at it."""
    if os.environ.get("TERM", "dumb") == "dumb" or "SLURM_JOB_ID" in os.environ:
        return False
    return stream.isatty()


class ConsoleHandler(logging.StreamHandler):
    """Messages as lines on standard error, above the live line where there is one."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream or sys.stderr)
        self.is_live = is_live(self.stream)
        self._line = ""
        self._drawn_at = float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        if self._line:
            self._write(_ERASE)
        super().emit(record)
        if self._line:
            self._write(self._line)

    def show(self, text: str) -> None:
        """Make `text` the live line; nothing where there is none, or it was drawn just now."""
        now = time.monotonic()
        if not self.is_live or now - self._drawn_at < _REDRAW_SECONDS:
            return
        self._drawn_at = now
        self.acquire()  # other threads log
        try:
            self._line = text[: self._width() - 1]  # one more would begin a second line
            self._write(_ERASE + self._line)
        finally:
            self.release()

    def clear(self) -> None:
        """Take the live line away."""
        if self._line:
            self._line = ""
            self._write(_ERASE)

    def close(self) -> None:
        self.clear()
        super().close()

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # closed: a terminal that is gone is no reason to fail
            self.is_live = False

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80


class OnceFilter(logging.Filter):
    """Each text once: libraries give one and the same warning for every place that meets it."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text in self._seen:
            return False
        self._seen.add(text)
        return True


def bar(done: int, total: int) -> str:
    """━━━━━━────"""
    full = round(_BAR * min(1.0, done / max(1, total)))
    return "━" * full + "─" * (_BAR - full)
