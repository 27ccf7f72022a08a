"""Weights & Biases and TensorBoard beside `metrics.jsonl`: they never slow or stop a run.

    training loop --record()--> queue --> thread --> process of its own --> W&B server
                       |                  (wandb_sink)  (wandb_process)
                       +------> queue --> thread --> tensorboard/events.out.tfevents.…

Neither is needed: `metrics.jsonl` has every record, and is written first. So a full queue leaves
records out and counts them, an error turns its sink off with one warning, and `close` waits for a
few seconds only. Where a W&B server cannot be reached at the start, the records go to a folder for
`wandb sync`.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from openlm_lite.errors import InputError
from openlm_lite.wandb_sink import WandbConfig, WandbSink, check_wandb, is_installed

logger = logging.getLogger("openlm_lite")

QUEUE_RECORDS = 10_000
"""that may wait for one sink; about 10 MB"""
CLOSE_SECONDS = 5.0
"""that the end of a run waits for its sinks, all together"""


@dataclass(frozen=True)
class TelemetryConfig:
    """Where records go beside `metrics.jsonl`."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    """event files in `tensorboard/` of the run's folder"""


def check(cfg: TelemetryConfig) -> None:
    """Raises InputError where a sink that was asked for lacks its package or its credentials."""
    if cfg.tensorboard and not is_installed("tensorboard"):
        raise InputError(
            'log.tensorboard needs tensorboard: pip install "openlm-lite[tensorboard]"'
        )
    check_wandb(cfg.wandb)


class Telemetry:
    """The sinks that a config asks for, each behind a queue and a thread of its own."""

    def __init__(
        self,
        cfg: TelemetryConfig,
        run_folder: Path,
        run_name: str,
        config_tree: Mapping[str, Any],
        resume_step: int,
    ) -> None:
        """Start them; returns at once.

        Args:
            run_folder: exists; gets `wandb/` and `wandb_id`, `tensorboard/`.
            run_name: for the server, where the config has none.
            config_tree: plain values (`config.to_plain`), sent as they are: without secrets.
            resume_step: the step that the run goes on from; -1 at its start.
        """
        sinks: list[Sink] = []
        if cfg.wandb.project is not None:
            sinks.append(WandbSink(cfg.wandb, run_folder, run_name, config_tree))
        if cfg.tensorboard:
            sinks.append(TensorBoardSink(run_folder / "tensorboard", resume_step))
        self._feeders = [Feeder(sink) for sink in sinks]
        for feeder in self._feeders:
            feeder.start()

    @property
    def dropped(self) -> int:
        """Records that a sink was too slow for; `metrics.jsonl` has them."""
        return sum(feeder.dropped for feeder in self._feeders)

    def record(self, record: Mapping[str, Any]) -> None:
        """Pass on one record of `metrics.jsonl` (it has `step` and `tokens`); never blocks."""
        for feeder in self._feeders:
            feeder.put(dict(record))

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let the sinks finish, for `seconds` in all; then stop them, with a warning."""
        deadline = time.monotonic() + seconds
        for feeder in self._feeders:
            feeder.finish()
        for feeder in self._feeders:
            feeder.end(deadline)


class Sink(Protocol):
    """Called from one thread, `kill` aside; what it raises turns it off."""

    name: str

    def open(self, closing: threading.Event) -> None:
        """`closing` is set when the run ends, perhaps before this is done."""
        ...

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """All that was written is to arrive."""
        ...

    def release(self) -> None:
        """Let go of everything; the last call."""
        ...

    def kill(self) -> None:
        """From another thread: make the call that is under way end, if it can be; at once."""
        ...


class Feeder(threading.Thread):
    """One sink, its queue, and the thread that carries records from one to the other."""

    def __init__(self, sink: Sink) -> None:
        super().__init__(name=f"telemetry-{sink.name}", daemon=True)
        self.sink = sink
        self.queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.closing, self.off = threading.Event(), threading.Event()
        self.dropped = 0

    def put(self, record: dict[str, Any]) -> None:
        if self.off.is_set():
            return
        if self.queue.qsize() < QUEUE_RECORDS:
            self.queue.put(record)
            return
        self.dropped += 1
        if self.dropped == 1:
            logger.warning(
                "%s: too slow, some records are left out (metrics.jsonl has all)", self.sink.name
            )

    def run(self) -> None:
        # Stop requests are for the main thread. A process that is started here inherits the mask,
        # and so outlives what a job's end sends to all of its processes: it ends with the run.
        stop_signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
        try:
            self.sink.open(self.closing)
            while (record := self.queue.get()) is not None:
                self.sink.write(record)
            self.sink.close()
        except Exception as e:
            self.turn_off(f"turned off: {e}")
        finally:
            self.sink.release()

    def turn_off(self, why: str) -> None:
        """No more records; one warning, the first."""
        if not self.off.is_set():
            self.off.set()
            logger.warning("%s: %s (metrics.jsonl has all records)", self.sink.name, why)

    def finish(self) -> None:
        self.closing.set()
        self.queue.put(None)

    def end(self, deadline: float) -> None:
        self.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive():
            self.turn_off("not finished in time, and left so")
            self.sink.kill()
            self.join(1.0)  # a write that hangs in the kernel stays behind: the thread is a daemon
        if self.dropped:
            logger.warning("%s: %d records were left out", self.sink.name, self.dropped)


class TensorBoardSink:
    """One event file per start of a run.

    TensorBoard's own writers do the same with a thread inside, which dies of a full disk with a
    traceback of its own and is heard of only at the next record.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, resume_step: int) -> None:
        self.folder, self.last_step = folder, resume_step
        self.writer: Any = None

    def open(self, closing: threading.Event) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.writer = RecordWriter((self.folder / name).open("xb"))
        self._event(file_version="brain.Event:2")
        self._forget_after(self.last_step)

    def write(self, record: dict[str, Any]) -> None:
        if record["step"] < self.last_step:  # the run went back to a checkpoint
            self._forget_after(record["step"] - 1)
        self.last_step = record["step"]
        values = [
            {"tag": tag, "simple_value": value}
            for tag, value in record.items()
            if tag != "step" and isinstance(value, int | float)
        ]
        self._event(step=record["step"], summary={"value": values})

    def _forget_after(self, step: int) -> None:
        """Have TensorBoard drop what it read of later steps: they are trained again."""
        self._event(step=step + 1, session_log={"status": "START"})

    def _event(self, **fields: Any) -> None:
        from tensorboard.compat.proto import event_pb2

        # the class is made at import, where a type checker does not see it
        event = event_pb2.Event(wall_time=time.time(), **fields)  # pyright: ignore
        self.writer.write(event.SerializeToString())
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

    def release(self) -> None:
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()

    def kill(self) -> None:
        pass
