"""AdamW over sharded parameters, with decay groups; gradient clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openlm_lite.errors import InputError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101): each step also takes lr * weight_decay * w off the weights w."""

    lr: float = 3e-3
    """the peak; the schedule says how it is reached and left"""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["matrices", "all"] = "matrices"
    """`matrices`: not norms, biases and embeddings; `all`: every parameter (OpenLM, DCLM)"""
    grad_clip: float = 1.0
    """largest L2 norm of the whole gradient; 0 leaves it as it is"""

    def __post_init__(self) -> None:
        problems = []
        if self.lr <= 0:
            problems.append(f"lr = {self.lr}, must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} = {getattr(self, name)}, must be in [0, 1)")
        for name in ("eps", "weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                problems.append(f"{name} = {getattr(self, name)}, must not be negative")
        if problems:
            raise InputError("optim: " + "; ".join(problems))


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW with a decayed group and, where anything is exempt, one without decay.

    The learning rate is a tensor-free float that the loop sets each step.
    """
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "embedding" not in name
        (decayed if matrix or cfg.decay == "all" else exempt).append(parameter)
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}]
    if exempt:
        groups.append({"params": exempt, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the coming step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """L2 norm of the whole gradient over all ranks (fp32 scalar); scales it down to `max_norm`.

    A non-finite norm is returned as it is: the caller must then not step.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # the sum over the shards: a collective, on every rank
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.float()
