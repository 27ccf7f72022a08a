"""Lists of token ids, written as text, into arrays: as fast as numpy allows, checked throughout.

    "[5, 17, 50256]\\n" or gzip of it   ->   5 17 50256

Rows are decoded some at a time (`ROWS_AT_ONCE`), all of their ids together:

    5, 17, 50256,            the rows' inner text, joined, each id ended by a comma
     ^   ^      ^            1. where the commas are: one pass over the bytes
         ,·17                2. the eight bytes before each comma as one uint64
         0017                3. what is not the id's own digits shifted out, the rest minus "0"
           17                4. digits -> pairs -> fours -> eights: three multiplications

Anything that is not in this plain form (line breaks, other spaces, ids of 9 digits, …) makes
step 3 or a count fail, and the row goes through `json`, slowly and strictly.

One core of a Xeon at 2.5 GHz, ns per token of rows of 2,049 random ids below 50,257:
    inflate   zlib 42, zlib-ng 29, isal 16
    parse     this 25; json + numpy 230, orjson + numpy 140, msgspec (checks types) + numpy 150,
              numpy.fromstring 69, pyarrow's CSV reader 45 (and 19 to bring the text in its form),
              pyarrow's JSON reader 112
With the tar's headers and the copies a json.gz comes to 48 ns with isal (of the extra `data`), 75
with the standard library's zlib; both check gzip's crc32 and give the same bytes. numpy and the
inflaters let other threads run meanwhile.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

ROWS_AT_ONCE = 32  # 65k ids: the arrays of one step are still in the second or third cache
MAX_ID = 0xFFFFFFFF
_MAX_BYTES_PER_ID = 64  # of text: more is a decompression bomb, not a row of ids
_MAX_FIRST_ROW = 64 << 20  # bytes of text, while no row has told the length
_PAD = bytes(8)  # in front of the text, so that the first id has eight bytes before its comma
_COMMA, _SPACE = ord(","), ord(" ")
_GZIP = 31  # zlib's wbits for a gzip header and trailer
# What OpenLM's make_2048.py writes in place of an id, as JSON and as Python print it.
_EOT_TEXTS = (b'"<|endoftext|>"', b"'<|endoftext|>'")

_3, _8, _16, _32 = (np.uint64(n) for n in (3, 8, 16, 32))
_ZEROS = np.uint64(0x3030303030303030)  # "00000000"
_PAIRS, _FOURS = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF)
_10, _100, _10000 = (
    np.uint64(1 + (10 << 8)),
    np.uint64(1 + (100 << 16)),
    np.uint64(1 + (10000 << 32)),
)


class BadRowError(Exception):
    """A row that is not what it should be; the caller knows where it lies."""


def inflate_module() -> Any:
    """isal's zlib where it is installed, twice as fast, else the standard library's."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib
    return isal_zlib


def most_bytes(row_ids: int | None) -> int:
    """The most text that a row of `row_ids` ids (None: unknown yet) may have."""
    return _MAX_FIRST_ROW if row_ids is None else _MAX_BYTES_PER_ID * row_ids + 1024


def inflate(module: Any, content: bytes | memoryview, row_ids: int | None) -> bytes:
    """The text of a gzip member that should hold `row_ids` ids (None: unknown yet).

    Raises BadRowError for data that is cut, damaged (gzip's crc32) or absurdly long.
    """
    limit = most_bytes(row_ids)
    text = b""
    while content:  # a gzip file may be several, one after the other
        stream = module.decompressobj(_GZIP)
        try:
            text += stream.decompress(content, limit + 1 - len(text))
        except module.error as e:
            raise BadRowError(f"damaged gzip data ({e})") from None
        if len(text) > limit:
            raise BadRowError(f"more than {limit} bytes of text")
        if not stream.eof:
            raise BadRowError("the gzip data is cut")
        content = stream.unused_data
    return text


def decode_rows(texts: Sequence[bytes], row_ids: int, eot_id: int | None) -> np.ndarray | None:
    """uint64 [len(texts), row_ids], or None if a row is not in the plain form or has other length.

    `eot_id` (None: none) stands in for the string "<|endoftext|>".
    """
    texts = [_with_eot(text, eot_id).rstrip() for text in texts]
    if not all(text.startswith(b"[") and text.endswith(b"]") for text in texts):
        return None
    comma = b", " if b", " in texts[0][:32] else b","
    found = _plain_ids([text[1:-1] for text in texts], comma)
    if found is None or len(found[0]) != len(texts) * row_ids:
        return None
    ids, commas = found
    ends = np.cumsum([len(text) - 2 + len(comma) for text in texts]) - len(comma)
    if not np.array_equal(commas[row_ids - 1 :: row_ids], ends):
        return None
    return ids.reshape(len(texts), row_ids)


def _with_eot(text: bytes, eot_id: int | None) -> bytes:
    if eot_id is not None:
        for mark in _EOT_TEXTS:
            text = text.replace(mark, b"%d" % eot_id)
    return text


def _plain_ids(rows: list[bytes], comma: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """(ids, offset of the comma after each id in the joined rows), or None: not in plain form."""
    joined = _PAD + comma.join(rows) + b","
    text = np.frombuffer(joined, np.uint8, offset=len(_PAD))
    commas = np.flatnonzero(text == _COMMA)
    lengths = np.empty(len(commas), np.int64)  # with the separator before the id
    lengths[0] = commas[0] + len(comma)
    np.subtract(commas[1:], commas[:-1], out=lengths[1:])
    if lengths.min() <= len(comma) or lengths.max() > 8 + len(comma):
        return None
    # word i: the eight bytes before byte i of the text (unaligned, hence the strides)
    words = np.ndarray(len(text), "<u8", buffer=joined, strides=(1,))
    digits = words[commas]
    shift = lengths.view(np.uint64)
    shift <<= _3
    np.subtract(np.uint64(8 * (8 + len(comma))), shift, out=shift)  # bits of other bytes
    digits ^= _ZEROS
    digits >>= shift
    digits <<= shift
    if digits.view(np.uint8).max() > 9:
        return None
    # all bytes of all ids are digits, so a space can only stand behind a comma: one behind each?
    if len(comma) == 2 and np.count_nonzero(text == _SPACE) != len(commas) - 1:
        return None
    digits *= _10
    digits >>= _8
    digits &= _PAIRS
    digits *= _100
    digits >>= _16
    digits &= _FOURS
    digits *= _10000
    digits >>= _32
    return digits, commas


def decode_row_slowly(text: bytes, eot_id: int | None) -> np.ndarray:
    """The ids of one row in any form that is a list (or tuple) of integers; uint64, any length.

    Raises BadRowError for what is not; OpenLM takes such tokens as 0, or modulo the vocabulary.
    """
    text = _with_eot(text, eot_id).strip()
    if text[:1] == b"(" and text[-1:] == b")":  # as Python prints a tuple
        text = b"[" + text[1:-1].rstrip().rstrip(b",") + b"]"
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise BadRowError(f"not a list of ids ({e})") from None
    if not isinstance(ids, list):
        raise BadRowError(f"not a list of ids but {type(ids).__name__}")
    for place, token in enumerate(ids):
        if token == "<|endoftext|>":
            raise BadRowError(
                f"item {place} is the text {token}, not an id; give the id that it stands for "
                "(eot_id)"
            )
        if type(token) is not int:
            raise BadRowError(f"item {place} is {json.dumps(token)[:40]}, not an integer id")
        if not 0 <= token <= MAX_ID:
            raise BadRowError(f"item {place} is {token}; ids are from 0 to {MAX_ID}")
    return np.array(ids, np.uint64)
