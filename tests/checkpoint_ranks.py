"""Forks ranks that train, save and get killed, for test_checkpoint_faults.py.

Run as a script it is a server: torch is imported once (seconds), every case is a fork (a fraction
of a second). It reads one JSON case per line, forks `world_size` ranks that meet over gloo on the
loopback interface, and answers with one JSON line: the exit code of each rank (negative: the
signal that killed it) and what each returned.

The two-sided clock of a case is the *event*: each rank counts the points where a kill is
interesting (see `_hook_events`), and `kill: [rank, k]` ends that rank with SIGKILL at its k-th.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported here so that no fork has to
import torch.distributed as dist
import torch.distributed.checkpoint.filesystem as dcp_filesystem
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from openlm_lite import dist as our_dist
from openlm_lite import remote
from openlm_lite.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from openlm_lite.errors import InputError
from openlm_lite.saver import Saver

CASE_SECONDS = 60.0
STRAGGLER_SECONDS = 10.0  # how long the others may live after one rank was killed
WIDTH = 6
STEPS = 6
SAVE_AT = (2, 3, 5)  # the third save deletes the first (keep_last = 1 keeps two)


class Model(nn.Module):
    """Two residual layers and a head of one row: rank 1 of two holds an empty shard of it."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.head = nn.Linear(width, 1, bias=False)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_BD = x_BD + torch.tanh(layer(x_BD))
        return self.head(x_BD)


def build(sharded: bool, width: int = WIDTH) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model(width)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> None:
    data = torch.Generator().manual_seed(1000 * step + rank)
    loss = model(torch.randn(4, WIDTH, generator=data)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """sha256 over all weights and all optimizer state, whole; collective."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        for value in (parameter.detach(), *optimizer.state[parameter].values()):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            digest.update(whole.numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------
# Events


class Events:
    def __init__(self, kill_at: int | None) -> None:
        self.names: list[str] = []
        self._kill_at = kill_at

    def __call__(self, name: str) -> None:
        if len(self.names) == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)


def _hook_events(event: Events) -> None:
    """An event before and after each thing that changes the disk in this process."""

    def around(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            event(f"before {name}")
            result = original(*args, **kwargs)
            event(f"after {name}")
            return result

        setattr(owner, name, counted)

    around(dcp_filesystem, "_write_item")
    around(remote, "_call")  # a request to a store
    for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
        around(os, name)


# --------------------------------------------------------------------------------------------
# What a rank can be asked to do


def train(case: dict[str, Any], rank: int, event: Events) -> dict[str, Any]:
    """Train from the newest checkpoint in `folder` to the last step, saving on the way.

    With `background` the saves are written while the next steps are made.
    """
    root = case["folder"]
    model, optimizer = build(sharded=True)
    saver = Saver(root, CheckpointConfig(keep_last=1)) if case.get("background") else None
    found = latest_checkpoint(root)
    step = 0 if found is None else load_checkpoint(found, model, optimizer).step
    started_at = step
    while step < case.get("steps", STEPS):
        train_step(model, optimizer, step, rank)
        step += 1
        event(f"step {step}")
        if step in case.get("save_at", SAVE_AT):
            if saver is None:
                save(root, model, optimizer, step)
            else:
                saver.start(model, optimizer, state_at(step), **WITH)
    if saver is not None:
        saver.finish(must_succeed=True)
    print_of_weights = fingerprint(model, optimizer)
    return {"fingerprint": print_of_weights, "events": event.names, "started_at": started_at}


WITH = {"documents": {"config.yaml": "seed: 0\n"}, "facts": {"config_sha256": "0" * 64}}


def state_at(step: int) -> TrainState:
    return TrainState(step, step * 100, step * 8)


def save(root: str, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> str:
    cfg = CheckpointConfig(keep_last=1)
    return save_checkpoint(root, model, optimizer, state_at(step), cfg=cfg, **WITH)


def weights(case: dict[str, Any], rank: int, event: Events) -> dict[str, Any]:
    """Load the newest checkpoint at this world size; the fingerprint of what was loaded."""
    model, optimizer = build(sharded=case.get("sharded", True))
    found = latest_checkpoint(case["folder"])
    assert found is not None
    state = load_checkpoint(found, model, optimizer)
    return {"fingerprint": fingerprint(model, optimizer), "state": state.to_plain()}


def load_into_other(case: dict[str, Any], rank: int, event: Events) -> dict[str, Any]:
    """Try to load into a model of another width: the error, and whether the model changed."""
    model, optimizer = build(sharded=True, width=WIDTH + 1)
    before = [p.full_tensor().clone() for p in model.parameters()]  # pyright: ignore
    found = latest_checkpoint(case["folder"])
    assert found is not None
    try:
        load_checkpoint(found, model, optimizer)
        error = ""
    except InputError as e:
        error = str(e)
    after = [p.full_tensor() for p in model.parameters()]  # pyright: ignore
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {"error": error, "untouched": same and not optimizer.state}


def fail_to_save(case: dict[str, Any], rank: int, event: Events) -> dict[str, Any]:
    """Save with a fault on one rank (or a full disk); then again after it went away."""
    root = case["folder"]
    model, optimizer = build(sharded=True)
    found = latest_checkpoint(root)
    step = 0 if found is None else load_checkpoint(found, model, optimizer).step
    train_step(model, optimizer, step, rank)
    original = dcp_filesystem._write_item
    original_rename = os.rename
    original_usage = shutil.disk_usage
    calls = 0

    def full_disk(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    def no_rename(*args: Any, **kwargs: Any) -> None:
        if os.path.basename(args[1]).startswith("step_"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original_rename(*args, **kwargs)

    if case["fault"] == "write" and rank == case["fault_rank"]:
        dcp_filesystem._write_item = full_disk
    if case["fault"] == "commit":
        os.rename = no_rename
    if case["fault"] == "quota":  # a quota: the file system says that there is room, and is full
        shutil.disk_usage = lambda path: original_usage("/")
    try:
        save(root, model, optimizer, step + 1)
        error = ""
    except CheckpointError as e:
        error = str(e)
    our_dist.all_gather(None)
    names = sorted(os.listdir(root))
    dcp_filesystem._write_item = original
    os.rename = original_rename
    filler = case.get("filler")
    if filler and rank == 0:
        os.remove(filler)
    our_dist.all_gather(None)
    again = save(root, model, optimizer, step + 1)
    return {"error": error, "names": names, "again": os.path.basename(again)}


SCENARIOS = {f.__name__: f for f in (train, weights, load_into_other, fail_to_save)}


# --------------------------------------------------------------------------------------------
# The server


def run_rank(case: dict[str, Any], rank: int, meeting: Path) -> int:
    """One rank, in its own process. Returns its exit code."""
    warnings.simplefilter("error")
    world_size = case["world_size"]
    kill = case.get("kill")
    event = Events(kill[1] if kill and kill[0] == rank else None)
    try:
        store = dist.FileStore(str(meeting / "store"), world_size)  # pyright: ignore
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30)
        )
        _hook_events(event)
        result = SCENARIOS[case["scenario"]](case, rank, event)
        (meeting / f"result-{rank}.json").write_text(json.dumps(result))
        dist.destroy_process_group()
        return 0
    except BaseException:
        (meeting / f"error-{rank}.txt").write_text(traceback.format_exc())
        return 1


def wait_for(pids: list[int]) -> list[int]:
    """The exit codes of the ranks; those that hang are killed (code -9)."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + CASE_SECONDS
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] != 0:
                    deadline = min(deadline, time.monotonic() + STRAGGLER_SECONDS)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def run_case(case: dict[str, Any], scratch: Path) -> dict[str, Any]:
    meeting = scratch / "meeting"
    shutil.rmtree(meeting, ignore_errors=True)
    meeting.mkdir()
    pids = []
    for rank in range(case["world_size"]):
        pid = os.fork()
        if pid == 0:
            os._exit(run_rank(case, rank, meeting))
        pids.append(pid)
    codes = wait_for(pids)
    results, errors = [], []
    for rank in range(case["world_size"]):
        file = meeting / f"result-{rank}.json"
        results.append(json.loads(file.read_text()) if file.exists() else None)
        file = meeting / f"error-{rank}.txt"
        errors.append(file.read_text() if file.exists() else None)
    return {"codes": codes, "results": results, "errors": errors}


def serve() -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    scratch = Path(sys.argv[1])
    for line in sys.stdin:
        answer = run_case(json.loads(line), scratch)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
