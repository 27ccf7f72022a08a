"""A shard: a tar of blocks of token ids that stock webdataset reads, and that we map into memory.

    | header | npy header | (block_tokens + 1) ids | zeros to 512 | header | … | 1024 zeros |
      `0000000042.npy`          little-endian uint16 or uint32            end of archive

All members of a shard have one size, so block i lies at a computed offset. Python's `tarfile` ends
silently on half of the ways a tar can be damaged; the index walk here checks every header's
checksum, every size and the end-of-archive mark, and `open_shard` the crc32 of the whole file.
"""

from __future__ import annotations

import io
import mmap
import os
import tarfile
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from openlm_lite import storage
from openlm_lite.data.manifest import DatasetInfo, ShardEntry
from openlm_lite.errors import InputError

_RECORD = 512  # tar's unit: headers and padded members are multiples of it
_END_OF_ARCHIVE = 2 * _RECORD
_REMEDY = "restore the shard from a good copy or prepare the data again"


def npy_dtype(name: str) -> np.dtype:
    """The little-endian numpy dtype for `uint16` or `uint32`."""
    return np.dtype(name).newbyteorder("<")


def write_shard(path: str, first_block: int, blocks: Iterable[np.ndarray]) -> tuple[int, int, int]:
    """Write `blocks` (equal length, little-endian) as one tar, atomically.

    The bytes depend on nothing but the arguments: no times, no users.
    Returns (number of blocks, bytes, crc32).
    """
    count = size = crc = 0
    with storage.atomic_write(path) as file:
        for block in blocks:
            member = _npy_header(block.dtype, len(block)) + block.tobytes()
            header = tarfile.TarInfo(f"{first_block + count:010d}.npy")
            header.size = len(member)
            padding = bytes(-len(member) % _RECORD)
            record = header.tobuf(tarfile.USTAR_FORMAT) + member + padding
            file.write(record)
            crc = zlib.crc32(record, crc)
            size += len(record)
            count += 1
        end = bytes(_END_OF_ARCHIVE)
        file.write(end)
    return count, size + len(end), zlib.crc32(end, crc)


def shard_bytes(n_blocks: int, block_ids: int, dtype: np.dtype) -> int:
    """The size of a shard file with `n_blocks` blocks of `block_ids` ids."""
    member = len(_npy_header(dtype, block_ids)) + block_ids * dtype.itemsize
    return n_blocks * (_RECORD + member + -member % _RECORD) + _END_OF_ARCHIVE


def _npy_header(dtype: np.dtype, length: int) -> bytes:
    # our own text, not numpy's writer: its padding changed between versions
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


class Layout(NamedTuple):
    """Where the blocks of a shard lie: block i's ids start at byte first + i * stride."""

    n_blocks: int
    first: int
    stride: int


def damaged(path: str, offset: int, what: str) -> InputError:
    """The one error for a shard that cannot be trusted."""
    return InputError(f"{path}: damaged at byte {offset}: {what}; {_REMEDY}")


def check_size(path: str, entry: ShardEntry) -> None:
    """Raises InputError if the shard is missing or has another size than the manifest says."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise InputError(f"{path}: this shard of the manifest is missing; {_REMEDY}") from None
    if entry.bytes is not None and size != entry.bytes:
        raise damaged(path, min(size, entry.bytes), f"{size} bytes, the manifest has {entry.bytes}")


def open_shard(path: str, entry: ShardEntry, info: DatasetInfo, *, verify: bool) -> np.ndarray:
    """The blocks of a shard as a read-only view of the mapped file.

    Returns ids_BI, shape [num_sequences, block_tokens + 1], little-endian `info.dtype`.
    The headers are always walked. `verify` also checks the crc32 of the file and that every id is
    below the vocabulary size. Raises InputError with the shard and the offset.
    """
    check_size(path, entry)
    if os.stat(path).st_size < _END_OF_ARCHIVE:
        raise damaged(path, 0, f"{entry.bytes} bytes are not a tar file")
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    dtype, block_ids = npy_dtype(info.dtype), info.block_tokens + 1
    layout = walk(path, data, dtype, block_ids)
    if layout.n_blocks != entry.num_sequences:
        raise InputError(
            f"{path}: holds {layout.n_blocks} blocks up to byte {len(data)}, but the manifest says "
            f"{entry.num_sequences}; {_REMEDY}"
        )
    ids = np.ndarray(
        (layout.n_blocks, block_ids),
        dtype,
        buffer=data,
        offset=layout.first,
        strides=(layout.stride, dtype.itemsize),
    )
    if verify:
        data.madvise(mmap.MADV_WILLNEED)
        check_crc32(path, data, entry)
        _check_ids(path, ids, layout, info)
    return ids


def check_crc32(path: str, data: mmap.mmap, entry: ShardEntry) -> int:
    """The crc32 of the shard's bytes. Raises InputError if the manifest has another one."""
    crc = zlib.crc32(data)
    if entry.crc32 not in (None, crc):
        raise damaged(
            path, 0, f"crc32 of bytes 0 to {len(data)} is {crc}, the manifest has {entry.crc32}"
        )
    return crc


def _check_ids(path: str, ids: np.ndarray, layout: Layout, info: DatasetInfo) -> None:
    limit = info.tokenizer.vocab_size
    if limit is None or int(ids.max()) < limit:
        return
    block, column = np.argwhere(ids >= limit)[0].tolist()
    offset = layout.first + block * layout.stride + column * ids.itemsize
    raise InputError(
        f"{path}: byte {offset}: token id {ids[block, column]} in block {block} is outside the "
        f"vocabulary of {limit} ids ({info.tokenizer.name}); the shard was "
        "made with another tokenizer: prepare the data again"
    )


def check_below(path: str, ids: np.ndarray, limit: int) -> None:
    """Raises InputError unless all ids are below the `limit` of the model that will read them."""
    if int(ids.max()) < limit:
        return
    block, column = np.argwhere(ids >= limit)[0].tolist()
    raise InputError(
        f"{path}: token id {ids[block, column]} in block {block} (item {column}) is outside the "
        f"model's vocabulary of {limit} ids; raise model.vocab_size to what the data's tokenizer "
        "has, or use other data"
    )


def walk(path: str, data: mmap.mmap, dtype: np.dtype, block_ids: int) -> Layout:
    """Walk the tar headers from the first to the end-of-archive mark and check all of them.

    Raises InputError for a bad checksum, an unknown or odd member, a wrong dtype or length, a
    member that runs past the end of the file, and a missing end-of-archive mark.
    """
    n_blocks = offset = npy_bytes = member_bytes = 0
    npy_header = b""
    while True:
        header = data[offset : offset + _RECORD]
        if len(header) < _RECORD:
            raise damaged(path, offset, "the file ends without an end-of-archive mark")
        if header == bytes(_RECORD):
            break
        name, size = _parse_header(path, offset, header)
        start = offset + _RECORD
        if start + size > len(data):
            raise damaged(path, start, f"member {name} of {size} bytes runs past the end")
        if n_blocks == 0:
            npy_bytes = _npy_data_start(path, start, data[start : start + 256], dtype, block_ids)
            npy_header = data[start : start + npy_bytes]
            member_bytes = npy_bytes + block_ids * dtype.itemsize
        elif data[start : start + npy_bytes] != npy_header:
            raise damaged(path, start, f"the npy header of {name} is unlike the first block's")
        if size != member_bytes:
            raise damaged(path, start, f"member {name} has {size} bytes, a block {member_bytes}")
        n_blocks += 1
        offset = start + size + -size % _RECORD
    tail = data[offset:]
    if len(tail) < _END_OF_ARCHIVE or tail.count(0) != len(tail):
        raise damaged(path, offset, "an empty header inside the archive, or a cut end-of-archive")
    stride = _RECORD + member_bytes + -member_bytes % _RECORD
    return Layout(n_blocks, _RECORD + npy_bytes, stride)


def _parse_header(path: str, offset: int, header: bytes) -> tuple[str, int]:
    """(name, size) of a ustar header after its checksum has been verified."""
    # the checksum is taken with its own eight bytes read as spaces
    expected = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    try:
        stored = int(header[148:156].rstrip(b"\0 "), 8)
        name = header[:100].split(b"\0", 1)[0].decode()
        size = int(header[124:136].rstrip(b"\0 "), 8)
    except ValueError:
        raise damaged(path, offset, "not a tar header") from None
    if stored != expected:
        raise damaged(path, offset, f"tar header checksum is {expected}, stored is {stored}")
    if header[257:262] != b"ustar" or header[156:157] not in (b"0", b"\0"):
        raise damaged(path, offset, f"member {name!r} is not a plain ustar file")
    if not name.endswith(".npy"):
        raise damaged(path, offset, f"member {name!r} is not a .npy block")
    return name, size


def _npy_data_start(path: str, offset: int, head: bytes, dtype: np.dtype, block_ids: int) -> int:
    """Length of the npy header at the start of `head`, once dtype and length are as they should."""
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, _, found = np.lib.format.read_array_header_1_0(stream)
    except ValueError as e:
        raise damaged(path, offset, f"the first block has no valid npy header ({e})") from None
    if shape != (block_ids,) or found != dtype:
        raise damaged(
            path, offset, f"blocks are {found} {shape}, dataset.json says {dtype} ({block_ids},)"
        )
    return stream.tell()
