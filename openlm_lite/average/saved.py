"""Averages in a checkpoint: what COMMIT.json says of them, their tensors, and their mean.

facts       averages: {NAME: {kind, copies, since, updates, held}}
tensors     average.NAME.SLOT.PARAMETER     slots 0 to held - 1; more than one with LAWA only

since       the step that it began at, null: not yet
held        slots that hold something; the average is their plain mean
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from openlm_lite.average.config import KINDS
from openlm_lite.commit import Commit
from openlm_lite.errors import InputError

FACTS_KEY = "averages"
_COUNTS = ("copies", "updates", "held")


def mean_of(tensors: Iterable[Tensor]) -> Tensor:
    """The plain mean in fp32, in a tensor of its own; takes the tensors one by one, in order.

    The same bits in a run and from its checkpoint.
    """
    total, n = torch.empty(0), 0
    for tensor in tensors:
        total = total.add_(tensor) if n else tensor.to(torch.float32, copy=True)
        n += 1
    return total.div_(n) if n > 1 else total


def prefix_of(name: str, slot: int) -> str:
    """In front of the parameters' names in a checkpoint."""
    return f"average.{name}.{slot}."


def saved_average(
    commit: Commit, tensor_names: Iterable[str], name: str
) -> tuple[dict[str, Any], list[str]]:
    """(its record, prefixes of the tensors that it is the mean of) of the average `name`.

    `tensor_names` are all that the checkpoint has. Raises InputError that lists the averages there.
    """
    records = records_of(commit.facts, commit.path)
    ready = [known for known, record in records.items() if record["updates"]]
    if name not in ready:
        why = "has had no update yet" if name in records else "is not in this checkpoint"
        there = f"it holds {', '.join(ready)}" if ready else "it holds no average of weights"
        raise InputError(f"{commit.path}: the average {name!r} {why}; {there}")
    record, start = records[name], f"average.{name}."
    found = {n.removeprefix(start).split(".")[0] for n in tensor_names if n.startswith(start)}
    if found != {str(slot) for slot in range(len(found))} or len(found) != record["held"]:
        raise InputError(
            f"{commit.path}: the average {name!r} has the parts {', '.join(sorted(found))} instead "
            f"of {record['held']}; use another checkpoint"
        )
    return record, [prefix_of(name, slot) for slot in range(len(found))]


def records_of(facts: Mapping[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """What COMMIT.json says of the averages. Raises InputError where that is no such thing."""
    records = facts.get(FACTS_KEY, {})
    try:
        whole = all(
            record["kind"] in KINDS
            and all(type(record[name]) is int and record[name] >= 0 for name in _COUNTS)
            and (record["since"] is None or type(record["since"]) is int)
            for record in records.values()
        )
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(f"{path}: what it says of its averages makes no sense; use another one")
    return {name: dict(record) for name, record in records.items()}
