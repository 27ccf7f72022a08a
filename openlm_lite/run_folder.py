"""The folder of a run: free for it or refused, locked, described.

One run per folder: the lock is the kernel's, which frees it however the process ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from openlm_lite import dist, log, object_store, run, storage, telemetry
from openlm_lite.checkpoint_place import Place, place_of
from openlm_lite.commit import DamagedError, TrainState
from openlm_lite.data.sources import check_same_data
from openlm_lite.data.stream import TokenStream
from openlm_lite.errors import InputError
from openlm_lite.remote_lock import RemoteLock, this_process
from openlm_lite.run import RunConfig

STOPPED_NAME = "stopped.json"
"""in the folder after a stop on request: the run is to be launched again"""


def checkpoints_of(cfg: RunConfig, folder: Path) -> str:
    """Where the run's checkpoints are kept, a path or a URL."""
    return cfg.checkpoint.dir or str(folder / "checkpoints")


@contextmanager
def run_folder(
    cfg: RunConfig, folder: Path, stream: TokenStream, allow_change: Sequence[str] = ()
) -> Iterator[Place]:
    """The folder made, locked and described by rank 0; let go of, with the group, at the end.

    Gives the place of the checkpoints, which is locked too where it is a URL.
    """
    root = checkpoints_of(cfg, folder)
    locks: list[IO[str]] = []
    remote_locks: list[RemoteLock] = []

    def claim() -> None:
        telemetry.check(cfg.log)
        check_folder(cfg, folder, stream, allow_change)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locks.append(take_lock(folder))
        except OSError as e:
            raise InputError(f"run.dir: {folder} cannot be used: {e.strerror}") from None
        if storage.is_remote(root):
            lock = RemoteLock(object_store.check_url(root), this_process(str(folder)))
            lock.take()
            remote_locks.append(lock)
        # again: another run may have been quicker
        changes = check_folder(cfg, folder, stream, allow_change)
        (folder / STOPPED_NAME).unlink(missing_ok=True)
        storage.write_bytes(str(folder / "config.yaml"), run.resolved_yaml(cfg).encode())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            source = f"{stream.sources[0].dataset.folder}/{name}"
            if storage.exists(source):
                storage.write_bytes(str(folder / name), storage.read_bytes(source))
        log.setup_console(folder / "log.txt")
        for change in changes:
            log.logger.warning("changed on resume: %s", change)

    try:
        dist.on_main(claim)
        yield place_of(root, str(folder / "checkpoints"), next(iter(remote_locks), None))
    except Exception as e:
        if locks:
            log.logger.error("ended by %s: %s", type(e).__name__, e)
        raise
    finally:
        for lock in remote_locks:
            lock.release()
        log.close_console()
        for lock in locks:
            lock.close()
        dist.close()


def is_beginning(name: str) -> bool:
    """What a run that was killed before its config.yaml was there may have left."""
    return name in ("lock", "log.txt") or (name.startswith(".") and "config.yaml" in name)


def mark_stopped(folder: Path, state: TrainState) -> None:
    """Leave word, for whoever launches runs, that this one stopped on request and is saved."""
    storage.write_json(str(folder / STOPPED_NAME), {"step": state.step, "tokens": state.tokens})


def check_folder(
    cfg: RunConfig, folder: Path, stream: TokenStream, allow_change: Sequence[str] = ()
) -> list[str]:
    """What differs, with permission, from the run in `folder`, as texts.

    Raises InputError if the folder is not free for this run.
    """
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise InputError(f"run.dir: {folder} is a file, not a folder")
    changes: list[str] = []
    metrics_file = folder / "metrics.jsonl"
    started = metrics_file.is_file() and metrics_file.stat().st_size > 0
    if (folder / "config.yaml").is_file():
        if started:
            changes += run.check_same_run(cfg, folder, allow_change)
        place = place_of(checkpoints_of(cfg, folder), str(folder / "checkpoints"))
        for path in place.steps()[:1]:
            with suppress(DamagedError):  # latest_checkpoint puts it aside, and tries an older one
                changes += check_same_data(place.commit_of(path).facts, stream, allow_change)
    elif others := sorted(p.name for p in folder.iterdir() if not is_beginning(p.name)):
        raise InputError(
            f"run.dir: {folder} holds other things ({', '.join(others[:5])}) and no run; "
            "name a new folder"
        )
    return changes


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
