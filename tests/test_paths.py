"""Every name out of a file or a URL that reaches a path: where it comes from, and what holds it."""

from __future__ import annotations

import ast
import importlib
import io
import json
from pathlib import Path

import pytest

from openlm_lite import storage
from openlm_lite.data import prepare_out
from openlm_lite.data.plan import PrepareConfig
from openlm_lite.log import read_metrics
from openlm_lite.run import load_run
from openlm_lite.train import train

# Where a name comes from -> (what holds it, the test of that)
NAMES_FROM_OUTSIDE = {
    "shard in a manifest, ours": (
        "openlm_lite.data.manifest:_check_line",
        "test_a_manifest_with_a_hostile_name_is_refused",
    ),
    "shard in a manifest, OpenLM's": (
        "openlm_lite.data.manifest:_check_line",
        "test_a_manifest_with_a_hostile_name_is_refused",
    ),
    "member of a tar: read in place, never unpacked": (
        "openlm_lite.data.tar_index:index_tar",
        "test_a_link_in_a_tar_is_refused",
    ),
    "last part of a shard's URL, in the cache": (
        "openlm_lite.data.cache:_name",
        "test_no_url_makes_a_name_outside_of_the_cache",
    ),
    "link in the cache": (
        "openlm_lite.data.cache:Cache",
        "test_a_link_in_the_cache_is_not_followed_and_its_target_stays",
    ),
    "object below a remote --out": (
        "openlm_lite.data.prepare_out:_fetch_small_files",
        "test_names_in_a_store_lead_nowhere_but_into_the_folders_of_a_dataset",
    ),
    "tokenizer: a hub name, else a file that the user names": (
        "openlm_lite.data.tokenizer:load_tokenizer",
        "test_a_tokenizer_name_is_no_way_out_of_a_cache",
    ),
    "file in COMMIT.json": (
        "openlm_lite.commit:read_commit",
        "test_file_names_in_a_commit_cannot_leave_the_folder",
    ),
    "data file in .metadata": (
        "openlm_lite.safe_dcp:decode_metadata",
        "test_tensors_cannot_lie_in_files_outside_the_checkpoint",
    ),
    "document of a checkpoint": (
        "openlm_lite.checkpoint:check_document_names",
        "test_urls_and_bad_document_names_are_refused",
    ),
    "file in an index of weights": (
        "openlm_lite.storage:safe_join",
        "test_an_index_cannot_name_files_elsewhere",
    ),
    "source or validation set in a recipe: never a path": (
        "openlm_lite.sinks:Sinks",
        "test_names_of_sources_never_become_paths",
    ),
    "recipe or model.base: a shipped name, else a file that the user names": (
        "openlm_lite.config:find_file",
        "test_a_shipped_name_is_never_guessed",
    ),
}


@pytest.mark.parametrize("place", NAMES_FROM_OUTSIDE)
def test_every_name_from_outside_is_held_by_what_the_list_says(place: str) -> None:
    holder, test = NAMES_FROM_OUTSIDE[place]
    module, _, name = holder.partition(":")
    assert hasattr(importlib.import_module(module), name), holder
    assert test in ALL_TESTS, test


ALL_TESTS = {
    node.name
    for path in Path(__file__).parent.rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
}


def test_names_of_sources_never_become_paths(toy_recipe: Path, tmp_path: Path) -> None:
    data = toy_recipe.parent / "data"
    outside = tmp_path / "outside"
    outside.mkdir()
    before = sorted(tmp_path.rglob("*"))
    name = f"../../../{outside}/evil"
    sources = {name: {"path": f"{data}/train", "weight": 1}}
    words = [f"run.dir={tmp_path / 'run'}", "data.train=null", "data.val={}", "total_steps=8"]
    words += [
        f"data.sources={json.dumps(sources)}",
        f"data.val={json.dumps({name: f'{data}/val'})}",
    ]
    assert train(load_run(str(toy_recipe), words)) == 0
    assert [p for p in sorted(tmp_path.rglob("*")) if tmp_path / "run" not in [p, *p.parents]] == (
        before
    )
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any(f"val/{name}/loss" in record for record in records)


def test_names_in_a_store_lead_nowhere_but_into_the_folders_of_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = PrepareConfig(inputs=("x",), out="s3://bucket/out", scratch=str(tmp_path / "scratch"))
    place = prepare_out.place_for(cfg)
    hostile = ["../dataset.json", "/dataset.json", f"{tmp_path}/report.json", "..//manifest.jsonl"]
    hostile += ["train/../../dataset.json", "x/dataset.json", "./../dataset.json"]
    good = ["dataset.json", "train/manifest.jsonl", "val/dataset.json"]
    listed = [(name, f"s3://bucket/out/{name}") for name in hostile + good]
    monkeypatch.setattr(prepare_out, "_remote_files", lambda _: listed)
    monkeypatch.setattr(storage, "open_read", lambda _: io.BytesIO(b"{}"))
    prepare_out._fetch_small_files(place)
    written = [str(p.relative_to(place.folder)) for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(written) == sorted(good)
