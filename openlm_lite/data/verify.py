"""`openlm inspect --verify`: every shard of a dataset read and checked, by some processes.

    shard -> size, tar headers, crc32, rows, ids in range -> good, or a message with place
                 |
                 +-- good: a line in --journal FILE; the next run passes over what has not changed

Our own shards and OpenLM's, local or remote. A dataset's folder may be read-only, so nothing is
ever written there: a check that may be stopped writes to the file that --journal names, and without
one starts from the beginning each time. Bad shards are never in the journal.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from openlm_lite import storage
from openlm_lite.data.dataset import Dataset, load_dataset
from openlm_lite.data.manifest import ShardEntry
from openlm_lite.data.pool import Progress, each_done
from openlm_lite.errors import InputError

LoadDataset = Callable[[str], Dataset]
_JOURNAL_VERSION = 1


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_dataset` found where nothing is bad."""

    n_shards: int
    n_from_journal: int  # verified by an earlier run, unchanged since
    n_tokens: int
    bytes: int


class _Result(NamedTuple):
    """What a worker says about one shard."""

    problem: str | None
    crc32: int | None  # of the bytes that were read, where they are a local file


def verify_dataset(
    path: str,
    workers: int = 1,
    journal: str | None = None,
    load: LoadDataset = load_dataset,
) -> VerifyReport:
    """Read and check every shard of the dataset at `path` by `workers` processes (0: all cores).

    `load` opens it (a module's function or a partial of one: the workers call it too). `journal`
    names a file that records good shards, for a later run to go on from. Raises one InputError
    that lists all bad shards, and InputError for a journal of another dataset.
    """
    _loaded.cache_clear()
    dataset = load(path)
    entries = dataset.manifest.shards
    record = None if journal is None else _Journal(journal, dataset)
    left = [n for n, entry in enumerate(entries) if record is None or not record.has(entry)]
    bad: dict[int, str] = {}
    progress = Progress("verify", len(left), "shards")
    try:
        jobs = each_done(_verify_shard, left, (path, load), workers or os.cpu_count() or 1)
        for shard, result in jobs:
            progress.add(1, entries[shard].num_tokens)
            if result.problem is not None:
                bad[shard] = result.problem
            elif record is not None:
                record.add(entries[shard], result.crc32)
    finally:
        progress.close()
        if record is not None:
            record.close()
    if bad:
        lines = [bad[shard] for shard in sorted(bad)]
        raise InputError(f"{len(bad)} of {len(entries)} shards are bad:\n" + "\n".join(lines))
    return VerifyReport(
        n_shards=len(entries),
        n_from_journal=len(entries) - len(left),
        n_tokens=sum(entry.num_tokens for entry in entries),
        bytes=sum(entry.bytes or 0 for entry in entries),
    )


def _verify_shard(shard: int, path: str, load: LoadDataset) -> _Result:
    dataset = _loaded(path, load)
    try:
        dataset.blocks(shard)
        return _Result(None, _crc32(dataset, dataset.manifest.shards[shard]))
    except (InputError, OSError) as e:  # OSError: the disk cannot read it
        return _Result(str(e), None)


@functools.lru_cache(maxsize=1)
def _loaded(path: str, load: LoadDataset) -> Dataset:
    """The dataset in this worker, with one shard open at a time."""
    dataset = load(path)
    dataset.max_open_shards = 1
    return dataset


def _crc32(dataset: Dataset, entry: ShardEntry) -> int | None:
    """Of a local file; where the manifest has it, it has just been checked."""
    if entry.crc32 is not None or dataset.remote is not None:
        return entry.crc32
    crc = 0
    with open(storage.safe_join(dataset.folder, entry.file_name), "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


class _Journal:
    """A JSON line that names the dataset, then one per good shard: size, time, crc32."""

    def __init__(self, path: str, dataset: Dataset) -> None:
        self._path = storage.local_path(path)
        self._dataset = dataset
        self._head = {
            "journal": "openlm inspect --verify",
            "version": _JOURNAL_VERSION,
            "manifest_sha256": dataset.manifest_sha256,
            "fingerprint": dataset.info.fingerprint,
            "vocab_size": dataset.info.tokenizer.vocab_size,
        }
        self._good: dict[str, dict[str, Any]] = {}
        whole = self._read() if os.path.exists(self._path) else 0
        self._file = open(self._path, "ab")  # noqa: SIM115  (closed by `close`)
        self._file.truncate(whole)  # a line that a kill cut in two
        if whole == 0:
            self._write(self._head)

    def has(self, entry: ShardEntry) -> bool:
        """Whether the shard was good and has neither changed since nor a new crc32 to meet."""
        line = self._good.get(entry.file_name)
        if line is None or entry.crc32 not in (None, line["crc32"]):
            return False
        size, mtime_ns = self._identity(entry)
        return mtime_ns is not None and (line["bytes"], line["mtime_ns"]) == (size, mtime_ns)

    def add(self, entry: ShardEntry, crc32: int | None) -> None:
        """Record a good shard."""
        size, mtime_ns = self._identity(entry)
        line = {"shard": entry.file_name, "bytes": size, "mtime_ns": mtime_ns, "crc32": crc32}
        self._write(line)

    def close(self) -> None:
        self._file.close()

    def _identity(self, entry: ShardEntry) -> tuple[int | None, int | None]:
        """(size, time of change) of a shard; (None, None) where it is not there."""
        if self._dataset.remote is not None:  # the same URL: the size says whether it is the same
            return entry.bytes, 0
        try:
            status = os.stat(storage.safe_join(self._dataset.folder, entry.file_name))
        except OSError:
            return None, None
        return status.st_size, status.st_mtime_ns

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def _read(self) -> int:
        """Take in the journal's whole lines; returns their length in bytes."""
        with open(self._path, "rb") as file:
            raw = file.read()
        lines = raw.split(b"\n")
        whole = len(raw) - len(lines.pop())
        if not lines and raw:
            lines = [raw]  # not a journal: say so, and do not empty it
        for number, text in enumerate(lines, start=1):
            try:
                line = json.loads(text)
                if number == 1:
                    self._check_head(line)
                else:
                    self._good[line["shard"]] = line
                    _ = line["bytes"], line["mtime_ns"], line["crc32"]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{self._path}:{number}: not a line of a journal of `openlm inspect --verify`; "
                    "name another file, or remove this one to check everything"
                ) from None
        return whole

    def _check_head(self, line: dict[str, Any]) -> None:
        for name, value in self._head.items():
            if line[name] != value:
                raise InputError(
                    f"{self._path}:1: the journal of another dataset or version ({name} is "
                    f"{line[name]!r}, not {value!r}); name another file, or remove this one"
                )
