"""gs:// through gcsfs, on a server that speaks Google's protocol: the same bytes, or one error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from openlm_lite import remote, retries, storage
from openlm_lite.data.cache import Cache
from openlm_lite.data.dataset import BadShardError, open_dataset
from openlm_lite.data.plan import PrepareConfig
from openlm_lite.data.prepare import prepare
from openlm_lite.retries import (
    DamagedError,
    MissingError,
    RefusedError,
    RemoteError,
    Retry,
)
from tests.data.conftest import MakeDataset
from tests.data.prepare_corpus import files_of, make_texts, train_small_tokenizer, write_lines
from tests.data.test_remote import all_ids
from tests.gs_faults import gs_with_faults
from tests.s3_faults import ALWAYS, ERRORS, Faults

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")

pytestmark = pytest.mark.slow  # Google's packages take long to import
CONTENT = np.random.default_rng(0).bytes(300_000)
MEDIA = "/download/"  # in the path of a request for an object's bytes


@pytest.fixture(scope="module")
def server() -> Iterator[Faults]:
    with gs_with_faults() as faults:
        yield faults


@pytest.fixture
def gs(server: Faults, monkeypatch: pytest.MonkeyPatch) -> Faults:
    """The server without faults so far, and retries without the waiting."""
    server.clear()
    hurry(monkeypatch)
    return server


def hurry(monkeypatch: pytest.MonkeyPatch, total: float = 60.0, idle: float = 30.0) -> None:
    retry = Retry(total_seconds=total, first_wait=0.001, longest_wait=0.01, idle_seconds=idle)
    monkeypatch.setattr(retries, "RETRY", retry)


def put(name: str, content: bytes, folder: Path) -> str:
    (folder / "content").write_bytes(content)
    storage.put_file(str(folder / "content"), f"gs://bucket/{name}")
    return f"gs://bucket/{name}"


@pytest.mark.parametrize("kind", [*ERRORS, "reset", "reset midway", "truncate", "hang", "flip"])
def test_a_file_arrives_whole_after_faults(
    kind: str, gs: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put("file", CONTENT, tmp_path)
    if kind == "hang":
        hurry(monkeypatch, idle=0.5)
    gs.next(kind, times=2, name=MEDIA)
    assert storage.read_bytes(url) == CONTENT
    assert gs.faulted == 2


def test_a_flip_on_every_way_is_found_by_the_checksum_of_the_store(
    gs: Faults, tmp_path: Path
) -> None:
    url = put("file", CONTENT, tmp_path)
    gs.next("flip", times=ALWAYS, name=MEDIA)
    with pytest.raises(DamagedError, match=rf"{url}: damaged: .*checksum crc32c.* \(3 times\)"):
        storage.read_bytes(url)


def test_an_outage_is_one_error_and_what_is_not_there_or_not_allowed_is_one_at_once(
    gs: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put("file", CONTENT, tmp_path)
    for absent in ("gs://bucket/nothing", "gs://nobody/nothing"):
        with pytest.raises(MissingError, match=f"{absent}: no such file or folder"):
            storage.read_bytes(absent)
    gs.next("403", times=ALWAYS, name=MEDIA)
    with pytest.raises(RefusedError, match=rf"{url}: not allowed .*gcloud auth"):
        storage.read_bytes(url)
    assert gs.faulted == 1
    hurry(monkeypatch, total=0.3)
    gs.next("503", times=ALWAYS, name=MEDIA)
    with pytest.raises(RemoteError, match=rf"{url}: given up after"):
        storage.read_bytes(url)


def test_files_are_listed_and_read_in_ranges(
    gs: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (put(f"listed/{name}", CONTENT, tmp_path) for name in ("a/x.txt", "b.txt"))
    put("listed/_SUCCESS", b"", tmp_path)
    assert storage.list_files("gs://bucket/listed") == [first, second]
    assert storage.list_files("gs://bucket/listed/*.txt") == [second]
    assert storage.exists("gs://bucket/listed/a") and not storage.exists(f"{first}2")
    assert storage.size_of(first) == len(CONTENT)
    monkeypatch.setattr(remote, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(remote, "_RANGE_BYTES", 100_000)
    gs.next("503", times=2, name=MEDIA)
    with storage.open_read(first) as file:
        file.seek(10)
        assert file.read() == CONTENT[10:]


def test_a_dataset_at_gs_has_the_blocks_of_the_local_one_and_its_bad_shards_are_named(
    gs: Faults, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    folder = make_dataset(blocks_per_shard=(3, 4, 2), block_tokens=512)
    for path in sorted(folder.iterdir()):
        storage.put_file(str(path), f"gs://bucket/whole/{path.name}")
    dataset = open_dataset("gs://bucket/whole", Cache(str(tmp_path / "cache"), 1 << 30))
    gs.next("503", "flip", "truncate", times=3, name=f"{MEDIA}storage/v1/b/bucket/o/whole%2Fshard-")
    dataset.want([2, 0, 1])
    assert (all_ids(dataset) == all_ids(open_dataset(str(folder)))).all()
    assert gs.faulted == 3
    again = open_dataset("gs://bucket/whole", Cache(str(tmp_path / "other"), 1 << 30))
    gs.next("flip", times=ALWAYS, name=f"{MEDIA}storage/v1/b/bucket/o/whole%2Fshard-000001")
    with pytest.raises(BadShardError, match=r"^gs://bucket/whole/shard-000001\.tar: damaged: crc"):
        again.blocks(1)


def test_prepare_from_gs_to_gs_makes_the_bytes_of_the_local_run(gs: Faults, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "in" / "a.jsonl", make_texts(60))
    storage.put_file(str(corpus), "gs://bucket/in/a.jsonl")
    cfg = PrepareConfig(
        inputs=(str(tmp_path / "in"),),
        out=str(tmp_path / "out"),
        tokenizer=train_small_tokenizer(tmp_path / "tokenizer"),
        block_tokens=256,
        blocks_per_shard=8,
        workers=1,
    )
    prepare(cfg)
    there = dataclasses.replace(
        cfg, inputs=("gs://bucket/in",), out="gs://bucket/out", scratch=str(tmp_path / "scratch")
    )
    gs.next("503", times=2, name=MEDIA)
    assert not prepare(there).already_done
    made = {
        url.removeprefix("gs://bucket/out/"): storage.read_bytes(url)
        for url in storage.list_files("gs://bucket/out")
    }
    local = files_of(cfg.out)
    assert made.keys() == local.keys()
    assert all(made[name] == local[name] for name in made if name != "dataset.json")
    assert prepare(there).already_done
