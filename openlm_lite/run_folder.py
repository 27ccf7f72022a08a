"""The folder of a run: free for it or refused, locked, described.

One run per folder, and per place of checkpoints: the lock of a folder is the kernel's, which frees
it however the process ends; that of a URL is in remote_lock.py.

    run.dir           checkpoint.dir      what the run is compared with
    has metrics       as then             config.yaml of run.dir
    has metrics       another one         … and of the newest checkpoint, which has to be there
    empty, absent     has checkpoints     config.yaml of the newest checkpoint (another machine)
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from openlm_lite import dist, history, log, object_store, run, run_files, storage, telemetry
from openlm_lite.checkpoint_place import Place, place_of, root_of
from openlm_lite.commit import Commit, DamagedError, TrainState
from openlm_lite.data.sources import check_same_data
from openlm_lite.data.stream import TokenStream
from openlm_lite.data.tokenizer import TOKENIZER_NAMES
from openlm_lite.errors import InputError, RelayedError, SharedError
from openlm_lite.remote_lock import RemoteLock, this_process
from openlm_lite.run import RunConfig
from openlm_lite.same_run import check_same_run


def checkpoints_of(cfg: RunConfig, folder: Path) -> str:
    """Where the run's checkpoints are kept, a path or a URL."""
    root = root_of(cfg.checkpoint.dir, str(folder))
    return object_store.check_url(root) if storage.is_remote(root) else storage.local_path(root)


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
            locks.append(take_lock(folder, "run.dir"))
        except OSError as e:
            raise InputError(f"run.dir: {folder} cannot be used: {e.strerror}") from None
        history.note(folder, "launched")  # an error from here on is of this launch, not of the last
        if storage.is_remote(root):
            lock = RemoteLock(root, this_process(str(folder)))
            lock.take()
            remote_locks.append(lock)
        else:
            try:
                os.makedirs(root, exist_ok=True)
                if not os.path.samefile(root, folder):
                    locks.append(take_lock(Path(root), "checkpoint.dir"))
            except OSError as e:
                raise InputError(f"checkpoint.dir: {root} cannot be used: {e.strerror}") from None
        # again: another run may have been quicker
        changes = check_folder(cfg, folder, stream, allow_change)
        (folder / run_files.STOPPED).unlink(missing_ok=True)
        storage.write_bytes(str(folder / run_files.CONFIG), run.resolved_yaml(cfg).encode())
        for name in TOKENIZER_NAMES:
            source = f"{stream.sources[0].dataset.folder}/{name}"
            if storage.exists(source):
                storage.write_bytes(str(folder / name), storage.read_bytes(source))
        log.setup_console(folder / run_files.log_of(0))
        for change in changes:
            log.logger.warning("changed on resume: %s", change)

    claimed = False
    try:
        dist.on_main(claim)
        claimed = True
        if dist.rank() > 0:
            log.setup_console(folder / run_files.log_of(dist.rank()), dist.rank())
        yield place_of(root, str(folder / run_files.CHECKPOINTS), next(iter(remote_locks), None))
    except Exception as e:
        if locks or (claimed and not isinstance(e, SharedError | RelayedError)):
            error = f"{type(e).__name__}: {e}"
            log.logger.error("ended by %s", error)
            history.note(folder, "failed", error=error, rank=dist.rank())
        raise
    finally:
        for lock in remote_locks:
            lock.release()
        log.close_console()
        for lock in locks:
            lock.close()
        dist.close()


def is_beginning(path: Path, root: str) -> bool:
    """What a run that was killed before its config.yaml was there may have left.

    With its checkpoints (`root`), which the run is compared with.
    """
    if Path(os.path.abspath(root)).is_relative_to(os.path.abspath(path)):
        return True
    name = path.name
    if name in (run_files.LOCK, run_files.EVENTS) or run_files.is_log(name):
        return True
    return name.startswith(".") and run_files.CONFIG in name


def mark_stopped(folder: Path, state: TrainState) -> None:
    """Leave word, for whoever launches runs, that this one stopped on request and is saved."""
    try:
        storage.write_json(
            str(folder / run_files.STOPPED), {"step": state.step, "tokens": state.tokens}
        )
    except OSError as e:  # a full disk; the checkpoint may be elsewhere, the exit code tells too
        log.logger.warning("%s: not written: %s", folder / run_files.STOPPED, e)


def check_folder(
    cfg: RunConfig, folder: Path, stream: TokenStream, allow_change: Sequence[str] = ()
) -> list[str]:
    """What differs, with permission, from the run in `folder` and its checkpoints, as texts.

    Raises InputError if the folder, or the place of the checkpoints, is not free for this run.
    """
    root = checkpoints_of(cfg, folder)
    for name, path in (("run.dir", str(folder)), ("checkpoint.dir", root)):
        if os.path.exists(path) and not os.path.isdir(path):
            raise InputError(f"{name}: {path} is a file, not a folder")
    old_config, metrics_file = folder / run_files.CONFIG, folder / run_files.METRICS
    started = moved = False
    changes: list[str] = []
    if old_config.is_file():
        started = metrics_file.is_file() and metrics_file.stat().st_size > 0
        if started:
            there = run.load_run(str(old_config))
            changes += check_same_run(cfg, there, str(folder), "run.dir", allow_change)
            moved = checkpoints_of(there, folder) != root
    elif folder.exists():
        others = sorted(p.name for p in folder.iterdir() if not is_beginning(p, root))
        if others:
            raise InputError(
                f"run.dir: {folder} holds other things ({', '.join(others[:5])}) and no run; "
                "name a new folder"
            )
    place = place_of(root, str(folder / run_files.CHECKPOINTS))
    newest = newest_readable(place, with_config=moved or not started)
    if newest is not None:
        commit, text = newest
        if text is not None:
            setting = "checkpoint.dir" if cfg.checkpoint.dir else "run.dir"
            there = run.parse_run(text, f"{commit.path}/config.yaml")
            changes += check_same_run(cfg, there, commit.path, setting, allow_change)
        changes += check_same_data(commit.facts, stream, allow_change)
    elif moved:
        check_nothing_left_behind(checkpoints_of(there, folder), root)
    return list(dict.fromkeys(changes))


def newest_readable(place: Place, with_config: bool) -> tuple[Commit, str | None] | None:
    """The newest commit there, and its config.yaml; one that is damaged is put aside later on."""
    for path in place.steps():
        try:
            commit = place.commit_of(path)
            return commit, place.document(commit, run_files.CONFIG) if with_config else None
        except DamagedError:
            continue
    return None


def check_nothing_left_behind(old_root: str, root: str) -> None:
    """A run whose checkpoints lie elsewhere would begin anew, and its metrics with it."""
    if steps := place_of(old_root).steps():
        raise InputError(
            f"checkpoint.dir: no checkpoint is in {root}, but this run has some in {old_root} "
            f"(the newest is {steps[0]}); copy that folder to {root}, go back to "
            f"checkpoint.dir={old_root}, or set run.dir to a new folder to train from the start"
        )


def take_lock(folder: Path, setting: str) -> IO[str]:
    """Hold `folder`/lock until the file is closed or the process dies, however it dies.

    setting: run.dir or checkpoint.dir, for the messages. Raises InputError where it is held.
    """
    file = (folder / run_files.LOCK).open("a+", encoding="utf-8")
    try:
        _lock(file)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise InputError(
            f"{setting}: {folder} is in use by another run ({owner}); stop it or use another folder"
        ) from None
    except OSError as e:
        file.close()
        raise InputError(
            f"{setting}: {folder} cannot be locked ({e.strerror}); use a file system that has "
            "flock (Lustre: mounted with -o flock)"
        ) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file


def _lock(file: IO[str]) -> None:
    """Raises BlockingIOError where another process has it, and not only to look (recorded.py)."""
    for _ in range(10):
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.02)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
