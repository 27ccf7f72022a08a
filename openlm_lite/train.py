"""The training loop: read this to know what happens in a run, from top to bottom.

    python train.py RECIPE [a.b=c …]                         one process
    torchrun --nproc-per-node 8 train.py RECIPE [a.b=c …]    one process per GPU

A run folder::

    run.dir/
      config.yaml       the resolved recipe: trains the same run on its own
      init_from.json    the model that the first weights came from, if there is one
      metrics.jsonl     one record per step, one per validation
      log.txt           what the console said
      tokenizer.json    of the data, so that exports and generation have it
      checkpoints/step_00001000/…
      stopped.json      after a stop on request: the step; gone once training goes on
      lock              held by the running process
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from openlm_lite import checkpoint, dist, log, run
from openlm_lite.checkpoint import TrainState
from openlm_lite.data.sources import (
    bad_shards_of,
    check_same_data,
    data_facts,
    open_sources,
    open_stream,
)
from openlm_lite.data.stream import Batch, TokenStream, train_batches, val_batches
from openlm_lite.dist import World
from openlm_lite.errors import InputError, RunError
from openlm_lite.eval.loss import validation_loss
from openlm_lite.inherit import first_weights, open_init_source
from openlm_lite.model.transformer import Transformer
from openlm_lite.optim.build import build_optimizer, clip_gradients, set_lr
from openlm_lite.optim.schedule import lr_at
from openlm_lite.parallel import build_sharded_model, set_gradient_sync
from openlm_lite.run import RunConfig
from openlm_lite.run_folder import mark_stopped, run_folder
from openlm_lite.saver import Saver
from openlm_lite.sinks import Clock, Losses, Sinks, every

DONE, STOPPED = 0, 75
"""exit codes: trained to the end; stopped on request with a checkpoint saved"""


class NonFiniteError(RunError):
    """The loss or the gradient is NaN or infinite; the weights were not touched."""


def train(cfg: RunConfig, allow_change: Sequence[str] = ()) -> int:
    """Train the run to its end or to a stop request; returns the exit code.

    Launched again on the same run.dir it continues from the newest whole checkpoint, and ends
    with the weights of the uninterrupted run. `allow_change` names keys that may differ from the
    run there, which are refused otherwise.
    """
    _, world_size, _ = dist.launched()
    micro_batches = cfg.micro_batches(world_size)
    train_sets, val_sets = open_sources(cfg.data, cfg.model.vocab_size)
    stream = open_stream(cfg.data, train_sets, cfg.steps * cfg.global_batch_tokens)
    folder = Path(cfg.run.dir).expanduser()
    source = open_init_source(cfg.model.init_from, cfg.model.architecture, folder)
    make_deterministic(cfg)

    world = dist.init(cfg.run.device)
    with run_folder(cfg, folder, stream, allow_change) as stop, ExitStack() as at_end:
        mesh = dist.data_parallel_mesh(world)
        model = build_sharded_model(
            cfg.model.architecture, mesh, cfg.parallel, world.device, cfg.run.seed
        )
        optimizer = build_optimizer(model, cfg.optim)

        root = str(folder / "checkpoints")
        commit = checkpoint.latest_checkpoint(root)
        if commit is None:
            state = TrainState(step=0, tokens=0, next_sample=0)
            origin = first_weights(model, cfg.model.init_from, source, folder)
        else:
            if not check_same_data(commit.facts, stream, allow_change):
                stream.bad_shards.update(bad_shards_of(commit.facts))
            origin = commit.facts.get("init_from")
            state = checkpoint.load_checkpoint(commit, model, optimizer)
        del source  # and with it what it has open
        sinks = Sinks(cfg, folder, world, resume_step=-1 if commit is None else state.step)
        at_end.callback(sinks.close)
        sinks.banner(stream, origin, resumed=commit is not None)

        saver = Saver(root, cfg.checkpoint)
        at_end.callback(saver.close)

        def save(state: TrainState, must_succeed: bool) -> None:
            documents = {
                "config.yaml": run.resolved_yaml(cfg),
                "model.json": run.model_json(cfg.model.architecture),
            }
            facts = data_facts(stream) | ({"init_from": origin} if origin else {})
            before = saver.start(model, optimizer, state, documents=documents, facts=facts)
            sinks.saved(before)
            if must_succeed:
                sinks.saved(saver.finish(must_succeed))

        def validate(state: TrainState) -> None:
            for name, dataset in val_sets.items():
                batches = val_batches(
                    dataset,
                    seq_len=cfg.data.seq_len,
                    batch_size=cfg.micro_batch_size,
                    max_tokens=cfg.eval.tokens,
                    rank=world.rank,
                    world_size=world.world_size,
                    masks=cfg.data,
                )
                sinks.validation(state, name, validation_loss(model, batches, world.device))

        batches = train_batches(
            stream,
            first_sample=state.next_sample,
            global_batch=cfg.global_batch,
            rank=world.rank,
            world_size=world.world_size,
            prefetch=cfg.data.prefetch_batches,
            masks=cfg.data,
        )
        at_end.callback(batches.close)
        if state.step == 0:
            validate(state)

        while state.step < cfg.steps:
            clock = Clock()
            lr = lr_at(state.step, cfg.steps, cfg.optim.lr, cfg.schedule)
            set_lr(optimizer, lr)
            batch = next(batches)
            clock.lap("data")

            for message in share_bad_shards(stream, world):
                sinks.say(f"step {state.step}: left out: {message}")
            losses, stop_wanted = forward_backward(
                model, batch, micro_batches, cfg.loss.z_loss, world, stop.requested, stream.names
            )
            grad_norm = clip_gradients(model, cfg.optim.grad_clip).item()
            if not (math.isfinite(losses.ce) and math.isfinite(grad_norm)):
                raise NonFiniteError(
                    f"step {state.step}: loss {losses.ce}, gradient norm {grad_norm}, samples "
                    f"{batch.first_index} to {batch.first_index + cfg.global_batch - 1}; this step "
                    f"updated nothing. `openlm inspect {folder} --step {state.step}` shows the "
                    "samples; a new run.dir with a lower optim.lr or longer schedule.warmup_steps "
                    "may get past it"
                )
            optimizer.step()
            optimizer.zero_grad()

            state = TrainState(
                step=state.step + 1,
                tokens=state.tokens + cfg.global_batch_tokens,
                next_sample=batch.first_index + cfg.global_batch,
            )
            clock.lap("step")
            sinks.step(state, losses, grad_norm, lr, clock, stream)
            sinks.saved(saver.finished())

            done = state.step == cfg.steps
            if done or every(cfg.eval.every_steps, state.step):
                validate(state)
            if done or stop_wanted or every(cfg.checkpoint.every_steps, state.step):
                save(state, must_succeed=done or stop_wanted)
            if stop_wanted and not done:
                dist.on_main(lambda state=state: mark_stopped(folder, state))
                sinks.say(f"stopped on request after step {state.step}; the same command resumes")
                return STOPPED

        sinks.say(f"done: {state.step} steps, {log.human(state.tokens)} tokens, in {folder}")
        return DONE


def forward_backward(
    model: Transformer,
    batch: Batch,
    micro_batches: int,
    z_loss: float,
    world: World,
    stop_requested: bool,
    sources: tuple[str, ...] = (),
) -> tuple[Losses, bool]:
    """Gradients of one global batch; returns its losses and whether any rank wants to stop.

    What is minimised is the mean over the targets of all ranks and micro-batches, each token
    counting once, whatever the split; with a z-loss, plus z_loss times its mean over all
    positions. With several `sources` (which batch.sources_B number), the loss of each is found too.
    """
    n_positions = batch.targets_BT.numel() * world.world_size
    counts = torch.tensor(  # float64 holds all of these exactly
        [n_targets_of(batch), batch.checksum, stop_requested], dtype=torch.float64
    ).to(world.device)
    torch.distributed.all_reduce(counts)
    n_targets = counts[0].clamp(min=1).float()  # all rows may be of shards that are left out
    z_weight = z_loss * n_targets / n_positions if z_loss else 0.0

    found = torch.zeros(2, device=world.device)
    by_source = torch.zeros(2, len(sources), device=world.device)
    for i, part in enumerate(micro_batches_of(batch, micro_batches)):
        set_gradient_sync(model, i == micro_batches - 1)
        targets_BT = part.targets_BT.to(world.device, non_blocking=True)
        documents = part.doc_ids_BT
        sums = model(
            part.tokens_BT.to(world.device, non_blocking=True),
            targets_BT,
            z_weight=z_weight,
            doc_ids_BT=None if documents is None else documents.to(world.device, non_blocking=True),
        )
        # FSDP averages gradients over the ranks, n_targets already counts all of them.
        (sums.total * (world.world_size / n_targets)).backward()
        found += torch.stack((sums.ce / n_targets, z_weight * sums.z / n_targets))
        if part.sources_B is not None:
            ce_B = sums.ce_N.view_as(targets_BT).sum(1)
            n_B = (targets_BT >= 0).sum(1).float()
            by_source.index_add_(1, part.sources_B.to(world.device), torch.stack((ce_B, n_B)))
    found = torch.cat((found, by_source.flatten()))
    torch.distributed.all_reduce(found)
    ce, z, *rest = found.tolist()
    pairs = zip(sources, rest[: len(sources)], rest[len(sources) :], strict=True)
    by_name = {name: s / n for name, s, n in pairs if n}
    return Losses(ce, z, by_name, int(counts[1])), bool(counts[2] > 0)


def micro_batches_of(batch: Batch, n: int) -> list[Batch]:
    """The batch in `n` equal parts."""
    columns = [(None,) * n if t is None else t.chunk(n) for t in (*batch[:3], batch.sources_B)]
    return [
        Batch(tokens, targets, documents, batch.first_index, sources)
        for tokens, targets, documents, sources in zip(*columns, strict=True)
    ]


def share_bad_shards(stream: TokenStream, world: World) -> list[str]:
    """Tell all ranks of the shards that one of them left out; returns what is new to this one.

    Raises InputError, on every rank, where they are more than data.max_bad_shards.
    """
    if stream.max_bad_shards == 0:
        return []
    mine = dict(stream.bad_shards)  # the thread that reads ahead adds to it
    count = torch.tensor(float(len(mine.keys() - stream.told)), device=world.device)
    torch.distributed.all_reduce(count)
    if not count:
        return []
    everybodys: list[dict[tuple[str, int], str]] = [{} for _ in range(world.world_size)]
    torch.distributed.all_gather_object(everybodys, mine)
    for other in everybodys:
        stream.bad_shards.update(other)
    known = {key: message for other in everybodys for key, message in other.items()}
    if len(known) > stream.max_bad_shards:
        raise InputError(
            f"{len(known)} shards are bad, more than data.max_bad_shards = "
            f"{stream.max_bad_shards}:\n  " + "\n  ".join(known.values())
        )
    new = [message for key, message in known.items() if key not in stream.told]
    stream.told.update(known)
    return new


def n_targets_of(batch: Batch) -> int:
    """Targets of this rank that count."""
    return int((batch.targets_BT >= 0).sum())


def make_deterministic(cfg: RunConfig) -> None:
    """On a CPU everything here is deterministic; a GPU needs to be told."""
    if cfg.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
