"""Documents come out of every format whole and once; what is broken is told with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openlm_lite.data.read import DocumentError, format_of, read_documents, spans

TEXTS = ["one", "zwei äöü 😀", "drei\nlines\n", "", 'quotes " and \\', "x" * 5000]
JSONL = "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(TEXTS)).encode()


def read(path: Path, *, text_field: str = "text") -> list[str]:
    kind = format_of(str(path))
    assert kind is not None
    found: list[str] = []
    for start, stop, _ in spans(str(path), kind, 1 << 20):
        found += [
            d.text
            for d in read_documents(str(path), kind, text_field=text_field, start=start, stop=stop)
        ]
    return found


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("extension", [".jsonl", ".json", ".ndjson"])
def test_json_lines_read_plain_and_compressed(tmp_path: Path, extension: str) -> None:
    whole = zstandard.ZstdCompressor().compress(JSONL)
    frames = [zstandard.ZstdCompressor().compress(JSONL[a:b]) for a, b in ((0, 99), (99, None))]
    for suffix, content in {
        "": JSONL,
        ".gz": gzip.compress(JSONL),
        ".zst": whole,
        ".zstd": b"".join(frames),
    }.items():
        assert read(write(tmp_path / f"x{extension}{suffix}", content)) == TEXTS


def test_a_missing_final_newline_blank_lines_and_a_byte_order_mark_lose_nothing(
    tmp_path: Path,
) -> None:
    content = b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n\n").rstrip()
    assert read(write(tmp_path / "x.jsonl", content)) == TEXTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    text = "a\n\nb äö\n"
    for name in ("x.txt", "x.md", "x.PY"):
        assert read(write(tmp_path / name, text.encode())) == [text]
    assert read(write(tmp_path / "x.txt.gz", gzip.compress(text.encode()))) == [text]


def test_parquet_reads_row_groups_of_either_string_type(tmp_path: Path) -> None:
    for kind in (pyarrow.string(), pyarrow.large_string()):
        table = pyarrow.table({"text": pyarrow.array(TEXTS, kind), "n": list(range(6))})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=4)
        assert read(tmp_path / "x.parquet") == TEXTS
        kind_of = format_of("x.parquet")
        assert kind_of is not None
        assert [s[:2] for s in spans(str(tmp_path / "x.parquet"), kind_of, 1)] == [(0, 4), (4, 6)]
        part = read_documents(str(tmp_path / "x.parquet"), kind_of, text_field="text", start=4)
        assert [tuple(d) for d in part] == [(4, TEXTS[4]), (5, TEXTS[5])]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.text(max_size=30), max_size=12),
    span=st.integers(1, 80),
    newline=st.booleans(),
)
def test_spans_of_any_size_hold_every_document_once_with_one_position(
    tmp_path: Path, texts: list[str], span: int, newline: bool
) -> None:
    content = "\n".join(json.dumps({"text": t}) for t in texts) + ("\n" if newline else "")
    path = str(write(tmp_path / "x.jsonl", content.encode()))
    kind = format_of(path)
    assert kind is not None
    whole = list(read_documents(path, kind, text_field="text"))
    cut = [
        document
        for start, stop, _ in spans(path, kind, span)
        for document in read_documents(path, kind, text_field="text", start=start, stop=stop)
    ]
    assert cut == whole
    assert [d.text for d in whole] == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"not a JSON value"),
        (b'["text"]', "expected a JSON object, found list"),
        (b'{"body": "a"}', r"no field 'text'; it has \['body'\]; name one with --text-field"),
        (b'{"text": 3}', "field 'text' is int, expected a string"),
        (b'{"text": null}', "field 'text' is NoneType"),
        (b'{"text": "a\xff"}', r"byte 11 \(0xff\): not UTF-8"),
        (b"[" * 100_000, "not a JSON value"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_broken_line_is_told_with_file_and_line(
    tmp_path: Path, line: bytes, message: str, compressed: bool
) -> None:
    content = JSONL + b"\n" + line + b"\n" + JSONL
    path = tmp_path / ("x.jsonl.gz" if compressed else "x.jsonl")
    write(path, gzip.compress(content) if compressed else content)
    with pytest.raises(DocumentError, match=rf"{path.name}:8: {message}"):
        read(path)


def test_the_line_number_is_right_in_the_middle_of_a_file(tmp_path: Path) -> None:
    path = str(write(tmp_path / "x.jsonl", JSONL * 3 + b"oops\n" + JSONL))
    kind = format_of(path)
    assert kind is not None
    with pytest.raises(DocumentError, match=r"x\.jsonl:19: not a JSON value"):
        list(read_documents(path, kind, text_field="text", start=len(JSONL) + 40))


def test_text_that_is_not_utf8_is_told_with_its_byte(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"x\.txt: byte 3 \(0xe4\): not UTF-8"):
        read(write(tmp_path / "x.txt", b"abc\xe4\xf6"))


@pytest.mark.parametrize("extension", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["cut", "flipped", "not compressed", "rest is rubbish"])
def test_damaged_compression_is_never_the_end_of_the_file(
    tmp_path: Path, extension: str, kind: str
) -> None:
    # a checksum, as the zstd command writes it
    compress = (
        gzip.compress
        if extension == ".gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress
    )
    content = bytearray(compress(JSONL * 50))
    if kind == "cut":
        del content[-9:]
    elif kind == "flipped":
        content[len(content) // 2] ^= 64
    elif kind == "not compressed":
        content = bytearray(JSONL)
    else:
        content += b"rubbish"
    path = write(tmp_path / f"x.jsonl{extension}", bytes(content))
    with pytest.raises(DocumentError, match=rf"x\.jsonl{extension}"):
        read(path)


def test_damaged_or_unfit_parquet_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", None], "n": [1, 2]}), path, compression="none"
    )
    with pytest.raises(DocumentError, match=r"row 1: 'text' is null"):
        read(path)
    with pytest.raises(DocumentError, match=r"no column 'body'; it has \['n', 'text'\]"):
        read(path, text_field="body")
    with pytest.raises(DocumentError, match="column 'n' is int64, expected string"):
        read(path, text_field="n")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DocumentError, match="damaged parquet"):
        read(path)


def test_unknown_extensions_are_unknown() -> None:
    for name in ("x", "x.bin", "x.tar", "x.parquet.gz", "x.gz", "x.csv"):
        assert format_of(name) is None
