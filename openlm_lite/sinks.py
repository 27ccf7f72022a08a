"""What a run says of itself: the console, log.txt and metrics.jsonl."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import openlm_lite
from openlm_lite import config, dist, history, log, metrics, run_files
from openlm_lite.banner import banner_lines
from openlm_lite.commit import TrainState
from openlm_lite.data.stream import TokenStream
from openlm_lite.dist import World
from openlm_lite.guard import Verdict
from openlm_lite.inherit import Record, describe
from openlm_lite.model.kernels import Choice
from openlm_lite.optim.norms import Norms
from openlm_lite.readback import Laps
from openlm_lite.redact import redacted_tree
from openlm_lite.run import RunConfig
from openlm_lite.saver import Saved
from openlm_lite.sensors import Sensors
from openlm_lite.telemetry import Telemetry

_SHOWN = 6  # scores in a line for people
_ESTIMATE_AFTER = 10  # steps: the first ones compile and fill caches


def every(n: int, step: int) -> bool:
    """True at each n-th step; never for n = 0."""
    return n > 0 and step % n == 0


class Losses(NamedTuple):
    """Of one global batch, nats per target."""

    ce: float
    z: float
    """the z-loss as it is added: with its coefficient"""
    by_source: dict[str, float]
    """ce of the rows of each source; empty where there is one"""
    stop_wanted: bool
    """whether any rank was asked to stop before the end of this batch"""


class Sinks:
    """Where rank 0 reports to: console, log.txt and metrics.jsonl. Silent on other ranks."""

    def __init__(self, cfg: RunConfig, folder: Path, world: World) -> None:
        self.cfg, self.folder, self.world = cfg, folder, world
        self.flops_per_token = cfg.model.flops_per_token(cfg.data.seq_len)
        self.seconds_per_token = 0.0
        self.n_steps = 0  # of this process
        self.file: log.MetricsFile | None = None
        self.telemetry: Telemetry | None = None
        self.sensors: Sensors | None = None
        self.laps_before: Laps | None = None  # of the last recorded step
        self.between: dict[str, float] = {}  # seconds between the last step and the next
        self.told: set[tuple[str, str]] = set()  # what was said of tasks without a score
        self.left_out: list[dict[str, Any]] = []  # records of this process

    def open(self, resume_step: int) -> None:
        """Begin to write on rank 0; records after `resume_step` are dropped. Collective.

        Raises InputError where metrics.jsonl cannot be written.
        """
        dist.on_main(lambda: self._open(resume_step))

    def _open(self, resume_step: int) -> None:
        self.file = log.MetricsFile(self.folder / run_files.METRICS, resume_step)
        tree = redacted_tree(config.to_plain(self.cfg))
        self.telemetry = Telemetry(self.cfg.log, self.folder, self.folder.name, tree, resume_step)
        self.sensors = Sensors(self.world.device)
        self.note(
            "start",
            step=max(0, resume_step),
            resumed=resume_step >= 0,
            world_size=self.world.world_size,
            device=metrics.device_name(self.world.device),
            host=os.uname().nodename,
            precision=self.cfg.parallel.precision,
            version=openlm_lite.__version__,
            torch=str(torch.__version__),
        )

    def close(self) -> None:
        if self.sensors is not None:
            self.sensors.close()
        if self.telemetry is not None:
            self.telemetry.close()
        if self.file is not None:
            self.file.close()

    def record(self, record: dict[str, Any]) -> None:
        """One record, into metrics.jsonl first."""
        if self.file is not None and self.telemetry is not None:
            self.file.write(record)
            self.telemetry.record(record)

    def note(self, event: str, **values: Any) -> None:
        """One event of the run's history, with the time of day."""
        if self.file is not None:
            history.note(self.folder, event, **values)

    def ended(self, event: str, state: TrainState, message: str) -> None:
        """The last words: `event` is done or stopped."""
        self.note(event, step=state.step)
        self.say(message)

    def say(self, message: str) -> None:
        if self.file is not None:
            log.logger.info(message)

    def banner(
        self, stream: TokenStream, origin: Record | None, attention: Choice, resume_step: int
    ) -> None:
        """What begins here, or goes on after `resume_step` (-1: from the start)."""
        cfg, world = self.cfg, self.world
        for line in banner_lines(cfg, world, stream, attention):
            self.say(line)
        for start, shares in stream.mixture.describe() if stream.mixture else ():
            listed = ", ".join(f"{name} {share:.6g}" for name, share in shares.items())
            self.say(f"from token {start * cfg.data.seq_len}: {listed}")
        if resume_step >= 0:
            self.say(f"resuming {cfg.run.dir} after step {resume_step}")
        elif origin is not None:
            for line in describe(origin, cfg.model.init_from):
                self.say(line)

    def step(
        self,
        state: TrainState,
        losses: Losses,
        checksum: int,
        grad_norm: float,
        lr: float,
        seconds: float,
        data_wait: float,
        laps: Laps,
        norms: Norms | None,
        stream: TokenStream,
    ) -> None:
        """One record for the file; at intervals one line for people.

        seconds: what the step took, with `data_wait`, its wait for the batch.
        """
        if self.file is None:
            return
        n_tokens = self.cfg.batch_sizes.at(state.step - 1)
        record = {
            "step": state.step,
            "tokens": state.tokens,
            "train/loss": losses.ce,
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            **metrics.throughput(
                n_tokens,
                seconds,
                self.world.world_size,
                self.flops_per_token,
                self.world.device,
            ),
            "perf/data_wait": data_wait,
            **self._seconds(laps),
        }
        if self.cfg.loss.z_loss:
            record["train/z_loss"] = losses.z
        record["data/checksum"] = checksum
        for name, (samples, epochs) in stream.consumed(state.next_sample).items():
            record[f"data/{name}/epoch"] = epochs
            if stream.mixture is not None:
                record[f"data/{name}/tokens"] = samples * self.cfg.data.seq_len
        record |= {f"train/{name}/loss": loss for name, loss in losses.by_source.items()}
        if norms is not None:
            record |= {f"grad_norm/{part}": norm for part, norm in norms.gradients.items()}
            record |= {f"param_norm/{part}": norm for part, norm in norms.parameters.items()}
        shown = every(self.cfg.log.every_steps, state.step) or state.step == self.cfg.steps
        if shown and self.sensors is not None:
            record |= self.sensors.latest
        self.record(record)
        # a moving average over about ten steps, for a calm estimate of the time left
        weight = 0.1 if self.seconds_per_token else 1.0
        self.seconds_per_token += weight * (seconds / n_tokens - self.seconds_per_token)
        self.n_steps += 1
        tokens_left = self.cfg.tokens_at(self.cfg.steps) - self.cfg.tokens_at(state.step)
        left = tokens_left * self.seconds_per_token
        if self.n_steps == _ESTIMATE_AFTER < self.cfg.steps:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left))
            self.say(f"about {log.duration(left)} to go, until {when} (validations come on top)")
        if shown:
            self.say(log.step_line(record, self.cfg.steps, left))
        log.show_progress(record, self.cfg.steps, left)

    def _seconds(self, laps: Laps) -> dict[str, float]:
        """Of the parts of the step, and of what training waited for since the one before.

        A GPU that has not come to the step's end yet is not waited for: those of the step before.
        """
        found = laps.seconds()
        if found is None and self.laps_before is not None:
            found = self.laps_before.seconds()
        seconds, self.between, self.laps_before = {**(found or {}), **self.between}, {}, laps
        return {f"perf/seconds/{name}": one for name, one in seconds.items()}

    def saved(self, saves: Sequence[Saved]) -> None:
        """Tell of checkpoints that are whole by now, and of saves that failed."""
        for save in saves:
            self.between["save"] = self.between.get("save", 0.0) + save.stalled_seconds
            self.note(
                "save failed" if save.problem else "saved",
                step=save.state.step,
                **({"problem": save.problem} if save.problem else {"path": save.path}),
                seconds=round(save.seconds, 3),
                stalled_seconds=round(save.stalled_seconds, 3),
            )
            if save.problem:
                self.say(
                    f"ALARM: the checkpoint of step {save.state.step} could not be saved: "
                    f"{save.problem}; the earlier ones are whole, training goes on"
                )
            else:
                self.say(
                    f"saved {save.path} in {save.seconds:.1f} s (training waited "
                    f"{save.stalled_seconds:.1f} s)"
                )

    def rewind(self, state: TrainState) -> None:
        """Drop the records after the state, as at a resume: those steps are trained again.

        What was left out since then stays left out, and on record: before the first new step.
        """
        if self.file is None:
            return
        self.file.close()
        self.file = log.MetricsFile(self.folder / run_files.METRICS, state.step)
        for event in self.left_out:
            if event["step"] > state.step:
                event |= {"step": state.step + 1, "tokens": state.tokens}
                self.record(event)

    def judged(self, state: TrainState, verdict: Verdict) -> None:
        """What the guard said of a batch, as a record of the step that it was tried for."""
        if self.file is None or not verdict.event:
            return
        found = verdict.record(state.next_sample)
        # + 1, as in the step's own record: a resume at `state` meets the batch again
        record = {"step": state.step + 1, "tokens": state.tokens, **found}
        if verdict.event in ("left out", "rewind"):
            self.left_out.append(record)
        self.record(record)
        first, end = found["guard/first_sample"], found["guard/end_sample"]
        self.say(
            f"step {state.step}: {verdict.event}: samples {first} to {end - 1}: {verdict.reason}"
        )

    def validation(self, state: TrainState, name: str, loss: float, seconds: float) -> None:
        record = {"step": state.step, "tokens": state.tokens, f"val/{name}/loss": loss}
        self.record({**record, "perf/seconds/validation": seconds})
        self.say(f"step {state.step}: val/{name}/loss {loss:.4f}")

    def evaluation(
        self,
        state: TrainState,
        found: Mapping[str, float],
        problems: Mapping[str, str],
        seconds: float,
        average: str = "",
    ) -> None:
        """Scores of tasks. An average's name stands before the last part of a metric's."""
        if average:
            parts = {name: name.rpartition("/") for name in found}
            found = {f"{a}/{average}/{b}": found[name] for name, (a, _, b) in parts.items()}
        record = {"step": state.step, "tokens": state.tokens, **found}
        self.record({**record, "perf/seconds/evaluation": seconds})
        shown = [f"{name} {value:.4f}" for name, value in found.items()]
        more = f", {len(shown) - _SHOWN} more in metrics.jsonl" if len(shown) > _SHOWN else ""
        self.say(f"step {state.step}: {', '.join(shown[:_SHOWN]) or 'no score'}{more}")
        for task, why in problems.items():
            if (task, why) not in self.told:  # a long run says it once
                self.told.add((task, why))
                self.say(f"step {state.step}: no score of {task}: {why}")

    def samples(self, state: TrainState, texts: Sequence[tuple[str, str]]) -> None:
        """Continuations of prompts: all into the file, the first one to people."""
        for prompt, text in texts:
            record = {"step": state.step, "tokens": state.tokens}
            self.record({**record, "sample/prompt": prompt, "sample/text": text})
        for prompt, text in texts[:1]:
            self.say(f"step {state.step}: {' '.join((prompt + text).split())[:100]}")
