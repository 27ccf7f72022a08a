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
      lock              held by the running process
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from openlm_lite import checkpoint, dist, log, metrics, run, storage
from openlm_lite.checkpoint import TrainState
from openlm_lite.commit import DamagedError, read_commit, step_folders
from openlm_lite.data.dataset import Dataset, check_fits_model, open_dataset
from openlm_lite.data.order import ORDER_VERSION
from openlm_lite.data.stream import Batch, TokenStream, train_batches, val_batches
from openlm_lite.dist import World
from openlm_lite.errors import InputError, RunError
from openlm_lite.eval.loss import validation_loss
from openlm_lite.inherit import Record, describe, first_weights, open_init_source
from openlm_lite.model.transformer import Transformer
from openlm_lite.optim.build import build_optimizer, clip_gradients, set_lr
from openlm_lite.optim.schedule import lr_at
from openlm_lite.parallel import build_sharded_model, set_gradient_sync
from openlm_lite.run import RunConfig

DONE, STOPPED = 0, 75
"""exit codes: trained to the end; stopped on request with a checkpoint saved"""


class NonFiniteError(RunError):
    """The loss or the gradient is NaN or infinite; the weights were not touched."""


def train(cfg: RunConfig) -> int:
    """Train the run to its end or to a stop request; returns the exit code.

    Launched again on the same run.dir it continues from the newest whole checkpoint, and ends
    with the weights of the uninterrupted run.
    """
    _, world_size, _ = dist.launched()
    micro_batches = cfg.micro_batches(world_size)
    train_set, val_sets = open_data(cfg)
    folder = Path(cfg.run.dir).expanduser()
    source = open_init_source(cfg.model.init_from, cfg.model.architecture, folder)
    make_deterministic(cfg)

    world = dist.init(cfg.run.device)
    with run_folder(cfg, folder, train_set) as stop:
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
            check_same_data(commit.facts, train_set)
            origin = commit.facts.get("init_from")
            state = checkpoint.load_checkpoint(commit, model, optimizer)
        del source  # and with it what it has open
        sinks = Sinks(cfg, folder, world, resume_step=-1 if commit is None else state.step)
        sinks.banner(train_set, origin, resumed=commit is not None)

        def save(state: TrainState) -> None:
            documents = {
                "config.yaml": run.resolved_yaml(cfg),
                "model.json": run.model_json(cfg.model.architecture),
            }
            facts = data_facts(train_set) | ({"init_from": origin} if origin else {})
            path = checkpoint.save_checkpoint(
                root, model, optimizer, state, documents=documents, facts=facts, cfg=cfg.checkpoint
            )
            sinks.say(f"saved {path}")

        def validate(state: TrainState) -> None:
            for name, dataset in val_sets.items():
                batches = val_batches(
                    dataset,
                    seq_len=cfg.data.seq_len,
                    batch_size=cfg.micro_batch_size,
                    max_tokens=cfg.eval.tokens,
                    rank=world.rank,
                    world_size=world.world_size,
                )
                sinks.validation(state, name, validation_loss(model, batches, world.device))

        stream = TokenStream(train_set, cfg.data.seq_len, cfg.data.seed, cfg.data.shuffle_shards)
        batches = train_batches(
            stream,
            first_sample=state.next_sample,
            global_batch=cfg.global_batch,
            rank=world.rank,
            world_size=world.world_size,
            prefetch=cfg.data.prefetch_batches,
        )
        if state.step == 0:
            validate(state)

        while state.step < cfg.steps:
            clock = Clock()
            lr = lr_at(state.step, cfg.steps, cfg.optim.lr, cfg.schedule)
            set_lr(optimizer, lr)
            batch = next(batches)
            clock.lap("data")

            losses, stop_wanted = forward_backward(
                model, batch, micro_batches, cfg.loss.z_loss, world, stop.requested
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
            sinks.step(state, losses, grad_norm, lr, clock)

            done = state.step == cfg.steps
            if done or every(cfg.eval.every_steps, state.step):
                validate(state)
            if done or stop_wanted or every(cfg.checkpoint.every_steps, state.step):
                save(state)
            if stop_wanted and not done:
                sinks.say(f"stopped on request after step {state.step}; the same command resumes")
                return STOPPED

        sinks.say(f"done: {state.step} steps, {log.human(state.tokens)} tokens, in {folder}")
        return DONE


def every(n: int, step: int) -> bool:
    """True at each n-th step; never for n = 0."""
    return n > 0 and step % n == 0


class Losses(NamedTuple):
    """Of one global batch, nats per target."""

    ce: float
    z: float
    """the z-loss as it is added: with its coefficient"""


def forward_backward(
    model: Transformer,
    batch: Batch,
    micro_batches: int,
    z_loss: float,
    world: World,
    stop_requested: bool,
) -> tuple[Losses, bool]:
    """Gradients of one global batch; returns its losses and whether any rank wants to stop.

    What is minimised is the mean over the targets of all ranks and micro-batches, each token
    counting once, whatever the split; with a z-loss, plus z_loss times its mean over all
    positions.
    """
    n_positions = batch.targets_BT.numel() * world.world_size
    counts = torch.stack((n_targets_of(batch).float(), torch.tensor(float(stop_requested)))).to(
        world.device
    )
    torch.distributed.all_reduce(counts)
    n_targets = counts[0]
    z_weight = z_loss * n_targets / n_positions if z_loss else 0.0

    found = torch.zeros(2, device=world.device)
    parts = zip(
        batch.tokens_BT.chunk(micro_batches), batch.targets_BT.chunk(micro_batches), strict=True
    )
    for i, (tokens_BT, targets_BT) in enumerate(parts):
        set_gradient_sync(model, i == micro_batches - 1)
        sums = model(
            tokens_BT.to(world.device, non_blocking=True),
            targets_BT.to(world.device, non_blocking=True),
            z_weight=z_weight,
        )
        # FSDP averages gradients over the ranks, n_targets already counts all of them.
        (sums.total * (world.world_size / n_targets)).backward()
        found += torch.stack((sums.ce / n_targets, z_weight * sums.z / n_targets))
    torch.distributed.all_reduce(found)
    return Losses(*found.tolist()), bool(counts[1] > 0)


def n_targets_of(batch: Batch) -> Tensor:
    """Targets of this rank that count."""
    return (batch.targets_BT >= 0).sum()


def open_data(cfg: RunConfig) -> tuple[Dataset, dict[str, Dataset]]:
    """The datasets of the run, checked against the model and each other."""
    train_set = open_dataset(cfg.data.train)
    val_sets = {name: open_dataset(path) for name, path in cfg.data.val.items()}
    for dataset in (train_set, *val_sets.values()):
        dataset.rows_per_block(cfg.data.seq_len)
        check_fits_model(dataset, cfg.model.vocab_size)
        if dataset.info.tokenizer.fingerprint != train_set.info.tokenizer.fingerprint:
            raise InputError(
                f"{dataset.folder}: made with the tokenizer {dataset.info.tokenizer.name}, but "
                f"the training data with {train_set.info.tokenizer.name} "
                f"({train_set.folder}); prepare both with the same one"
            )
    return train_set, val_sets


def data_facts(train_set: Dataset) -> dict[str, Any]:
    """What a checkpoint keeps of the data, for `check_same_data`."""
    return {"manifest_sha256": train_set.manifest_sha256, "order_version": ORDER_VERSION}


def check_same_data(facts: Mapping[str, Any], train_set: Dataset) -> None:
    """A resumed run must read the data that it started on, in the order that it started with."""
    if facts.get("order_version") != ORDER_VERSION:
        raise InputError(
            f"this run read its data in order {facts.get('order_version')}, this version of "
            f"openlm_lite reads in order {ORDER_VERSION}; finish it with the version that began it"
        )
    if facts.get("manifest_sha256") != train_set.manifest_sha256:
        raise InputError(
            f"{train_set.folder}: its manifest is not the one that this run was trained on; "
            "restore that data or use a new run.dir"
        )


def make_deterministic(cfg: RunConfig) -> None:
    """On a CPU everything here is deterministic; a GPU needs to be told."""
    if cfg.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def is_beginning(name: str) -> bool:
    """What a run that was killed before its config.yaml was there may have left."""
    return name in ("lock", "log.txt") or (name.startswith(".") and "config.yaml" in name)


def check_folder(cfg: RunConfig, folder: Path, train_set: Dataset) -> None:
    """Raises InputError if `folder` is not free for this run."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"run.dir: {folder} is a file, not a folder")
    metrics_file = folder / "metrics.jsonl"
    started = metrics_file.is_file() and metrics_file.stat().st_size > 0
    if (folder / "config.yaml").is_file():
        if started:
            run.check_same_run(cfg, folder)
        for path in step_folders(str(folder / "checkpoints"))[:1]:
            with suppress(DamagedError):  # latest_checkpoint puts it aside, and tries an older one
                check_same_data(read_commit(path).facts, train_set)
    elif others := sorted(p.name for p in folder.iterdir() if not is_beginning(p.name)):
        raise InputError(
            f"run.dir: {folder} holds other things ({', '.join(others[:5])}) and no run; "
            "name a new folder"
        )


@contextmanager
def run_folder(cfg: RunConfig, folder: Path, train_set: Dataset) -> Iterator[dist.StopRequest]:
    """The folder made, locked and described by rank 0; let go of, with the group, at the end."""
    locks: list[IO[str]] = []

    def claim() -> None:
        check_folder(cfg, folder, train_set)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locks.append(take_lock(folder))
        except OSError as e:
            raise InputError(f"run.dir: {folder} cannot be used: {e.strerror}") from None
        check_folder(cfg, folder, train_set)  # again: another run may have been quicker
        storage.write_bytes(str(folder / "config.yaml"), run.resolved_yaml(cfg).encode())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            source = Path(train_set.folder) / name
            if source.is_file():
                shutil.copyfile(source, folder / name)
        log.setup_console(folder / "log.txt")

    stop = None
    try:
        dist.on_main(claim)
        stop = dist.StopRequest()
        yield stop
    except Exception as e:
        if locks:
            log.logger.error("ended by %s: %s", type(e).__name__, e)
        raise
    finally:
        if stop is not None:
            stop.release()
        log.close_console()
        for lock in locks:
            lock.close()
        dist.close()


def take_lock(folder: Path) -> IO[str]:
    """Hold `folder`/lock until the file is closed or the process dies, however it dies."""
    file = (folder / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise InputError(
            f"run.dir: {folder} is in use by another run ({owner}); stop it or use another folder"
        ) from None
    except OSError as e:
        file.close()
        raise InputError(
            f"run.dir: {folder} cannot be locked ({e.strerror}); use a file system that has flock "
            "(Lustre: mounted with -o flock)"
        ) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file


class Clock:
    """Seconds of the phases of one step."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return self.last - self.start


class Sinks:
    """Where rank 0 reports to: console, log.txt and metrics.jsonl. Silent on other ranks."""

    def __init__(self, cfg: RunConfig, folder: Path, world: World, resume_step: int) -> None:
        self.cfg, self.world = cfg, world
        self.flops_per_token = cfg.model.flops_per_token(cfg.data.seq_len)
        self.seconds_per_step = 0.0
        self.file = (
            log.MetricsFile(folder / "metrics.jsonl", resume_step) if world.is_main else None
        )

    def say(self, message: str) -> None:
        if self.file is not None:
            log.logger.info(message)

    def banner(self, train_set: Dataset, origin: Record | None, resumed: bool) -> None:
        cfg, world = self.cfg, self.world
        self.say(
            f"{log.human(cfg.model.n_params)} parameters, {cfg.steps} steps of "
            f"{cfg.global_batch} x {cfg.data.seq_len} tokens, "
            f"{world.world_size} x {world.device.type} ({cfg.parallel.precision}), "
            f"data {train_set.folder} "
            f"({log.human(train_set.n_blocks * train_set.block_tokens)} tokens)"
        )
        if resumed:
            self.say(f"resuming {cfg.run.dir}")
        elif origin is not None:
            for line in describe(origin, cfg.model.init_from):
                self.say(line)

    def step(
        self, state: TrainState, losses: Losses, grad_norm: float, lr: float, clock: Clock
    ) -> None:
        """One record for the file; at intervals one line for people."""
        if self.file is None:
            return
        record = {
            "step": state.step,
            "tokens": state.tokens,
            "train/loss": losses.ce,
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            **metrics.throughput(
                self.cfg.global_batch_tokens,
                clock.total,
                self.world.world_size,
                self.flops_per_token,
                self.world.device,
            ),
            "perf/data_wait": clock.laps["data"],
        }
        if self.cfg.loss.z_loss:
            record["train/z_loss"] = losses.z
        self.file.write(record)
        # a moving average over about ten steps, for a calm estimate of the time left
        weight = 0.1 if self.seconds_per_step else 1.0
        self.seconds_per_step += weight * (clock.total - self.seconds_per_step)
        if every(self.cfg.log.every_steps, state.step) or state.step == self.cfg.steps:
            left = (self.cfg.steps - state.step) * self.seconds_per_step
            self.say(log.step_line(record, self.cfg.steps, left))

    def validation(self, state: TrainState, name: str, loss: float) -> None:
        if self.file is None:
            return
        self.file.write({"step": state.step, "tokens": state.tokens, f"val/{name}/loss": loss})
        self.say(f"step {state.step}: val/{name}/loss {loss:.4f}")
