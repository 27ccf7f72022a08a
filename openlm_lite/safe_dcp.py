"""`torch.distributed.checkpoint` (DCP) limited to tensors: nothing read from a file can run code.

DCP keeps a pickle, `.metadata`, beside its data files, and loads "byte items" with an unrestricted
`torch.load`: both execute whatever a hostile file says. Here the pickle goes through a list of
twelve harmless names and may not ask for more memory than its length justifies, byte items are
refused, and data files are named by COMMIT.json only. Data items are read by DCP itself with
`weights_only=True`.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer
from torch.serialization import _get_layout

from openlm_lite.errors import InputError
from openlm_lite.parameter_names import plain_name

METADATA_NAME = ".metadata"

Optimizers = Optimizer | Iterable[Optimizer]

_CLASSES = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    _MEM_FORMAT_ENCODING,
    _StorageInfo,
)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(c.__module__, c.__qualname__): c for c in _CLASSES},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,  # looks a name up in torch.layout's
}


class TransferError(Exception):
    """Writing or reading tensors failed on the ranks that the message names; raised on all."""


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the names of `_ALLOWED` and torch's dtypes; any other name ends the reading."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = _ALLOWED.get((module_name, global_name))
        if found is None and module_name == "torch" and "." not in global_name:
            candidate = vars(torch).get(global_name)
            found = candidate if isinstance(candidate, torch.dtype) else None
        if found is None:
            raise InputError(f"it asks for {module_name}.{global_name}, which no checkpoint needs")
        return found


_PUT, _LONG_BINPUT = pickle.PUT[0], pickle.LONG_BINPUT[0]
_ARGUMENT_BYTES = {ord(op.code): op.arg.n if op.arg else 0 for op in pickletools.opcodes}
_COUNT_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_OF_KNOWN_LENGTH = re.compile(
    b"(?:%b)*+"
    % b"|".join(
        re.escape(bytes([code])) + b"." * n
        for code, n in _ARGUMENT_BYTES.items()
        if n >= 0 and code not in (_LONG_BINPUT, pickle.STOP[0])
    ),
    re.DOTALL,
)


def _check_sizes(content: bytes) -> None:
    """Raises InputError where the pickle would have more memory taken than its length justifies.

    The unpickler makes room for what an item announces, and for all places of its memo up to one
    that is named, 16 bytes each: a few changed bytes of a file would take all memory. So its
    instructions are walked through first.
    """
    at = 0
    while at < len(content):
        run = _OF_KNOWN_LENGTH.match(content, at)
        assert run is not None  # it matches nothing, too
        if (at := run.end()) == len(content):
            return
        code, at = content[at], at + 1
        n, line, place = _ARGUMENT_BYTES.get(code), at, 0
        if code == _LONG_BINPUT:
            place, at = int.from_bytes(content[at : at + 4], "little"), at + 4
        elif n == pickletools.UP_TO_NEWLINE:
            for _ in range(2 if code in (pickle.GLOBAL[0], pickle.INST[0]) else 1):
                line, at = at, content.find(b"\n", at) + 1 or len(content)
            if code == _PUT:
                with suppress(ValueError):  # which the unpickler raises, too
                    place = int(content[line:at].split(b"\0")[0])
        elif n in _COUNT_BYTES:
            counted = at + _COUNT_BYTES[n]
            at = counted + int.from_bytes(content[at:counted], "little")
        else:
            return  # the end, an unknown instruction, or one that is cut off
        if at > len(content):
            raise InputError(f"it announces {at - len(content)} bytes more than it has")
        if place > len(content):
            raise InputError(f"it names place {place} of a memo of at most {len(content)}")


def decode_metadata(content: bytes, place: str, files: Iterable[str]) -> Metadata:
    """The tensors of a checkpoint: names, shapes, dtypes and where their pieces lie.

    `content` is the file `place`; `files` are the data files that the pieces may lie in.
    Raises InputError where the content is not exactly that.
    """
    remedy = "do not load this checkpoint; use another one, or ask where it came from"
    try:
        _check_sizes(content)
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except InputError as error:
        raise InputError(f"{place}: refused: {error}; {remedy}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"{place}: cannot be read ({error!r}); {remedy}") from error
    try:
        _check_metadata(metadata, set(files))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{place}: refused: {error}; {remedy}") from None
    return metadata


def _check_metadata(metadata: Any, files: set[str]) -> None:
    """Raises ValueError (or TypeError, AttributeError) naming what does not belong there."""
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds a {type(metadata).__name__}, not the list of tensors")
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):
            kind = "pickled bytes" if isinstance(item, BytesStorageMetadata) else type(item)
            raise ValueError(f"item {name!r} is {kind}; only tensors are allowed")
        sizes = [item.size, *(c.sizes for c in item.chunks), *(c.offsets for c in item.chunks)]
        if not all(isinstance(n, int) and n >= 0 for size in sizes for n in size):
            raise ValueError(f"tensor {name!r} has no proper shape")
        if not isinstance(item.properties.dtype, torch.dtype):
            raise ValueError(f"tensor {name!r} has no proper dtype")
    if not isinstance(metadata.storage_data, dict):
        raise ValueError("it does not say where the tensors lie")
    for index, info in metadata.storage_data.items():
        if info.relative_path not in files:
            raise ValueError(
                f"tensor {index.fqn!r} lies in {info.relative_path!r}, "
                "which is not a file of this checkpoint"
            )
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"tensor {index.fqn!r} wants to be transformed on reading")


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()  # the stock writer would record this machine's temporary path


class _Reader(FileSystemReader):
    """Takes the metadata that was already checked instead of unpickling the file."""

    def __init__(self, path: str, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _TensorsOnly(DefaultLoadPlanner):
    """The second lock behind `decode_metadata`: no byte item is ever planned or loaded."""

    def create_local_plan(self) -> LoadPlan:
        for name, value in self.state_dict.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name}: only tensors are loaded, not {type(value).__name__}")
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise InputError(f"item {read_item.dest_index.fqn!r} is pickled bytes; only tensors load")


def write_tensors(
    folder: str, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Write this rank's share into `folder` and fsync it; collective (over `group`, or over all).

    Raises TransferError on every rank if it failed on any.
    """
    no_dist = not dist.is_initialized()
    with _plain_errors_and_warnings(no_dist):
        save(
            dict(tensors),
            storage_writer=_Writer(folder, sync_files=True, overwrite=False),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=group,
            no_dist=no_dist,
        )


class _LazyPlanner(DefaultSavePlanner):
    """Plans by empty tensors of the right shapes; a real one is read when it is written."""

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        expected = self.state_dict[index.fqn]
        tensor = self._read(index.fqn)
        if tensor.shape != expected.shape or not tensor.is_floating_point():
            raise InputError(
                f"tensor {index.fqn} is {tensor.dtype} {list(tensor.shape)}; it must hold floating "
                f"point numbers and be {list(expected.shape)}"
            )
        tensor = tensor.detach().to("cpu", expected.dtype).contiguous()
        is_part = tensor.untyped_storage().nbytes() != tensor.nbytes  # torch.save writes the whole
        return tensor.clone() if is_part else tensor


class _LazyWriter(_Writer):
    """Lets go of a tensor once it is written: the stock writer keeps all of a file to its end."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = "__0_0.distcp"
        results = []
        with open(os.path.join(self.path, name), "xb") as file:
            for item in plan.items:
                offset = file.tell()
                torch.save(planner.resolve_data(item), file)
                where = _StorageInfo(name, offset, file.tell() - offset)
                results.append(WriteResult(item.index, where.length, where))
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def write_tensors_lazily(
    folder: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]
) -> None:
    """Write tensors of `shapes` in fp32 into `folder` and fsync it, one in memory at a time.

    read: gives the tensor of a name, any floating point dtype. For one process alone.
    Raises InputError for a tensor of another shape or dtype, what `read` raises if that is an
    InputError, and TransferError for everything else.
    """
    fp32 = {"dtype": torch.float32, "device": "meta"}
    expected = {name: torch.empty(shape, **fp32) for name, shape in shapes.items()}
    try:
        with _plain_errors_and_warnings(alone=True):
            save(
                expected,
                storage_writer=_LazyWriter(folder, sync_files=True, overwrite=False),
                planner=_LazyPlanner(read),
                no_dist=True,
            )
    except TransferError as error:
        assert isinstance(error.__cause__, CheckpointException)
        (cause, _) = error.__cause__.failures[0]
        if isinstance(cause, InputError) or not isinstance(cause, Exception):
            raise cause from None  # the reader's own error, or Ctrl-C: DCP catches that too
        raise


def read_tensors(
    folder: str, metadata: Metadata, tensors: Mapping[str, torch.Tensor], *, alone: bool = False
) -> None:
    """Fill `tensors` in place, each rank its own shards; `alone` reads without the other ranks.

    Raises TransferError on every rank if it failed on any.
    """
    no_dist = alone or not dist.is_initialized()
    with _plain_errors_and_warnings(no_dist):
        load(
            dict(tensors),
            storage_reader=_Reader(folder, metadata),
            planner=_TensorsOnly(flatten_state_dict=False),
            no_dist=no_dist,
        )


def data_files_of(folder: str, rank: int) -> list[str]:
    """The files that DCP wrote into `folder` for `rank`: its data, and rank 0 the metadata."""
    own = [name.name for name in Path(folder).glob(f"__{rank}_*.distcp")]
    if rank == 0 and os.path.exists(os.path.join(folder, METADATA_NAME)):
        own.append(METADATA_NAME)
    return sorted(own)


@contextmanager
def _plain_errors_and_warnings(alone: bool) -> Iterator[None]:
    """DCP raises a BaseException, and warns where it works without a process group (wanted here).

    The filters of warnings are those of all threads. A run works `alone` at its start only.
    """
    with ExitStack() as stack:
        if alone:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield
        except CheckpointException as error:
            causes = {who: cause for who, (cause, _) in error.failures.items()}
            texts = [f"rank {who}: {type(e).__name__}: {e}" for who, e in causes.items()]
            raise TransferError("; ".join(texts)) from error


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The live parameters and buffers (DTensors where sharded) by name, `model.` in front."""
    return _only_tensors({f"model.{n}": value for n, value in get_model_state_dict(model).items()})


def optimizer_tensors(model: nn.Module, optimizer: Optimizers) -> dict[str, torch.Tensor]:
    """The live tensors of the optimizer's state as `optim.{parameter}.{name}`.

    Not through get_optimizer_state_dict: it steps an optimizer that has not stepped yet (Adam's
    count would be wrong by one), and its counterpart casts the state to the parameter's dtype.
    """
    names: dict[Any, str] = {p: plain_name(name) for name, p in model.named_parameters()}
    return _only_tensors(
        {
            f"optim.{names[parameter]}.{key}": value
            for one in as_tuple(optimizer)
            for parameter, state in one.state.items()
            for key, value in state.items()
        }
    )


def _only_tensors(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: only tensors can be saved, not {type(value).__name__}")
    return values


def as_tuple(optimizer: Optimizers) -> tuple[Optimizer, ...]:
    return (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)


def compare_tensors(
    path: str, metadata: Metadata, tensors: Mapping[str, torch.Tensor], prefix: str
) -> None:
    """Raises InputError naming the first tensor that the checkpoint holds otherwise."""
    saved = {n: m for n, m in metadata.state_dict_metadata.items() if n.startswith(prefix)}
    remedy = "this is a checkpoint of another architecture; use the model.json beside it"
    if prefix == "optim.":
        remedy = "this is a checkpoint of another optimizer; load the weights alone, or use its own"
    for name in sorted(saved.keys() | tensors.keys()):
        if name not in tensors:
            raise InputError(f"{path}: has a tensor {name} that is not needed here: {remedy}")
        if name not in saved:
            raise InputError(f"{path}: has no tensor {name}: {remedy}")
        entry, tensor = saved[name], tensors[name]
        assert isinstance(entry, TensorStorageMetadata)  # decode_metadata made sure
        there = (tuple(entry.size), entry.properties.dtype)
        here = (tuple(tensor.shape), tensor.dtype)
        if there != here:
            raise InputError(
                f"{path}: tensor {name} is {there[1]} {list(there[0])}, "
                f"here it is {here[1]} {list(here[0])}: {remedy}"
            )
