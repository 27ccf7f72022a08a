"""COMMIT.json: the file that makes a folder of data a checkpoint, and its verification.

A folder `step_00001000` without a COMMIT.json that verifies is not a checkpoint:

    {"crc32": 123,                    over the canonical text of everything below
     "format_version": 1,
     "step": 1000, "tokens": 65536000, "next_sample": 32000,
     "guard": {},                     of `guard.Guard`; absent where it remembers nothing
     "world_size": 8,                 ranks that wrote it; any number may read it
     "facts": {"manifest_sha256": …}, what the run wants to compare before it goes on
     "files": {"__0_0.distcp": [size in bytes, crc32], …}}
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from openlm_lite.errors import InputError
from openlm_lite.storage import sync_folder

log = logging.getLogger(__name__)

COMMIT_NAME = "COMMIT.json"
TEMPORARY = ".tmp-"  # in front of the names of folders that are being written or deleted
FORMAT_VERSION = 1
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_CRC_CHUNK_BYTES = 4 << 20
_CRC_THREADS = 4  # zlib releases the interpreter lock: about 2 GB/s per core


class DamagedError(Exception):
    """A folder that looks like a checkpoint is not one; the message names the file and why."""


@dataclass(frozen=True)
class TrainState:
    """Where training stands: all that is not a tensor. The same on every rank."""

    step: int  # optimizer steps done
    tokens: int  # tokens trained on
    next_sample: int  # global index of the next batch's first sample
    guard: Mapping[str, Any] = field(default_factory=dict)  # of `guard.Guard.state`, which reads it

    def __post_init__(self) -> None:
        for name in ("step", "tokens", "next_sample"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise InputError(f"train state: {name} = {value!r}: must be an integer >= 0")
        if type(self.guard) is not dict:
            raise InputError(f"train state: guard = {self.guard!r}: must be a mapping")

    def to_plain(self) -> dict[str, Any]:
        """JSON values; without an empty `guard`, as in checkpoints from before there was one."""
        return {name: value for name, value in vars(self).items() if name != "guard" or value}

    def to_json(self) -> str:
        return json.dumps(self.to_plain(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, place: str = "state.json") -> TrainState:
        """Raises InputError where `text` is not exactly what `to_json` writes."""
        try:
            values = json.loads(text)
            return cls(**values)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{place}: not a train state: {error}") from None


@dataclass(frozen=True)
class Commit:
    """A verified checkpoint."""

    path: str  # its folder
    state: TrainState
    world_size: int  # ranks that wrote it
    facts: Mapping[str, Any]  # what `save_checkpoint` was given
    files: Mapping[str, tuple[int, int]]  # file name -> (size in bytes, crc32)

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def n_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def step_folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of_folder(name: str) -> int | None:
    """The step in the name of a committed folder; None for any other name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def step_folders(root: str) -> list[str]:
    """The paths of the `step_…` folders in `root`, newest first; none where `root` is absent."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    steps = {name: step_of_folder(name) for name in names}
    found = sorted(((step, name) for name, step in steps.items() if step is not None), reverse=True)
    return [os.path.join(root, name) for _, name in found]


def encode_commit(commit: Commit) -> str:
    """The text of COMMIT.json."""
    body = {
        "format_version": FORMAT_VERSION,
        **commit.state.to_plain(),
        "world_size": commit.world_size,
        "facts": dict(commit.facts),
        "files": {name: list(entry) for name, entry in sorted(commit.files.items())},
    }
    return _sealed(body)


def _sealed(body: dict[str, Any]) -> str:
    checksum = zlib.crc32(json.dumps(body, allow_nan=False).encode())
    return json.dumps({"crc32": checksum, **body}, indent=2, allow_nan=False) + "\n"


def read_commit(path: str) -> Commit:
    """COMMIT.json of the folder `path`, without a look at the other files.

    Raises DamagedError where it is absent or changed, InputError where a newer version wrote it.
    """
    place = os.path.join(path, COMMIT_NAME)
    try:
        with open(place, "rb") as file:
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{COMMIT_NAME} is missing: saving was not completed") from None
    return parse_commit(content, path)


def parse_commit(content: bytes, path: str) -> Commit:
    """What COMMIT.json of `path`, a folder or a URL of a step, says. Raises as `read_commit`."""
    try:
        body = json.loads(content)
        body.pop("crc32")
        unchanged = _sealed(body).encode() == content
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise DamagedError(f"{COMMIT_NAME} cannot be read: {error!r}") from None
    if not unchanged:
        raise DamagedError(f"{COMMIT_NAME} was changed: its checksum does not fit")
    if body.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}/{COMMIT_NAME}: format_version {body.get('format_version')!r}; this version of "
            f"openlm_lite reads {FORMAT_VERSION}: update openlm_lite"
        )
    try:
        commit = Commit(
            path=path,
            state=TrainState(
                body["step"], body["tokens"], body["next_sample"], body.get("guard", {})
            ),
            world_size=body["world_size"],
            facts=dict(body["facts"]),
            files={name: (int(size), int(crc)) for name, (size, crc) in body["files"].items()},
        )
    except (InputError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DamagedError(f"{COMMIT_NAME} lacks something: {error!r}") from None
    for name in commit.files:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise DamagedError(f"{COMMIT_NAME} names {name!r}, which is not a plain file name")
    folder_step = step_of_folder(os.path.basename(os.path.abspath(path)))
    if folder_step is not None and folder_step != commit.step:
        raise DamagedError(f"{COMMIT_NAME} says step {commit.step}: the folder was renamed")
    return commit


def check_sizes(commit: Commit) -> None:
    """Every file is there and has its size. Raises DamagedError naming the first that does not."""
    for name, (size, _) in commit.files.items():
        try:
            found = os.path.getsize(os.path.join(commit.path, name))
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        if found != size:
            raise DamagedError(f"{name} has {found} bytes instead of {size}")


def check_contents(commit: Commit, names: Iterable[str] | None = None) -> None:
    """Sizes, then the crc32 of the files `names` (all): reads them. Raises DamagedError."""
    check_sizes(commit)
    chosen = list(commit.files if names is None else names)
    with ThreadPoolExecutor(max_workers=_CRC_THREADS) as pool:
        checksums = pool.map(lambda name: _crc_or_problem(commit.path, name), chosen)
        for name, found in zip(chosen, checksums, strict=True):
            if isinstance(found, str):
                raise DamagedError(f"{name}: {found}")
            if found != commit.files[name][1]:
                raise DamagedError(f"{name} was changed: its crc32 does not fit")


def read_checked(commit: Commit, name: str) -> bytes:
    """The content of one small file, compared with its crc32. Raises DamagedError."""
    try:
        with open(os.path.join(commit.path, name), "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise DamagedError(f"{name} is missing") from None
    if zlib.crc32(content) != commit.files[name][1]:
        raise DamagedError(f"{name} was changed: its crc32 does not fit")
    return content


def _crc_or_problem(folder: str, name: str) -> int | str:
    try:
        return crc32_of_file(os.path.join(folder, name))
    except FileNotFoundError:
        return "is missing"
    except OSError as error:  # other errors (permission, network) do not tell that it is damaged
        if error.errno != errno.EIO:
            raise
        return f"cannot be read ({error})"


def crc32_of_file(path: str) -> int:
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CRC_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def write_synced(path: str, text: str) -> None:
    """Write `text` and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def quarantine(path: str, problem: object) -> None:
    root, name = os.path.split(path)
    target = os.path.join(root, f"bad-{name}")
    attempt = 1
    while os.path.exists(target):
        attempt += 1
        target = os.path.join(root, f"bad-{name}.{attempt}")
    os.rename(path, target)
    sync_folder(root)
    log.warning("%s is damaged (%s): renamed to %s", path, problem, os.path.basename(target))


def remove_leftovers(root: str) -> None:
    """Temporary folders of saves and deletions that were cut off (rank 0)."""
    if os.path.isdir(root):
        for name in os.listdir(root):
            if name.startswith(TEMPORARY):
                shutil.rmtree(os.path.join(root, name))
