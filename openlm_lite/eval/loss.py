"""Validation loss: mean cross entropy per target token of held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from openlm_lite.data.stream import Batch
from openlm_lite.errors import InputError
from openlm_lite.eval.during import TaskEvalConfig
from openlm_lite.eval.samples import SampleConfig
from openlm_lite.model.transformer import Transformer


@dataclass(frozen=True)
class EvalConfig:
    """When the validation sources are read, and how much of each."""

    every_steps: int = 1000
    """also before the first and after the last step; 0: only those two"""
    tokens: int = 1_000_000
    """of each source, from its start"""
    tasks: TaskEvalConfig = field(default_factory=TaskEvalConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.tokens < 1:
            raise InputError("eval: every_steps must not be negative, tokens must be positive")


@torch.no_grad()
def validation_loss(model: Transformer, batches: Iterable[Batch], device: torch.device) -> float:
    """Nats per target token over the batches of all ranks; every rank gets the same value.

    Each token counts once: batches with fewer targets weigh less.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        documents = None if batch.doc_ids_BT is None else batch.doc_ids_BT.to(device)
        loss = model(batch.tokens_BT.to(device), batch.targets_BT.to(device), doc_ids_BT=documents)
        sums += torch.stack((loss.ce.double(), loss.n_targets.double()))
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()
