"""Files that somebody made on purpose, given to the real functions and verbs: one clear error each,
nothing run, nothing written outside, no memory filled.

Tested elsewhere, beside what reads them:

    .metadata with a bomb, byte items, tensors elsewhere     test_checkpoint_hostile.py
    .pt with a bomb, older than zip, TorchScript             hf/test_weights.py
    safetensors with a false header, an index with paths     hf/test_weights.py
    json.gz shards that inflate without end, links in a tar  data/test_openlm_shards.py
    manifest lines with paths, shell words, pipe:            data/test_manifest.py
    YAML with !!python/object                                test_config.py
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite import cli, config, storage
from openlm_lite.data import read
from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.manifest import load_manifest, load_openlm_manifest
from openlm_lite.errors import InputError

ROOT = Path(__file__).parents[1]


class Bomb:
    """Unpickling this makes a folder: proof that code was run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def torch_bomb(target: Path) -> bytes:
    stream = io.BytesIO()
    torch.save(Bomb(target), stream)
    return stream.getvalue()


def npy_bomb(target: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb(target)] * 65, dtype=object), allow_pickle=True)
    return stream.getvalue()


def refused(capsys: pytest.CaptureFixture[str], message: str, *words: str) -> None:
    """The verb ends with 2 and one line that holds `message`."""
    assert cli.main(list(words)) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.startswith("openlm: ")
    assert "Traceback" not in error


# --- shards --------------------------------------------------------------------------------------

MEMBERS: dict[str, Callable[[Path], bytes]] = {
    "0000000001.pyd": lambda boom: pickle.dumps(Bomb(boom)),
    "0000000001.pickle": lambda boom: pickle.dumps(Bomb(boom)),
    "0000000001.pkl": lambda boom: pickle.dumps(Bomb(boom)),
    "0000000001.pth": torch_bomb,
    "0000000001.pyd.gz": lambda boom: gzip.compress(pickle.dumps(Bomb(boom))),
    "0000000001.npy": npy_bomb,
    "0000000001.npz": npy_bomb,
    # a bomb under an innocent name
    "0000000001.json": lambda boom: pickle.dumps(Bomb(boom)),
    "0000000001.json.gz": lambda boom: gzip.compress(pickle.dumps(Bomb(boom))),
}


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            if kind != tarfile.REGTYPE:
                member.size, member.linkname = 0, "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.jsonl"
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{**first, **changes}, *rest]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A prepared dataset of one shard."""
    from openlm_lite.data.prepare import PrepareConfig, prepare

    (tmp_path / "a.txt").write_text("some words, some more words and some other ones; " * 200)
    out = str(tmp_path / "data")
    prepare(PrepareConfig((str(tmp_path / "a.txt"),), out, train_tokenizer=270, block_tokens=64))
    return tmp_path / "data"


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("kind", ["ours", "OpenLM's"])
def test_a_shard_with_code_in_it_is_refused_and_nothing_runs(
    name: str, kind: str, dataset: Path, tmp_path: Path
) -> None:
    content = MEMBERS[name](tmp_path / "boom")
    shard = dataset / "shard-000000.tar"
    write_tar(shard, [(name, content)])
    if kind == "ours":
        from openlm_lite.data.cache import _crc32_of

        change_manifest(dataset, bytes=shard.stat().st_size, crc32=_crc32_of(str(shard)))
    else:
        (dataset / "dataset.json").unlink()
        line = {"shard": "shard-000000", "num_sequences": 1}
        (dataset / "manifest.jsonl").write_text(json.dumps(line))
    with pytest.raises(InputError, match=r"shard-000000\.tar: "):
        open_dataset(str(dataset)).blocks(0)
    assert not (tmp_path / "boom").exists()


def test_the_bombs_are_real_ones(tmp_path: Path) -> None:
    for number, make in enumerate(MEMBERS.values()):
        boom, content = tmp_path / f"boom{number}", make(tmp_path / f"boom{number}")
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content[:2] == b"PK":
            torch.load(io.BytesIO(content), weights_only=False)
        elif content[:6] == b"\x93NUMPY":
            np.load(io.BytesIO(content), allow_pickle=True)
        else:
            pickle.loads(content)
        assert boom.exists()


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE],
    ids=["symlink", "hard link", "device", "fifo"],
)
def test_a_member_of_our_shards_that_is_no_file_is_refused(
    kind: bytes, dataset: Path, tmp_path: Path
) -> None:
    shard = dataset / "shard-000000.tar"
    write_tar(shard, [("0000000000.npy", b"")], kind)
    change_manifest(dataset, bytes=shard.stat().st_size)
    with pytest.raises(InputError, match="is not a plain ustar file"):
        open_dataset(str(dataset)).blocks(0)


NAMES = [
    "a; touch X",
    "$(touch X)",
    "`touch X`",
    "../x",
    "x/../../y",
    "/etc/x",
    "x\n",
    "x.tar\n",
    "x" * 300,
]
NAMES += [
    "x\ny",
    "pipe:touch X",
    "|touch X",
    "\x00",
    "~/x",
    "C:\\x",
    "http://h/x",
    "-rf x",
    "é",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_with_a_hostile_name_is_refused(name: str, tmp_path: Path) -> None:
    line = {"shard": name, "num_sequences": 1, "num_tokens": 64, "bytes": 9, "crc32": 3}
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(line) + "\n")
    if name:  # OpenLM's and ours add .tar to it
        with pytest.raises(InputError, match="refused"):
            load_manifest(str(path))
        path.write_text(json.dumps({"shard": name, "num_sequences": 1}))
        with pytest.raises(InputError, match="refused"):
            load_openlm_manifest(str(path))
    with pytest.raises(InputError, match="refused"):
        storage.safe_join(str(tmp_path), name)


@given(st.text())
def test_no_name_out_of_a_file_leaves_its_folder(name: str) -> None:
    try:
        joined = storage.safe_join("/some/folder", name)
    except InputError:
        return
    assert Path(os.path.normpath(joined)).is_relative_to("/some/folder")
    assert name.isascii() and not set(name) & set("\n\r\0 ;|&$`\"'\\<>*?~:")


# --- runs and configs ----------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["data.train", "data.val.x", "model.init_from", "data.cache_dir"])
def test_a_pipe_in_a_recipe_runs_nothing(
    field: str, toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boom = tmp_path / "boom"
    words = [f"run.dir={tmp_path / 'run'}", f"{field}='pipe:touch {boom}'"]
    if field == "data.cache_dir":
        words.append("data.train=http://127.0.0.1:9/x")
    refused(capsys, "pipe: is refused because it would", "train", str(toy_recipe), *words)
    assert not boom.exists() and not (tmp_path / "run").exists()


def test_a_recipe_of_references_to_references_does_not_fill_the_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1, y: 1}"]
    lines += [f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 60)]
    (tmp_path / "laughs.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="more than 100000 values"):
        config.load_tree(tmp_path / "laughs.yaml")
    for circle in ("a: &a {b: *a}", "a: &a [*a]", "&a [*a]"):
        with pytest.raises(InputError, match="here: not readable as YAML"):
            config.parse_yaml(circle, "here")
    tree = config.parse_yaml("{a: &a {x: 1}, b: *a, c: [*a, *a]}", "here")  # few are fine
    assert tree == {"a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}, {"x": 1}]}


# --- text for prepare ----------------------------------------------------------------------------


BOMB_MIB, LIMIT_MIB = 512, 16


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of one line without end."""
    folder = tmp_path_factory.mktemp("bombs")
    compressor = pytest.importorskip("zstandard").ZstdCompressor().compressobj()
    chunk = bytes(1 << 24)
    pieces = [compressor.compress(chunk) for _ in range(BOMB_MIB // 16)]
    (folder / "z").write_bytes(b"".join(pieces) + compressor.flush())
    (folder / "g").write_bytes(gzip.compress(chunk) * (BOMB_MIB // 16))
    return folder


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.gz", "x.jsonl.zst", "x.txt.zst"])
def test_a_decompression_bomb_in_prepare_is_refused_before_it_fills_the_memory(
    name: str, bombs: Path, tmp_path: Path
) -> None:
    bomb = tmp_path / name
    shutil.copy(bombs / ("g" if name.endswith("gz") else "z"), bomb)
    assert bomb.stat().st_size < 1 << 20
    code = (
        "import resource, sys\n"
        "from openlm_lite.cli import main\n"
        "from openlm_lite.data import prepare, read\n"
        f"read.MAX_DOCUMENT_BYTES = {LIMIT_MIB} << 20\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "code = main(sys.argv[1:])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
        "sys.exit(code)"
    )
    words = ["prepare", str(bomb), "--out", str(tmp_path / "out"), "--train-tokenizer", "300"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == cli.BAD_INPUT, done.stderr
    assert f"{bomb}: " in done.stderr and "which no document is" in done.stderr
    assert "Traceback" not in done.stderr
    # MiB; zstandard gives up to 128 MiB at once
    assert int(done.stdout.split()[-1]) < BOMB_MIB - 100, done.stdout
    assert not (tmp_path / "out").exists()


def test_a_long_line_behind_a_good_one_is_named_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "MAX_DOCUMENT_BYTES", 100)
    good = b'{"text": "fine"}\n'
    path = tmp_path / "x.jsonl"
    path.write_bytes(good + b'{"text": "' + b"x" * 100 + b'"}\n')
    format = read.format_of(str(path))
    assert format is not None
    for reader in (
        lambda: list(read.read_documents(str(path), format, text_field="text")),
        lambda: list(read.read_strings(str(path), format)),
    ):
        with pytest.raises(InputError, match=r"x\.jsonl:.*longer than"):
            reader()
    # a span that begins inside of the long line passes over it: it is another's
    assert not list(read.read_documents(str(path), format, text_field="text", start=len(good) + 50))


@pytest.mark.parametrize("ending", ["json", "json.gz"])
def test_a_huge_member_is_refused_by_its_size(ending: str, tmp_path: Path) -> None:
    name = f"0.{ending}"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        row = b"[1, 2, 3]" if ending == "json" else gzip.compress(b"[1, 2, 3]")
        first = tarfile.TarInfo(f"00.{ending}")
        first.size = len(row)
        tar.addfile(first, io.BytesIO(row))
    size = 4 << 30
    with (tmp_path / "a.tar").open("r+b") as file:  # 4 GiB, of which nothing is on the disk
        header = tarfile.TarInfo(name)
        header.size = size
        file.seek(1024)
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(1024 + 512 + size + 1024)
    lines = json.dumps({"shard": "a", "num_sequences": 2})
    (tmp_path / "manifest.jsonl").write_text(lines)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    from openlm_lite.data import openlm_shards

    data = open_dataset(str(tmp_path))
    index = openlm_shards.index_tar("", _head(tmp_path / "a.tar", 1024 + 512 + size + 1024))
    assert index.sizes_M.tolist()[1] == size
    with pytest.raises(InputError, match=rf"member 1, '{name}'.*{size} bytes, more than"):
        data.blocks(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def _head(path: Path, size: int) -> Any:
    import mmap

    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
