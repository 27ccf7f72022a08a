"""Files of torch.save (.pt, .pth, .bin): state dicts, and OpenLM's checkpoints around one.

They are pickles in a zip file. Only torch.load(weights_only=True) unpickles them, which knows
tensors, plain values and what `_SAFE_GLOBALS` adds; any other name ends the reading.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openlm_lite.errors import InputError
from openlm_lite.hf.files import ALLOWED, first_line, read_range, refuse_damaged, size_of

Shape = tuple[int, ...]

# The numpy numbers that OpenLM leaves among its metrics and learning rates. `scalar`, which makes
# one, is called otherwise by numpy 1 and numpy 2.
_SCALAR = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
]
_ASKED_FOR = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module)")
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_ZIP_START = b"PK\x03\x04"
_CHUNK_BYTES = 4 << 20


def open_torch_file(path: str) -> tuple[dict[str, Shape], Callable[[str], Tensor]]:
    """(name -> shape, what reads one of them) of the state dict in the file `path`.

    Names are plain (`plain_name`), dtypes as stored. The file is read through once, to compare its
    checksums where the writer left any. While one tensor is copied out, the pages that it lies on
    are mapped and count as resident too; nothing stays mapped in between.
    Raises InputError, then and on reading.
    """
    _check_archive(path)
    state_dict = _state_dict_of(path, read_torch_file(path))
    stored_names: dict[str, str] = {}
    for name in state_dict:
        plain = plain_name(name)
        if plain in stored_names:
            raise InputError(
                f"{path}: {stored_names[plain]} and {name} are both {plain} once the prefixes of "
                "wrappers are taken off; keep one of them"
            )
        stored_names[plain] = name
    shapes = {plain: tuple(state_dict[name].shape) for plain, name in stored_names.items()}

    def read(plain: str) -> Tensor:
        # From the start each time (milliseconds): the mapping must not outlive this one tensor.
        tensor = _state_dict_of(path, read_torch_file(path)).get(stored_names[plain])
        if tensor is None:
            raise InputError(f"{path}: tensor {plain} is gone: the file was changed meanwhile")
        kind = _unusable_kind(tensor)
        if kind is not None:
            raise InputError(f"{path}: tensor {plain} is {kind}; only plain dense tensors are read")
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    return shapes, read


def read_torch_file(path: str) -> Any:
    """What torch.save put into `path`, with its tensors mapped from the file.

    OpenLM's optimizer_N.pt and stats_N.pt load as well. Raises InputError for a damaged file and
    for one that asks for anything which this list does not have, naming it.
    """
    size_of(path)
    if read_range(path, 0, len(_ZIP_START)) != _ZIP_START:
        raise InputError(
            f"{path}: is no zip file, as torch.save writes since torch 1.6; if it is an older one "
            "and you trust it, load it with torch and save it again"
        )
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged file makes torch raise nearly anything
        asked_for = _ASKED_FOR.search(str(error))
        if asked_for:
            raise InputError(
                f"{path}: refused: it asks for {asked_for[1]}, which no file of weights needs; ask "
                "its author for the state dict alone"
            ) from None
        reason = str(error).rpartition("WeightsUnpickler error:")[2]  # behind torch's long advice
        refuse_damaged(path, f"cannot be read ({type(error).__name__}: {first_line(reason)})")


def plain_name(name: str) -> str:
    """Without what DDP, FSDP, torch.compile and activation checkpointing put into names."""
    *outer, last = name.split(".")
    return ".".join([part for part in outer if part not in _WRAPPERS] + [last])


def _check_archive(path: str) -> None:
    """Reads all of the zip file and compares its checksums, where its writer left any."""
    n_file = size_of(path)
    if read_range(path, 0, len(_ZIP_START)) != _ZIP_START:
        return  # read_torch_file says what it is not
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith("/constants.pkl"):
                    raise InputError(f"{path}: is a TorchScript program, not weights; {ALLOWED}")
                if info.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{info.filename} is compressed")
                if info.CRC == 0:  # of no bytes; or of all, after set_crc32_options(False)
                    continue
                with archive.open(info) as record:
                    while record.read(_CHUNK_BYTES):
                        pass
    except InputError:
        raise
    except Exception as error:  # a damaged file makes zipfile raise nearly anything
        reason = f"{n_file} bytes; {type(error).__name__}: {first_line(error)}"
        refuse_damaged(path, f"is truncated or damaged ({reason})")


def _state_dict_of(path: str, content: Any) -> dict[str, Tensor]:
    """The state dict that a file holds, alone or under one of the known keys."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state dict")
    keys = [key for key in _STATE_DICT_KEYS if isinstance(content.get(key), dict)]
    if len(keys) > 1:
        raise InputError(f"{path}: holds several state dicts ({', '.join(keys)}); save one alone")
    state_dict = content[keys[0]] if keys else content
    if not any(isinstance(value, Tensor) for value in state_dict.values()):
        listed = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise InputError(
            f"{path}: holds no weights (found: {listed}); give a file with a state dict, alone or "
            f"under one of the keys {', '.join(_STATE_DICT_KEYS)}"
        )
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise InputError(f"{path}: the state dict has the key {name!r}; allowed are names")
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise InputError(
                f"{path}: {name} is a {type(value).__name__}, not a tensor; save the state dict "
                "without it"
            )
    return state_dict


def _unusable_kind(tensor: Tensor) -> str | None:
    """In words, what keeps `tensor` from being copied as it is; None for a plain dense one."""
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    if tensor.is_meta:
        return "without data (it was saved from the device `meta`)"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"{list(tensor.shape)} made of fewer numbers (expanded)"
    return None
