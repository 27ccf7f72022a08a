"""What `openlm prepare` tells at the end: report.json, and what is printed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openlm_lite.data import manifest as manifest_module
from openlm_lite.data import prepare_out
from openlm_lite.data.filters import DROP_REASONS
from openlm_lite.data.manifest import INFO_NAME, MANIFEST_NAME
from openlm_lite.data.prepare_out import Place
from openlm_lite.data.read import PassedOver, place_of
from openlm_lite.data.spill import PieceReport
from openlm_lite.redact import redacted

_BAD_SHOWN = 10  # bad documents whose places are told


@dataclass(frozen=True)
class SplitReport:
    """One dataset that was made (stream tokens = n_tokens + 1 + n_tokens_dropped)."""

    path: str
    n_documents: int  # one that is taken twice counts twice
    n_tokens: int  # trained on in one epoch
    n_tokens_dropped: int  # at the tail
    n_blocks: int
    n_shards: int


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` made, or found already made (then `already_done`)."""

    splits: dict[str, SplitReport]  # "train", and "val" where there is one
    n_files: int
    n_skipped_files: int
    n_documents: int  # read; = those dropped + n_kept
    n_kept: int  # each counted once, whatever its weight
    n_empty_documents: int
    dropped: dict[str, int]  # reason (filters.py) -> documents; the empty ones as well
    bad_documents: list[dict[str, str]]  # the first ones: place, reason, message
    document_tokens: dict[str, dict[str, int]]  # split -> "64-127" -> documents of so many tokens
    tokenizer: str
    vocab_size: int | None
    dtype: str
    already_done: bool = field(default=False, compare=False)
    seconds: float = field(default=0.0, compare=False)
    tokens_per_second: float = field(default=0.0, compare=False)  # of this run, all stages


def dropped_in(reports: Sequence[PieceReport]) -> dict[str, int]:
    """Reason -> documents, for the reasons that occurred."""
    total = sum((Counter(report.dropped) for report in reports), Counter[str]())
    return {reason: total[reason] for reason in DROP_REASONS if total[reason]}


def facts_of(reports: Sequence[PieceReport], splits: Sequence[str]) -> dict[str, Any]:
    """What report.json holds: nothing of the machine or the time, so that it is always the same."""
    dropped = dropped_in(reports)
    bad = [PassedOver(*values) for report in reports for values in report.bad][:_BAD_SHOWN]
    lengths: dict[str, Counter[int]] = {split: Counter() for split in splits}
    for report in reports:
        for split in splits:
            lengths[split].update(dict(enumerate(report.lengths[split])))
    return {
        "n_documents": sum(report.n_read for report in reports),
        "n_kept": sum(report.n_kept for report in reports),
        "n_empty_documents": dropped.get("empty", 0),
        "dropped": dropped,
        "bad_documents": [
            {"place": place_of(b), "reason": b.reason, "message": redacted(b.message)} for b in bad
        ],
        "document_tokens": {
            split: {f"{1 << b}-{(2 << b) - 1}": n for b, n in sorted(bins.items()) if n}
            for split, bins in lengths.items()
        },
    }


def read_back(place: Place) -> PrepareReport:
    """Read back what stands in the finished folder(s)."""
    splits: dict[str, SplitReport] = {}
    for split in place.splits:
        folder = place.folder_of(split)
        info = manifest_module.load_info(os.path.join(folder, INFO_NAME))
        shards = manifest_module.load_manifest(os.path.join(folder, MANIFEST_NAME)).shards
        splits[split] = SplitReport(
            path=place.named(split),
            n_documents=info.n_documents,
            n_tokens=info.n_tokens,
            n_tokens_dropped=info.n_tokens_dropped,
            n_blocks=sum(entry.num_sequences for entry in shards),
            n_shards=len(shards),
        )
    return PrepareReport(
        splits=splits,
        n_files=sum(source["n_files"] for source in info.sources),
        n_skipped_files=sum(source["n_skipped_files"] for source in info.sources),
        tokenizer=info.tokenizer.name,
        vocab_size=info.tokenizer.vocab_size,
        dtype=info.dtype,
        **prepare_out.read_report(place),
    )
