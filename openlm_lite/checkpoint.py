"""Checkpoints that are there completely or not at all.

    rank 0   remove and make .tmp-step_00001000/
    all      write tensors (each rank its shards, by torch.distributed.checkpoint), fsync,
             report crc32 and size of the files written
    rank 0   COMMIT.json with the list of files, fsync; fsync the folder;
             rename to step_00001000/; fsync the parent           <- the commit: one atomic step
    rank 0   only now delete old checkpoints (first a rename to .tmp-…, so that a kill in between
             leaves no half-deleted step_… behind)

A process killed at any instant leaves the previous checkpoints untouched and at worst a `.tmp-…`
folder, which the next start removes. On reading, COMMIT.json is verified first (list of files,
sizes, crc32), and nothing in a checkpoint can run code (`safe_dcp`).

    checkpoints/step_00001000/{__0_0.distcp, __1_0.distcp, …, .metadata, state.json,
                               config.yaml, model.json, tokenizer.json, COMMIT.json}
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from openlm_lite import config, dist, run_files, storage
from openlm_lite.checkpoint_place import LocalPlace, Place, place_of, root_of
from openlm_lite.commit import (
    COMMIT_NAME,
    TEMPORARY,
    Commit,
    DamagedError,
    TrainState,
    check_contents,
    crc32_of_file,
    read_checked,
    read_commit,
    step_folder_name,
    step_folders,
    step_of_folder,
    write_synced,
)
from openlm_lite.dist import Group
from openlm_lite.errors import InputError, RunError, SharedError
from openlm_lite.safe_dcp import (
    METADATA_NAME,
    Optimizers,
    TransferError,
    as_tuple,
    compare_tensors,
    data_files_of,
    decode_metadata,
    model_tensors,
    optimizer_tensors,
    read_tensors,
    write_tensors,
)

log = logging.getLogger(__name__)

STATE_NAME = "state.json"
NO_TENSORS: Mapping[str, torch.Tensor] = MappingProxyType({})
_PROTECTED_NEWEST = 2  # never deleted, whatever the configuration says
_FREE_SPACE_FACTOR = 1.2

T = TypeVar("T")


class CheckpointError(SharedError):
    """Saving (or reading) failed; every rank raises it, and what was committed is as it was."""


@dataclass(frozen=True)
class CheckpointConfig:
    """How often to save and what to keep."""

    dir: str | None = None  # folder or URL (s3://, gs://); None: run.dir/checkpoints
    every_steps: int = 1000  # optimizer steps between saves
    keep_last: int = 3  # newest checkpoints to keep (the newest two are always kept)
    keep_every: int = 0  # also keep every step divisible by this; 0 = none
    background: bool = True  # write while training goes on; the tensors are copied first
    max_failures: int = 3  # periodic saves in a row that may fail; then the run ends

    def __post_init__(self) -> None:
        limits = (("every_steps", 1), ("keep_last", 1), ("keep_every", 0), ("max_failures", 0))
        for name, least in limits:
            if getattr(self, name) < least:
                raise InputError(f"{name} = {getattr(self, name)}: must be at least {least}")


# --------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(
    root: str | Place,
    model: nn.Module,
    optimizer: Optimizers,
    state: TrainState,
    *,
    documents: Mapping[str, str],
    facts: Mapping[str, Any],
    cfg: CheckpointConfig,
    averages: Mapping[str, torch.Tensor] = NO_TENSORS,
) -> str:
    """Save `root`/step_…; collective. Returns the path of the committed folder.

    documents: file name -> text (config.yaml, model.json); facts: JSON values for COMMIT.json;
    averages: more tensors by name (`average.Averages.tensors`).
    The hyperparameters of the optimizer (learning rate, betas, …) are not saved: they follow from
    the configuration and the step. Saving a step that is committed already changes nothing.
    Raises CheckpointError on every rank if saving failed on any of them.
    """
    tensors = {**tensors_of(model, optimizer), **averages}
    return write_checkpoint(root, tensors, state, documents=documents, facts=facts, cfg=cfg)


def tensors_of(model: nn.Module, optimizer: Optimizers) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of them, by the names that it has there; this rank's shards."""
    return model_tensors(model) | optimizer_tensors(model, optimizer)


def write_checkpoint(
    root: str | Place,
    tensors: Mapping[str, torch.Tensor],
    state: TrainState,
    *,
    documents: Mapping[str, str],
    facts: Mapping[str, Any],
    cfg: CheckpointConfig,
    group: Group = None,
) -> str:
    """What `save_checkpoint` does, of tensors that may be copies; collective over `group`."""
    place = as_place(root)
    check_document_names(documents)
    path = place.path_of(state.step)
    temporary = os.path.join(place.staging, TEMPORARY + step_folder_name(state.step))
    texts = {**documents, STATE_NAME: state.to_json()}
    _on_all_ranks(place.prepare, group)
    if not _on_main(lambda: _prepare(place, path, temporary, state, tensors), group):
        return path
    try:
        files = stage_and_write(
            temporary, lambda folder: write_tensors(folder, tensors, group), texts, group
        )
        own = data_files_of(temporary, dist.rank()) + (list(texts) if dist.rank() == 0 else [])
        _on_all_ranks(lambda: place.share(temporary, own, path), group)
        commit = Commit(temporary, state, dist.world_size(), facts, files)
        _on_main(lambda: place.commit(commit, path), group)
    finally:
        place.discard(temporary)
    _on_main(lambda: _delete_old(place, cfg), group)  # nobody leaves while it lasts
    return path


def as_place(root: str | Place) -> Place:
    return place_of(root) if isinstance(root, str) else root


def _prepare(
    place: Place, path: str, temporary: str, state: TrainState, tensors: Mapping[str, torch.Tensor]
) -> bool:
    """Make the temporary folder (rank 0); False if this step is committed already."""
    if place.is_committed(path):
        try:
            commit = place.commit_of(path)
            place.check_sizes(commit)
        except DamagedError as problem:
            place.put_aside(path, problem)
        else:
            if commit.state != state:
                raise CheckpointError(
                    f"{path} is there already with another state ({commit.state} instead of "
                    f"{state}); use another run folder, or move that checkpoint away"
                )
            return False
    place.make_room(path)
    remedy = "free some space, lower checkpoint.keep_last, or move the run to another disk"
    check_free_space(place.staging, _expected_bytes(place, tensors), remedy)
    os.mkdir(temporary)
    return True


def _expected_bytes(place: Place, tensors: Mapping[str, torch.Tensor]) -> int:
    """The size of this checkpoint, or of the last one where that was larger."""
    last_bytes = 0
    for path in place.steps()[:1]:
        try:
            last_bytes = place.commit_of(path).n_bytes
        except DamagedError:
            continue
    new_bytes = sum(t.numel() * t.element_size() for t in tensors.values())  # over all ranks
    return max(last_bytes, new_bytes)


def check_free_space(root: str, n_bytes: int, remedy: str) -> None:
    """Raises CheckpointError where a checkpoint of `n_bytes` would not fit into `root`."""
    needed = int(_FREE_SPACE_FACTOR * n_bytes)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointError(
            f"{root}: {free:,} bytes are free, a checkpoint wants {needed:,}; {remedy}"
        )


def stage_and_write(
    folder: str, write: Callable[[str], None], texts: Mapping[str, str], group: Group = None
) -> dict[str, tuple[int, int]]:
    """Write everything but COMMIT.json; collective. Returns file -> (size, crc32) of all ranks.

    write: puts this rank's tensors into the folder that it is given, TransferError where it cannot.
    The half of a save that makes nothing visible.
    """

    def write_own_share() -> dict[str, tuple[int, int]]:
        try:
            write(folder)
        except TransferError as error:
            raise CheckpointError(f"{folder}: writing failed: {error}") from error
        names = data_files_of(folder, dist.rank())
        if dist.rank() == 0:
            for name, text in texts.items():
                write_synced(os.path.join(folder, name), text)
                names.append(name)
        paths = {name: os.path.join(folder, name) for name in names}
        return {name: (os.path.getsize(p), crc32_of_file(p)) for name, p in paths.items()}

    shares = _on_all_ranks(write_own_share, group)
    return {name: entry for share in shares for name, entry in share.items()}


def _delete_old(place: Place, cfg: CheckpointConfig) -> None:
    """Apply keep_last and keep_every to what looks whole (rank 0); a failure only warns."""
    try:
        whole = _whole_checkpoints(place)
    except (InputError, RunError) as error:  # of the store; what was saved is committed
        log.warning("old checkpoints were not looked for: %s", error)
        return
    for commit in whole[max(cfg.keep_last, _PROTECTED_NEWEST) :]:
        if cfg.keep_every and commit.step % cfg.keep_every == 0:
            continue
        try:
            place.delete(commit.path)
        except (OSError, InputError, RunError) as error:
            log.warning("could not delete the old checkpoint %s: %s", commit.path, error)


def _whole_checkpoints(place: Place) -> list[Commit]:
    """Newest first. Others are neither counted nor deleted: somebody may want to look at them."""
    whole = []
    for path in place.steps():
        try:
            commit = place.commit_of(path)
            place.check_sizes(commit)
        except (DamagedError, InputError):
            continue
        whole.append(commit)
    return whole


# --------------------------------------------------------------------------------------------
# Finding


def latest_checkpoint(root: str | Place) -> Commit | None:
    """The newest checkpoint in `root` that verifies, or None; collective.

    The ranks share the reading for the checksums. A damaged checkpoint is renamed to bad-step_…
    with a warning, and the one before is tried. Raises InputError for one of a newer version.
    """
    place = as_place(root)
    _on_all_ranks(place.prepare)
    _on_main(place.start)
    while path := _on_main(lambda: next(iter(place.steps()), None)):
        found = _verify_together(place, path)
        if isinstance(found, Commit):
            return found
        _on_main(lambda path=path, problem=found: place.put_aside(path, problem))
    return None


def _verify_together(place: Place, path: str) -> Commit | str:
    """The commit of the checkpoint `path`, in a local folder, or what is wrong; collective."""
    token = _on_main(lambda: uuid.uuid4().hex)  # of this very reading

    def verify_own_share() -> str | None:
        try:
            commits.append(place.bring(path, dist.rank(), dist.world_size(), token))
        except DamagedError as problem:
            return str(problem)
        return None

    commits: list[Commit] = []
    problems = [problem for problem in _on_all_ranks(verify_own_share) if problem is not None]
    return problems[0] if problems else commits[0]


def resolve_checkpoint(path: str) -> str:
    """The step folder that `path` means: itself, or the newest good one in a run's folder.

    A run's config.yaml says where its checkpoints are. Changes nothing there. Of a URL, the
    checkpoint is copied to this machine (~/.cache/openlm_lite) and the copy returned.
    Raises InputError that says what was found and what is allowed.
    """
    if storage.is_remote(path):
        return _resolve_url(path)
    check_local_path(path)
    path = path.rstrip("/") or "/"
    allowed = "give a run folder, its checkpoints folder, or one step_… folder with a COMMIT.json"
    if not os.path.isdir(path):
        found = "a file" if os.path.exists(path) else "nothing"
        raise InputError(f"{path}: found {found}, not a folder; {allowed}")
    if os.path.exists(os.path.join(path, COMMIT_NAME)):
        return path  # who reads it verifies it
    if step_of_folder(os.path.basename(os.path.abspath(path))) is not None:
        raise InputError(f"{path}: no {COMMIT_NAME}: saving was not completed; {allowed}")
    kept = checkpoints_of_run(path)
    if storage.is_remote(kept):
        return _resolve_url(kept)
    if os.path.isdir(kept):
        root = kept
    elif kept != os.path.join(path, run_files.CHECKPOINTS):
        raise InputError(
            f"{path}: its config.yaml says checkpoint.dir = {kept}, where no folder is; {allowed}"
        )
    else:
        root = path
    problems = []
    for folder in step_folders(root):
        try:
            check_contents(read_commit(folder))
        except DamagedError as problem:
            problems.append(f"{os.path.basename(folder)}: {problem}")
            log.warning("%s is damaged (%s): trying the one before", folder, problem)
            continue
        return folder
    if problems:
        raise InputError(f"{root}: all checkpoints are damaged: {'; '.join(problems)}")
    names = ", ".join(sorted(os.listdir(root))[:8]) or "nothing"
    raise InputError(f"{root}: no step_… folder in it (found: {names}); {allowed}")


def checkpoints_of_run(folder: str) -> str:
    """Where the run in `folder` keeps its checkpoints, by its config.yaml: a path or a URL."""
    path = os.path.join(folder, run_files.CONFIG)
    if not os.path.isfile(path):
        return root_of(None, folder)
    try:
        with open(path, encoding="utf-8") as file:
            given = config.parse_yaml(file.read(), path).get("checkpoint", {}).get("dir")
    except (AttributeError, UnicodeDecodeError):
        raise InputError(f"{path}: is not the config.yaml of a run; name a checkpoint") from None
    if not isinstance(given, str | None):
        raise InputError(f"{path}: checkpoint.dir = {given!r}: must be a folder or a URL")
    if given is None or storage.is_remote(given):
        return root_of(given, folder)
    return storage.local_path(given)


def _resolve_url(url: str) -> str:
    """A verified copy, on this machine, of the checkpoint that `url` means."""
    root, _, name = url.rstrip("/").rpartition("/")
    is_step = step_of_folder(name) is not None
    place = place_of(root if is_step else url)
    paths = [place.path_of(int(name.removeprefix("step_")))] if is_step else place.steps()
    problems = []
    for path in paths:
        try:
            return place.bring(path, 0, 1, None).path
        except DamagedError as problem:
            problems.append(f"{path}: {problem}")
            log.warning("%s: %s", path, problem)
    raise InputError(
        f"{url}: no whole checkpoint ({'; '.join(problems) or 'nothing is there'}); give "
        "checkpoint.dir of a run, or one step_… folder with a COMMIT.json in it"
    )


# --------------------------------------------------------------------------------------------
# Loading


def load_checkpoint(
    checkpoint: str | Commit,
    model: nn.Module,
    optimizer: Optimizers | None,
    averages: Mapping[str, torch.Tensor] = NO_TENSORS,
) -> TrainState:
    """Fill model and optimizer in place, at any number of ranks; collective.

    averages: more tensors to fill, by name (`average.Averages.of_checkpoint`).
    A Commit (from `latest_checkpoint`) counts as verified; a path is verified first. Names, shapes
    and dtypes are compared before anything is written into the model.
    Raises InputError for a damaged, hostile or unfitting checkpoint, on every rank alike.
    """
    if isinstance(checkpoint, str):
        check_local_path(checkpoint)
        found = _verify_together(LocalPlace(os.path.dirname(checkpoint)), checkpoint)
        if isinstance(found, str):
            raise InputError(f"{checkpoint}: {found}; use another checkpoint")
        commit = found
    else:
        commit = checkpoint

    def compare() -> tuple[TrainState, Metadata, dict[str, torch.Tensor]]:
        state = TrainState.from_json(_document(commit, STATE_NAME), commit.path)
        metadata = metadata_of(commit)
        tensors = model_tensors(model)
        compare_tensors(commit.path, metadata, tensors, "model.")
        if optimizer is not None:
            tensors |= _fresh_optimizer_tensors(commit.path, state, metadata, model, optimizer)
        for prefix in {".".join(name.split(".")[:2]) + "." for name in averages}:
            own = {name: t for name, t in averages.items() if name.startswith(prefix)}
            compare_tensors(commit.path, metadata, own, prefix)
        return state, metadata, {**tensors, **averages}

    prepared: list[Any] = []
    _on_all_ranks(lambda: prepared.extend(compare()))
    state, metadata, tensors = prepared
    try:
        read_tensors(commit.path, metadata, tensors)
    except TransferError as error:
        raise CheckpointError(f"{commit.path}: reading failed: {error}") from error
    return state


def _fresh_optimizer_tensors(
    path: str, state: TrainState, metadata: Metadata, model: nn.Module, optimizer: Optimizers
) -> dict[str, torch.Tensor]:
    """The optimizer's tensors, made first where it never stepped, and compared."""
    optimizers = as_tuple(optimizer)
    has_any = any(name.startswith("optim.") for name in metadata.state_dict_metadata)
    if state.step == 0 and not has_any:  # saved before the first step made any
        for one in optimizers:
            one.state.clear()
        return {}
    get_optimizer_state_dict(model, optimizers)  # makes absent state by a step of zeros, lr = 0
    tensors = optimizer_tensors(model, optimizers)
    compare_tensors(path, metadata, tensors, "optim.")
    return tensors


def read_document(path: str, name: str) -> str:
    """The text of a document (config.yaml, model.json) of the step folder `path`, verified."""
    check_local_path(path)
    try:
        return _document(read_commit(path), name)
    except DamagedError as problem:
        raise InputError(f"{path}: {problem}; use another checkpoint") from None


def _document(commit: Commit, name: str) -> str:
    if name not in commit.files:
        raise InputError(f"{commit.path}: no {name} in it; it holds {', '.join(commit.files)}")
    try:
        return read_checked(commit, name).decode()
    except (DamagedError, UnicodeDecodeError) as problem:
        raise InputError(f"{commit.path}: {name}: {problem}; use another checkpoint") from None


def metadata_of(commit: Commit) -> Metadata:
    """The list of tensors: checksum first, then the limited unpickler on the same bytes."""
    place = os.path.join(commit.path, METADATA_NAME)
    try:
        content = read_checked(commit, METADATA_NAME)
    except (DamagedError, KeyError) as problem:
        raise InputError(f"{commit.path}: {problem}; use another checkpoint") from None
    return decode_metadata(content, place, commit.files)


def verified_commit(path: str) -> Commit:
    """The commit of the step folder `path`, every file compared with its checksum.

    One process, no process group. Raises InputError.
    """
    try:
        commit = read_commit(path)
        check_contents(commit)
    except DamagedError as problem:
        raise InputError(f"{path}: {problem}; use another checkpoint") from None
    return commit


def _on_main(action: Callable[[], T], group: Group = None) -> T:
    return dist.on_main(action, CheckpointError, group)


def _on_all_ranks(action: Callable[[], T], group: Group = None) -> list[T]:
    return dist.on_all_ranks(action, CheckpointError, group)


def check_local_path(path: str) -> None:
    if "://" in path:
        raise InputError(f"{path}: checkpoints are kept in local or mounted folders, not at a URL")


def check_document_names(documents: Mapping[str, str]) -> None:
    for name in documents:
        if name != os.path.basename(name) or name in (COMMIT_NAME, STATE_NAME) or name[:1] in "._":
            raise ValueError(f"document name {name!r}: must be a plain file name not used already")
