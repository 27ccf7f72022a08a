"""The tables that the stages of `openlm prepare` leave for each other, and how they are written.

    {split}-{piece}-{part}.ids     token ids of some documents, each with its EOT
    {split}-{piece}-{part}.docs    DOC rows sorted by hash: whose ids these are, and where
    {split}-{piece}-{part}.kept    those of them that are no duplicates (dedup.py)
    content-{piece}-{part}         CONTENT rows sorted by content: the text's hash, and whose it is

A document is (file, position). With a weight above 1 it has several rows in `.docs`, each with a
hash of its own and ids of its own, so that one range of hashes is one range of both files.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from openlm_lite import storage
from openlm_lite.data import order

SPLITS = ("train", "val")
PART_TOKENS = 16 << 20  # ids that a worker holds before it writes a part
PART_DOCUMENTS = 1 << 18
CONTENT_ROWS = 1 << 20
DOC = np.dtype(
    [("hash", "<u8"), ("file", "<u4"), ("position", "<u8"), ("start", "<u8"), ("length", "<u8")]
)
CONTENT = np.dtype([("low", "<u8"), ("high", "<u8"), ("file", "<u4"), ("position", "<u8")])
_LENGTH_BINS = 64  # bin b: documents of 2**b to 2**(b+1) - 1 tokens


def content_hashes(texts: Sequence[str]) -> np.ndarray:
    """uint64 [len(texts), 2]: 128 bits of each text (BLAKE2b of its UTF-8)."""
    # lone surrogates, which JSON can spell, are no text but must not stop us here
    digests = [
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        for text in texts
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def read_table(path: str, dtype: np.dtype) -> np.ndarray:
    """A table on disk, as it is needed; an empty one as well."""
    if os.path.getsize(path) == 0:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def first_at(table: np.ndarray, name: str, bound: int) -> int:
    """The first row whose column `name`, sorted, is >= bound (which may be 2**64).

    Touches a few pages only: numpy's searchsorted would copy the whole column.
    """
    return bisect_left(range(len(table)), bound, key=lambda row: int(table[row][name]))


def by_hash(table: np.ndarray) -> np.ndarray:
    """The order of the stream; file and position decide between equal hashes."""
    return np.lexsort((table["position"], table["file"], table["hash"]))


def source_counts(
    table: np.ndarray, source_of: Mapping[int, int]
) -> tuple[dict[str, list[int]], np.ndarray]:
    """Input number -> [documents, tokens] of a `.docs` table, and its documents per length bin."""
    counts: dict[str, list[int]] = {}
    lengths = np.asarray(table["length"], dtype=np.int64)
    files, places = np.unique(table["file"], return_inverse=True)
    documents = np.bincount(places, minlength=len(files)).tolist()
    tokens = np.bincount(places, weights=lengths, minlength=len(files)).astype(np.int64).tolist()
    for file, n_documents, n_tokens in zip(files.tolist(), documents, tokens, strict=True):
        count = counts.setdefault(str(source_of[file]), [0, 0])
        count[0] += n_documents
        count[1] += n_tokens
    bins = np.frexp(lengths.astype(np.float64))[1] - 1  # floor(log2(length))
    return counts, np.bincount(bins, minlength=_LENGTH_BINS)


@dataclass
class DocumentWriter:
    """Documents of one split and piece that wait to be written as a part."""

    prefix: str  # path of the parts, up to their number
    seed: int
    n_parts: int = 0
    ids: list[np.ndarray] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)  # file, position, copies
    total_tokens: int = 0
    _n_tokens: int = 0
    _n_rows: int = 0

    def add(self, file: int, position: int, copies: int, ids: np.ndarray) -> None:
        self.rows.append((file, position, copies))
        self.ids.append(ids)
        self._n_rows += copies
        self._n_tokens += copies * len(ids)
        if self._n_tokens >= PART_TOKENS or self._n_rows >= PART_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        if not self.ids:
            return
        files, positions, copies = np.array(self.rows, dtype=np.uint64).T
        # copy c of every document that has so many, for c = 0, 1, …; each c hashes with its own key
        with_copy = [np.flatnonzero(copies > c) for c in range(int(copies.max()))]
        keys = [
            order.philox_keys(self.seed, order.DOCUMENTS, 2, part=c) for c in range(len(with_copy))
        ]
        owners = np.concatenate(with_copy)
        table = np.zeros(len(owners), dtype=DOC)
        table["file"], table["position"] = files[owners], positions[owners]
        table["hash"] = np.concatenate(
            [
                order.keyed_hash(k, files[rows], positions[rows])
                for k, rows in zip(keys, with_copy, strict=True)
            ]
        )
        table["length"] = np.array([len(ids) for ids in self.ids])[owners]
        ranks = by_hash(table)
        table, owners = table[ranks], owners[ranks]
        table["start"][1:] = np.cumsum(table["length"])[:-1]
        path = part_path(self.prefix, self.n_parts)
        with storage.atomic_write(path + ".ids") as file:
            for owner in owners.tolist():
                file.write(self.ids[owner].data)
        storage.write_bytes(path + ".docs", table.tobytes())
        self.n_parts += 1
        self.total_tokens += self._n_tokens
        self.ids, self.rows, self._n_tokens, self._n_rows = [], [], 0, 0


@dataclass
class ContentWriter:
    """Content hashes of a piece's documents that wait to be written, sorted, as a part."""

    prefix: str
    n_parts: int = 0
    _waiting: list[np.ndarray] = field(default_factory=list)
    _n_rows: int = 0

    def add(self, file: int, positions: np.ndarray, contents: np.ndarray) -> None:
        rows = np.zeros(len(positions), dtype=CONTENT)
        rows["file"], rows["position"] = file, positions
        rows["low"], rows["high"] = contents.T
        self._waiting.append(rows)
        self._n_rows += len(rows)
        if self._n_rows >= CONTENT_ROWS:
            self.flush()

    def flush(self) -> None:
        if not self._n_rows:
            return
        rows = np.concatenate(self._waiting)
        rows = rows[np.argsort(rows["low"], kind="stable")]
        storage.write_bytes(part_path(self.prefix, self.n_parts), rows.tobytes())
        self.n_parts += 1
        self._waiting, self._n_rows = [], 0


def ids_path(table: str) -> str:
    """Where the ids of a part lie, given its table."""
    return os.path.splitext(table)[0] + ".ids"


def part_path(prefix: str, part: int) -> str:
    return f"{prefix}-{part:04d}"


def piece_prefix(folder: str, kind: str, piece: int) -> str:
    """Path of the parts of one piece, up to their number; `kind` is a split or "content"."""
    return os.path.join(folder, f"{kind}-{piece:06d}")
