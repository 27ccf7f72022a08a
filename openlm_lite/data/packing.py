"""Documents inside a row: where they end, which targets count, and rows filled by best fit.

    apply_masks(tokens, targets, cfg, eot_id)    a batch as read -> as trained on, its documents
    lay_out(lengths, row_tokens, keys)           whole documents -> rows, for `prepare`: few cuts
    Layout.rows(ids, starts, eot_id)             the ids of these rows

A row of `row_tokens` tokens is row_tokens + 1 ids: the inputs and, shifted by one, the targets.
Here a packed row of ten tokens (E: the EOT, -: IGNORE_INDEX). Its documents a and b are whole; of
c, which is too long for a row, the first eleven ids c0 … c10 fill another one::

    ids        a0 a1 a2  E b0 b1  E  E c10 c11 E
    targets       a1 a2  E b0 b1  E  -  -  c11 E    nothing is learned of what a second EOT sets off
    doc ids     0  0  0  0  1  1  1  2  3   3       an EOT belongs to the document that it ends

Shapes: B batch, T position (seq_len).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openlm_lite.data import order
from openlm_lite.errors import InputError

# torch's cross_entropy leaves such targets out by default
IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What of a row is learned from, and what its tokens see."""

    document_masking: bool = False  # no attention from one document of a row to another
    eot_id: int | None = None  # what ends a document; null: the EOT of the dataset's tokenizer
    loss_mask_ids: tuple[int, ...] = ()  # targets with these ids are not learned from
    target_mask_left: int | None = None  # nor those up to the last target with this id
    target_mask_individual: int | None = None  # nor those with this id; it pads what is squashed
    squash_mask_left: bool = False  # target_mask_left's id is taken out, the rest moves up

    def __post_init__(self) -> None:
        problems = []
        for name in ("eot_id", "target_mask_left", "target_mask_individual"):
            if (getattr(self, name) or 0) < 0:
                problems.append(f"{name} = {getattr(self, name)}, must be a token id (0 or more)")
        if any(i < 0 for i in self.loss_mask_ids):
            problems.append(f"loss_mask_ids = {list(self.loss_mask_ids)}, must be token ids")
        left, individual = self.target_mask_left, self.target_mask_individual
        if self.squash_mask_left and (left is None or individual is None):
            problems.append(
                "squash_mask_left takes target_mask_left out and pads with target_mask_individual: "
                "give both"
            )
        if left is not None and left == individual:
            problems.append(f"target_mask_left and target_mask_individual are both {left}")
        if problems:
            raise InputError("data: " + "; ".join(problems))


class Masked(NamedTuple):
    """A batch as it is trained on."""

    tokens_BT: Tensor
    targets_BT: Tensor  # IGNORE_INDEX where nothing is learned
    doc_ids_BT: Tensor | None  # int32, never decreasing along a row; None: one document per row


def apply_masks(
    tokens_BT: Tensor,
    targets_BT: Tensor,
    cfg: MaskConfig,
    eot_id: int | None,
    *,
    packed: bool | Tensor = False,
) -> Masked:
    """What `cfg` makes of a batch; the given tensors are not written to.

    `eot_id` is the dataset's, None where it does not say. `packed`: the rows (or, boolean [B], some
    of them) come from a packed dataset, whose padding is not learned from.
    """
    if isinstance(packed, Tensor) or packed:
        padding_BT = _padding(tokens_BT, targets_BT, eot_of(cfg, eot_id))
        if isinstance(packed, Tensor):
            padding_BT &= packed[:, None]
        targets_BT = targets_BT.masked_fill(padding_BT, IGNORE_INDEX)
    if cfg.target_mask_left is not None:
        left = cfg.target_mask_left
        if cfg.squash_mask_left:
            assert cfg.target_mask_individual is not None
            tokens_BT, targets_BT = squash_left(
                tokens_BT, targets_BT, left, cfg.target_mask_individual
            )
        else:
            targets_BT = targets_BT.masked_fill(_up_to_last(targets_BT, left), IGNORE_INDEX)
    individual = () if cfg.target_mask_individual is None else (cfg.target_mask_individual,)
    for masked in (*cfg.loss_mask_ids, *individual):
        targets_BT = targets_BT.masked_fill(targets_BT == masked, IGNORE_INDEX)
    if not cfg.document_masking:
        return Masked(tokens_BT, targets_BT, None)
    return Masked(tokens_BT, targets_BT, document_ids(tokens_BT, eot_of(cfg, eot_id)))


def eot_of(cfg: MaskConfig, eot_id: int | None) -> int:
    """The id that ends a document: `cfg`'s, else the dataset's. InputError without either."""
    found = eot_id if cfg.eot_id is None else cfg.eot_id
    if found is None:
        raise InputError(
            "data.document_masking: the dataset does not say which id ends a document; set "
            "data.eot_id (OpenLM's and DCLM's shards have 0)"
        )
    return found


def document_ids(tokens_BT: Tensor, eot_id: int) -> Tensor:
    """Which document of its row each token belongs to, int32 [B, T], from 0.

    The EOT belongs to the document that it ends. A row that begins inside a document counts that
    as its document 0.
    """
    ends_BT = torch.nn.functional.pad(tokens_BT[:, :-1] == eot_id, (1, 0))
    return ends_BT.cumsum(dim=1, dtype=torch.int32)


def _padding(tokens_BT: Tensor, targets_BT: Tensor, eot_id: int) -> Tensor:
    """Targets of packed rows that no document has: EOT behind EOT, and what follows the second.

    A row that begins with an EOT begins with a second one.
    """
    ends_BT = tokens_BT == eot_id
    after_end_BT = torch.nn.functional.pad(ends_BT[:, :-1], (1, 0), value=True)
    return ends_BT & (after_end_BT | (targets_BT == eot_id))


def _up_to_last(ids_BT: Tensor, wanted: int) -> Tensor:
    """True up to the last `wanted` of each row, that one included; nowhere in a row without."""
    return (ids_BT == wanted).flip(1).cummax(dim=1).values.flip(1)


def squash_left(
    tokens_BT: Tensor, targets_BT: Tensor, left_id: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """OpenLM's --squash-mask-left: `left_id` taken out of both, `pad_id` at the end.

    Targets before the last `left_id` are masked. Exactly OpenLM, its quirk included: where a row of
    tokens begins with `left_id`, it has one more of them than the targets, and each target behind
    stands beside its own token instead of the one before.
    """
    taken_BT = targets_BT == left_id
    before_BT = _up_to_last(targets_BT, left_id) & ~taken_BT
    targets_BT = targets_BT.masked_fill(before_BT, IGNORE_INDEX)
    return (
        _without(tokens_BT, tokens_BT == left_id, pad_id),
        _without(targets_BT, taken_BT, pad_id),
    )


def _without(ids_BT: Tensor, taken_BT: Tensor, pad_id: int) -> Tensor:
    """The ids of each row that are not taken, moved up; `pad_id` behind them."""
    order_BT = taken_BT.int().argsort(dim=1, stable=True)
    padding_BT = taken_BT.gather(1, order_BT)
    return ids_BT.gather(1, order_BT).masked_fill(padding_BT, pad_id)


# --- packing -------------------------------------------------------------------------------------


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
