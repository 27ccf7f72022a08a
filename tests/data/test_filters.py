"""N-grams are found wherever they stand, and nowhere else; lengths decide the rest."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_lite.data.filters import Filters, Ngrams, ngrams_of, read_ngrams, words_of
from openlm_lite.errors import InputError

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "Ä", "unknown"]), max_size=14)


@settings(deadline=None)
@given(exams=st.lists(WORDS, max_size=4), texts=st.lists(WORDS, max_size=6), n=st.integers(1, 5))
def test_a_text_is_found_exactly_if_it_shares_n_words_in_a_row(
    exams: list[list[str]], texts: list[list[str]], n: int
) -> None:
    ngrams = ngrams_of((" ".join(words) for words in exams), n)
    known = {tuple(w[i : i + n]) for w in exams for i in range(len(w) - n + 1)}
    if not known or not texts:
        return
    found = ngrams.found_in([" ".join(words) for words in texts])
    wanted = [any(tuple(w[i : i + n]) in known for i in range(len(w) - n + 1)) for w in texts]
    assert found.tolist() == wanted


def test_punctuation_case_and_spacing_do_not_matter() -> None:
    ngrams = ngrams_of(["The  capital of FRANCE is: Paris."], 6)
    texts = ["so (the capital\nof france -- is) PARIS!", "the capital of france is"]
    assert ngrams.found_in(texts).tolist() == [True, False]
    words = [word.decode() for word in words_of("Don't x_1, “Ünï”…ẞ—中文。")]
    assert words == ["don", "t", "x_1", "ünï", "ß", "中文"]


def test_no_ngram_reaches_from_one_text_into_the_next() -> None:
    ngrams = ngrams_of(["a b c"], 3)
    assert ngrams.found_in(["a b", "c", "x a b c"]).tolist() == [False, False, True]
    assert len(ngrams_of(["a b", "c d"], 3).hashes) == 0


def test_every_text_of_an_exam_counts_whatever_its_field_is_called(tmp_path: Path) -> None:
    record = {
        "question": "who was the first",
        "choices": ["king of spain", {"x": "or who"}],
        "n": 1,
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n\n")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(["deep in the sea"]).encode()))
    (tmp_path / "c.txt").write_text("over hill over dale")
    pyarrow.parquet.write_table(
        pyarrow.table({"q": ["through bush through brier"], "n": [1]}), tmp_path / "d.parquet"
    )
    ngrams = read_ngrams([str(tmp_path)], 4)
    assert isinstance(ngrams, Ngrams)
    texts = [
        *("who was the first", "first king of spain", "deep in the sea", "over hill over dale"),
        *("through bush through brier", "of spain or sea"),
    ]
    assert ngrams.found_in(texts).tolist() == [True] * 5 + [False]
    assert read_ngrams([], 4) is None


def test_an_exam_that_cannot_be_used_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"q": "short"}\n')
    with pytest.raises(InputError, match=r"no text in there has 13 words"):
        read_ngrams([str(tmp_path / "x.jsonl")], 13)
    (tmp_path / "x.jsonl").write_text('{"q": "a b c d"}\n{\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2: not a JSON value"):
        read_ngrams([str(tmp_path / "x.jsonl")], 3)
    (tmp_path / "x.bin").write_text("")
    with pytest.raises(InputError, match=r"--decontaminate .*x\.bin: unknown extension"):
        read_ngrams([str(tmp_path / "x.bin")], 3)


def test_the_fingerprint_is_of_the_ngrams(tmp_path: Path) -> None:
    one, same, other = (ngrams_of([t], 3) for t in ("a b c d", "A, b; C. d", "a b c e"))
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint != ngrams_of(["a b c d"], 2).fingerprint


def test_each_text_gets_the_first_reason_that_fits() -> None:
    filters = Filters(min_characters=4, ngrams=ngrams_of(["a b c"], 3))
    texts = ["", "a b", "a b c", "a b d", "abc"]
    assert filters.reasons(texts) == [
        "empty",
        "few_characters",
        "contaminated",
        "",
        "few_characters",
    ]
    assert Filters().reasons(["", "x"]) == ["empty", ""]


def test_hashes_of_long_texts_do_not_collide() -> None:
    rng = np.random.default_rng(0)
    text = " ".join(map(str, rng.integers(0, 50, 50_000)))
    words = text.split()
    distinct = {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
    assert len(ngrams_of([text], 5).hashes) == len(distinct)
