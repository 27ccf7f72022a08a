"""What stands beside the shards: `manifest.jsonl` (one line per shard) and `dataset.json`.

dataset/
  shard-000000.tar …    blocks of token ids (see shards.py)
  manifest.jsonl        {"shard", "num_sequences", "num_tokens", "bytes", "crc32"} per line
  dataset.json          DatasetInfo: block size, dtype, tokenizer, counts, how it was made
  tokenizer.json        the tokenizer as a Hugging Face fast tokenizer
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from openlm_lite import storage
from openlm_lite.errors import InputError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.jsonl"
INFO_NAME = "dataset.json"
# Two bytes per id where the vocabulary allows it, else four.
DTYPES = {"uint16": 2, "uint32": 4}


def dtype_for(vocab_size: int) -> str:
    """The narrowest dtype whose values cover ids 0 … vocab_size - 1."""
    return "uint16" if vocab_size <= 65_536 else "uint32"


@dataclass(frozen=True)
class ShardEntry:
    """One line of the manifest; a superset of OpenLM's."""

    shard: str  # file name without ".tar", as OpenLM's manifests have it
    num_sequences: int  # blocks
    num_tokens: int  # num_sequences * block_tokens
    # OpenLM's manifests have neither of these
    bytes: int | None  # size of the tar file
    crc32: int | None  # of the whole tar file, as zlib.crc32 gives it

    @property
    def file_name(self) -> str:
        return self.shard if self.shard.endswith(".tar") else self.shard + ".tar"


@dataclass(frozen=True)
class Manifest:
    """The shards of a dataset, in order, and the sha256 (hex) of the manifest file."""

    path: str
    shards: tuple[ShardEntry, ...]
    sha256: str


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids. `vocab_size` counts holes too: every id is below it.

    None is what nobody knows: OpenLM's shards do not say how they were made.
    """

    name: str
    fingerprint: str | None
    vocab_size: int | None
    eot_id: int | None


@dataclass(frozen=True)
class DatasetInfo:
    """`dataset.json`: what the shards hold and how they were made.

    Stream tokens (documents with their EOTs) = n_tokens + 1 + n_tokens_dropped: the 1 is the last
    id, which is only ever a target. Packed data drop nothing, and n_tokens counts their padding.
    """

    format_version: int
    block_tokens: int
    dtype: str
    tokenizer: TokenizerInfo
    n_documents: int
    n_empty_documents: int  # skipped
    n_tokens: int  # = blocks * block_tokens: what one epoch trains on
    n_tokens_dropped: int  # at the tail: they do not fill a block
    sources: tuple[dict[str, Any], ...]  # per input: path, n_files, bytes, n_documents, n_tokens
    config: dict[str, Any]  # the settings of `openlm prepare` that decide the bytes
    fingerprint: str  # sha256 over the config, the tokenizer and the inputs
    seed: int

    @property
    def is_packed(self) -> bool:
        """Whether a block is a row of whole documents and padding (see packing.py)."""
        return self.config.get("pack") == "best-fit"


def manifest_text(shards: list[ShardEntry]) -> str:
    """The content of manifest.jsonl, with a final newline."""
    return "".join(json.dumps(asdict(entry)) + "\n" for entry in shards)


def info_text(info: DatasetInfo) -> str:
    """The content of dataset.json."""
    return json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n"


def load_manifest(path: str) -> Manifest:
    """Read and check `manifest.jsonl`; a missing final newline is fine.

    Raises InputError with file and line for anything else that is off.
    """
    raw = _read(path, "a dataset has a manifest.jsonl; make one with `openlm prepare`")
    shards: list[ShardEntry] = []
    seen: set[str] = set()
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        values = _mapping(line, place)
        entry = ShardEntry(
            shard=_field(values, "shard", str, place),
            num_sequences=_field(values, "num_sequences", int, place),
            num_tokens=_field(values, "num_tokens", int, place),
            bytes=_field(values, "bytes", int, place),
            crc32=_field(values, "crc32", int, place),
        )
        _check_line(path, place, entry, seen)
        shards.append(entry)
    if not shards:
        raise InputError(f"{path}: lists no shard; prepare the dataset again")
    return Manifest(path, tuple(shards), hashlib.sha256(raw).hexdigest())


def load_openlm_manifest(path: str) -> tuple[list[ShardEntry], str]:
    """The lines of a manifest of OpenLM's or DCLM's, `num_tokens` still 0, and the file's sha256.

    `num_sequences`, or `num_chunks` in old ones; `bytes` and `crc32` where a line has them.
    Raises InputError with file and line.
    """
    raw = _read(path, "OpenLM's shards have a manifest.jsonl")
    shards: list[ShardEntry] = []
    seen: set[str] = set()
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        values = _mapping(line, place)
        if "num_tokens" in values:  # ours
            raise InputError(
                f"{os.path.join(os.path.dirname(path), INFO_NAME)}: no such file; it stands beside "
                "what `openlm prepare` made: restore it or prepare the data again"
            )
        old = "num_chunks" in values and "num_sequences" not in values
        shards.append(
            ShardEntry(
                shard=_field(values, "shard", str, place),
                num_sequences=_field(values, "num_chunks" if old else "num_sequences", int, place),
                num_tokens=0,
                bytes=_field(values, "bytes", int, place) if "bytes" in values else None,
                crc32=_field(values, "crc32", int, place) if "crc32" in values else None,
            )
        )
        _check_line(path, place, shards[-1], seen)
    if not shards:
        raise InputError(f"{path}: lists no shard")
    return shards, hashlib.sha256(raw).hexdigest()


def _check_line(path: str, place: str, entry: ShardEntry, seen: set[str]) -> None:
    """What every manifest's lines are held to; adds the shard to those `seen`."""
    storage.safe_join(os.path.dirname(path), entry.file_name)
    if entry.num_sequences < 1:
        raise InputError(f"{place}: num_sequences is {entry.num_sequences}; allowed: >= 1")
    if entry.file_name in seen:
        raise InputError(f"{place}: shard {entry.shard!r} is listed twice; remove one line")
    seen.add(entry.file_name)


def load_info(path: str) -> DatasetInfo:
    """Read and check `dataset.json`. Raises InputError with file and field."""
    raw = _read(path, "a dataset has a dataset.json; make one with `openlm prepare`")
    values = _mapping(raw, path)
    version = _field(values, "format_version", int, path)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {version} is not known here (this version reads "
            f"{FORMAT_VERSION}); prepare the data again or update openlm_lite"
        )
    inner = _field(values, "tokenizer", dict, path)
    place = f"{path}: tokenizer"
    tokenizer = TokenizerInfo(
        name=_field(inner, "name", str, place),
        # null where the ids came from shards that do not tell
        fingerprint=_field(inner, "fingerprint", str, place, optional=True),
        vocab_size=_field(inner, "vocab_size", int, place),
        eot_id=_field(inner, "eot_id", int, place, optional=True),
    )
    kinds = {"dtype": str, "fingerprint": str, "config": dict, "sources": list}
    rest = {
        f.name: _field(values, f.name, kinds.get(f.name, int), path)
        for f in fields(DatasetInfo)
        if f.name not in ("tokenizer", "format_version")
    }
    rest["sources"] = tuple(rest["sources"])
    info = DatasetInfo(format_version=version, tokenizer=tokenizer, **rest)
    if info.dtype not in DTYPES:
        raise InputError(f"{path}: dtype {info.dtype!r} is not known; allowed: {sorted(DTYPES)}")
    if info.block_tokens < 1:
        raise InputError(f"{path}: block_tokens is {info.block_tokens}; allowed: >= 1")
    return info


def check_agree(manifest: Manifest, info: DatasetInfo) -> None:
    """Raises InputError where manifest and dataset.json contradict each other."""
    for entry in manifest.shards:
        if entry.num_tokens != entry.num_sequences * info.block_tokens:
            raise InputError(
                f"{manifest.path}: {entry.shard}: num_tokens {entry.num_tokens} is not "
                f"num_sequences {entry.num_sequences} x block_tokens {info.block_tokens} "
                f"({INFO_NAME}); these files do not belong together: prepare the data again"
            )
    total = sum(entry.num_tokens for entry in manifest.shards)
    if total != info.n_tokens:
        raise InputError(
            f"{manifest.path}: its shards hold {total} tokens, but {INFO_NAME} says "
            f"{info.n_tokens}; lines are missing or the files do not belong together: restore "
            "them or prepare the data again"
        )


def _read(path: str, remedy: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}") from None


def _mapping(raw: bytes, place: str) -> dict[str, Any]:
    try:
        values = json.loads(raw.decode())
    except ValueError as e:
        raise InputError(f"{place}: not JSON ({e}); restore the file or prepare again") from None
    if not isinstance(values, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(values).__name__}")
    return values


def _field(
    values: dict[str, Any], name: str, kind: type, place: str, optional: bool = False
) -> Any:
    if name not in values:
        raise InputError(f"{place}: field {name!r} is missing; it has {sorted(values)}")
    value = values[name]
    if optional and value is None:
        return None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{place}: {name} is {value!r}; expected {kind.__name__}")
    return value
