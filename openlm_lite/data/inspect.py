"""`openlm inspect` on a dataset: what it holds, whether it is whole, what a step trains on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from openlm_lite import storage
from openlm_lite.data.dataset import load_dataset, open_dataset
from openlm_lite.data.order import ORDER_VERSION
from openlm_lite.data.stream import TokenStream, checksum_of
from openlm_lite.data.tokenizer import load_tokenizer
from openlm_lite.data.verify import verify_dataset
from openlm_lite.errors import InputError

_TEXT_IDS = 64  # ids of a row that are decoded for show


def inspect_dataset(
    path: str, verify: bool = False, workers: int = 1, journal: str | None = None
) -> dict[str, Any]:
    """What the dataset at `path` holds, as a plain dict.

    `verify` reads every shard and checks it, see verify.py for `workers` and `journal`. Raises
    InputError that lists all bad shards.
    """
    report = verify_dataset(path, workers, journal) if verify else None
    dataset = load_dataset(path) if verify else open_dataset(path)
    info = asdict(dataset.info)
    return {
        "path": dataset.folder,
        "n_shards": len(dataset.manifest.shards),
        "n_blocks": dataset.n_blocks,
        "bytes": sum(entry.bytes or 0 for entry in dataset.manifest.shards),
        "manifest_sha256": dataset.manifest_sha256,
        "order_version": ORDER_VERSION,
        "verified": verify,
        **({} if report is None else {"n_from_journal": report.n_from_journal}),
        **info,
    }


def inspect_samples(
    stream: TokenStream, first: int, n_samples: int, tokenizer_name: str | None = None
) -> tuple[int, list[dict[str, Any]]]:
    """(checksum, rows with their text) of the batch of the samples from `first` on.

    The tokenizer is that of the first source; `tokenizer_name` where it has none, as OpenLM's
    shards, else rows are shown as ids.
    """
    if first < 0 or n_samples < 1:
        raise InputError(f"sample {first}, batch of {n_samples} rows: needed are >= 0 and >= 1")
    folder = stream.sources[0].dataset.folder
    if tokenizer_name is None and storage.exists(f"{folder}/tokenizer.json"):
        tokenizer_name = folder
    tokenizer = None if tokenizer_name is None else load_tokenizer(tokenizer_name)
    samples = np.arange(first, first + n_samples)
    places = stream.places(samples)
    rows, _ = stream.read(places)
    found: list[dict[str, Any]] = []
    for sample, ids, s, epoch, shard, row in zip(samples.tolist(), rows, *places, strict=True):
        source = stream.sources[s]
        block, part = source.block_and_row(int(row))
        found.append(
            {
                "sample": sample,
                "source": stream.names[s],
                "epoch": int(epoch),
                "shard": source.dataset.manifest.shards[shard].file_name,
                "block": block,
                "row": part,
            }
        )
        shown = ids[:_TEXT_IDS].tolist()
        found[-1] |= {"ids": shown} if tokenizer is None else {"text": tokenizer.decode(shown)}
    return checksum_of(rows), found
