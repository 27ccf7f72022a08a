"""Compressed files as streams that never take damage for the end of the file.

gzip through the standard library; zstandard (an extra) frame by frame.
"""

from __future__ import annotations

import gzip
import io
import zlib
from typing import Any, BinaryIO

from openlm_lite.errors import InputError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
# A hostile byte becomes 32 KiB (blocks of one repeated byte), and a call gives all of its output.
_ZSTD_CHUNK = 4 << 10


class ZstdError(Exception):
    """Zstandard data that is cut or damaged."""


# What reading raises where the data is cut or damaged.
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, ZstdError)


def decompressed(path: str, raw: BinaryIO, compression: str) -> BinaryIO:
    """The content of `raw`; reading it raises one of DAMAGE. `path` is for messages."""
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]  (it reads as one)
    if compression == "zstd":
        return io.BufferedReader(_ZstdStream(path, raw), 1 << 20)
    return raw


class _ZstdStream(io.RawIOBase):
    """Frames of zstandard data, one after the other.

    zstandard's own stream_reader takes a cut frame for the end of the file; this one does not.
    """

    def __init__(self, path: str, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise InputError(
                f'{path}: reading .zst needs zstandard: pip install "openlm-lite[data]"'
            ) from None
        self._raw = raw
        self._zstandard = zstandard
        self._frame: Any = None
        self._input = b""  # compressed bytes that are not used yet
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(_ZSTD_CHUNK)
                if not self._input:
                    if self._frame is not None:
                        raise ZstdError("the file ends inside a frame")
                    return 0
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._zstandard.ZstdError as e:
                raise ZstdError(str(e)) from None
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
            else:
                self._input = b""
        n = min(len(buffer), len(self._output))
        buffer[:n] = self._output[:n]
        self._output = self._output[n:]
        return n
