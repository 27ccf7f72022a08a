"""Which documents `openlm prepare` leaves out, by looking at one document alone.

    empty            no text at all
    few_characters   shorter than --min-characters
    contaminated     shares an n-gram of words with a --decontaminate file
    few_tokens       shorter than --min-tokens, the end of text not counted
    not_sampled      its input has a weight below 1 (plan.py)
    duplicate        its text stands earlier in the inputs (dedup.py)

An n-gram is n words in a row; a word is a run of letters, digits or "_", in lower case, so
punctuation and spacing do not matter. The words of the evaluation sets are numbered; a
document becomes a row of these numbers, 0 for every other word, and its n-grams without a 0 are
hashed (64 bits) and looked up among those of the evaluation sets:

    the cat sat on the moon     ->  [1 2 3 4 1 0]
                                     [1 2 3] [2 3 4] [3 4 1]      n = 3; the window with 0 is out
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from openlm_lite import storage
from openlm_lite.data import order
from openlm_lite.data.read import format_of, known_extensions, read_strings
from openlm_lite.errors import InputError

DROP_REASONS = (
    *("empty", "bad_json", "bad_field", "bad_utf8"),
    *("few_characters", "contaminated", "few_tokens", "not_sampled", "duplicate"),
)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
# Letters to lower case, all else but digits and "_" to spaces; bytes of other scripts stay.
_ASCII = bytes(
    byte if byte > 127 or chr(byte).isalnum() or byte == ord("_") else 32
    for byte in bytes(range(256)).lower()
)
_BATCH_WORDS = 1 << 20
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: a polynomial in it over 64-bit words


@dataclass(frozen=True, eq=False)
class Ngrams:
    """The n-grams of some texts: `numbers` has word -> 1, 2, …; `hashes` is sorted, uint64."""

    n: int
    numbers: dict[bytes, int]
    hashes: np.ndarray

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides which documents are dropped; independent of file names."""
        digest = hashlib.sha256(f"{self.n} ".encode() + b" ".join(self.numbers))
        digest.update(self.hashes.tobytes())
        return digest.hexdigest()

    def found_in(self, texts: Sequence[str]) -> np.ndarray:
        """bool [len(texts)]: which texts share an n-gram."""
        rows = [self._row(text) for text in texts]
        ends = np.cumsum([len(row) + self.n - 1 for row in rows])
        hashes, starts = _window_hashes(rows, self.n)
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        hits = starts[self.hashes[places] == hashes]
        found = np.zeros(len(texts), dtype=bool)
        found[np.searchsorted(ends, hits, side="right")] = True
        return found

    def _row(self, text: str) -> np.ndarray:
        words = words_of(text)
        return np.fromiter(map(self.numbers.get, words, repeat(0)), np.uint32, len(words))


@dataclass(frozen=True)
class Filters:
    """What a worker needs in order to drop documents."""

    min_characters: int = 0
    min_tokens: int = 0
    ngrams: Ngrams | None = None

    def reasons(self, texts: Sequence[str]) -> list[str]:
        """For each text why it is dropped before it is tokenised, or "" if it is kept."""
        found = [
            "empty" if not text else "few_characters" if len(text) < self.min_characters else ""
            for text in texts
        ]
        if self.ngrams is not None:
            left = [i for i, reason in enumerate(found) if not reason]
            if left:
                hits = self.ngrams.found_in([texts[i] for i in left])
                for i in np.array(left)[hits].tolist():
                    found[i] = "contaminated"
        return found


def words_of(text: str) -> list[bytes]:
    """The words that n-grams are made of, as UTF-8 (5 times as fast as a regular expression)."""
    if not text.isascii():
        text = _NOT_ASCII.sub(_word_letters, text)
    return text.encode("utf-8", "surrogatepass").translate(_ASCII).split()


def _word_letters(match: re.Match[str]) -> str:
    return _letters_of(match[0])


@functools.lru_cache(1 << 16)
def _letters_of(run: str) -> str:
    return "".join(c if c.isalnum() else " " for c in run.lower())


def ngrams_of(texts: Iterable[str], n: int) -> Ngrams:
    """The n-grams of `texts`; none reaches from one text into the next."""
    numbers: dict[bytes, int] = {}
    hashes = [np.empty(0, dtype=np.uint64)]
    rows: list[np.ndarray] = []
    n_words = 0
    for text in texts:
        row = [numbers.setdefault(word, len(numbers) + 1) for word in words_of(text)]
        rows.append(np.array(row, dtype=np.uint32))
        n_words += len(row)
        if n_words >= _BATCH_WORDS:
            hashes.append(_window_hashes(rows, n)[0])
            rows, n_words = [], 0
    if rows:
        hashes.append(_window_hashes(rows, n)[0])
    found = np.sort(np.concatenate(hashes))  # numpy's own unique is 10 times as slow here
    return Ngrams(n, numbers, found[np.append(True, found[1:] != found[:-1])[: len(found)]])


def read_ngrams(paths: Sequence[str], n: int) -> Ngrams | None:
    """The n-grams of all text in files, folders or globs; None where no path is given.

    Raises InputError for a path that is absent or not readable, and where no text has n words.
    """
    if not paths:
        return None
    found = [file for path in paths for file in storage.list_files(path)]

    def texts() -> Iterable[str]:
        for path in found:
            format = format_of(path)
            if format is None:
                raise InputError(
                    f"--decontaminate {path}: unknown extension; known are {known_extensions()}"
                )
            yield from read_strings(path, format)

    ngrams = ngrams_of(texts(), n)
    if not len(ngrams.hashes):
        raise InputError(
            f"--decontaminate {', '.join(paths)}: no text in there has {n} words, so nothing could "
            "ever match; give other files or a smaller --decontaminate-ngram"
        )
    return ngrams


def _window_hashes(rows: Sequence[np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all windows of n numbers that hold no 0, and where these windows start.

    The rows are put one after the other with n - 1 zeros after each: no window reaches over.
    """
    gap = np.zeros(n - 1, dtype=np.uint32)
    numbers = np.concatenate([part for row in rows for part in (row, gap)])
    zeros = np.concatenate([[0], np.cumsum(numbers == 0)])
    starts = np.flatnonzero(zeros[n:] == zeros[:-n])
    mixed = order.mix64(numbers.astype(np.uint64) * _FACTOR)
    hashes = np.zeros(len(starts), dtype=np.uint64)
    for offset in range(n):
        hashes = hashes * _FACTOR + mixed[starts + offset]
    return hashes, starts
