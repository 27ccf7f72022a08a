"""The shards of OpenLM and DCLM as they are: tars of lists of token ids, decoded shard by shard.

    manifest.jsonl    {"shard": "shard_00000000", "num_sequences": 8192} per line; old ones have
                      num_chunks; with or without a final newline; there is no dataset.json
    shard_*.tar       members x.json.gz, x.json or x.txt: "[5, 17, …]", 2,049 ids each

    load_openlm(folder) -> Dataset      one member = one block: 2,048 tokens and the last target
        blocks(shard)                   headers walked, members inflated and parsed -> ids_BI

So any sequence length that divides 2,048 trains on them, in the same order, by the same reader as
on our own shards. A shard is decoded as a whole when it is first needed (a second per 16M ids and
core, see decode_ids.py) and kept in memory, 34 MB for 8,192 rows of ids below 65,536, twice that
above; the Dataset drops the one that was used longest ago beyond `max_open_shards`. It is not
written anywhere: who reads the data more than once or from many processes per node converts it
(`openlm prepare --from-shards`), which takes as long as reading it once.

What these shards lack: sums (only json.gz has one, per member), the tokenizer, the vocabulary. A
bit that flips one digit into another in a .json or .txt cannot be noticed.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from openlm_lite import storage
from openlm_lite.data import decode_ids
from openlm_lite.data import manifest as manifest_module
from openlm_lite.data.cache import Cache
from openlm_lite.data.dataset import Dataset
from openlm_lite.data.decode_ids import ROWS_AT_ONCE, BadRowError
from openlm_lite.data.fetch import RemoteShards
from openlm_lite.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DatasetInfo,
    Manifest,
    ShardEntry,
    TokenizerInfo,
    dtype_for,
)
from openlm_lite.data.shards import check_crc32, check_size, damaged
from openlm_lite.data.tar_index import TarIndex, index_tar
from openlm_lite.errors import InputError

_ENDINGS = (".json.gz", ".json", ".txt", ".txt.gz")
_SHARDS_TO_ASK = 4
UNKNOWN_TOKENIZER = TokenizerInfo("unknown", None, None, None)


@dataclass(frozen=True)
class OpenLMOptions:
    """What the shards do not say about themselves."""

    tokenizer: TokenizerInfo = UNKNOWN_TOKENIZER
    pad_id: int | None = None  # fills up rows that are shorter than the first; None: an error
    eot_id: int | None = None  # for the text "<|endoftext|>" among the ids; None: an error
    row_ids: int | None = None  # ids per row, targets included; None: those of the first row
    threads: int = min(4, os.cpu_count() or 1)  # that decode one shard

    def __post_init__(self) -> None:
        for name in ("pad_id", "eot_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= decode_ids.MAX_ID:
                raise InputError(f"{name}: {value} is no token id; allowed are 0 to 2**32 - 1")
        if self.threads < 1 or (self.row_ids is not None and self.row_ids < 2):
            raise InputError(
                f"threads {self.threads}, row_ids {self.row_ids}: needed are at least 1 and 2"
            )


class OpenLMDataset(Dataset):
    """A Dataset that decodes what is wanted next in a thread of its own."""

    _ahead: Sequence[int] = ()
    _thread: threading.Thread | None = None

    @property
    def reads_ahead(self) -> bool:
        """Always: a shard is decoded before it is read."""
        return True

    def want(self, shards: Sequence[int]) -> None:
        """Have these shards fetched and decoded meanwhile, the next first.

        At most as many as may be open: a window of the order needs all of its shards at once.
        """
        super().want(shards)
        with self._lock:
            closed = [shard for shard in shards if shard not in self._open]
            self._ahead = closed[: self.max_open_shards // 2]
            if self._ahead and self._thread is None:
                self._thread = threading.Thread(target=self._decode_ahead, daemon=True)
                self._thread.start()

    def _decode_ahead(self) -> None:
        while True:
            with self._lock:
                if not self._ahead:
                    self._thread = None
                    return
                shard, self._ahead = self._ahead[0], self._ahead[1:]
            with suppress(Exception):  # whoever reads the shard will meet it again
                self.blocks(shard)


class OpenLMShards:
    """The function that opens a Dataset's shards; `find` gives a local file for a file name."""

    def __init__(
        self,
        entries: Sequence[ShardEntry],
        row_ids: int,
        options: OpenLMOptions,
        find: Callable[[str], str],
    ) -> None:
        self.entries = entries
        self.row_ids = row_ids
        self.options = options
        self.find = find

    def __call__(self, shard: int, verify: bool) -> np.ndarray:
        """ids_BI [num_sequences, row_ids], uint16 where all of them fit, else uint32; read-only.

        Everything is always checked but, without `verify`, the crc32 of a manifest that has one.
        Raises InputError with shard, member and offset.
        """
        entry = self.entries[shard]
        path = self.find(entry.file_name)
        check_size(path, entry)
        data = _mapped(path)
        if verify and entry.crc32 is not None:
            check_crc32(path, data, entry)
        index = index_tar(path, data)
        if len(index.names) != entry.num_sequences:
            raise InputError(
                f"{path}: holds {len(index.names)} sequences up to byte {len(data)}, but the "
                f"manifest says {entry.num_sequences}; correct the manifest or restore the shard"
            )
        return _decode_all(path, data, index, self.row_ids, self.options)


def load_openlm(
    folder: str, options: OpenLMOptions | None = None, cache: Cache | None = None
) -> Dataset:
    """The dataset of the OpenLM or DCLM shards in `folder`, a path or URL with a manifest.jsonl.

    Looks into the first shard for the length of its rows, unless `options` tells it. Shards of a
    URL are fetched into `cache` (default: the user's cache folder). Raises InputError.
    """
    options = options or OpenLMOptions()
    lines, sha256 = manifest_module.load_openlm_manifest(os.path.join(folder, MANIFEST_NAME))
    if storage.is_remote(folder):
        remote = RemoteShards(folder, lines, cache or Cache())
        find = remote.path_of
        sizes = [line.bytes for line in lines]
    else:
        remote = None
        find = partial(storage.safe_join, folder)
        sizes = [_size(find(line.file_name), line) for line in lines]
    row_ids = options.row_ids or _row_length(lines, find, options)
    entries = tuple(
        replace(line, num_tokens=line.num_sequences * (row_ids - 1), bytes=size)
        for line, size in zip(lines, sizes, strict=True)
    )
    vocab_size = options.tokenizer.vocab_size
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        block_tokens=row_ids - 1,
        dtype="uint32" if vocab_size is None else dtype_for(vocab_size),
        tokenizer=options.tokenizer,
        n_documents=0,  # nobody counted them
        n_empty_documents=0,
        n_tokens=sum(entry.num_tokens for entry in entries),
        n_tokens_dropped=0,
        sources=({"path": folder, "format": "openlm"},),
        config={"format": "openlm", "pad_id": options.pad_id, "eot_id": options.eot_id},
        fingerprint=sha256,
        seed=0,
    )
    manifest = Manifest(os.path.join(folder, MANIFEST_NAME), entries, sha256)
    shards = OpenLMShards(entries, row_ids, options, find)
    return OpenLMDataset(folder, manifest, info, shards, remote)


def _size(path: str, line: ShardEntry) -> int | None:
    """What the manifest says, else what is there; None for a missing shard, an error once read."""
    if line.bytes is None and os.path.exists(path):
        return os.path.getsize(path)
    return line.bytes


def _row_length(
    lines: Sequence[ShardEntry], find: Callable[[str], str], options: OpenLMOptions
) -> int:
    """Ids in the first row of the first shard that can be read.

    A bad shard is reported when it is read or verified; here it only cannot tell. Raises
    InputError, of the first, if several are bad.
    """
    first: InputError | None = None
    for line in lines[:_SHARDS_TO_ASK]:
        try:
            return _first_length(find(line.file_name), options)
        except InputError as e:
            first = first or e
    assert first is not None
    raise first


def _mapped(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise damaged(path, 0, "the file is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data.madvise(mmap.MADV_WILLNEED)
    return data


def _first_length(path: str, options: OpenLMOptions) -> int:
    if not os.path.exists(path):
        raise InputError(f"{path}: this shard of the manifest is missing; restore it")
    data = _mapped(path)
    index = index_tar(path, data)
    if not index.names:
        raise InputError(f"{path}: holds no sequence; remove it and its line in the manifest")
    text = _texts(path, data, index, range(1), None, decode_ids.inflate_module())[0]
    try:
        length = len(decode_ids.decode_row_slowly(text, options.eot_id))
    except BadRowError as e:
        raise _bad_row(path, index, 0, str(e)) from None
    if length < 2:
        raise _bad_row(path, index, 0, f"{length} ids; a row has at least two")
    return length


def _decode_all(
    path: str, data: mmap.mmap, index: TarIndex, row_ids: int, options: OpenLMOptions
) -> np.ndarray:
    """The ids of all members, [M, row_ids], decoded by some threads (numpy and zlib let go)."""
    limit = options.tokenizer.vocab_size or decode_ids.MAX_ID + 1
    out = np.empty((len(index.names), row_ids), dtype_for(limit))
    inflate = decode_ids.inflate_module()

    def decode(first: int) -> int:
        rows = range(first, min(first + ROWS_AT_ONCE, len(out)))
        texts = _texts(path, data, index, rows, row_ids, inflate)
        ids = decode_ids.decode_rows(texts, row_ids, options.eot_id)
        if ids is None:
            ids = np.stack(
                [
                    _odd_row(path, index, row, text, row_ids, options)
                    for row, text in zip(rows, texts, strict=True)
                ]
            )
        largest = int(ids.max())
        if largest >= limit:
            row, column = np.argwhere(ids >= limit)[0].tolist()
            raise _bad_row(
                path,
                index,
                first + row,
                f"token id {ids[row, column]} (item {column}) is outside the vocabulary of {limit} "
                f"ids ({options.tokenizer.name})",
            )
        out[first : rows.stop] = ids
        return largest

    with ThreadPoolExecutor(options.threads, "openlm-decode") as pool:
        try:
            largest = max(pool.map(decode, range(0, len(out), ROWS_AT_ONCE)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if out.itemsize > 2 and largest < 1 << 16:
        out = out.astype(np.uint16)
    out.flags.writeable = False
    return out


def _odd_row(
    path: str, index: TarIndex, row: int, text: bytes, row_ids: int, options: OpenLMOptions
) -> np.ndarray:
    """One row that is not in the plain form, or is too short."""
    plain = decode_ids.decode_rows([text], row_ids, options.eot_id)
    if plain is not None:
        return plain[0]
    try:
        ids = decode_ids.decode_row_slowly(text, options.eot_id)
    except BadRowError as e:
        raise _bad_row(path, index, row, str(e)) from None
    if len(ids) == row_ids:
        return ids
    what = f"{len(ids)} ids, where the rows of this data have {row_ids}"
    if len(ids) > row_ids:
        raise _bad_row(path, index, row, what)
    if options.pad_id is None:
        raise _bad_row(path, index, row, what + "; give pad_id to fill up such rows with it")
    filled = np.full(row_ids, options.pad_id, np.uint64)
    filled[: len(ids)] = ids
    return filled


def _texts(
    path: str,
    data: mmap.mmap,
    index: TarIndex,
    rows: Sequence[int],
    row_ids: int | None,
    inflate: Any,
) -> list[bytes]:
    """The text of these members."""
    texts: list[bytes] = []
    for row in rows:
        name, start = index.names[row], int(index.offsets_M[row])
        size, limit = int(index.sizes_M[row]), decode_ids.most_bytes(row_ids)
        if not name.endswith(_ENDINGS):
            raise _bad_row(
                path,
                index,
                row,
                f"its name ends in none of {', '.join(_ENDINGS)}",
            )
        if size > limit:  # before it is copied
            raise _bad_row(path, index, row, f"{size} bytes, more than {limit} bytes of text")
        content = data[start : start + size]
        if name.endswith(".gz"):
            try:
                content = decode_ids.inflate(inflate, content, row_ids)
            except BadRowError as e:
                raise _bad_row(path, index, row, str(e)) from None
        texts.append(content)
    return texts


def _bad_row(path: str, index: TarIndex, row: int, what: str) -> InputError:
    place = f"member {row}, {index.names[row]!r}, byte {int(index.offsets_M[row])}"
    return InputError(f"{path}: {place}: {what}; restore the shard or correct this member")
