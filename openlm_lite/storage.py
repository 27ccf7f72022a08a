"""Paths and files: which names are allowed, how they are listed, and writes that never look half.

Paths stay strings everywhere. Only local files are read and written so far; `local_path` is the
one gate through which every path goes, so that object stores can be added behind it.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from openlm_lite.errors import InputError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")
# Known to fsspec and meant to be read one day; named here so that the message can say so.
_REMOTE_SCHEMES = ("abfs", "az", "gcs", "gs", "hf", "http", "https", "s3")
# Names that come from files which others wrote (a manifest): nothing else may reach a path.
_SAFE_NAME = re.compile(r"^[A-Za-z0-9._/\-]+$")


def local_path(path: str) -> str:
    """The local path that `path` (plain or `file://…`) names.

    Raises InputError for `pipe:` (it would run a shell), for remote and for unknown schemes.
    """
    if not path:
        raise InputError("an empty path was given; name a file or a folder")
    if path.startswith("pipe:"):
        raise InputError(
            f"{path}: pipe: is refused because it would run a shell command; "
            "give the path of a local file or folder"
        )
    match = _SCHEME.match(path)
    if match is None:
        return os.path.expanduser(path)
    scheme = match.group(1).lower()
    if scheme == "file":
        return path[len("file://") :]
    if scheme in _REMOTE_SCHEMES:
        raise InputError(
            f"{path}: {scheme}:// is not read yet; copy the data to a local disk and name that path"
        )
    raise InputError(
        f"{path}: unknown scheme {scheme!r}; allowed are plain local paths and file:// paths"
    )


def safe_join(folder: str, name: str) -> str:
    """`folder/name` for a name out of a file: relative, inside the folder, harmless characters.

    Raises InputError for every other name.
    """
    if not _SAFE_NAME.match(name) or name.startswith("/") or ".." in name.split("/"):
        raise InputError(
            f"{folder}: the name {name!r} is refused; allowed are relative names "
            "of A-Z a-z 0-9 . _ - and / without '..'"
        )
    return os.path.join(folder, name)


def list_files(path: str) -> list[str]:
    """The files that `path` names, sorted: a file, a folder (walked), or a glob (`**` allowed).

    Hidden files (`.x`) and marks such as `_SUCCESS` inside a folder are left out.
    Raises InputError when nothing is there.
    """
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
