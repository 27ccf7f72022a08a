"""The process that talks to Weights & Biases for a run; `telemetry` starts it and kills it.

wandb wraps `sys.exit` and `sys.excepthook`, waits in an atexit hook and starts a service
(`wandb-core`) that outlives a killed process by 40 s. None of that happens in a training process::

    training process                    this process                    wandb-core
      {"open": {…}}          -->          wandb.init            -->       server
      {"ok": true, …}        <--
      {"record": {…}}        -->          run.log               -->       server, run-ID.wandb
      {"close": true}        -->          run.finish

One JSON object per line each way; every message has one reply, {"ok": true, …} or
{"error": "why"}. It is run as a file, so that it starts without torch: it imports nothing of this
package.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FINISH_SECONDS = 3.0
"""for what is on its way to the server when a run ends; the file on the disk has it all"""
ORPHAN_SECONDS = 10.0
"""this process lives at most so long after the one that started it"""


def main(parent: int) -> None:
    """Obey the lines on standard input until they end; `parent` is the pid of who writes them."""
    messages, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)  # wandb and its service ask nothing and print nothing
    os.dup2(null, 0)
    os.dup2(null, 1)
    # The stop button of the web page interrupts the main thread: a run has its own ways to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    session = Session(parent)
    for line in messages:
        try:
            reply = {"ok": True, **session.obey(json.loads(line))}
        except Exception as e:
            reason = " ".join(f"{type(e).__name__}: {e}".split())  # one line
            reply = {"error": reason[:500].rstrip(".")}
        with suppress(BrokenPipeError):
            print(json.dumps(reply), file=replies, flush=True)
    session.close(exit_code=1)  # the run was killed: had it ended, `run` would be None here


class Session:
    """One wandb run, from its opening to its end."""

    def __init__(self, parent: int) -> None:
        self.parent = parent
        self.run: Any = None

    def obey(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what one message says; what it returns goes into the reply."""
        if "record" in message:
            self.run.log(message["record"])
        elif "open" in message:
            return self.open(**message["open"])
        elif "login" in message:
            return self.login()
        else:
            self.close(exit_code=0)
        return {}

    def login(self) -> dict[str, Any]:
        """Whether there are credentials for the server; asks nobody, server included."""
        import wandb

        return {"logged_in": wandb.login(prompt=False, verify=False)}

    def open(
        self, *, folder: str, init: dict[str, Any], init_timeout_seconds: float
    ) -> dict[str, Any]:
        import wandb

        settings = wandb.Settings(
            init_timeout=init_timeout_seconds,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            silent=True,
            console="off",
            disable_git=True,  # the address of a remote may hold a token
            disable_code=True,
            x_stats_pid=self.parent,
        )
        self.run = wandb.init(dir=folder, resume="allow", settings=settings, **init)
        # wandb counts calls of log by itself, and refuses a count that goes back as the steps of a
        # resumed run do; what curves are drawn against is a column of the records instead.
        self.run.define_metric("*", step_metric="tokens")
        written = Path(self.run.settings.sync_dir).resolve()
        if Path(folder).resolve() not in written.parents:  # what wandb does without permission
            raise OSError(f"{folder}: wandb cannot write there")
        return {"folder": str(written)}

    def close(self, exit_code: int) -> None:
        run, self.run = self.run, None
        if run is not None:
            run.finish(exit_code=exit_code)


def descendants(pid: int) -> list[int]:
    """Pids of the children of a process, of their children, and so on (Linux)."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _end_with(parent: int) -> None:
    """Die ORPHAN_SECONDS after `parent`, service included, whatever the main thread waits for."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(ORPHAN_SECONDS)
    kill_all([*descendants(os.getpid()), os.getpid()])


if __name__ == "__main__":
    main(int(sys.argv[1]))
