"""Files and datasets on a real S3 server, with faults on the way: the same bytes, or one error."""

from __future__ import annotations

import functools
import http.server
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openlm_lite import remote, retries, storage
from openlm_lite.data.cache import Cache
from openlm_lite.data.dataset import BadShardError, Dataset, open_dataset
from openlm_lite.errors import InputError, RunError
from openlm_lite.retries import DamagedError, MissingError, RefusedError, RemoteError, Retry
from tests.data.conftest import MakeDataset
from tests.s3_faults import ALWAYS, CUTS, ERRORS, Faults, s3_with_faults

pytest.importorskip("moto")
pytest.importorskip("s3fs")

# what passes; a hang costs the idle time each time
PASSING = [*ERRORS, *CUTS, "flip"]
CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(scope="module")
def server() -> Iterator[Faults]:
    with s3_with_faults() as faults:
        yield faults


@pytest.fixture
def s3(server: Faults, monkeypatch: pytest.MonkeyPatch) -> Faults:
    """The server without faults so far, and retries without the waiting."""
    server.clear()
    hurry(monkeypatch)
    return server


def hurry(monkeypatch: pytest.MonkeyPatch, idle: float = 30.0, total: float = 60.0) -> None:
    monkeypatch.setattr(
        retries,
        "RETRY",
        Retry(total_seconds=total, first_wait=0.001, longest_wait=0.01, idle_seconds=idle),
    )


def put(name: str, content: bytes, folder: Path) -> str:
    (folder / "content").write_bytes(content)
    storage.put_file(str(folder / "content"), f"s3://bucket/{name}")
    return f"s3://bucket/{name}"


def upload(folder: Path, name: str) -> str:
    for path in sorted(folder.iterdir()):
        storage.put_file(str(path), f"s3://bucket/{name}/{path.name}")
    return f"s3://bucket/{name}"


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PASSING)
def test_a_file_arrives_whole_after_faults(
    kind: str, s3: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put("file", CONTENT, tmp_path)
    if "hang" in kind:
        hurry(monkeypatch, idle=1.0)
    s3.next(kind, times=2)
    assert storage.read_bytes(url) == CONTENT
    assert s3.faulted == 2
    with storage.open_read(url) as file:
        file.seek(100_000)
        assert file.read(10) == CONTENT[100_000:100_010]


@pytest.mark.parametrize("kind", [*ERRORS, "reset midway", "truncate"])
def test_an_outage_without_end_is_one_error_that_names_the_file(
    kind: str, s3: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put("file", CONTENT, tmp_path)
    hurry(monkeypatch, total=0.3)
    s3.next(kind, times=ALWAYS)
    with pytest.raises(RemoteError, match=rf"^{url}: given up after \d+ attempts .*on"):
        storage.read_bytes(url)


def test_no_library_below_retries_on_its_own(
    s3: Faults, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = put("file", CONTENT, tmp_path)
    s3.next("503", times=7)
    with caplog.at_level(logging.WARNING, "openlm_lite"):
        storage.read_bytes(url)
    told = [r.getMessage() for r in caplog.records if r.name == "openlm_lite"]
    assert len(s3.gets) == 8 and len(told) == 7
    assert all(f"reading {url}: attempt" in line and "ServiceUnavailable" in line for line in told)


def test_a_flip_in_a_file_without_a_manifest_is_found_by_the_checksum_of_the_store(
    s3: Faults, tmp_path: Path
) -> None:
    url = put("file", CONTENT, tmp_path)
    s3.next("flip", times=ALWAYS)
    with pytest.raises(DamagedError, match=rf"{url}: damaged: .*checksum.* \(3 times\)"):
        storage.read_bytes(url)
    assert len(s3.gets) == retries.DAMAGE_TRIES


def test_big_files_are_read_in_ranges_through_faults(
    s3: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(remote, "_RANGE_BYTES", 50_000)
    url = put("file", CONTENT, tmp_path)
    for kind in (*ERRORS, "reset midway", "truncate"):
        s3.next(kind, times=2)
        with storage.open_read(url) as file:
            assert file.read() == CONTENT
        assert s3.faulted == 2 and len(s3.gets) == 6 + 2


def test_what_is_not_there_is_an_error_at_once(s3: Faults, tmp_path: Path) -> None:
    put("file", b"x", tmp_path)
    for function in (storage.read_bytes, storage.size_of, storage.list_files, storage.open_read):
        with pytest.raises(MissingError, match="no such file or folder; check the spelling"):
            function("s3://bucket/nothing")
        with pytest.raises(MissingError, match="no such bucket"):
            function("s3://nobody/nothing")
    with pytest.raises(MissingError, match="no file is there"):
        storage.list_files("s3://bucket/nothing*")


def test_no_credentials_is_an_error_at_once_that_says_where_they_go(
    s3: Faults, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    monkeypatch.setattr(remote, "_filesystems", {})
    with pytest.raises(RefusedError, match="AWS_PROFILE"):
        storage.read_bytes("s3://bucket/file")


def test_listings_show_what_others_wrote_in_the_meantime(s3: Faults, tmp_path: Path) -> None:
    import boto3

    first = put("listed/b.txt", b"1", tmp_path)
    put("listed/_SUCCESS", b"", tmp_path)
    put("listed/.part/c.txt", b"", tmp_path)
    assert storage.list_files("s3://bucket/listed") == [first]
    boto3.client("s3").put_object(Bucket="bucket", Key="listed/a/x.txt", Body=b"22")
    second = "s3://bucket/listed/a/x.txt"
    assert storage.list_files("s3://bucket/listed/") == [second, first]
    assert storage.list_files("s3://bucket/listed/*.txt") == [first]
    assert storage.list_files("s3://bucket/listed/a/**/*.txt") == [second]
    assert storage.list_files(first) == [first]
    assert storage.exists("s3://bucket/listed/a") and storage.size_of(second) == 2
    boto3.client("s3").delete_object(Bucket="bucket", Key="listed/a/x.txt")
    assert not storage.exists(second)


def test_no_message_holds_the_secret(
    s3: Faults, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put("file", CONTENT, tmp_path)
    hurry(monkeypatch, total=0.1)
    said = []
    with caplog.at_level(logging.WARNING):
        for kind in ("503", "reset midway", "flip"):
            s3.next(kind, times=ALWAYS)
            with pytest.raises((RunError, InputError)) as caught:
                storage.read_bytes(url)
            said.append(str(caught.value))
    assert "canary" not in caplog.text + "".join(said)


# --- datasets ------------------------------------------------------------------------------------


def all_ids(dataset: Dataset) -> np.ndarray:
    return np.concatenate([dataset.blocks(s) for s in range(len(dataset.manifest.shards))])


@pytest.fixture
def local(make_dataset: MakeDataset) -> Path:
    return make_dataset(blocks_per_shard=(30, 40, 20, 30, 25), block_tokens=2048)


def test_a_dataset_on_s3_has_the_blocks_of_the_local_one(
    s3: Faults, local: Path, tmp_path: Path
) -> None:
    url = upload(local, "whole")
    expected = open_dataset(str(local))
    for path in (url, url + "/", url + "/manifest.jsonl"):
        cache = Cache(str(tmp_path / "cache"), 1 << 30)
        dataset = open_dataset(path, cache)
        assert dataset.folder == url
        assert dataset.manifest_sha256 == expected.manifest_sha256
        assert (all_ids(dataset) == all_ids(expected)).all()
    assert sum(name.endswith(".tar") for name in s3.gets) == 5  # later ones came from the cache


@pytest.mark.parametrize("kind", PASSING)
def test_blocks_are_the_same_after_faults(
    kind: str, s3: Faults, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(local, "faults")
    dataset = open_dataset(url, Cache(str(tmp_path / "cache"), 1 << 30))
    if "hang" in kind:
        hurry(monkeypatch, idle=1.0)
    s3.next(kind, times=2, name="shard-")
    dataset.want([3, 1, 0])
    assert (all_ids(dataset) == all_ids(open_dataset(str(local)))).all()
    assert s3.faulted == 2


def test_a_flipped_bit_in_the_store_is_one_error_with_both_crc32(
    s3: Faults, local: Path, tmp_path: Path
) -> None:
    url = upload(local, "flipped")
    dataset = open_dataset(url, Cache(str(tmp_path / "cache"), 1 << 30))
    expected = dataset.manifest.shards[1].crc32
    s3.next("flip", times=ALWAYS, name="shard-000001")
    dataset.want([0, 1, 2])
    with pytest.raises(BadShardError) as caught:
        all_ids(dataset)
    assert caught.value.shard == 1
    assert f"{url}/shard-000001.tar: damaged: crc32 of its" in str(caught.value)
    assert f"the manifest has {expected} (3 times)" in str(caught.value)
    kept = os.listdir(tmp_path / "cache")
    assert not any("000001" in name or ".part-" in name for name in kept)
    assert (dataset.blocks(2) == open_dataset(str(local)).blocks(2)).all()
    s3.clear()  # mended in the store: the same run may ask again
    assert (dataset.blocks(1) == open_dataset(str(local)).blocks(1)).all()


@pytest.mark.parametrize("damage", ["missing", "shorter", "empty", "id outside the vocabulary"])
def test_a_bad_shard_is_named(
    damage: str, s3: Faults, local: Path, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    import boto3

    if damage == "id outside the vocabulary":
        local = make_dataset("other", blocks_per_shard=(1, 3, 30), vocab_size=1_000)
    url = upload(local, f"bad-{damage.split()[0]}")
    bad = 2
    name = f"shard-{bad:06d}.tar"
    key = f"{url.removeprefix('s3://bucket/')}/{name}"
    client = boto3.client("s3")
    if damage == "missing":
        client.delete_object(Bucket="bucket", Key=key)
    elif damage in ("shorter", "empty"):
        body = (local / name).read_bytes()[: -512 if damage == "shorter" else 0]
        client.put_object(Bucket="bucket", Key=key, Body=body)
    dataset = open_dataset(url, Cache(str(tmp_path / "cache"), 1 << 30))
    for want in (True, False):
        if want:
            dataset.want([bad])
        with pytest.raises(BadShardError, match=f"^{url}/{name}: ") as e:
            dataset.blocks(bad)
        assert e.value.shard == bad


def test_an_outage_and_a_lack_of_permission_are_no_bad_shards(
    s3: Faults, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(upload(local, "outage"), Cache(str(tmp_path / "cache"), 1 << 30))
    hurry(monkeypatch, total=0.2)
    s3.next("503", times=ALWAYS)
    with pytest.raises(RemoteError, match=r"shard-000000\.tar: given up"):
        dataset.blocks(0)
    s3.next("403", times=ALWAYS)
    with pytest.raises(RefusedError, match="not allowed"):
        dataset.blocks(0)


def test_a_url_without_a_dataset_is_one_error(s3: Faults, tmp_path: Path) -> None:
    put("nodata/x.txt", b"x", tmp_path)
    cache = Cache(str(tmp_path / "cache"), 1 << 30)
    with pytest.raises(InputError, match=r"s3://bucket/nodata/manifest\.jsonl: no such file"):
        open_dataset("s3://bucket/nodata", cache)


def test_a_dataset_on_a_web_server_has_the_blocks_of_the_local_one(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    handler = functools.partial(QuietFiles, directory=str(local))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{files.server_port}"
        dataset = open_dataset(url, Cache(str(tmp_path / "cache"), 1 << 30))
        dataset.want(range(5))
        assert (all_ids(dataset) == all_ids(open_dataset(str(local)))).all()
        (local / "shard-000001.tar").unlink()
        again = open_dataset(f"{url}/manifest.jsonl", Cache(str(tmp_path / "other"), 1 << 30))
        with pytest.raises(BadShardError, match=rf"^{url}/shard-000001\.tar: no such file"):
            again.blocks(1)
        files.shutdown()


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_a_local_bad_shard_is_named_in_the_same_way(local: Path) -> None:
    path = local / "shard-000003.tar"
    content = bytearray(path.read_bytes())
    content[-3000] ^= 1
    path.write_bytes(content)
    dataset = open_dataset(str(local))
    dataset.want([3, 4])
    with pytest.raises(BadShardError, match="shard-000003") as caught:
        dataset.blocks(3)
    assert caught.value.shard == 3
