"""A server that speaks Google Cloud Storage's protocol, behind the proxy of s3_faults."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from openlm_lite import remote
from tests.s3_faults import Faults, _Proxy, _Server


async def _at_once(_: float) -> None: ...


@contextmanager
def gs_with_faults() -> Iterator[Faults]:
    """The environment points gcsfs at the proxy; the bucket `bucket` is there."""
    remote._filesystem("gs")  # it decides how gcsfs is imported
    import gcsfs.retry
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    remote._filesystems.clear()  # of another server
    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    emulator.start()
    faults = Faults()
    upstream = emulator._api._httpd.server_port
    handler = type("Proxy", (_Proxy,), {"faults": faults, "upstream": upstream})
    with _Server(("127.0.0.1", 0), handler) as proxy:
        faults.port = proxy.server_port
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        quick: Any = SimpleNamespace(sleep=_at_once)
        with (
            patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{faults.port}"}),
            patch.object(gcsfs.retry, "asyncio", quick),  # it waits seconds between its own tries
        ):
            try:
                yield faults
            finally:
                faults.over.set()
                proxy.shutdown()
                emulator.stop()
                remote._filesystems.clear()
