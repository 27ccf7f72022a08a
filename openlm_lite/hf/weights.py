"""Tensors by name, read one at a time from files that others wrote; no file can run code.

    a folder        model.safetensors, else model.safetensors.index.json and its shards, else
                    pytorch_model.bin, else pytorch_model.bin.index.json and its shards
    a file          .safetensors, .index.json, or torch.save's .pt, .pth, .bin
    a checkpoint    a step_… folder of ours (`checkpoint_weights`)

Opening reads names and shapes and checks that the files are whole. A tensor is read when it is
asked for, and nobody keeps it: a folder of 28 GB is converted in the memory of its largest tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from openlm_lite.errors import InputError
from openlm_lite.hf.files import (
    AGAIN,
    ALLOWED,
    first_line,
    read_range,
    refuse_damaged,
    size_of,
    without_repeats,
)
from openlm_lite.hf.safetensors_file import open_safetensors
from openlm_lite.hf.torch_file import open_torch_file, plain_name
from openlm_lite.storage import local_path, safe_join
from openlm_lite.weights_io import open_saved

Shape = tuple[int, ...]

_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_SAFETENSORS = ".safetensors"
_TORCH = (".pt", ".pth", ".bin")
_MAX_INDEX_BYTES = 100_000_000


class Weights(Mapping[str, Tensor]):
    """Tensors by name; each is read when asked for, and not kept.

    place: where they come from, for messages
    shapes: name -> shape, known without reading
    read: gives the tensor of a name, on the CPU, as the property of whoever asked
    """

    def __init__(
        self, place: str, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]
    ) -> None:
        self.place = place
        self.shapes = shapes
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        """Raises KeyError for an unknown name, InputError where the tensor cannot be read."""
        expected = tuple(self.shapes[name])
        tensor = self._read(name)
        if tuple(tensor.shape) != expected:
            raise InputError(
                f"{self.place}: tensor {name} is {list(tensor.shape)} instead of {list(expected)}"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # the inherited one would read the tensor


def open_weights(path: str) -> Weights:
    """The tensors of a folder or file that others wrote (see the top).

    Names and dtypes are as stored, but that names out of torch.save's files lose what wrappers put
    into them (`torch_file.plain_name`). Where the files have checksums (torch.save's), they are
    read through and compared now; safetensors has none, so a changed byte of data goes unseen.

    Raises InputError, naming the file, for anything that is not exactly as these formats say.
    """
    local = local_path(path)
    if os.path.isdir(local):
        return _open_folder(local)
    if not os.path.lexists(local):
        raise InputError(f"{path}: nothing is there; {ALLOWED}")
    return _open_index(local) if local.endswith(_INDEX) else _open_file(local)


def checkpoint_weights(step_folder: str, average: str | None = None) -> Weights:
    """The weights of a checkpoint of ours by parameter name, without `model.` in front.

    Or its average of that name. All checksums are verified now (every file is read through once).
    Raises InputError.
    """
    return Weights(step_folder, *open_saved(step_folder, average))


def _open_folder(folder: str) -> Weights:
    for name in _IN_FOLDERS:
        file, index = os.path.join(folder, name), os.path.join(folder, name + _INDEX)
        if os.path.lexists(file) and os.path.lexists(index):
            raise InputError(
                f"{folder}: holds both {name} and {name}{_INDEX}, and only one can be right; give "
                "the path of that one"
            )
        if os.path.lexists(file):
            return _open_file(file)
        if os.path.lexists(index):
            return _open_index(index)
    there = sorted(os.listdir(folder))
    listed = ", ".join(there[:8]) + (", …" if len(there) > 8 else "")
    raise InputError(f"{folder}: holds no weights (found: {listed or 'nothing'}); {ALLOWED}")


def _open_file(path: str) -> Weights:
    """One file that holds tensors itself."""
    if path.endswith(_SAFETENSORS):
        return Weights(path, *open_safetensors(path))
    if path.endswith(_TORCH):
        return Weights(path, *open_torch_file(path))
    raise InputError(f"{path}: a file of unknown kind; {ALLOWED}")


def _open_index(path: str) -> Weights:
    """All that lies in the shards which an index names, as one."""
    holders: dict[str, Weights] = {}  # tensor name -> the shard that holds it
    for file, names in _read_index(path).items():
        shard = _open_shard(path, file, names)
        for name in shard:
            if name in holders:
                places = f"{holders[name].place} and in {shard.place}"
                raise InputError(f"{path}: tensor {name} is in {places}; keep one of them")
            holders[name] = shard
    shapes = {name: shard.shapes[name] for name, shard in holders.items()}
    return Weights(path, shapes, lambda name: holders[name][name])


def _open_shard(index: str, file: str, names: list[str]) -> Weights:
    """The file beside `index`, which must hold the tensors `names`."""
    try:
        shard_path = safe_join(os.path.dirname(index) or ".", file)
    except InputError as error:
        raise InputError(f"{index}: {error}") from None
    if not os.path.lexists(shard_path):
        refuse_damaged(index, f"names the file {file}, which is not there")
    shard = _open_file(shard_path)
    is_torch = file.endswith(_TORCH)
    for name in names:
        if (plain_name(name) if is_torch else name) not in shard:
            raise InputError(f"{index}: says that {name} is in {file}, but it is not; {AGAIN}")
    return shard


def _read_index(path: str) -> dict[str, list[str]]:
    """Shard's file name -> names of its tensors, of a ….index.json."""
    if size_of(path) > _MAX_INDEX_BYTES:
        refuse_damaged(path, f"is no index of shards: it has more than {_MAX_INDEX_BYTES:,} bytes")
    content = read_range(path, 0, _MAX_INDEX_BYTES)
    names_by_file: dict[str, list[str]] = {}
    try:
        index: Any = json.loads(content, object_pairs_hook=without_repeats)
        for name, file in index["weight_map"].items():
            if not isinstance(file, str):
                raise TypeError(f"the file of {name} is {file!r}")
            names_by_file.setdefault(file, []).append(name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        refuse_damaged(path, f"is no index of shards ({type(error).__name__}: {first_line(error)})")
    if not names_by_file:
        refuse_damaged(path, "names no tensor")
    return names_by_file
