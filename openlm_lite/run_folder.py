"""The folder of a run: free for it or refused, locked, described.

One run per folder: the lock is the kernel's, which frees it however the process ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from openlm_lite import dist, log, run, storage
from openlm_lite.commit import DamagedError, read_commit, step_folders
from openlm_lite.data.sources import check_same_data
from openlm_lite.data.stream import TokenStream
from openlm_lite.errors import InputError
from openlm_lite.run import RunConfig


@contextmanager
def run_folder(cfg: RunConfig, folder: Path, stream: TokenStream) -> Iterator[dist.StopRequest]:
    """The folder made, locked and described by rank 0; let go of, with the group, at the end."""
    locks: list[IO[str]] = []

    def claim() -> None:
        check_folder(cfg, folder, stream)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locks.append(take_lock(folder))
        except OSError as e:
            raise InputError(f"run.dir: {folder} cannot be used: {e.strerror}") from None
        check_folder(cfg, folder, stream)  # again: another run may have been quicker
        storage.write_bytes(str(folder / "config.yaml"), run.resolved_yaml(cfg).encode())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            source = f"{stream.sources[0].dataset.folder}/{name}"
            if storage.exists(source):
                storage.write_bytes(str(folder / name), storage.read_bytes(source))
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


def is_beginning(name: str) -> bool:
    """What a run that was killed before its config.yaml was there may have left."""
    return name in ("lock", "log.txt") or (name.startswith(".") and "config.yaml" in name)


def check_folder(cfg: RunConfig, folder: Path, stream: TokenStream) -> None:
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
                check_same_data(read_commit(path).facts, stream)
    elif others := sorted(p.name for p in folder.iterdir() if not is_beginning(p.name)):
        raise InputError(
            f"run.dir: {folder} holds other things ({', '.join(others[:5])}) and no run; "
            "name a new folder"
        )


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
