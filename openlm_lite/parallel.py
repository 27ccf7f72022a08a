"""What is done to a model so that it trains on many devices. The model knows nothing of it.

The order matters: activation checkpointing wraps a block first, so that `torch.compile` sees the
recomputation; compile comes before FSDP, so that the hooks of FSDP stay outside the graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid out and computed. Master weights and optimizer state are fp32."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """of weights and activations in forward and backward"""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """in which the ranks add up their gradients"""
    activation_checkpointing: bool = False
    """keep one tensor per block and recompute the rest in the backward pass"""
    compile: bool = False
    """torch.compile every block"""
    reshard_after_forward: bool = True
    """FSDP frees a block's gathered weights after its forward (less memory, one more gather)"""


def build_sharded_model(
    cfg: ModelConfig,
    mesh: DeviceMesh,
    parallel: ParallelConfig,
    device: torch.device,
    seed: int,
    mup_base_width: int | None = None,
) -> Transformer:
    """The initialised model, sharded over `mesh`; no rank ever holds all of it.

    The weights do not depend on the number of ranks. `mup_base_width`: see `init_std`.
    """
    with torch.device("meta"):
        model = Transformer(cfg)
    parallelize(model, mesh, parallel)
    model.to_empty(device=device)
    init_weights(model, seed, mup_base_width)
    return model


def parallelize(model: Transformer, mesh: DeviceMesh, cfg: ParallelConfig) -> None:
    """Activation checkpointing, compile, FSDP2, in place."""
    for i, block in enumerate(model.layers):
        if cfg.activation_checkpointing:
            block = checkpoint_wrapper(block)
            model.layers[i] = block
        if cfg.compile:
            block.compile()
    if mesh.size() == 1 and cfg.precision == "fp32":
        return  # nothing to shard, nothing to cast: FSDP would only copy (10 % of a step on a CPU)
    policy = MixedPrecisionPolicy(
        param_dtype=_DTYPES[cfg.precision],
        reduce_dtype=_DTYPES[cfg.reduce_dtype],
        # A block's inputs are the residual stream, in param_dtype since the embedding, and the
        # rotary tables, which have to stay fp32.
        cast_forward_inputs=False,
    )
    for block in model.layers:
        fully_shard(
            block, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard_after_forward
        )
    fully_shard(model, mesh=mesh, mp_policy=policy)


def set_gradient_sync(model: Transformer, sync: bool) -> None:
    """Off for all but the last micro-batch of a step: gradients then add up locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
