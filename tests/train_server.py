"""Starts real ranks of `openlm train` in half a second each: a fork server for the tests.

`torchrun` imports torch once per rank (many seconds); here one process imports everything, then
forks the ranks of every request. The ranks meet through a TCP store on loopback, as under torchrun.
Requests and answers are JSON lines on standard input and output:

    {"words": ["train", "recipe.yaml", "a.b=c"], "world": 2, "kill": {"rank": 1, "event": 17},
     "log": "FILE", "faults": […], "patience": 0.2, "signals": [[1.5, 0, "SIGTERM"], …],
     "folder": "where the ranks start"}
    -> {"codes": [0, -9], "events": [40, 17]}

An event is one call of an instrumented function (optimizer step, log record, file of a checkpoint,
commit, …); the rank kills itself with SIGKILL when it has counted to `event`. Other faults are
those of tests/run_faults.py. `signals` are sent to a rank, so many seconds after all of them listen
to signals. When one rank is killed, the others have `patience` seconds; when it ends with an error
they have more: they are about to end too, each with a code of its own.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_TO_END = 30.0  # s, for the others after an error of one rank; on a loaded machine, too


class TrainServer:
    """The client's side; use as a context manager."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> TrainServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(120)  # a busy machine takes its time to end an interpreter with torch
        self._process.stdout.close()

    def train(
        self,
        *words: str,
        world: int = 1,
        kill: tuple[int, int] | None = None,
        log: Path | None = None,
        faults: Sequence[dict[str, Any]] = (),
        patience: float = 0.2,
        signals: Sequence[tuple[float, int, str]] = (),
        verb: str = "train",
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """Run the ranks to their end; exit codes (negative: the signal) and events per rank.

        `verb`: another one of `openlm`, whose `words` they are.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {
            "words": [verb, *words],
            "world": world,
            "kill": None if kill is None else {"rank": kill[0], "event": kill[1]},
            "log": None if log is None else str(log),
            "faults": list(faults),
            "patience": patience,
            "signals": sorted(signals),
            "folder": None if folder is None else str(folder),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the train server died"
        return json.loads(line)


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    # What a first step would import; forked ranks then start at once.
    import torch._dynamo
    import torch.distributed.tensor

    import openlm_lite.cli
    import openlm_lite.train  # noqa: F401

    # Ranks leave alone what they share: to look at it would copy it, a third of what a rank takes.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    port = free_port()
    read_end, write_end = os.pipe()
    pids = []
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            _be_rank(request, rank, port, write_end)
        pids.append(pid)
    os.close(write_end)
    codes = _wait(pids, request["patience"], request["signals"])
    with os.fdopen(read_end) as pipe:
        counts = dict(json.loads(line) for line in pipe)
    return {"codes": codes, "events": [counts.get(r, -1) for r in range(request["world"])]}


def _wait(pids: list[int], patience: float, signals: list[Any]) -> list[int]:
    """Exit codes in order; when one rank dies the others are killed, as torchrun does."""
    codes: dict[int, int] = {}
    kill_at = listen_since = float("inf")
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG if signals or kill_at < float("inf") else 0)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] not in (0, 75):
                seconds = patience if codes[pid] < 0 else max(patience, _TO_END)
                kill_at = min(kill_at, time.monotonic() + seconds)
        elif time.monotonic() >= kill_at:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
            kill_at = float("inf")
        else:
            if signals:
                listen_since = _send_due(pids, codes, signals, listen_since)
            time.sleep(0.002 if signals else 0.01)
    return [codes[pid] for pid in pids]


def _send_due(
    pids: list[int], codes: dict[int, int], signals: list[Any], listen_since: float
) -> float:
    """Send the signals whose time has come; returns since when all ranks listen (inf: not yet)."""
    if listen_since == float("inf"):
        return time.monotonic() if not codes and all(map(listens, pids)) else listen_since
    while signals and time.monotonic() - listen_since >= signals[0][0]:
        _, rank, name = signals.pop(0)
        if pids[rank] not in codes:  # not waited for: the number is still its own
            os.kill(pids[rank], signal.Signals[name])
    return listen_since


def listens(pid: int) -> bool:
    """Whether no request to stop ends the process any more: the kernel tells by one bit of each."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = re.findall(r"^(?:SigCgt|SigBlk):\s*([0-9a-f]+)", status, re.MULTILINE)
    held = int(masks[0], 16) | int(masks[1], 16)
    # of SIGINT it tells nothing: Python always has a handler for it
    return all(held >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGUSR1))


def alive(pid: int) -> bool:
    """Whether it runs: neither gone nor a zombie that nobody waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def free_port() -> int:
    """A port of loopback that stays free till somebody listens there, seconds or minutes later.

    Below the range from which the kernel takes those of other sockets (32768 on by default), and
    by chance, as tests run beside each other.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def _be_rank(request: dict[str, Any], rank: int, port: int, report: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(request["world"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    log = os.open(request["log"] or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if request["folder"] is not None:
        os.chdir(request["folder"])
    kill = request["kill"]
    events = _Events(kill["event"] if kill and kill["rank"] == rank else None)
    code = 1
    try:
        events.instrument()
        if request["faults"]:
            from tests.run_faults import inject

            inject(request["faults"], rank)
        from openlm_lite.cli import main

        code = main(request["words"])
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    os.write(report, (json.dumps([rank, events.count]) + "\n").encode())
    sys.stderr.flush()
    os._exit(code)


class _Events:
    """Counts the calls of the functions in which a kill is most likely to hurt."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def instrument(self) -> None:
        import torch
        import torch.distributed.checkpoint.filesystem as dcp_files

        from openlm_lite import checkpoint, log, train

        self._around(train, "forward_backward")
        self._around(train, "clip_gradients")
        self._around(torch.optim.AdamW, "step")
        self._around(log.MetricsFile, "write")
        self._around(checkpoint, "write_synced")
        self._around(dcp_files, "_write_item")
        self._around(os, "rename")

    def _around(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self()
            result = inner(*args, **kwargs)
            self()
            return result

        setattr(owner, name, counted)


if __name__ == "__main__":
    _serve()
