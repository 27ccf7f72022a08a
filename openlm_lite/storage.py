"""Paths and files: which names are allowed, how they are listed, and writes that never look half.

Paths stay strings everywhere, local ones and URLs alike. Each goes through one of two gates:

    path --> is_remote     plain or file:// -> False;  s3 gs hf http https -> True;  else refused
    path --> local_path    for what must lie on a local disk: a URL is refused too

What happens behind a URL (requests, retries, errors) is in remote.py.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from openlm_lite import remote
from openlm_lite.errors import InputError
from openlm_lite.redact import redacted

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")
# Names that come from files which others wrote (a manifest): nothing else may reach a path.
_SAFE_NAME = re.compile(r"[A-Za-z0-9._/\-]+")

_LONGEST_NAME = 200  # file systems take 255, and something is put around names


def is_remote(path: str) -> bool:
    """Whether `path` is a URL of an object store or a web server, and not a local path.

    Raises InputError for `pipe:` (it would run a shell), for unknown schemes and for URLs with
    credentials in them.
    """
    if not path:
        raise InputError("an empty path was given; name a file or a folder")
    if path.startswith("pipe:"):
        raise InputError(
            f"{redacted(path)}: pipe: is refused because it would run a shell command; "
            "give the path or the URL of a file or folder"
        )
    match = _SCHEME.match(path)
    if match is None or match.group(1).lower() == "file":
        return False
    scheme = match.group(1).lower()
    if scheme not in remote.SCHEMES:
        raise InputError(
            f"{redacted(path)}: unknown scheme {scheme!r}; allowed are local paths, file:// "
            f"and {', '.join(f'{known}://' for known in remote.SCHEMES)}"
        )
    remote.scheme_of(path)  # refuses credentials
    return True


def local_path(path: str) -> str:
    """The local path that `path` (plain or `file://…`) names, for what must be on a local disk.

    Raises InputError for URLs, and for what `is_remote` refuses.
    """
    if is_remote(path):
        raise InputError(
            f"{path}: this has to lie on a local disk; copy it there and name that path"
        )
    return path[len("file://") :] if path[:7].lower() == "file://" else os.path.expanduser(path)


def safe_join(folder: str, name: str) -> str:
    """`folder/name` for a name out of a file: relative, inside the folder, harmless characters.

    Raises InputError for every other name.
    """
    parts = name.split("/")
    is_long = max(map(len, parts)) > _LONGEST_NAME
    if not _SAFE_NAME.fullmatch(name) or name.startswith("/") or ".." in parts or is_long:
        raise InputError(
            f"{folder}: the name {name[:300]!r} is refused; allowed are relative names of "
            f"A-Z a-z 0-9 . _ - and / without '..', of up to {_LONGEST_NAME} characters"
        )
    return os.path.join(folder, name)  # of a URL too


def open_read(path: str) -> BinaryIO:
    """The file at a path or URL for reading and seeking.

    Raises FileNotFoundError (for a URL it is a MissingError, which is an InputError too).
    """
    return remote.open_read(path) if is_remote(path) else open(local_path(path), "rb")


def read_bytes(path: str) -> bytes:
    """The content of the file at a path or URL. Raises as `open_read` does."""
    if is_remote(path):
        return remote.read_bytes(path)
    with open(local_path(path), "rb") as file:
        return file.read()


def size_of(path: str) -> int:
    """Bytes of the file at a path or URL. Raises as `open_read` does."""
    return remote.size_of(path) if is_remote(path) else os.path.getsize(local_path(path))


def exists(path: str) -> bool:
    """Whether there is a file or a folder at a path or URL."""
    return remote.exists(path) if is_remote(path) else os.path.exists(local_path(path))


def download(url: str, local: str, n_bytes: int | None, *, store_checks: bool = True) -> None:
    """See `remote.download`."""
    remote.download(url, local, n_bytes, store_checks=store_checks)


def put_file(local: str, path: str) -> None:
    """Copy the local file to a path or URL, where it appears whole or not at all."""
    if is_remote(path):
        remote.put_file(local, path)
        return
    with open(local, "rb") as source, atomic_write(local_path(path)) as file:
        shutil.copyfileobj(source, file, 1 << 20)


def list_files(path: str) -> list[str]:
    """The files that `path` names, sorted: a file, a folder (walked), or a glob (`**` allowed).

    Hidden files (`.x`) and marks such as `_SUCCESS` inside a folder are left out. The files of a
    URL are URLs. Raises InputError when nothing is there.
    """
    if is_remote(path):
        return remote.list_files(path)
    local = local_path(path)
    if os.path.isfile(local):
        return [local]
    if os.path.isdir(local):
        found = []
        for folder, folders, names in os.walk(local):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [os.path.join(folder, n) for n in names if not n.startswith((".", "_"))]
        return sorted(found)
    if not os.path.exists(local) and glob.has_magic(local):
        found = sorted(f for f in glob.glob(local, recursive=True) if os.path.isfile(f))
        if not found:
            raise InputError(f"{path}: no file matches this pattern; check it with ls")
        return found
    if os.path.exists(local):
        raise InputError(f"{path}: neither a file nor a folder; give one of these")
    raise InputError(f"{path}: no such file or folder; check the spelling (see `ls`)")


@contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """A binary file that appears under its name, whole and on disk, when the block ends well.

    It is written under a temporary name beside its place, synced and renamed. An error in the
    block leaves nothing behind; a kill leaves at most the hidden temporary file.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(folder or ".")
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def write_bytes(path: str, data: bytes) -> None:
    """Put `data` at `path`, atomically."""
    with atomic_write(path) as file:
        file.write(data)


def write_json(path: str, value: Any) -> None:
    """Put `value` as indented JSON with a final newline at `path`, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sync_folder(folder: str) -> None:
    """Make the names in `folder` durable: a rename lives in the folder, not in the file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that the disk or the quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
