"""The cache of a node: each shard fetched once, nothing half, bounded, nothing dropped in use."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_lite import storage
from openlm_lite.data.cache import Cache, Held, default_folder
from openlm_lite.data.fetch import Ahead
from openlm_lite.errors import InputError, RunError
from openlm_lite.retries import DamagedError
from tests.s3_faults import Faults, s3_with_faults

ROOT = Path(__file__).parents[2]
CONTENT = random.Random(0).randbytes(400_000)
URL = "s3://bucket/data/shard-000000.tar"


class Store:
    """Takes the place of the network: url -> bytes, and what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.flips = 0
        monkeypatch.setattr(storage, "download", self.download)

    def download(self, url: str, local: str, n_bytes: int, *, store_checks: bool) -> None:
        assert not store_checks
        self.asked.append(url)
        content = self.content[url]
        if self.flips:
            self.flips -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        Path(local).write_bytes(content)

    def add(self, url: str, content: bytes) -> tuple[str, int, int]:
        self.content[url] = content
        return url, len(content), zlib.crc32(content)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


def shards_in(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def test_a_shard_is_fetched_once_and_then_found(store: Store, tmp_path: Path) -> None:
    shard = store.add(URL, CONTENT)
    for cache in (Cache(str(tmp_path), 1 << 20), Cache(str(tmp_path), 1 << 20)):
        for _ in range(2):
            assert Path(cache.fetch(*shard)).read_bytes() == CONTENT
    assert store.asked == [URL]
    assert [name.split("-", 2)[2] for name in shards_in(tmp_path)] == ["shard-000000.tar"]


def test_other_bytes_under_the_same_name_are_another_shard(store: Store, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), 1 << 20)
    for content in (b"a" * 1000, b"b" * 1000):
        assert Path(cache.fetch(*store.add(URL, content))).read_bytes() == content


def test_a_flipped_bit_is_fetched_again_and_in_the_end_an_error(
    store: Store, tmp_path: Path
) -> None:
    cache = Cache(str(tmp_path), 1 << 20)
    shard = store.add(URL, CONTENT)
    store.flips = 2
    assert Path(cache.fetch(*shard)).read_bytes() == CONTENT
    os.unlink(cache.fetch(*shard))
    store.flips = 1 << 20
    found = zlib.crc32(bytes([CONTENT[0] ^ 1]) + CONTENT[1:])
    message = f"^{URL}: damaged: crc32 of its 400000 bytes is {found}, the manifest has {shard[2]}"
    with pytest.raises(DamagedError, match=message):
        cache.fetch(*shard)
    assert shards_in(tmp_path) == [] and len(store.asked) == 6


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_cached_shard_that_a_crash_damaged_is_fetched_again(
    damage: str, store: Store, tmp_path: Path
) -> None:
    shard = store.add(URL, CONTENT)
    path = Path(Cache(str(tmp_path), 1 << 20).fetch(*shard))
    spoilt = {"flip": CONTENT[:-1] + b"\0", "cut": CONTENT[:-1], "empty": b""}[damage]
    path.write_bytes(spoilt)
    assert Path(Cache(str(tmp_path), 1 << 20).fetch(*shard)).read_bytes() == CONTENT
    assert len(store.asked) == 2


def test_the_least_recently_used_shards_are_dropped_and_those_in_use_are_not(
    store: Store, tmp_path: Path
) -> None:
    cache = Cache(str(tmp_path), 3_500)
    shards = [store.add(f"s3://bucket/{i}", bytes([i]) * 1000) for i in range(6)]
    held = cache.hold(*shards[0])
    paths = [cache.fetch(*shard) for shard in shards[:3]]
    for age, path in enumerate(paths):
        os.utime(path, (age, age))
    cache.fetch(*shards[3])  # drops the oldest one that is free: 1
    assert [os.path.exists(path) for path in paths] == [True, False, True]
    held.close()
    os.utime(paths[0], (1, 1))
    cache.fetch(*shards[4])
    assert [os.path.exists(path) for path in paths] == [False, False, True]


def test_a_cache_smaller_than_what_is_in_use_says_so_and_goes_on(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(str(tmp_path), 1_500)
    held = [cache.hold(*store.add(f"s3://bucket/{i}", bytes([i]) * 1000)) for i in range(4)]
    assert [Path(h.path).read_bytes()[0] for h in held] == [0, 1, 2, 3]
    assert caplog.text.count("data.cache_gib: the shards in use need") == 1
    for h in held:
        h.close()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    asked=st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=30),
    max_bytes=st.integers(1, 200),
)
def test_whatever_is_asked_for_arrives_and_the_bound_holds_for_what_is_free(
    sizes: list[int], asked: list[tuple[int, bool]], max_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        store = Store(patch)
        cache = Cache(folder, max_bytes)
        shards = [store.add(f"s3://b/{i}", bytes([i]) * n) for i, n in enumerate(sizes)]
        held: list[Held] = []
        in_use: set[str] = set()
        for number, keep in asked:
            shard = shards[number % len(shards)]
            fetches = len(store.asked)
            got = cache.hold(*shard)
            assert Path(got.path).read_bytes() == store.content[shard[0]]
            in_use.add(got.path)
            if keep:
                held.append(got)
            else:
                got.close()
                in_use = {h.path for h in held}
            assert all(os.path.exists(path) for path in in_use)
            free = {os.path.join(folder, n) for n in shards_in(Path(folder))} - in_use - {got.path}
            if free and len(store.asked) > fetches:  # room is made when a shard is fetched
                total = sum(os.path.getsize(os.path.join(folder, n)) for n in os.listdir(folder))
                assert total <= max_bytes
        for h in held:
            h.close()


def test_a_full_disk_is_one_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, local: str, n_bytes: int, *, store_checks: bool) -> None:
        Path(local).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "download", download)
    cache = Cache(str(tmp_path), 1 << 20)
    with pytest.raises(RunError, match=r"data.cache_dir: the disk of .* is full while fetching s3"):
        cache.fetch(URL, 400, 0)
    assert not any("part" in name or "shard" in name for name in os.listdir(tmp_path))


def test_a_folder_that_cannot_be_used_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"data.cache_dir: .*file/x cannot be used"):
        Cache(str(tmp_path / "file" / "x"), 1)
    with pytest.raises(InputError, match="cache_gib"):
        Cache(str(tmp_path), 0)


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_folder() == "/x/openlm_lite/shards"


# --- ahead ---------------------------------------------------------------------------------------


class Slow:
    """A `hold` that waits to be let on, and remembers what was begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = threading.Semaphore(0)

    def __call__(self, name: str) -> Held:
        self.begun.append(name)
        self.go.acquire()
        if name.startswith("bad"):
            raise InputError(f"{name} on purpose")
        return Held(name, os.open(os.devnull, os.O_RDONLY))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_shards_are_fetched_in_the_order_in_which_they_are_wanted_by_few_threads() -> None:
    hold = Slow()
    ahead = Ahead(hold, threads=2)
    ahead.want(list("abcdef"))
    wait_for(lambda: len(hold.begun) == 2)
    ahead.want(list("xy"))  # what has not begun is not wanted any more
    for _ in range(4):
        hold.go.release()
    for name in "yx":
        held = ahead.take(name)
        assert held.path == name
        held.close()
    assert sorted(hold.begun[:2]) == ["a", "b"] and sorted(hold.begun[2:]) == ["x", "y"]
    ahead.want(())


def test_errors_are_kept_for_whoever_takes_the_shard_and_the_next_try_is_new() -> None:
    hold = Slow()
    ahead = Ahead(hold)
    ahead.want(["bad"])
    for _ in range(2):
        hold.go.release()
        with pytest.raises(InputError, match="bad on purpose"):
            ahead.take("bad")
    assert hold.begun == ["bad", "bad"]


# --- several processes, on a real server ---------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Faults]:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with s3_with_faults() as faults:
        yield faults


_FETCH = """
import json, sys
from openlm_lite.data.cache import Cache
folder, shards = sys.argv[1], json.loads(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
cache = Cache(folder, 1 << 30)
for url, n_bytes, crc32 in shards:
    print(cache.fetch(url, n_bytes, crc32), flush=True)
"""


def fetching_process(folder: Path, shards: list[tuple[str, int, int]]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _FETCH, str(folder), json.dumps(shards)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def upload(tmp_path: Path, n: int) -> list[tuple[str, int, int]]:
    shards = []
    for i in range(n):
        content = random.Random(i).randbytes(400_000)
        (tmp_path / "content").write_bytes(content)
        url = f"s3://bucket/{tmp_path.name}/shard-{i:06d}.tar"
        storage.put_file(str(tmp_path / "content"), url)
        shards.append((url, len(content), zlib.crc32(content)))
    return shards


def test_processes_that_want_the_same_shards_fetch_each_once(
    server: Faults, tmp_path: Path
) -> None:
    shards = upload(tmp_path, 4)
    server.clear()
    folder = tmp_path / "cache"
    processes = [fetching_process(folder, shards) for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert found[0] == found[1] == found[2] and len(found[0]) == 4
    assert sorted(server.gets) == [url.removeprefix("s3:/") for url, _, _ in shards]
    for path, (_, _, crc32) in zip(found[0], shards, strict=True):
        assert zlib.crc32(Path(path).read_bytes()) == crc32


def test_a_kill_during_a_fetch_leaves_nothing_that_looks_whole(
    server: Faults, tmp_path: Path
) -> None:
    shards = upload(tmp_path, 1)
    folder = tmp_path / "cache"
    server.next("hang midway")
    process = fetching_process(folder, shards)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()

    def parts() -> list[Path]:
        return [p for p in folder.glob(".*.part-*") if p.stat().st_size]

    wait_for(lambda: folder.is_dir() and bool(parts()))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert shards_in(folder) == [] and parts()

    cache = Cache(str(folder), 1 << 30)  # its lock went with the process
    path = cache.fetch(*shards[0])
    assert zlib.crc32(Path(path).read_bytes()) == shards[0][2]
    assert parts() == [] and len(shards_in(folder)) == 1
