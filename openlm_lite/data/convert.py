"""`openlm prepare --from-shards`: OpenLM's and DCLM's shards into our own.

    shard_00000000.tar  8,192 x [2,049 ids] as text   ->   shard-000000.tar  8,192 blocks of 2,048

Their rows were shuffled after they were cut, without an overlap: a row and the next have nothing to
do with each other. So one row is one block (or, with a smaller --block-tokens, several), shard for
shard, in the same order, and every token that was trained on before is trained on now. What joins
rows to longer blocks would join strangers; there is no such option.

Where the work is done, kept and sent is prepare_out.py's: a run that was killed goes on where it
was, OUT may be a URL, and dataset.json comes last; a folder without it is not a dataset.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from openlm_lite import storage
from openlm_lite.data import manifest as manifest_module
from openlm_lite.data import prepare_out
from openlm_lite.data.dataset import Dataset
from openlm_lite.data.manifest import (
    DTYPES,
    INFO_NAME,
    MANIFEST_NAME,
    DatasetInfo,
    ShardEntry,
    TokenizerInfo,
    dtype_for,
)
from openlm_lite.data.openlm_shards import UNKNOWN_TOKENIZER, OpenLMOptions, load_openlm
from openlm_lite.data.plan import PrepareConfig
from openlm_lite.data.pool import Progress, each_done
from openlm_lite.data.prepare_out import Place, ResumableError
from openlm_lite.data.shards import npy_dtype, write_shard
from openlm_lite.data.tokenizer import load_tokenizer
from openlm_lite.errors import InputError

_SPLIT = "train"


@dataclass(frozen=True)
class ConvertReport:
    """What `convert_shards` made, or found already made (then `already_done`)."""

    path: str
    n_shards: int
    n_blocks: int
    n_tokens: int
    block_tokens: int
    dtype: str
    tokenizer: str
    vocab_size: int  # without a tokenizer: the largest id + 1
    already_done: bool = field(default=False, compare=False)
    seconds: float = field(default=0.0, compare=False)


class _Done(NamedTuple):
    """One shard of the new dataset."""

    entry: ShardEntry
    largest_id: int
    too_wide: bool  # not written: an id does not fit the dtype


def convert_shards(
    folder: str,
    out: str,
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    block_tokens: int | None = None,
    pad_id: int | None = None,
    eot_id: int | None = None,
    workers: int = 0,
    scratch: str | None = None,
) -> ConvertReport:
    """Convert the OpenLM shards in `folder` to the dataset `out` (paths or URLs), or finish that.

    `tokenizer` (as for `openlm prepare`) is recorded and its vocabulary enforced; without one
    `vocab_size` is enforced, and without both the ids decide. `block_tokens` divides the rows'
    length (default: that length). `pad_id` and `eot_id` as in OpenLMOptions. `workers` processes,
    0: all cores. `scratch`: see PrepareConfig. Raises InputError; what is done so far stays for the
    same command, or one with another vocabulary, to go on.
    """
    started = time.monotonic()
    known = None if tokenizer is None else load_tokenizer(tokenizer)
    if known is not None:
        name, vocab_size = known.name, known.vocab_size
        made_by = TokenizerInfo(name, known.fingerprint, vocab_size, known.eot_id)
    else:
        made_by = replace(UNKNOWN_TOKENIZER, vocab_size=vocab_size, eot_id=eot_id)
    _loaded.cache_clear()
    options = OpenLMOptions(made_by, pad_id=pad_id, eot_id=eot_id, threads=1)
    source = load_openlm(folder, options)
    block_tokens = source.block_tokens if block_tokens is None else block_tokens
    if block_tokens < 1 or source.block_tokens % block_tokens:
        raise InputError(
            f"--block-tokens {block_tokens}: does not divide the {source.block_tokens} tokens of a "
            f"row of {folder}; rows are not contiguous, so a block cannot hold several"
        )
    place = prepare_out.place_for(PrepareConfig(inputs=(folder,), out=out, scratch=scratch))
    settings = {
        "format": "openlm",
        "manifest_sha256": source.manifest_sha256,
        "block_tokens": block_tokens,
        "pad_id": pad_id,
        "eot_id": eot_id,
    }
    fingerprint = _fingerprint([settings, asdict(made_by)])
    # shards that are done serve another vocabulary too: `_marked` compares their ids with it
    unfinished = _fingerprint([settings, "tokenizer" if known is not None else "ids alone"])
    if prepare_out.is_finished(place, fingerprint):
        return _leave(place, already_done=True)
    existed = os.path.isdir(place.folder)
    prepare_out.check_out(place, unfinished)
    os.makedirs(place.scratch, exist_ok=True)
    os.makedirs(place.folder, exist_ok=True)
    with prepare_out.lock(place.scratch):
        storage.write_json(os.path.join(place.scratch, "plan.json"), {"fingerprint": unfinished})
        if known is not None:
            prepare_out.save_tokenizer(place, known)
            if place.is_remote:  # so that a place that takes no files is found before the work
                prepare_out.give_tokenizer(place, _SPLIT)
        try:
            dtype, done = _convert_all(source, folder, options, place, block_tokens, workers)
        except ResumableError:
            raise
        except InputError:
            if not _marks(place):  # nothing to go on from: other settings may be tried
                prepare_out.discard(place, existed)
            raise
        info = replace(
            source.info,
            block_tokens=block_tokens,
            dtype=dtype,
            tokenizer=replace(made_by, vocab_size=vocab_size or _vocab_size(done)),
            config={**settings, "source": folder},
            fingerprint=fingerprint,
        )
        prepare_out.finish_split(place, _SPLIT, [shard.entry for shard in done], info)
    return _leave(place, seconds=time.monotonic() - started)


def _leave(place: Place, already_done: bool = False, seconds: float = 0.0) -> ConvertReport:
    """The report of the finished dataset; the scratch folder goes."""
    report = _report(place)
    shutil.rmtree(place.scratch, ignore_errors=True)
    return replace(report, already_done=already_done, seconds=seconds)


def _fingerprint(of: list[Any]) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def _vocab_size(done: list[_Done]) -> int:
    return 1 + max(shard.largest_id for shard in done)


def _convert_all(
    source: Dataset,
    folder: str,
    options: OpenLMOptions,
    place: Place,
    block_tokens: int,
    workers: int,
) -> tuple[str, list[_Done]]:
    """(dtype, all shards): the narrow dtype if the vocabulary, or else every id, fits it."""
    vocab_size = options.tokenizer.vocab_size
    dtypes = sorted(DTYPES) if vocab_size is None else [dtype_for(vocab_size)]
    for dtype in dtypes:
        done = _convert_as(dtype, source, folder, options, place, block_tokens, workers)
        if done is not None:
            return dtype, done
    raise AssertionError("every id fits the widest dtype")


def _convert_as(
    dtype: str,
    source: Dataset,
    folder: str,
    options: OpenLMOptions,
    place: Place,
    block_tokens: int,
    workers: int,
) -> list[_Done] | None:
    """All shards as this dtype, those of an earlier run included; None if an id does not fit."""
    entries = source.manifest.shards
    limit = options.tokenizer.vocab_size
    done = {n: _marked(place, n, dtype, limit) for n in range(len(entries))}
    left = [n for n, shard in done.items() if shard is None]
    progress = Progress("convert", len(left), "shards")
    shared = (folder, replace(options, row_ids=source.block_tokens + 1), place, block_tokens, dtype)
    try:
        for number, shard in each_done(_convert_shard, left, shared, workers or _cores()):
            if shard.too_wide:
                return None
            done[number] = shard
            progress.add(1, shard.entry.num_tokens)
    except OSError as e:
        if storage.is_disk_full(e):
            raise ResumableError(
                f"{place.out}: no space left on the disk (or quota); free some and run the same "
                "command again: it goes on where it was"
            ) from None
        raise
    finally:
        progress.close()
    return [shard for shard in done.values() if shard is not None]


def _cores() -> int:
    return os.cpu_count() or 1


def _convert_shard(
    number: int, folder: str, options: OpenLMOptions, place: Place, block_tokens: int, dtype: str
) -> _Done:
    """Decode one shard, write it (and send it, where OUT is a URL) and mark it done."""
    source = _loaded(folder, options)
    rows = source.blocks(number)
    entry = ShardEntry(f"shard-{number:06d}", 0, 0, 0, 0)
    largest = int(rows.max())
    if largest > np.iinfo(dtype).max:
        return _Done(entry, largest, True)
    per_row = source.block_tokens // block_tokens
    wide = npy_dtype(dtype)
    blocks = (
        row[start : start + block_tokens + 1].astype(wide)
        for row in rows
        for start in range(0, source.block_tokens, block_tokens)
    )
    path = os.path.join(place.folder, entry.file_name)
    first = sum(e.num_sequences for e in source.manifest.shards[:number]) * per_row
    count, size, crc = write_shard(path, first, blocks)
    entry = ShardEntry(entry.shard, count, count * block_tokens, size, crc)
    url = place.url_of(_SPLIT)
    if url is not None:
        storage.put_file(path, f"{url}/{entry.file_name}")
        os.unlink(path)
    storage.write_json(
        _mark(place, number), {"dtype": dtype, "largest_id": largest, "entry": asdict(entry)}
    )
    return _Done(entry, largest, False)


@functools.lru_cache(maxsize=1)
def _loaded(folder: str, options: OpenLMOptions) -> Dataset:
    """The source in this worker, with one shard open at a time."""
    source = load_openlm(folder, options)
    source.max_open_shards = 1
    return source


def _mark(place: Place, number: int) -> str:
    return os.path.join(place.scratch, f"shard-{number:06d}.json")


def _marks(place: Place) -> list[str]:
    return [name for name in os.listdir(place.scratch) if name.startswith("shard-")]


def _marked(place: Place, number: int, dtype: str, vocab_size: int | None) -> _Done | None:
    """A shard that an earlier run finished with this dtype, and whose ids are in the vocabulary."""
    if not os.path.exists(_mark(place, number)):
        return None
    with open(_mark(place, number), encoding="utf-8") as file:
        mark: dict[str, Any] = json.load(file)
    if mark["dtype"] != dtype or (vocab_size is not None and mark["largest_id"] >= vocab_size):
        return None
    entry = ShardEntry(**mark["entry"])
    url = place.url_of(_SPLIT)
    path = (
        os.path.join(place.folder, entry.file_name) if url is None else f"{url}/{entry.file_name}"
    )
    if not storage.exists(path) or storage.size_of(path) != entry.bytes:
        return None
    return _Done(entry, mark["largest_id"], False)


def _report(place: Place) -> ConvertReport:
    """Read back what stands in the finished folder."""
    info: DatasetInfo = manifest_module.load_info(os.path.join(place.folder, INFO_NAME))
    shards = manifest_module.load_manifest(os.path.join(place.folder, MANIFEST_NAME)).shards
    return ConvertReport(
        path=place.named(_SPLIT),
        n_shards=len(shards),
        n_blocks=sum(entry.num_sequences for entry in shards),
        n_tokens=info.n_tokens,
        block_tokens=info.block_tokens,
        dtype=info.dtype,
        tokenizer=info.tokenizer.name,
        vocab_size=info.tokenizer.vocab_size or 0,
    )
