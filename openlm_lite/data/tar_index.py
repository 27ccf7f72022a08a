"""Where the members of a tar that others wrote lie, or one error: never a silent early end.

    | header | content | zeros to 512 | header | … | two zero records | zeros |

Understood are what Python, GNU tar, webdataset's writer and Rust's `tar` crate write: ustar and GNU
headers, pax records (`x`, `g`), GNU long names (`L`), folders (passed over). Python's `tarfile`
takes a damaged header for the end of the archive on half of the ways to damage one; here every
header's checksum is verified, every size, and the end-of-archive mark.

Shapes: M members.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

import numpy as np

from openlm_lite.data.shards import damaged

RECORD = 512  # tar's unit: headers and padded members are multiples of it
_FILE, _FOLDER, _PAX, _PAX_GLOBAL, _LONG_NAME = b"0\0", b"5", b"x", b"g", b"L"
_OCTAL = 8 ** np.arange(5, -1, -1)  # the values of the six digits of a checksum
_MAX_EXTENDED = 1 << 20  # bytes of a pax or long-name record: more is damage


class TarIndex(NamedTuple):
    """The regular files of a tar, in order."""

    names: list[str]
    offsets_M: np.ndarray  # int64: where the content starts
    sizes_M: np.ndarray  # int64: bytes of content


def index_tar(path: str, data: mmap.mmap | bytes) -> TarIndex:
    """Walk the headers of the tar whose bytes are `data`; `path` is for messages.

    Raises InputError with path and offset of the first thing that is not as it should be.
    """
    headers: list[int] = []
    try:
        index = _walk(path, data, headers)
    except Exception:
        _check_sums(path, data, headers)  # a flipped size leads astray: name its own header
        raise
    _check_sums(path, data, headers)
    return index


def _walk(path: str, data: mmap.mmap | bytes, headers: list[int]) -> TarIndex:
    """The members by the sizes in the headers, whose checksums the caller verifies at once.

    Appends the offset of every header that it used to `headers`.
    """
    names: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    extended: dict[str, str] = {}  # of the next member: "path", "size"
    offset, end, nothing = 0, len(data), bytes(RECORD)
    while True:
        header = data[offset : offset + RECORD]
        if len(header) < RECORD:
            raise damaged(path, offset, "the file ends without an end-of-archive mark")
        if header == nothing:
            _check_end(path, data, offset)
            break
        headers.append(offset)
        size, kind = _size_of(path, offset, header), header[156:157]
        is_file = kind in _FILE
        if is_file and "size" in extended:
            size = _extended_size(path, offset, extended["size"])
        start = offset + RECORD
        if start + size > end:
            raise damaged(path, start, f"a member of {size} bytes runs past the end of the file")
        if is_file:
            names.append(extended.get("path") or _name_of(path, offset, header))
            offsets.append(start)
            sizes.append(size)
            extended = {}
        elif kind in (_PAX, _LONG_NAME):
            if size > _MAX_EXTENDED:
                raise damaged(path, offset, f"an extended header of {size} bytes")
            content = data[start : start + size]
            if kind == _LONG_NAME or b" path=" in content or b" size=" in content:
                extended |= _extended(path, start, kind, content)
        elif kind == _FOLDER:
            extended = {}
        elif kind != _PAX_GLOBAL:
            raise damaged(path, offset, f"a member of type {kind!r}; allowed are plain files")
        offset = start + size + -size % RECORD
    if extended:
        raise damaged(path, offset, "the archive ends after the extended header of a member")
    return TarIndex(names, np.array(offsets, np.int64), np.array(sizes, np.int64))


def _size_of(path: str, offset: int, header: bytes) -> int:
    try:
        return int(header[124:136].rstrip(b"\0 "), 8)
    except ValueError:
        raise damaged(path, offset, "not a tar header: its size is not octal") from None


def _name_of(path: str, offset: int, header: bytes) -> str:
    try:
        name = header[: header.find(0, 0, 100) if header[99] == 0 else 100].decode()
        if header[345] == 0 or header[257:263] != b"ustar\0":
            return name
        return header[345:500].split(b"\0", 1)[0].decode() + "/" + name
    except UnicodeDecodeError:
        raise damaged(path, offset, "not a tar header: its name is not UTF-8") from None


def _extended(path: str, start: int, kind: bytes, content: bytes) -> dict[str, str]:
    """`path` and `size` out of pax records ("27 mtime=1700000000.5\\n" each) or a long name."""
    try:
        if kind == _LONG_NAME:
            return {"path": content.rstrip(b"\0").decode()}
        found: dict[str, str] = {}
        while content:
            length = int(content.split(b" ", 1)[0])
            record, content = content[:length], content[length:]
            if not 0 < length == len(record) or record[-1:] != b"\n":
                raise ValueError("a record of wrong length")
            key, _, value = record[:-1].split(b" ", 1)[1].partition(b"=")
            if key in (b"path", b"size"):
                found[key.decode()] = value.decode()
        return found
    except (ValueError, IndexError) as e:  # UnicodeDecodeError is a ValueError
        raise damaged(path, start, f"not a valid extended header ({e})") from None


def _extended_size(path: str, offset: int, text: str) -> int:
    if not text.isdecimal():
        raise damaged(path, offset, f"an extended header with the size {text!r}")
    return int(text)


def _check_end(path: str, data: mmap.mmap | bytes, offset: int) -> None:
    """Raises InputError unless nothing but zeros, at least two records, follow from `offset` on."""
    rest = np.frombuffer(data, np.uint8, offset=offset)
    if len(rest) < 2 * RECORD:
        raise damaged(path, offset, "the end-of-archive mark is cut")
    if rest.any():
        first = offset + int(np.flatnonzero(rest)[0])
        raise damaged(path, first, f"bytes after an empty header at byte {offset}")


def _check_sums(path: str, data: mmap.mmap | bytes, headers: list[int]) -> None:
    """Verify the checksums of the headers at these offsets, all at once."""
    if not headers:
        return
    whole = np.frombuffer(data, np.uint8, count=len(data) // RECORD * RECORD)
    records = whole.reshape(-1, RECORD)[np.array(headers) // RECORD]
    # the checksum is taken with its own eight bytes read as spaces
    fields = records[:, 148:156].copy()
    records[:, 148:156] = ord(" ")
    sums = records.sum(axis=1, dtype=np.uint32)
    if np.array_equal((fields[:, :6] - np.uint8(ord("0"))) @ _OCTAL, sums):
        return
    for offset, expected, sum_field in zip(headers, sums.tolist(), fields, strict=True):
        field = sum_field.tobytes().strip(b"\0 ")
        try:
            stored = int(field, 8)
        except ValueError:
            raise damaged(path, offset, "not a tar header: its checksum is not octal") from None
        if stored != expected:
            raise damaged(path, offset, f"tar header checksum is {expected}, stored is {stored}")
