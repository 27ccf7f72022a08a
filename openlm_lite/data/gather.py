"""Stage 4 of `openlm prepare`: write the shards out of a global shuffle.

    parts: documents sorted by a keyed 64-bit hash of (file, position)
        |
        v   all parts merged by hash = the token stream
    [ cell 0 | cell 1 | cell 2 | … ]   ranges of the hash, with the tokens before each
    shard k = tokens [k*S, (k+1)*S] of the stream: found through the cells, read from every part

The hash alone decides the order, so the bytes of a shard depend neither on how the work was cut
nor on who did it. A worker holds one shard in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openlm_lite import storage
from openlm_lite.data import order, packing, parts
from openlm_lite.data.manifest import ShardEntry
from openlm_lite.data.parts import DOC
from openlm_lite.data.shards import npy_dtype, write_shard
from openlm_lite.data.spill import PieceReport, SpillConfig, table_paths
from openlm_lite.errors import InputError

_CELL_TOKENS = 4 << 20


@dataclass(frozen=True)
class Cells:
    """The stream of one split: `starts[c]` tokens lie before cell c; the last entry is the total.

    Cell c holds the documents with hash in [bound(c), bound(c + 1)).
    """

    tables: tuple[str, ...]  # of all parts
    starts: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return self.starts[-1]

    def bound(self, cell: int) -> int:
        return -(-(cell << 32) // (len(self.starts) - 1)) << 32


@dataclass(frozen=True)
class ShardJob:
    """A shard to write: blocks [first_block, first_block + n_blocks) of the stream."""

    split: str
    path: str
    url: str | None  # where it is sent when it is done, and then deleted here; None: it stays
    mark: str  # JSON file that says the shard is done
    hash_range: tuple[int, int]  # of the cells that hold its tokens
    skip_tokens: int  # tokens of these cells before the shard's first
    first_block: int
    n_blocks: int
    block_tokens: int
    dtype: str
    row_keys: tuple[int, ...] = ()  # not empty: blocks are packed rows, in the order of these keys


def gather_cells(reports: Sequence[PieceReport], split: str, cfg: SpillConfig) -> Cells:
    """Look through the tables of all parts of a split and count the tokens of every cell."""
    paths = tuple(
        path
        for piece, report in enumerate(reports)
        for path in table_paths(piece, split, report.parts[split], cfg)
    )
    tokens = sum(n for report in reports for _, n in report.counts[split].values())
    n_cells = max(1, -(-tokens // _CELL_TOKENS))
    per_cell = np.zeros(n_cells, dtype=np.int64)
    for path in paths:
        table = parts.read_table(path, DOC)
        cells = ((table["hash"] >> np.uint64(32)) * np.uint64(n_cells)) >> np.uint64(32)
        # float64 counts are exact up to 2**53 tokens
        sums = np.bincount(cells.astype(np.int64), weights=table["length"], minlength=n_cells)
        per_cell += sums.astype(np.int64)
    return Cells(paths, (0, *np.cumsum(per_cell).tolist()))


def shard_jobs(
    cells: Cells,
    split: str,
    *,
    folder: str,
    url: str | None,
    marks: str,
    block_tokens: int,
    blocks_per_shard: int,
    dtype: str,
    pack_seed: int | None = None,
) -> list[ShardJob]:
    """All shards of a split. The tokens after the last full block are left out.

    With `pack_seed` a shard holds, whole, the documents that begin in its part of the stream; none
    is left out, and `n_blocks` is not the number of rows that they will fill.
    """
    n_blocks = (cells.n_tokens - 1) // block_tokens
    if pack_seed is not None:
        n_blocks = -(-cells.n_tokens // block_tokens)
    jobs: list[ShardJob] = []
    for number, first in enumerate(range(0, n_blocks, blocks_per_shard)):
        count = min(blocks_per_shard, n_blocks - first)
        start, stop = first * block_tokens, (first + count) * block_tokens + 1
        stop = min(stop, cells.n_tokens)
        low = int(np.searchsorted(cells.starts, start, side="right")) - 1
        high = int(np.searchsorted(cells.starts, stop, side="left"))
        name = f"shard-{number:06d}"
        jobs.append(
            ShardJob(
                split=split,
                path=os.path.join(folder, name + ".tar"),
                url=None if url is None else f"{url}/{name}.tar",
                mark=os.path.join(marks, name + ".json"),
                hash_range=(cells.bound(low), cells.bound(high)),
                skip_tokens=start - cells.starts[low],
                first_block=first,
                n_blocks=count,
                block_tokens=block_tokens,
                dtype=dtype,
                row_keys=_row_keys(pack_seed, number) if pack_seed is not None else (),
            )
        )
    return jobs


def _row_keys(seed: int, shard: int) -> tuple[int, ...]:
    return tuple(order.philox_keys(seed, order.PACKED, 8, part=shard).tolist())


def finished_shard(job: ShardJob) -> ShardEntry | None:
    """The manifest line of a shard that is done, or None."""
    if not os.path.exists(job.mark):
        return None
    with open(job.mark, encoding="utf-8") as file:
        values: dict[str, Any] = json.load(file)
    entry = ShardEntry(**values)
    if entry.num_sequences == 0:
        return entry
    try:
        return entry if storage.size_of(job.url or job.path) == entry.bytes else None
    except (OSError, InputError):  # it is gone: make it again
        return None


def write_shard_job(job: ShardJob, tables: Mapping[str, Sequence[str]]) -> ShardEntry:
    """Gather the shard's documents from all parts, in hash order, and write it; mark it done."""
    name = os.path.splitext(os.path.basename(job.path))[0]
    entry = ShardEntry(name, 0, 0, 0, 0)
    blocks = _blocks(job, tables[job.split])
    if len(blocks):
        count, n_bytes, crc = write_shard(job.path, job.first_block, blocks)
        entry = ShardEntry(name, count, count * job.block_tokens, n_bytes, crc)
    if job.url is not None and len(blocks):
        storage.put_file(job.path, job.url)
        os.unlink(job.path)
    storage.write_json(job.mark, vars(entry))
    return entry


def _blocks(job: ShardJob, tables: Sequence[str]) -> Sequence[np.ndarray]:
    """The blocks of the shard, each of block_tokens + 1 ids; none if no document begins in it."""
    size = job.block_tokens
    ids, lengths = _gather(job, tables)
    if not job.row_keys:
        return [ids[b * size : (b + 1) * size + 1] for b in range(job.n_blocks)]
    if not len(lengths):
        return []
    layout = packing.lay_out(lengths, size, np.array(job.row_keys, dtype=np.uint64))
    # every document ends with its EOT, so that the first one's last id tells it
    return list(layout.rows(ids, np.cumsum(lengths) - lengths, int(ids[lengths[0] - 1])))


def _gather(job: ShardJob, tables: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the shard, and how many of them each of its documents has.

    They are the n_blocks * block_tokens + 1 from the shard's first on, documents cut at both ends;
    for packing, those of all documents that begin among the first n_blocks * block_tokens.
    """
    dtype = npy_dtype(job.dtype)
    wanted = job.n_blocks * job.block_tokens + 1
    found: list[np.ndarray] = []
    for path in tables:
        table = parts.read_table(path, DOC)
        low, high = (parts.first_at(table, "hash", bound) for bound in job.hash_range)
        found.append(np.array(table[low:high]))
    docs = np.concatenate(found)
    owners = np.repeat(np.arange(len(found)), [len(table) for table in found])
    ranks = parts.by_hash(docs)
    docs, owners = docs[ranks], owners[ranks]
    lengths = docs["length"].astype(np.int64)
    places = np.cumsum(lengths) - lengths - job.skip_tokens  # in the shard; may be < 0
    # cut what lies outside of the shard: [first, last) of each document's ids
    first = np.clip(-places, 0, lengths)
    last = np.clip(wanted - places, 0, lengths)
    if job.row_keys:
        begins_here = (places >= 0) & (places < wanted - 1)
        first, last = np.zeros_like(lengths), np.where(begins_here, lengths, 0)
        wanted = int(last.sum())
        places = places - (places[begins_here].min() if wanted else 0)
    elif int((last - first).sum()) != wanted:
        raise InputError(
            f"{job.path}: the scratch files hold {int((last - first).sum())} of its {wanted} ids; "
            "they were changed: delete the out folder and prepare again"
        )
    out = np.empty(wanted, dtype=dtype)
    used = np.flatnonzero(first < last)
    used = used[np.argsort(owners[used], kind="stable")]  # part by part: one open file at a time
    bounds = np.searchsorted(owners[used], np.arange(len(found) + 1))
    sources = docs["start"].astype(np.int64)
    for owner, path in enumerate(tables):
        mine = used[bounds[owner] : bounds[owner + 1]]
        if mine.size == 0:
            continue
        begin, end = sources[mine] + first[mine], sources[mine] + last[mine]
        base = int(begin.min())
        ids = np.fromfile(
            parts.ids_path(path), dtype, count=int(end.max()) - base, offset=base * dtype.itemsize
        )
        targets = (places[mine] + first[mine]).tolist()
        cuts = zip(targets, (begin - base).tolist(), (end - base).tolist(), strict=True)
        for target, start, stop in cuts:
            out[target : target + stop - start] = ids[start:stop]
    kept = last - first
    return out, kept[kept > 0]
