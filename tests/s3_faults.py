"""An S3 server on loopback, and in front of it a proxy that breaks what it is told to break.

faults.next("503", times=2, name="shard-000000")    the next two GETs of such objects fail
faults.gets                                         the objects that were asked for, in order
"""

from __future__ import annotations

import http.client
import http.server
import logging
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

from openlm_lite import remote

ERRORS = {"503": "ServiceUnavailable", "slowdown": "SlowDown", "500": "InternalError"}
REFUSALS = {"403": "AccessDenied", "404": "NoSuchKey"}
CUTS = ("reset", "reset midway", "truncate", "hang", "hang midway")
ALWAYS = 1 << 30


@dataclass
class Faults:
    """What the proxy does to the GETs of objects, and what it saw."""

    port: int = 0
    kinds: tuple[str, ...] = ()
    left: int = 0
    name: str = ""
    gets: list[str] = field(default_factory=list)
    faulted: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def next(self, *kinds: str, times: int = 1, name: str = "") -> None:
        with self.lock:
            self.kinds, self.left, self.name = kinds, times, name
            self.gets, self.faulted = [], 0

    def clear(self) -> None:
        self.next(times=0)

    def take(self, path: str) -> str:
        """The fault for this GET, if any."""
        with self.lock:
            self.gets.append(path)
            if self.left < 1 or self.name not in path:
                return ""
            self.left -= 1
            self.faulted += 1
            return self.kinds[(self.faulted - 1) % len(self.kinds)]


class _Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: ClassVar[Faults]
    upstream: ClassVar[int]

    def log_message(self, *_: Any) -> None:
        pass

    def _pass_on(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_object = self.command == "GET" and url.path.strip("/").count("/") >= 1
        fault = self.faults.take(url.path) if is_object else ""
        if name := (ERRORS | REFUSALS).get(fault):
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
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        kept = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
        upstream.request(self.command, self.path, body or None, kept)
        answer = upstream.getresponse()
        data = answer.read()
        headers = dict(answer.getheaders())
        upstream.close()
        if fault == "flip":
            data = data[:-1000] + bytes([data[-1000] ^ 4]) + data[-999:]
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self._answer(answer.status, data, headers, length, cut=fault)

    def _answer(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str],
        length: str | None = None,
        cut: str = "",
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        if self.close_connection:  # else the next request may be sent on it, and is lost
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut not in CUTS:
            self.wfile.write(data)
            return
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if cut == "hang midway":
            self.faults.over.wait()
        if cut == "truncate":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass  # clients go away in the middle: that is what the tests are about


@contextmanager
def proxied(upstream: int) -> Iterator[Faults]:
    """A proxy before the server at this port; at its own port are the faults."""
    remote._filesystems.clear()  # of another server
    faults = Faults()
    handler = type("Proxy", (_Proxy,), {"faults": faults, "upstream": upstream})
    with _Server(("127.0.0.1", 0), handler) as proxy:
        faults.port = proxy.server_port
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield faults
        finally:
            faults.over.set()
            proxy.shutdown()
            remote._filesystems.clear()


@contextmanager
def s3_with_faults() -> Iterator[Faults]:
    """The environment points every S3 client at the proxy; the bucket `bucket` is there."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    try:
        with proxied(moto.get_host_and_port()[1]) as faults, pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{faults.port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "testing")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-a-secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            connection = http.client.HTTPConnection("127.0.0.1", faults.port)
            connection.request("PUT", "/bucket")
            connection.getresponse().read()
            connection.close()
            yield faults
    finally:
        moto.stop()
