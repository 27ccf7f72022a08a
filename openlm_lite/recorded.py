"""A run as its files tell it, however far they go: for `openlm runs`, `plot` and `report`.

Nothing here needs torch, asks the network or stops at a damaged file: what cannot be read is left
out and said in `notes`, one line each. The state of a run:

    the lock is held                              running
    stopped.json, or the last event is `stopped`  stopped    on request
    the last event is `failed`                    failed
    `done`, or a checkpoint of the last step      done
    anything else                                 stopped    killed: nobody wrote down an end
    no file of a run                              empty
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from openlm_lite import commit, config, history, run_files, storage
from openlm_lite.errors import InputError
from openlm_lite.model.config import ModelConfig
from openlm_lite.optim.batch_size import BatchSizes, BatchWarmupConfig
from openlm_lite.redact import redacted

State = Literal["running", "stopped", "failed", "done", "empty"]

RECENT_STEPS = 20
"""so many training steps at least are there, if there were so many"""
_TAIL_BYTES = 1 << 17  # some hundred records
_DEPTH = 4  # of run folders below the one that was named
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """The newest one that is committed; its files were not read."""

    path: str
    step: int


@dataclass
class Recorded:
    """See above. What is not known is None, or empty."""

    path: Path
    state: State = "empty"
    why: str = ""
    """how it ended, in a line"""
    notes: list[str] = field(default_factory=list)
    """what could not be read, and why"""
    config: dict[str, Any] = field(default_factory=dict)
    """config.yaml as it stands there, plain values"""
    sizes: Sizes | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    """of metrics.jsonl, all or the last ones; each has a `step`"""
    events: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    changed_at: float | None = None
    """when metrics.jsonl was last written to, or the lock: seconds since 1970"""

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The records of training steps."""
        return [r for r in self.records if "train/loss" in r]

    @functools.cached_property
    def keys(self) -> list[str]:
        """All names that a record has."""
        return sorted({key for record in self.records for key in record})


@dataclass(frozen=True)
class Sizes:
    """What follows from a run's config."""

    total_steps: int
    total_tokens: int
    n_params: int
    flops_per_token: int


def find_runs(folder: Path) -> list[Path]:
    """`folder`, if it is a run's; else all run folders below it, in the order of their paths.

    An empty folder directly below counts as one. Raises InputError where `folder` is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that holds run folders")
    if is_run(folder):
        return [folder]
    return sorted(_runs_below(folder, _DEPTH))


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            children = [Path(e.path) for e in entries if e.is_dir() and e.name[0] != "."]
    except OSError:
        return
    for child in children:
        if is_run(child) or (depth == _DEPTH and _is_empty(child)):
            yield child
        elif depth > 1:
            yield from _runs_below(child, depth - 1)


def is_run(folder: Path) -> bool:
    """Whether a run has left something there: what a checkpoint or a dataset has is not enough."""
    if any(
        (folder / name).is_file()
        for name in (run_files.METRICS, run_files.EVENTS, run_files.STOPPED)
    ):
        return True
    if (folder / commit.COMMIT_NAME).exists():
        return False  # it has a config.yaml, too
    has_steps = bool(commit.step_folders(str(folder)))  # a checkpoint.dir, which is locked too
    return ((folder / run_files.LOCK).is_file() and not has_steps) or _is_run_config(folder)


def _is_run_config(folder: Path) -> bool:
    return (folder / run_files.CONFIG).is_file() and (folder / run_files.CHECKPOINTS).is_dir()


def _is_empty(folder: Path) -> bool:
    try:
        return not os.listdir(folder)
    except OSError:
        return False


def read_run(folder: Path, *, all_records: bool) -> Recorded:
    """The run in `folder`; without `all_records` only the last ones, which is quick.

    Raises InputError where there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a run (its run.dir)")
    run = Recorded(folder)
    running = _is_locked(folder, run.notes)
    run.config = _read_config(folder / run_files.CONFIG, run.notes)
    run.sizes = _sizes_of(run.config, run.notes)
    run.records, run.changed_at = _read_metrics(
        folder / run_files.METRICS, run.notes, running, all_records
    )
    run.events = _read_lines(folder / run_files.EVENTS, run.notes, None, running, "event").records
    if run.changed_at is None and (folder / run_files.LOCK).is_file():
        run.changed_at = (folder / run_files.LOCK).stat().st_mtime
    run.checkpoint = _newest_checkpoint(folder, run)
    run.state, run.why = ("running", "") if running else _ended(run)
    return run


def _ended(run: Recorded) -> tuple[State, str]:
    """The state of a run that no process holds."""
    stopped = run.path / run_files.STOPPED
    since: list[dict[str, Any]] = []  # the last launch; runs of old versions noted the start alone
    for event in run.events:
        since = [event] if event["event"] in history.BEGINNINGS else [*since, event]
    ends = [event for event in since if event["event"] in history.ENDS]
    if stopped.is_file() or (ends and ends[0]["event"] == "stopped"):
        return "stopped", "on request; the same command resumes"
    if ends and ends[0]["event"] == "failed":
        return "failed", str(ends[0].get("error", "no reason was written down"))
    total = run.sizes.total_steps if run.sizes else None
    if ends or (run.checkpoint and run.checkpoint.step == total):
        return "done", ""
    if not is_run(run.path):
        return "empty", "nothing of a run is in this folder"
    if not run.records and all(event["event"] == "launched" for event in run.events):
        return "stopped", "ended before its first step"
    return "stopped", "killed, or its machine went down; the same command resumes"


def _is_locked(folder: Path, notes: list[str]) -> bool:
    """Whether a process holds the run: its lock is tried for a moment (`take_lock` waits so long).

    The lock is a shared one, so that two who look do not take each other for a run.
    """
    try:
        with (folder / run_files.LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as e:
        notes.append(f"{run_files.LOCK}: cannot be tried ({e.strerror}): it may be running")
    return False


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
        if len(text) > _MAX_CONFIG_BYTES:
            raise InputError(f"is larger than {_MAX_CONFIG_BYTES} bytes")
        plain = config.parse_yaml(text.decode(), path.name)
    except FileNotFoundError:
        notes.append("config.yaml is missing")
        return {}
    except (OSError, InputError, UnicodeDecodeError) as e:
        notes.append(f"config.yaml cannot be read: {one_line(e)}")
        return {}
    if not isinstance(plain, dict):
        notes.append(f"config.yaml holds a {type(plain).__name__}, not a run's settings")
        return {}
    return plain


def _sizes_of(plain: Mapping[str, Any], notes: list[str]) -> Sizes | None:
    """Steps, tokens, parameters: as far as this version knows the fields that decide on them."""
    if not plain:
        return None
    known = {f.name for f in fields(ModelConfig)}
    try:
        given = dict(plain["model"])
        given.pop("init_from", None)
        if unknown := sorted(map(str, given.keys() - known)):
            notes.append(f"config.yaml: model.{unknown[0]}: of another version of openlm_lite?")
            given = {k: v for k, v in given.items() if k in known}
        model = config.decode(ModelConfig, config.to_tree(given, run_files.CONFIG))
        warmup = plain.get("batch_warmup") or {}
        batches = BatchSizes.of(
            int(plain["global_batch_tokens"]),
            BatchWarmupConfig(warmup.get("start_tokens"), int(warmup.get("tokens", 0))),
        )
        steps = plain.get("total_steps")
        steps = batches.steps_for(int(plain["total_tokens"])) if steps is None else int(steps)
        return Sizes(
            total_steps=steps,
            total_tokens=batches.before(steps),
            n_params=model.n_params,
            flops_per_token=model.flops_per_token(int(plain["data"]["seq_len"])),
        )
    except (InputError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        what = f"no {e}" if isinstance(e, KeyError) else one_line(e)
        notes.append(f"config.yaml: its sizes are not known ({what})")
        return None


class _Lines(NamedTuple):
    records: list[dict[str, Any]]
    changed_at: float | None
    is_whole: bool


def _read_metrics(
    path: Path, notes: list[str], running: bool, all_records: bool
) -> tuple[list[dict[str, Any]], float | None]:
    """All records; or the last ones, as far back as RECENT_STEPS of training, and the time."""
    n_bytes = None if all_records else _TAIL_BYTES
    while True:
        said: list[str] = []
        found = _read_lines(path, said, n_bytes, running, "step")
        n_steps = sum("train/loss" in record for record in found.records)
        if n_bytes is None or found.is_whole or n_steps >= RECENT_STEPS:
            notes += said
            return found.records, found.changed_at
        n_bytes *= 4  # many validations, or long texts, since the last step


def _read_lines(
    path: Path, notes: list[str], tail_bytes: int | None, running: bool, key: str
) -> _Lines:
    """The objects of a file of lines that have what `key` has to be, and when it was changed."""
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            start = 0 if tail_bytes is None else max(0, stat.st_size - tail_bytes)
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return _Lines([], None, True)
    except OSError as e:
        notes.append(f"{path.name} cannot be read: {e.strerror}")
        return _Lines([], None, True)
    *lines, last = content.split(b"\n")
    if start:
        lines = lines[1:]  # where it began is somewhere in a line
    records: list[dict[str, Any]] = []
    n_bad = 0
    for line in lines:
        if line.strip():
            record = _record(line, key)
            if record is None:
                n_bad += 1
            else:
                records.append(record)
    if last.strip() and not running:  # a running one may be writing it
        notes.append(f"{path.name} ends in the middle of a line, which is left out")
    if n_bad:
        lines_are = "line is" if n_bad == 1 else "lines are"
        notes.append(f"{path.name}: {n_bad} {lines_are} no record, and left out")
    return _Lines(records, stat.st_mtime, start == 0)


def _record(line: bytes, key: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    if not isinstance(record, dict):
        return None
    wanted = int if key == "step" else str
    return record if type(record.get(key)) is wanted else None


def _newest_checkpoint(folder: Path, run: Recorded) -> Checkpoint | None:
    """On this machine: the newest folder that is committed. At a URL: the last one that was said.

    A URL is not asked: a table of runs must not wait for a store.
    """
    section = run.config.get("checkpoint")
    given = section.get("dir") if isinstance(section, dict) else None
    root = str(folder / run_files.CHECKPOINTS) if not isinstance(given, str) else given
    if storage.is_remote(root):
        for event in reversed(run.events):
            path, step = event.get("path"), event.get("step")
            if event["event"] == "saved" and isinstance(path, str) and type(step) is int:
                return Checkpoint(path, step)
        return None
    try:
        paths = commit.step_folders(storage.local_path(root))
    except (OSError, InputError) as e:
        run.notes.append(f"checkpoints cannot be read: {one_line(e)}")
        return None
    for path in paths:
        try:
            return Checkpoint(path, commit.read_commit(path).step)
        except (commit.DamagedError, InputError, OSError) as e:
            run.notes.append(f"{os.path.basename(path)}: {one_line(e)}")
    return None


def number(record: Mapping[str, Any], key: str) -> float | None:
    """The record's value, if it is a finite number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if abs(value) < float("inf") else None  # false of NaN, too


def one_line(text: object, limit: int = 300) -> str:
    """`text` for a table, a title: no credentials, one line, nothing that a terminal obeys."""
    line = printable(" ".join(redacted(str(text)).split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def ago(seconds: float) -> str:
    """75 -> 1 min"""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
