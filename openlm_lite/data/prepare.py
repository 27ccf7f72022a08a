"""`openlm prepare`: text in, shuffled token shards out.

    plan       inputs -> pieces of work                          (plan.py; writes nothing)
    tokenise   each piece -> sorted parts in the scratch folder  (spill.py, filters.py; workers)
    dedup      with --dedup: duplicates out of the parts         (dedup.py; workers)
    shards     each shard <- its range of the global shuffle     (gather.py; workers)
    finish     tokenizer.json, report.json, manifest.jsonl, dataset.json (last); no scratch left

Workers are processes here (pool.py) or tasks on a Ray cluster (prepare_ray.py). The bytes of the
shards depend on the inputs, the tokenizer and the settings, never on who did the work. A run that
was killed goes on where it was: pieces and shards that are marked done are kept. A finished folder
is left alone, whatever is asked of it.

As a library: workers import the main module, so call `prepare` under `if __name__ == "__main__":`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from openlm_lite import storage
from openlm_lite.data import dedup, gather, pool, prepare_out, prepare_ray, prepare_report, spill
from openlm_lite.data.filters import Filters, read_ngrams
from openlm_lite.data.gather import Cells, ShardJob
from openlm_lite.data.manifest import (
    FORMAT_VERSION,
    DatasetInfo,
    ShardEntry,
    TokenizerInfo,
    dtype_for,
)
from openlm_lite.data.plan import (
    Plan,
    PrepareConfig,
    blocks_of,
    check_config,
    fingerprint_of,
    make_plan,
    settings_of,
    weights_of,
)
from openlm_lite.data.pool import Progress
from openlm_lite.data.prepare_out import Place, ResumableError
from openlm_lite.data.prepare_report import PrepareReport
from openlm_lite.data.read import read_documents
from openlm_lite.data.shards import npy_dtype, shard_bytes
from openlm_lite.data.spill import PieceReport, SpillConfig
from openlm_lite.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from openlm_lite.errors import InputError

EachDone = Callable[[Callable[..., Any], Sequence[Any], tuple[Any, ...], int], Iterator[Any]]
# Text that a new tokenizer is trained on: as much from the start of each piece as fits in this.
TOKENIZER_SAMPLE_BYTES = 256 << 20


@dataclass(frozen=True)
class _Work:
    """What is to be done, settled before anything is written."""

    cfg: PrepareConfig
    place: Place
    plan: Plan
    tokenizer: Tokenizer | None  # None: to be trained
    filters: Filters
    settings: dict[str, Any]
    fingerprint: str


def prepare(cfg: PrepareConfig) -> PrepareReport:
    """Make the dataset(s) that `cfg` describes, or finish a run that was stopped.

    Raises InputError for bad settings, inputs, tokenizer or out folder, before anything is written
    there; for a bad document, after which nothing is left there; and for a full disk, after which
    the same command goes on.
    """
    started = time.monotonic()
    if cfg.executor == "local" and cfg.workers != 1:
        pool.get_ready(__name__)
    work = _work(cfg)
    place = work.place
    if prepare_out.is_finished(place, work.fingerprint):
        report = replace(prepare_report.read_back(place), already_done=True)
        shutil.rmtree(place.scratch, ignore_errors=True)
        return report
    existed = os.path.isdir(place.folder)
    prepare_out.check_out(place, work.fingerprint)
    try:
        os.makedirs(place.scratch, exist_ok=True)
        with prepare_out.lock(place.scratch), ExitStack() as stack:
            storage.write_json(
                os.path.join(place.scratch, "plan.json"), {"fingerprint": work.fingerprint}
            )
            each_done, workers = pool.each_done, cfg.workers or os.cpu_count() or 1
            if cfg.executor == "ray":
                stack.enter_context(prepare_ray.cluster(cfg.ray_address, cfg.workers))
                each_done, workers = prepare_ray.each_done, cfg.workers
            beside = stack.enter_context(ThreadPoolExecutor(1))
            n_tokens = _run(work, each_done, workers, beside)
    except ResumableError:
        raise
    except InputError:
        prepare_out.discard(place, existed)
        raise
    except OSError as e:
        if storage.is_disk_full(e):
            raise ResumableError(
                f"{place.out}: no space left on the disk (or quota); free some and run the same "
                "command again: it goes on where it was"
            ) from None
        raise
    report = prepare_report.read_back(place)
    shutil.rmtree(place.scratch, ignore_errors=True)
    seconds = time.monotonic() - started
    return replace(report, seconds=seconds, tokens_per_second=n_tokens / seconds)


def _work(cfg: PrepareConfig) -> _Work:
    """Check and read all that was asked for. Raises InputError; writes nothing."""
    check_config(cfg)
    place = prepare_out.place_for(cfg)
    # a trained tokenizer is known only later; what it is trained on is in the fingerprint
    tokenizer = load_tokenizer(cfg.tokenizer, eot=cfg.eot) if cfg.tokenizer is not None else None
    plan = make_plan(cfg.inputs, cfg.out, weights_of(cfg))
    ngrams = read_ngrams(cfg.decontaminate, cfg.decontaminate_ngram)
    settings = settings_of(cfg)
    fingerprint = fingerprint_of(
        settings,
        plan,
        None if tokenizer is None else [tokenizer.fingerprint, tokenizer.eot_id],
        None if ngrams is None else ngrams.fingerprint,
    )
    filters = Filters(cfg.min_characters, cfg.min_tokens, ngrams)
    return _Work(cfg, place, plan, tokenizer, filters, settings, fingerprint)


def _run(work: _Work, each_done: EachDone, workers: int, beside: ThreadPoolExecutor) -> int:
    """All stages, inside the lock; returns the number of tokens that were made."""
    cfg, place, plan = work.cfg, work.place, work.plan
    tokenizer = work.tokenizer
    if tokenizer is None:
        tokenizer = _trained_tokenizer(cfg, plan, os.path.join(place.scratch, "tokenizer"))
    tokenizer_saved = beside.submit(prepare_out.save_tokenizer, place, tokenizer)
    if place.is_remote:  # before the long work: so that a place that takes no files is found now
        tokenizer_saved.result()
        for split in place.splits:
            prepare_out.give_tokenizer(place, split)
    dtype = dtype_for(tokenizer.vocab_size)
    skip_bad = cfg.on_bad_document == "skip"
    spill_cfg = SpillConfig(
        place.scratch, cfg.text_field, cfg.seed, cfg.val_fraction, dtype, cfg.dedup, skip_bad
    )
    reports, n_tokens = _tokenise(plan, (tokenizer, work.filters, spill_cfg), each_done, workers)
    if cfg.dedup:
        reports = _deduplicate(plan, reports, spill_cfg, each_done, workers)
    cells = {split: gather.gather_cells(reports, split, spill_cfg) for split in place.splits}
    _check_enough(cells, reports, cfg)
    block_tokens, blocks_per_shard = blocks_of(cfg)
    jobs = {
        split: gather.shard_jobs(
            cells[split],
            split,
            folder=place.folder_of(split),
            url=place.url_of(split),
            marks=os.path.join(place.scratch, f"{split}-shards"),
            block_tokens=block_tokens,
            blocks_per_shard=blocks_per_shard,
            dtype=dtype,
            pack_seed=cfg.seed if cfg.pack == "best-fit" else None,
        )
        for split in cells
    }
    tables = {split: cells[split].tables for split in cells}
    entries = _write_shards(jobs, tables, place, each_done, workers)
    dropped = prepare_report.dropped_in(reports)
    prepare_out.write_report(place, prepare_report.facts_of(reports, place.splits))
    tokenizer_saved.result()
    for split in reversed(place.splits):  # train last: its dataset.json says that all is done
        info = DatasetInfo(
            format_version=FORMAT_VERSION,
            block_tokens=block_tokens,
            dtype=dtype,
            tokenizer=TokenizerInfo(
                tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eot_id
            ),
            n_documents=sum(n for r in reports for n, _ in r.counts[split].values()),
            n_empty_documents=dropped.get("empty", 0),
            n_tokens=sum(entry.num_tokens for entry in entries[split]),
            n_tokens_dropped=(
                (cells[split].n_tokens - 1) % block_tokens if cfg.pack == "none" else 0
            ),
            sources=_sources(plan, reports, split),
            config={**work.settings, "split": split},
            fingerprint=work.fingerprint,
            seed=cfg.seed,
        )
        prepare_out.finish_split(place, split, entries[split], info)
    return n_tokens


# --- the stages ----------------------------------------------------------------------------------


def _trained_tokenizer(cfg: PrepareConfig, plan: Plan, folder: str) -> Tokenizer:
    """Train the BPE on a sample of the documents, once; later runs find it in the scratch."""
    assert cfg.train_tokenizer is not None
    if not os.path.exists(os.path.join(folder, "tokenizer_config.json")):  # it is written last
        trained = train_bpe(_tokenizer_sample(plan, cfg), cfg.train_tokenizer)
        trained.save(folder)
    return replace(load_tokenizer(folder), name=f"bpe-{cfg.train_tokenizer}")


def _tokenizer_sample(plan: Plan, cfg: PrepareConfig) -> Iterator[str]:
    """Documents from the start of every piece, TOKENIZER_SAMPLE_BYTES characters in all."""
    skip = (lambda _: None) if cfg.on_bad_document == "skip" else None
    budget = TOKENIZER_SAMPLE_BYTES // max(1, len(plan.pieces))
    for piece in plan.pieces:
        left = budget
        for span in piece.spans:
            if left <= 0:
                break
            for document in read_documents(
                span.path,
                span.format,
                text_field=cfg.text_field,
                start=span.start,
                stop=span.stop,
                on_bad=skip,
            ):
                yield document.text[:left]
                left -= len(document.text)
                if left <= 0:
                    break


def _tokenise(
    plan: Plan, shared: tuple[Tokenizer, Filters, SpillConfig], each_done: EachDone, workers: int
) -> tuple[list[PieceReport], int]:
    """The reports of all pieces, those of an earlier run included, and the tokens of this run."""
    cfg = shared[-1]
    reports = {piece.number: spill.finished_piece(piece.number, cfg) for piece in plan.pieces}
    left = [piece for piece in plan.pieces if reports[piece.number] is None]
    progress = Progress("tokenise", sum(piece.bytes for piece in left), "B")
    n_tokens = 0
    try:
        for piece, report in each_done(spill.tokenise_piece, left, shared, workers):
            reports[piece.number] = report
            n_tokens += report.n_tokens
            progress.add(piece.bytes, report.n_tokens)
    finally:
        progress.close()
    return [report for report in reports.values() if report is not None], n_tokens


def _deduplicate(
    plan: Plan, reports: list[PieceReport], cfg: SpillConfig, each_done: EachDone, workers: int
) -> list[PieceReport]:
    """Find the duplicates cell by cell, then take them out piece by piece."""
    tables = dedup.content_tables(reports, cfg)
    n_cells = dedup.count_cells(tables)
    cells = [cell for cell in range(n_cells) if not dedup.cell_done(cell, cfg)]
    progress = Progress("find duplicates", len(cells), "cells")
    try:
        for _ in each_done(dedup.find_duplicates, cells, (n_cells, tables, cfg), workers):
            progress.add(1, 0)
    finally:
        progress.close()
    kept = {p.number: spill.finished_piece(p.number, cfg, "kept") for p in plan.pieces}
    left = [piece for piece in plan.pieces if kept[piece.number] is None]
    progress = Progress("drop duplicates", len(left), "pieces")
    try:
        for piece, report in each_done(dedup.drop_duplicates, left, (n_cells, cfg), workers):
            kept[piece.number] = report
            progress.add(1, 0)
    finally:
        progress.close()
    return [report for report in kept.values() if report is not None]


def _check_enough(
    cells: dict[str, Cells], reports: Sequence[PieceReport], cfg: PrepareConfig
) -> None:
    """Raises InputError unless every split fills a block."""
    if all(stream.n_tokens == 0 for stream in cells.values()):
        dropped = ", ".join(
            f"{reason}: {n:,}" for reason, n in prepare_report.dropped_in(reports).items()
        )
        why = f" that is kept (dropped: {dropped})" if dropped else ""
        raise InputError(f"{', '.join(cfg.inputs)}: the inputs hold no documents with text{why}")
    for split, stream in cells.items():
        least = cfg.block_tokens if cfg.pack == "none" else 0  # a packed row may be padded
        if stream.n_tokens <= least:
            what = "the corpus" if len(cells) == 1 else f"the {split} split"
            remedy = f"a --block-tokens of at most {max(1, stream.n_tokens - 1)}"
            if split == "val":
                remedy += f", a --val-fraction above {cfg.val_fraction}"
            raise InputError(
                f"{what} has {stream.n_tokens} tokens, which do not fill one block of "
                f"{cfg.block_tokens} + 1; give more text, {remedy}"
            )


def _write_shards(
    jobs: dict[str, list[ShardJob]],
    tables: dict[str, tuple[str, ...]],
    place: Place,
    each_done: EachDone,
    workers: int,
) -> dict[str, list[ShardEntry]]:
    """The manifest lines of all shards, those of an earlier run included."""
    done: dict[str, ShardEntry] = {}
    left: list[ShardJob] = []
    for job in (job for split in jobs.values() for job in split):
        os.makedirs(os.path.dirname(job.path), exist_ok=True)
        os.makedirs(os.path.dirname(job.mark), exist_ok=True)
        entry = gather.finished_shard(job)
        if entry is None:
            left.append(job)
        else:
            done[job.path] = entry
    sizes = [shard_bytes(j.n_blocks, j.block_tokens + 1, npy_dtype(j.dtype)) for j in left]
    # those that are sent elsewhere are here for a moment only
    needed = max(sizes, default=0) * max(1, workers) if place.is_remote else sum(sizes)
    free = shutil.disk_usage(place.folder).free
    if needed > free:
        raise ResumableError(
            f"{place.folder}: the shards need {needed:,} bytes, the disk has {free:,} free; free "
            "some and run the same command again: it goes on where it was"
        )
    progress = Progress("write shards", len(left), "shards")
    try:
        for job, entry in each_done(gather.write_shard_job, left, (tables,), workers):
            done[job.path] = entry
            progress.add(1, entry.num_tokens)
    except InputError as e:
        if place.is_remote:  # the store refuses a shard: no reason to lose the work
            raise ResumableError(f"{e}; then run the same command again") from None
        raise
    finally:
        progress.close()
    entries = {split: [done[job.path] for job in mine] for split, mine in jobs.items()}
    # a packed document longer than a shard leaves the next one empty
    return {split: [e for e in mine if e.num_sequences] for split, mine in entries.items()}


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
