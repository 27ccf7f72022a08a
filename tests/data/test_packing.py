"""Documents inside a row: where they end, which targets count, and how rows are filled."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openlm_lite.data import order
from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.masks import (
    IGNORE_INDEX,
    MaskConfig,
    apply_masks,
    document_ids,
    squash_left,
)
from openlm_lite.data.packing import lay_out, pack_best_fit
from openlm_lite.data.stream import single_stream
from openlm_lite.errors import InputError

EOT = 0
ROWS = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 12).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, 5), min_size=length + 1, max_size=length + 1),
            min_size=batch,
            max_size=batch,
        )
    )
)
MASKED_ID = st.none() | st.integers(0, 5)


def shifted(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor(rows)
    return ids[:, :-1], ids[:, 1:]


# --- documents -----------------------------------------------------------------------------------


def test_an_eot_belongs_to_the_document_that_it_ends() -> None:
    tokens = torch.tensor([[5, 6, EOT, 7, EOT, EOT, 8], [EOT, 1, 2, 3, 4, 5, EOT]])
    found = document_ids(tokens, EOT)
    assert found.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert found.dtype == torch.int32


@given(rows=ROWS)
def test_document_ids_count_the_eots_before_each_token(rows: list[list[int]]) -> None:
    tokens, _ = shifted(rows)
    expected = [[row[:t].count(EOT) for t in range(len(row))] for row in tokens.tolist()]
    assert document_ids(tokens, EOT).tolist() == expected


def test_documents_are_found_by_the_eot_of_the_dataset_or_of_the_config() -> None:
    tokens, targets = shifted([[1, EOT, 2, 3, 4]])
    assert apply_masks(tokens, targets, MaskConfig(), EOT).doc_ids_BT is None
    found = apply_masks(tokens, targets, MaskConfig(document_masking=True), EOT)
    assert found.doc_ids_BT is not None
    assert found.doc_ids_BT.tolist() == [[0, 0, 1, 1]]
    found = apply_masks(tokens, targets, MaskConfig(document_masking=True, eot_id=2), EOT)
    assert found.doc_ids_BT is not None
    assert found.doc_ids_BT.tolist() == [[0, 0, 0, 1]]
    assert found.tokens_BT is tokens
    assert found.targets_BT is targets


def test_documents_without_a_known_eot_are_refused() -> None:
    tokens, targets = shifted([[1, EOT, 2]])
    assert apply_masks(tokens, targets, MaskConfig(), None).doc_ids_BT is None
    with pytest.raises(InputError, match=r"set data\.eot_id"):
        apply_masks(tokens, targets, MaskConfig(document_masking=True), None)


# --- targets that do not count -------------------------------------------------------------------


def test_target_masks_equal_openlm(shared_data: Path) -> None:
    found = json.loads((shared_data / "openlm" / "masking.json").read_text())
    tokens, targets = shifted(found["chunk"])
    for case in found["cases"]:
        assert case["args"].pop("seq_len") == tokens.shape[1]
        masked = apply_masks(tokens, targets, MaskConfig(**case["args"]), eot_id=99)
        assert masked.tokens_BT.tolist() == case["inputs"], case["args"]
        assert masked.targets_BT.tolist() == case["targets"], case["args"]


def plainly(tokens: list[int], targets: list[int], cfg: MaskConfig) -> tuple[list, list]:
    """One row by the rules as the options state them, token by token."""
    left, individual = cfg.target_mask_left, cfg.target_mask_individual
    keep = list(targets)
    if left is not None and left in targets:
        last = max(t for t, id in enumerate(targets) if id == left)
        keep = [IGNORE_INDEX if t <= last else id for t, id in enumerate(targets)]
    if cfg.squash_mask_left:
        assert individual is not None
        keep = [k for k, id in zip(keep, targets, strict=True) if id != left]
        keep += [individual] * (len(targets) - len(keep))
        tokens = [id for id in tokens if id != left]
        tokens += [individual] * (len(targets) - len(tokens))
    masked = {*cfg.loss_mask_ids, individual}
    return tokens, [IGNORE_INDEX if id in masked else id for id in keep]


@given(
    rows=ROWS,
    left=MASKED_ID,
    individual=MASKED_ID,
    ids=st.lists(st.integers(0, 5), max_size=3),
    squash=st.booleans(),
)
def test_masks_do_row_by_row_what_their_options_say(
    rows: list[list[int]], left: int | None, individual: int | None, ids: list[int], squash: bool
) -> None:
    if left is not None and left == individual:
        individual = None
    cfg = MaskConfig(
        target_mask_left=left,
        target_mask_individual=individual,
        loss_mask_ids=tuple(ids),
        squash_mask_left=squash and left is not None and individual is not None,
    )
    tokens, targets = shifted(rows)
    before = tokens.clone(), targets.clone()
    found = apply_masks(tokens, targets, cfg, EOT)
    assert torch.equal(tokens, before[0])
    assert torch.equal(targets, before[1])
    for b, (row, row_targets) in enumerate(zip(tokens.tolist(), targets.tolist(), strict=True)):
        expected = plainly(row, row_targets, cfg)
        assert (found.tokens_BT[b].tolist(), found.targets_BT[b].tolist()) == expected


def test_squashed_rows_that_begin_with_the_id_keep_openlms_quirk() -> None:
    """Their targets stand beside their own tokens; OpenLM's tests hold the same numbers."""
    tokens, targets = squash_left(*shifted([[9, 1, 2, 3], [1, 9, 2, 3]]), 9, 7)
    assert tokens.tolist() == [[1, 2, 7], [1, 2, 7]]
    assert targets.tolist() == [[1, 2, 3], [2, 3, 7]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eot_id": -1}, "eot_id = -1, must be a token id"),
        ({"loss_mask_ids": (3, -2)}, r"loss_mask_ids = \[3, -2\], must be token ids"),
        ({"squash_mask_left": True, "target_mask_left": 3}, "give both"),
        ({"target_mask_left": 3, "target_mask_individual": 3}, "are both 3"),
    ],
)
def test_impossible_masks_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaskConfig(**fields)


# --- packing -------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(lengths=st.lists(st.integers(1, 20), max_size=80), extra=st.integers(0, 20))
def test_best_fit_fills_no_row_twice_and_leaves_no_two_rows_that_fit_in_one(
    lengths: list[int], extra: int
) -> None:
    capacity = max([*lengths, 1]) + extra
    rows = pack_best_fit(np.array(lengths, dtype=np.int64), capacity)
    n_rows = int(rows.max()) + 1 if lengths else 0
    filled = np.bincount(rows, weights=lengths, minlength=n_rows)
    assert (filled > 0).all()
    assert (filled <= capacity).all()
    if n_rows > 1:  # hence fewer than twice the rows that the ids would fill
        assert np.sort(filled)[:2].sum() > capacity


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7), capacity=st.integers(12, 20))
def test_best_fit_stays_near_the_fewest_rows(lengths: list[int], capacity: int) -> None:
    rows = pack_best_fit(np.array(lengths), capacity)
    assert rows.max() + 1 <= 11 / 9 * fewest_rows(lengths, capacity) + 4


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """By trying everything."""
    best = len(lengths)

    def place(i: int, rows: list[int]) -> None:
        nonlocal best
        if len(rows) >= best:
            return
        if i == len(lengths):
            best = len(rows)
            return
        for r, filled in enumerate(rows):
            if filled + lengths[i] <= capacity:
                place(i + 1, [*rows[:r], filled + lengths[i], *rows[r + 1 :]])
        place(i + 1, [*rows, lengths[i]])

    place(0, [])
    return best


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_needs_no_more_rows_than_first_fit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.0, 1.2, 400).astype(np.int64), 1, 256)
    room: list[int] = []
    for length in lengths.tolist():
        row = next((r for r, left in enumerate(room) if left >= length), None)
        if row is None:
            room.append(256 - length)
        else:
            room[row] -= length
    assert pack_best_fit(lengths, 256).max() + 1 <= len(room)


def test_pieces_that_fit_no_row_are_refused() -> None:
    for lengths in ([3, 9], [0, 3]):
        with pytest.raises(InputError, match="allowed are 1 to 8"):
            pack_best_fit(np.array(lengths), 8)
    for lengths, row_tokens in (([3], 0), ([0], 8)):
        with pytest.raises(InputError, match="both must be at least 1"):
            lay_out(np.array(lengths), row_tokens, KEYS)


KEYS = order.philox_keys(0, 99, 8)


def documents(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, starts) of documents that end with EOT; all other ids are different from each other."""
    ids = np.arange(1, sum(lengths) + 1)
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    ids[ends - 1] = EOT
    return ids, ends - np.array(lengths, dtype=np.int64)


@given(lengths=LENGTHS, row_tokens=st.integers(1, 30))
def test_packed_rows_hold_every_document_and_cut_only_the_long_ones(
    lengths: list[int], row_tokens: int
) -> None:
    layout = lay_out(np.array(lengths, dtype=np.int64), row_tokens, KEYS)
    for number, length in enumerate(lengths):
        mine = layout.document == number
        assert mine.sum() == max(1, -(-(length - 1) // row_tokens))
        spans = list(zip(layout.start[mine].tolist(), layout.length[mine].tolist(), strict=True))
        assert spans[0][0] == 0
        assert sum(spans[-1]) == length
        for (start, size), (following, _) in itertools.pairwise(spans):
            assert size == row_tokens + 1
            assert following == start + size - 1  # the last target is the next first token
    occupied = np.zeros((layout.n_rows, row_tokens + 1), dtype=np.int64)
    for row, offset, length in zip(layout.row, layout.offset, layout.length, strict=True):
        assert offset + length <= row_tokens + 1
        occupied[row, offset : offset + length] += 1
    assert (occupied <= 1).all()
    assert occupied.any(axis=1).all()
    assert (occupied == 0).sum() == layout.n_padding
    ids, starts = documents(lengths)
    rows = layout.rows(ids, starts, EOT)
    assert (rows[occupied == 0] == EOT).all()


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60), row_tokens=st.integers(1, 30))
def test_a_packed_epoch_learns_every_id_of_a_document_behind_its_own_exactly_once(
    lengths: list[int], row_tokens: int
) -> None:
    """And a document's first id at most once, behind the EOT of a whole document."""
    ids, starts = documents(lengths)
    layout = lay_out(np.array(lengths), row_tokens, KEYS)
    tokens, targets = shifted(layout.rows(ids, starts, EOT).tolist())
    masked = apply_masks(tokens, targets, MaskConfig(document_masking=True), EOT, packed=True)
    assert masked.doc_ids_BT is not None
    kept = masked.targets_BT != IGNORE_INDEX
    learned = list(zip(tokens[kept].tolist(), targets[kept].tolist(), strict=True))
    ends = np.append(starts[1:], len(ids))
    within = [
        (int(ids[i]), int(ids[i + 1]))
        for start, end in zip(starts, ends, strict=True)
        for i in range(start, end - 1)
    ]
    assert sorted(pair for pair in learned if pair[0] != EOT) == sorted(within)
    begun = [target for token, target in learned if token == EOT]
    assert len(set(begun)) == len(begun)
    assert set(begun) <= set(ids[starts].tolist())


@given(lengths=st.lists(st.integers(2, 40), max_size=60), row_tokens=st.integers(1, 30))
def test_the_documents_of_a_packed_row_are_the_pieces_in_it(
    lengths: list[int], row_tokens: int
) -> None:
    ids, starts = documents(lengths)
    layout = lay_out(np.array(lengths, dtype=np.int64), row_tokens, KEYS)
    found = document_ids(torch.tensor(layout.rows(ids, starts, EOT)), EOT)
    pieces = zip(layout.row, layout.offset, layout.length, strict=True)
    seen = [
        (int(row), int(found[row, offset]))
        for row, offset, length in pieces
        if len(found[row, offset : offset + length].unique()) == 1
    ]
    assert len(set(seen)) == len(layout.row)  # each piece is one document, no two the same


def test_padding_and_what_follows_it_is_no_target() -> None:
    # documents of 4, 3 and 13 ids, the last cut after eleven; here without the shuffle
    ids, starts = documents([4, 3, 13])
    layout = lay_out(np.array([4, 3, 13]), 10, KEYS)
    rows = sorted(layout.rows(ids, starts, EOT).tolist())
    assert rows == [
        [1, 2, 3, EOT, 5, 6, EOT, EOT, 18, 19, EOT],
        [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18],
    ]
    assert layout.n_padding == 1
    tokens, targets = shifted(rows)
    cfg = MaskConfig(document_masking=True)
    masked = apply_masks(tokens, targets, cfg, EOT, packed=True)
    assert masked.targets_BT.tolist() == [
        [2, 3, EOT, 5, 6, EOT, IGNORE_INDEX, IGNORE_INDEX, 19, EOT],
        [9, 10, 11, 12, 13, 14, 15, 16, 17, 18],
    ]
    assert masked.doc_ids_BT is not None
    assert masked.doc_ids_BT.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 3, 3], [0] * 10]
    for which, expected in (([True, False], masked.targets_BT), ([False, True], targets)):
        some = apply_masks(tokens, targets, cfg, EOT, packed=torch.tensor(which))
        assert torch.equal(some.targets_BT, expected)
    # rows that are not packed learn the EOT of an empty document
    assert torch.equal(apply_masks(tokens, targets, cfg, EOT).targets_BT, targets)


def test_the_order_of_packed_rows_tells_nothing_of_what_is_in_them() -> None:
    lengths = np.random.default_rng(0).lognormal(4.0, 1.2, 20_000).astype(np.int64) + 2
    layout = lay_out(lengths, 256, KEYS)
    pieces = np.bincount(layout.row)
    correlation = np.corrcoef(np.arange(layout.n_rows), pieces)[0, 1]
    assert abs(correlation) < 4 / layout.n_rows**0.5
    assert layout.n_padding < 0.002 * lengths.sum()
    again = lay_out(lengths, 256, order.philox_keys(1, 99, 8))
    assert np.array_equal(np.sort(np.bincount(again.row)), np.sort(pieces))
    assert not np.array_equal(again.row, layout.row)


# --- longer rows from the same shards ------------------------------------------------------------


def test_rows_of_8192_and_of_2048_tokens_cover_the_same_ids(
    make_dataset: Callable[..., Path],
) -> None:
    dataset = open_dataset(str(make_dataset(blocks_per_shard=(2, 1), block_tokens=8192)))
    seen = []
    for seq_len, n_rows in ((8192, 3), (2048, 12)):
        stream = single_stream(dataset, seq_len, seed=5, shuffle_shards=2)
        assert stream.sources[0].order.rows_per_epoch == n_rows
        rows, _ = stream.read(stream.places(np.arange(n_rows)))
        seen.append((np.sort(rows[:, :-1].reshape(-1)), np.sort(rows[:, 1:].reshape(-1))))
    for short, long in zip(*seen, strict=True):
        assert np.array_equal(short, long)
    assert np.array_equal(seen[0][0], np.arange(3 * 8192))
