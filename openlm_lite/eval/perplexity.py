"""The loss on held-out text, source by source: nats per token, bits per byte, intervals.

    token shards   rows of seq_len tokens, as training reads them; a sequence is a row
    raw text       windows over one document after the other; a sequence is a document

Shapes: B batch, T position, n scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed

from openlm_lite import dist
from openlm_lite.data.dataset import Dataset, check_fits_model
from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError, RunError
from openlm_lite.eval.held_out import (
    Counted,
    Rows,
    check_same_tokenizer,
    dataset_at,
    longest_row,
    shard_rows,
    text_rows,
    texts_at,
)
from openlm_lite.eval.intervals import bootstrap_mean
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.loss import IGNORE_INDEX
from openlm_lite.model.transformer import Transformer


@dataclass(frozen=True)
class PerplexityConfig:
    """How held-out text is read."""

    seq_len: int | None = None
    """tokens of a row or window; None: the model's max_seq_len, or of shards the largest divisor
    of their blocks that it holds"""
    stride: int | None = None
    """tokens that windows over raw text move by; None: seq_len"""
    max_tokens: int | None = None
    """of each source, from its start (of raw text: whole documents); None: all"""
    batch_size: int = 8
    """rows or windows of each rank in one forward pass"""
    text_field: str = "text"
    """of JSON lines and parquet"""
    bootstrap: int = 10_000
    """resamples for the intervals; 0: no intervals"""

    def __post_init__(self) -> None:
        problems = []
        for name in ("seq_len", "stride", "max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} = {value}, must be at least 1")
        if self.bootstrap < 0:
            problems.append(f"bootstrap = {self.bootstrap}, must not be negative")
        if problems:
            raise InputError("perplexity: " + "; ".join(problems))


@dataclass(frozen=True)
class SourceLoss:
    """What was measured on one source. The names of the intervals are OpenLM's."""

    path: str
    kind: str
    """`shards` or `text`"""
    loss: float
    """nats per scored token; each counts once"""
    perplexity: float | None
    """exp(loss); None above e^700"""
    bits_per_byte: float | None
    """of the text's UTF-8 bytes, end-of-text tokens left out; None where no tokenizer is known"""
    loss_sequences_lower_95: float | None
    """interval of the mean over sequences of each one's mean: every sequence counts the same"""
    loss_sequences_upper_95: float | None
    loss_tokens_lower_95: float | None
    """interval of `loss`, tokens resampled"""
    loss_tokens_upper_95: float | None
    sequences: int
    tokens: int
    bytes: int | None
    empty: int
    """documents without a token, which are not sequences"""
    seq_len: int
    stride: int


class _Reading(NamedTuple):
    """How a source is read by a model."""

    dataset: Dataset | None
    """None: raw text"""
    seq_len: int
    stride: int


def _reading(
    model: ModelConfig, tokenizer: Tokenizer | None, path: str, cfg: PerplexityConfig
) -> _Reading:
    dataset = dataset_at(path)
    if dataset is None:
        if tokenizer is None:
            raise InputError(f"{path}: raw text needs the model's tokenizer; name it (--tokenizer)")
        seq_len = cfg.seq_len or model.max_seq_len
    else:
        check_fits_model(dataset, model.vocab_size)
        check_same_tokenizer(dataset, tokenizer)
        seq_len = cfg.seq_len or longest_row(dataset, model.max_seq_len)
        dataset.rows_per_block(seq_len)  # raises where blocks cannot be cut so
    stride = seq_len if dataset is not None else cfg.stride or seq_len
    if seq_len > model.max_seq_len:
        raise InputError(
            f"perplexity: seq_len = {seq_len} is longer than the model's max_seq_len = "
            f"{model.max_seq_len}"
        )
    if stride > seq_len:
        raise InputError(
            f"perplexity: stride = {stride} is longer than the window, {seq_len} tokens: tokens "
            "between two windows would not be scored"
        )
    return _Reading(dataset, seq_len, stride)


def check_text(
    model: ModelConfig, tokenizer: Tokenizer | None, path: str, cfg: PerplexityConfig
) -> None:
    """Raises InputError as `measure`, as far as it shows up to the first document or row."""
    if _reading(model, tokenizer, path, cfg).dataset is None:
        with closing(texts_at(path, cfg.text_field)) as texts:
            if next(texts, None) is None:
                raise InputError(f"{path}: holds no document")


def measure(
    model: Transformer, tokenizer: Tokenizer | None, path: str, cfg: PerplexityConfig
) -> SourceLoss:
    """The loss on the dataset, file, folder or glob at `path`; every rank gets the same.

    All ranks of the process group share the work and make equally many forward passes, so that the
    model may be sharded. `tokenizer`: the model's; raw text needs it. Raises InputError for what
    cannot be read or does not fit the model, RunError for a loss that is not finite.
    """
    dataset, seq_len, stride = _reading(model.cfg, tokenizer, path, cfg)
    counted = Counted()
    if dataset is None:
        assert tokenizer is not None
        texts = texts_at(path, cfg.text_field)
        rows = text_rows(texts, tokenizer, seq_len, stride, cfg.max_tokens, cfg.batch_size, counted)
    else:
        rows = shard_rows(dataset, tokenizer, seq_len, cfg.max_tokens, cfg.batch_size)
    eot_id = None if dataset is None else dataset.info.tokenizer.eot_id
    scored = _gathered(_score(model, rows, eot_id), model.embedding.weight.device)
    return _summary(path, dataset is not None, scored, tokenizer, cfg, seq_len, stride, counted)


class _Scored(NamedTuple):
    """Per scored token, in no order; then sums."""

    losses_n: np.ndarray
    sequences_n: np.ndarray
    text_nats: float
    """of the targets that are text"""
    n_bytes: int


@torch.no_grad()
def _score(model: Transformer, rows: Iterable[Rows], eot_id: int | None) -> _Scored:
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    losses, sequences, text_nats, n_bytes = [], [], 0.0, 0
    for tokens_BT, targets_BT, sequence_B, row_bytes in rows:
        sums = model(tokens_BT.to(device), targets_BT.to(device))
        ce_BT = sums.ce_N.view_as(targets_BT).cpu().double()
        kept_BT = targets_BT != IGNORE_INDEX
        losses.append(ce_BT[kept_BT].float().numpy())
        sequences.append(sequence_B[:, None].expand_as(targets_BT)[kept_BT].numpy())
        is_text_BT = kept_BT if eot_id is None else kept_BT & (targets_BT != eot_id)
        text_nats += float(ce_BT[is_text_BT].sum())
        n_bytes += row_bytes
    model.train(was_training)
    none = np.zeros(0)
    return _Scored(
        np.concatenate([none.astype(np.float32), *losses]),
        np.concatenate([none.astype(np.int64), *sequences]),
        text_nats,
        n_bytes,
    )


def _gathered(mine: _Scored, device: torch.device) -> _Scored:
    """What all ranks scored, on every rank alike."""
    if dist.world_size() == 1:
        return mine
    parts = dist.all_gather([len(mine.losses_n), mine.text_nats, mine.n_bytes])
    longest = max(n for n, _, _ in parts)
    pair = torch.zeros(2, longest, dtype=torch.float64, device=device)
    own = np.stack((mine.losses_n, mine.sequences_n.astype(np.float64)))
    pair[:, : own.shape[1]] = torch.from_numpy(own)
    pairs = [torch.empty_like(pair) for _ in parts]
    torch.distributed.all_gather(pairs, pair)
    whole = torch.cat([p[:, :n] for p, (n, _, _) in zip(pairs, parts, strict=True)], 1).cpu()
    return _Scored(
        whole[0].float().numpy(),
        whole[1].long().numpy(),
        math.fsum(nats for _, nats, _ in parts),
        sum(count for _, _, count in parts),
    )


def _summary(
    path: str,
    is_shards: bool,
    scored: _Scored,
    tokenizer: Tokenizer | None,
    cfg: PerplexityConfig,
    seq_len: int,
    stride: int,
    counted: Counted,
) -> SourceLoss:
    losses_n, sequences_n = scored.losses_n, scored.sequences_n
    if not len(losses_n):
        raise InputError(f"{path}: holds no token to score")
    bad = np.flatnonzero(~np.isfinite(losses_n))
    if len(bad):
        what = "row" if is_shards else "document"
        raise RunError(
            f"{path}: the model's loss is not finite for {len(bad)} of {len(losses_n)} tokens, the "
            f"first in {what} {sequences_n[bad].min()}: its weights are damaged, or its training "
            "diverged"
        )
    loss = float(losses_n.mean(dtype=np.float64))
    _, number_n, tokens_of = np.unique(sequences_n, return_inverse=True, return_counts=True)
    means = np.bincount(number_n, weights=losses_n.astype(np.float64)) / tokens_of
    sequence_ci: tuple[float | None, float | None] = (None, None)
    token_ci: tuple[float | None, float | None] = (None, None)
    if cfg.bootstrap:
        sequence_ci = bootstrap_mean(means, cfg.bootstrap)
        token_ci = bootstrap_mean(losses_n, cfg.bootstrap)
    per_byte = None
    if tokenizer is not None and scored.n_bytes:
        per_byte = scored.text_nats / math.log(2) / scored.n_bytes
    return SourceLoss(
        path=path,
        kind="shards" if is_shards else "text",
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else None,
        bits_per_byte=per_byte,
        loss_sequences_lower_95=sequence_ci[0],
        loss_sequences_upper_95=sequence_ci[1],
        loss_tokens_lower_95=token_ci[0],
        loss_tokens_upper_95=token_ci[1],
        sequences=len(means),
        tokens=len(losses_n),
        bytes=scored.n_bytes if tokenizer is not None else None,
        empty=counted.empty,
        seq_len=seq_len,
        stride=stride,
    )
