"""safetensors files, read and written one tensor at a time; the header is checked at opening.

    8 bytes: length of the header | header: JSON | data
    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": …}

Done here and not through the library: that one maps the whole file to read it, and what was read
counts as resident memory; and it takes all tensors at once to write them.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openlm_lite.errors import InputError
from openlm_lite.hf.files import (
    ALLOWED,
    first_line,
    read_range,
    refuse_damaged,
    size_of,
    without_repeats,
)

Shape = tuple[int, ...]

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: Shape
    begin: int  # bytes from the start of the data
    end: int


def open_safetensors(path: str) -> tuple[dict[str, Shape], Callable[[str], Tensor]]:
    """(name -> shape, what reads one of them) of the file `path`.

    The format has no checksums: a changed byte in the data, or one that makes another name or
    dtype of the same size, is not seen. Raises InputError, then and on reading.
    """
    entries, data_start = _read_header(path)

    def read(name: str) -> Tensor:
        entry = entries[name]
        flat = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        try:
            with open(path, "rb") as file:
                file.seek(data_start + entry.begin)
                found = file.readinto(flat.numpy().data)
        except OSError as error:
            raise InputError(f"{path}: tensor {name} cannot be read: {error.strerror}") from error
        if found != len(flat):
            refuse_damaged(path, f"tensor {name} has {found} bytes instead of {len(flat)}")
        return flat.view(entry.dtype).reshape(entry.shape)

    return {name: entry.shape for name, entry in entries.items()}, read


def write_safetensors(
    path: str,
    names: Iterable[str],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
) -> None:
    """Write the new file `path`, on disk on return; each tensor is read and cast in its turn.

    Raises FileExistsError, and OSError where writing fails; what was written is left then.
    """
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at multiples of 8 bytes
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in list(header)[1:]:
            tensor = tensors[name].to(dtype).contiguous()
            assert tuple(tensor.shape) == tuple(shapes[name]), name
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _read_header(path: str) -> tuple[dict[str, _Entry], int]:
    """(the entries, which cover the data exactly; where the data starts)."""
    n_file = size_of(path)
    start = read_range(path, 0, 8)
    if len(start) < 8:
        refuse_damaged(path, f"is truncated: {n_file} bytes")
    (n_header,) = struct.unpack("<Q", start)
    if n_header > _MAX_HEADER_BYTES:
        refuse_damaged(
            path, "is no safetensors file: it does not begin with the length of a header"
        )
    if 8 + n_header > n_file:
        refuse_damaged(path, f"is truncated: {n_file} bytes, its header alone has {n_header}")
    try:
        header: Any = json.loads(read_range(path, 8, n_header), object_pairs_hook=without_repeats)
        header.pop("__metadata__", None)
        entries = {name: _entry_of(name, value) for name, value in header.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        refuse_damaged(path, f"has a damaged header ({type(error).__name__}: {first_line(error)})")
    if not entries:
        raise InputError(f"{path}: holds no tensor; {ALLOWED}")
    _check_cover(path, entries, n_file - 8 - n_header)
    return entries, 8 + n_header


def _entry_of(name: str, value: Any) -> _Entry:
    """Raises ValueError, TypeError or KeyError where `value` is no proper entry."""
    dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has the shape {shape} and data_offsets {[begin, end]}")
    if dtype not in _DTYPES:
        raise InputError(f"tensor {name} is {dtype!r}; allowed are {', '.join(_DTYPES)}")
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has {end - begin} bytes for {dtype} {shape}")
    return _Entry(_DTYPES[dtype], tuple(shape), begin, end)


def _check_cover(path: str, entries: dict[str, _Entry], n_data: int) -> None:
    """Tensor follows on tensor from the first byte of the data to the last."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            refuse_damaged(
                path, f"has a damaged header ({name} begins at {entry.begin}, not {end})"
            )
        end = entry.end
    if n_data < end:
        refuse_damaged(path, f"is truncated: {n_data} bytes of tensors instead of {end}")
    if n_data > end:
        refuse_damaged(path, f"has {n_data - end} bytes more than its header says")
