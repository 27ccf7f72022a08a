"""Filters, duplicates, weights, bad documents: what is left out is counted, and always the same."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.plan import PrepareConfig
from openlm_lite.data.prepare import prepare
from openlm_lite.data.tokenizer import load_tokenizer
from openlm_lite.errors import InputError
from tests.data.prepare_corpus import (
    FINE,
    documents_of,
    files_of,
    make_texts,
    train_small_tokenizer,
    write_lines,
)

TEXTS = make_texts(200)
Config = Callable[..., PrepareConfig]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def config(tmp_path: Path, tokenizer_folder: str) -> Config:
    write_lines(tmp_path / "in" / "a.jsonl", TEXTS)

    def make(**changes: object) -> PrepareConfig:
        base = PrepareConfig(
            inputs=(str(tmp_path / "in"),),
            out=str(tmp_path / "out"),
            tokenizer=tokenizer_folder,
            workers=1,
        )
        return dataclasses.replace(base, **{**FINE, **changes})  # pyright: ignore

    return make


@pytest.fixture
def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, parts and cells even for a small corpus (in this process only)."""
    monkeypatch.setattr("openlm_lite.data.plan._MIN_PIECE_BYTES", 3000)
    monkeypatch.setattr("openlm_lite.data.parts.PART_TOKENS", 800)
    monkeypatch.setattr("openlm_lite.data.parts.CONTENT_ROWS", 7)
    monkeypatch.setattr("openlm_lite.data.gather._CELL_TOKENS", 1500)
    monkeypatch.setattr("openlm_lite.data.dedup._CELL_DOCUMENTS", 50)
    monkeypatch.setattr("openlm_lite.data.spill._BATCH_DOCUMENTS", 9)


# --- filters -------------------------------------------------------------------------------------


def test_every_document_is_kept_or_counted_under_one_reason(
    config: Config, tmp_path: Path, tokenizer_folder: str, small_cells: None
) -> None:
    exam = "blue and red and blue and red and slow"
    texts = [*TEXTS, "", "", "tiny", f"so: {exam.upper()}, it was", *TEXTS[:30], "tiny", exam]
    write_lines(tmp_path / "in" / "a.jsonl", texts)
    write_lines(tmp_path / "exam.jsonl", [f"(a) {exam}!"])
    report = prepare(
        config(
            min_characters=6,
            min_tokens=12,
            dedup=True,
            decontaminate=(str(tmp_path / "exam.jsonl"),),
            decontaminate_ngram=8,
        )
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    lengths = {t: len(tokenizer.encode(t)) for t in TEXTS}
    few = [t for t in TEXTS if len(t) >= 6 and lengths[t] < 12]
    assert few
    assert report.dropped == {
        "empty": 2,
        "few_characters": sum(len(t) < 6 for t in TEXTS) + 2,
        "contaminated": 2,
        "few_tokens": len(few) + sum(t in few for t in TEXTS[:30]),
        "duplicate": sum(t not in few for t in TEXTS[:30]),
    }
    kept = [t for t in TEXTS if len(t) >= 6 and lengths[t] >= 12]
    assert sorted(documents_of(config().out, tokenizer_folder)) == sorted(kept)
    assert report.n_documents == len(texts) == report.n_kept + sum(report.dropped.values())
    assert report.n_kept == len(kept) == report.splits["train"].n_documents
    bins = collections.Counter((lengths[t] + 1).bit_length() - 1 for t in kept)
    assert report.document_tokens["train"] == {
        f"{1 << b}-{(2 << b) - 1}": n for b, n in sorted(bins.items())
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"] == report.dropped
    assert dataclasses.replace(report, already_done=True) == prepare(
        config(
            min_characters=6,
            min_tokens=12,
            dedup=True,
            decontaminate=(str(tmp_path / "exam.jsonl"),),
            decontaminate_ngram=8,
        )
    )


def test_filters_that_leave_nothing_say_what_they_dropped(config: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no documents .* few_characters: 200"):
        prepare(config(min_characters=100_000))
    assert not (tmp_path / "out").exists()


def test_what_the_exam_holds_belongs_to_the_fingerprint_and_its_path_does_not(
    config: Config, tmp_path: Path
) -> None:
    for name in ("x.jsonl", "y.jsonl"):
        write_lines(tmp_path / name, ["under the table it was red"])
    first = config(decontaminate=(str(tmp_path / "x.jsonl"),), decontaminate_ngram=4)
    prepare(first)
    moved = dataclasses.replace(first, decontaminate=(str(tmp_path / "y.jsonl"),))
    assert prepare(moved).already_done
    write_lines(tmp_path / "y.jsonl", ["under the table it was blue"])
    with pytest.raises(InputError, match="other settings"):
        prepare(moved)


# --- duplicates ----------------------------------------------------------------------------------


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    picks=st.lists(st.lists(st.integers(0, 15), max_size=25), min_size=1, max_size=4),
    piece=st.integers(20, 400),
    cell=st.integers(1, 30),
    part=st.integers(20, 400),
    gzipped=st.booleans(),
)
def test_of_equal_texts_the_first_is_kept_however_the_work_is_cut(
    picks: list[list[int]],
    piece: int,
    cell: int,
    part: int,
    gzipped: bool,
    config: Config,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_folder: str,
) -> None:
    folder = tmp_path_factory.mktemp("x")
    for number, chosen in enumerate(picks):
        write_lines(folder / "in" / f"{number}.jsonl", [TEXTS[i] for i in chosen])
    # a text in a file of its own comes first of all
    (folder / "in" / "(first).txt").write_text(TEXTS[3])
    cfg = config(inputs=(str(folder / "in"),), out=str(folder / "out"), dedup=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openlm_lite.data.plan._MIN_PIECE_BYTES", piece)
        patch.setattr("openlm_lite.data.parts.PART_TOKENS", part)
        patch.setattr("openlm_lite.data.parts.CONTENT_ROWS", cell)
        patch.setattr("openlm_lite.data.dedup._CELL_DOCUMENTS", cell)
        report = prepare(cfg)
    every = [TEXTS[3]] + [TEXTS[i] for chosen in picks for i in chosen]
    assert sorted(documents_of(cfg.out, tokenizer_folder)) == sorted(set(every))
    assert report.dropped.get("duplicate", 0) == len(every) - len(set(every))
    # the first one of each is the one that stays: the same order as of a corpus of these alone
    whole = prepare(dataclasses.replace(cfg, out=str(folder / "whole")))
    assert whole == dataclasses.replace(
        report, splits={"train": dataclasses.replace(whole.splits["train"])}
    )
    assert files_of(cfg.out) == files_of(folder / "whole")


def test_a_deduplicated_run_killed_at_any_write_ends_in_the_same_bytes(
    config: Config, tmp_path: Path, small_cells: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies at one os.replace after the other: at the first, and a few further every time."""
    write_lines(tmp_path / "in" / "b.jsonl", TEXTS[:40])
    ask = {"dedup": True, "val_fraction": 0.2, "block_tokens": 256, "blocks_per_shard": 8}
    weight = (f"{tmp_path / 'in'}=1.5",)
    prepare(config(out=str(tmp_path / "calm"), weight=weight, **ask))
    real, left = os.replace, [0]

    class Killed(BaseException):
        pass

    def replace_or_die(source: str, target: str) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    rounds, step = 0, 9
    while True:
        left[0] = step + rounds
        try:
            prepare(config(weight=weight, **ask))
            break
        except Killed:
            rounds += 1
    assert rounds > 5
    assert files_of(config().out) == files_of(tmp_path / "calm")


def test_equal_documents_are_on_one_side_of_the_split(
    config: Config, tmp_path: Path, tokenizer_folder: str
) -> None:
    write_lines(tmp_path / "in" / "b.jsonl", [*TEXTS[:100], *TEXTS[:100]])
    report = prepare(config(val_fraction=0.3))
    train, val = (
        documents_of(report.splits[split].path, tokenizer_folder) for split in ("train", "val")
    )
    assert not set(train) & set(val)
    assert len(train) + len(val) == 400
    assert 30 <= len(set(val)) <= 90


# --- weights -------------------------------------------------------------------------------------


def test_a_weight_repeats_and_samples_documents_apart_from_each_other(
    config: Config, tmp_path: Path, tokenizer_folder: str, small_cells: None
) -> None:
    a = str(write_lines(tmp_path / "a.jsonl", TEXTS[:100]))
    b = str(write_lines(tmp_path / "b.jsonl", TEXTS[100:]))
    report = prepare(config(inputs=(a, b), weight=(f"{a}=2.5", f"{b}=0.3")))
    found = documents_of(config().out, tokenizer_folder)
    counts = collections.Counter(found)
    assert set(TEXTS[:100]) <= set(counts)
    assert {counts[t] for t in TEXTS[:100]} == {2, 3}
    assert {counts[t] for t in TEXTS[100:]} == {0, 1}
    assert 35 <= sum(counts[t] == 3 for t in TEXTS[:100]) <= 65
    sampled = sum(counts[t] for t in TEXTS[100:])
    assert 15 <= sampled <= 45
    assert report.dropped == {"not_sampled": 100 - sampled}
    assert report.n_kept == 100 + sampled
    assert report.splits["train"].n_documents == len(found)
    sources = open_dataset(config().out).info.sources
    assert [s["weight"] for s in sources] == [2.5, 0.3]
    assert sum(s["n_documents"] for s in sources) == len(found)
    # copies lie all over the stream: their distance is that of two random places, 1/3 on average
    places = collections.defaultdict(list)
    for place, text in enumerate(found):
        places[text].append(place)
    gaps = [abs(p[0] - p[1]) / len(found) for p in places.values() if len(p) > 1]
    assert 0.25 < np.mean(gaps) < 0.42


def test_weights_change_neither_which_duplicate_stays_nor_with_the_number_of_cuts(
    config: Config, tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = str(write_lines(tmp_path / "a.jsonl", TEXTS[:100]))
    b = str(write_lines(tmp_path / "b.jsonl", TEXTS[:150]))
    ask = config(inputs=(a, b), weight=(f"{a}=0.5",), dedup=True)
    report = prepare(ask)
    counts = collections.Counter(documents_of(ask.out, tokenizer_folder))
    # those of a that were not sampled do not come back through b
    assert 30 <= sum(counts[t] for t in TEXTS[:100]) <= 70
    assert all(counts[t] == 1 for t in TEXTS[100:150])
    assert report.dropped["duplicate"] == 100
    monkeypatch.setattr("openlm_lite.data.plan._MIN_PIECE_BYTES", 1000)
    monkeypatch.setattr("openlm_lite.data.parts.PART_TOKENS", 500)
    again = dataclasses.replace(ask, out=str(tmp_path / "cut"))
    prepare(again)
    assert files_of(again.out) == files_of(ask.out)


def test_an_input_of_weight_0_is_not_read(
    config: Config, tmp_path: Path, tokenizer_folder: str
) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [])
    bad.write_text("{broken\n")
    inputs = (str(bad), str(tmp_path / "in"))
    report = prepare(config(inputs=inputs, weight=(f"{bad}=0",)))
    assert report.n_kept == 200


@pytest.mark.parametrize(
    ("given_weights", "message"),
    [
        (("{0}=-1",), "'-1' is no weight; allowed are numbers from 0 to 1000"),
        (("{0}=nan",), "'nan' is no weight"),
        (("{0}=inf",), "'inf' is no weight"),
        (("{0}=",), "'' is no weight"),
        (("{0}=1e9",), "'1e9' is no weight"),
        (("{0}=0",), "every input has the weight 0"),
        (("{0}",), "expected INPUT=W"),
        (("nowhere=1",), "'nowhere' is not an input as it was named; the inputs are"),
        (("{0}=1", "{0}=2"), "has a weight already"),
    ],
)
def test_a_bad_weight_is_one_error(
    config: Config, tmp_path: Path, given_weights: tuple[str, ...], message: str
) -> None:
    path = str(tmp_path / "in")
    with pytest.raises(InputError, match=message):
        prepare(config(weight=tuple(w.format(path) for w in given_weights)))
    assert not (tmp_path / "out").exists()


# --- bad documents -------------------------------------------------------------------------------

BAD_LINES = [b'{"text"', b'{"body": "x"}', b'{"text": 7}', b'["x"]', b'{"text": "\xff"}']


def test_bad_documents_are_passed_over_counted_and_named(
    config: Config, tmp_path: Path, tokenizer_folder: str, small_cells: None
) -> None:
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    for number, line in enumerate(BAD_LINES):
        lines.insert(30 * number + 5, line)
    (tmp_path / "in" / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "in" / "b.txt").write_bytes(b"\xe4")
    with pytest.raises(InputError, match=r"a\.jsonl:6: not a JSON value"):
        prepare(config())
    report = prepare(config(on_bad_document="skip"))
    assert report.dropped == {"bad_json": 2, "bad_field": 2, "bad_utf8": 2}
    assert sorted(documents_of(config().out, tokenizer_folder)) == sorted(TEXTS)
    places = [bad["place"] for bad in report.bad_documents]
    jsonl = str(tmp_path / "in" / "a.jsonl")
    assert places[:-1] == [f"{jsonl}:{30 * n + 6}" for n in range(5)]
    assert places[-1] == str(tmp_path / "in" / "b.txt")
    assert "no field 'text'" in report.bad_documents[1]["message"]


def test_a_damaged_archive_stops_even_where_bad_documents_are_passed_over(
    config: Config, tmp_path: Path
) -> None:
    import gzip

    content = gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode())
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(content[:-30])
    with pytest.raises(InputError, match=r"b\.jsonl\.gz: damaged gzip"):
        prepare(config(on_bad_document="skip"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"executor": "spark"}, "--executor: 'spark' is not known; allowed: local, ray"),
        ({"on_bad_document": "x"}, "--on-bad-document: 'x' is not known; allowed: stop, skip"),
        ({"min_characters": -1}, "--min-characters: -1"),
        ({"min_tokens": -1}, "--min-tokens: -1"),
        ({"decontaminate_ngram": 0}, "--decontaminate-ngram: 0"),
        ({"decontaminate": ("/nowhere",)}, "/nowhere: no such file"),
        ({"ray_address": "x:1"}, "--ray-address: only --executor ray"),
        ({"scratch": "s3://x/y"}, "s3://x/y: this has to lie on a local disk"),
    ],
)
def test_bad_settings_are_one_error(
    config: Config, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(config(**change))
    assert not (tmp_path / "out").exists()


def test_the_scratch_folder_can_be_elsewhere(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "fast"
    seen = []
    real = os.replace

    def note(source: str, target: str) -> None:
        seen.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", note)
    prepare(config(scratch=str(scratch)))
    assert [p for p in seen if "piece-" in p]
    assert all(p.startswith(str(scratch)) for p in seen if "piece-" in p)
    assert list(scratch.iterdir()) == []
    assert prepare(config()).already_done
