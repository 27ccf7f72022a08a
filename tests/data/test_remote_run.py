"""A run whose data lies on an S3 server, with faults on the way, trains as from local disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from openlm_lite import retries, storage
from openlm_lite.cli import main
from openlm_lite.log import read_metrics
from openlm_lite.retries import Retry
from tests.s3_faults import CUTS, ERRORS, Faults, s3_with_faults

pytest.importorskip("moto")
pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def server() -> Iterator[Faults]:
    with s3_with_faults() as faults:
        yield faults


def losses(run: Path) -> list[tuple[int, float]]:
    records = read_metrics(run / "metrics.jsonl")
    return [(r["step"], r[k]) for r in records for k in sorted(r) if k.endswith("/loss")]


def test_a_run_from_s3_with_faults_has_the_losses_of_the_run_from_local_disk(
    server: Faults, toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted((toy_recipe.parent / "data").rglob("*.*")):
        name = path.relative_to(toy_recipe.parent)
        storage.put_file(str(path), f"s3://bucket/{name}")
    retry = Retry(total_seconds=120, first_wait=0.001, longest_wait=0.01, idle_seconds=1.0)
    monkeypatch.setattr(retries, "RETRY", retry)
    common = [str(toy_recipe), "run.device=cpu", "total_steps=20", "data.shuffle_shards=2"]
    assert main(["train", *common, f"run.dir={tmp_path / 'local'}"]) == 0

    remote = [
        f"run.dir={tmp_path / 'remote'}",
        "data.train=s3://bucket/data/train",
        "data.val.toy=s3://bucket/data/val",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.cache_gib=0.00002",  # about two shards: they are dropped and fetched again
    ]
    kinds = [*ERRORS, *CUTS, "flip"]
    server.next(*kinds, times=len(kinds), name="train/shard-")
    assert main(["train", *common, *remote]) == 0
    assert server.faulted == len(kinds)
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert (tmp_path / "remote" / "tokenizer.json").is_file()
