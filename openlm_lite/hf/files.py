"""Files that others wrote: whether one is there at all, and bytes out of it."""

from __future__ import annotations

import os
from typing import NoReturn

from openlm_lite.errors import InputError

ALLOWED = (
    "allowed are a folder with model.safetensors or pytorch_model.bin (or their .index.json and "
    "shards), a .safetensors file, and a .pt, .pth or .bin file of torch.save"
)
AGAIN = "fetch or copy it again"


def size_of(path: str) -> int:
    """Bytes of the file `path`. Raises InputError where none is there, or only a stand-in."""
    if not os.path.exists(path):
        what = "is a link to a file that is not there" if os.path.islink(path) else "is not there"
        refuse_damaged(path, what)
    if not os.path.isfile(path):
        raise InputError(f"{path}: is no file; {ALLOWED}")
    size = os.path.getsize(path)
    if size == 0:
        refuse_damaged(path, "is empty")
    if read_range(path, 0, 64).startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
        )
    return size


def read_range(path: str, start: int, n_bytes: int) -> bytes:
    """Up to `n_bytes` from `start` on. Raises InputError where the system cannot read them."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(n_bytes)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def refuse_damaged(path: str, what: str) -> NoReturn:
    raise InputError(f"{path}: {what}; {AGAIN}")


def without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For json.loads: an object in which no name stands twice; ValueError where one does."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def first_line(text: object) -> str:
    """The beginning of what another library's error says."""
    return (str(text).strip().splitlines() or [""])[0]
