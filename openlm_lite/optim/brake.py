"""A non-finite step that never reaches the weights, without asking the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer


class Brake:
    """Holds fused AdamW still on the device from the first non-finite number on, for good.

    AdamW's fused kernel looks at a flag on the device before it touches anything (torch's
    GradScaler uses it). So the host may go on to the next step, and learn later that the run is
    to end: weights, moments and step counts are still those before the bad batch.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        assert self.holds(optimizers)
        self.pulled = torch.zeros((), device=device)  # 1.0: nothing steps any more
        for optimizer in optimizers:
            optimizer.found_inf = self.pulled  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def holds(optimizers: Sequence[Optimizer]) -> bool:
        """Whether all of them look at the flag. Muon does not."""
        return all(
            isinstance(optimizer, AdamW) and optimizer.defaults["fused"] for optimizer in optimizers
        )

    def look(self, numbers_N: Tensor) -> None:
        """Before the optimizers step: numbers of this step that are the same on every rank."""
        bad = numbers_N.isfinite().all().logical_not()
        self.pulled.copy_(torch.maximum(self.pulled, bad.to(self.pulled.dtype)))
