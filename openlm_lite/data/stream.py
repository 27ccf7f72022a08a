"""From the blocks of a dataset to this rank's batches.

    TokenStream(dataset, seq_len, …)       endless: sample i -> row of seq_len + 1 ids
    train_batches(stream, …)               global batch b = samples [first + b*G, first + (b+1)*G);
                                           rank r gets every world_size-th of them, from r on
    val_batches(dataset, …)                rows in the order of the shards, once

The state of the data is one integer, the next sample: rank count, restarts and prefetching do not
enter into which rows make a global batch. Shapes: B batch, T position (seq_len).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from openlm_lite.data.dataset import Dataset
from openlm_lite.data.order import Places, RowOrder
from openlm_lite.data.shards import npy_dtype
from openlm_lite.errors import InputError

# torch's cross_entropy leaves such targets out by default
IGNORE_INDEX = -100
# Samples whose places are computed at once: the numpy calls cost the same for 1 and for 1,000.
_PLACES_AT_ONCE = 2048


@dataclass(frozen=True)
class DataConfig:
    """What a run trains and validates on."""

    train: str  # dataset folder (or its manifest.jsonl)
    seq_len: int  # tokens per row; divides the dataset's block_tokens
    val: dict[str, str] = field(default_factory=dict)  # name -> dataset folder
    seed: int = 0  # of the order of the rows
    shuffle_shards: int = 16  # rows are shuffled within windows of this many shards
    prefetch_batches: int = 4  # read ahead in a background thread; 0 = read when asked

    def __post_init__(self) -> None:
        problems = []
        for name, least in (("seq_len", 1), ("seed", 0), ("shuffle_shards", 1)):
            if getattr(self, name) < least:
                problems.append(f"{name} = {getattr(self, name)}, must be at least {least}")
        if self.prefetch_batches < 0:
            problems.append(f"prefetch_batches = {self.prefetch_batches}, must not be negative")
        if problems:
            raise InputError("data: " + "; ".join(problems))


class Batch(NamedTuple):
    """This rank's part of one optimizer step (or of one validation batch)."""

    tokens_BT: torch.Tensor  # int64
    targets_BT: torch.Tensor  # int64; IGNORE_INDEX where there is no target
    first_index: int  # index of the first row of the batch over all ranks


class TokenStream:
    """Sample i, for every i >= 0, over endless epochs; pure in (dataset, seq_len, seed, K, i)."""

    def __init__(self, dataset: Dataset, seq_len: int, seed: int, shuffle_shards: int) -> None:
        self.dataset = dataset
        self.seq_len = seq_len
        self._rows_per_block = dataset.rows_per_block(seq_len)
        blocks = np.array([entry.num_sequences for entry in dataset.manifest.shards])
        self._order = RowOrder(
            blocks * self._rows_per_block, seed=seed, shuffle_shards=shuffle_shards
        )
        self.rows_per_epoch = self._order.rows_per_epoch
        # a batch across two windows must not close the shards that the next one needs
        dataset.max_open_shards = max(dataset.max_open_shards, 2 * shuffle_shards)

    def locate(self, index: int) -> tuple[int, int, int, int]:
        """(epoch, shard, block within the shard, row within the block) of sample `index`."""
        places = self._order.locate(np.array([index]))
        block, row = divmod(int(places.row[0]), self._rows_per_block)
        return int(places.epoch[0]), int(places.shard[0]), block, row

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """rows_BI, int64 [len(indices), seq_len + 1]: inputs and, shifted by one, targets."""
        return self.read(self.places(indices)).astype(np.int64)

    def places(self, indices: np.ndarray) -> Places:
        """Where the samples `indices` (int64, any order) lie, computed at once."""
        return self._order.locate(indices)

    def read(self, places: Places) -> np.ndarray:
        """rows_BI [n, seq_len + 1] at `places`, in the dtype of the shards."""
        blocks, rows = np.divmod(places.row, self._rows_per_block)
        starts = rows * self.seq_len
        out = np.empty((len(starts), self.seq_len + 1), dtype=npy_dtype(self.dataset.info.dtype))
        shards = {s: self.dataset.blocks(s) for s in np.unique(places.shard).tolist()}
        where = zip(places.shard.tolist(), blocks.tolist(), starts.tolist(), strict=True)
        for k, (shard, block, start) in enumerate(where):
            out[k] = shards[shard][block, start : start + self.seq_len + 1]
        return out


def train_batches(
    stream: TokenStream,
    *,
    first_sample: int,
    global_batch: int,
    rank: int,
    world_size: int,
    prefetch: int,
) -> Iterator[Batch]:
    """This rank's rows of one global batch after the other, endless, from `first_sample` on.

    `global_batch` counts rows over all ranks. Up to `prefetch` batches are read ahead in a thread
    (0: none); its errors are raised here, and closing the generator ends it.
    """
    if not 0 <= rank < world_size <= global_batch or first_sample < 0:
        raise InputError(
            f"rank {rank} of {world_size} cannot share batches of {global_batch} rows from sample "
            f"{first_sample}; needed: 0 <= rank < world size <= rows per global batch"
        )
    batches = _read_train(stream, first_sample, global_batch, rank, world_size)
    return _in_background(batches, prefetch) if prefetch > 0 else batches


def _read_train(
    stream: TokenStream, first: int, global_batch: int, rank: int, world_size: int
) -> Iterator[Batch]:
    mine = np.arange(rank, global_batch, world_size)
    together = max(1, _PLACES_AT_ONCE // len(mine))
    while True:
        firsts = first + global_batch * np.arange(together)
        places = stream.places((firsts[:, None] + mine).reshape(-1))
        for i, batch_first in enumerate(firsts.tolist()):
            part = slice(i * len(mine), (i + 1) * len(mine))
            rows = stream.read(Places(*(column[part] for column in places)))
            # widened only here, into the two tensors: twice as fast as gathering int64 rows
            tokens_BT = torch.from_numpy(rows[:, :-1].astype(np.int64))
            targets_BT = torch.from_numpy(rows[:, 1:].astype(np.int64))
            yield Batch(tokens_BT, targets_BT, batch_first)
        first += global_batch * together


def _in_background(batches: Iterator[Batch], prefetch: int) -> Iterator[Batch]:
    """Run `batches` in a thread that stays at most `prefetch` items ahead."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)
    stop = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
        except BaseException as e:
            put(e)  # for the consumer to raise

    thread = threading.Thread(target=work, name="openlm-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def val_batches(
    dataset: Dataset,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int | None,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """The dataset's rows in order, `batch_size` per rank and batch: rank r has rows r, r+W, ….

    At most `max_tokens` tokens (None: all; at least one row) over all ranks. Every rank gets the
    same number of full batches: rows past the end have only IGNORE_INDEX targets.
    """
    n_rows, per_block = dataset.n_rows(seq_len), dataset.rows_per_block(seq_len)
    if max_tokens is not None:
        n_rows = min(n_rows, max(1, max_tokens // seq_len))
    if not 0 <= rank < world_size or batch_size < 1:
        raise InputError(f"rank {rank} of {world_size}, batch_size {batch_size}: out of range")
    shard_rows = [entry.num_sequences * per_block for entry in dataset.manifest.shards]
    ends = np.cumsum(shard_rows)
    for first in range(0, n_rows, batch_size * world_size):
        tokens = torch.full((batch_size, seq_len), dataset.info.tokenizer.eot_id)
        targets = torch.full((batch_size, seq_len), IGNORE_INDEX)
        for k in range(batch_size):
            row = first + rank + k * world_size
            if row >= n_rows:
                break
            shard = int(np.searchsorted(ends, row, side="right"))
            block, part = divmod(row - int(ends[shard]) + shard_rows[shard], per_block)
            ids = dataset.blocks(shard)[block, part * seq_len : (part + 1) * seq_len + 1]
            ids_T = torch.from_numpy(ids.astype(np.int64))
            tokens[k], targets[k] = ids_T[:-1], ids_T[1:]
        yield Batch(tokens, targets, first)
