"""Byte-level BPE in two notations: tiktoken's ranks and Hugging Face's tokenizer.json.

tiktoken encodes 7 to 10 times as fast as `tokenizers`; everybody else reads tokenizer.json. Both
directions here are exact or refused:

    ranks -> merges     token t of rank r came from merging the two parts that t's bytes fall into
                        when only ranks below r may merge
    merges -> ranks     allowed where the listed merges are those very merges in that very order

Why the second is exact: tiktoken merges ANY two neighbours whose bytes are a token, tokenizers
only listed pairs. Consider a stretch of text with the bytes t just before rank r: whatever was
merged inside it was merged as if it stood alone (no merge crossed its edges), so it has fallen
into the same two parts as t alone, and these are the listed pair.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from openlm_lite.errors import InputError

# The split patterns whose two dialects are known to cut every text alike (tests compare them).
# tiktoken's regex engine (Rust) knows possessive `{1,3}+`; Oniguruma, in tokenizers, reads it as
# "repeat the group", hence the plain `{1,3}` there: nothing follows it, so both match the same.
_CONTRACTIONS = r"'(?i:[sdmt]|ll|ve|re)"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_O200K_TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?" + _O200K_UPPER + "*" + _O200K_LOWER + "+" + _O200K_TAIL,
        r"[^\r\n\p{L}\p{N}]?" + _O200K_UPPER + "+" + _O200K_LOWER + "*" + _O200K_TAIL,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
KNOWN_PATTERNS = (GPT2_PATTERN, CL100K_PATTERN, O200K_PATTERN)

END_OF_TEXT = "<|endoftext|>"
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


@dataclass(frozen=True)
class ByteBPE:
    """Byte-level BPE as tiktoken states it: the id of a token is its merge priority.

    `pattern` is in tiktoken's dialect; `specials` are never produced by encoding text.
    """

    pattern: str
    ranks: dict[bytes, int]
    specials: dict[str, int]

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, so ids that nothing uses are counted."""
        return 1 + max(*self.ranks.values(), *self.specials.values())

    @property
    def fillers(self) -> dict[str, int]:
        """A name for each id below `vocab_size` that neither ranks nor specials use."""
        used = {*self.ranks.values(), *self.specials.values()}
        return {filler(i): i for i in range(self.vocab_size) if i not in used}

    def describe(self) -> dict[str, Any]:
        """What decides the ids, the same whichever notation it was read from."""
        return {
            "kind": "byte_bpe",
            "pattern": hugging_face_pattern(self.pattern),
            "ranks": sorted((token.hex(), rank) for token, rank in self.ranks.items()),
            "specials": sorted(self.specials.items()),
        }


def filler(i: int) -> str:
    """The special token that stands at an unused id, which tokenizer.json cannot leave empty."""
    return f"<|unused_{i}|>"


def hugging_face_pattern(pattern: str) -> str:
    """tiktoken's dialect of a split pattern in that of `tokenizers` (Oniguruma, Ruby syntax)."""
    return re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern)


# --- ranks files ---------------------------------------------------------------------------------


# sha256 of the ranks written as tiktoken publishes them -> (name, pattern, special tokens).
# Source of the hashes, patterns and special ids: tiktoken_ext/openai_public.py (tiktoken 0.14).
KNOWN_RANKS: dict[str, tuple[str, str, dict[str, int]]] = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": (
        "r50k_base (gpt2)",
        GPT2_PATTERN,
        {END_OF_TEXT: 50256},
    ),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": (
        "p50k_base",
        GPT2_PATTERN,
        {END_OF_TEXT: 50256},
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": (
        "cl100k_base",
        CL100K_PATTERN,
        {
            END_OF_TEXT: 100257,
            **{name: 100258 + i for i, name in enumerate(_FIM)},
            "<|endofprompt|>": 100276,
        },
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": (
        "o200k_base",
        O200K_PATTERN,
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    ),
}


def parse_ranks(content: bytes, place: str) -> ByteBPE:
    """The encoding of a `.tiktoken` file: lines `base64(token) rank`.

    The file does not say how text is split nor which special tokens there are, so only the
    published encodings are known; they are recognised by their ranks, whatever the order of lines.

    Raises InputError for a line that is no rank and for ranks that are not among the known ones.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(
                f"{place}: line {number} is {line[:60]!r}; a .tiktoken file holds lines of "
                "base64(token) and its rank"
            ) from None
    lines = (
        base64.b64encode(token) + b" %d\n" % rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )
    known = KNOWN_RANKS.get(hashlib.sha256(b"".join(lines)).hexdigest())
    if known is None:
        names = ", ".join(name for name, _, _ in KNOWN_RANKS.values())
        raise InputError(
            f"{place}: {len(ranks)} ranks of an unknown encoding; a ranks file does not say how "
            f"text is split, so only these are known: {names}. Give its tokenizer.json instead"
        )
    _, pattern, specials = known
    return ByteBPE(pattern, ranks, dict(specials))


# --- ranks <-> merges ----------------------------------------------------------------------------


def merge_parts(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """The parts that `token` falls into when only tokens of a rank lower than `below` merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        best, where = below, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], below)
            if rank < best:
                best, where = rank, i
        if where < 0:
            return parts
        parts[where : where + 2] = [parts[where] + parts[where + 1]]


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]] | None:
    """The merge that makes each token of two bytes or more, in order of rank; None if one is not
    made by a merge of two (then tokenizer.json cannot say the same)."""
    merges: list[tuple[bytes, bytes]] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = merge_parts(token, ranks, rank)
        if len(parts) != 2:
            return None
        merges.append((parts[0], parts[1]))
    return merges


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_LETTER_OF = _byte_letters()
_BYTE_OF = {letter: byte for byte, letter in _LETTER_OF.items()}


def _to_letters(token: bytes) -> str:
    return "".join([_LETTER_OF[b] for b in token])


def _to_bytes(letters: str) -> bytes:
    """Raises KeyError for a letter that stands for no byte."""
    return bytes([_BYTE_OF[c] for c in letters])


# --- tokenizer.json ------------------------------------------------------------------------------


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": use_regex,
    }


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    if pattern == GPT2_PATTERN:  # built into ByteLevel, which every reader knows
        return _byte_level(use_regex=True)
    split = {
        "type": "Split",
        "pattern": {"Regex": hugging_face_pattern(pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


def to_tokenizer_json(bpe: ByteBPE) -> str:
    """The Hugging Face fast tokenizer that gives the same ids.

    Unused ids are filled with special tokens `<|unused_i|>`: readers count added tokens from the
    end of the vocabulary, so a hole would shift every id behind it.

    Raises InputError if a token is not made by merging two others.
    """
    merges = merges_of(bpe.ranks)
    if merges is None:
        raise InputError("this tokenizer has tokens that no merge makes: no tokenizer.json has it")
    specials = bpe.specials | bpe.fillers
    vocab = {_to_letters(token): rank for token, rank in bpe.ranks.items()}
    if clash := sorted(set(vocab) & set(specials)):
        raise InputError(f"the tokens {clash} are both special and ordinary")
    vocab |= specials
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": content, **flags, "special": True}
            for content, i in sorted(specials.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(bpe.pattern),
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [f"{_to_letters(a)} {_to_letters(b)}" for a, b in merges],
        },
    }
    return json.dumps(document, ensure_ascii=False)


def from_tokenizer_json(document: dict[str, Any]) -> ByteBPE | None:
    """The ranks that encode exactly like a tokenizer.json, or None where there are none.

    None also where equality is likely but not shown: an unknown split pattern, a normalizer,
    added tokens that are found in text, merges in another order than the ids.
    """
    model = document.get("model") or {}
    plain = model.get("type") == "BPE" and not any(
        model.get(key)
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    pattern = next(
        (p for p in KNOWN_PATTERNS if _same_split(document.get("pre_tokenizer"), p)), None
    )
    if not plain or document.get("normalizer") is not None or pattern is None:
        return None
    added = document.get("added_tokens") or []
    specials = {token["content"]: token["id"] for token in added}
    vocab: dict[str, int] = model["vocab"]
    # beyond the vocabulary, readers number added tokens by their order, not by their "id"
    appended = sorted(i for content, i in specials.items() if content not in vocab)
    if (
        not all(token.get("special") for token in added)
        or any(vocab.get(content, i) != i for content, i in specials.items())
        or appended != list(range(len(vocab), len(vocab) + len(appended)))
    ):
        return None
    try:
        ranks = {_to_bytes(t): rank for t, rank in vocab.items() if t not in specials}
        listed = [(_to_bytes(a), _to_bytes(b)) for a, b in _pairs(model["merges"])]
    except (KeyError, ValueError):
        return None
    if any(bytes([b]) not in ranks for b in range(256)) or merges_of(ranks) != listed:
        return None
    real = {content: i for content, i in specials.items() if content != filler(i)}
    return ByteBPE(pattern, ranks, real)


def _pairs(merges: Iterable[str | list[str]]) -> list[tuple[str, str]]:
    """Merges are written "a b" in older files and ["a", "b"] in newer ones."""
    split = (m.split(" ") if isinstance(m, str) else m for m in merges)
    return [(a, b) for a, b in split]


def _same_split(found: Any, pattern: str) -> bool:
    """Whether a pre_tokenizer cuts text like `pattern`; what only moves offsets is left aside."""

    def cutting(node: Any) -> Any:
        if isinstance(node, list):
            return [cutting(child) for child in node]
        if not isinstance(node, dict):
            return node
        node = {"use_regex": True, **node} if node.get("type") == "ByteLevel" else node
        return {key: cutting(child) for key, child in node.items() if key != "trim_offsets"}

    return cutting(found) == cutting(_pre_tokenizer(pattern))
