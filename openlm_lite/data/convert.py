"""`openlm prepare --from-shards`: OpenLM's and DCLM's shards into our own.

    shard_00000000.tar  8,192 x [2,049 ids] as text   ->   shard-000000.tar  8,192 blocks of 2,048

Their rows were shuffled after they were cut, without an overlap: a row and the next have nothing to
do with each other. So one row is one block (or, with a smaller --block-tokens, several), shard for
shard, in the same order, and every token that was trained on before is trained on now. What joins
rows to longer blocks would join strangers; there is no such option.

A run that was killed goes on where it was: shards that are marked done in OUT/.convert are kept.
The dataset.json comes last; a folder without it is not a dataset.
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
from openlm_lite.data.pool import Progress, each_done
from openlm_lite.data.prepare_out import lock
from openlm_lite.data.shards import npy_dtype, write_shard
from openlm_lite.data.tokenizer import load_tokenizer
from openlm_lite.errors import InputError

_SCRATCH = ".convert"


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
) -> ConvertReport:
    """Convert the OpenLM shards in `folder` (path or URL) to the dataset `out`, or finish that.

    `tokenizer` (as for `openlm prepare`) is recorded and its vocabulary enforced; without one
    `vocab_size` is enforced, and without both the ids decide. `block_tokens` divides the rows'
    length (default: that length). `pad_id` and `eot_id` as in OpenLMOptions. `workers` processes,
    0: all cores. Raises InputError; what is done so far stays for the same command to go on.
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
    out = storage.local_path(out)
    settings = {
        "format": "openlm",
        "manifest_sha256": source.manifest_sha256,
        "block_tokens": block_tokens,
        "pad_id": pad_id,
        "eot_id": eot_id,
    }
    key = json.dumps([settings, asdict(made_by)], sort_keys=True)
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    if _is_finished(out, fingerprint):
        return replace(_report(out), already_done=True)
    scratch = os.path.join(out, _SCRATCH)
    os.makedirs(scratch, exist_ok=True)
    with lock(scratch):
        storage.write_json(os.path.join(scratch, "plan.json"), {"fingerprint": fingerprint})
        dtype, done = _convert_all(source, folder, options, out, block_tokens, workers)
        if known is not None:
            known.save(out)
        info = replace(
            source.info,
            block_tokens=block_tokens,
            dtype=dtype,
            tokenizer=replace(made_by, vocab_size=vocab_size or _vocab_size(done)),
            config={**settings, "source": folder},
            fingerprint=fingerprint,
        )
        text = manifest_module.manifest_text([shard.entry for shard in done])
        storage.write_bytes(os.path.join(out, MANIFEST_NAME), text.encode())
        text = manifest_module.info_text(info)
        storage.write_bytes(os.path.join(out, INFO_NAME), text.encode())
    shutil.rmtree(scratch, ignore_errors=True)
    return replace(_report(out), seconds=time.monotonic() - started)


def _vocab_size(done: list[_Done]) -> int:
    return 1 + max(shard.largest_id for shard in done)


def _convert_all(
    source: Dataset, folder: str, options: OpenLMOptions, out: str, block_tokens: int, workers: int
) -> tuple[str, list[_Done]]:
    """(dtype, all shards): the narrow dtype if the vocabulary, or else every id, fits it."""
    vocab_size = options.tokenizer.vocab_size
    dtypes = sorted(DTYPES) if vocab_size is None else [dtype_for(vocab_size)]
    for dtype in dtypes:
        done = _convert_as(dtype, source, folder, options, out, block_tokens, workers)
        if done is not None:
            return dtype, done
    raise AssertionError("every id fits the widest dtype")


def _convert_as(
    dtype: str,
    source: Dataset,
    folder: str,
    options: OpenLMOptions,
    out: str,
    block_tokens: int,
    workers: int,
) -> list[_Done] | None:
    """All shards as this dtype, those of an earlier run included; None if an id does not fit."""
    entries = source.manifest.shards
    done = {n: _marked(out, n, dtype) for n in range(len(entries))}
    left = [n for n, shard in done.items() if shard is None]
    progress = Progress("convert", len(left), "shards")
    shared = (folder, replace(options, row_ids=source.block_tokens + 1), out, block_tokens, dtype)
    try:
        for number, shard in each_done(_convert_shard, left, shared, workers or _cores()):
            if shard.too_wide:
                return None
            done[number] = shard
            progress.add(1, shard.entry.num_tokens)
    except OSError as e:
        if storage.is_disk_full(e):
            raise InputError(
                f"{out}: no space left on the disk (or quota); free some and run the same command "
                "again: it goes on where it was"
            ) from None
        raise
    finally:
        progress.close()
    return [shard for shard in done.values() if shard is not None]


def _cores() -> int:
    return os.cpu_count() or 1


def _convert_shard(
    number: int, folder: str, options: OpenLMOptions, out: str, block_tokens: int, dtype: str
) -> _Done:
    """Decode one shard, write it and mark it done."""
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
    path = os.path.join(out, entry.file_name)
    first = sum(e.num_sequences for e in source.manifest.shards[:number]) * per_row
    count, size, crc = write_shard(path, first, blocks)
    entry = ShardEntry(entry.shard, count, count * block_tokens, size, crc)
    storage.write_json(
        _mark(out, number), {"dtype": dtype, "largest_id": largest, "entry": asdict(entry)}
    )
    return _Done(entry, largest, False)


@functools.lru_cache(maxsize=1)
def _loaded(folder: str, options: OpenLMOptions) -> Dataset:
    """The source in this worker, with one shard open at a time."""
    source = load_openlm(folder, options)
    source.max_open_shards = 1
    return source


def _mark(out: str, number: int) -> str:
    return os.path.join(out, _SCRATCH, f"shard-{number:06d}.json")


def _marked(out: str, number: int, dtype: str) -> _Done | None:
    """A shard that an earlier run finished with this dtype."""
    if not os.path.exists(_mark(out, number)):
        return None
    with open(_mark(out, number), encoding="utf-8") as file:
        mark: dict[str, Any] = json.load(file)
    entry = ShardEntry(**mark["entry"])
    path = os.path.join(out, entry.file_name)
    if mark["dtype"] != dtype or not os.path.exists(path) or os.path.getsize(path) != entry.bytes:
        return None
    return _Done(entry, mark["largest_id"], False)


def _is_finished(out: str, fingerprint: str) -> bool:
    """Whether `out` is this very dataset. Raises InputError if it is anything else but stopped."""
    other = "choose another --out, or remove the folder first"
    if not os.path.exists(out):
        return False
    if not os.path.isdir(out):
        raise InputError(f"{out}: is not a folder; choose another --out")
    if os.path.exists(os.path.join(out, INFO_NAME)):
        if manifest_module.load_info(os.path.join(out, INFO_NAME)).fingerprint == fingerprint:
            shutil.rmtree(os.path.join(out, _SCRATCH), ignore_errors=True)
            return True
        raise InputError(f"{out}: holds a dataset made of other data or settings; {other}")
    scratch = os.path.join(out, _SCRATCH)
    if os.path.exists(os.path.join(scratch, "plan.json")):
        with open(os.path.join(scratch, "plan.json"), encoding="utf-8") as file:
            same = json.load(file)["fingerprint"] == fingerprint
        if not same and any(name.startswith("shard-") for name in os.listdir(scratch)):
            raise InputError(f"{out}: an unfinished run with other data or settings; {other}")
        return False
    names = sorted(name for name in os.listdir(out) if name != _SCRATCH)
    if names:
        raise InputError(f"{out}: is not empty (it holds {', '.join(names[:5])}); {other}")
    return False


def _report(out: str) -> ConvertReport:
    """Read back what stands in the finished folder."""
    info: DatasetInfo = manifest_module.load_info(os.path.join(out, INFO_NAME))
    shards = manifest_module.load_manifest(os.path.join(out, MANIFEST_NAME)).shards
    return ConvertReport(
        path=out,
        n_shards=len(shards),
        n_blocks=sum(entry.num_sequences for entry in shards),
        n_tokens=info.n_tokens,
        block_tokens=info.block_tokens,
        dtype=info.dtype,
        tokenizer=info.tokenizer.name,
        vocab_size=info.tokenizer.vocab_size or 0,
    )
