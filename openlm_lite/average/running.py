"""Averages of the weights along a run: EMA, OpenLM's polynomial averages, LAWA (`config.py`).

    optimizer step --> weights --every_steps--> averages
                          |                        |
                   the run goes on    validated, saved, exported; never fed back

Each lies in fp32 beside the weights, sharded as they are: an update touches the shards of this rank
alone, without communication. LAWA keeps its snapshots, in a ring, and makes their mean when it is
asked for: a running mean would drift from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from openlm_lite.average.config import AverageConfig
from openlm_lite.average.saved import FACTS_KEY, mean_of, prefix_of, records_of
from openlm_lite.commit import Commit
from openlm_lite.parameter_names import plain_name

# One kernel for many tensors, where there is a GPU; as torch.optim.swa_utils does.
_lerp_ = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
_copy_ = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


class Averages:
    """The averages of a run under way. All ranks call every method at the same step."""

    def __init__(self, averages: Mapping[str, AverageConfig], model: nn.Module) -> None:
        """Takes the memory at once: an average that does not fit is told before the first step."""
        self._model = model
        self._parameters = {plain_name(name): p for name, p in model.named_parameters()}
        parameters = self._parameters.values()
        self._all = {name: _Average(cfg, parameters) for name, cfg in averages.items()}
        self._news: list[str] = []

    @property
    def updated(self) -> tuple[str, ...]:
        """The names of those that are more than a copy of the weights."""
        return tuple(name for name, average in self._all.items() if average.updates)

    def update(self, step: int) -> None:
        """The weights after optimizer step `step` are there; once for each step."""
        if self._all:
            weights = self._weights()
            for average in self._all.values():
                average.update(step, weights)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of them, by the names that it has there; this rank's shards."""
        return {
            name: tensor
            for average, state in self._all.items()
            for name, tensor in self._named(average, state).items()
        }

    def facts(self) -> dict[str, Any]:
        """JSON values for COMMIT.json; nothing where there are no averages."""
        records = {name: average.record() for name, average in self._all.items()}
        return {FACTS_KEY: records} if records else {}

    def of_checkpoint(self, commit: Commit) -> dict[str, Tensor]:
        """The tensors to fill from that checkpoint, by the names that it has there; then `begin`.

        An average that is not there, or is of another kind or size, begins anew.
        """
        records = records_of(commit.facts, commit.path)
        self._news = [
            f"average {name}: in the checkpoint, but no more in the configuration: given up"
            for name in records
            if name not in self._all
        ]
        for name, average in self._all.items():
            why = average.take_record(records.get(name))
            if why and commit.step >= average.cfg.start_step:
                self._news.append(
                    f"average {name}: {why}: begins with the weights of step {commit.step}"
                )
        return self.tensors()

    def begin(self, step: int) -> list[str]:
        """What has not begun by `step` and should have begins; the news since `of_checkpoint`."""
        if self._all:
            weights = self._weights()
            for average in self._all.values():
                average.begin(step, weights)
        news, self._news = self._news, []
        return news

    @contextmanager
    def in_place(self, name: str) -> Iterator[None]:
        """The average in place of the weights, which are as they were, to the bit, afterwards.

        Holds the weights meanwhile, so that it takes the memory of one more copy of this rank's
        shards: about what the gradients have in training.
        """
        weights = self._weights()
        kept = [weight.clone() for weight in weights]
        try:
            self._put(weights, self._all[name].value())
            yield
        finally:
            self._put(weights, kept)

    def _put(self, weights: list[Tensor], values: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)
        # FSDP may hold weights gathered (those of the root, after a forward without a backward).
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _weights(self) -> list[Tensor]:
        """This rank's shards; asked for each time: FSDP moves some before its first step."""
        return [_local(parameter) for parameter in self._parameters.values()]

    def _named(self, name: str, average: _Average) -> dict[str, Tensor]:
        return {
            f"{prefix_of(name, i)}{parameter}": tensor
            for i in range(average.held)
            for parameter, tensor in zip(self._parameters, average.slots[i], strict=True)
        }


class _Average:
    """One average: its tensors and where it stands."""

    def __init__(self, cfg: AverageConfig, parameters: Iterable[nn.Parameter]) -> None:
        self.cfg = cfg
        like = [parameter.detach() for parameter in parameters]
        self.slots = [
            [torch.zeros_like(p, dtype=torch.float32) for p in like] for _ in range(cfg.copies)
        ]
        """whole tensors or DTensors as the parameters are; more than one slot with LAWA only"""
        self.since: int | None = None  # the step that it began at
        self.updates = 0

    @property
    def held(self) -> int:
        """Slots that hold something."""
        if self.since is None:
            return 0
        return max(1, min(self.updates, self.cfg.copies))

    def record(self) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "kind": cfg.kind,
            "copies": cfg.copies,
            "since": self.since,
            "updates": self.updates,
            "held": self.held,
        }

    def take_record(self, record: Mapping[str, Any] | None) -> str:
        """Stand where `record` says; returns why it cannot (then it has not begun), or nothing."""
        self.since, self.updates = None, 0
        if record is None:
            return "not in the checkpoint"
        for name in ("kind", "copies"):
            there, here = record[name], getattr(self.cfg, name)
            if there != here:
                return f"{name} is {there} in the checkpoint, {here} in the configuration"
        self.since, self.updates = record["since"], record["updates"]
        return ""

    def begin(self, step: int, weights: list[Tensor]) -> None:
        if self.since is None and step >= self.cfg.start_step:
            self.since = step
            self._copy_to(0, weights)

    @torch.no_grad()
    def update(self, step: int, weights: list[Tensor]) -> None:
        if self.since is None:
            self.begin(step, weights)
            return
        steps = step - self.since
        if steps % self.cfg.every_steps:
            return
        self.updates += 1
        if self.cfg.kind == "lawa":
            self._copy_to((self.updates - 1) % self.cfg.copies, weights)
        else:
            share = self.cfg.share(self.updates, steps)
            _lerp_(_locals(self.slots[0]), weights, share)

    @torch.no_grad()
    def _copy_to(self, slot: int, weights: list[Tensor]) -> None:
        _copy_(_locals(self.slots[slot]), weights)

    def value(self) -> Iterator[Tensor]:
        """The average, parameter by parameter; this rank's shards."""
        for pieces in zip(*map(_locals, self.slots[: self.held]), strict=True):
            yield mean_of(pieces)


def _local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _locals(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [_local(tensor) for tensor in tensors]
