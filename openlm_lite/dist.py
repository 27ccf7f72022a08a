"""The process group: who am I, which device, and decisions that every rank takes alike.

`torchrun` sets RANK, LOCAL_RANK and WORLD_SIZE; without them this is one process. Either way a
process group exists after `init()`, so that the code above has one path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from openlm_lite.errors import InputError, RelayedError, RunError

T = TypeVar("T")


has_met = False
"""whether this process has joined (or tried to join) the others: what fails then is its own"""


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launched() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun announced them; (0, 1, 0) for a process alone.

    Raises InputError where only a part of the announcement is there.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if len(missing) > 2 and "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1, 0  # MASTER_ADDR alone stands in many an environment
    if missing:
        raise InputError(
            f"the environment announces a process group without {', '.join(missing)}; start with "
            "torchrun, or unset " + ", ".join(n for n in names if n in os.environ)
        )
    rank, world_size, local_rank = (int(os.environ[name]) for name in names[:3])
    return rank, world_size, local_rank


def init(kind: str = "auto", timeout_seconds: float = 1200.0) -> World:
    """Join the process group that torchrun announced, or make a group of one.

    `kind` is cuda, cpu, or auto: CUDA where there is a device.

    One backend string serves both kinds of machine: gloo carries CPU tensors (checkpoints,
    decisions) everywhere, NCCL carries CUDA tensors where there is a GPU.
    """
    rank, world_size, local_rank = launched()
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "run.device = cuda, but torch finds no CUDA device here; look at nvidia-smi and "
            "`python -c 'import torch; print(torch.version.cuda)'`, or set run.device=cpu"
        )
    if kind != "cpu" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"rank {rank} wants GPU {local_rank}, but this machine shows "
                f"{torch.cuda.device_count()}; set --nproc-per-node to the number of GPUs"
            )
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    global has_met
    has_met = True
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        # This store lives in this process: no port, no file.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return World(rank, world_size, local_rank, device)


def close() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


Group = dist.ProcessGroup | None


def background_group() -> Group:
    """A gloo group of all ranks for one background thread; collective.

    Two threads must not share a group: their collectives would meet in any order.
    """
    if world_size() == 1:
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # an int for a rank outside it: none is
    return group


def all_gather(value: Any, group: Group = None) -> list[Any]:
    """The values of all ranks, in rank order, on every rank (JSON-like values only).

    Over gloo on every machine: where a group has both backends, torch sends objects by the CPU's.
    """
    size = world_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group)
    return values


def rank() -> int:
    """This process's place in the group; 0 where no group exists."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the group; 1 where no group exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_main(
    action: Callable[[], T], error: type[Exception] = RuntimeError, group: Group = None
) -> T:
    """Do `action` on rank 0 alone; its result (JSON-like), or its failure, on every rank."""
    results = on_all_ranks(lambda: action() if rank() == 0 else None, error, group)
    return results[0]  # pyright: ignore[reportReturnType]  # None stands for the other ranks


def on_all_ranks(
    action: Callable[[], T], error: type[Exception] = RuntimeError, group: Group = None
) -> list[T]:
    """Do `action` on every rank; the results of all of them, or a failure on all of them alike.

    Raises InputError if the first failing rank did, else `error` with the message of each rank.
    """
    cause: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as e:
        cause = e
    described = None
    if cause is not None:
        ours = isinstance(cause, InputError | RunError | error)
        text = str(cause) if ours else f"{type(cause).__name__}: {cause}"
        described = (isinstance(cause, InputError), text)
    gathered = all_gather((described, result), group)
    failures = [(who, *failure) for who, (failure, _) in enumerate(gathered) if failure]
    if not failures:
        return [value for _, value in gathered]
    if cause is not None and isinstance(cause, InputError | error):
        raise cause
    texts = dict.fromkeys(text for _, _, text in failures)  # what all ranks say, once
    first, is_input, _ = failures[0]
    message = f"rank {first} failed: {'; '.join(texts)}"
    raise (RelayedError if is_input else error)(message) from cause
