"""A dataset: its manifest, and the blocks of its shards when somebody asks for them.

open_dataset(path or URL) -> Dataset   the JSON files read; every shard's size looked at, if local
dataset.want(shards)                   of a URL: fetched into the cache meanwhile (fetch.py)
dataset.blocks(shard) -> ids_BI        mapped, and checked at first use
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from openlm_lite import storage
from openlm_lite.data import manifest as manifest_module
from openlm_lite.data.cache import Cache
from openlm_lite.data.fetch import RemoteShards
from openlm_lite.data.manifest import INFO_NAME, MANIFEST_NAME, DatasetInfo, Manifest
from openlm_lite.data.shards import check_below, check_size, open_shard
from openlm_lite.errors import InputError
from openlm_lite.retries import RefusedError

if TYPE_CHECKING:
    from openlm_lite.data.openlm_shards import OpenLMOptions

OpenBlocks = Callable[[int, bool], np.ndarray]


class BadShardError(InputError):
    """A shard that is missing or damaged; `shard` is its place in the manifest.

    Not raised for what says nothing about the shard: a store that is down, no permission, a full
    disk.
    """

    def __init__(self, message: str, shard: int) -> None:
        super().__init__(message)
        self.shard = shard


class Dataset:
    """The blocks of a prepared folder. Open it with `open_dataset`; safe to share by threads.

    `open_blocks(shard, verify)` gives the blocks of a shard as a read-only array; with `verify`
    it has checked them against the manifest. Default: the tar in `folder`, mapped. `remote` is
    where the shards of a URL are fetched; such an `open_blocks` gets its files from there.
    """

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        info: DatasetInfo,
        open_blocks: OpenBlocks | None = None,
        remote: RemoteShards | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.info = info
        self.block_tokens = info.block_tokens
        self.n_blocks = sum(entry.num_sequences for entry in manifest.shards)
        self.manifest_sha256 = manifest.sha256
        # each holds a file descriptor or two, and of a URL its place in the cache
        self.max_open_shards = 64 if remote is None else 4
        self.remote = remote
        self.id_limit: int | None = None  # the model's, where the tokenizer is unknown
        self._open_blocks = open_blocks or self._open_tar
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._opening: dict[int, threading.Lock] = {}
        self._verified: set[int] = set()
        self._lock = threading.Lock()

    def rows_per_block(self, seq_len: int) -> int:
        """How many rows of `seq_len` a block gives. Raises InputError if they do not fill it."""
        if seq_len < 1 or self.block_tokens % seq_len:
            raise InputError(
                f"data.seq_len: {seq_len} does not divide the {self.block_tokens} tokens of a "
                f"block of {self.folder}; allowed are {_divisors_text(self.block_tokens)}; choose "
                "one or prepare the data with another --block-tokens"
            )
        return self.block_tokens // seq_len

    def n_rows(self, seq_len: int) -> int:
        """Rows of `seq_len` tokens in one epoch."""
        return self.n_blocks * self.rows_per_block(seq_len)

    @property
    def reads_ahead(self) -> bool:
        """Whether `want` has a meaning: shards are here only after some work."""
        return self.remote is not None

    def want(self, shards: Sequence[int]) -> None:
        """Say which shards are read next, the next first; errors are raised by `blocks`.

        This replaces what was wanted before. Without a meaning for local shards.
        """
        if self.remote is None:
            return
        with self._lock:
            closed = [shard for shard in shards if shard not in self._open]
        self.remote.want([self.manifest.shards[shard].file_name for shard in closed])

    def blocks(self, shard: int) -> np.ndarray:
        """ids_BI [blocks, block_tokens + 1] of a shard; a view of the file, verified once.

        Waits for a remote shard to arrive. Raises BadShardError for a shard that is missing or
        damaged; RefusedError, RunError where its store or the local disk is at fault.
        """
        with self._lock:
            ids = self._open.get(shard)
            if ids is not None:
                self._open.move_to_end(shard)
                return ids
            opening = self._opening.setdefault(shard, threading.Lock())
        with opening:  # not the one of all shards: others can be read while this one is fetched
            with self._lock:
                ids = self._open.get(shard)
                verify = shard not in self._verified
            if ids is None:
                ids = self._opened(shard, verify)
                self._keep(shard, ids)
        return ids

    def _opened(self, shard: int, verify: bool) -> np.ndarray:
        try:
            ids = self._open_blocks(shard, verify)
            if verify and self.id_limit is not None:
                name = self.manifest.shards[shard].file_name
                check_below(f"{self.folder}/{name}", ids, self.id_limit)
            return ids
        except (RefusedError, BadShardError):
            raise
        except InputError as e:
            name = self.manifest.shards[shard].file_name
            url = storage.safe_join(self.folder, name)
            if self.remote is not None:
                self.remote.let_go(name)
            # what is wrong inside a shard is said of its file in the cache
            raise BadShardError(str(e) if url in str(e) else f"{url}: {e}", shard) from e

    def _keep(self, shard: int, ids: np.ndarray) -> None:
        """Have the shard open, and close those that were used longest ago."""
        dropped: list[int] = []
        with self._lock:
            self._verified.add(shard)
            self._open[shard] = ids
            self._opening.pop(shard, None)
            while len(self._open) > self.max_open_shards:
                dropped.append(self._open.popitem(last=False)[0])
        if self.remote is not None:
            for other in dropped:
                self.remote.let_go(self.manifest.shards[other].file_name)

    def _open_tar(self, shard: int, verify: bool) -> np.ndarray:
        entry = self.manifest.shards[shard]
        if self.remote is not None:
            path = self.remote.path_of(entry.file_name)
        else:
            path = storage.safe_join(self.folder, entry.file_name)
        return open_shard(path, entry, self.info, verify=verify)


def open_dataset(
    path: str, cache: Cache | None = None, openlm: OpenLMOptions | None = None
) -> Dataset:
    """Open a dataset by its folder or its manifest.jsonl, a path or a URL.

    Reads the two JSON files and looks at the size of every local shard; the shards themselves are
    checked when they are first read. `cache` is where shards of a URL are kept (default: the
    user's cache folder). A manifest without a dataset.json is OpenLM's (openlm_shards.py); `openlm`
    is what its shards do not say. Raises InputError.
    """
    dataset = load_dataset(path, cache, openlm)
    if dataset.remote is None:
        for entry in dataset.manifest.shards:
            check_size(storage.safe_join(dataset.folder, entry.file_name), entry)
    return dataset


def load_dataset(
    path: str, cache: Cache | None = None, openlm: OpenLMOptions | None = None
) -> Dataset:
    """What `open_dataset` does, without a look at the shards."""
    is_remote = storage.is_remote(path)
    folder = path.rstrip("/") if is_remote else storage.local_path(path)
    if os.path.basename(folder) == MANIFEST_NAME:
        folder = os.path.dirname(folder) or "."
    if not is_remote:
        if not os.path.isdir(folder):
            raise InputError(f"{path}: no such dataset folder; make one with `openlm prepare`")
        if not os.path.exists(os.path.join(folder, MANIFEST_NAME)):
            raise InputError(f"{path}: {_what_instead(folder)}")
    if not storage.exists(os.path.join(folder, INFO_NAME)):
        if not is_remote and os.path.isdir(os.path.join(folder, ".prepare")):
            raise InputError(f"{path}: {_what_instead(folder)}")
        from openlm_lite.data.openlm_shards import load_openlm  # it builds on this module

        return load_openlm(folder, openlm, cache)
    manifest = manifest_module.load_manifest(os.path.join(folder, MANIFEST_NAME))
    info = manifest_module.load_info(os.path.join(folder, INFO_NAME))
    manifest_module.check_agree(manifest, info)
    remote = RemoteShards(folder, manifest.shards, cache or Cache()) if is_remote else None
    return Dataset(folder, manifest, info, remote=remote)


def _what_instead(folder: str) -> str:
    """Why a folder without a manifest is no dataset, and what to do."""
    inner = sorted(
        name for name in os.listdir(folder) if os.path.exists(f"{folder}/{name}/{MANIFEST_NAME}")
    )
    if inner:
        return f"holds the datasets {', '.join(inner)}; name one, such as {folder}/{inner[0]}"
    if os.path.isdir(os.path.join(folder, ".prepare")):
        return "is not finished; run the same `openlm prepare` command again, it continues"
    return f"holds no {MANIFEST_NAME}; name a folder that `openlm prepare` made"


def _divisors_text(n: int) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    shown = divisors if len(divisors) <= 20 else divisors[-20:]
    return "its divisors " + ", ".join(str(d) for d in shown)


def check_fits_model(dataset: Dataset, vocab_size: int) -> None:
    """Raises InputError if the dataset's ids may lie outside the model's vocabulary."""
    tokenizer = dataset.info.tokenizer
    if tokenizer.vocab_size is None:
        dataset.id_limit = vocab_size  # checked at the first use of each shard
    elif tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"model.vocab_size: {vocab_size} is smaller than the {tokenizer.vocab_size} ids of "
            f"{dataset.folder} (tokenizer {tokenizer.name}); set model.vocab_size to at least "
            f"{tokenizer.vocab_size} or use data made with a smaller tokenizer"
        )
