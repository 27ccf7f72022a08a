"""What a step computes: the batch that all ranks agree on, its gradients, its numbers.

    build                                        layout, model, optimizer
    agree_on -> forward_backward -> losses_of    of one global batch

The loop (train.py) and the benchmarks call them.

Shapes: B rows of this rank's part of the global batch, T positions.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from openlm_lite import dist
from openlm_lite.data.stream import Batch
from openlm_lite.dist import World
from openlm_lite.layout import Layout, Sizes, build_layout
from openlm_lite.model.kernels import Choice, choose_attention, set_attention
from openlm_lite.model.loss import LossConfig
from openlm_lite.model.transformer import Transformer
from openlm_lite.optim.build import build_optimizer
from openlm_lite.parallel import DTYPES, build_sharded_model, set_gradient_sync
from openlm_lite.readback import to_device
from openlm_lite.run import RunConfig
from openlm_lite.sinks import Losses, every

_COLLECT_EVERY = 50  # steps: a collection of young garbage takes about 1 ms


class Built(NamedTuple):
    """What is trained, and what trains it."""

    layout: Layout
    model: Transformer
    optimizer: tuple[Optimizer, ...]


def attention_of(cfg: RunConfig, device: torch.device) -> Choice:
    """The attention kernel of a run there, the same on all ranks; collective.

    Raises InputError, on all ranks alike, where one of them cannot have it
    (`kernels.choose_attention`).
    """
    if cfg.parallel.cp > 1:  # `context_parallel.attend_over`
        return Choice("sdpa", f"in pieces of rows: parallel.cp = {cfg.parallel.cp}")
    dtype, architecture = DTYPES[cfg.parallel.precision], cfg.model.architecture
    deterministic = cfg.run.deterministic
    choices = dist.on_all_ranks(
        lambda: choose_attention(cfg.kernels, architecture, device, dtype, deterministic)
    )
    # auto takes cuDNN's kernel or passes it over for sdpa, by a trial of its own on each rank
    rank = next((r for r, choice in enumerate(choices) if choice.name == "sdpa"), 0)
    name, why = choices[rank]
    if any(choice.name != name for choice in choices):
        why = f"{why}, on rank {rank}"
    return Choice(name, why)


def build(cfg: RunConfig, world: World, attention: Choice) -> Built:
    """The model of a run with its first weights, laid out over the ranks; collective."""
    layout = build_layout(cfg.parallel, world)
    model = build_sharded_model(
        cfg.model.architecture,
        layout,
        cfg.parallel,
        world.device,
        cfg.run.seed,
        cfg.optim.mup_base_width,
    )
    set_attention(model, attention.name)
    return Built(layout, model, build_optimizer(model, cfg.optim, cfg.model.d_model))


class Agreed(NamedTuple):
    """What all ranks know of a global batch before they train on it."""

    n_targets: float  # at least 1: targets of all ranks
    checksum: int  # of the rows that were read (`data.stream.checksum_of`)
    place_lost: bool  # another run has the place of the checkpoints, as one rank knows


def agree_on(batch: Batch, sizes: Sizes, place_lost: bool) -> Agreed:
    """Wait until every rank has its batch, and add up what they know; collective.

    Over gloo on every machine: no GPU waits, nor is waited for.
    """
    counts = torch.tensor(  # float64 holds all of these exactly
        [n_targets_of(batch), batch.checksum, place_lost], dtype=torch.float64
    )
    torch.distributed.all_reduce(counts)
    counts[:2] /= sizes.ranks_per_row  # so many ranks have counted the same rows
    n_targets, checksum, losts = counts.tolist()
    # all rows may be of shards that are left out
    return Agreed(max(1.0, n_targets), int(checksum), losts > 0)


def forward_backward(
    model: Transformer,
    batch: Batch,
    micro_batches: int,
    loss: LossConfig,
    world: World,
    sizes: Sizes,
    n_targets: float,
    sources: tuple[str, ...] = (),
    *,
    reduce_each: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Gradients of one global batch, of `n_targets` over all ranks; the numbers of `losses_of`.

    They stay on the device: nothing here waits for it.

    What is minimised is the mean over the targets of all ranks and micro-batches, each token
    counting once, whatever the split; with a z-loss, plus z_loss times its mean over all
    positions, or over the targets. With several `sources` (which batch.sources_B number), the loss
    of each is found too. This rank's `stop_requested` is asked at the very end, for all to know.
    `reduce_each`: the ranks add up their gradients after each micro-batch.
    """
    n_positions = batch.targets_BT.numel() * sizes.data_ranks
    z_over_targets = loss.z_loss_over == "targets"
    z_weight = loss.z_loss
    if z_weight and not z_over_targets:
        z_weight = z_weight * n_targets / n_positions

    found = torch.zeros(2, device=world.device)
    by_source = torch.zeros(2, len(sources), device=world.device)
    for i, part in enumerate(micro_batches_of(batch, micro_batches)):
        set_gradient_sync(model, reduce_each or i == micro_batches - 1)
        targets_BT = to_device(part.targets_BT, world.device)
        documents = part.doc_ids_BT
        sums = model(
            to_device(part.tokens_BT, world.device),
            targets_BT,
            z_weight=z_weight,
            z_over_targets=z_over_targets,
            doc_ids_BT=None if documents is None else to_device(documents, world.device),
        )
        # FSDP averages gradients over these ranks, n_targets already counts all of them.
        (sums.total * (sizes.addends / n_targets)).backward()
        found += torch.stack((sums.ce / n_targets, z_weight * sums.z / n_targets))
        if part.sources_B is not None:
            ce_B = sums.ce_N.view(len(targets_BT), -1).sum(1)  # of this rank's part of each row
            n_B = (targets_BT >= 0).sum(1).float() / sizes.ranks_per_row
            by_source.index_add_(
                1, to_device(part.sources_B, world.device), torch.stack((ce_B, n_B))
            )
    asked = to_device(torch.tensor([float(stop_requested())]), world.device)
    found = torch.cat((found, by_source.flatten(), asked))
    torch.distributed.all_reduce(found)
    return found


def losses_of(found: Sequence[float], sources: tuple[str, ...] = ()) -> Losses:
    """Of what `forward_backward` found: ce, z; of each source the sum of ce, then the targets."""
    ce, z, *rest, stops = found
    pairs = zip(sources, rest[: len(sources)], rest[len(sources) :], strict=True)
    return Losses(ce, z, {name: s / n for name, s, n in pairs if n}, stops > 0)


def micro_batches_of(batch: Batch, n: int) -> list[Batch]:
    """The batch in `n` equal parts."""
    columns = [(None,) * n if t is None else t.chunk(n) for t in (*batch[:3], batch.sources_B)]
    return [
        Batch(tokens, targets, documents, batch.first_index, sources)
        for tokens, targets, documents, sources in zip(*columns, strict=True)
    ]


def n_targets_of(batch: Batch) -> int:
    """Targets of this rank that count."""
    return int((batch.targets_BT >= 0).sum())


Collect = Callable[[int, bool], None]
"""to be called after each step, with its number, and whether training paused behind it"""


@contextmanager
def collected_between_steps() -> Iterator[Collect]:
    """Python's garbage collector, kept out of steps; call what this gives after each.

    It would run in the middle of any step, on each rank in another one, and all wait for the
    slowest. What is there at the start (modules, the model) is never looked at again. What outlived
    a young collection is looked at in pauses, for validations and saves, which are long anyway.
    """

    def collect(step: int, paused: bool) -> None:
        if paused:
            gc.collect()
        elif every(_COLLECT_EVERY, step):
            gc.collect(1)

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.enable()
        gc.unfreeze()


def make_deterministic(cfg: RunConfig) -> None:
    """On a CPU everything here is deterministic; a GPU needs to be told."""
    if cfg.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
