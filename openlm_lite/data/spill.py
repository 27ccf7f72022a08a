"""Stages 2 and 3 of `openlm prepare`: tokenise pieces, then write shards out of a global shuffle.

    piece 0 --tokenise--> parts: documents sorted by a keyed 64-bit hash of (file, position)
    piece 1 --tokenise--> parts                 |
    …                                           v   all parts merged by hash = the token stream
    [ cell 0 | cell 1 | cell 2 | … ]   ranges of the hash, with the tokens before each
    shard k = tokens [k*S, (k+1)*S] of the stream: found through the cells, read from every part

The hash alone decides the order, so the bytes of a shard depend neither on how the work was cut
nor on who did it. A part is two files: `.docs` (a table, _DOC) and `.ids` (the token ids). Every
stage is a function of plain values and files; nothing holds more than a part or a shard in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from openlm_lite import storage
from openlm_lite.data import order
from openlm_lite.data.manifest import ShardEntry
from openlm_lite.data.plan import Piece
from openlm_lite.data.read import Document, read_documents
from openlm_lite.data.shards import npy_dtype, write_shard
from openlm_lite.errors import InputError

SPLITS = ("train", "val")
_PART_TOKENS = 16 << 20  # ids that a worker holds before it writes a part
_CELL_TOKENS = 4 << 20
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 20
_DOC = np.dtype(
    [("hash", "<u8"), ("file", "<u4"), ("position", "<u8"), ("start", "<u8"), ("length", "<u8")]
)


class Encoder(Protocol):
    """What is needed of a tokenizer here."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eot_id(self) -> int: ...
    def encode_batch(self, texts: Sequence[str], /) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class SpillConfig:
    """What decides the parts, and where they go."""

    folder: str
    text_field: str
    seed: int
    val_fraction: float
    dtype: str


@dataclass(frozen=True)
class PieceReport:
    """What came of a piece; kept as JSON beside its parts, written last: the mark that it is done.

    `counts` has split -> input number -> [documents, tokens with EOTs].
    """

    parts: dict[str, int]
    counts: dict[str, dict[str, list[int]]]
    n_empty: int

    @property
    def n_tokens(self) -> int:
        return sum(tokens for inputs in self.counts.values() for _, tokens in inputs.values())


# --- stage 2: a piece -> parts -------------------------------------------------------------------


def finished_piece(number: int, cfg: SpillConfig) -> PieceReport | None:
    """The report of a piece that is done, or None."""
    path = _piece_path(number, cfg)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return PieceReport(**json.load(file))


def tokenise_piece(piece: Piece, tokenizer: Encoder, cfg: SpillConfig) -> PieceReport:
    """Tokenise the documents of a piece and write them as parts. Raises DocumentError, InputError.

    Every document is followed by EOT; empty ones are left out and counted.
    """
    split_keys = order.philox_keys(cfg.seed, order.SPLIT, 2)
    limit = int(cfg.val_fraction * 2.0**64)
    buffers = {split: _Part(split, piece.number, cfg) for split in SPLITS}
    counts: dict[str, dict[str, list[int]]] = {split: {} for split in SPLITS}
    n_empty = 0
    for span in piece.spans:
        documents = read_documents(
            span.path, span.format, text_field=cfg.text_field, start=span.start, stop=span.stop
        )
        for batch in _batches(documents):
            full = [document for document in batch if document.text]
            n_empty += len(batch) - len(full)
            if not full:
                continue
            positions = np.array([document.position for document in full])
            hashes = order.keyed_hash(split_keys, np.full(len(full), span.file), positions)
            encoded = _encode([document.text for document in full], tokenizer, cfg.dtype, span.path)
            for position, hashed, ids in zip(
                positions.tolist(), hashes.tolist(), encoded, strict=True
            ):
                split = SPLITS[hashed < limit]
                buffers[split].add(span.file, position, ids)
                count = counts[split].setdefault(str(span.source), [0, 0])
                count[0] += 1
                count[1] += len(ids)
    for buffer in buffers.values():
        buffer.flush()
    report = PieceReport({s: b.n_parts for s, b in buffers.items()}, counts, n_empty)
    storage.write_json(_piece_path(piece.number, cfg), vars(report))
    return report


def _piece_path(number: int, cfg: SpillConfig) -> str:
    return os.path.join(cfg.folder, f"piece-{number:06d}.json")


def _part_path(cfg: SpillConfig, split: str, piece: int, part: int) -> str:
    return os.path.join(cfg.folder, f"{split}-{piece:06d}-{part:04d}")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(texts: list[str], tokenizer: Encoder, dtype: str, path: str) -> list[np.ndarray]:
    """The ids of `texts`, each with EOT at its end, checked against the vocabulary."""
    encoded: list[np.ndarray] = []
    for ids in tokenizer.encode_batch(texts):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
            raise InputError(
                f"{path}: tokenizer {tokenizer.name} gave id {int(ids.max())}, but says that it "
                f"has {tokenizer.vocab_size} ids; the tokenizer's file is damaged or incomplete"
            )
        whole = np.empty(len(ids) + 1, dtype=npy_dtype(dtype))
        whole[:-1] = ids
        whole[-1] = tokenizer.eot_id
        encoded.append(whole)
    return encoded


@dataclass
class _Part:
    """Documents of one split and piece that wait to be written."""

    split: str
    piece: int
    cfg: SpillConfig
    n_parts: int = 0
    ids: list[np.ndarray] = field(default_factory=list)
    identities: list[tuple[int, int]] = field(default_factory=list)
    n_tokens: int = 0

    def add(self, file: int, position: int, ids: np.ndarray) -> None:
        self.identities.append((file, position))
        self.ids.append(ids)
        self.n_tokens += len(ids)
        if self.n_tokens >= _PART_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self.ids:
            return
        table = np.zeros(len(self.ids), dtype=_DOC)
        table["file"], table["position"] = np.array(self.identities, dtype=np.uint64).T
        keys = order.philox_keys(self.cfg.seed, order.DOCUMENTS, 2)
        table["hash"] = order.keyed_hash(keys, table["file"], table["position"])
        table["length"] = [len(ids) for ids in self.ids]
        ranks = _by_hash(table)
        table = table[ranks]
        table["start"][1:] = np.cumsum(table["length"])[:-1]
        path = _part_path(self.cfg, self.split, self.piece, self.n_parts)
        with storage.atomic_write(path + ".ids") as file:
            for rank in ranks.tolist():
                file.write(self.ids[rank].data)
        storage.write_bytes(path + ".docs", table.tobytes())
        self.n_parts += 1
        self.ids, self.identities, self.n_tokens = [], [], 0


def _by_hash(table: np.ndarray) -> np.ndarray:
    """The order of the stream; file and position decide between equal hashes."""
    return np.lexsort((table["position"], table["file"], table["hash"]))


# --- stage 3: parts -> shards --------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """The stream of one split: `starts[c]` tokens lie before cell c; the last entry is the total.

    Cell c holds the documents with hash in [bound(c), bound(c + 1)).
    """

    parts: tuple[str, ...]
    starts: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return self.starts[-1]

    def bound(self, cell: int) -> int:
        return -(-(cell << 32) // (len(self.starts) - 1)) << 32


@dataclass(frozen=True)
class ShardJob:
    """A shard to write: blocks [first_block, first_block + n_blocks) of the stream."""

    path: str
    mark: str  # JSON file that says the shard is done
    parts: tuple[str, ...]
    hash_range: tuple[int, int]  # of the cells that hold its tokens
    skip_tokens: int  # tokens of these cells before the shard's first
    first_block: int
    n_blocks: int
    block_tokens: int
    dtype: str


def gather_cells(reports: Sequence[PieceReport], split: str, cfg: SpillConfig) -> Cells:
    """Look through the tables of all parts of a split and count the tokens of every cell."""
    parts = tuple(
        _part_path(cfg, split, piece, part)
        for piece, report in enumerate(reports)
        for part in range(report.parts[split])
    )
    tokens = sum(n for report in reports for _, n in report.counts[split].values())
    n_cells = max(1, -(-tokens // _CELL_TOKENS))
    per_cell = np.zeros(n_cells, dtype=np.int64)
    for part in parts:
        table = _table(part)
        cells = ((table["hash"] >> np.uint64(32)) * np.uint64(n_cells)) >> np.uint64(32)
        # float64 counts are exact up to 2**53 tokens
        sums = np.bincount(cells.astype(np.int64), weights=table["length"], minlength=n_cells)
        per_cell += sums.astype(np.int64)
    return Cells(parts, (0, *np.cumsum(per_cell).tolist()))


def shard_jobs(
    cells: Cells, *, folder: str, marks: str, block_tokens: int, blocks_per_shard: int, dtype: str
) -> list[ShardJob]:
    """All shards of a split. The tokens after the last full block are left out."""
    n_blocks = (cells.n_tokens - 1) // block_tokens
    jobs: list[ShardJob] = []
    for number, first in enumerate(range(0, n_blocks, blocks_per_shard)):
        count = min(blocks_per_shard, n_blocks - first)
        start, stop = first * block_tokens, (first + count) * block_tokens + 1
        low = int(np.searchsorted(cells.starts, start, side="right")) - 1
        high = int(np.searchsorted(cells.starts, stop, side="left"))
        name = f"shard-{number:06d}"
        jobs.append(
            ShardJob(
                path=os.path.join(folder, name + ".tar"),
                mark=os.path.join(marks, name + ".json"),
                parts=cells.parts,
                hash_range=(cells.bound(low), cells.bound(high)),
                skip_tokens=start - cells.starts[low],
                first_block=first,
                n_blocks=count,
                block_tokens=block_tokens,
                dtype=dtype,
            )
        )
    return jobs


def finished_shard(job: ShardJob) -> ShardEntry | None:
    """The manifest line of a shard that is done, or None."""
    if not (os.path.exists(job.mark) and os.path.exists(job.path)):
        return None
    with open(job.mark, encoding="utf-8") as file:
        values: dict[str, Any] = json.load(file)
    entry = ShardEntry(**values)
    return entry if os.path.getsize(job.path) == entry.bytes else None


def write_shard_job(job: ShardJob) -> ShardEntry:
    """Gather the shard's documents from all parts, in hash order, and write it; mark it done."""
    stream = _gather(job)
    size = job.block_tokens
    blocks = (stream[b * size : (b + 1) * size + 1] for b in range(job.n_blocks))
    count, n_bytes, crc = write_shard(job.path, job.first_block, blocks)
    name = os.path.splitext(os.path.basename(job.path))[0]
    entry = ShardEntry(name, count, count * size, n_bytes, crc)
    storage.write_json(job.mark, vars(entry))
    return entry


def _gather(job: ShardJob) -> np.ndarray:
    """The n_blocks * block_tokens + 1 ids of the shard."""
    dtype = npy_dtype(job.dtype)
    wanted = job.n_blocks * job.block_tokens + 1
    tables: list[np.ndarray] = []
    for path in job.parts:
        table = _table(path)
        low, high = (_first_at(table["hash"], bound) for bound in job.hash_range)
        tables.append(np.array(table[low:high]))
    docs = np.concatenate(tables)
    owners = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    ranks = _by_hash(docs)
    docs, owners = docs[ranks], owners[ranks]
    lengths = docs["length"].astype(np.int64)
    places = np.cumsum(lengths) - lengths - job.skip_tokens  # in the shard; may be < 0
    # cut what lies outside of the shard: [first, last) of each document's ids
    first = np.clip(-places, 0, lengths)
    last = np.clip(wanted - places, 0, lengths)
    if int((last - first).sum()) != wanted:
        raise InputError(
            f"{job.path}: the scratch files hold {int((last - first).sum())} of its {wanted} ids; "
            "they were changed: delete the out folder and prepare again"
        )
    out = np.empty(wanted, dtype=dtype)
    used = np.flatnonzero(first < last)
    used = used[np.argsort(owners[used], kind="stable")]  # part by part: one open file at a time
    bounds = np.searchsorted(owners[used], np.arange(len(tables) + 1))
    sources = docs["start"].astype(np.int64)
    for owner, path in enumerate(job.parts):
        mine = used[bounds[owner] : bounds[owner + 1]]
        if mine.size == 0:
            continue
        begin, end = sources[mine] + first[mine], sources[mine] + last[mine]
        base = int(begin.min())
        ids = np.fromfile(
            path + ".ids", dtype, count=int(end.max()) - base, offset=base * dtype.itemsize
        )
        targets = (places[mine] + first[mine]).tolist()
        cuts = zip(targets, (begin - base).tolist(), (end - base).tolist(), strict=True)
        for target, start, stop in cuts:
            out[target : target + stop - start] = ids[start:stop]
    return out


def _first_at(hashes: np.ndarray, bound: int) -> int:
    """The first index whose hash is >= bound (which may be 2**64)."""
    return len(hashes) if bound >= 1 << 64 else int(np.searchsorted(hashes, np.uint64(bound)))


def _table(part: str) -> np.ndarray:
    return np.memmap(part + ".docs", dtype=_DOC, mode="r")
