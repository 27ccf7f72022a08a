"""The optimizers over sharded parameters: which parameter has which, at what rate; clipping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from openlm_lite.errors import InputError
from openlm_lite.optim.groups import GroupConfig, rules_of
from openlm_lite.optim.muon import Muon
from openlm_lite.optim.mup import lr_factor
from openlm_lite.parameter_names import plain_name


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101): each step also takes lr * weight_decay * w off the weights w.

    With `muon`, the matrices of the blocks have Muon instead; embeddings, head, gains and biases
    keep AdamW. One `lr` serves both: Muon's updates are as large as AdamW's.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-3
    """the peak; the schedule says how it is reached and left"""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_lr_scale: float = 1.0
    """times `lr`, for the matrices that have Muon"""
    weight_decay: float = 0.1
    decay: Literal["matrices", "all"] = "matrices"
    """`matrices`: not norms, biases and embeddings; `all`: every parameter (OpenLM, DCLM)"""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """rules for other rates and decay, by name; the last that fits decides"""
    mup_base_width: int | None = None
    """the d_model that `lr` was found at: µP carries it over to this model's; null: standard"""
    grad_clip: float = 1.0
    """largest L2 norm of the whole gradient; 0 leaves it as it is"""

    def __post_init__(self) -> None:
        problems = []
        for name in ("lr", "muon_lr_scale"):
            if getattr(self, name) <= 0:
                problems.append(f"{name} = {getattr(self, name)}, must be positive")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} = {getattr(self, name)}, must be in [0, 1)")
        for name in ("eps", "weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                problems.append(f"{name} = {getattr(self, name)}, must not be negative")
        if self.name != "muon" and self.muon_lr_scale != 1.0:
            problems.append(f"muon_lr_scale = {self.muon_lr_scale} needs name = muon")
        if self.mup_base_width is not None and self.mup_base_width < 1:
            problems.append(f"mup_base_width = {self.mup_base_width}, must be at least 1")
        if problems:
            raise InputError("optim: " + "; ".join(problems))


class Treatment(NamedTuple):
    """How a parameter is trained."""

    muon: bool
    lr_scale: float
    """times the learning rate of the step"""
    weight_decay: float


def treatments(
    shapes: Iterable[tuple[str, int]], cfg: OptimConfig, width: int
) -> dict[str, Treatment]:
    """Parameter name -> its treatment, from (name, number of dimensions); `width` is d_model.

    Raises InputError for a rule of `cfg.groups` that decides on nothing.
    """
    shapes = list(shapes)
    rules = rules_of((name for name, _ in shapes), cfg.groups)
    found = {}
    for name, ndim in shapes:
        muon = cfg.name == "muon" and ndim == 2 and name.startswith("layers.")
        is_matrix = ndim >= 2 and "embedding" not in name
        lr_scale = cfg.muon_lr_scale if muon else 1.0
        weight_decay = cfg.weight_decay if is_matrix or cfg.decay == "all" else 0.0
        if (rule := rules.get(name)) is not None:
            lr_scale *= rule.lr_scale
            weight_decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        if cfg.mup_base_width is not None:
            factor = lr_factor(name, ndim, width=width, base_width=cfg.mup_base_width, muon=muon)
            lr_scale, weight_decay = lr_scale * factor, weight_decay / factor
        found[name] = Treatment(muon, lr_scale, weight_decay)
    return found


def build_optimizer(model: nn.Module, cfg: OptimConfig, width: int = 0) -> tuple[Optimizer, ...]:
    """AdamW, and Muon where `cfg` asks for it; one group for each treatment.

    `width` is the model's d_model, which only µP asks for. A learning rate is a float that the
    loop sets each step (`set_lr`).
    """
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    found = treatments(((name, p.ndim) for name, p in parameters.items()), cfg, width)
    # one kernel steps all parameters of a group: they have to lie on one mesh
    groups: dict[tuple[Treatment, DeviceMesh | None], dict[str, Any]] = {}
    for name, treatment in found.items():
        _, lr_scale, weight_decay = treatment
        fresh = {"params": [], "lr_scale": lr_scale, "weight_decay": weight_decay}
        key = treatment, _mesh_of(parameters[name])
        groups.setdefault(key, fresh)["params"].append(parameters[name])
    on_adamw = [group for (treatment, _), group in groups.items() if not treatment.muon]
    on_muon = [group for (treatment, _), group in groups.items() if treatment.muon]
    optimizers: list[Optimizer] = []
    if on_adamw:
        betas = (cfg.beta1, cfg.beta2)
        optimizers.append(AdamW(on_adamw, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True))
    if on_muon:
        optimizers.append(Muon(on_muon, lr=cfg.lr, momentum=cfg.muon_momentum))
    set_lr(optimizers, cfg.lr)
    return tuple(optimizers)


def set_lr(optimizers: Iterable[Optimizer], lr: float) -> None:
    """The learning rate of the coming step, for every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


_CLIP_EPS = 1e-6
"""of `clip_grads_with_norm_`: the gradient is multiplied by max_norm / (norm + eps), if below 1"""


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """L2 norm of the whole gradient over all ranks (fp32 scalar); scales it down to `max_norm`.

    Parameters may lie on several meshes. A non-finite norm is returned as it is: the caller must
    then not step.
    """
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.grad is not None:
            by_mesh.setdefault(_mesh_of(p), []).append(p)
    norms = []
    for parameters in by_mesh.values():
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # the sum over the shards: a collective, on every rank
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    # A factor of 1 need not be multiplied by; only a CPU knows of it without a wait.
    has_factor_1 = total.device.type == "cpu" and bool(total + _CLIP_EPS <= max_norm)
    if max_norm > 0 and not has_factor_1:
        for parameters in by_mesh.values():
            nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total.float()


def _mesh_of(parameter: Tensor) -> DeviceMesh | None:
    """The ranks that have parts of it; None where this one has it all."""
    return parameter.device_mesh if isinstance(parameter, DTensor) else None
