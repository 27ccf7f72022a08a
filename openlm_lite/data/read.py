"""Documents out of files: JSON lines, parquet, plain text; plain, gzip or zstandard.

    kind      files                                       one document      its position
    lines     .jsonl .ndjson .json (+ .gz .zst .zstd)     a line            byte offset of the line
    parquet   .parquet                                    a row             number of the row
    text      .txt .md .py … (+ .gz .zst .zstd)           a file            0

Positions count decompressed bytes. A file is read by spans [start, stop) of positions, so that
several processes can share one big file; compressed files and text have one span only.
Whatever cannot be read as a document is a DocumentError with file and line (or byte, or row).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO, NamedTuple

from openlm_lite.errors import InputError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
LINES = frozenset({".jsonl", ".ndjson", ".json"})
# Natural language and source code that is commonly UTF-8.
_TEXT_NAMES = """
    txt text md markdown rst tex html htm xml css yaml yml toml ini cfg
    py pyi c h cc cpp hpp cu rs go java kt scala swift js jsx ts tsx rb php pl lua r jl hs ml
    lisp el sh bash sql cs f90 v vhd asm lean proto
"""
TEXT = frozenset("." + name for name in _TEXT_NAMES.split())
_UTF8_MARK = b"\xef\xbb\xbf"  # Windows editors put it at the start of a file
_ZSTD_CHUNK = 1 << 20


class DocumentError(InputError):
    """A file or a document in it cannot be read; the place is in the message."""


class Format(NamedTuple):
    """How a file is read: kind is lines, parquet or text; compression is gzip, zstd or none."""

    kind: str
    compression: str


class Document(NamedTuple):
    """One text and its place in the file."""

    position: int
    text: str


def format_of(path: str) -> Format | None:
    """The format that the file's name tells, or None for an extension that is not known."""
    stem, extension = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(extension, "none")
    if compression != "none":
        extension = os.path.splitext(stem)[1]
    if extension in LINES:
        return Format("lines", compression)
    if extension in TEXT:
        return Format("text", compression)
    if extension == ".parquet" and compression == "none":
        return Format("parquet", compression)
    return None


def known_extensions() -> str:
    """For messages: the extensions that can be read."""
    lines = " ".join(sorted(LINES))
    text = " ".join(sorted(TEXT))
    return f"{lines} {text} (each also with {' '.join(COMPRESSIONS)}) .parquet"


def spans(path: str, format: Format, span_bytes: int) -> list[tuple[int, int, int]]:
    """Cut a file into [(start, stop, bytes)]: spans of positions and what each weighs.

    Only plain JSON lines and parquet can be cut. A parquet file's footer is read and checked here.
    """
    size = os.path.getsize(path)
    if format.kind == "parquet":
        return _row_groups(path, span_bytes)
    if format.kind == "lines" and format.compression == "none":
        starts = range(0, size, span_bytes)
        return [(s, min(s + span_bytes, size), min(span_bytes, size - s)) for s in starts]
    return [(0, 1 << 62, size)]


def read_documents(
    path: str, format: Format, *, text_field: str, start: int = 0, stop: int = 1 << 62
) -> Iterator[Document]:
    """The documents whose positions lie in [start, stop). Raises DocumentError."""
    if format.kind == "parquet":
        yield from _read_parquet(path, text_field, start, stop)
        return
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(open(path, "rb"))
            stream = stack.enter_context(_decompressed(raw, format.compression))
            if format.kind == "lines":
                yield from _read_lines(path, stream, text_field, start, stop)
            else:
                yield Document(0, _decode(stream.read().removeprefix(_UTF8_MARK), f"{path}: byte"))
    except FileNotFoundError:
        raise DocumentError(f"{path}: the file is gone; restore it and run again") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, _ZstdError) as e:
        raise DocumentError(
            f"{path}: damaged {format.compression} data ({e}); fetch the file again"
        ) from None


def _read_lines(
    path: str, stream: BinaryIO, text_field: str, start: int, stop: int
) -> Iterator[Document]:
    position = 0
    if start > 0:
        # the line that contains byte start - 1 began before this span and belongs to another
        stream.seek(start - 1)
        position = start - 1 + len(stream.readline())
    line_number = 0
    while position < stop:
        line = stream.readline()
        if not line:
            return
        line_number += 1
        content = line.removeprefix(_UTF8_MARK) if position == 0 else line
        if not content.isspace():
            try:
                yield Document(position, _text_of(content, text_field))
            except DocumentError as e:
                if start > 0:
                    line_number += _count_lines(path, position) - (line_number - 1)
                raise DocumentError(f"{path}:{line_number}: {e}") from None
        position += len(line)


def _text_of(line: bytes, text_field: str) -> str:
    """The text of one JSON line; the caller adds the place to the message."""
    text = _decode(line, "byte")
    try:
        record: Any = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DocumentError(f"not a JSON value ({e}); mend or remove this line") from None
    if not isinstance(record, dict):
        raise DocumentError(f"expected a JSON object, found {type(record).__name__}")
    if text_field not in record:
        raise DocumentError(
            f"no field {text_field!r}; it has {sorted(record)}; name one with --text-field"
        )
    value = record[text_field]
    if not isinstance(value, str):
        raise DocumentError(
            f"field {text_field!r} is {type(value).__name__}, expected a string; "
            "mend or remove this line, or name another field with --text-field"
        )
    return value


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DocumentError(
            f"{place} {e.start} (0x{content[e.start]:02x}): not UTF-8 ({e.reason}); "
            "convert the file to UTF-8 (iconv) or leave it out"
        ) from None


def _count_lines(path: str, end: int) -> int:
    """Line breaks in the first `end` bytes of a plain file."""
    count = 0
    with open(path, "rb") as file:
        while end > 0 and (chunk := file.read(min(end, 1 << 20))):
            count += chunk.count(b"\n")
            end -= len(chunk)
    return count


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]  (it reads as one)
    if compression == "zstd":
        return io.BufferedReader(_ZstdStream(raw), 1 << 20)
    return raw


class _ZstdError(Exception):
    """Zstandard data that is cut or damaged."""


class _ZstdStream(io.RawIOBase):
    """Frames of zstandard data, one after the other.

    zstandard's own stream_reader takes a cut frame for the end of the file; this one does not.
    """

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise InputError(
                f'{raw.name}: reading .zst needs zstandard: pip install "openlm-lite[data]"'
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
                        raise _ZstdError("the file ends inside a frame")
                    return 0
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._zstandard.ZstdError as e:
                raise _ZstdError(str(e)) from None
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
            else:
                self._input = b""
        n = min(len(buffer), len(self._output))
        buffer[:n] = self._output[:n]
        self._output = self._output[n:]
        return n


# --- parquet -------------------------------------------------------------------------------------


def _open_parquet(path: str) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f'{path}: reading .parquet needs pyarrow: pip install "openlm-lite[data]"'
        ) from None
    try:
        return parquet.ParquetFile(path)
    except FileNotFoundError:
        raise DocumentError(f"{path}: the file is gone; restore it and run again") from None
    except (OSError, ValueError) as e:  # pyarrow's errors derive from these
        raise DocumentError(f"{path}: damaged parquet file ({e}); fetch it again") from None


def _row_groups(path: str, span_bytes: int) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    start = row = weight = 0
    with _open_parquet(path) as file:
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            row += metadata.num_rows
            weight += metadata.total_byte_size
            if weight >= span_bytes or group == file.num_row_groups - 1:
                found.append((start, row, weight))
                start, weight = row, 0
    return found


def _read_parquet(path: str, text_field: str, start: int, stop: int) -> Iterator[Document]:
    with _open_parquet(path) as file:
        columns = file.schema_arrow
        if text_field not in columns.names:
            raise DocumentError(
                f"{path}: no column {text_field!r}; it has {sorted(columns.names)}; "
                "name one with --text-field"
            )
        kind = str(columns.field(text_field).type)
        if kind not in ("string", "large_string", "string_view"):
            raise DocumentError(
                f"{path}: column {text_field!r} is {kind}, expected string; "
                "name another with --text-field"
            )
        row = 0
        for group in range(file.num_row_groups):
            end = row + file.metadata.row_group(group).num_rows
            if start <= row < stop:
                yield from _read_row_group(path, file, group, text_field, row)
            row = end


def _read_row_group(
    path: str, file: Any, group: int, text_field: str, row: int
) -> Iterator[Document]:
    try:
        for batch in file.iter_batches(1024, row_groups=[group], columns=[text_field]):
            for value in batch.column(0):
                # as bytes: pyarrow does not check that a string column is UTF-8
                content = value.as_buffer()
                if content is None:
                    raise DocumentError(
                        f"{path}: row {row}: {text_field!r} is null, expected a string; drop it"
                    )
                yield Document(row, _decode(content.to_pybytes(), f"{path}: row {row}: byte"))
                row += 1
    except (OSError, ValueError) as e:
        raise DocumentError(f"{path}: damaged parquet file near row {row} ({e})") from None
