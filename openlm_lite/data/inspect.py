"""`openlm inspect` on a dataset: what it holds, whether it is whole, what a step trains on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from openlm_lite import storage
from openlm_lite.data.dataset import Dataset, load_dataset, open_dataset
from openlm_lite.data.order import ORDER_VERSION
from openlm_lite.data.shards import open_shard
from openlm_lite.data.stream import TokenStream
from openlm_lite.data.tokenizer import load_tokenizer
from openlm_lite.errors import InputError

_TEXT_IDS = 64  # ids of a row that are decoded for show


def inspect_dataset(path: str, verify: bool = False) -> dict[str, Any]:
    """What the dataset at `path` holds, as a plain dict.

    `verify` reads every shard and checks headers, size, block count, crc32 and that all ids are in
    the vocabulary. Raises InputError that lists all bad shards.
    """
    dataset = load_dataset(path) if verify else open_dataset(path)
    if verify:
        verify_dataset(dataset)
    info = asdict(dataset.info)
    return {
        "path": dataset.folder,
        "n_shards": len(dataset.manifest.shards),
        "n_blocks": dataset.n_blocks,
        "bytes": sum(entry.bytes for entry in dataset.manifest.shards),
        "manifest_sha256": dataset.manifest_sha256,
        "order_version": ORDER_VERSION,
        "verified": verify,
        **info,
    }


def verify_dataset(dataset: Dataset) -> None:
    """Read and check every shard. Raises one InputError that lists all bad ones."""
    bad: list[str] = []
    for entry in dataset.manifest.shards:
        shard = storage.safe_join(dataset.folder, entry.file_name)
        try:
            open_shard(shard, entry, dataset.info, verify=True)
        except InputError as e:
            bad.append(str(e))
    if bad:
        count = len(dataset.manifest.shards)
        raise InputError(f"{len(bad)} of {count} shards are bad:\n" + "\n".join(bad))


def inspect_step(
    dataset: Dataset, stream: TokenStream, step: int, global_batch: int
) -> list[dict[str, Any]]:
    """The rows of the global batch of `global_batch` rows at `step` (from 0), with their text.

    True for runs that kept one batch size from sample 0 on.
    """
    if step < 0 or global_batch < 1:
        raise InputError(f"step {step}, batch of {global_batch} rows: needed are >= 0 and >= 1")
    tokenizer = load_tokenizer(dataset.folder)
    samples = range(step * global_batch, (step + 1) * global_batch)
    rows = stream.rows(np.array(samples))
    found: list[dict[str, Any]] = []
    for sample, ids in zip(samples, rows, strict=True):
        epoch, shard, block, row = stream.locate(sample)
        found.append(
            {
                "sample": sample,
                "epoch": epoch,
                "shard": dataset.manifest.shards[shard].file_name,
                "block": block,
                "row": row,
                "text": tokenizer.decode(ids[:_TEXT_IDS].tolist()),
            }
        )
    return found
