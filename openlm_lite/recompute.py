"""Activation checkpointing: what a block keeps for the backward pass, and what it computes again.

    none        everything is kept
    full        the block's input is kept; its forward pass runs twice
    selective   the input, what attention put out, and a part of what the products of matrices put
                out: `activation_budget`, in bytes. The rest (norms, rotary embedding, activation
                functions, what the budget leaves out) is computed again

A product of matrices costs about 2 D operations for each number that it puts out, a norm a handful;
attention costs 2 T. So with a budget of 1 next to nothing is computed twice, and with SwiGLU about
half of the memory is kept; each part of the budget less costs as much of a forward pass.

Attention is known by the operators of `scaled_dot_product_attention`. What another kernel put out
(flash_attn, xformers, flex, blocks) is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recomputation = Literal["none", "full", "selective"]

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten._scaled_mm.default)
_ATTENTION = (
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def recomputed(block: nn.Module, how: Recomputation, budget: float) -> nn.Module:
    """The block, or a wrapper around it that keeps less of its forward pass."""
    if how == "none":
        return block
    if how == "full":
        return checkpoint_wrapper(block)
    return checkpoint_wrapper(
        block, context_fn=lambda: create_selective_checkpoint_contexts(_policy(budget))
    )


def _policy(budget: float) -> Callable[..., CheckpointPolicy]:
    """For one forward pass of a block, and its recomputation: both ask in the same order.

    Products are kept as long as what is kept is at most `budget` of what there was so far: of a
    half, every other one, if they are equal. Names of layers, and their order, do not enter.
    """
    seen = {False: 0, True: 0}  # numbers put out so far; by whether this is the recomputation
    kept = {False: 0, True: 0}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _ATTENTION and budget > 0:
            return CheckpointPolicy.MUST_SAVE
        if op not in _PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        left, right = args[1:3] if op is _aten.addmm.default else args[:2]
        size, again = left.shape[0] * right.shape[1], ctx.is_recompute
        seen[again] += size
        if kept[again] + size > budget * seen[again]:
            return CheckpointPolicy.PREFER_RECOMPUTE
        kept[again] += size
        return CheckpointPolicy.MUST_SAVE

    return policy
