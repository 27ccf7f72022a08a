"""How long a step takes, from operations, bytes and the speed of links: to plan, not to promise.

    step = forward passes x max(work of the GPU, FSDP's talk behind it)
           + talk that waits for nothing to hide it (tp, cp, first gather, last sum) + optimizer

    work of the GPU       products and attention at their shares of the peak, and what moves
                          through memory
    a gather, a sum       latency of the ring's hops + bytes / bus bandwidth

The constants are `Machine`'s. docs/scale.md says where each is from, and compares the estimates
with what others published; `benchmarks/step_cost.py` prints both tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from openlm_lite.float8 import Float8
from openlm_lite.layout import Sizes
from openlm_lite.model.config import ModelConfig
from openlm_lite.recompute import Recomputation


@dataclass(frozen=True)
class Machine:
    """GPUs, eight to a node, and what of their data sheet a training step gets."""

    flops: float = 989e12
    """bf16 products of an H100 SXM, dense"""
    memory: float = 3.35e12
    """bytes/s of its HBM3"""
    nvlink: float = 450e9
    """bytes/s of a GPU to the others of its node, in each direction"""
    network: float = 50e9
    """bytes/s of a GPU to other nodes: 400 Gb/s each"""
    gpus_per_node: int = 8

    of_flops: float = 0.60
    """of the peak, that large products reach in a step"""
    of_flops_attention: float = 0.30
    """flash attention, forward and backward, causal: only the half that is computed is counted"""
    of_memory: float = 0.8
    of_links: float = 0.8
    passes: float = 8.0
    """times that each number that a block puts out moves through memory, forward and backward
    together, besides what the products themselves read and write"""
    float8_gain: float = 1.5
    """rate of products in float8 over bf16, casts included"""
    hop_in_node: float = 3.4e-6
    hop_between: float = 14e-6
    """s per hop of a ring: NCCL's own table (tuning.cc, ring, simple protocol)"""
    start: float = 8.4e-6
    """s to begin a collective, from the same table"""


MACHINES = {
    "A100-40": Machine(312e12, 1.555e12, 300e9, 25e9),
    "A100-80": Machine(312e12, 2.04e12, 300e9, 25e9),
    "H100": Machine(),
    "H200": Machine(memory=4.8e12),
    "B200": Machine(2250e12, 8e12, 900e9, 50e9),
}
"""by the data sheets of the SXM modules; only H100's estimates were compared with measurements"""


class Step(NamedTuple):
    """Seconds of one optimizer step, and what they make."""

    compute: float
    """work of the GPU in all forward and backward passes"""
    fsdp: float
    """talk of FSDP in them, most of it hidden behind the work"""
    exposed: float
    """of that, what the work does not hide"""
    tensor: float
    """tensor parallelism's, which hides behind nothing"""
    context: float
    optimizer: float
    tokens_per_second_per_gpu: float
    mfu: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.tensor + self.context + self.optimizer


@dataclass(frozen=True)
class Plan:
    """A training step to be estimated."""

    model: ModelConfig
    sizes: Sizes
    seq_len: int
    micro_batch: int
    """rows of one forward pass"""
    micro_batches: int = 1
    recomputation: Recomputation = "none"
    float8: Float8 = "none"
    reduce_bytes: int = 4
    """of a gradient as it is added up"""
    reshard: bool = True


def estimate(plan: Plan, machine: Machine = MACHINES["H100"]) -> Step:
    """The step of `plan`."""
    model, sizes, m = plan.model, plan.sizes, machine
    gpus = sizes.data_ranks * sizes.ranks_per_row
    layers, passes = model.n_layers, plan.micro_batches
    tokens = plan.micro_batch * plan.seq_len / sizes.cp  # of a tp group, in one pass

    forward, backward = _work_of_block(plan, tokens, m)
    head = 6 * model.vocab_size * model.d_model * tokens / sizes.tp / (m.of_flops * m.flops)
    compute = layers * (forward + backward) + head

    # FSDP: weights are gathered before each use, gradients added up once in a step.
    block = model.n_block_matrix_params / layers / sizes.tp
    tables = model.n_params - model.n_block_matrix_params
    span, everyone = sizes.shards, sizes.shards * sizes.tp
    gather = _collective(2 * block, span, sizes.tp, m)
    gathers = 2 if plan.reshard else 1
    reduce = _collective(plan.reduce_bytes * block, span, sizes.tp, m)
    if sizes.dp_replicate > 1:  # the pieces of all copies are added up: a sum and a gather
        piece = plan.reduce_bytes * block / span
        reduce += 2 * _collective(piece, sizes.dp_replicate, everyone, m)
    hidden = max(0.0, gathers * gather - forward - backward) * layers
    late = max(0.0, gathers * gather + reduce - forward - backward) * layers
    ends = _collective(2 * tables, everyone, 1, m)
    ends_reduce = _collective(plan.reduce_bytes * tables, everyone, 1, m)
    fsdp = passes * (layers * gathers * gather + ends) + layers * reduce + ends_reduce
    exposed = (passes - 1) * hidden + late + passes * (gather + ends) + reduce + ends_reduce

    # tp: in front of and behind each half of a block, forward, backward and when computed again
    activation = 2 * tokens * model.d_model
    again = 0 if plan.recomputation == "none" else 1
    halves = _collective(activation, sizes.tp, 1, m) if sizes.tp > 1 else 0.0
    tensor = passes * layers * 2 * halves * (4 + again)
    # cp: keys and values of the whole row forward, their gradients backward
    pairs = 2 * 2 * tokens * sizes.cp * model.kv_width / sizes.tp
    row = _collective(pairs, sizes.cp, sizes.tp, m) if sizes.cp > 1 else 0.0
    context = passes * layers * row * (2 + again)

    # AdamW reads weight, gradient and two moments and writes all but the gradient, in fp32; the
    # norm of the gradient reads it once more
    own = model.n_params / (sizes.shards * sizes.tp)
    optimizer = own * 4 * 9 / (m.of_memory * m.memory)

    step = Step(passes * compute, fsdp, exposed, tensor, context, optimizer, 0.0, 0.0)
    rate = plan.micro_batch * plan.seq_len * passes * sizes.data_ranks / step.seconds / gpus
    mfu = rate * model.flops_per_token(plan.seq_len) / m.flops
    return step._replace(tokens_per_second_per_gpu=rate, mfu=mfu)


def _work_of_block(plan: Plan, tokens: float, m: Machine) -> tuple[float, float]:
    """Seconds of a block's forward and backward pass over the `tokens` of a tp group."""
    model, tp = plan.model, plan.sizes.tp
    matrices = 2 * model.n_block_matrix_params / model.n_layers * tokens / tp
    products = matrices / (m.of_flops * m.flops)
    if plan.float8 != "none":
        products /= m.float8_gain
    # q k^T and p v over the half of the row that is seen: 2 x 2 T / 2 per feature of the queries
    attention = 2 * plan.seq_len * model.q_width * tokens / tp / (m.of_flops_attention * m.flops)
    moved = m.passes * 2 * _put_out(model) * tokens / tp / (m.of_memory * m.memory)
    forward = products + attention + moved / 3
    backward = 2 * products + 2.5 * attention + moved * 2 / 3  # flash computes its scores again
    if plan.recomputation == "full":
        backward += forward
    elif plan.recomputation == "selective":  # half of the products
        backward += products / 2 + moved / 3
    return forward, backward


def _put_out(model: ModelConfig) -> int:
    """Numbers per token that the operations of a block put out."""
    # residual stream and norms; queries and keys before and after the rotary embedding, values,
    # attention; gate, up, activation and product
    width = 6 * model.d_model + 3 * model.q_width + 4 * model.kv_width
    return width + (4 if model.is_gated else 2) * model.d_ff


def _collective(n_bytes: float, ranks: int, apart: int, m: Machine) -> float:
    """Seconds of a gather (or a sum that is scattered) of `n_bytes` over a ring of `ranks`.

    apart: the distance of two neighbours in ranks; with 1, a node holds eight of them.
    """
    if ranks == 1:
        return 0.0
    in_node = max(1, min(ranks, m.gpus_per_node // apart))
    nodes = math.ceil(ranks / in_node)
    bandwidth = m.nvlink
    if nodes > 1:  # as many rings as there are ranks in a node, each through its own adapter
        bandwidth = min(m.nvlink, in_node * m.network)
    hops = (ranks - nodes) * m.hop_in_node + (nodes - 1) * m.hop_between
    return m.start + hops + n_bytes * (ranks - 1) / ranks / (m.of_links * bandwidth)
