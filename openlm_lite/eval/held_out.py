"""Held-out text as rows that a model scores: of token shards, and of raw text.

A document t0 t1 …, with windows of 4 tokens of which the later ones move by a stride of 2 (E: the
end-of-text token, which begins it; scored targets in capitals)::

    window 1    input   E t0 t1 t2        targets  T0 T1 T2 T3
    window 2    input  t1 t2 t3 t4        targets   -  - T4 T5      each token is scored once,
    window 3    input  t3 t4 t5 t6        targets   -  - T6 T7      with 2 or more before it

A stride as long as the window (the default) gives each window as many new tokens as it holds, and
is what lm-evaluation-harness does for a rolling log-likelihood.

Shapes: B batch, T position.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openlm_lite import dist, storage
from openlm_lite.data.dataset import Dataset, open_dataset
from openlm_lite.data.manifest import MANIFEST_NAME
from openlm_lite.data.read import Format, format_of, known_extensions, read_documents
from openlm_lite.data.stream import val_batches
from openlm_lite.data.tokenizer import TiktokenCoder, Tokenizer
from openlm_lite.errors import InputError
from openlm_lite.model.loss import IGNORE_INDEX

_WINDOWS_AT_ONCE = 1024  # sorted by length together, for batches with little padding


class Rows(NamedTuple):
    """One forward pass of a rank."""

    tokens_BT: Tensor
    targets_BT: Tensor
    sequence_B: Tensor
    """number of the sequence that each row is (a part of)"""
    n_bytes: int
    """of the text of the targets, as far as it is counted here"""


class Counted:
    """What the reading of documents finds on the way."""

    empty = 0


# --- token shards --------------------------------------------------------------------------------


def dataset_at(path: str) -> Dataset | None:
    """The dataset at `path`, if a manifest is there."""
    is_manifest = os.path.basename(path) == MANIFEST_NAME
    return open_dataset(path) if is_manifest or _has_manifest(path) else None


def _has_manifest(path: str) -> bool:
    if not storage.is_remote(path):
        return os.path.isfile(os.path.join(storage.local_path(path), MANIFEST_NAME))
    if format_of(path) is not None or "*" in path:
        return False
    return storage.exists(f"{path.rstrip('/')}/{MANIFEST_NAME}")


def check_same_tokenizer(dataset: Dataset, tokenizer: Tokenizer | None) -> None:
    there = dataset.info.tokenizer
    if tokenizer is None or there.fingerprint is None:
        return
    if there.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"{dataset.folder}: was encoded with the tokenizer {there.name}, the model has "
            f"{tokenizer.name}, which gives other ids; evaluate on shards of its own, or on raw "
            "text"
        )


def longest_row(dataset: Dataset, max_seq_len: int) -> int:
    block = dataset.block_tokens
    return next(n for n in range(min(block, max_seq_len), 0, -1) if block % n == 0)


def shard_rows(
    dataset: Dataset,
    tokenizer: Tokenizer | None,
    seq_len: int,
    max_tokens: int | None,
    batch_size: int,
) -> Iterator[Rows]:
    rank, world_size = dist.rank(), dist.world_size()
    for batch in val_batches(
        dataset,
        seq_len=seq_len,
        batch_size=batch_size,
        max_tokens=max_tokens,
        rank=rank,
        world_size=world_size,
    ):
        row_B = batch.first_index + rank + world_size * torch.arange(batch_size)
        n_bytes = 0
        if tokenizer is not None:
            ids = batch.targets_BT[batch.targets_BT != IGNORE_INDEX].numpy()
            n_bytes = text_bytes(tokenizer, ids)
        yield Rows(batch.tokens_BT, batch.targets_BT, row_B, n_bytes)


def text_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """UTF-8 bytes of the text of `ids`, the end of text left out.

    Exact for byte-level BPE. Other tokenizers decode all ids together, where a character that is
    cut at either end counts with the three bytes of U+FFFD.
    """
    ids = ids[(ids != tokenizer.eot_id) & (ids < tokenizer.vocab_size)]
    lengths = _byte_lengths(tokenizer)
    if lengths is None:
        return len(tokenizer.decode(ids.tolist()).encode())
    return int(lengths[ids].sum())


@functools.lru_cache(maxsize=4)
def _byte_lengths(tokenizer: Tokenizer) -> np.ndarray | None:
    if not isinstance(tokenizer.coder, TiktokenCoder):
        return None
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token, i in tokenizer.coder.bpe.ranks.items():
        lengths[i] = len(token)
    for text, i in tokenizer.coder.specials.items():
        lengths[i] = len(text.encode())
    return lengths


# --- raw text ------------------------------------------------------------------------------------


def texts_at(path: str, text_field: str) -> Generator[str]:
    """The documents of a file, a folder or a glob; InputError at once where there is none."""
    files = storage.list_files(path)
    known = [(file, format) for file in files if (format := format_of(file)) is not None]
    if not known or (len(known) < len(files) and files == [path]):
        raise InputError(
            f"{path}: is neither a dataset (no {MANIFEST_NAME} in it) nor text; known extensions "
            f"are {known_extensions()}"
        )
    return _documents(known, text_field)


def _documents(files: Sequence[tuple[str, Format]], text_field: str) -> Generator[str]:
    for file, format in files:
        for document in read_documents(file, format, text_field=text_field):
            yield document.text


class Window(NamedTuple):
    """Inputs, and how many of the targets at its end are scored."""

    inputs: np.ndarray
    targets: np.ndarray
    scored: int


def windows(ids: np.ndarray, first: int, seq_len: int, stride: int) -> Iterator[Window]:
    """The windows over a document of `ids`, behind the token `first`; each id is scored once."""
    inputs = np.concatenate((np.array([first], dtype=ids.dtype), ids[:-1]))
    end = min(seq_len, len(ids))
    yield Window(inputs[:end], ids[:end], end)
    while end < len(ids):
        before, end = end, min(end + stride, len(ids))
        start = end - seq_len
        yield Window(inputs[start:end], ids[start:end], end - before)


def text_rows(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    seq_len: int,
    stride: int,
    max_tokens: int | None,
    batch_size: int,
    counted: Counted,
) -> Iterator[Rows]:
    """Batches of windows; each rank has its share, and as many batches as the others."""
    held: list[tuple[int, Window]] = []
    n_tokens = n_bytes = 0
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text)
        counted.empty += not len(ids)
        if not len(ids):
            continue
        n_tokens += len(ids)
        n_bytes += len(text.encode("utf-8", "replace"))
        held += [(number, w) for w in windows(ids, tokenizer.eot_id, seq_len, stride)]
        is_last = max_tokens is not None and n_tokens >= max_tokens
        if len(held) >= _WINDOWS_AT_ONCE or is_last:
            yield from _batches(held, batch_size, n_bytes)
            held, n_bytes = [], 0
        if is_last:
            return
    yield from _batches(held, batch_size, n_bytes)


def _batches(held: list[tuple[int, Window]], batch_size: int, n_bytes: int) -> Iterator[Rows]:
    rank, world_size = dist.rank(), dist.world_size()
    held.sort(key=lambda item: (len(item[1].inputs), item[0]))
    n_bytes = n_bytes if rank == 0 else 0  # all ranks have read the same documents
    for start in range(0, len(held), batch_size * world_size):
        mine = held[start + rank : start + batch_size * world_size : world_size]
        width = max((len(window.inputs) for _, window in mine), default=1)
        tokens_BT = torch.zeros(max(1, len(mine)), width, dtype=torch.long)
        targets_BT = torch.full_like(tokens_BT, IGNORE_INDEX)
        for row, (_, (inputs, targets, scored)) in enumerate(mine):
            end = len(inputs)
            tokens_BT[row, :end] = torch.from_numpy(inputs.astype(np.int64))
            kept = torch.from_numpy(targets[end - scored :].astype(np.int64))
            targets_BT[row, end - scored : end] = kept
        sequence_B = torch.tensor([number for number, _ in mine] or [0])
        yield Rows(tokens_BT, targets_BT, sequence_B, n_bytes)
        n_bytes = 0
