"""What a run needs of each GPU's memory, before it starts; what to change where it is too much.

The sum of the parts below, without the allocator's own overhead: a GPU is taken to fit a run that
needs at most nine tenths of it. docs/scale.md has the formulas and what they were compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from openlm_lite.errors import InputError
from openlm_lite.layout import Sizes
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.loss import LOGITS_ON_GPU
from openlm_lite.parallel import ParallelConfig

GPU_GIB = {"A100-40": 39.4, "A100-80": 79.2, "H100": 79.1, "H200": 139.8, "B200": 178.3}
"""of the SXM modules, as torch sees it: what the data sheets call 40, 80, 80, 141 and 180 GB"""
_USABLE = 0.9  # the rest: CUDA's context, NCCL's buffers, fragments


@dataclass(frozen=True)
class Need:
    """What decides on the memory of one GPU."""

    model: ModelConfig
    parallel: ParallelConfig
    sizes: Sizes
    seq_len: int
    micro_batch: int
    """rows of one forward pass"""
    accumulates: bool
    """whether a step has several forward passes"""
    muon: bool
    copies: int
    """of the weights, kept by averages"""


class Parts(NamedTuple):
    """Bytes of one GPU."""

    states: int
    gathered: int
    accumulated: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(self)


def parts_of(need: Need) -> Parts:
    """The estimate. b: bytes of a number in the precision of the computation."""
    model, parallel, sizes = need.model, need.parallel, need.sizes
    b = 4 if parallel.precision == "fp32" else 2
    pieces = sizes.shards * sizes.tp
    matrices = model.n_block_matrix_params
    tables = model.n_params - matrices

    # fp32 weight, gradient, two moments of Adam (Muon has one); 4 bytes for each averaged copy
    on_muon = matrices if need.muon else 0
    states = ((16 + 4 * need.copies) * model.n_params - 4 * on_muon) // pieces

    # Weights as they are used, and their gradients: of the block at work and the next, and of all
    # other parameters.
    block = matrices // model.n_layers // sizes.tp
    held = min(model.n_layers, max(2, 1 + parallel.prefetch_blocks))
    kept = parallel.reshard_after_forward
    if kept is False:
        whole = float(model.n_layers)
    elif kept is True:
        whole = float(held)
    else:
        whole = held + (model.n_layers - held) / kept
    gathered = int(b * (whole * block + tables) + b * (2 * block + tables))

    # Gradients that wait for the last forward pass of a step are whole, in the dtype of their sum.
    has_fsdp = sizes.addends * sizes.tp > 1 or parallel.precision != "fp32"
    waits = need.accumulates and has_fsdp and not parallel.reduce_every_micro_batch
    each = 4 if "fp32" in (parallel.precision, parallel.reduce_dtype) else 2
    accumulated = each * (matrices // sizes.tp + tables) if waits else 0

    tokens = need.micro_batch * need.seq_len // sizes.cp
    widths = _widths(model, sizes)
    how, layers = parallel.recomputation, model.n_layers
    if how == "none":
        per_token = layers * widths.all
    else:  # of each block its input and what is kept; of one block all
        budget = parallel.activation_budget
        saved = widths.products * budget + (widths.attention if budget > 0 else 0)
        per_token = layers * (widths.input + (saved if how == "selective" else 0)) + widths.all
    activations = int(b * tokens * per_token)

    # A chunk's logits and the gradient of the head, in fp32. In bf16 first the logits have a copy
    # beside them, then what is added to the gradient.
    logits = min(tokens // sizes.tp * model.vocab_size, LOGITS_ON_GPU)
    head = model.vocab_size * model.d_model
    loss = 4 * (logits + head) if b == 4 else max(6 * logits + 4 * head, 2 * logits + 6 * head)
    return Parts(states, gathered, accumulated, activations, loss)


def kept_per_token(model: ModelConfig) -> int:
    """Numbers that a block keeps for its backward pass, without recomputation and on one rank.

    Not counted: norms' statistics, and the scores of attention where no flash kernel runs (ALiBi).
    """
    # of width D: the input and the output of each norm; parallel halves share what they can
    read = {"parallel": 3, "parallel_shared_norm": 2}.get(model.block, 4) * model.d_model
    # queries, keys and values as attention takes them, and its output; what qk_norm takes
    heads = 2 * model.q_width + 2 * model.kv_width
    if model.qk_norm != "none":
        heads += model.q_width + model.kv_width
    # gate, up and their product, beside GELU what it puts out; without a gate up and its GELU
    inner = (3 if model.activation == "swiglu" else 4) if model.is_gated else 2
    return read + heads + inner * model.d_ff


class _Widths(NamedTuple):
    """Numbers that a block keeps per token of a tp group, on each of its ranks."""

    all: float
    input: float
    products: float
    attention: float


def _widths(model: ModelConfig, sizes: Sizes) -> _Widths:
    tp, cp = sizes.tp, sizes.cp
    d, q, kv, f = model.d_model, model.q_width, model.kv_width, model.d_ff
    everything = kept_per_token(model) / tp
    everything += 2 * d * (1 - 1 / tp)  # what tp gathers in front of both halves of the block
    everything += 2 * kv * (cp - 1) / tp  # the keys and values of the rest of the row
    products = (2 * d + q + 2 * kv + (2 if model.is_gated else 1) * f) / tp
    return _Widths(everything, d / tp, products, q / tp)


def fitting(total: int) -> list[str]:
    """The GPUs that a run of `total` bytes fits."""
    return [name for name in GPU_GIB if total <= usable(name)]


def usable(gpu: str) -> int:
    """Bytes of a GPU that a run may count on. Raises InputError for an unknown name."""
    if gpu not in GPU_GIB:
        raise InputError(f"--gpu {gpu}: no such GPU here; there are {', '.join(GPU_GIB)}")
    return int(_USABLE * GPU_GIB[gpu] * 2**30)


def remedies(need: Need, gpu: str) -> list[str]:
    """What makes a run fit a GPU that it does not fit, the cheapest in speed first.

    Each is a text with the estimate that it leads to; empty where nothing that is tried helps.
    """
    limit, found = usable(gpu), []
    for text, changed in _changes(need):
        total = parts_of(changed).total
        if total <= limit:
            found.append(f"{text}: {total / 2**30:.1f} GiB")
            if len(found) == 4:
                break
    return found


def _changes(need: Need) -> Iterator[tuple[str, Need]]:
    """What may be changed, alone or together."""
    saving = {
        "": need,
        "parallel.activation_checkpointing=selective": _with(
            need, activation_checkpointing="selective"
        ),
        "parallel.reduce_every_micro_batch=true": _with(need, reduce_every_micro_batch=True),
        "parallel.activation_checkpointing=full": _with(need, activation_checkpointing="full"),
        "parallel.activation_checkpointing=full parallel.reduce_every_micro_batch=true": _with(
            need, activation_checkpointing="full", reduce_every_micro_batch=True
        ),
    }
    rows = need.micro_batch
    smaller = [n for n in (rows // 2, rows // 4, 1) if 1 <= n < rows and rows % n == 0]
    for text, changed in saving.items():
        if text:
            yield text, changed
        for n in dict.fromkeys(smaller):
            yield f"{text} micro_batch_size={n}".strip(), replace(changed, micro_batch=n)
    sizes, best = need.sizes, saving["parallel.activation_checkpointing=full"]
    best = replace(_with(best, reduce_every_micro_batch=True), micro_batch=1)
    for factor in (2, 4, 8, 16, 32, 64):
        more = sizes._replace(dp_shard=sizes.dp_shard * factor)
        gpus = more.data_ranks * more.ranks_per_row
        yield f"{gpus} GPUs", replace(need, sizes=more)
        yield (
            f"{gpus} GPUs, parallel.activation_checkpointing=full micro_batch_size=1",
            replace(best, sizes=more),
        )


def _with(need: Need, **fields: object) -> Need:
    return replace(need, parallel=replace(need.parallel, **fields))  # pyright: ignore[reportArgumentType]
