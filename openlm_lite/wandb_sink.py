"""A run on a Weights & Biases server, or in a folder for `wandb sync`; none of it in this process.

    open    online:  a process, wandb.init --> answered: records go to the server
                                           --> not answered: that process is killed, and
            offline: a process, wandb.init --> records go to run_folder/wandb/offline-run-…
    write   one message and its reply (`wandb_process`)
    close   what is on its way gets a few seconds; the rest is on the disk

Everything here may wait: it is called from a thread that has nothing else to do (`telemetry`).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from openlm_lite import storage, wandb_process
from openlm_lite.errors import InputError

logger = logging.getLogger("openlm_lite")

ANSWER_SECONDS = 60.0
"""of silence after which the process is given up, beyond what wandb itself was allowed"""
END_SECONDS = 5.0
"""for the process to end when all is said; `Telemetry.close` may be shorter"""
LAST_MINUTE_SECONDS = 2.5
"""for a server that has not answered yet when the run ends"""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases; without a project, none."""

    project: str | None = None
    """a project turns it on"""
    entity: str | None = None
    """user or team; null: the account's default"""
    name: str | None = None
    """of the run on the server; null: the name of the run's folder"""
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] = "online"
    """offline: into a folder only, for `wandb sync`"""
    init_timeout_seconds: float = 30.0
    """for the server to answer at the start, before the run's records go to a folder instead"""

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.project is None and given:
            raise InputError(
                f"log.wandb.{given[0]} has no effect without log.wandb.project; name a project"
            )
        if self.project is not None and not self.project.strip():
            raise InputError(f"log.wandb.project = {self.project!r}, must be a name")
        if self.init_timeout_seconds <= 0:
            raise InputError(
                f"log.wandb.init_timeout_seconds = {self.init_timeout_seconds}, must be above 0"
            )


def is_installed(package: str) -> bool:
    """Whether there is such a package; a folder of that name (wandb makes one) is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def check_wandb(cfg: WandbConfig) -> None:
    """Raises InputError if wandb is not there, or online and without credentials.

    Reaches no server. Online it takes 2 s: only wandb knows all the places of a key.
    """
    if cfg.project is None:
        return
    if not is_installed("wandb"):
        raise InputError('log.wandb needs wandb: pip install "openlm-lite[wandb]"')
    if cfg.mode == "offline":
        return
    process = WandbProcess()
    try:
        reason = "" if process.ask({"login": True}, 30)["logged_in"] else "no API key"
        process.end()
    except AnswerError as e:
        reason = str(e)
    except OSError:  # slow or broken: not the user's mistake, and a run lives with it
        reason = ""
    finally:
        process.release()
    if reason:
        raise InputError(
            f"log.wandb.mode is online, and wandb cannot log in ({reason}): run `wandb login`, set "
            "WANDB_API_KEY, or set log.wandb.mode=offline"
        )


class AnswerError(Exception):
    """What the W&B process says went wrong."""


class WandbProcess:
    """A `wandb_process`, and a conversation with it."""

    def __init__(self) -> None:
        decided_here = ("SERVICE", "MODE", "RUN_ID", "RESUME", "DIR", "DISABLED", "SWEEP_ID")
        env = {k: v for k, v in os.environ.items() if k not in {f"WANDB_{n}" for n in decided_here}}
        self.popen = subprocess.Popen(
            # -P: the folder of the file is no place to import from
            [sys.executable, "-P", wandb_process.__file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"} | env,
            start_new_session=True,  # a Ctrl-C is for the run, not for this
        )
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.stdin, self.stdout = self.popen.stdin, self.popen.stdout

    def ask(
        self, message: Mapping[str, Any], seconds: float, closing: threading.Event | None = None
    ) -> dict[str, Any]:
        """Send a message; returns the reply.

        Waits for `seconds`, but no longer than LAST_MINUTE_SECONDS from when `closing` is set.

        Raises:
            OSError: no answer.
            AnswerError: the answer is that it failed.
        """
        self.stdin.write((json.dumps(message) + "\n").encode())
        poll = select.poll()
        poll.register(self.stdout, select.POLLIN)
        deadline = time.monotonic() + seconds
        while not poll.poll(100):
            if closing is not None and closing.is_set():
                deadline = min(deadline, time.monotonic() + LAST_MINUTE_SECONDS)
                closing = None
            if time.monotonic() > deadline:
                raise TimeoutError("no answer in time")
        line = self.stdout.readline()
        if not line:
            raise ConnectionError(f"its process ended (exit code {self.popen.wait()})")
        reply = json.loads(line)
        if "error" in reply:
            raise AnswerError(reply["error"])
        return reply

    def end(self) -> None:
        """Let it end by itself: it completes its files, and removes temporary ones."""
        self.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(END_SECONDS)

    def kill(self) -> None:
        """End it and the service that it started, which is in a session of its own."""
        if self.popen.poll() is None:
            children = wandb_process.descendants(self.popen.pid)
            self.popen.kill()
            wandb_process.kill_all(children)
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(1.0)

    def release(self) -> None:
        """Kill it and close the pipes; for the thread that asks."""
        self.kill()
        self.stdin.close()
        self.stdout.close()


class WandbSink:
    """One start of a run."""

    name = "wandb"

    def __init__(
        self, cfg: WandbConfig, folder: Path, run_name: str, config_tree: Mapping[str, Any]
    ) -> None:
        self.cfg, self.folder, self.config_tree = cfg, folder.resolve(), config_tree
        self.run_name = cfg.name or run_name
        self.written = str(folder / "wandb")
        self.process: WandbProcess | None = None
        self.killed = False
        self.lock = threading.Lock()

    def open(self, closing: threading.Event) -> None:
        if self.cfg.mode == "offline":
            self._start("offline", None)
            return
        try:
            self._start("online", closing)
        except (OSError, AnswerError) as e:
            self.release()
            self._start("offline", None)
            logger.warning(
                "wandb: no run on the server (%s); its records are kept for: wandb sync --id %s %s",
                e,
                self.run_id(),
                self.written,
            )

    def _start(self, mode: str, closing: threading.Event | None) -> None:
        with self.lock:
            if self.killed:
                raise ConnectionError("the run has ended")
            self.process = WandbProcess()
        cfg, limit = self.cfg, self.cfg.init_timeout_seconds
        init = {
            "mode": mode,
            "id": self.run_id(),
            "project": cfg.project,
            "entity": cfg.entity,
            "name": self.run_name,
            "group": cfg.group,
            "tags": list(cfg.tags),
            "config": dict(self.config_tree),
        }
        opening = {"folder": str(self.folder), "init": init, "init_timeout_seconds": limit}
        self.written = self._ask({"open": opening}, limit + ANSWER_SECONDS, closing)["folder"]

    def run_id(self) -> str:
        """Of this run on the server; kept in its folder, so that a resumed run goes on there."""
        path = self.folder / "wandb_id"
        if not path.is_file():
            storage.write_bytes(str(path), f"{secrets.token_hex(6)}\n".encode())
        return path.read_text(encoding="utf-8").strip()

    def write(self, record: dict[str, Any]) -> None:
        self._ask({"record": record}, ANSWER_SECONDS)

    def close(self) -> None:
        try:
            self._ask({"close": True}, ANSWER_SECONDS)
        except AnswerError as e:
            raise AnswerError(f"{e}; to send the rest: wandb sync {self.written}") from None
        finally:
            if self.process is not None:
                self.process.end()

    def _ask(
        self, message: Mapping[str, Any], seconds: float, closing: threading.Event | None = None
    ) -> dict[str, Any]:
        if self.process is None:
            raise ConnectionError("not open")
        return self.process.ask(message, seconds, closing)

    def release(self) -> None:
        if self.process is not None:
            self.process.release()

    def kill(self) -> None:
        with self.lock:
            self.killed = True
            if self.process is not None:
                self.process.kill()
