"""A server that speaks Google Cloud Storage's protocol, behind the proxy of s3_faults."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from openlm_lite import remote
from tests.s3_faults import Faults, proxied


async def _at_once(_: float) -> None: ...


@contextmanager
def gs_with_faults() -> Iterator[Faults]:
    """The environment points gcsfs at the proxy; the bucket `bucket` is there."""
    remote._filesystem("gs")  # it decides how gcsfs is imported
    import gcsfs.retry
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    emulator.start()
    quick: Any = SimpleNamespace(sleep=_at_once)
    server = emulator._api._httpd
    assert server is not None  # it is started
    try:
        with proxied(server.server_port) as faults, pytest.MonkeyPatch.context() as p:
            p.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{faults.port}")
            p.setattr(gcsfs.retry, "asyncio", quick)  # it waits seconds between its own tries
            yield faults
    finally:
        emulator.stop()
