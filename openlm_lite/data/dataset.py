"""A dataset: its manifest, and the blocks of its shards when somebody asks for them.

open_dataset(path) -> Dataset          the two JSON files read, every shard's size looked at
dataset.blocks(shard) -> ids_BI        mapped, and checked at first use
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from openlm_lite import storage
from openlm_lite.data import manifest as manifest_module
from openlm_lite.data.manifest import INFO_NAME, MANIFEST_NAME, DatasetInfo, Manifest
from openlm_lite.data.shards import check_size, open_shard
from openlm_lite.errors import InputError

OpenBlocks = Callable[[int, bool], np.ndarray]


class Dataset:
    """The blocks of a prepared folder. Open it with `open_dataset`; safe to share by threads.

    `open_blocks(shard, verify)` gives the blocks of a shard as a read-only array; with `verify`
    it has checked them against the manifest. Default: the tar in `folder`, mapped.
    """

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        info: DatasetInfo,
        open_blocks: OpenBlocks | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.info = info
        self.block_tokens = info.block_tokens
        self.n_blocks = sum(entry.num_sequences for entry in manifest.shards)
        self.manifest_sha256 = manifest.sha256
        self.max_open_shards = 64  # each holds a file descriptor
        self._open_blocks = open_blocks or self._open_local
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
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

    def blocks(self, shard: int) -> np.ndarray:
        """ids_BI [blocks, block_tokens + 1] of a shard; a view of the file, verified once."""
        with self._lock:
            ids = self._open.get(shard)
            if ids is None:
                ids = self._open_blocks(shard, shard not in self._verified)
                self._verified.add(shard)
                self._open[shard] = ids
                if len(self._open) > self.max_open_shards:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
            return ids

    def _open_local(self, shard: int, verify: bool) -> np.ndarray:
        entry = self.manifest.shards[shard]
        path = storage.safe_join(self.folder, entry.file_name)
        return open_shard(path, entry, self.info, verify=verify)


def open_dataset(path: str) -> Dataset:
    """Open a dataset by its folder or its manifest.jsonl.

    Reads the two JSON files and looks at the size of every shard; the shards themselves are
    checked when they are first read. Raises InputError.
    """
    dataset = load_dataset(path)
    for entry in dataset.manifest.shards:
        check_size(storage.safe_join(dataset.folder, entry.file_name), entry)
    return dataset


def load_dataset(path: str) -> Dataset:
    """What `open_dataset` does, without a look at the shards."""
    folder = storage.local_path(path)
    if os.path.basename(folder) == MANIFEST_NAME:
        folder = os.path.dirname(folder) or "."
    if not os.path.isdir(folder):
        raise InputError(f"{path}: no such dataset folder; make one with `openlm prepare`")
    if not os.path.exists(os.path.join(folder, MANIFEST_NAME)):
        raise InputError(f"{path}: {_what_instead(folder)}")
    manifest = manifest_module.load_manifest(os.path.join(folder, MANIFEST_NAME))
    info = manifest_module.load_info(os.path.join(folder, INFO_NAME))
    manifest_module.check_agree(manifest, info)
    return Dataset(folder, manifest, info)


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
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"model.vocab_size: {vocab_size} is smaller than the {tokenizer.vocab_size} ids of "
            f"{dataset.folder} (tokenizer {tokenizer.name}); set model.vocab_size to at least "
            f"{tokenizer.vocab_size} or use data made with a smaller tokenizer"
        )
