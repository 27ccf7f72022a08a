"""The door of `openlm VERB …`, of `python -m openlm_lite VERB …` and of `train.py`."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb as this process; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        # What follows imports for some tenths of a second, on a busy machine for seconds. A request
        # to stop waits meanwhile: StopRequest takes over, and lets it through.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    from openlm_lite import cli

    return cli.main(words)


def leave(code: int) -> NoReturn:
    """End this process as `sys.exit(code)` would, without taking the interpreter apart.

    With torch loaded, that takes a second of a core, and on a busy node many by the clock: between
    a run's last checkpoint and the moment at which its launcher hears that it has ended. What has
    asked to be called at the end is called, and what was printed is written.
    """
    alone = all(t.daemon or t is threading.main_thread() for t in threading.enumerate())
    if alone:  # else the interpreter waits for those threads
        atexit._run_exitfuncs()
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:  # closed by the launcher
                    stream.flush()
        except (OSError, ValueError):
            pass  # the interpreter says so, and has an exit code for it
        else:
            os._exit(code)
    sys.exit(code)


def door() -> NoReturn:
    """Run the verb on the command line, and end."""
    leave(main())


if __name__ == "__main__":
    door()
