"""What is done to a model so that it trains on many devices. The model knows nothing of it.

The order is fixed, from the inside out, and each step has a reason to be where it is:

1. tensor parallelism, on the bare layers: it cuts their parameters and hangs hooks on them
2. activation checkpointing wraps a block: what it computes again includes 1's gathers
3. float8 exchanges linear layers, wrapped or not, and takes over their hooks and cut parameters
4. torch.compile traces a block with all of that inside: recomputation and casts are fused
5. FSDP2 last and outside: it owns the parameters as they are by then, and its hooks, which wait for
   other ranks, stay out of the graphs

Context parallelism exchanges one function in each attention, and has no place in that order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from openlm_lite.context_parallel import cut_rows, positions_of
from openlm_lite.errors import InputError
from openlm_lite.float8 import MULTIPLE, Float8, to_float8
from openlm_lite.layout import Layout, LayoutConfig, Sizes
from openlm_lite.log import logger
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer
from openlm_lite.recompute import Recomputation, recomputed
from openlm_lite.tensor_parallel import cut_matrices

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ParallelConfig(LayoutConfig):
    """How the model is laid out and computed. Master weights and optimizer state are fp32."""

    precision: Precision = "bf16"
    """of weights and activations in forward and backward"""
    float8: Float8 = "none"
    """of the products in the blocks, with bf16 around them; needs torchao and an H100 or newer"""
    reduce_dtype: Precision = "fp32"
    """in which the ranks add up their gradients"""
    reduce_every_micro_batch: bool = False
    """add gradients up over the ranks after each micro-batch, not once in a step: no rank then
    holds whole gradients, at the price of more talk"""
    activation_checkpointing: bool | Recomputation = "none"
    """what a block computes again in the backward pass, instead of keeping it; true is full"""
    activation_budget: float = 0.5
    """of `selective`: the part of the products' results that is kept, in bytes"""
    compile: bool = False
    """torch.compile every block"""
    reshard_after_forward: bool | int = True
    """FSDP frees a block's gathered weights after its forward (less memory, one more gather); a
    number: down to shards over so many neighbours, those of a node"""
    prefetch_blocks: int = 0
    """so many blocks ahead, weights are gathered; 0: FSDP's own order, the next one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        found = []
        if not 0 <= self.activation_budget <= 1:
            found.append(f"activation_budget = {self.activation_budget}, must be from 0 to 1")
        if self.prefetch_blocks < 0:
            found.append(f"prefetch_blocks = {self.prefetch_blocks}, must not be negative")
        if not isinstance(self.reshard_after_forward, bool) and self.reshard_after_forward < 2:
            found.append(
                f"reshard_after_forward = {self.reshard_after_forward}, must be true, false or a "
                "number of ranks from 2 on"
            )
        if self.float8 != "none" and self.precision != "bf16":
            found.append(
                f"float8 = {self.float8} needs precision = bf16, for everything but the products"
            )
        if found:
            raise InputError("parallel: " + "; ".join(found))

    @property
    def recomputation(self) -> Recomputation:
        """`activation_checkpointing`, by name."""
        how = self.activation_checkpointing
        if isinstance(how, bool):
            return "full" if how else "none"
        return how


def problems(
    cfg: ParallelConfig, model: ModelConfig, seq_len: int, optimizer: str, documents: bool
) -> Iterator[str]:
    """What the layout cannot do with this run, one sentence each, whatever the number of ranks.

    optimizer: optim.name; documents: whether data.document_masking is on.
    """
    tp, cp = cfg.tp, cfg.cp
    sizes = {"n_heads": model.n_heads, "n_kv_heads": model.n_kv_heads, "d_ff": model.d_ff}
    odd = [f"model.{name} = {size}" for name, size in sizes.items() if size % tp]
    if odd:
        fitting = [n for n in range(1, tp) if not any(size % n for size in sizes.values())]
        yield (
            f"parallel.tp = {tp} does not divide {' and '.join(odd)}; the next smaller that does "
            f"is {fitting[-1]}"
        )
    pieces = tp * (2 * cp if cp > 1 else 1)
    if seq_len % pieces:
        what = f"2 x cp {cp} x tp {tp}" if cp > 1 else f"tp {tp}"
        yield (
            f"data.seq_len = {seq_len} does not divide among parallel: {what} = {pieces} pieces; "
            f"the nearest is {max(1, round(seq_len / pieces)) * pieces}"
        )
    if cfg.float8 != "none" and seq_len % (MULTIPLE * cp):
        near = max(1, round(seq_len / (MULTIPLE * cp))) * MULTIPLE * cp
        yield (
            f"data.seq_len = {seq_len}: the products of parallel.float8 = {cfg.float8} take "
            f"multiples of {MULTIPLE} tokens from each of parallel.cp = {cp} ranks; the nearest is "
            f"{near}"
        )
    if (tp > 1 or cp > 1) and model.positions == "alibi":
        yield (
            "model.positions = alibi, whose slopes differ by head, cannot be laid out with "
            f"parallel.tp = {tp}, parallel.cp = {cp}: set both to 1 (dp_replicate and dp_shard may "
            "be anything)"
        )
    if cp > 1 and documents:
        yield (
            f"data.document_masking does not go with parallel.cp = {cp}: set parallel.cp = 1 (tp "
            "and dp may be anything), or leave the documents of a row unmasked"
        )
    if tp > 1 and not isinstance(cfg.reshard_after_forward, bool):
        yield (
            f"parallel.reshard_after_forward = {cfg.reshard_after_forward}: FSDP2 keeps no matrix "
            f"that parallel.tp = {tp} has cut in shards over a part of the ranks; set it to true "
            "or false, or parallel.tp = 1"
        )
    if tp > 1 and optimizer == "muon":
        yield (
            f"optim.name = muon takes matrices whole or by rows, parallel.tp = {tp} cuts them both "
            "ways: set parallel.tp = 1 (dp_replicate, dp_shard and cp may be anything), or "
            "optim.name = adamw"
        )


def check_reshard(cfg: ParallelConfig, sizes: Sizes) -> None:
    """Raises InputError where reshard_after_forward names a number that the shards do not have."""
    n = cfg.reshard_after_forward
    if isinstance(n, bool) or (n < sizes.shards and sizes.shards % n == 0):
        return
    raise InputError(
        f"parallel.reshard_after_forward = {n}: must be less than the {sizes.shards} shards "
        "(dp_shard x cp) and divide them, or true (all of them)"
    )


def build_sharded_model(
    cfg: ModelConfig,
    layout: Layout,
    parallel: ParallelConfig,
    device: torch.device,
    seed: int,
    mup_base_width: int | None = None,
) -> Transformer:
    """The initialised model, laid out over the ranks; no rank ever holds all of it.

    The weights do not depend on the number of ranks. `mup_base_width`: see `init_std`.
    """
    with torch.device("meta"):
        model = Transformer(cfg)
    parallelize(model, layout, parallel)
    model.to_empty(device=device)
    init_weights(model, seed, mup_base_width)
    return model


def parallelize(model: Transformer, layout: Layout, cfg: ParallelConfig) -> None:
    """All of it, in place, in the order of this module's text."""
    if layout.cp is not None:
        cut_rows(model, layout.cp)
    if layout.tp is not None:
        cut_matrices(model, layout.tp)
    if layout.sizes.ranks_per_row > 1:
        take_part_of_rows(model, layout)
    for i, block in enumerate(model.layers):
        model.layers[i] = recomputed(block, cfg.recomputation, cfg.activation_budget)
    left = to_float8(model.layers, cfg.float8)
    if left and layout.rank == 0:
        names = dict.fromkeys(name.partition(".")[2] for name in left)  # all blocks are alike
        logger.info(
            "parallel.float8: %s of each block stay in bf16: 16 does not divide their sizes%s",
            ", ".join(names),
            "" if layout.tp is None else " on a rank",
        )
    if cfg.compile:
        if layout.tables.device_type == "cpu":
            # A norm's or an activation function's output that a product needs again is computed
            # again: they are a third of what a block would keep. Never measured on a GPU.
            torch._functorch.config.ban_recompute_materialized_backward = False
        for block in model.layers:
            block.compile()
    if layout.tables.size() > 1 or cfg.precision != "fp32":
        shard(model, layout, cfg)
    # else there is nothing to shard and nothing to cast: FSDP would only copy (10 % of a step)


def take_part_of_rows(model: Transformer, layout: Layout) -> None:
    """Let the model take whole rows, and compute the tokens that are this rank's.

    A cp group cuts each row (`context_parallel.positions_of`), a tp group each part of it once
    more, into neighbours. Rotary embedding is over what a tp group has together.
    """
    sizes = layout.sizes
    cp_rank = 0 if layout.cp is None else layout.cp.get_local_rank()
    tp_rank = 0 if layout.tp is None else layout.tp.get_local_rank()

    def take_part(
        module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        if len(args) < 2:
            raise InputError(
                f"parallel.tp = {sizes.tp}, parallel.cp = {sizes.cp}: each rank has a part of a "
                "row, and gives its loss; for logits, load a checkpoint without tp and cp"
            )
        T, device = args[0].shape[1], args[0].device
        positions_T = torch.arange(T, device=device)
        if sizes.cp > 1:
            positions_T = positions_of(T, sizes.cp, cp_rank, device)
        own = positions_T.chunk(sizes.tp)[tp_rank]
        return tuple(ids_BT[:, own] for ids_BT in args), kwargs | {"positions_T": positions_T}

    model.register_forward_pre_hook(take_part, with_kwargs=True)


def shard(model: Transformer, layout: Layout, cfg: ParallelConfig) -> None:
    """FSDP2, or HSDP where there are copies: one unit for each block, one for all the rest."""
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[cfg.precision],
        reduce_dtype=DTYPES[cfg.reduce_dtype],
        # A block's inputs are the residual stream, in param_dtype since the embedding, and the
        # rotary tables, which have to stay fp32.
        cast_forward_inputs=False,
    )
    sharded: Any = model  # fully_shard adds methods to it
    blocks: list[Any] = list(model.layers)
    for block in blocks:
        # the last block's weights are the first that the backward pass asks for; the number, where
        # reshard_after_forward is one, has to come last in this `and`
        reshard = block is not blocks[-1] and cfg.reshard_after_forward
        fully_shard(block, mesh=layout.blocks, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=layout.tables, mp_policy=policy)
    if layout.tp is not None:  # the tables' mean over all ranks would be over the tp groups too
        sharded.set_gradient_divide_factor(float(layout.sizes.addends))
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor inside
    if cfg.prefetch_blocks:
        ahead = cfg.prefetch_blocks
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + ahead])
            block.set_modules_to_backward_prefetch(blocks[max(0, i - ahead) : i][::-1])


def set_gradient_sync(model: Transformer, sync: bool) -> None:
    """Off for all but the last micro-batch of a step: gradients then add up locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
