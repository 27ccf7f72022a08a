"""`prepare --pack best-fit`: whole documents in rows, whatever the shards and the workers."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.masks import IGNORE_INDEX, MaskConfig
from openlm_lite.data.plan import PrepareConfig
from openlm_lite.data.prepare import prepare
from openlm_lite.data.stream import val_batches
from openlm_lite.data.tokenizer import load_tokenizer
from openlm_lite.errors import InputError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(80)]
    texts = [
        " ".join(rng.choices(words, k=int(rng.lognormvariate(3, 1.3)) + 1)) for _ in range(300)
    ]
    texts.append(" ".join(rng.choices(words, k=2000)))  # longer than a shard
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text)
    return folder, texts


def packed(folder: Path, out: Path, workers: int = 1) -> None:
    prepare(
        PrepareConfig(
            inputs=(str(folder),),
            out=str(out),
            train_tokenizer=300,
            pack="best-fit",
            seq_len=64,
            block_tokens=256,
            blocks_per_shard=4,
            workers=workers,
        )
    )


@pytest.mark.parametrize("seq_len", [64, 32])
def test_a_packed_epoch_learns_every_document_whole(
    corpus: tuple[Path, list[str]], tmp_path: Path, seq_len: int
) -> None:
    folder, texts = corpus
    packed(folder, tmp_path / "data")
    dataset = open_dataset(str(tmp_path / "data"))
    assert dataset.info.is_packed
    assert dataset.block_tokens == 64
    assert dataset.info.n_documents == 301
    tokenizer = load_tokenizer(str(tmp_path / "data"))
    eot = tokenizer.eot_id
    expected: Counter[tuple[int, int]] = Counter()
    for text in texts:
        ids = [*tokenizer.encode_batch([text])[0].tolist(), eot]
        expected.update(itertools.pairwise(ids))
    found: Counter[tuple[int, int]] = Counter()
    n_learned = 0
    for batch in val_batches(
        dataset,
        seq_len=seq_len,
        batch_size=8,
        max_tokens=None,
        rank=0,
        world_size=1,
        masks=MaskConfig(document_masking=True),
    ):
        kept = (batch.targets_BT != IGNORE_INDEX) & (batch.tokens_BT != eot)
        found.update(
            zip(batch.tokens_BT[kept].tolist(), batch.targets_BT[kept].tolist(), strict=True)
        )
        n_learned += int((batch.targets_BT != IGNORE_INDEX).sum())
    assert found == expected
    assert n_learned > 0.9 * dataset.info.n_tokens  # shards are small here


def test_packed_shards_do_not_depend_on_workers(
    corpus: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, _ = corpus
    packed(folder, tmp_path / "one")
    packed(folder, tmp_path / "two", workers=2)
    names = sorted(p.name for p in (tmp_path / "one").glob("shard-*.tar"))
    assert len(names) > 5
    for name in [*names, "manifest.jsonl"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_packing_needs_a_row_length(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [{"pack": "best-fit"}, {"seq_len": 64}]
    for fields in given:
        with pytest.raises(InputError, match="belong together"):
            prepare(
                PrepareConfig(
                    inputs=(str(tmp_path),), out=str(tmp_path / "o"), train_tokenizer=300, **fields
                )
            )
