"""The training loop: read this to know what happens in a run, from top to bottom.

    python train.py RECIPE [a.b=c …]                         one process
    torchrun --nproc-per-node 8 train.py RECIPE [a.b=c …]    one process per GPU

A run folder::

    run.dir/
      config.yaml       the resolved recipe: trains the same run on its own
      init_from.json    the model that the first weights came from, if there is one
      metrics.jsonl     one record per step, one per validation
      log.txt           what the console said
      wandb/ wandb_id tensorboard/    with log.wandb, log.tensorboard
      stacks-rank0.txt  what a rank did when its watchdog ended it
      tokenizer.json    of the data, which each checkpoint holds too, for exports and generation
      checkpoints/step_00001000/…
      events.jsonl      every launch, start, save and end, with the time of day; only added to
      stopped.json      after a stop on request: the step; gone once training goes on
      lock              held by the running process
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import torch

from openlm_lite import checkpoint, dist, log, run, run_files
from openlm_lite.average.running import Averages
from openlm_lite.branch import check_branch, take_over
from openlm_lite.checkpoint import TrainState
from openlm_lite.checkpoint_place import Place
from openlm_lite.commit import Commit
from openlm_lite.data.dataset import Dataset
from openlm_lite.data.sources import (
    bad_shards_of,
    check_same_data,
    data_facts,
    open_sources,
    open_stream,
)
from openlm_lite.data.stream import Batch, TokenStream, train_batches, val_batches
from openlm_lite.dist import World
from openlm_lite.errors import InputError, RunError, SharedError
from openlm_lite.eval.during import TaskEval
from openlm_lite.eval.loss import validation_loss
from openlm_lite.eval.measures import metrics_of, problems_of
from openlm_lite.eval.samples import Sampler
from openlm_lite.float8 import check_float8
from openlm_lite.guard import Guard
from openlm_lite.hf.source import Source, tokenizer_documents
from openlm_lite.host_memory import keep_freed_memory
from openlm_lite.inherit import Record, first_weights, open_init_source
from openlm_lite.model.kernels import Choice
from openlm_lite.optim.brake import Brake
from openlm_lite.optim.build import clip_gradients, set_lr
from openlm_lite.optim.norms import norms_of, parts_of, squared_norms
from openlm_lite.optim.schedule import lr_at
from openlm_lite.parallel import DTYPES
from openlm_lite.profile import Profiler
from openlm_lite.readback import Laps, Readback, reads_late
from openlm_lite.remote_lock import lost_message
from openlm_lite.run import RunConfig
from openlm_lite.run_folder import mark_stopped, run_folder
from openlm_lite.saver import Saver
from openlm_lite.sinks import Losses, Sinks, every
from openlm_lite.step import (
    Collect,
    agree_on,
    attention_of,
    build,
    collected_between_steps,
    forward_backward,
    losses_of,
    make_deterministic,
)
from openlm_lite.stop import StopRequest
from openlm_lite.watchdog import Watchdog

DONE, STOPPED = 0, 75
"""exit codes: trained to the end; stopped on request with a checkpoint saved"""


def train(cfg: RunConfig, allow_change: Sequence[str] = (), stop: StopRequest | None = None) -> int:
    """Train the run to its end or to a stop request; returns the exit code.

    Launched again on the same run.dir it continues from the newest whole checkpoint, and ends
    with the weights of the uninterrupted run. `allow_change` names keys that may differ from the
    run there, which are refused otherwise. `stop` listens since before the imports (default: from
    here on).
    """
    rank, world_size, _ = dist.launched()
    cfg.check_layout(world_size)  # before anything else: do mesh and batch fit the ranks?
    check_float8(cfg.parallel.float8, cfg.run.device)
    train_sets, val_sets = open_sources(cfg.data, cfg.model.vocab_size)
    stream = open_stream(cfg.data, train_sets, cfg.tokens_at(cfg.steps))
    data_folder = next(iter(train_sets.values())).folder
    tasks = TaskEval(cfg.eval.tasks, cfg.model, data_folder, tuple(val_sets))
    sampler = Sampler(cfg.eval.samples, data_folder, cfg.model.max_seq_len, cfg.model.vocab_size)
    folder = Path(cfg.run.dir).expanduser()
    source = open_init_source(
        cfg.model.init_from, cfg.model.architecture, folder, cfg.checkpoint.dir
    )
    if source is not None:
        check_branch(cfg, source.path, source.kind, stream)
    make_deterministic(cfg)

    with ExitStack() as at_end:
        if stop is None:
            stop = at_end.enter_context(StopRequest())
        watchdog = at_end.enter_context(Watchdog(cfg.watchdog, rank, world_size, stop))
        world = dist.init(cfg.run.device, cfg.watchdog.group_seconds)
        if world.device.type == "cpu":
            keep_freed_memory()
        attention = attention_of(cfg, world.device)
        place = at_end.enter_context(run_folder(cfg, folder, stream, allow_change))
        watchdog.stacks_folder = folder
        evals = Evals(val_sets, tasks, sampler)
        loop = Loop(cfg, folder, place, stream, evals, world, stop, watchdog, attention)
        at_end.callback(loop.close)
        loop.begin(source, allow_change)
        del source  # and with it what it has open
        return loop.run()


class Evals(NamedTuple):
    """What is measured along the run."""

    val_sets: Mapping[str, Dataset]
    tasks: TaskEval
    sampler: Sampler


class Loop:
    """A run under way: what it trains, where it stands, and what a step does."""

    def __init__(
        self,
        cfg: RunConfig,
        folder: Path,
        place: Place,
        stream: TokenStream,
        evals: Evals,
        world: World,
        stop: StopRequest,
        watchdog: Watchdog,
        attention: Choice,
    ) -> None:
        self.cfg, self.folder, self.place, self.world = cfg, folder, place, world
        self.stream, self.evals = stream, evals
        self.stop, self.watchdog = stop, watchdog
        self.schedule = cfg.schedule_in_steps
        self.attention = attention
        self.layout, self.model, self.optimizer = build(cfg, world, attention)
        self.brake = None
        late = reads_late(world.device) and cfg.guard.may_judge_late
        # with tp or cp a waiting step stays: the flag beside parameters of two meshes is untried
        if late and self.layout.sizes.ranks_per_row == 1 and Brake.holds(self.optimizer):
            self.brake = Brake(self.optimizer, world.device)
        self.tried: Tried | None = None  # the last step, while its numbers are not read
        self.since = 0.0  # by the clock: what came before is not of the step that is awaited
        self.stop_wanted = False  # by any rank, in a step whose numbers are read
        self.averages = Averages(cfg.averages, self.model)
        self.saver = Saver(place, cfg.checkpoint)
        self.tokenizer: dict[str, str] = {}  # documents of the checkpoints; rank 0 writes them
        dist.on_main(lambda: self.tokenizer.update(tokenizer_documents(str(folder))), RunError)
        watchdog.watch_background(self.saver.running_seconds)
        self.state = TrainState(step=0, tokens=0, next_sample=0)
        self.guard = Guard(cfg.guard)
        self.has_stepped = False  # in this process: the first step may compile
        self.origin: Record | None = None  # of the first weights
        self.batches = self.batches_from_here()
        self.sinks = Sinks(cfg, folder, world)
        self.profiler = Profiler(cfg.profile, folder, world)

    def begin(self, source: Source | None, allow_change: Sequence[str]) -> None:
        """Take the state of the newest checkpoint, or the first weights."""
        commit = checkpoint.latest_checkpoint(self.place)
        if commit is None:
            init_from = self.cfg.model.init_from
            self.origin = first_weights(self.model, init_from, source, self.folder)
            parent = take_over(self.cfg, self.origin, self.model, self.optimizer, self.stream)
            if parent is not None:
                self.state = parent
                self.go_on(f"{init_from.path}")
        else:
            if not check_same_data(commit.facts, self.stream, allow_change):
                self.stream.bad_shards.update(bad_shards_of(commit.facts))
            self.origin = commit.facts.get("init_from")
            self.load(commit)
            self.go_on(commit.path)
        resume_step = -1 if commit is None else self.state.step
        self.sinks.open(resume_step)
        self.sinks.banner(self.stream, self.origin, self.attention, resume_step)
        self.begin_averages()
        if commit is None:
            self.validate()
            if self.cfg.guard.on_spike == "rewind":  # a first spike has something to go back to
                self.save(must_succeed=True)

    def go_on(self, place: str) -> None:
        """With guard and data from the state, of the checkpoint `place`."""
        self.guard = Guard(self.cfg.guard, self.state.guard, place)
        self.batches = self.batches_from_here()

    def run(self) -> int:
        """Step until the end or a stop; returns the exit code."""
        with collected_between_steps() as collect:
            return self.run_steps(collect)

    def run_steps(self, collect: Collect) -> int:
        cfg, sinks = self.cfg, self.sinks
        while self.state.step < cfg.steps:
            before = self.state
            self.profiler.begin(before.step)
            self.step()
            for message in self.profiler.end(self.state.step):
                sinks.say(message)
            sinks.saved(self.saver.finished())
            if self.state.step <= before.step:
                continue  # left out, or gone back; a request to stop waits for the next step
            step, done = self.state.step, self.state.step == cfg.steps
            if validates := done or every(cfg.eval.every_steps, step):
                self.validate()
            if evaluates := self.evals.tasks.due(step, before.tokens, self.state.tokens, done):
                self.evaluate()
            if saves := done or self.stop_wanted or every(cfg.checkpoint.every_steps, step):
                self.save(must_succeed=done)
            collect(step, validates or evaluates or saves)
            if self.stop_wanted and not done:
                dist.on_main(lambda: mark_stopped(self.folder, self.state))
                sinks.ended(
                    "stopped",
                    self.state,
                    f"stopped on request after step {step}; the same command resumes",
                )
                return STOPPED
        state = self.state
        tokens = log.human(state.tokens)
        sinks.ended("done", state, f"done: {state.step} steps, {tokens} tokens, in {self.folder}")
        return DONE

    def step(self) -> None:
        """Train on the next batch, if the guard lets it."""
        cfg, world, state = self.cfg, self.world, self.state
        start = monotonic()
        if self.tried is None:  # the device has nothing to do
            self.since = start
        self.watchdog.enter("batch" if self.has_stepped else "start", state.step)
        lr = lr_at(state.step, cfg.steps, cfg.optim.lr, self.schedule)
        set_lr(self.optimizer, lr)
        n_rows = cfg.batch_at(state.step)
        if n_rows != self.n_rows:  # the batch has grown
            self.batches.close()
            self.batches = self.batches_from_here()
        batch = next(self.batches)
        while self.guard.leaves_out(batch.first_index, n_rows):
            batch = next(self.batches)
        for message in share_bad_shards(self.stream, world):
            self.sinks.say(f"step {state.step}: left out: {message}")
        agreed = agree_on(batch, self.layout.sizes, bool(self.place.lost))
        if agreed.place_lost:  # all that follows would be thrown away
            why = self.place.lost or "as rank 0 has found"
            raise SharedError(lost_message(self.place.root, why))
        data_wait = monotonic() - start
        laps = Laps(world.device)

        self.watchdog.enter("step" if self.has_stepped else "start", state.step)
        sums = forward_backward(
            self.model,
            batch,
            cfg.micro_batches(self.layout.sizes.data_ranks, state.step),
            cfg.loss,
            world,
            self.layout.sizes,
            agreed.n_targets,
            self.stream.names,
            reduce_each=cfg.parallel.reduce_every_micro_batch,
            stop_requested=lambda: self.stop.requested,
        )
        laps.lap("forward_backward")
        squares = None
        if every(cfg.log.norms_every, state.step + 1):  # before the gradient is clipped
            squares = Readback(squared_norms(self.model))
        grad_norm = clip_gradients(self.model, cfg.optim.grad_clip)
        laps.lap("clip")
        numbers = torch.cat((grad_norm.reshape(1), sums))
        first, checksum = batch.first_index, agreed.checksum
        after = TrainState(
            step=state.step + 1,
            tokens=state.tokens + n_rows * cfg.data.seq_len,
            next_sample=first + n_rows,
        )
        read = Readback(numbers)
        tried = Tried(state, after, first, n_rows, lr, checksum, data_wait, laps, read, squares)
        found = None
        if self.brake is not None:
            self.brake.look(numbers[:2])  # what the guard will look at
        else:
            found = tried.found(self.stream.names)
            if not self.judge(tried, found):
                return
        for optimizer in self.optimizer:
            optimizer.step()
        self.model.zero_grad()
        self.state = after
        self.averages.update(after.step)
        laps.lap("optimizer")
        self.has_stepped = True
        if found is None:  # the device has this step to do: time to hear of the last
            self.settle()
            self.tried = tried
        else:
            self.report(tried, found)

    def judge(self, tried: Tried, found: Found) -> bool:
        """Whether the batch is used, by its numbers; else all is as it was before, or earlier."""
        losses, grad_norm = found
        self.stop_wanted |= losses.stop_wanted
        verdict = self.guard.judge(
            tried.before.step, tried.first_sample, tried.n_rows, losses.ce, grad_norm
        )
        if verdict.event == "rewind":
            self.rewind()
        self.sinks.judged(tried.before if verdict.event != "rewind" else self.state, verdict)
        if verdict.event in ("left out", "rewind"):
            self.model.zero_grad()
            return False
        return True

    def settle(self) -> None:
        """Read what the last step found, if nobody did: judge it late, and report it.

        Before anything that lasts: no checkpoint holds a step that was not judged.
        """
        tried, self.tried = self.tried, None
        if tried is not None:
            found = tried.found(self.stream.names)
            self.judge(tried, found)  # raises, or has the batch used: it is `may_judge_late`
            self.report(tried, found)

    def report(self, tried: Tried, found: Found) -> None:
        """Tell of a step. It took from the arrival of the numbers before its own to theirs.

        Where none were on their way, from its own start: validations and saves are left out.
        """
        now = monotonic()
        seconds, self.since = now - self.since, now
        losses, grad_norm = found
        norms = None
        if tried.squares is not None:
            norms = norms_of(tried.squares.numbers(), parts_of(self.model))
        self.sinks.step(
            tried.after,
            losses,
            tried.checksum,
            grad_norm,
            tried.lr,
            seconds,
            tried.data_wait,
            tried.laps,
            norms,
            self.stream,
        )

    def rewind(self) -> None:
        """Back to the newest checkpoint, as if the run had been launched again."""
        self.batches.close()
        with self.watchdog.watch("save"):
            self.sinks.saved(self.saver.finish())
            commit = checkpoint.latest_checkpoint(self.place)
            if commit is None:
                raise RunError(f"{self.place.root}: no checkpoint is whole: nothing to rewind to")
            self.load(commit)
            self.begin_averages()
        self.guard = self.guard.rewound(self.state.guard, self.state.next_sample, commit.path)
        self.batches = self.batches_from_here()
        self.sinks.rewind(self.state)

    def load(self, commit: Commit) -> None:
        """The weights, the optimizer, the averages and the state of a checkpoint."""
        kept = self.averages.of_checkpoint(commit)
        self.state = checkpoint.load_checkpoint(commit, self.model, self.optimizer, kept)

    def begin_averages(self) -> None:
        """Those that no checkpoint gave begin with the weights here."""
        for message in self.averages.begin(self.state.step):
            self.sinks.say(message)

    def save(self, must_succeed: bool) -> None:
        """A checkpoint of the present state; waited for if it `must_succeed`, or before a stop."""
        self.settle()
        must_succeed |= self.stop_wanted
        documents = {
            run_files.CONFIG: run.resolved_yaml(self.cfg),
            run_files.MODEL: run.model_json(self.cfg.model.architecture),
            **self.tokenizer,
        }
        facts = data_facts(self.stream) | ({"init_from": self.origin} if self.origin else {})
        facts |= {"attention": self.attention.name}
        facts |= self.averages.facts()
        state = replace(self.state, guard=self.guard.state())
        with self.watchdog.watch("save"):
            self.sinks.saved(
                self.saver.start(
                    self.model,
                    self.optimizer,
                    state,
                    documents=documents,
                    facts=facts,
                    averages=self.averages.tensors(),
                )
            )
            if must_succeed:
                self.sinks.saved(self.saver.finish(must_succeed))

    def validate(self) -> None:
        """The loss on every validation set, of the weights and of their averages; samples."""
        self.settle()
        self.validate_weights()
        self.sample()
        for average in self.averages.updated:
            with self.averages.in_place(average):
                self.validate_weights(f"/{average}")

    def sample(self) -> None:
        """The texts of eval.samples. A model that gives none does not end the run."""
        dtype = DTYPES[self.cfg.parallel.precision]
        with self.watchdog.watch("validation"):
            try:
                texts = self.evals.sampler.texts(self.model, dtype, self.watchdog.beat)
            except RunError as e:  # all ranks alike
                self.sinks.say(f"step {self.state.step}: no samples: {e}")
                return
        self.sinks.samples(self.state, texts)

    def validate_weights(self, suffix: str = "") -> None:
        """The loss of the weights in place; `suffix` follows the source in the metric's name."""
        for name, dataset in self.evals.val_sets.items():
            batches = val_batches(
                dataset,
                seq_len=self.cfg.data.seq_len,
                batch_size=self.cfg.micro_batch_size,
                max_tokens=self.cfg.eval.tokens,
                rank=self.layout.data_rank,
                world_size=self.layout.sizes.data_ranks,
                masks=self.cfg.data,
            )
            begin = monotonic()
            with self.watchdog.watch("validation"):
                watched = self.watchdog.each(batches)
                loss = validation_loss(self.model, watched, self.world.device)
            self.sinks.validation(self.state, name + suffix, loss, monotonic() - begin)

    def evaluate(self) -> None:
        """The tasks of eval.tasks, of the weights and of their averages."""
        self.settle()
        self.evaluate_weights()
        for average in self.averages.updated if self.cfg.eval.tasks.averages else ():
            with self.averages.in_place(average):
                self.evaluate_weights(average)

    def evaluate_weights(self, average: str = "") -> None:
        """The scores of the weights in place. Where there are none the run does not end: the model
        says nothing, or a file has changed since the start."""
        dtype = DTYPES[self.cfg.parallel.precision]
        begin = monotonic()
        with self.watchdog.watch("validation"):
            try:
                found = self.evals.tasks.measure(self.model, dtype, self.watchdog.beat)
            except (RunError, InputError) as e:  # all ranks alike
                self.sinks.say(f"step {self.state.step}: no scores: {e}")
                return
        seconds = monotonic() - begin
        self.sinks.evaluation(self.state, metrics_of(found), problems_of(found), seconds, average)

    def batches_from_here(self) -> Generator[Batch]:
        """This rank's batches from the next sample on, of the size of the next step."""
        self.n_rows = self.cfg.batch_at(self.state.step)
        return train_batches(
            self.stream,
            first_sample=self.state.next_sample,
            global_batch=self.n_rows,
            rank=self.layout.data_rank,
            world_size=self.layout.sizes.data_ranks,
            prefetch=self.cfg.data.prefetch_batches,
            masks=self.cfg.data,
        )

    def close(self) -> None:
        """End the threads, and let a save that is running come to its end."""
        self.profiler.close()
        self.batches.close()
        self.saver.close()
        self.sinks.close()


Found = tuple[Losses, float]
"""losses and gradient norm of a step"""


class Tried(NamedTuple):
    """A step whose numbers may still be on their way from the device."""

    before: TrainState
    after: TrainState
    first_sample: int
    n_rows: int
    lr: float
    checksum: int
    data_wait: float  # s
    laps: Laps
    numbers: Readback  # gradient norm, then those of `forward_backward`
    squares: Readback | None  # of `squared_norms`, at intervals

    def found(self, sources: tuple[str, ...]) -> Found:
        """What came out; waits until it is there."""
        grad_norm, *found = self.numbers.numbers()
        return losses_of(found, sources), grad_norm


def share_bad_shards(stream: TokenStream, world: World) -> list[str]:
    """Tell all ranks of the shards that one of them left out; returns what is new to this one.

    Raises InputError, on every rank, where they are more than data.max_bad_shards.
    """
    if stream.max_bad_shards == 0:
        return []
    mine = dict(stream.bad_shards)  # the thread that reads ahead adds to it
    count = torch.tensor(float(len(mine.keys() - stream.told)))
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
