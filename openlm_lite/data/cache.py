"""Whole shards on the local disk: fetched once per node, checked, dropped when room is needed.

    Cache.hold(url, bytes, crc32) --+-- here already ----------------------> Held(path)
                                    +-- fetch -> .part -> size, crc32 -> rename

    folder/
      3f2a…-8c1d22e0-shard-000000.tar     a shard; its time of change is its last use
      .3f2a….part-4711-0                  being fetched
      .lock-00 … .lock-ff                 who fetches (by the shard's name); .lock: who makes room

All processes of a node may share a folder. Every lock is a flock, which the kernel drops when its
process dies, however it dies. A shard in use is locked shared, and is not dropped.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from openlm_lite import storage
from openlm_lite.errors import InputError, RunError
from openlm_lite.retries import DAMAGE_TRIES, DamagedError

logger = logging.getLogger("openlm_lite")

DEFAULT_GIB = 100.0
_CHUNK = 1 << 22


class Held(NamedTuple):
    """A shard that stays in the cache until `close`, or the end of the process."""

    path: str
    descriptor: int

    def close(self) -> None:
        """Let it be dropped; a mapping of it stays readable."""
        os.close(self.descriptor)


def default_folder() -> str:
    """The user's cache folder for shards, of all datasets together."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "openlm_lite", "shards")


class Cache:
    """Shards in `folder`, of `max_bytes` in all (more only while more than that is in use)."""

    def __init__(self, folder: str | None = None, max_bytes: int | None = None) -> None:
        self.folder = storage.local_path(folder or default_folder())
        self.max_bytes = int(DEFAULT_GIB * (1 << 30)) if max_bytes is None else max_bytes
        self._numbers = itertools.count()
        self._checked: set[str] = set()  # names whose bytes this process has seen to be right
        self._told_full = False
        if self.max_bytes < 1:
            raise InputError(f"data.cache_gib: a cache of {self.max_bytes} bytes; allowed: > 0")
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            # others could put links there, or other shards
            if os.stat(self.folder).st_mode & 0o002:
                raise InputError(
                    f"data.cache_dir: anybody may write to {self.folder}; name a folder of your "
                    "own inside it, or take that right away (chmod o-w)"
                )
            with self._locked(".lock"):
                pass
        except OSError as e:
            raise InputError(
                f"data.cache_dir: {self.folder} cannot be used ({e.strerror}); name a folder on a "
                "local disk that has flock"
            ) from None

    def fetch(self, url: str, n_bytes: int, crc32: int | None) -> str:
        """The local path of the shard. It may be dropped again at any time: see `hold`."""
        held = self.hold(url, n_bytes, crc32)
        held.close()
        return held.path

    def hold(self, url: str, n_bytes: int, crc32: int | None) -> Held:
        """The shard at `url`, here and whole, and kept here until it is closed.

        `crc32` None: what is fetched is checked by the store's own checksum instead, if any.
        Raises MissingError, DamagedError (size or crc32 is not that of the manifest, again and
        again), RefusedError, RemoteError, and RunError for a full disk.
        """
        name = _name(url, n_bytes, crc32)
        while True:
            held = self._held(name, n_bytes, crc32)
            if held is not None:
                return held
            with self._locked(_lock_of(name)):
                # another process may have been quicker; then there is nothing to fetch
                if not os.path.exists(os.path.join(self.folder, name)):
                    self._fetch(url, name, n_bytes, crc32)

    def _held(self, name: str, n_bytes: int, crc32: int | None) -> Held | None:
        """The shard if it is here; one that is not whole (a crash of the node) is removed."""
        path = os.path.join(self.folder, name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as e:
            if e.errno != errno.ELOOP:
                raise
            logger.warning("%s: a link where a shard should be; it is fetched again", path)
            os.unlink(path)
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        try:
            status = os.fstat(descriptor)
            if status.st_nlink == 0:  # dropped before it was locked
                os.close(descriptor)
                return None
            whole = status.st_size == n_bytes
            if whole and crc32 is not None and name not in self._checked:
                whole = _crc32_of(path) == crc32
            if whole:
                self._checked.add(name)
                os.utime(descriptor)
                return Held(path, descriptor)
            logger.warning("%s: damaged on this disk; it is fetched again", path)
            os.unlink(path)
        except FileNotFoundError:
            pass  # two processes found it damaged
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _fetch(self, url: str, name: str, n_bytes: int, crc32: int | None) -> None:
        """Put the shard in its place. The lock of its name is held."""
        for stale in self._parts(name):  # of processes that died: nobody else fetches this shard
            with suppress(FileNotFoundError):
                os.unlink(stale)
        self._make_room(n_bytes)
        found = ""
        for number in range(1, DAMAGE_TRIES + 1):
            part = os.path.join(self.folder, f".{name}.part-{os.getpid()}-{next(self._numbers)}")
            try:
                storage.download(url, part, n_bytes, store_checks=crc32 is None)
                crc = _crc32_of(part) if crc32 is not None else None
                if crc == crc32:
                    self._checked.add(name)
                    os.rename(part, os.path.join(self.folder, name))
                    return
            except OSError as e:
                if storage.is_disk_full(e):
                    raise RunError(
                        f"data.cache_dir: the disk of {self.folder} is full while fetching {url} "
                        f"({n_bytes} bytes); free some space, lower data.cache_gib or name a "
                        "folder on another disk"
                    ) from None
                raise
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(part)
            found = f"crc32 of its {n_bytes} bytes is {crc}, the manifest has {crc32}"
            logger.warning("reading %s: attempt %d failed (%s)", url, number, found)
        raise DamagedError(
            f"{url}: damaged: {found} ({DAMAGE_TRIES} times); restore the shard from a good copy "
            "or prepare the data again"
        )

    def _make_room(self, n_bytes: int) -> None:
        """Drop the shards that were used least recently, until `n_bytes` more fit."""
        with self._locked(".lock"):
            files = []
            for entry in os.scandir(self.folder):
                if entry.name.startswith(".lock"):
                    continue
                with suppress(FileNotFoundError):
                    if entry.name.startswith(".") and self._is_stale(entry.name):
                        os.unlink(entry.path)
                        continue
                    status = entry.stat()
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
            total = sum(size for _, size, _ in files) + n_bytes
            for _, size, path in sorted(files):
                if total <= self.max_bytes:
                    return
                if _unlink_unused(path):
                    total -= size
            if total > self.max_bytes and not self._told_full:
                self._told_full = True
                logger.warning(
                    "data.cache_gib: the shards in use need %.3g GiB, which is more than the "
                    "%.3g GiB of the cache in %s",
                    total / (1 << 30),
                    self.max_bytes / (1 << 30),
                    self.folder,
                )

    def _parts(self, name: str) -> list[str]:
        prefix = f".{name}.part-"
        return [e.path for e in os.scandir(self.folder) if e.name.startswith(prefix)]

    def _is_stale(self, part: str) -> bool:
        """Whether nobody is fetching the shard of this unfinished file any more."""
        name = part[1:].rsplit(".part-", 1)[0]
        with open(os.path.join(self.folder, _lock_of(name)), "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(os.path.join(self.folder, name), "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _name(url: str, n_bytes: int, crc32: int | None) -> str:
    """The name of a shard in the cache: other bytes under the same URL are another file."""
    digest = hashlib.sha256(f"{url} {n_bytes}".encode()).hexdigest()[:16]
    content = "unchecked" if crc32 is None else f"{crc32:08x}"
    return f"{digest}-{content}-{url.rsplit('/', 1)[-1][-100:]}"


def _lock_of(name: str) -> str:
    """One of 256 lock files: as many as shards would be too many, and one would be too few."""
    return f".lock-{name[:2]}"


def _unlink_unused(path: str) -> bool:
    """Remove the file unless somebody holds it; whether its bytes are gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not os.path.basename(path).startswith("."):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            return True
        return False  # being fetched
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    finally:
        os.close(descriptor)


def _crc32_of(path: str) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
