"""What became of a run, and when: `events.jsonl` in its folder, one JSON object per line.

    {"time": 1729999990.0, "event": "launched"}
    {"time": 1730000000.0, "event": "start", "step": 0, "host": "node7", "world_size": 8, …}
    {"time": 1730000900.0, "event": "saved", "step": 1000, "path": "…/step_00001000", …}
    {"time": 1730001000.0, "event": "done", "step": 1200}

`metrics.jsonl` says what was trained, and is cut back where a resume trains steps again. This file
is only ever added to: it keeps every start. `launched` is written as soon as the folder is locked,
`start` where training begins: between them the state is loaded. A launch that is followed by none
of `ENDS`, of a run that is not running, was killed.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from openlm_lite import run_files
from openlm_lite.redact import redacted_tree

logger = logging.getLogger("openlm_lite")

BEGINNINGS = ("launched", "start")
"""the folder is this run's; its weights are there, it trains"""
ENDS = ("done", "stopped", "failed")
"""trained to the end; stopped on request with a checkpoint saved; ended by an error"""


def note(folder: Path, event: str, **values: Any) -> None:
    """Append an event to the file; a full disk, or a folder that is gone, is no reason to fail."""
    line = json.dumps({"time": time.time(), "event": event, **redacted_tree(values)}) + "\n"
    try:
        fd = os.open(folder / run_files.EVENTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(fd).st_size
            cut_off = size > 0 and os.pread(fd, 1, size - 1) != b"\n"  # by a kill
            os.write(fd, (("\n" if cut_off else "") + line).encode())
        finally:
            os.close(fd)
    except OSError as e:
        logger.warning("%s: not written: %s", folder / run_files.EVENTS, e)
