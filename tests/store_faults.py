"""A store whose answers to anything can be broken, one in memory to kill at, and saves to both.

rules.on("PUT", "COMMIT.json", "lost")    the next PUT of such an object: no answer arrives
memory.kill_at = 7                        everything ends after the seventh request
"""

from __future__ import annotations

import base64
import io
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from openlm_lite import object_store, remote, retries
from openlm_lite import remote_checkpoints as rc
from openlm_lite.commit import Commit, TrainState, encode_commit
from openlm_lite.retries import Retry
from tests import s3_faults
from tests.s3_faults import ERRORS, Faults, s3_with_faults

ROOT = "s3://bucket/runs/a"


# --- a server whose answers to anything can be broken ---------------------------------------------


class Rules:
    """What happens to requests: `rules.on("PUT", "COMMIT.json", "lost")` breaks the next such."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.method, self.part, self.kinds, self.left = "", "", ("",), 0
        self.seen: list[str] = []
        self.hits = 0
        self.checks_bytes = True  # as Amazon does with the checksum of a request
        self.knows_conditions = True
        self.listings: dict[str, Any] | None = None  # answers to listings, kept for ever
        self.lock = threading.Lock()

    def on(self, method: str, part: str, *kinds: str, times: int = 1) -> None:
        self.method, self.part, self.kinds, self.left = method, part, kinds, times
        self.hits = 0

    def take(self, method: str, path: str) -> str:
        with self.lock:
            self.seen.append(f"{method} {path}")
            if self.left < 1 or method != self.method or self.part not in path:
                return ""
            self.left -= 1
            self.hits += 1
            return self.kinds[(self.hits - 1) % len(self.kinds)]


RULES = Rules()


class Proxy(s3_faults._Proxy):
    """The proxy of s3_faults, for every method."""

    one_write = threading.Lock()  # moto looks and writes in two steps

    def _pass_on(self) -> None:
        fault = RULES.take(self.command, self.path)
        name = (ERRORS | s3_faults.REFUSALS | {"501": "NotImplemented"}).get(fault)
        if name:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            text = f"<Error><Code>{name}</Code><Message>on purpose</Message></Error>"
            self._answer(int(fault) if fault.isdigit() else 503, text.encode(), {})
            return
        if fault == "reset":
            self._reset()
            return
        if fault == "hang":
            self.faults.over.wait()
            self._reset()
            return
        if not RULES.knows_conditions:
            del self.headers["If-None-Match"]
        if self.command == "PUT":
            if self._refuse_damaged(fault):
                return
            with self.one_write:
                answer = self._silently() if fault == "lost" else super()._pass_on()
            return answer
        listing = self.command == "GET" and "list-type" in self.path
        if listing and RULES.listings is not None:
            if self.path not in RULES.listings:
                RULES.listings[self.path] = self._kept()
            self.wfile.write(RULES.listings[self.path])
            return
        super()._pass_on()

    def _refuse_damaged(self, fault: str) -> bool:
        """A flip on the way; whether the store saw it."""
        body = bytearray(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        if fault == "flip" and body:
            body[len(body) // 2] ^= 4
        if fault == "short":  # a store that loses the end, and says that all is well
            del body[len(body) // 2 :]
            del self.headers["Content-Length"]
            self.headers["Content-Length"] = str(len(body))
        self.rfile = io.BytesIO(bytes(body))  # pyright: ignore
        self.close_connection = True
        told = self.headers.get("x-amz-checksum-crc32")
        found = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
        if not RULES.checks_bytes or told in (None, found):
            return False
        text = "<Error><Code>BadDigest</Code><Message>checksum</Message></Error>"
        self._answer(400, text.encode(), {})
        return True

    def _silently(self) -> None:
        self._kept()
        self._reset()

    def _kept(self) -> bytes:
        """The answer, not sent."""
        out, self.wfile = self.wfile, io.BytesIO()  # pyright: ignore
        try:
            super()._pass_on()
            return self.wfile.getvalue()
        finally:
            self.wfile = out

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on


@pytest.fixture(scope="module")
def server() -> Iterator[Faults]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_faults, "_Proxy", Proxy)
        with s3_with_faults() as faults:
            yield faults


@pytest.fixture
def s3(server: Faults, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rules]:
    """The server without faults, and empty; retries without the waiting."""
    server.clear()
    RULES.clear()
    hurry(monkeypatch)
    object_store.delete(object_store.files(ROOT))
    object_store.abort_uploads(ROOT)
    RULES.clear()
    yield RULES
    RULES.clear()


def hurry(monkeypatch: pytest.MonkeyPatch, idle: float = 30.0, total: float = 60.0) -> None:
    retry = Retry(total_seconds=total, first_wait=0.001, longest_wait=0.01, idle_seconds=idle)
    monkeypatch.setattr(retries, "RETRY", retry)


# --- a store in memory, which can be killed at any request ----------------------------------------


class Killed(BaseException):
    """SIGKILL, for a test in one process: no `except Exception` sees it."""


class Memory:
    """What remote.py needs of fsspec, over a dict; `kill_at` ends everything at that request."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.time = 1e9
        self.calls = 0
        self.kill_at: int | None = None
        self.lock = threading.Lock()

    def invalidate_cache(self) -> None: ...

    def _strip_protocol(self, url: str) -> str:
        return url.split("://", 1)[1].rstrip("/")

    def _request(self, url: str) -> str:
        self.calls += 1
        self.time += 0.01
        if self.kill_at is not None and self.calls > self.kill_at:
            raise Killed
        return self._strip_protocol(url)

    def info(self, url: str) -> dict[str, Any]:
        with self.lock:
            return self._info(self._request(url))

    def _info(self, name: str) -> dict[str, Any]:
        if name in self.objects:
            data, when = self.objects[name]
            when = datetime.fromtimestamp(when, UTC)
            return {"name": name, "size": len(data), "type": "file", "LastModified": when}
        if any(other.startswith(f"{name}/") for other in self.objects):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(name)

    def ls(self, url: str, detail: bool) -> list[dict[str, Any]]:
        with self.lock:
            name = self._request(url)
            found = {
                f"{name}/{o.removeprefix(name + '/').split('/')[0]}"
                for o in self.objects
                if o.startswith(f"{name}/")
            }
            return [self._info(one) for one in sorted(found)]

    def find(self, url: str, detail: bool) -> dict[str, dict[str, Any]]:
        with self.lock:
            name = self._request(url)
            return {o: self._info(o) for o in self.objects if o.startswith(f"{name}/")}

    def pipe_file(self, url: str, data: bytes, mode: str = "overwrite") -> None:
        with self.lock:
            name = self._request(url)
            if mode == "create" and name in self.objects:
                raise FileExistsError(name)
            self.objects[name] = (bytes(data), self.time)

    def put_file(self, local: str, url: str, **_: Any) -> None:
        self.pipe_file(url, Path(local).read_bytes())

    def get_file(self, url: str, local: str) -> None:
        with self.lock:
            name = self._request(url)
            if name not in self.objects:
                raise FileNotFoundError(name)
            Path(local).write_bytes(self.objects[name][0])

    def cp_file(self, source: str, target: str) -> None:
        with self.lock:
            name = self._request(source)
            self.objects[self._strip_protocol(target)] = (self.objects[name][0], self.time)

    def rm_file(self, url: str) -> None:
        with self.lock:
            self.objects.pop(self._request(url), None)

    def call_s3(self, method: str, **_: Any) -> dict[str, Any]:
        return {}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return use_memory(monkeypatch)


def use_memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    store = Memory()
    hurry(monkeypatch)
    monkeypatch.setattr(remote, "_filesystem", lambda *_: store)
    # without the thread for each call: nothing hangs here
    call = lambda fs, method, *args, seconds, **options: getattr(fs, method)(*args, **options)  # noqa: E731
    monkeypatch.setattr(remote, "_call", call)
    return store


# --- saving ---------------------------------------------------------------------------------------


def contents(step: int, n_bytes: int = 5000) -> dict[str, bytes]:
    bytes_of = random.Random(step).randbytes
    return {
        "__0_0.distcp": bytes_of(n_bytes),
        "__1_0.distcp": bytes_of(n_bytes // 2),
        "__2_0.distcp": b"",
        ".metadata": bytes_of(300),
        "state.json": TrainState(step, 2 * step, 3 * step).to_json().encode(),
    }


def commit_of(step: int, files: dict[str, bytes]) -> Commit:
    entries = {name: (len(data), zlib.crc32(data)) for name, data in files.items()}
    return Commit("", TrainState(step, 2 * step, 3 * step), 2, {"manifest_sha256": "x"}, entries)


def save(step: int, folder: Path, n_bytes: int = 5000) -> str:
    """As two ranks would; returns the URL."""
    files = contents(step, n_bytes)
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    url = rc.step_url(ROOT, step)
    own = [name for name in files if name.startswith("__1")]
    rc.upload(str(folder), own, url)
    rc.upload(str(folder), [name for name in files if name not in own], url)
    rc.publish_commit(encode_commit(commit_of(step, files)), url)
    return url


def fetched(url: str, parent: Path, token: str | None = None) -> dict[str, bytes]:
    """What a start would read, by the names of the files."""
    commit = rc.fetch(url, str(parent / url.rsplit("/", 1)[1]), token)
    return {name: (Path(commit.path) / name).read_bytes() for name in commit.files}


def objects(url: str = ROOT) -> dict[str, bytes]:
    return {u.removeprefix(url + "/"): remote.read_bytes(u) for u in object_store.files(url)}


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
