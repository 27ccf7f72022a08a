"""Corpora for the tests of `openlm prepare`, and what came of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.tokenizer import load_tokenizer, train_bpe

WORDS_TEXT = "the a cat dog sat on under mat table ran fast slow and then it was red blue"
WORDS = WORDS_TEXT.split()
FINE = {"block_tokens": 1, "blocks_per_shard": 99_999}  # nothing is dropped at the tail


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct texts of 1 to 60 words."""
    rng = random.Random(seed)
    return [
        f"{i}: " + " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 60)))
        for i in range(count)
    ]


def train_small_tokenizer(folder: Path) -> str:
    train_bpe(iter(make_texts(300)), 300).save(folder)
    return str(folder)


def write_lines(path: Path, texts: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stream_of(folder: str | Path) -> np.ndarray:
    """All ids of a dataset in order, the last one included."""
    dataset = open_dataset(str(folder))
    blocks = np.concatenate([dataset.blocks(s) for s in range(len(dataset.manifest.shards))])
    return np.append(blocks[:, :-1].reshape(-1), blocks[-1, -1])


def files_of(folder: str | Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def documents_of(folder: str, tokenizer_folder: str) -> list[str]:
    """The texts in a stream, the last (cut) one left out."""
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = stream_of(folder)
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    starts = np.append(0, ends[:-1] + 1)
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
