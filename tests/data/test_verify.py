"""Verifying finds every bad shard, in any number of processes, and goes on where it was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from openlm_lite.data import verify
from openlm_lite.data.inspect import inspect_dataset
from openlm_lite.data.verify import verify_dataset
from openlm_lite.errors import InputError
from tests.data.test_openlm_shards import make_shards, rows_of

PAYLOAD = 3 * 512 + 60  # of the first member, behind its pax header if it has one
MakeDataset = Callable[..., Path]


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def damage_three(folder: Path, name: str) -> None:
    """Of shards 0, 1, 2, 3: 1 has a flipped bit, 2 is cut, 3 is missing."""
    flip_bit(folder / name.format(1), PAYLOAD)
    path = folder / name.format(2)
    path.write_bytes(path.read_bytes()[:PAYLOAD])
    (folder / name.format(3)).unlink()


@pytest.mark.parametrize("workers", [1, 2])
def test_all_bad_shards_are_listed_in_one_error(make_dataset: MakeDataset, workers: int) -> None:
    folder = make_dataset(blocks_per_shard=(2, 2, 2, 2))
    report = verify_dataset(str(folder), workers)
    assert (report.n_shards, report.n_from_journal, report.n_tokens) == (4, 0, 8 * 64)
    damage_three(folder, "shard-{:06d}.tar")
    with pytest.raises(InputError, match=r"3 of 4 shards are bad") as caught:
        verify_dataset(str(folder), workers)
    lines = str(caught.value).splitlines()[1:]
    for line, what in zip(lines, ("damaged", "bytes, the manifest", "missing"), strict=True):
        assert what in line
    assert "shard-000000" not in str(caught.value)


def test_openlm_shards_are_verified_too(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "data", [rows_of(4, seed) for seed in range(4)])
    assert inspect_dataset(str(folder), verify=True)["verified"] is True
    damage_three(folder, "shard_{:08d}.tar")
    with pytest.raises(InputError, match=r"3 of 4 shards are bad") as caught:
        verify_dataset(str(folder))
    assert str(caught.value).count("shard_0000000") == 3


def test_a_missing_first_openlm_shard_is_listed_with_the_others(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "data", [rows_of(4, seed) for seed in range(3)])
    (folder / "shard_00000000.tar").unlink()
    flip_bit(folder / "shard_00000002.tar", 10)
    with pytest.raises(InputError, match=r"2 of 3 shards are bad"):
        verify_dataset(str(folder))


@pytest.fixture
def read_shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that get read from now on."""
    read: list[int] = []
    verify_one = verify._verify_shard

    def noted(shard: int, *rest: object) -> object:
        read.append(shard)
        return verify_one(shard, *rest)  # pyright: ignore

    monkeypatch.setattr(verify, "_verify_shard", noted)
    return read


@pytest.mark.parametrize("kind", ["native", "openlm"])
def test_a_journal_spares_what_was_good_and_has_not_changed(
    make_dataset: MakeDataset, tmp_path: Path, read_shards: list[int], kind: str
) -> None:
    if kind == "native":
        folder, name = make_dataset(blocks_per_shard=(2, 2, 2, 2)), "shard-{:06d}.tar"
    else:
        folder, name = (
            make_shards(tmp_path / "o", [rows_of(2, s) for s in range(4)]),
            "shard_{:08d}.tar",
        )
    journal = str(tmp_path / "journal.jsonl")
    flip_bit(folder / name.format(2), PAYLOAD)
    with pytest.raises(InputError, match="1 of 4"):
        verify_dataset(str(folder), journal=journal)
    assert read_shards == [0, 1, 2, 3]
    os.utime(folder / name.format(1))
    flip_bit(folder / name.format(2), PAYLOAD)
    read_shards.clear()
    report = verify_dataset(str(folder), journal=journal)
    assert read_shards == [1, 2]
    assert report.n_from_journal == 2
    read_shards.clear()
    assert verify_dataset(str(folder), journal=journal).n_from_journal == 4
    assert read_shards == []


def test_a_journal_that_a_kill_cut_anywhere_is_continued(
    make_dataset: MakeDataset, tmp_path: Path, read_shards: list[int]
) -> None:
    folder, journal = make_dataset(), tmp_path / "journal.jsonl"
    verify_dataset(str(folder), journal=str(journal))
    whole = journal.read_bytes()
    head = whole.index(b"\n") + 1
    for cut in [0, *range(head, len(whole), 7)]:
        journal.write_bytes(whole[:cut])
        read_shards.clear()
        report = verify_dataset(str(folder), journal=str(journal))
        assert report.n_from_journal == max(0, whole[:cut].count(b"\n") - 1)
        assert len(read_shards) == 3 - report.n_from_journal
        assert len(journal.read_bytes().splitlines()) == 4


@pytest.mark.parametrize(
    "content", ["", "[1, 2]\n", "my thesis", '{"journal": "other"}\n', "{}\n{}\n"]
)
def test_a_journal_that_is_none_or_of_other_data_is_refused_and_kept(
    make_dataset: MakeDataset, tmp_path: Path, content: str
) -> None:
    journal = tmp_path / "journal.jsonl"
    if not content:
        verify_dataset(str(make_dataset("other", blocks_per_shard=(1,))), journal=str(journal))
    else:
        journal.write_text(content)
    before = journal.read_bytes()
    with pytest.raises(InputError, match=r"journal\.jsonl:1: .*name another file"):
        verify_dataset(str(make_dataset()), journal=str(journal))
    assert journal.read_bytes() == before


def test_the_dataset_folder_may_be_read_only(make_dataset: MakeDataset) -> None:
    folder = make_dataset()
    before = sorted(p.name for p in folder.iterdir())
    folder.chmod(0o500)
    try:
        verify_dataset(str(folder))
    finally:
        folder.chmod(0o700)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_the_journal_lines_say_what_was_seen(make_dataset: MakeDataset, tmp_path: Path) -> None:
    folder, journal = make_dataset(), tmp_path / "journal.jsonl"
    verify_dataset(str(folder), journal=str(journal))
    lines = [json.loads(line) for line in journal.read_text().splitlines()][1:]
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["crc32"] for line in lines] == [entry["crc32"] for entry in entries]
    assert [line["bytes"] for line in lines] == [entry["bytes"] for entry in entries]
