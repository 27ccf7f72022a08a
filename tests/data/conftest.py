"""A small dataset, written directly, so that the tests of reading do not depend on `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from openlm_lite.data.manifest import (
    DatasetInfo,
    ShardEntry,
    TokenizerInfo,
    info_text,
    manifest_text,
)
from openlm_lite.data.shards import npy_dtype, write_shard

VOCAB_SIZE = 50_000
MakeDataset = Callable[..., Path]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """make_dataset(name, blocks_per_shard, block_tokens, …) -> folder; the ids count upwards."""

    def make(
        name: str = "dataset",
        blocks_per_shard: Sequence[int] = (3, 4, 2),
        block_tokens: int = 64,
        dtype: str = "uint16",
        vocab_size: int = VOCAB_SIZE,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        n_blocks = sum(blocks_per_shard)
        stream = np.arange(n_blocks * block_tokens + 1) % VOCAB_SIZE
        entries: list[ShardEntry] = []
        first = 0
        for number, count in enumerate(blocks_per_shard):
            blocks = [
                stream[b * block_tokens : (b + 1) * block_tokens + 1].astype(npy_dtype(dtype))
                for b in range(first, first + count)
            ]
            stem = f"shard-{number:06d}"
            _, size, crc = write_shard(str(folder / f"{stem}.tar"), first, blocks)
            entries.append(ShardEntry(stem, count, count * block_tokens, size, crc))
            first += count
        info = DatasetInfo(
            format_version=1,
            block_tokens=block_tokens,
            dtype=dtype,
            tokenizer=TokenizerInfo("counting", "0" * 64, vocab_size, 0),
            n_documents=1,
            n_empty_documents=0,
            n_tokens=n_blocks * block_tokens,
            n_tokens_dropped=0,
            sources=(),
            config={},
            fingerprint="0" * 64,
            seed=0,
        )
        (folder / "manifest.jsonl").write_text(manifest_text(entries))
        (folder / "dataset.json").write_text(info_text(info))
        return folder

    return make
