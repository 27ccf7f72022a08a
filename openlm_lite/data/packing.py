"""Rows filled with whole documents by best fit, for `prepare`: few documents are cut.

    lay_out(lengths, row_tokens, keys)           whole documents -> rows
    Layout.rows(ids, starts, eot_id)             the ids of these rows, EOT where nothing is left

What becomes of the EOTs behind an EOT is in masks.py. No torch here: workers start without it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from openlm_lite.data import order
from openlm_lite.errors import InputError


class Layout(NamedTuple):
    """Pieces of documents in rows of row_tokens + 1 ids; the pieces are in the order of documents.

    Columns of int64, one entry per piece.
    """

    row_tokens: int
    n_rows: int
    document: np.ndarray  # number of the document
    start: np.ndarray  # the piece's first id within it
    length: np.ndarray  # ids
    row: np.ndarray
    offset: np.ndarray  # place of the first id within the row

    @property
    def n_padding(self) -> int:
        """Ids of the rows that no document fills."""
        return self.n_rows * (self.row_tokens + 1) - int(self.length.sum())

    def rows(self, ids: np.ndarray, document_starts: np.ndarray, eot_id: int) -> np.ndarray:
        """The rows, [n_rows, row_tokens + 1] in the dtype of `ids`; EOT where no document is.

        Document d begins at ids[document_starts[d]].
        """
        out = np.full((self.n_rows, self.row_tokens + 1), eot_id, dtype=ids.dtype)
        flat = out.reshape(-1)
        begins = document_starts[self.document] + self.start
        places = self.row * (self.row_tokens + 1) + self.offset
        for place, begin, length in zip(
            places.tolist(), begins.tolist(), self.length.tolist(), strict=True
        ):
            flat[place : place + length] = ids[begin : begin + length]
        return out


def lay_out(lengths: np.ndarray, row_tokens: int, keys: np.ndarray) -> Layout:
    """Documents of `lengths` ids (their EOTs counted) into rows of `row_tokens` tokens, best fit.

    A document is cut only where it is longer than a row (Ding et al. 2024, arXiv:2404.10830). The
    next piece begins with the id that the last one ended with, so that every id but a document's
    first is a target behind its own document exactly once. `keys` (eight uint64 for
    `order.permute`) shuffle the rows; within a row the order is that of the documents.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if row_tokens < 1 or (len(lengths) and lengths.min() < 1):
        raise InputError(
            f"cannot pack documents of {lengths.min() if len(lengths) else 0} or more ids into "
            f"rows of {row_tokens} tokens; both must be at least 1"
        )
    capacity = row_tokens + 1
    counts = np.maximum(1, -(-(lengths - 1) // row_tokens))
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * row_tokens
    length = np.minimum(lengths[document] - start, capacity)
    lead = ((number > 0) & (length < capacity)).astype(np.int64)  # a second EOT before a remainder

    row = pack_best_fit(length + lead, capacity)
    n_rows = int(row.max()) + 1 if len(row) else 0
    row = order.permute(row, n_rows, keys)
    by_row = np.argsort(row, kind="stable")
    rows, sizes = row[by_row], (length + lead)[by_row]
    begins = np.cumsum(sizes) - sizes
    offset = np.empty_like(row)
    offset[by_row] = begins - begins[np.searchsorted(rows, rows)]
    return Layout(row_tokens, n_rows, document, start, length, row, offset + lead)


def pack_best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, int64: the longest first, each into the fullest row that has room.

    Rows are numbered as they are opened. Best-fit decreasing needs at most 11/9 of the fewest
    possible rows, plus 4 (Johnson et al. 1974, doi:10.1137/0203025). Raises InputError for a piece
    that is empty or longer than `capacity`.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise InputError(
            f"pieces of {lengths.min()} to {lengths.max()} ids do not go into rows of {capacity}; "
            f"allowed are 1 to {capacity}"
        )
    longest_first = np.argsort(-lengths, kind="stable")
    free: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room: the rows that have it
    rooms = 0  # bit r is set: some row has room for r more ids
    n_rows = 0
    placed: list[int] = []
    for length in lengths[longest_first].tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # its lowest bit
            row = free[room].pop()
            if not free[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, n_rows
            n_rows += 1
        room -= length
        if room and not free[room]:
            rooms |= 1 << room
        free[room].append(row)
        placed.append(row)
    rows = np.empty(len(lengths), dtype=np.int64)
    rows[longest_first] = placed
    return rows
