"""Timed training steps of a recipe: the loop's own step, without folder, log and checkpoints.

Two passes. The first is the step as it runs in training, where the host does not wait for the
device: it gives the rates. In the second, each phase is waited for: it tells what takes the time,
and is somewhat slower in all.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from openlm_lite import dist
from openlm_lite.data.sources import open_sources, open_stream
from openlm_lite.data.stream import Batch, train_batches
from openlm_lite.dist import World
from openlm_lite.errors import InputError
from openlm_lite.float8 import check_float8
from openlm_lite.host_memory import keep_freed_memory
from openlm_lite.layout import Layout
from openlm_lite.metrics import device_name, peak_flops, throughput
from openlm_lite.optim.build import clip_gradients
from openlm_lite.profile import start_trace, write_trace
from openlm_lite.readback import Readback, reads_late
from openlm_lite.run import RunConfig
from openlm_lite.step import (
    Collect,
    agree_on,
    attention_of,
    build,
    collected_between_steps,
    forward_backward,
    make_deterministic,
)

_DOCUMENT_TOKENS = 1000  # the mean of a made-up document, about that of pages of the web


def bench(
    cfg: RunConfig,
    *,
    steps: int = 10,
    warmup: int = 3,
    real_data: bool = False,
    trace: str | None = None,
) -> dict[str, Any]:
    """Train `warmup` + 2 x `steps` steps of the full batch; plain values, empty but on rank 0.

    Raises InputError as `train` does, before anything is built.
    """
    if steps < 1 or warmup < 0:
        raise InputError(f"--steps {steps} --warmup {warmup}: at least 1 and 0")
    if trace is not None and not trace.endswith((".json", ".json.gz")):
        raise InputError(f"--trace {trace}: must end with .json or .json.gz")
    cfg.check_layout(dist.launched()[1])
    check_float8(cfg.parallel.float8, cfg.run.device)
    with ExitStack() as at_end:
        make_deterministic(cfg)
        sources = open_sources(cfg.data, cfg.model.vocab_size)[0] if real_data else None
        world = dist.init(cfg.run.device)
        if world.device.type == "cpu":
            keep_freed_memory()
        at_end.callback(dist.close)
        stepper = Stepper(cfg, world)
        if sources is None:
            batches = synthetic_batches(cfg, stepper.layout)
        else:
            stream = open_stream(cfg.data, sources, cfg.tokens_at(cfg.steps))
            batches = train_batches(
                stream,
                first_sample=0,
                global_batch=cfg.global_batch,
                rank=stepper.layout.data_rank,
                world_size=stepper.layout.sizes.data_ranks,
                prefetch=cfg.data.prefetch_batches,
                masks=cfg.data,
            )
            at_end.callback(batches.close)
        collect = at_end.enter_context(collected_between_steps())
        for _ in range(warmup):
            stepper.step(next(batches))
        whole, waits = _timed(stepper, batches, steps, collect)
        phases = stepper.phases(batches, steps)
        if trace is not None:
            running = start_trace(world.device)
            stepper.step(next(batches))
            stepper.wait()
            if world.is_main:
                write_trace(running, Path(trace))
            else:
                running.stop()
        return _report(cfg, stepper, whole, waits, phases, real_data) if world.is_main else {}


class Stepper:
    """A model and its optimizer, and the training step of the loop around them."""

    def __init__(self, cfg: RunConfig, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.attention = attention_of(cfg, world.device)
        self.layout, self.model, self.optimizer = build(cfg, world, self.attention)
        self.micro_batches = cfg.micro_batches(self.layout.sizes.data_ranks, cfg.steps)
        self.pending: Readback | None = None
        self.loss = float("nan")
        self.arrived: list[float] = []  # when the numbers of each step were there, by the clock

    def step(self, batch: Batch, lap: Callable[[str], None] = lambda _: None) -> None:
        """One optimizer step; on a GPU its loss is read while the next one is on its way."""
        agreed = agree_on(batch, self.layout.sizes, False)
        lap("agree")
        found = forward_backward(
            self.model,
            batch,
            self.micro_batches,
            self.cfg.loss,
            self.world,
            self.layout.sizes,
            agreed.n_targets,
            tuple(self.cfg.data.paths),
            reduce_each=self.cfg.parallel.reduce_every_micro_batch,
        )
        lap("forward and backward")
        norm = clip_gradients(self.model, self.cfg.optim.grad_clip)
        lap("clip")
        for optimizer in self.optimizer:
            optimizer.step()
        self.model.zero_grad()
        lap("optimizer")
        numbers = Readback(torch.cat((norm.reshape(1), found)))
        if reads_late(self.world.device):
            self.read()
        self.pending = numbers
        if not reads_late(self.world.device):
            self.read()

    def read(self) -> None:
        """Wait for the step whose numbers are awaited, if there is one."""
        if self.pending is not None:
            self.loss = self.pending.numbers()[1]
            self.arrived.append(time.perf_counter())
            self.pending = None

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def phases(self, batches: Iterator[Batch], steps: int) -> dict[str, float]:
        """Median seconds of each phase, with the device waited for between them."""
        seconds: dict[str, list[float]] = {}
        last = 0.0

        def lap(name: str) -> None:
            nonlocal last
            self.wait()
            now = time.perf_counter()
            seconds.setdefault(name, []).append(now - last)
            last = now

        for _ in range(steps):
            self.wait()
            last = time.perf_counter()
            batch = next(batches)
            lap("data")
            self.step(batch, lap)
        return {name: statistics.median(times) for name, times in seconds.items()}


def synthetic_batches(cfg: RunConfig, layout: Layout) -> Iterator[Batch]:
    """Random tokens without end: four batches in turn, so that making them takes no time.

    With `data.document_masking` in documents of random lengths; of a mixture, rows of each source.
    """
    generator = torch.Generator().manual_seed(layout.data_rank)
    B, T = cfg.global_batch // layout.sizes.data_ranks, cfg.data.seq_len
    sources = len(cfg.data.paths)
    sources_B = torch.arange(B) % sources if sources > 1 else None
    made = []
    for _ in range(4):
        rows = torch.randint(cfg.model.vocab_size, (B, T + 1), generator=generator)
        documents_BT = None
        if cfg.data.document_masking:
            begins_BT = torch.rand(B, T, generator=generator) < 1 / _DOCUMENT_TOKENS
            documents_BT = begins_BT.cumsum(dim=1, dtype=torch.int32)
        tokens_BT, targets_BT = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        made.append(Batch(tokens_BT, targets_BT, documents_BT, 0, sources_B))
    return itertools.cycle(made)


def _timed(
    stepper: Stepper, batches: Iterator[Batch], steps: int, collect: Collect
) -> tuple[list[float], list[float]]:
    """Seconds of each step, and those that it waited for its data.

    A step takes from the end of the one before to its own, as the device has it: the host hands
    the next one over meanwhile.
    """
    waits = []
    stepper.read()
    stepper.wait()
    stepper.arrived.clear()
    begin = time.perf_counter()
    for i in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        stepper.step(batch)
        collect(i + 1, False)
    stepper.read()
    return [b - a for a, b in itertools.pairwise([begin, *stepper.arrived])], waits


def _report(
    cfg: RunConfig,
    stepper: Stepper,
    whole: list[float],
    waits: list[float],
    phases: dict[str, float],
    real_data: bool,
) -> dict[str, Any]:
    world, device = stepper.world, stepper.world.device
    flops_per_token = cfg.model.flops_per_token(cfg.data.seq_len)
    tokens = cfg.global_batch_tokens
    rates = throughput(tokens * len(whole), sum(whole), world.world_size, flops_per_token, device)
    return {
        "device": device_name(device),
        "world_size": world.world_size,
        "torch": torch.__version__,
        "n_params": cfg.model.n_params,
        "seq_len": cfg.data.seq_len,
        "tokens_per_step": tokens,
        "micro_batches": stepper.micro_batches,
        "precision": cfg.parallel.precision,
        "compile": cfg.parallel.compile,
        "attention": stepper.attention.name,
        "data": "real" if real_data else "synthetic",
        "steps": len(whole),
        "seconds_median": statistics.median(whole),
        "seconds_min": min(whole),
        "seconds_max": max(whole),
        **rates,
        "flops_per_token": flops_per_token,
        "flops_formula": "6 (block matrices + output head) + 12 n_layers n_heads head_dim seq_len",
        "tflops_per_second_per_device": rates["perf/tokens_per_second_per_gpu"]
        * flops_per_token
        / 1e12,
        "peak_flops_of_device": peak_flops(device),
        "data_wait_share": sum(waits) / sum(whole),
        "phases_seconds": phases,
        "loss_of_last_step": stepper.loss,
    }
