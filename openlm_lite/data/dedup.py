"""Stage 3 of `openlm prepare`, with --dedup: of documents with the same text, keep the first.

    piece 0 --tokenise--> content tables: 128-bit hash of each text, and whose it is
    piece 1 --tokenise--> content tables          |
    …                                             v  all tables, by ranges of the hash
    [ cell 0 | cell 1 | … ]   in a cell, equal hashes meet: all but the first by (file, position)
         |        |           are duplicates
         v        v
    piece k  --drop_duplicates-->  its parts' tables without the rows of duplicates, counted again

A cell holds about _CELL_DOCUMENTS documents, so memory is bounded. Each job can be done again: the
tables that it reads are changed by nobody.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from openlm_lite import storage
from openlm_lite.data import parts, spill
from openlm_lite.data.parts import CONTENT, DOC, SPLITS
from openlm_lite.data.plan import Piece
from openlm_lite.data.spill import PieceReport, SpillConfig

_CELL_DOCUMENTS = 1 << 20
_IDENTITY = np.dtype([("file", "<u4"), ("position", "<u8")])


def content_tables(reports: Sequence[PieceReport], cfg: SpillConfig) -> tuple[str, ...]:
    """The content tables of all pieces."""
    return tuple(
        parts.part_path(parts.piece_prefix(cfg.folder, "content", piece), part)
        for piece, report in enumerate(reports)
        for part in range(report.content_parts)
    )


def count_cells(tables: Sequence[str]) -> int:
    """Into how many cells the documents of these tables are split; a function of their sizes."""
    rows = sum(os.path.getsize(path) for path in tables) // CONTENT.itemsize
    return max(1, -(-rows // _CELL_DOCUMENTS))


def cell_done(cell: int, cfg: SpillConfig) -> bool:
    """Whether `find_duplicates` has been through this cell."""
    return os.path.exists(_cell_path(cell, cfg))


def find_duplicates(cell: int, n_cells: int, tables: Sequence[str], cfg: SpillConfig) -> int:
    """Write the duplicates of a cell, sorted by (file, position), and return their number."""
    low, high = ((c << 64) // n_cells for c in (cell, cell + 1))
    found = [np.empty(0, dtype=CONTENT)]
    for path in tables:
        table = parts.read_table(path, CONTENT)
        found.append(
            np.array(table[parts.first_at(table, "low", low) : parts.first_at(table, "low", high)])
        )
    rows = np.concatenate(found)
    rows = rows[np.lexsort((rows["position"], rows["file"], rows["high"], rows["low"]))]
    again = np.zeros(len(rows), dtype=bool)
    again[1:] = (rows["low"][1:] == rows["low"][:-1]) & (rows["high"][1:] == rows["high"][:-1])
    duplicates = np.empty(int(again.sum()), dtype=_IDENTITY)
    for name in _IDENTITY.names or ():
        duplicates[name] = rows[name][again]
    duplicates = duplicates[np.lexsort((duplicates["position"], duplicates["file"]))]
    storage.write_bytes(_cell_path(cell, cfg), duplicates.tobytes())
    return len(duplicates)


def drop_duplicates(piece: Piece, n_cells: int, cfg: SpillConfig) -> PieceReport:
    """Take the duplicates out of a piece's tables; the ids stay where they are, unused."""
    report = spill.finished_piece(piece.number, cfg)
    assert report is not None, "tokenise comes first"
    duplicates = np.concatenate([_of_piece(piece, cell, cfg) for cell in range(n_cells)])
    n_dropped = 0
    for split in SPLITS:
        for kept in spill.table_paths(piece.number, split, report.parts[split], cfg):
            table = np.array(parts.read_table(os.path.splitext(kept)[0] + ".docs", DOC))
            drop, n_documents = _members(table, duplicates)
            storage.write_bytes(kept, table[~drop].tobytes())
            n_dropped += n_documents
    if n_dropped:
        report.dropped["duplicate"] = n_dropped
        report.n_kept -= n_dropped
    report.count_parts(piece, cfg)
    spill.mark_piece(piece.number, report, cfg, "kept")
    return report


def _cell_path(cell: int, cfg: SpillConfig) -> str:
    return os.path.join(cfg.folder, f"duplicates-{cell:06d}")


def _of_piece(piece: Piece, cell: int, cfg: SpillConfig) -> np.ndarray:
    """The duplicates of a cell that may lie in a piece: pieces are ranges of (file, position)."""
    table = parts.read_table(_cell_path(cell, cfg), _IDENTITY)
    first, last = piece.spans[0], piece.spans[-1]
    rows = table[
        parts.first_at(table, "file", first.file) : parts.first_at(table, "file", last.file + 1)
    ]
    if first.file == last.file:
        rows = rows[
            parts.first_at(rows, "position", first.start) : parts.first_at(
                rows, "position", last.stop
            )
        ]
    return np.array(rows)


def _members(table: np.ndarray, duplicates: np.ndarray) -> tuple[np.ndarray, int]:
    """bool per row of `table`: is it one of `duplicates`? And how many documents that makes."""
    n = len(duplicates)
    files = np.concatenate([duplicates["file"], table["file"]])
    positions = np.concatenate([duplicates["position"], table["position"]])
    ranks = np.lexsort((positions, files))  # stable: a duplicate comes before the rows it names
    files, positions = files[ranks], positions[ranks]
    new = np.ones(len(ranks), dtype=bool)
    new[1:] = (files[1:] != files[:-1]) | (positions[1:] != positions[:-1])
    group = np.cumsum(new) - 1
    named = ranks[new] < n  # per group
    drop = np.zeros(len(ranks), dtype=bool)
    drop[ranks] = named[group]
    dropped_groups = np.unique(group[(ranks >= n) & named[group]])
    return drop[n:], len(dropped_groups)
