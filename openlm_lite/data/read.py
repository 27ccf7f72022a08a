"""Documents out of files: JSON lines, parquet, plain text; plain, gzip or zstandard.

    kind      files                                       one document      its position
    lines     .jsonl .ndjson .json (+ .gz .zst .zstd)     a line            byte offset of the line
    parquet   .parquet                                    a row             number of the row
    text      .txt .md .py … (+ .gz .zst .zstd)           a file            0

Positions count decompressed bytes. A file is read by spans [start, stop) of positions, so that
several processes can share one big file; compressed files and text have one span only.
Whatever cannot be read as a document is a DocumentError with file and line (or byte, or row).
One document that is bad by itself (BadDocumentError) can be passed over; a damaged file cannot.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, NamedTuple

from openlm_lite import storage
from openlm_lite.data.decompress import COMPRESSIONS, DAMAGE, decompressed
from openlm_lite.errors import InputError

LINES = frozenset({".jsonl", ".ndjson", ".json"})
# Natural language and source code that is commonly UTF-8.
_TEXT_NAMES = """
    txt text md markdown rst tex html htm xml css yaml yml toml ini cfg
    py pyi c h cc cpp hpp cu rs go java kt scala swift js jsx ts tsx rb php pl lua r jl hs ml
    lisp el sh bash sql cs f90 v vhd asm lean proto
"""
TEXT = frozenset("." + name for name in _TEXT_NAMES.split())
# A document is in memory as a whole, several times over; a few kilobytes of gzip or zstandard can
# hold one of many gigabytes.
MAX_DOCUMENT_BYTES = 256 << 20
_TOO_LONG = (
    f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB, which no document is (a decompression bomb?); "
    "leave it out or cut it into documents"
)
_UTF8_MARK = b"\xef\xbb\xbf"  # Windows editors put it at the start of a file


class DocumentError(InputError):
    """A file or a document in it cannot be read; the place is in the message."""


class BadDocumentError(DocumentError):
    """One document is no text; the ones after it can be read. `reason` is one of BAD_REASONS."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


BAD_REASONS = ("bad_json", "bad_field", "bad_utf8")


class PassedOver(NamedTuple):
    """A bad document that was left out. `place` is "" where the line must be counted first."""

    path: str
    position: int
    place: str
    reason: str
    message: str


OnBad = Callable[[PassedOver], None]


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


def open_input(path: str) -> BinaryIO:
    """A file of documents, local or remote, for reading and seeking. Raises DocumentError."""
    try:
        return storage.open_read(path)
    except FileNotFoundError:
        raise DocumentError(f"{path}: the file is gone; restore it and run again") from None


def spans(path: str, format: Format, span_bytes: int) -> list[tuple[int, int, int]]:
    """Cut a file into [(start, stop, bytes)]: spans of positions and what each weighs.

    Only plain JSON lines and parquet can be cut. A parquet file's footer is read and checked here.
    """
    if format.kind == "parquet":
        return _row_groups(path, span_bytes)
    size = storage.size_of(path)
    if format.kind == "lines" and format.compression == "none":
        starts = range(0, size, span_bytes)
        return [(s, min(s + span_bytes, size), min(span_bytes, size - s)) for s in starts]
    return [(0, 1 << 62, size)]


def read_documents(
    path: str,
    format: Format,
    *,
    text_field: str,
    start: int = 0,
    stop: int = 1 << 62,
    on_bad: OnBad | None = None,
) -> Iterator[Document]:
    """The documents whose positions lie in [start, stop). Raises DocumentError.

    With `on_bad`, a document that is bad by itself is told to it and left out.
    """
    if format.kind == "parquet":
        yield from _read_parquet(path, text_field, start, stop, on_bad)
        return
    try:
        with _opened(path, format) as stream:
            if format.kind == "lines":
                yield from _read_lines(path, stream, text_field, start, stop, on_bad)
            else:
                yield from _read_text(path, stream, on_bad)
    except DAMAGE as e:
        raise DocumentError(
            f"{path}: damaged {format.compression} data ({e}); fetch the file again"
        ) from None


def read_strings(path: str, format: Format) -> Iterator[str]:
    """All text of a file, whatever its fields are called: what decontamination looks for.

    Of JSON lines and parquet the strings of each record, nested ones too, joined by spaces.
    """
    if format.kind == "text":
        yield from (d.text for d in read_documents(path, format, text_field=""))
        return
    for record in _records(path, format):
        yield " ".join(_strings_in(record))


def place_of(bad: PassedOver) -> str:
    """Where a bad document is, for people: `file:line`, the file and the row, or the byte."""
    if not bad.place and storage.is_remote(bad.path):  # counting lines would fetch all before it
        return f"{bad.path}: byte {bad.position}"
    return bad.place or f"{bad.path}:{_count_lines(bad.path, bad.position) + 1}"


@contextmanager
def _opened(path: str, format: Format) -> Iterator[BinaryIO]:
    with ExitStack() as stack:
        raw = stack.enter_context(open_input(path))
        yield stack.enter_context(decompressed(path, raw, format.compression))


def _read_text(path: str, stream: BinaryIO, on_bad: OnBad | None) -> Iterator[Document]:
    try:
        content = stream.read(MAX_DOCUMENT_BYTES + 1)
        if len(content) > MAX_DOCUMENT_BYTES:
            raise DocumentError(f"{path}: {_TOO_LONG}")
        text = _decode(content.removeprefix(_UTF8_MARK), f"{path}: byte")
    except BadDocumentError as e:
        if on_bad is None:
            raise
        on_bad(PassedOver(path, 0, path, e.reason, str(e)))
        return
    yield Document(0, text)


def _read_lines(
    path: str, stream: BinaryIO, text_field: str, start: int, stop: int, on_bad: OnBad | None
) -> Iterator[Document]:
    position = 0
    if start > 0:
        # the line that contains byte start - 1 began before this span and belongs to another
        stream.seek(start - 1)
        position = start - 1
        while part := stream.readline(1 << 20):
            position += len(part)
            if part.endswith(b"\n"):
                break
    line_number = 0
    while position < stop:
        line = stream.readline(MAX_DOCUMENT_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_DOCUMENT_BYTES:
            raise DocumentError(f"{path}: the line at byte {position} is {_TOO_LONG}")
        line_number += 1
        content = line.removeprefix(_UTF8_MARK) if position == 0 else line
        if not content.isspace():
            try:
                text = _text_of(content, text_field)
            except BadDocumentError as e:
                place = f"{path}:{line_number}" if start == 0 else ""
                bad = PassedOver(path, position, place, e.reason, str(e))
                if on_bad is None:
                    raise BadDocumentError(f"{place_of(bad)}: {e}", e.reason) from None
                on_bad(bad)
            else:
                yield Document(position, text)
        position += len(line)


def _records(path: str, format: Format) -> Iterator[Any]:
    """The JSON values or parquet rows of a file. Raises DocumentError."""
    if format.kind == "parquet":
        with _open_parquet(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
        return
    try:
        with _opened(path, format) as stream:
            lines = iter(lambda: stream.readline(MAX_DOCUMENT_BYTES + 1), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise DocumentError(f"{path}:{number}: {_TOO_LONG}")
                if line.strip():
                    try:
                        yield _value_of(line.removeprefix(_UTF8_MARK))
                    except BadDocumentError as e:
                        raise BadDocumentError(f"{path}:{number}: {e}", e.reason) from None
    except DAMAGE as e:
        raise DocumentError(
            f"{path}: damaged {format.compression} data ({e}); fetch the file again"
        ) from None


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings_in(inner)


def _value_of(line: bytes) -> Any:
    text = _decode(line, "byte")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise BadDocumentError(
            f"not a JSON value ({e}); mend or remove this line", "bad_json"
        ) from None


def _text_of(line: bytes, text_field: str) -> str:
    """The text of one JSON line; the caller adds the place to the message."""
    record = _value_of(line)
    if not isinstance(record, dict):
        raise BadDocumentError(f"expected a JSON object, found {type(record).__name__}", "bad_json")
    if text_field not in record:
        raise BadDocumentError(
            f"no field {text_field!r}; it has {sorted(record)}; name one with --text-field",
            "bad_field",
        )
    value = record[text_field]
    if not isinstance(value, str):
        raise BadDocumentError(
            f"field {text_field!r} is {type(value).__name__}, expected a string; "
            "mend or remove this line, or name another field with --text-field",
            "bad_field",
        )
    return value


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise BadDocumentError(
            f"{place} {e.start} (0x{content[e.start]:02x}): not UTF-8 ({e.reason}); "
            "convert the file to UTF-8 (iconv) or leave it out",
            "bad_utf8",
        ) from None


def _count_lines(path: str, end: int) -> int:
    """Line breaks in the first `end` bytes of a plain file."""
    count = 0
    with open_input(path) as file:
        while end > 0 and (chunk := file.read(min(end, 1 << 20))):
            count += chunk.count(b"\n")
            end -= len(chunk)
    return count


# --- parquet -------------------------------------------------------------------------------------


@contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f'{path}: reading .parquet needs pyarrow: pip install "openlm-lite[data]"'
        ) from None
    with open_input(path) as raw:
        try:
            file = parquet.ParquetFile(raw)
        except (OSError, ValueError) as e:  # pyarrow's errors derive from these
            raise DocumentError(f"{path}: damaged parquet file ({e}); fetch it again") from None
        with file:
            yield file


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


def _read_parquet(
    path: str, text_field: str, start: int, stop: int, on_bad: OnBad | None
) -> Iterator[Document]:
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
                yield from _read_row_group(path, file, group, text_field, row, on_bad)
            row = end


def _read_row_group(
    path: str, file: Any, group: int, text_field: str, row: int, on_bad: OnBad | None
) -> Iterator[Document]:
    try:
        for batch in file.iter_batches(1024, row_groups=[group], columns=[text_field]):
            for value in batch.column(0):
                try:
                    text = _text_of_cell(value, text_field, f"{path}: row {row}")
                except BadDocumentError as e:
                    if on_bad is None:
                        raise
                    on_bad(PassedOver(path, row, f"{path}: row {row}", e.reason, str(e)))
                else:
                    yield Document(row, text)
                row += 1
    except (OSError, ValueError) as e:
        raise DocumentError(f"{path}: damaged parquet file near row {row} ({e})") from None


def _text_of_cell(value: Any, text_field: str, place: str) -> str:
    # as bytes: pyarrow does not check that a string column is UTF-8
    content = value.as_buffer()
    if content is None:
        raise BadDocumentError(
            f"{place}: {text_field!r} is null, expected a string; drop it", "bad_field"
        )
    return _decode(content.to_pybytes(), f"{place}: byte")
