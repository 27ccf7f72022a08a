"""manifest.jsonl and dataset.json: what is accepted, and what each mistake is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.manifest import dtype_for, load_info, load_manifest
from openlm_lite.errors import InputError

LINE = {"shard": "shard-000000", "num_sequences": 1, "num_tokens": 64, "bytes": 9, "crc32": 3}


def manifest_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "manifest.jsonl"
    path.write_text(text)
    return str(path)


def test_a_missing_final_newline_loses_no_shard(tmp_path: Path) -> None:
    lines = [json.dumps({**LINE, "shard": f"s{i}"}) for i in range(3)]
    assert len(load_manifest(manifest_of(tmp_path, "\n".join(lines))).shards) == 3
    assert len(load_manifest(manifest_of(tmp_path, "\n".join(lines) + "\n")).shards) == 3


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a; rm -rf b", "pipe:cat", "a b"])
def test_shard_names_that_could_leave_the_folder_or_run_a_shell_are_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError, match="refused"):
        load_manifest(manifest_of(tmp_path, json.dumps({**LINE, "shard": name})))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no shard"),
        ("{", "manifest.jsonl:1: not JSON"),
        ("\n[1]", "manifest.jsonl:2: expected a JSON object"),
        (json.dumps({**LINE, "crc32": "3"}), "crc32 is '3'; expected int"),
        (json.dumps({**LINE, "bytes": True}), "bytes is True"),
        (json.dumps({**LINE, "num_sequences": 0}), "num_sequences is 0"),
        (json.dumps({"shard": "x"}), "'num_sequences' is missing"),
        (json.dumps(LINE) + "\n" + json.dumps(LINE), "listed twice"),
    ],
)
def test_a_broken_manifest_is_one_error_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        load_manifest(manifest_of(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"tokenizer": {"name": "x"}}, "tokenizer: field 'fingerprint' is missing"),
        ({"seed": None}, "seed is None"),
    ],
)
def test_a_broken_dataset_json_is_one_error_with_its_field(
    make_dataset: Callable[..., Path], change: dict[str, object], message: str
) -> None:
    path = make_dataset() / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        load_info(str(path))


def test_a_dataset_opens_by_folder_and_by_manifest(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset()
    by_folder = open_dataset(str(folder))
    by_file = open_dataset(str(folder / "manifest.jsonl"))
    assert by_folder.n_blocks == by_file.n_blocks == 9
    assert by_folder.manifest_sha256 == by_file.manifest_sha256
    assert by_folder.info == by_file.info
    assert open_dataset(f"file://{folder}").n_blocks == 9


def test_what_is_no_dataset_is_told_what_to_do(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no such dataset folder"):
        open_dataset(str(tmp_path / "nothing"))
    make_dataset("train")
    make_dataset("val")
    with pytest.raises(InputError, match="holds the datasets train, val"):
        open_dataset(str(tmp_path))
    (tmp_path / "half" / ".prepare").mkdir(parents=True)
    with pytest.raises(InputError, match="not finished"):
        open_dataset(str(tmp_path / "half"))
    (tmp_path / "train" / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"dataset\.json: no such file"):
        open_dataset(str(tmp_path / "train"))


def test_two_bytes_per_id_reach_up_to_65536_ids() -> None:
    assert (dtype_for(65_536), dtype_for(65_537)) == ("uint16", "uint32")
