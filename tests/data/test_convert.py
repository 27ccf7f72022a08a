"""Converted shards hold the very rows of OpenLM's, in their order, however often it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openlm_lite import cli
from openlm_lite.data import convert
from openlm_lite.data.convert import convert_shards
from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.verify import verify_dataset
from openlm_lite.errors import InputError
from tests.data.test_openlm_shards import make_shards, rows_of


def blocks_of(folder: Path) -> list[np.ndarray]:
    dataset = open_dataset(str(folder))
    return [np.array(dataset.blocks(n)) for n in range(len(dataset.manifest.shards))]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
def test_one_row_is_one_block_shard_for_shard(tmp_path: Path, workers: int) -> None:
    shards = [rows_of(5, 1), rows_of(7, 2)]
    source = make_shards(tmp_path / "source", shards)
    report = convert_shards(str(source), str(tmp_path / "out"), workers=workers)
    assert (report.n_shards, report.n_blocks, report.n_tokens) == (2, 12, 12 * 32)
    assert report.dtype == "uint16"
    assert report.vocab_size == 1 + max(rows.max() for rows in shards)
    for found, rows in zip(blocks_of(tmp_path / "out"), shards, strict=True):
        assert np.array_equal(found, rows)
    assert open_dataset(str(tmp_path / "out")).info.tokenizer.fingerprint is None
    verify_dataset(str(tmp_path / "out"))
    assert not (tmp_path / "out" / ".prepare").exists()


def test_smaller_blocks_cut_the_rows_and_larger_ones_are_refused(tmp_path: Path) -> None:
    rows = rows_of(3)
    source = make_shards(tmp_path / "source", [rows])
    convert_shards(str(source), str(tmp_path / "out"), block_tokens=8, workers=1)
    expected = [row[start : start + 9] for row in rows for start in range(0, 32, 8)]
    assert np.array_equal(blocks_of(tmp_path / "out")[0], np.stack(expected))
    for wrong in (0, 12, 64):
        with pytest.raises(InputError, match=r"does not divide the 32 tokens"):
            convert_shards(str(source), str(tmp_path / "other"), block_tokens=wrong, workers=1)
    assert not (tmp_path / "other").exists()


def test_an_id_that_does_not_fit_makes_all_shards_wide(tmp_path: Path) -> None:
    shards = [rows_of(3, 1), rows_of(3, 2, below=90_000) + 1]
    source = make_shards(tmp_path / "source", shards)
    report = convert_shards(str(source), str(tmp_path / "out"), workers=1)
    assert report.dtype == "uint32"
    found = blocks_of(tmp_path / "out")
    assert [blocks.dtype for blocks in found] == [np.uint32] * 2
    assert np.array_equal(np.concatenate(found), np.concatenate(shards))
    with pytest.raises(InputError, match="outside the vocabulary of 50000"):
        convert_shards(str(source), str(tmp_path / "other"), vocab_size=50_000, workers=1)
    assert not (tmp_path / "other" / "dataset.json").exists()


def tokenizer_of(n_ids: int, folder: Path) -> str:
    """A file with so many words, the last one ends a text."""
    tokenizers: Any = pytest.importorskip("tokenizers")
    vocab = {f"t{i}": i for i in range(n_ids - 1)} | {"<|endoftext|>": n_ids - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="t0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def test_the_tokenizer_is_recorded_and_its_vocabulary_decides(tmp_path: Path) -> None:
    source = make_shards(tmp_path / "source", [rows_of(3, below=300)])
    how: dict[str, Any] = {"tokenizer": tokenizer_of(300, tmp_path), "workers": 1}
    report = convert_shards(str(source), str(tmp_path / "out"), **how)
    assert (report.vocab_size, report.dtype) == (300, "uint16")
    info = open_dataset(str(tmp_path / "out")).info
    assert info.tokenizer.eot_id == 299 and info.tokenizer.fingerprint
    assert (tmp_path / "out" / "tokenizer.json").exists()
    source = make_shards(tmp_path / "more", [rows_of(3, below=400)])
    with pytest.raises(InputError, match="outside the vocabulary of 300"):
        convert_shards(str(source), str(tmp_path / "other"), **how)


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    source = make_shards(tmp_path / "source", [rows_of(3, seed) for seed in range(3)])
    convert_shards(str(source), str(tmp_path / "whole"), workers=1)
    written: list[str] = []
    write = convert.write_shard

    def stopping(path: str, *rest: Any) -> tuple[int, int, int]:
        if len(written) == stop_after:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, *rest)

    monkeypatch.setattr(convert, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert_shards(str(source), str(tmp_path / "out"), workers=1)
    with pytest.raises(InputError, match="is not finished; run the same"):
        open_dataset(str(tmp_path / "out"))
    stop_after = -1
    report = convert_shards(str(source), str(tmp_path / "out"), workers=1)
    assert len(written) == len(set(written)) == 3
    assert not report.already_done
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert convert_shards(str(source), str(tmp_path / "out"), workers=1).already_done


def test_a_bad_shard_stops_it_and_what_was_done_stays(tmp_path: Path) -> None:
    source = make_shards(tmp_path / "source", [rows_of(3, seed) for seed in range(3)])
    path = source / "shard_00000002.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(InputError, match=r"shard_00000002\.tar: damaged"):
        convert_shards(str(source), str(tmp_path / "out"), workers=1)
    assert not (tmp_path / "out" / "dataset.json").exists()
    path.write_bytes(whole)
    assert convert_shards(str(source), str(tmp_path / "out"), workers=1).n_shards == 3


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_after_an_error_before_the_first_shard_other_settings_may_be_tried(
    tmp_path: Path, with_tokenizer: bool
) -> None:
    source = make_shards(tmp_path / "source", [rows_of(3)])
    out = tmp_path / "out"
    wrong: dict[str, Any] = {"vocab_size": 5}
    if with_tokenizer:
        wrong = {"tokenizer": tokenizer_of(5, tmp_path)}
    with pytest.raises(InputError, match="outside the vocabulary of 5 ids"):
        convert_shards(str(source), str(out), **wrong, workers=1)
    assert not out.exists()
    assert convert_shards(str(source), str(out), workers=1).n_blocks == 3


def test_a_wrong_vocabulary_that_shows_at_a_late_shard_can_be_corrected(tmp_path: Path) -> None:
    shards = [rows_of(3, 1, below=300), rows_of(3, 2, below=400)]
    source = make_shards(tmp_path / "source", shards)
    out = tmp_path / "out"
    (tmp_path / "right").mkdir()
    wrong, right = tokenizer_of(300, tmp_path), tokenizer_of(400, tmp_path / "right")
    with pytest.raises(InputError, match="outside the vocabulary of 300 ids"):
        convert_shards(str(source), str(out), tokenizer=wrong, workers=1)
    done = (out / "shard-000000.tar").stat()
    report = convert_shards(str(source), str(out), tokenizer=right, workers=1)
    assert (report.vocab_size, report.n_blocks) == (400, 6)
    assert (out / "shard-000000.tar").stat() == done  # gone on from
    assert np.array_equal(np.concatenate(blocks_of(out)), np.concatenate(shards))
    assert json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]["t398"] == 398


def test_shards_that_are_done_are_held_to_the_vocabulary_of_the_command_that_goes_on(
    tmp_path: Path,
) -> None:
    source = make_shards(tmp_path / "source", [rows_of(3, 1, below=400), rows_of(3, 2, below=500)])
    out = tmp_path / "out"
    for vocab_size, shard in ((400, 1), (300, 0)):
        at = rf"shard_0000000{shard}\.tar.* outside the vocabulary of {vocab_size} ids"
        with pytest.raises(InputError, match=at):
            convert_shards(str(source), str(out), vocab_size=vocab_size, workers=1)
    assert convert_shards(str(source), str(out), vocab_size=500, workers=1).vocab_size == 500


def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path: Path) -> None:
    source = make_shards(tmp_path / "source", [rows_of(3)])
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty \(it holds thesis\.txt\)"):
        convert_shards(str(source), str(out), workers=1)
    assert files_of(out) == {"thesis.txt": b"mine"}
    (out / "thesis.txt").unlink()
    convert_shards(str(source), str(out), workers=1)
    before = files_of(out)
    with pytest.raises(InputError, match="other inputs or with other settings"):
        convert_shards(str(source), str(out), block_tokens=16, workers=1)
    assert files_of(out) == before
    assert json.loads(before["dataset.json"])["config"]["format"] == "openlm"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.jsonl", "--vocab-size", "300", "--pad-id", "0"], "--vocab-size, --pad-id: goes with"),
        (["--from-shards", "there", "x.jsonl"], "--from-shards: takes the place of inputs"),
        (["--from-shards", "there", "--train-tokenizer", "300"], "and of --train-tokenizer"),
        (["--from-shards", "there"], "there"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *words, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
