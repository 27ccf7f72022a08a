"""Matrix products of the blocks in float8, by torchao: inputs, weights and gradients are rounded.

tensorwise   one scale per tensor: the fastest
rowwise      one scale per row or column: closer to bf16, somewhat slower

Weights, gradients and the optimizer stay as they are (fp32 masters); scales are those of the tensor
at hand ("dynamic"). Head and embedding are left out: their loss of precision shows first.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from openlm_lite.errors import InputError
from openlm_lite.parameter_names import plain_name

Float8 = Literal["none", "tensorwise", "rowwise"]

MULTIPLE = 16
"""what the kernels take: sizes of layers, and the tokens that a weight's gradient sums over"""
_LEAST_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}


def check_float8(recipe: Float8, device: str) -> None:
    """Raises InputError where the hardware or the library is not there.

    `device`: run.device; auto is what it would take.
    """
    if recipe == "none":
        return
    remedy = "set parallel.float8=none (parallel.precision=bf16 runs everywhere)"
    if device == "cpu" or not torch.cuda.is_available():
        raise InputError(f"parallel.float8 = {recipe} needs a GPU, this run is on a CPU; {remedy}")
    found, least = torch.cuda.get_device_capability(), _LEAST_CAPABILITY[recipe]
    if found < least:
        raise InputError(
            f"parallel.float8 = {recipe} needs compute capability {least[0]}.{least[1]} (H100, "
            f"H200, B200{', L40S' if least == (8, 9) else ''}); {torch.cuda.get_device_name()} has "
            f"{found[0]}.{found[1]}; {remedy}"
        )
    _torchao()


def to_float8(blocks: nn.ModuleList, recipe: Float8, emulate: bool = False) -> list[str]:
    """Exchange the linear layers of the blocks; returns the names of those that were left.

    A layer is left whose sizes, or those of this rank's piece of it under tensor parallelism, are
    no multiples of 16. `emulate` computes in fp32 what the kernels would: for machines without
    them. Hooks of the layers stay (tensor parallelism has some).
    """
    if recipe == "none":
        return []
    library = _torchao()
    config = library.config.Float8LinearConfig.from_recipe_name(recipe)
    if emulate:
        object.__setattr__(config, "emulate", True)  # no recipe has it, and the class is frozen
    left = []
    for name, linear in list(blocks.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        weight = linear.weight
        piece = weight.to_local() if isinstance(weight, DTensor) else weight
        if any(size % MULTIPLE for size in piece.shape):
            left.append(plain_name(name))
            continue
        parent, _, last = name.rpartition(".")
        new = library.float8_linear.Float8Linear.from_float(linear, config)
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):
            getattr(new, hooks).update(getattr(linear, hooks))
            with_kwargs = f"{hooks}_with_kwargs"
            getattr(new, with_kwargs).update(getattr(linear, with_kwargs))
        setattr(blocks.get_submodule(parent), last, new)
    return left


def _torchao() -> Any:
    try:
        import torchao.float8.config
        import torchao.float8.float8_linear
    except ImportError as e:
        raise InputError(
            'parallel.float8 needs torchao: pip install "openlm-lite[float8]", or set '
            f"parallel.float8=none ({e})"
        ) from None
    return torchao.float8
