"""`openlm inspect PATH`: what a dataset, a run or a checkpoint holds, and whether it is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from openlm_lite import lineage, run, run_files, storage
from openlm_lite.checkpoint import checkpoints_of_run
from openlm_lite.checkpoint_place import Place, place_of
from openlm_lite.commit import COMMIT_NAME, DamagedError, step_of_folder
from openlm_lite.data.dataset import load_dataset
from openlm_lite.data.inspect import inspect_dataset, inspect_samples
from openlm_lite.data.manifest import MANIFEST_NAME
from openlm_lite.data.sources import open_sources, open_stream
from openlm_lite.errors import InputError
from openlm_lite.guard import Guard, GuardConfig, Range, first_sample_of_last
from openlm_lite.log import read_metrics


def inspect_path(
    path: str,
    verify: bool = False,
    step: int | None = None,
    *,
    workers: int = 0,
    journal: str | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Facts about `path`, as plain values; `verify` reads everything and checks it.

    With `step` (a run, or a recipe that has not begun): the rows of the data that this step, from
    0, trains on; `tokenizer` shows them as text where their dataset has none.
    Raises InputError for what is none of the three, or is damaged.
    """
    if storage.is_remote(path) and step is None:
        return _inspect_url(path.rstrip("/"), verify, workers, journal)
    folder = Path(path)
    if step is not None:
        return _inspect_batch(folder, step, tokenizer)
    if tokenizer is not None:
        raise InputError(
            f"--tokenizer {tokenizer}: goes with --step S, whose rows it shows as text"
        )
    if (folder / MANIFEST_NAME).is_file() or folder.name == MANIFEST_NAME:
        return inspect_dataset(path, verify, workers, journal)
    if (folder / COMMIT_NAME).is_file():
        place = place_of(os.path.dirname(os.path.abspath(path)))
        return _inspect_checkpoint(place, os.path.abspath(path), verify) | {"path": path}
    if (folder / run_files.CONFIG).is_file():
        return _inspect_run(folder, verify)
    if any(folder.glob(f"*/{MANIFEST_NAME}")) or (folder / ".prepare").is_dir():
        load_dataset(path)  # which says what to name, or that it is not finished
    found = "nothing" if not folder.exists() else "none of them"
    raise InputError(
        f"{path}: found {found}; give a dataset (a folder with {MANIFEST_NAME}), a run (with "
        f"config.yaml) or a checkpoint (with {COMMIT_NAME})"
    )


def _inspect_url(url: str, verify: bool, workers: int, journal: str | None) -> dict[str, Any]:
    """A dataset, a checkpoint or the checkpoints of a run; to verify one, it is copied here."""
    root, _, name = url.rpartition("/")
    if name == MANIFEST_NAME or storage.exists(f"{url}/{MANIFEST_NAME}"):
        return inspect_dataset(url, verify, workers, journal)
    if step_of_folder(name) is not None:
        return _inspect_checkpoint(place_of(root), url, verify)
    found = _inspect_checkpoints(place_of(url), verify)
    if not found["checkpoints"]:
        raise InputError(
            f"{url}: found none of them; give a dataset (a folder with {MANIFEST_NAME}), "
            f"checkpoint.dir of a run, or a checkpoint (with {COMMIT_NAME})"
        )
    return {"path": url, "verified": verify, **found}


def _inspect_checkpoint(place: Place, path: str, verify: bool) -> dict[str, Any]:
    try:
        commit = place.commit_of(path)
        if verify:
            place.bring(path, 0, 1, None)
        has_model = run_files.MODEL in commit.files
        model = json.loads(place.document(commit, run_files.MODEL)) if has_model else {}
    except DamagedError as problem:
        raise InputError(f"{path}: {problem}") from None
    return {
        "path": path,
        "step": commit.state.step,
        "tokens": commit.state.tokens,
        "next_sample": commit.state.next_sample,
        "world_size": commit.world_size,
        "bytes": commit.n_bytes,
        "n_files": len(commit.files),
        "verified": verify,
        **commit.facts,
        **lineage.facts_of(commit.facts.get("init_from"), commit.state.tokens),
        "model": model,
    }


def _inspect_checkpoints(place: Place, verify: bool) -> dict[str, Any]:
    """All checkpoints of a place, newest first, and the one that a run there would resume from."""
    found: list[dict[str, Any]] = []
    resumes_from: dict[str, str] = {}
    for path in place.steps():
        try:
            commit = place.commit_of(path)
            place.check_sizes(commit)
            if verify:
                place.bring(path, 0, 1, None)
            found.append({"step": commit.step, "bytes": commit.n_bytes, "whole": True})
            resumes_from.setdefault("resumes_from", path)
        except DamagedError as problem:
            name = path.rsplit("/", 1)[-1]
            found.append({"step": name, "whole": False, "problem": str(problem)})
    return {**resumes_from, "checkpoints": found}


def _inspect_run(folder: Path, verify: bool) -> dict[str, Any]:
    cfg = run.load_run(str(folder / run_files.CONFIG))
    found: dict[str, Any] = {"path": str(folder), "total_steps": cfg.steps}
    if (folder / run_files.METRICS).is_file():
        records = read_metrics(folder / run_files.METRICS)
        trained = [r for r in records if "train/loss" in r]
        if trained:
            last = trained[-1]
            found |= {k: last[k] for k in ("step", "tokens", "train/loss")}
        for record in records:  # the newest value of each source wins
            found |= {k: v for k, v in record.items() if k.startswith("val/")}
    if (folder / run_files.INIT_FROM).is_file():
        record = json.loads((folder / run_files.INIT_FROM).read_text(encoding="utf-8"))
        found |= lineage.facts_of(record, found.get("tokens", 0))
    place = place_of(checkpoints_of_run(str(folder)))
    return found | {"verified": verify, **_inspect_checkpoints(place, verify)}


def _inspect_batch(path: Path, step: int, tokenizer: str | None) -> dict[str, Any]:
    is_recipe = path.is_file() and path.suffix in (".yaml", ".yml", ".json")
    if not is_recipe and not (path / run_files.CONFIG).is_file():
        raise InputError(
            f"{path}: --step needs a run folder, whose config.yaml says what is read, or a recipe"
        )
    cfg = run.load_run(str(path if is_recipe else path / run_files.CONFIG))
    if not 0 <= step < cfg.steps:
        raise InputError(f"--step {step}: {path} has the steps 0 to {cfg.steps - 1}")
    datasets, _ = open_sources(cfg.data, cfg.model.vocab_size)
    stream = open_stream(cfg.data, datasets, cfg.tokens_at(cfg.steps))
    sizes = [(n, tokens // cfg.data.seq_len) for n, tokens in cfg.batch_sizes.stages(step + 1)]
    first = first_sample_of_last(sizes, [] if is_recipe else _left_out(path))
    checksum, rows = inspect_samples(stream, first, cfg.batch_at(step), tokenizer)
    return {"path": str(path), "step": step, "data/checksum": checksum, "rows": rows}


def _left_out(folder: Path) -> list[Range]:
    """Samples that the run did not train on: by its newest checkpoint, and by its log since."""
    found: list[Range] = []
    place = place_of(checkpoints_of_run(str(folder)))
    for path in place.steps():
        try:
            found += Guard(GuardConfig(), place.commit_of(path).state.guard, path).left_out
        except DamagedError:
            continue
        break
    if (folder / run_files.METRICS).is_file():
        for record in read_metrics(folder / run_files.METRICS):
            if record.get("guard/event") in ("left out", "rewind"):
                found.append((record["guard/first_sample"], record["guard/end_sample"]))
    return found
