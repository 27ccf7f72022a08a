"""Which paths are allowed, how they are listed, files that never look whole before they are, and
web servers and other stores behind the same functions (S3 has data/test_remote.py)."""

from __future__ import annotations

import functools
import http.server
import itertools
import logging
import math
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite import remote, retries, storage
from openlm_lite.errors import InputError
from openlm_lite.retries import DamagedError, MissingError, RefusedError, RemoteError, Retry

REFUSED = [
    ("pipe:cat x", "would run a shell"),
    ("pipe:aws s3 cp s3://b/x -", "would run a shell"),
    ("magic://x", "unknown scheme 'magic'; allowed are local paths, file:// and s3://"),
    ("memory://x", "unknown scheme 'memory'"),
    ("github://a:b@/x", "unknown scheme 'github'"),
    ("", "empty path"),
]
SECRETS = [
    "https://me:canary@host/x",
    "https://canary@host/x",
    "s3://key:canary@bucket/x",
    "https://host/x?X-Amz-Signature=canary&X-Amz-Date=1",
    "https://host/x?X-Amz-Credential=canary",
    "https://host/x?a=b&token=canary",
]


@pytest.mark.parametrize(("path", "message"), REFUSED)
def test_odd_names_are_refused(path: str, message: str) -> None:
    for function in (storage.local_path, storage.is_remote, storage.list_files, storage.open_read):
        with pytest.raises(InputError, match=message):
            function(path)


@pytest.mark.parametrize("path", SECRETS)
def test_a_url_with_credentials_is_refused_without_repeating_them(path: str) -> None:
    with pytest.raises(InputError, match="credentials in it is refused") as caught:
        storage.is_remote(path)
    assert "canary" not in str(caught.value)


def test_plain_and_file_paths_are_local() -> None:
    assert storage.local_path("a/b c") == "a/b c"
    assert storage.local_path("file:///a/b") == "/a/b"
    assert not storage.is_remote("a/b c") and not storage.is_remote("file:///a/b")


@pytest.mark.parametrize("path", ["s3://b/x", "gs://b/x", "HF://datasets/a/b", "https://h/x"])
def test_urls_are_remote_and_no_local_paths(path: str) -> None:
    assert storage.is_remote(path)
    with pytest.raises(InputError, match="has to lie on a local disk"):
        storage.local_path(path)


@pytest.mark.parametrize("name", ["../a", "/a", "a b", "a;b", "$(a)", "a/../b", "", "a\nb"])
def test_names_out_of_files_cannot_leave_the_folder(name: str) -> None:
    for folder in ("folder", "s3://bucket/folder"):
        with pytest.raises(InputError, match="refused"):
            storage.safe_join(folder, name)
        joined = storage.safe_join(folder, "sub/shard-0.tar")
        assert joined == f"{folder}/sub/shard-0.tar"


def test_files_are_listed_sorted_and_marks_are_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden", "_SUCCESS", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [str(tmp_path / n) for n in ("a.txt", "b.txt", "sub/c.txt")]
    assert storage.list_files(str(tmp_path)) == names
    assert storage.list_files(str(tmp_path / "*.txt")) == names[:2]
    assert storage.list_files(str(tmp_path / "**/*.txt")) == names
    assert storage.list_files(names[1]) == [names[1]]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert storage.list_files(str(tmp_path / "a[1].txt")) == [str(tmp_path / "a[1].txt")]


@pytest.mark.parametrize("name", ["nothing", "nothing*.txt"])
def test_what_is_not_there_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no "):
        storage.list_files(str(tmp_path / name))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    storage.write_bytes(str(path), b"old")
    with pytest.raises(RuntimeError), storage.atomic_write(str(path)) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_local_files_are_read_measured_and_copied_by_the_same_functions(tmp_path: Path) -> None:
    path, copy = tmp_path / "x", tmp_path / "y"
    path.write_bytes(b"0123456789")
    assert storage.read_bytes(str(path)) == b"0123456789"
    assert storage.size_of(f"file://{path}") == 10
    with storage.open_read(str(path)) as file:
        file.seek(4)
        assert file.read(2) == b"45"
    storage.put_file(str(path), str(copy))
    assert storage.exists(str(copy)) and copy.read_bytes() == b"0123456789"
    with pytest.raises(FileNotFoundError):
        storage.open_read(str(tmp_path / "nothing"))


# --- again, or not -------------------------------------------------------------------------------


class Flaky:
    """Fails with these errors, one after the other, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Retry:
    """Retries without the waiting."""
    retry = Retry(total_seconds=30, first_wait=1e-3, longest_wait=2e-3, attempt_seconds=30)
    monkeypatch.setattr(retries, "RETRY", retry)
    return retry


def test_an_outage_of_ten_minutes_is_survived_and_each_attempt_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Down(600)
    monkeypatch.setattr(retries, "time", store)
    with caplog.at_level(logging.WARNING, "openlm_lite"):
        assert retries.retried("s3://b/x", "reading", store.ask) == "done"
    assert 600 <= store.now < 630
    told = [line for line in caplog.messages if "reading s3://b/x: attempt" in line]
    assert len(told) == len(store.asked) - 1
    (alarm,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert re.match(
        r"reading s3://b/x: has failed for \d\d s, \d+ attempts, the last with .*on purpose; it is "
        r"tried for 900 s in all",
        alarm.getMessage(),
    )
    assert "reading s3://b/x: attempt 1 failed (ConnectionResetError: on purpose)" in caplog.text


@given(
    shares=st.lists(st.floats(0.5, 1.0), min_size=1, max_size=70),
    answers_after=st.floats(0.0, 700.0) | st.just(0.0),
)
def test_an_outage_without_end_is_given_up_when_the_time_is_up_and_not_before(
    shares: list[float], answers_after: float
) -> None:
    store = Down(math.inf, answers_after)
    with pytest.raises(RemoteError, match=r"s3://b/x: given up after \d+ attempts in \d+ s"):
        ask_with_waits(store, shares)
    waits = [b - a - answers_after for a, b in itertools.pairwise(store.asked)]
    assert max(waits, default=0) <= 30 + 1e-6
    assert store.asked[-1] <= 900 + 1e-6
    assert store.now >= 900 - 1e-6


@given(st.lists(st.floats(0.5, 1.0), min_size=1, max_size=70))
def test_a_store_that_is_back_before_the_time_is_up_is_always_reached(shares: list[float]) -> None:
    assert ask_with_waits(Down(899.9), shares) == "done"


def ask_with_waits(store: Down, shares: list[float]) -> str:
    """What `store` says in the end; each wait is the next of `shares` of the longest one."""
    drawn = itertools.cycle(shares)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries, "time", store)
        patch.setattr(retries, "random", SimpleNamespace(uniform=lambda low, high: next(drawn)))
        return retries.retried("s3://b/x", "reading", store.ask)


class Down:
    """A clock that only waiting moves, and a store that resets each connection until `back`."""

    def __init__(self, back: float, answers_after: float = 0.0) -> None:
        self.now = 0.0
        self.back = back
        self.answers_after = answers_after  # seconds until it resets a connection
        self.asked: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds

    def ask(self) -> str:
        self.asked.append(self.now)
        if self.now < self.back:
            self.now += self.answers_after
            raise ConnectionResetError("on purpose")
        return "done"


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), InputError("x")])
def test_mistakes_of_the_program_are_not_retried(error: Exception) -> None:
    flaky = Flaky(error)
    with pytest.raises(type(error)):
        retries.retried("s3://b/x", "reading", flaky)
    assert flaky.calls == 1


def test_a_full_local_disk_is_no_fault_of_the_store() -> None:
    flaky = Flaky(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        retries.retried("s3://b/x", "reading", flaky)
    assert flaky.calls == 1


def test_what_is_told_of_an_error_holds_no_credentials(quick: Retry) -> None:
    told = "GET https://me:canary@h/x?X-Amz-Signature=canary&sig=canary: 'secret_key=canary' no"
    with pytest.raises(RefusedError) as caught:
        retries.retried("s3://b/x", "reading", Flaky(PermissionError(told)))
    assert "canary" not in str(caught.value)


# --- web servers ---------------------------------------------------------------------------------


class Files(http.server.SimpleHTTPRequestHandler):
    """Python's own file server; it knows no ranges. `fail` answers the next requests."""

    fail: ClassVar[list[int]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.fail:
            self.send_error(self.fail.pop(0))
        else:
            super().do_GET()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a server for tmp_path/web."""
    pytest.importorskip("aiohttp")
    (tmp_path / "web").mkdir()
    handler = functools.partial(Files, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        Files.fail.clear()


def test_a_web_server_gives_files_by_name(web: str, tmp_path: Path, quick: Retry) -> None:
    content = bytes(range(256)) * 1000
    (tmp_path / "web" / "x.gz").write_bytes(content)
    url = f"{web}/x.gz"
    assert storage.read_bytes(url) == content
    assert storage.size_of(url) == len(content)
    assert storage.list_files(url) == [url]
    assert storage.exists(url) and not storage.exists(f"{web}/nothing")
    with storage.open_read(url) as file:
        file.seek(-10, 2)
        assert file.read() == content[-10:]
    with pytest.raises(MissingError, match="no such file"):
        storage.read_bytes(f"{web}/nothing")
    for listed in (f"{web}/", f"{web}/*.gz"):
        with pytest.raises(InputError, match="no list of its files"):
            storage.list_files(listed)
    with pytest.raises(InputError, match="cannot be written"):
        storage.put_file(__file__, url)


def test_a_web_server_that_fails_for_a_while_delivers_in_the_end(
    web: str, tmp_path: Path, quick: Retry
) -> None:
    (tmp_path / "web" / "x").write_bytes(b"content")
    Files.fail[:] = [503, 500, 429]
    assert storage.read_bytes(f"{web}/x") == b"content"
    Files.fail[:] = [403]
    with pytest.raises(RefusedError, match="not allowed"):
        storage.read_bytes(f"{web}/x")


def test_big_files_of_a_server_without_ranges_are_one_clear_error(
    web: str, tmp_path: Path, quick: Retry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openlm_lite.remote._WHOLE_BYTES", 100)
    monkeypatch.setattr("openlm_lite.remote._RANGE_BYTES", 64)
    (tmp_path / "web" / "x").write_bytes(b"0123456789" * 100)
    file = storage.open_read(f"{web}/x")
    with pytest.raises(InputError, match="gives whole files only"):
        file.read(10)
    file.close()


# --- other stores: a file system of fsspec's that takes the place of hf:// ------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, quick: Retry) -> Iterator[Any]:
    """hf:// is a dict in memory; `hub.fail` holds errors for its next reads."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Hub(MemoryFileSystem):
        protocol = "hf"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]
        fail: ClassVar[list[Any]] = []
        cachable = False

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("hf://").strip("/")

        def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
            fault = self.fail.pop(0) if self.fail else None
            if isinstance(fault, Exception):
                raise fault
            super().get_file(rpath, lpath, **options)
            if fault == "short":
                content = Path(lpath).read_bytes()
                Path(lpath).write_bytes(content[:-1])
            if fault == "hang":
                threading.Event().wait()

    import huggingface_hub  # noqa: F401  (else fsspec would replace ours when it is imported)

    monkeypatch.setattr(remote, "_filesystems", {})
    before = fsspec.get_filesystem_class("hf")
    fsspec.register_implementation("hf", Hub, clobber=True)
    Hub().pipe_file("hf://datasets/a/b/x.txt", b"0123456789" * 100)
    yield Hub
    fsspec.register_implementation("hf", before, clobber=True)


URL = "hf://datasets/a/b/x.txt"


def test_every_store_of_fsspec_is_read_listed_and_written_in_the_same_way(
    hub: Any, tmp_path: Path
) -> None:
    content = b"0123456789" * 100
    assert storage.read_bytes(URL) == content
    assert storage.list_files("hf://datasets/a") == [URL]
    (tmp_path / "y").write_bytes(b"new")
    storage.put_file(str(tmp_path / "y"), "hf://datasets/a/b/y.txt")
    assert storage.read_bytes("hf://datasets/a/b/y.txt") == b"new"
    with pytest.raises(MissingError):
        storage.read_bytes("hf://datasets/a/b/z.txt")


def test_big_files_are_read_in_ranges(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openlm_lite.remote._WHOLE_BYTES", 100)
    monkeypatch.setattr("openlm_lite.remote._RANGE_BYTES", 64)
    content = b"0123456789" * 100
    with storage.open_read(URL) as file:
        assert file.read() == content
        for start in (0, 7, 63, 64, 65, 993, 1000, 1005):
            file.seek(start)
            assert file.read(13) == content[start : start + 13]
    with storage.open_read(URL) as file:
        assert list(file) == [content]


def test_a_store_that_hangs_is_left_after_the_time_of_an_attempt(
    hub: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retries, "RETRY", Retry(first_wait=0.01, attempt_seconds=0.2))
    hub.fail[:] = ["hang", ConnectionResetError("on purpose")]
    with caplog.at_level(logging.WARNING, "openlm_lite"):
        assert storage.read_bytes(URL) == b"0123456789" * 100
    assert "no answer within" in caplog.text and "ConnectionResetError" in caplog.text


def test_a_short_file_is_fetched_again_a_few_times_and_is_then_an_error(hub: Any) -> None:
    hub.fail[:] = ["short", "short"]
    assert storage.read_bytes(URL) == b"0123456789" * 100
    hub.fail[:] = ["short"] * 10
    with pytest.raises(DamagedError, match=r"999 of 1000 bytes arrived \(3 times\)"):
        storage.read_bytes(URL)


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gs"), ("https://h/x", "aiohttp", "http")],
)
def test_an_absent_package_is_one_error_with_the_install_line(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    def filesystem(scheme: str, **_: Any) -> None:
        raise ImportError(f"Install {package} to access {scheme}")  # as fsspec does

    monkeypatch.setattr(remote, "_filesystems", {})
    monkeypatch.setattr(fsspec, "filesystem", filesystem)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf'needs {package}: pip install "openlm-lite\[{extra}\]"'):
        storage.read_bytes(url)
