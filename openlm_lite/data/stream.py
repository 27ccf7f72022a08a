"""From the blocks of a dataset to this rank's batches.

    TokenStream(sources, mixture)          endless: sample i -> row of seq_len + 1 ids
    train_batches(stream, …)               global batch b = samples [first + b*G, first + (b+1)*G);
                                           each rank gets those of its lanes (`TokenStream.share`)
    val_batches(dataset, …)                rows in the order of the shards, once

The state of the data is one integer, the next sample: rank count, restarts and prefetching do not
enter into which rows make a global batch. Shapes: B batch, T position (seq_len).
"""

from __future__ import annotations

import atexit
import queue
import sys
import threading
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch

from openlm_lite.data.dataset import BadShardError, Dataset
from openlm_lite.data.masks import IGNORE_INDEX, MaskConfig, apply_masks
from openlm_lite.data.mixture import Mixture
from openlm_lite.data.order import RowOrder, distinct
from openlm_lite.data.shards import npy_dtype
from openlm_lite.errors import InputError

NO_MASKS = MaskConfig()
# Samples whose places are computed at once: the numpy calls cost the same for 1 and for 1,000.
_PLACES_AT_ONCE = 2048
_CHECKSUM_IDS = 64


class Batch(NamedTuple):
    """This rank's part of one optimizer step (or of one validation batch)."""

    tokens_BT: torch.Tensor  # int64
    targets_BT: torch.Tensor  # int64; IGNORE_INDEX where there is no target
    doc_ids_BT: torch.Tensor | None  # int32; None: attention does not stop at documents
    first_index: int  # index of the first row of the batch over all ranks
    sources_B: torch.Tensor | None = None  # int64; None: there is one source
    checksum: int = 0  # of its rows as they were read (`checksum_of`)


class SourceRows:
    """The rows of one dataset, in the order of `RowOrder`, over endless epochs."""

    def __init__(
        self, dataset: Dataset, seq_len: int, *, seed: int, shuffle_shards: int, lanes: int = 1
    ) -> None:
        self.dataset = dataset
        self.seq_len = seq_len
        self.lanes = lanes
        self._rows_per_block = dataset.rows_per_block(seq_len)
        blocks = np.array([entry.num_sequences for entry in dataset.manifest.shards])
        self.order = RowOrder(
            blocks * self._rows_per_block, seed=seed, shuffle_shards=shuffle_shards, lanes=lanes
        )
        # a batch across two windows must not close the shards that the next one needs
        dataset.max_open_shards = max(dataset.max_open_shards, 2 * max(shuffle_shards, lanes))

    def block_and_row(self, row: int) -> tuple[int, int]:
        """(block, row within the block) of the row `row` of a shard."""
        return divmod(row, self._rows_per_block)

    def read(
        self, shards: np.ndarray, rows: np.ndarray, out: np.ndarray, known_bad: set[int]
    ) -> list[BadShardError]:
        """Fill `out` [n, seq_len + 1] with these rows; those of bad shards are left as they are.

        Shards that are known to be bad are not tried again. Returns what others raised.
        """
        blocks, parts = np.divmod(rows, self._rows_per_block)
        starts = parts * self.seq_len
        opened: dict[int, np.ndarray] = {}
        bad: list[BadShardError] = []
        for shard in distinct(shards):
            if shard in known_bad:
                continue
            try:
                opened[shard] = self.dataset.blocks(shard)
            except BadShardError as e:
                bad.append(e)
        where = zip(shards.tolist(), blocks.tolist(), starts.tolist(), strict=True)
        for k, (shard, block, start) in enumerate(where):
            if shard in opened:
                out[k] = opened[shard][block, start : start + self.seq_len + 1]
        return bad


class Origin(NamedTuple):
    """Where samples lie; int64 arrays of one length."""

    source: np.ndarray
    epoch: np.ndarray  # of the source
    shard: np.ndarray  # number of the shard in the source's manifest
    row: np.ndarray  # number of the row within the shard


class TokenStream:
    """Sample i, for every i >= 0, over endless epochs; pure in (sources, mixture, i).

    A shard that cannot be read is an error, or, for up to `max_bad_shards` of them, left out (see
    `read`). `bad_shards` holds those that were met, (source, shard) -> message; those of an earlier
    run, and those that other ranks met meanwhile, are put there to be left out, too.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceRows],
        mixture: Mixture | None = None,
        max_bad_shards: int = 0,
    ) -> None:
        """`mixture` may be None for one source alone. All sources have one seq_len."""
        self.names = tuple(sources)
        self.sources = tuple(sources.values())
        self.mixture = mixture
        self.seq_len = self.sources[0].seq_len
        self.max_bad_shards = max_bad_shards
        self.bad_shards: dict[tuple[str, int], str] = {}
        self.told: set[tuple[str, int]] = set()  # of these, the ones that every rank knows
        self.packed = torch.tensor([source.dataset.info.is_packed for source in self.sources])
        widest = max((s.dataset.info.dtype for s in self.sources), key=lambda name: int(name[4:]))
        self._dtype = npy_dtype(widest)

    def places(self, indices: np.ndarray) -> Origin:
        """Where the samples `indices` (int64, any order) lie, computed at once."""
        source, number = self._of_sources(indices)
        found = Origin(source, *(np.empty_like(source) for _ in range(3)))
        for s in self._sources_in(source):
            here = source == s
            places = self.sources[s].order.locate(number[here])
            for column, values in zip(found[1:], places, strict=True):
                column[here] = values
        return found

    def read(self, places: Origin) -> tuple[np.ndarray, np.ndarray | None]:
        """(rows_BI [n, seq_len + 1] at `places`, in the dtype of the shards; which of them count).

        The second is None where all do; else boolean [n], False for rows of bad shards, which hold
        zeros. Raises BadShardError where there are more bad shards than `max_bad_shards`.
        """
        out = np.empty((len(places.source), self.seq_len + 1), dtype=self._dtype)
        for s in self._sources_in(places.source):
            one = len(self.sources) == 1
            here = slice(None) if one else np.flatnonzero(places.source == s)
            rows = out if one else out[here]
            known_bad = {shard for name, shard in tuple(self.bad_shards) if name == self.names[s]}
            read = self.sources[s].read
            for error in read(places.shard[here], places.row[here], rows, known_bad):
                self._meet(s, error)
            if not one:
                out[here] = rows
        if not self.bad_shards:
            return out, None
        bad = [(self.names.index(name), shard) for name, shard in tuple(self.bad_shards)]
        counts = np.ones(len(out), dtype=bool)
        for s, shard in bad:
            counts &= (places.source != s) | (places.shard != shard)
        out[~counts] = 0
        return out, None if counts.all() else counts

    def share(self, indices_NG: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """This rank's samples of N global batches of G samples each, [N, about G / world_size].

        Of one source every world_size-th sample, which is what lies in the rank's lanes. Of a
        mixture the samples whose numbers within their sources are the rank modulo the world size,
        as nearly as equal shares allow: a source more moves the border between two ranks by a row.
        """
        if self.mixture is None or world_size == 1:
            return indices_NG[:, rank::world_size]
        _, numbers = self._of_sources(indices_NG.reshape(-1))
        by_rank = np.argsort(numbers.reshape(indices_NG.shape) % world_size, axis=1, kind="stable")
        share, more = divmod(indices_NG.shape[1], world_size)
        start = rank * share + min(rank, more)
        mine = np.sort(by_rank[:, start : start + share + (rank < more)], axis=1)
        return np.take_along_axis(indices_NG, mine, axis=1)

    def want(self, indices: np.ndarray) -> None:
        """Have the shards of these samples, and those that follow them, fetched meanwhile."""
        if not any(source.dataset.reads_ahead for source in self.sources):
            return
        source, number = self._of_sources(indices)
        for s in self._sources_in(source):
            rows = self.sources[s]
            rows.dataset.want(rows.order.shards_ahead(number[source == s]))

    def consumed(self, n: int) -> dict[str, tuple[int, float]]:
        """Source -> (samples, epochs) that lie in the first `n` samples."""
        counts = np.array([n]) if self.mixture is None else self.mixture.counts(n)
        per_epoch = [source.order.rows_per_epoch for source in self.sources]
        return {
            name: (int(count), count / rows)
            for name, count, rows in zip(self.names, counts, per_epoch, strict=True)
        }

    def _of_sources(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = np.asarray(indices, dtype=np.int64)
        if self.mixture is None:
            return np.zeros_like(indices), indices
        return self.mixture.locate(indices)

    def _sources_in(self, source: np.ndarray) -> list[int]:
        return [0] if len(self.sources) == 1 else distinct(source)

    def _meet(self, s: int, error: BadShardError) -> None:
        key = self.names[s], error.shard
        if key in self.bad_shards:  # another rank met it while this one tried
            return
        if len(self.bad_shards) >= self.max_bad_shards:
            raise error
        self.bad_shards[key] = str(error)


def single_stream(
    dataset: Dataset, seq_len: int, seed: int, shuffle_shards: int, lanes: int = 1
) -> TokenStream:
    """The stream of one dataset."""
    rows = SourceRows(dataset, seq_len, seed=seed, shuffle_shards=shuffle_shards, lanes=lanes)
    return TokenStream({"train": rows})


def train_batches(
    stream: TokenStream,
    *,
    first_sample: int,
    global_batch: int,
    rank: int,
    world_size: int,
    prefetch: int,
    masks: MaskConfig = NO_MASKS,
) -> Generator[Batch]:
    """This rank's rows of one global batch after the other, endless, from `first_sample` on.

    `global_batch` counts rows over all ranks. Up to `prefetch` batches are read ahead in a thread
    (0: none); its errors are raised here, and closing the generator ends it.
    """
    if not 0 <= rank < world_size <= global_batch or first_sample < 0:
        raise InputError(
            f"rank {rank} of {world_size} cannot share batches of {global_batch} rows from sample "
            f"{first_sample}; needed: 0 <= rank < world size <= rows per global batch"
        )
    reads = _read_train(stream, first_sample, global_batch, rank, world_size)
    if prefetch > 0:
        reads = _in_background(reads, prefetch)
    return _batches_of(reads, stream, masks)


class _Read(NamedTuple):
    """The rows of a batch as they lie in the shards: a quarter of the batch's memory."""

    rows: np.ndarray  # [rows of this rank, seq_len + 1], in the dtype of the shards
    counts: np.ndarray | None  # see TokenStream.read
    places: Origin
    first_index: int


def _read_train(
    stream: TokenStream, first: int, global_batch: int, rank: int, world_size: int
) -> Generator[_Read]:
    n_mine = len(range(rank, global_batch, world_size))
    together = max(1, _PLACES_AT_ONCE // n_mine)
    while True:
        firsts = first + global_batch * np.arange(together)
        whole = firsts[:, None] + np.arange(global_batch)
        indices = stream.share(whole, rank, world_size).reshape(-1)
        places = stream.places(indices)
        stream.want(indices)
        for i, batch_first in enumerate(firsts.tolist()):
            part = slice(i * n_mine, (i + 1) * n_mine)
            here = Origin(*(column[part] for column in places))
            yield _Read(*stream.read(here), here, batch_first)
        first += global_batch * together


def _counts(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


# What the count is while the list alone holds the array: Python's versions differ in it.
_ALONE = _counts([np.empty(0)])[0]


class _Arrays:
    """int64 arrays that are filled again once nobody holds what was in them.

    Fresh memory costs a page fault per 512 ids, more than all the rest of a batch. A tensor, or
    any view of it, holds its array.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def holding(self, ids: np.ndarray) -> torch.Tensor:
        """A tensor of these ids."""
        self._arrays = [array for array in self._arrays if array.shape == ids.shape]
        counts = _counts(self._arrays)
        if _ALONE in counts:
            array = self._arrays[counts.index(_ALONE)]
        else:
            array = np.empty(ids.shape, dtype=np.int64)
            self._arrays.append(array)
        np.copyto(array, ids)
        return torch.from_numpy(array)


def _batches_of(
    reads: Generator[_Read], stream: TokenStream, masks: MaskConfig
) -> Generator[Batch]:
    """The batches; widened here, beside the thread that reads: a third faster than in it."""
    eot_id = stream.sources[0].dataset.info.tokenizer.eot_id
    any_packed = bool(stream.packed.any())
    arrays = _Arrays()
    with closing(reads):
        for rows, counts, places, first_index in reads:
            # widened only now, into the two tensors: twice as fast as gathering int64 rows
            tokens_BT, targets_BT = arrays.holding(rows[:, :-1]), arrays.holding(rows[:, 1:])
            packed_B = stream.packed[torch.from_numpy(places.source)] if any_packed else False
            masked = apply_masks(tokens_BT, targets_BT, masks, eot_id, packed=packed_B)
            if counts is not None:
                masked.targets_BT[torch.from_numpy(~counts)] = IGNORE_INDEX
            sources = torch.from_numpy(places.source) if len(stream.sources) > 1 else None
            yield Batch(*masked, first_index, sources, checksum_of(rows))


def checksum_of(rows: np.ndarray) -> int:
    """Sum of the crc32 of each row's first ids: the same however ranks share a global batch.

    The first ids tell rows apart, and each shard's own crc32 vouches for the rest of them.
    """
    first = rows[:, :_CHECKSUM_IDS]
    content, size = first.tobytes(), first.shape[1] * first.itemsize
    return sum(zlib.crc32(content[start : start + size]) for start in range(0, len(content), size))


def _in_background(reads: Iterator[_Read], prefetch: int) -> Generator[_Read]:
    """Run `reads`, endless, in a thread that stays at most `prefetch` items ahead."""
    ready: queue.SimpleQueue[_Read | BaseException] = queue.SimpleQueue()
    room: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for every item that may be read
    ended = threading.Event()
    for _ in range(prefetch):
        room.put(None)

    def work() -> None:
        try:
            while True:
                room.get()
                if ended.is_set():
                    return
                ready.put(next(reads))
        except BaseException as e:
            ready.put(e)  # for the consumer to raise

    thread = threading.Thread(target=work, name="openlm-prefetch", daemon=True)

    def end() -> None:
        ended.set()
        room.put(None)
        thread.join()

    thread.start()
    # a process that ends in the middle of the data must not tear down torch under the thread
    atexit.register(end)
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            room.put(None)
            yield item
    finally:
        atexit.unregister(end)
        end()


def val_batches(
    dataset: Dataset,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int | None,
    rank: int,
    world_size: int,
    masks: MaskConfig = NO_MASKS,
) -> Generator[Batch]:
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
        tokens = torch.zeros((batch_size, seq_len), dtype=torch.int64)
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
        info = dataset.info
        masked = apply_masks(tokens, targets, masks, info.tokenizer.eot_id, packed=info.is_packed)
        yield Batch(*masked, first)
