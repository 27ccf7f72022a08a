"""`openlm prepare`: text in, shuffled token shards out.

    plan       inputs -> pieces of work                                    (plan.py; writes nothing)
    tokenise   each piece -> sorted parts in OUT/.prepare                  (spill.py, processes)
    shards     each shard <- its range of the global shuffle               (spill.py, processes)
    finish     tokenizer.json, manifest.jsonl, dataset.json (last); OUT/.prepare is removed

The bytes of the shards depend on the inputs, the tokenizer and the settings, never on `workers`.
A run that was killed goes on where it was: pieces and shards that are marked done are kept. A
finished folder is left alone, whatever is asked of it.

As a library: workers are spawned, so call `prepare` under `if __name__ == "__main__":`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from openlm_lite import storage
from openlm_lite.data import manifest as manifest_module
from openlm_lite.data import spill
from openlm_lite.data.manifest import (
    FORMAT_VERSION,
    INFO_NAME,
    MANIFEST_NAME,
    DatasetInfo,
    ShardEntry,
    TokenizerInfo,
    dtype_for,
)
from openlm_lite.data.plan import (
    Plan,
    PrepareConfig,
    check_config,
    fingerprint_of,
    make_plan,
    settings_of,
)
from openlm_lite.data.pool import Progress, each_done
from openlm_lite.data.read import read_documents
from openlm_lite.data.shards import npy_dtype, shard_bytes
from openlm_lite.data.spill import Cells, PieceReport, ShardJob, SpillConfig
from openlm_lite.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from openlm_lite.errors import InputError

SCRATCH = ".prepare"
# Text that a new tokenizer is trained on: as much from the start of each piece as fits in this.
TOKENIZER_SAMPLE_BYTES = 256 << 20


class ResumableError(InputError):
    """An InputError after which the work done so far stays, for the same command to go on."""


@dataclass(frozen=True)
class SplitReport:
    """One dataset that was made (stream tokens = n_tokens + 1 + n_tokens_dropped)."""

    path: str
    n_documents: int
    n_tokens: int  # trained on in one epoch
    n_tokens_dropped: int  # at the tail
    n_blocks: int
    n_shards: int


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` made, or found already made (then `already_done`)."""

    splits: dict[str, SplitReport]  # "train", and "val" where there is one
    n_files: int
    n_skipped_files: int
    n_empty_documents: int
    tokenizer: str
    vocab_size: int
    dtype: str
    already_done: bool = field(default=False, compare=False)
    seconds: float = field(default=0.0, compare=False)


def prepare(cfg: PrepareConfig) -> PrepareReport:
    """Make the dataset(s) that `cfg` describes, or finish a run that was stopped.

    Raises InputError for bad settings, inputs, tokenizer or out folder, before anything is written
    there; for a bad document, after which nothing is left there; and for a full disk, after which
    the same command goes on.
    """
    started = time.monotonic()
    check_config(cfg)
    out = storage.local_path(cfg.out)
    # a trained tokenizer is known only later; what it is trained on is in the fingerprint
    tokenizer = load_tokenizer(cfg.tokenizer, eot=cfg.eot) if cfg.tokenizer is not None else None
    plan = make_plan(cfg.inputs, out)
    settings = settings_of(cfg)
    known = None if tokenizer is None else [tokenizer.fingerprint, tokenizer.eot_id]
    fingerprint = fingerprint_of(settings, plan, known)
    if _finished(cfg, out, fingerprint):
        shutil.rmtree(os.path.join(out, SCRATCH), ignore_errors=True)
        return replace(_report(cfg, out), already_done=True)
    existed = os.path.isdir(out)
    _check_out(out, fingerprint)
    scratch = os.path.join(out, SCRATCH)
    try:
        os.makedirs(scratch, exist_ok=True)
        with _lock(scratch):
            storage.write_json(os.path.join(scratch, "plan.json"), {"fingerprint": fingerprint})
            _run(cfg, out, plan, tokenizer, settings, fingerprint)
    except ResumableError:
        raise
    except InputError:
        _discard(out, existed)
        raise
    except OSError as e:
        if storage.is_disk_full(e):
            raise ResumableError(
                f"{out}: no space left on the disk (or quota); free some and run the same command "
                "again: it goes on where it was"
            ) from None
        raise
    shutil.rmtree(scratch, ignore_errors=True)
    return replace(_report(cfg, out), seconds=time.monotonic() - started)


def _run(
    cfg: PrepareConfig,
    out: str,
    plan: Plan,
    tokenizer: Tokenizer | None,
    settings: dict[str, Any],
    fingerprint: str,
) -> None:
    """All stages, inside the lock."""
    scratch = os.path.join(out, SCRATCH)
    workers = cfg.workers or os.cpu_count() or 1
    if tokenizer is None:
        tokenizer = _trained_tokenizer(cfg, plan, os.path.join(scratch, "tokenizer"))
    dtype = dtype_for(tokenizer.vocab_size)
    spill_cfg = SpillConfig(scratch, cfg.text_field, cfg.seed, cfg.val_fraction, dtype)
    reports = _tokenise(plan, tokenizer, spill_cfg, workers)
    cells = {s: spill.gather_cells(reports, s, spill_cfg) for s in _splits(cfg)}
    _check_enough(cells, cfg)
    jobs = {
        split: spill.shard_jobs(
            cells[split],
            folder=_folder(cfg, out, split),
            marks=os.path.join(scratch, f"{split}-shards"),
            block_tokens=cfg.block_tokens,
            blocks_per_shard=cfg.blocks_per_shard,
            dtype=dtype,
        )
        for split in cells
    }
    entries = _write_shards(jobs, out, workers)
    for split in reversed(_splits(cfg)):  # train last: its dataset.json says that all is done
        info = DatasetInfo(
            format_version=FORMAT_VERSION,
            block_tokens=cfg.block_tokens,
            dtype=dtype,
            tokenizer=TokenizerInfo(
                tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eot_id
            ),
            n_documents=sum(n for r in reports for n, _ in r.counts[split].values()),
            n_empty_documents=sum(report.n_empty for report in reports),
            n_tokens=sum(entry.num_tokens for entry in entries[split]),
            n_tokens_dropped=(cells[split].n_tokens - 1) % cfg.block_tokens,
            sources=_sources(plan, reports, split),
            config={**settings, "split": split},
            fingerprint=fingerprint,
            seed=cfg.seed,
        )
        _finish(_folder(cfg, out, split), tokenizer, entries[split], info)


# --- before anything is written ------------------------------------------------------------------


def _splits(cfg: PrepareConfig) -> tuple[str, ...]:
    return ("train", "val") if cfg.val_fraction > 0 else ("train",)


def _folder(cfg: PrepareConfig, out: str, split: str) -> str:
    return os.path.join(out, split) if cfg.val_fraction > 0 else out


def _finished(cfg: PrepareConfig, out: str, fingerprint: str) -> bool:
    """Whether `out` is finished with this fingerprint. Raises InputError if with another."""
    found = [p for p in (out, f"{out}/train", f"{out}/val") if os.path.exists(f"{p}/{INFO_NAME}")]
    for folder in found:
        if manifest_module.load_info(os.path.join(folder, INFO_NAME)).fingerprint != fingerprint:
            raise InputError(
                f"{folder}: holds a dataset that was made from other inputs or with other settings "
                f"(see its {INFO_NAME}); choose another --out, or remove the folder first"
            )
    return all(_folder(cfg, out, split) in found for split in _splits(cfg))


def _check_out(out: str, fingerprint: str) -> None:
    """Raises InputError unless `out` is new, empty, or a stopped run of the same work."""
    if not os.path.exists(out):
        return
    if not os.path.isdir(out):
        raise InputError(f"{out}: is not a folder; choose another --out")
    names = sorted(os.listdir(out))
    if not names:
        return
    if SCRATCH not in names:
        raise InputError(
            f"{out}: the out folder is not empty (it holds {', '.join(names[:5])}); "
            "choose a new or an empty one"
        )
    path = os.path.join(out, SCRATCH, "plan.json")
    if not os.path.exists(path):
        return  # stopped before anything was done
    with open(path, encoding="utf-8") as file:
        if json.load(file)["fingerprint"] != fingerprint:
            raise InputError(
                f"{out}: holds an unfinished run with other inputs or settings; repeat that run "
                f"to finish it, choose another --out, or remove {os.path.join(out, SCRATCH)}"
            )


@contextmanager
def _lock(scratch: str) -> Iterator[None]:
    """Keep a second run out of the folder; the kernel frees the lock of a killed one."""
    with open(os.path.join(scratch, "lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResumableError(
                f"{scratch}: another `openlm prepare` is writing here; wait for it or choose "
                "another --out"
            ) from None
        yield


# --- the stages ----------------------------------------------------------------------------------


def _trained_tokenizer(cfg: PrepareConfig, plan: Plan, folder: str) -> Tokenizer:
    """Train the BPE on a sample of the documents, once; later runs find it in the scratch."""
    assert cfg.train_tokenizer is not None
    if not os.path.exists(os.path.join(folder, "tokenizer_config.json")):  # it is written last
        trained = train_bpe(_tokenizer_sample(plan, cfg.text_field), cfg.train_tokenizer)
        trained.save(folder)
    return replace(load_tokenizer(folder), name=f"bpe-{cfg.train_tokenizer}")


def _tokenizer_sample(plan: Plan, text_field: str) -> Iterator[str]:
    """Documents from the start of every piece, TOKENIZER_SAMPLE_BYTES characters in all."""
    budget = TOKENIZER_SAMPLE_BYTES // max(1, len(plan.pieces))
    for piece in plan.pieces:
        left = budget
        for span in piece.spans:
            if left <= 0:
                break
            for document in read_documents(
                span.path, span.format, text_field=text_field, start=span.start, stop=span.stop
            ):
                yield document.text[:left]
                left -= len(document.text)
                if left <= 0:
                    break


def _tokenise(
    plan: Plan, tokenizer: Tokenizer, cfg: SpillConfig, workers: int
) -> list[PieceReport]:
    """The reports of all pieces, those of an earlier run included."""
    reports = {piece.number: spill.finished_piece(piece.number, cfg) for piece in plan.pieces}
    left = [piece for piece in plan.pieces if reports[piece.number] is None]
    progress = Progress("tokenise", sum(piece.bytes for piece in left), "B")
    try:
        for piece, report in each_done(spill.tokenise_piece, left, (tokenizer, cfg), workers):
            reports[piece.number] = report
            progress.add(piece.bytes, report.n_tokens)
    finally:
        progress.close()
    return [report for report in reports.values() if report is not None]


def _check_enough(cells: dict[str, Cells], cfg: PrepareConfig) -> None:
    """Raises InputError unless every split fills a block."""
    if all(stream.n_tokens == 0 for stream in cells.values()):
        raise InputError(f"{', '.join(cfg.inputs)}: the inputs hold no documents with text")
    for split, stream in cells.items():
        if stream.n_tokens <= cfg.block_tokens:
            what = "the corpus" if len(cells) == 1 else f"the {split} split"
            remedy = f"a --block-tokens of at most {max(1, stream.n_tokens - 1)}"
            if split == "val":
                remedy += f", a --val-fraction above {cfg.val_fraction}"
            raise InputError(
                f"{what} has {stream.n_tokens} tokens, which do not fill one block of "
                f"{cfg.block_tokens} + 1; give more text, {remedy}"
            )


def _write_shards(
    jobs: dict[str, list[ShardJob]], out: str, workers: int
) -> dict[str, list[ShardEntry]]:
    """The manifest lines of all shards, those of an earlier run included."""
    done: dict[str, ShardEntry] = {}
    left: list[ShardJob] = []
    for job in (job for split in jobs.values() for job in split):
        os.makedirs(os.path.dirname(job.path), exist_ok=True)
        os.makedirs(os.path.dirname(job.mark), exist_ok=True)
        entry = spill.finished_shard(job)
        if entry is None:
            left.append(job)
        else:
            done[job.path] = entry
    needed = sum(shard_bytes(j.n_blocks, j.block_tokens + 1, npy_dtype(j.dtype)) for j in left)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ResumableError(
            f"{out}: the shards need {needed:,} bytes, the disk has {free:,} free; free some and "
            "run the same command again: it goes on where it was"
        )
    progress = Progress("write shards", len(left), "shards")
    try:
        for job, entry in each_done(spill.write_shard_job, left, (), workers):
            done[job.path] = entry
            progress.add(1, entry.num_tokens)
    finally:
        progress.close()
    return {split: [done[job.path] for job in split_jobs] for split, split_jobs in jobs.items()}


def _sources(plan: Plan, reports: Sequence[PieceReport], split: str) -> tuple[dict[str, Any], ...]:
    """Per input: what was named, its files, and what it gave to this split."""
    counts = [[0, 0] for _ in plan.sources]
    for report in reports:
        for source, (documents, tokens) in report.counts[split].items():
            counts[int(source)][0] += documents
            counts[int(source)][1] += tokens
    return tuple(
        {**vars(source), "n_documents": documents, "n_tokens": tokens}
        for source, (documents, tokens) in zip(plan.sources, counts, strict=True)
    )


def _finish(folder: str, tokenizer: Tokenizer, shards: list[ShardEntry], info: DatasetInfo) -> None:
    for name in os.listdir(folder):
        if name.startswith(".shard-") and ".tmp-" in name:  # of a writer that was killed
            os.unlink(os.path.join(folder, name))
    tokenizer.save(folder)
    storage.write_bytes(
        os.path.join(folder, MANIFEST_NAME), manifest_module.manifest_text(shards).encode()
    )
    storage.write_bytes(os.path.join(folder, INFO_NAME), manifest_module.info_text(info).encode())


def _discard(out: str, existed: bool) -> None:
    """Leave nothing of a run that bad input ended."""
    shutil.rmtree(os.path.join(out, SCRATCH), ignore_errors=True)
    if not existed and os.path.isdir(out) and not os.listdir(out):
        os.rmdir(out)


def _report(cfg: PrepareConfig, out: str) -> PrepareReport:
    """Read back what stands in the finished folder(s)."""
    splits: dict[str, SplitReport] = {}
    for split in _splits(cfg):
        folder = _folder(cfg, out, split)
        info = manifest_module.load_info(os.path.join(folder, INFO_NAME))
        shards = manifest_module.load_manifest(os.path.join(folder, MANIFEST_NAME)).shards
        splits[split] = SplitReport(
            path=folder,
            n_documents=info.n_documents,
            n_tokens=info.n_tokens,
            n_tokens_dropped=info.n_tokens_dropped,
            n_blocks=sum(entry.num_sequences for entry in shards),
            n_shards=len(shards),
        )
    return PrepareReport(
        splits=splits,
        n_files=sum(source["n_files"] for source in info.sources),
        n_skipped_files=sum(source["n_skipped_files"] for source in info.sources),
        n_empty_documents=info.n_empty_documents,
        tokenizer=info.tokenizer.name,
        vocab_size=info.tokenizer.vocab_size,
        dtype=info.dtype,
    )
