"""Checkpoints of weights alone, written and read tensor by tensor.

What an import makes: a folder that everything accepts which reads a checkpoint (step 0, no
optimizer), written by the protocol of checkpoint.py without ever holding the model.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from openlm_lite import dist
from openlm_lite.average.saved import mean_of, saved_average
from openlm_lite.checkpoint import (
    STATE_NAME,
    CheckpointError,
    check_document_names,
    check_free_space,
    check_local_path,
    metadata_of,
    stage_and_write,
    verified_commit,
)
from openlm_lite.checkpoint_place import LocalPlace
from openlm_lite.commit import TEMPORARY, Commit, TrainState, encode_commit, step_of_folder
from openlm_lite.errors import InputError
from openlm_lite.safe_dcp import TransferError, read_tensors, write_tensors_lazily

Shape = tuple[int, ...]

_PREFIX = "model."


class LazyTensors(Protocol):
    """Shapes known beforehand, tensors read when asked for (`hf.weights.Weights`)."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    def __getitem__(self, name: str, /) -> torch.Tensor: ...


def save_weights(
    path: str, weights: LazyTensors, *, documents: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    """Write a checkpoint of step 0 that holds `weights` in fp32 and no optimizer, at `path`.

    For one process alone. One tensor is in memory at a time: as `weights` gives it, and in fp32.
    documents: file name -> text; facts: JSON values for COMMIT.json.

    `path` appears whole or not at all: it is written beside its place, under `.tmp-…`, and renamed;
    any failure takes that away again, and what a kill left there the next save to `path` does.
    Raises InputError where something is at `path` already and for a tensor that is not as its shape
    says or holds no floating point numbers, CheckpointError where writing fails.
    """
    check_local_path(path)
    check_document_names(documents)
    final = os.path.abspath(path)
    root, name = os.path.split(final)
    _check_place(path, final)
    shapes = {_PREFIX + n: tuple(shape) for n, shape in weights.shapes.items()}
    temporary = os.path.join(root, f"{TEMPORARY}{name}.{os.getpid()}")
    state = TrainState(step=0, tokens=0, next_sample=0)
    encode_commit(Commit(temporary, state, 1, facts, {}))  # facts that are no JSON are told now

    def write(folder: str) -> None:
        write_tensors_lazily(folder, shapes, lambda full: weights[full.removeprefix(_PREFIX)])

    def prepare() -> None:
        os.makedirs(root, exist_ok=True)
        _remove_leftovers(root, name)
        n_bytes = sum(math.prod(s) for s in shapes.values()) * torch.float32.itemsize
        check_free_space(root, n_bytes, "free some space, or name a folder on another disk")
        os.mkdir(temporary)

    missing = _missing_folders(root)
    try:
        dist.on_main(prepare, CheckpointError)
        files = stage_and_write(temporary, write, {**documents, STATE_NAME: state.to_json()})
        commit = Commit(temporary, state, 1, facts, files)
        dist.on_main(lambda: LocalPlace(root).commit(commit, final), CheckpointError)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # not made, or somebody put something there meanwhile
                os.rmdir(folder)
        raise


def open_saved(
    path: str, average: str | None = None
) -> tuple[dict[str, Shape], Callable[[str], torch.Tensor]]:
    """(parameter name -> shape, what reads one of them as saved) of the step folder `path`.

    With the name of an `average`, of that one. All files are read once to verify their checksums.
    Raises InputError, then and on reading.
    """
    check_local_path(path)
    commit = verified_commit(path)
    metadata = metadata_of(commit)
    tensors = metadata.state_dict_metadata
    prefixes = [_PREFIX] if average is None else saved_average(commit, tensors, average)[1]
    parts = [_entries(metadata, prefix) for prefix in prefixes]
    shapes = [{name: tuple(entry.size) for name, entry in part.items()} for part in parts]
    if any(other != shapes[0] for other in shapes):
        raise InputError(f"{path}: the parts of the average {average!r} have unequal shapes")

    def read_part(prefix: str, name: str, entry: TensorStorageMetadata) -> torch.Tensor:
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            read_tensors(path, metadata, {prefix + name: tensor}, alone=True)
        except TransferError as error:
            raise InputError(f"{path}: tensor {name} cannot be read: {error}") from error
        return tensor

    def read(name: str) -> torch.Tensor:
        each = zip(prefixes, parts, strict=True)
        tensors = (read_part(prefix, name, part[name]) for prefix, part in each)
        return next(tensors) if average is None else mean_of(tensors)

    return shapes[0], read


def _entries(metadata: Metadata, prefix: str) -> dict[str, TensorStorageMetadata]:
    """The tensors under `prefix`, by their names without it."""
    return {
        name.removeprefix(prefix): entry
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def _check_place(path: str, final: str) -> None:
    if os.path.lexists(final):
        is_free = os.path.isdir(final) and not os.path.islink(final) and not os.listdir(final)
        if not is_free:
            raise InputError(f"{path}: exists and is no empty folder; name a new one")
    step = step_of_folder(os.path.basename(final))
    if step is not None and step != 0:
        raise InputError(
            f"{path}: is the name of a checkpoint of step {step}, weights alone have step 0; name "
            "another folder"
        )


def _missing_folders(path: str) -> list[str]:
    """What os.makedirs(path) would make, the innermost first."""
    missing = []
    while not os.path.exists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def _remove_leftovers(root: str, name: str) -> None:
    """What saves to `name` left that were killed: their process is no more, or has our number."""
    for other in os.listdir(root):
        match = re.fullmatch(re.escape(TEMPORARY + name) + r"\.(\d+)", other)
        if match and not _is_running(int(match[1])):
            shutil.rmtree(os.path.join(root, other))


def _is_running(pid: int) -> bool:
    """Whether another process of this machine has the number `pid`."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
