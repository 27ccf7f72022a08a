"""Stage 2 of `openlm prepare`: tokenise pieces of the inputs into sorted parts on disk.

    documents --filters--> kept --sampling--> chosen --tokenise--> ids + EOT --+--> parts, train
              (filters.py)      (weights)                    split by content  +--> parts, val
                                |
                                +--> content hashes, with --dedup (stage 3, dedup.py)

A part is two files (parts.py): a table, sorted by a keyed 64-bit hash of (file, position), and the
token ids in the same order. Stage 4 (gather.py) merges all parts by this hash, so nobody can see
how the work was cut. Every stage is a function of plain values and files; nothing holds more than
a part or a shard in memory, and doing a job twice, even at the same time, leaves the same files.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from openlm_lite import storage
from openlm_lite.data import order, parts
from openlm_lite.data.filters import Filters
from openlm_lite.data.parts import DOC, SPLITS, ContentWriter, DocumentWriter
from openlm_lite.data.plan import Piece, Span
from openlm_lite.data.read import Document, PassedOver, read_documents
from openlm_lite.data.shards import npy_dtype
from openlm_lite.errors import InputError

_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 20
_BAD_SHOWN = 10  # places of bad documents that a piece remembers


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
    dedup: bool = False
    skip_bad: bool = False


@dataclass
class PieceReport:
    """What came of a piece; kept as JSON beside its parts, written last: the mark that it is done.

    `counts` has split -> input number -> [documents, tokens with EOTs]; a document that is taken
    twice counts twice there and in `lengths` (split -> documents per power of two of tokens).
    n_read = n_kept + the sum of `dropped`.
    """

    parts: dict[str, int] = field(default_factory=dict)
    content_parts: int = 0
    counts: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    n_tokens: int = 0  # written to the parts
    n_read: int = 0
    n_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bad: list[list[Any]] = field(default_factory=list)  # the first PassedOver

    def drop(self, reason: str, count: int = 1) -> None:
        if count:
            self.n_read += count
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def pass_over(self, bad: PassedOver) -> None:
        self.drop(bad.reason)
        if len(self.bad) < _BAD_SHOWN:
            self.bad.append(list(bad))

    def count_parts(self, piece: Piece, cfg: SpillConfig) -> None:
        """Set `counts` and `lengths` from the tables of the parts."""
        source_of = {span.file: span.source for span in piece.spans}
        for split in SPLITS:
            counts: dict[str, list[int]] = {}
            lengths = Counter[int]()
            for path in table_paths(piece.number, split, self.parts[split], cfg):
                found, bins = parts.source_counts(parts.read_table(path, DOC), source_of)
                for source, (documents, tokens) in found.items():
                    count = counts.setdefault(source, [0, 0])
                    count[0] += documents
                    count[1] += tokens
                lengths.update(dict(enumerate(bins.tolist())))
            self.counts[split] = counts
            self.lengths[split] = [lengths[b] for b in range(max(lengths, default=-1) + 1)]


# --- stage 2: a piece -> parts -------------------------------------------------------------------


def finished_piece(number: int, cfg: SpillConfig, kind: str = "piece") -> PieceReport | None:
    """The report of a piece that is done, or None."""
    path = _report_path(number, cfg, kind)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return PieceReport(**json.load(file))


def mark_piece(number: int, report: PieceReport, cfg: SpillConfig, kind: str = "piece") -> None:
    """Say that a stage (`kind`) is done with a piece."""
    storage.write_json(_report_path(number, cfg, kind), vars(report))


def tokenise_piece(
    piece: Piece, tokenizer: Encoder, filters: Filters, cfg: SpillConfig
) -> PieceReport:
    """Tokenise the documents of a piece and write them as parts. Raises DocumentError, InputError.

    Every document is followed by EOT; what is left out is counted.
    """
    report = PieceReport()
    writers = {
        split: DocumentWriter(parts.piece_prefix(cfg.folder, split, piece.number), cfg.seed)
        for split in SPLITS
    }
    contents = ContentWriter(parts.piece_prefix(cfg.folder, "content", piece.number))
    for span in piece.spans:
        documents = read_documents(
            span.path,
            span.format,
            text_field=cfg.text_field,
            start=span.start,
            stop=span.stop,
            on_bad=report.pass_over if cfg.skip_bad else None,
        )
        for batch in _batches(documents):
            _tokenise_batch(batch, span, tokenizer, filters, cfg, report, writers, contents)
    for writer in (*writers.values(), contents):
        writer.flush()
    report.parts = {split: writer.n_parts for split, writer in writers.items()}
    report.content_parts = contents.n_parts
    report.n_read += report.n_kept
    if not cfg.dedup:  # else the counts are not known yet
        report.count_parts(piece, cfg)
    report.n_tokens = sum(writer.total_tokens for writer in writers.values())
    mark_piece(piece.number, report, cfg)
    return report


def _tokenise_batch(
    batch: list[Document],
    span: Span,
    tokenizer: Encoder,
    filters: Filters,
    cfg: SpillConfig,
    report: PieceReport,
    writers: Mapping[str, DocumentWriter],
    contents: ContentWriter,
) -> None:
    """Filter, sample and encode some documents, and hand them to the writers."""
    reasons = filters.reasons([document.text for document in batch])
    for reason, count in Counter(filter(None, reasons)).items():
        report.drop(reason, count)
    batch = [document for document, reason in zip(batch, reasons, strict=True) if not reason]
    if not batch:
        return
    positions = np.array([document.position for document in batch], dtype=np.uint64)
    hashes = parts.content_hashes([document.text for document in batch])
    copies = _copies(span.file, positions, span.weight, cfg.seed)
    chosen = np.flatnonzero(copies)
    encoded = _encode([batch[i].text for i in chosen], tokenizer, cfg.dtype, span.path)
    too_short = np.zeros(len(batch), dtype=bool)
    too_short[chosen] = [len(ids) <= filters.min_tokens for ids in encoded]  # one is the EOT
    if cfg.dedup:
        # those not sampled, too: whether a document is a duplicate does not hang on the weights
        contents.add(span.file, positions[~too_short], hashes[~too_short])
    keys = order.philox_keys(cfg.seed, order.SPLIT, 2)
    # by content, so that a text that comes twice is never in both splits
    held_out = order.keyed_hash(keys, hashes[:, 0], hashes[:, 1]) < int(cfg.val_fraction * 2.0**64)
    for i, ids in zip(chosen.tolist(), encoded, strict=True):
        if not too_short[i]:
            writer = writers[SPLITS[int(held_out[i])]]
            writer.add(span.file, int(positions[i]), int(copies[i]), ids)
    n_short = int(too_short.sum())
    report.drop("not_sampled", len(batch) - len(chosen))
    report.drop("few_tokens", n_short)
    report.n_kept += len(chosen) - n_short


def _copies(file: int, positions: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """How often each document is taken: floor(weight), and once more by the hash of who it is."""
    whole = int(weight)
    keys = order.philox_keys(seed, order.DOCUMENTS, 2, epoch=1)  # epoch 0 is for the shuffle
    hashes = order.keyed_hash(keys, np.full(len(positions), file), positions)
    return whole + (hashes < int((weight - whole) * 2.0**64)).astype(np.int64)


def _report_path(number: int, cfg: SpillConfig, kind: str) -> str:
    return os.path.join(cfg.folder, f"{kind}-{number:06d}.json")


def table_paths(piece: int, split: str, count: int, cfg: SpillConfig) -> list[str]:
    """The tables of a piece's parts that shards are made of."""
    prefix = parts.piece_prefix(cfg.folder, split, piece)
    extension = ".kept" if cfg.dedup else ".docs"
    return [parts.part_path(prefix, part) + extension for part in range(count)]


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
