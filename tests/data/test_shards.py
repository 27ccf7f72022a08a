"""Shards are plain webdataset tars, and no damage to one goes unnoticed."""

from __future__ import annotations

import gc
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.shards import npy_dtype, shard_bytes, write_shard
from openlm_lite.errors import InputError


def read_all(folder: Path) -> np.ndarray:
    dataset = open_dataset(str(folder))
    return np.concatenate([dataset.blocks(s) for s in range(len(dataset.manifest.shards))])


# webdataset leaves its files to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_stock_webdataset_reads_the_shards(make_dataset: Callable[..., Path], dtype: str) -> None:
    webdataset: Any = pytest.importorskip("webdataset")  # it ships no types
    folder = make_dataset(dtype=dtype)
    samples = []
    for path in sorted(folder.glob("*.tar")):
        samples += list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    gc.collect()
    assert [s["__key__"] for s in samples] == [f"{i:010d}" for i in range(9)]
    assert {s["npy"].dtype for s in samples} == {npy_dtype(dtype)}
    assert np.array_equal(np.stack([s["npy"] for s in samples]), read_all(folder))


def test_the_last_id_of_a_block_is_the_first_of_the_next(
    make_dataset: Callable[..., Path],
) -> None:
    ids = read_all(make_dataset())
    assert ids.shape == (9, 65)
    assert np.array_equal(ids[:-1, -1], ids[1:, 0])


def test_the_same_blocks_make_the_same_bytes_and_tarfile_agrees(tmp_path: Path) -> None:
    blocks = [np.arange(i, i + 129, dtype="<u2") for i in range(5)]
    written = [write_shard(str(tmp_path / f"{n}.tar"), 7, blocks) for n in "ab"]
    data = (tmp_path / "a.tar").read_bytes()
    assert data == (tmp_path / "b.tar").read_bytes()
    assert written[0] == written[1]
    assert written[0][:2] == (5, len(data))
    assert shard_bytes(5, 129, npy_dtype("uint16")) == len(data)
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [f"{i:010d}.npy" for i in range(7, 12)]
    assert {(m.mtime, m.uid, m.gid, m.mode) for m in members} == {(0, 0, 0, 0o644)}
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".tar"]


STRIDE = 512 + 512  # header, and 128 bytes of npy header + 65 ids of 2 bytes, padded
DAMAGE: dict[str, Callable[[bytearray], object]] = {
    "cut at a header": lambda b: b.__delitem__(slice(STRIDE, None)),
    "cut inside a header": lambda b: b.__delitem__(slice(STRIDE + 100, None)),
    "cut inside a block": lambda b: b.__delitem__(slice(STRIDE + 700, None)),
    "cut end of archive": lambda b: b.__delitem__(slice(len(b) - 512, None)),
    "empty file": lambda b: b.clear(),
    "bytes appended": lambda b: b.extend(b"x" * 512),
    "name bit": lambda b: b.__setitem__(STRIDE + 1, b[STRIDE + 1] ^ 1),
    "size bit": lambda b: b.__setitem__(STRIDE + 130, b[STRIDE + 130] ^ 1),
    "checksum bit": lambda b: b.__setitem__(STRIDE + 150, b[STRIDE + 150] ^ 1),
    "header zeroed": lambda b: b.__setitem__(slice(STRIDE, STRIDE + 512), bytes(512)),
    "npy header bit": lambda b: b.__setitem__(STRIDE + 514, b[STRIDE + 514] ^ 1),
    "payload bit": lambda b: b.__setitem__(STRIDE + 700, b[STRIDE + 700] ^ 16),
    "padding bit": lambda b: b.__setitem__(2 * STRIDE - 3, 1),
    "end of archive bit": lambda b: b.__setitem__(len(b) - 3, 1),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("manifest_follows", [False, True])
def test_every_kind_of_damage_is_one_error_with_shard_and_offset(
    make_dataset: Callable[..., Path], kind: str, manifest_follows: bool
) -> None:
    """Also where the manifest has the size of the damaged file: the walk sees it by itself."""
    folder = make_dataset()
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    DAMAGE[kind](data)
    path.write_bytes(data)
    if manifest_follows:
        change_line(folder, 1, bytes=len(data))
    with pytest.raises(InputError, match=r"shard-000001\.tar.*byte"):
        read_all(folder)


def change_line(folder: Path, number: int, **changes: object) -> None:
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **changes})
    (folder / "manifest.jsonl").write_text("\n".join(lines))


def change_info(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_missing_shard_is_named(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset()
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(InputError, match=r"shard-000002\.tar.*missing"):
        open_dataset(str(folder))


def test_ids_outside_the_vocabulary_are_found_at_first_read(
    make_dataset: Callable[..., Path],
) -> None:
    folder = make_dataset(vocab_size=400)
    with pytest.raises(InputError, match=r"shard-000001\.tar: byte \d+: token id 400 in block 3"):
        read_all(folder)


def test_a_wrong_dtype_or_block_length_is_refused(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset("dtype")
    change_info(folder, dtype="uint32")
    with pytest.raises(InputError, match=r"shard-000000\.tar.*dataset\.json says uint32"):
        read_all(folder)
    folder = make_dataset("length")
    change_info(folder, block_tokens=32, n_tokens=9 * 32)
    for line, blocks in enumerate((3, 4, 2)):
        change_line(folder, line, num_tokens=blocks * 32)
    with pytest.raises(InputError, match=r"shard-000000\.tar.*\(65,\).*\(33,\)"):
        read_all(folder)


def test_a_manifest_that_counts_other_blocks_than_the_tar_is_refused(
    make_dataset: Callable[..., Path],
) -> None:
    folder = make_dataset()
    change_line(folder, 1, num_sequences=5, num_tokens=5 * 64)
    with pytest.raises(InputError, match="belong together"):
        open_dataset(str(folder))
    change_info(folder, n_tokens=10 * 64)
    with pytest.raises(InputError, match=r"shard-000001\.tar: holds 4 blocks.*says 5"):
        read_all(folder)


@pytest.mark.parametrize("kind", ["unknown member", "pax header", "unequal blocks"])
def test_members_that_are_not_our_blocks_are_refused(
    make_dataset: Callable[..., Path], kind: str, tmp_path: Path
) -> None:
    folder = make_dataset(blocks_per_shard=(2,))
    path = folder / "shard-000000.tar"
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m)) for m in tar.getmembers()]
        files = [(m.name, f.read()) for m, f in members if f is not None]
    if kind == "unknown member":
        files[1] = ("0000000001.pickle", files[1][1])
    elif kind == "unequal blocks":
        files[1] = (files[1][0], files[1][1] + b"more")
    formats = tarfile.PAX_FORMAT if kind == "pax header" else tarfile.USTAR_FORMAT
    with tarfile.open(path, "w", format=formats) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name if kind != "pax header" else "ä" + name)
            info.size = len(content)
            (tmp_path / "member").write_bytes(content)
            with open(tmp_path / "member", "rb") as file:
                tar.addfile(info, file)
    change_line(folder, 0, bytes=path.stat().st_size)
    with pytest.raises(InputError, match=r"shard-000000\.tar: damaged at byte"):
        read_all(folder)
