"""Where checkpoints are kept: a local folder, or a URL with a local folder to write and read by.

What checkpoint.py asks of both, in the order of a start and of a save (who calls it in brackets):

    prepare       [all]      leftovers of killed saves are removed from `staging`
    start         [rank 0]   once, at the start of a run: … and from the store
    steps         [rank 0]   paths of the checkpoints, newest first, by their names
    bring         [all]      the checkpoint as a local folder, verified together
    document      [anyone]   a small file of the checkpoint, verified
    put_aside     [rank 0]   damaged: no checkpoint any more, nothing of it lost
    make_room     [rank 0]   a step that is not committed: whatever is left of it, out of the way
    share         [all]      what this rank has written, brought to where all ranks have it
    commit        [rank 0]   one atomic step: from here on it is a checkpoint
    discard       [all]      the folder in `staging`, after a save or a failure
    delete        [rank 0]   no longer wanted
    lost          [anyone]   at each step: why nothing may be written there any more
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Protocol

from openlm_lite import commit, dist, object_store, remote_checkpoints, run_files, storage
from openlm_lite.commit import (
    COMMIT_NAME,
    TEMPORARY,
    Commit,
    DamagedError,
    check_contents,
    check_sizes,
    encode_commit,
    read_checked,
    read_commit,
    step_folder_name,
    step_folders,
    write_synced,
)
from openlm_lite.errors import InputError, RunError
from openlm_lite.remote_lock import RemoteLock

_FETCHED = TEMPORARY + "fetched"


class Place(Protocol):
    """See above; `root` and the paths of steps are local paths or URLs, `staging` is local."""

    root: str
    staging: str  # saves are written into folders in it

    @property
    def lost(self) -> str: ...  # as far as this rank knows, without asking; empty: may be written
    def prepare(self) -> None: ...
    def start(self) -> None: ...
    def steps(self) -> list[str]: ...
    def path_of(self, step: int) -> str: ...
    def is_committed(self, path: str) -> bool: ...
    def commit_of(self, path: str) -> Commit: ...
    def document(self, found: Commit, name: str) -> str: ...
    def check_sizes(self, found: Commit) -> None: ...
    def make_room(self, path: str) -> None: ...
    def share(self, folder: str, names: list[str], path: str) -> None: ...
    def commit(self, written: Commit, path: str) -> None: ...
    def discard(self, folder: str) -> None: ...
    def bring(self, path: str, rank: int, world_size: int, token: str | None) -> Commit: ...
    def put_aside(self, path: str, problem: object) -> None: ...
    def delete(self, path: str) -> None: ...


def place_of(root: str, staging: str | None = None, lock: RemoteLock | None = None) -> Place:
    """The place that `root` (checkpoint.dir) means.

    For a URL: `staging` is a local folder on a disk with room for a checkpoint, `lock` (of rank 0)
    is asked before anything is changed there. Raises InputError for what no place can be.
    """
    if not storage.is_remote(root):
        return LocalPlace(storage.local_path(root))
    return RemotePlace(root, staging or default_staging(root), lock)


def _text(found: Commit, name: str, read: Callable[[Commit, str], bytes]) -> str:
    """Raises DamagedError, and InputError where there is no such file."""
    if name not in found.files:
        raise InputError(f"{found.path}: no {name} in it; it holds {', '.join(found.files)}")
    try:
        return read(found, name).decode()
    except UnicodeDecodeError as problem:
        raise DamagedError(f"{name}: {problem}") from None


def root_of(given: str | None, folder: str) -> str:
    """Where the run in `folder` keeps its checkpoints, for its checkpoint.dir: a path or a URL."""
    return given or os.path.join(folder, run_files.CHECKPOINTS)


def default_staging(root: str) -> str:
    """A folder for commands that only read a checkpoint at a URL: its copies stay there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = object_store.check_url(root).split("://", 1)[1]
    return os.path.join(base, "openlm_lite", "checkpoints", *name.split("/"))


class LocalPlace:
    """Steps are folders, committed by a rename; all ranks see them."""

    def __init__(self, root: str) -> None:
        self.root = self.staging = root

    @property
    def lost(self) -> str:
        return ""  # a folder's lock is the kernel's: it lasts as long as the process

    def prepare(self) -> None:
        if dist.rank() == 0:  # all ranks share the folder
            commit.remove_leftovers(self.root)

    def start(self) -> None:
        """`prepare` has done it."""

    def steps(self) -> list[str]:
        return step_folders(self.root)

    def path_of(self, step: int) -> str:
        return os.path.join(self.root, step_folder_name(step))

    def is_committed(self, path: str) -> bool:
        return os.path.exists(path)  # a folder of that name is committed, or damaged

    def commit_of(self, path: str) -> Commit:
        return read_commit(path)

    def document(self, found: Commit, name: str) -> str:
        return _text(found, name, read_checked)

    def check_sizes(self, found: Commit) -> None:
        check_sizes(found)

    def make_room(self, path: str) -> None:
        os.makedirs(self.root, exist_ok=True)  # a damaged one was renamed: nothing is in the way

    def share(self, folder: str, names: list[str], path: str) -> None:
        """All ranks write into one folder."""

    def commit(self, written: Commit, path: str) -> None:
        """Rename the folder `written.path` to `path`."""
        try:
            check_sizes(written)
        except DamagedError as problem:
            raise RunError(
                f"{written.path}: {problem}, as rank 0 sees it; checkpoint.dir must lie on storage "
                "that all ranks share"
            ) from None
        write_synced(os.path.join(written.path, COMMIT_NAME), encode_commit(written))
        storage.sync_folder(written.path)
        os.rename(written.path, path)
        storage.sync_folder(os.path.dirname(path))

    def discard(self, folder: str) -> None:
        if dist.rank() == 0 and os.path.exists(folder):  # not renamed: the save failed
            shutil.rmtree(folder, ignore_errors=True)

    def bring(self, path: str, rank: int, world_size: int, token: str | None) -> Commit:
        """Each rank reads its share of the files. Raises DamagedError."""
        found = read_commit(path)
        check_contents(found, sorted(found.files)[rank::world_size])
        return found

    def put_aside(self, path: str, problem: object) -> None:
        commit.quarantine(path, problem)

    def delete(self, path: str) -> None:
        doomed = os.path.join(self.root, TEMPORARY + "old-" + os.path.basename(path))
        os.rename(path, doomed)  # a kill from here on leaves no half of a checkpoint
        shutil.rmtree(doomed)


class RemotePlace:
    """Steps are objects below a URL, committed by COMMIT.json; each node has its own `staging`."""

    def __init__(self, root: str, staging: str, lock: RemoteLock | None) -> None:
        self.root = object_store.check_url(root)
        self.staging = staging
        self._lock = lock

    @property
    def lost(self) -> str:
        return "" if self._lock is None else self._lock.lost

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def prepare(self) -> None:
        """Nodes need not share `staging`: of the ranks of one, one is the first to remove it."""
        os.makedirs(self.staging, exist_ok=True)
        for name in os.listdir(self.staging):
            if name.startswith(TEMPORARY):
                shutil.rmtree(os.path.join(self.staging, name), ignore_errors=True)

    def start(self) -> None:
        self._check_lock()
        remote_checkpoints.remove_leftovers(self.root)

    def steps(self) -> list[str]:
        return [self.path_of(step) for step in remote_checkpoints.committed_steps(self.root)]

    def path_of(self, step: int) -> str:
        return remote_checkpoints.step_url(self.root, step)

    def is_committed(self, path: str) -> bool:
        return remote_checkpoints.is_committed(path)

    def commit_of(self, path: str) -> Commit:
        return remote_checkpoints.commit_at(path)

    def document(self, found: Commit, name: str) -> str:
        return _text(found, name, remote_checkpoints.read_checked_at)

    def check_sizes(self, found: Commit) -> None:
        remote_checkpoints.check_stored_sizes(found)

    def make_room(self, path: str) -> None:
        self._check_lock()
        remote_checkpoints.make_free(path)

    def share(self, folder: str, names: list[str], path: str) -> None:
        self._check_lock()
        remote_checkpoints.upload(folder, names, path)

    def commit(self, written: Commit, path: str) -> None:
        self._check_lock()
        remote_checkpoints.publish_commit(encode_commit(written), path)

    def discard(self, folder: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def bring(self, path: str, rank: int, world_size: int, token: str | None) -> Commit:
        """A copy in `staging`, which the next `prepare` removes. Raises DamagedError."""
        name = path.rsplit("/", 1)[-1]
        return remote_checkpoints.fetch(path, os.path.join(self.staging, _FETCHED, name), token)

    def put_aside(self, path: str, problem: object) -> None:
        self._check_lock()
        remote_checkpoints.put_aside(path, problem)

    def delete(self, path: str) -> None:
        self._check_lock()
        remote_checkpoints.delete(path)
