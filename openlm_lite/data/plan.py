"""Stage 1 of `openlm prepare`: what is asked, and which files make which pieces of work.

    inputs (files, folders, globs) -> files, sorted, numbered -> spans -> pieces of about one size
    weights (INPUT=W)              -> a weight per input; weight 0: its files are not read

The plan depends on the inputs alone, not on workers or the machine, and nothing is written here.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from openlm_lite import storage
from openlm_lite.data.order import check_seed
from openlm_lite.data.read import Format, format_of, known_extensions, open_input, spans
from openlm_lite.errors import InputError
from openlm_lite.redact import refuse_credentials

# A piece is what a worker does between two chances to resume: seconds, and 10,000s of documents.
_MIN_PIECE_BYTES = 1 << 20
_MAX_PIECE_BYTES = 32 << 20
_PIECES_WANTED = 64  # so that a small corpus, too, keeps all workers busy
_MAX_WEIGHT = 1000.0
EXECUTORS = ("local", "ray")
PACK = ("none", "best-fit")
ON_BAD_DOCUMENT = ("stop", "skip")
# Raised when the bytes of the shards change for the same inputs and settings.
RECIPE_VERSION = 2
_PROBE_BYTES = 64 << 10  # of each file's head and tail, for the fingerprint


@dataclass(frozen=True)
class PrepareConfig:
    """What `openlm prepare` is asked to do."""

    inputs: tuple[str, ...]  # files, folders, globs; local or URLs
    out: str  # folder or URL; new or empty
    tokenizer: str | None = None  # as load_tokenizer takes it; this or train_tokenizer
    train_tokenizer: int | None = None  # vocabulary size of a BPE to train on the inputs
    eot: str | None = None  # text of the end-of-document token, where the tokenizer does not say
    val_fraction: float = 0.0  # of the documents; > 0: datasets OUT/train and OUT/val
    seed: int = 0  # of the shuffle and of the split
    workers: int = 0  # processes; 0 = all cores
    block_tokens: int = 65_536  # every data.seq_len must divide it
    pack: str = "none"  # or "best-fit": rows of whole documents, of seq_len tokens
    seq_len: int | None = None  # with pack: it is the tokens per block then
    blocks_per_shard: int = 256
    text_field: str = "text"  # of JSON lines and parquet
    weight: tuple[str, ...] = ()  # "INPUT=W": how often its documents are taken; others once
    min_characters: int = 0  # shorter documents are dropped
    min_tokens: int = 0
    dedup: bool = False  # of documents with the same text, keep the first
    decontaminate: tuple[str, ...] = ()  # files whose n-grams no document may share
    decontaminate_ngram: int = 13  # words
    on_bad_document: str = "stop"  # or "skip": count it and go on
    executor: str = "local"  # or "ray"
    ray_address: str | None = None  # None: RAY_ADDRESS, a running cluster, or a new local one
    scratch: str | None = None  # folder for the work in hand; None: in `out`, or here if remote


@dataclass(frozen=True)
class Source:
    """One input as the user named it."""

    path: str
    n_files: int
    bytes: int
    n_skipped_files: int  # in a folder: files whose extension is not known
    weight: float  # copies of each document; of 2.5, half of them come a third time


@dataclass(frozen=True)
class Span:
    """A part of one file: the documents whose positions lie in [start, stop)."""

    file: int  # number of the file in the plan: half of a document's identity
    source: int  # number of the input
    path: str
    format: Format
    start: int
    stop: int
    bytes: int  # on disk, for progress
    weight: float  # of its input


@dataclass(frozen=True)
class Piece:
    """Some spans that one worker tokenises in one go."""

    number: int
    spans: tuple[Span, ...]

    @property
    def bytes(self) -> int:
        return sum(span.bytes for span in self.spans)


@dataclass(frozen=True)
class Plan:
    """The work, and a sha256 over the inputs: sizes and the head and tail of every file."""

    sources: tuple[Source, ...]
    pieces: tuple[Piece, ...]
    sha256: str

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)


def check_config(cfg: PrepareConfig) -> None:
    """Raises InputError for a setting that is out of range or missing."""
    if (cfg.tokenizer is None) == (cfg.train_tokenizer is None):
        what = "neither was given" if cfg.tokenizer is None else "both were given"
        raise InputError(
            f"--tokenizer NAME_OR_FILE or --train-tokenizer N: {what}; give exactly one"
        )
    if cfg.train_tokenizer is not None and cfg.eot is not None:
        raise InputError("--eot: a trained tokenizer has its own, <|endoftext|>; leave --eot out")
    if cfg.train_tokenizer is not None and not 258 <= cfg.train_tokenizer <= 1 << 20:
        raise InputError(
            f"--train-tokenizer: {cfg.train_tokenizer} is out of range; allowed are 258 "
            "(256 bytes, the end of text, one merge) to 1048576"
        )
    if not 0.0 <= cfg.val_fraction < 1.0:
        raise InputError(f"--val-fraction: {cfg.val_fraction} is out of range; allowed: 0 <= f < 1")
    check_seed(cfg.seed, "--seed")
    for flag, value, least in (
        ("--workers", cfg.workers, 0),
        ("--block-tokens", cfg.block_tokens, 1),
        ("--blocks-per-shard", cfg.blocks_per_shard, 1),
        ("--min-characters", cfg.min_characters, 0),
        ("--min-tokens", cfg.min_tokens, 0),
        ("--decontaminate-ngram", cfg.decontaminate_ngram, 1),
    ):
        if value < least:
            raise InputError(f"{flag}: {value} is too small; allowed: >= {least}")
    for name, value in vars(cfg).items():  # most of it will stand in dataset.json
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                refuse_credentials(text, "--" + name.replace("_", "-"))
    if not cfg.text_field:
        raise InputError("--text-field: empty; name the field that holds the text")
    for flag, value, allowed in (
        ("--executor", cfg.executor, EXECUTORS),
        ("--on-bad-document", cfg.on_bad_document, ON_BAD_DOCUMENT),
        ("--pack", cfg.pack, PACK),
    ):
        if value not in allowed:
            raise InputError(f"{flag}: {value!r} is not known; allowed: {', '.join(allowed)}")
    if (cfg.pack == "none") != (cfg.seq_len is None):
        raise InputError(
            "--pack best-fit and --seq-len belong together: documents are packed into rows of one "
            "length; without --pack every data.seq_len that divides --block-tokens can be trained"
        )
    if cfg.seq_len is not None and not 1 <= cfg.seq_len <= cfg.block_tokens * cfg.blocks_per_shard:
        raise InputError(
            f"--seq-len: {cfg.seq_len} is out of range; allowed are 1 to "
            f"{cfg.block_tokens * cfg.blocks_per_shard}, the tokens of a shard"
        )
    if cfg.ray_address is not None and cfg.executor != "ray":
        raise InputError("--ray-address: only --executor ray uses it; add that or leave it out")


def blocks_of(cfg: PrepareConfig) -> tuple[int, int]:
    """(tokens per block, blocks per shard): packed rows are blocks, and shards stay as large."""
    if cfg.seq_len is None:
        return cfg.block_tokens, cfg.blocks_per_shard
    return cfg.seq_len, cfg.block_tokens * cfg.blocks_per_shard // cfg.seq_len


def weights_of(cfg: PrepareConfig) -> tuple[float, ...]:
    """The weight of each input, from `cfg.weight`. Raises InputError."""
    weights: dict[str, float] = {}
    for given in cfg.weight:
        path, equals, number = given.rpartition("=")
        if not equals:
            raise InputError(f"--weight {given}: expected INPUT=W, such as {cfg.inputs[0]}=0.5")
        if path not in cfg.inputs:
            raise InputError(
                f"--weight {given}: {path!r} is not an input as it was named; the inputs are "
                f"{', '.join(cfg.inputs)}"
            )
        if path in weights:
            raise InputError(f"--weight {given}: {path} has a weight already; give one")
        try:
            weights[path] = float(number)
        except ValueError:
            weights[path] = math.nan
        if not 0.0 <= weights[path] <= _MAX_WEIGHT:  # not true of NaN
            raise InputError(
                f"--weight {given}: {number!r} is no weight; allowed are numbers from 0 to "
                f"{_MAX_WEIGHT:g} (0.3: 30 % of the documents; 2: every one twice)"
            )
    found = tuple(weights.get(path, 1.0) for path in cfg.inputs)
    if found and not any(found):
        raise InputError("--weight: every input has the weight 0, which leaves nothing; raise one")
    return found


def settings_of(cfg: PrepareConfig) -> dict[str, Any]:
    """The settings that decide the bytes of the shards."""
    names = (
        *("tokenizer", "train_tokenizer", "eot", "val_fraction", "seed"),
        *("block_tokens", "blocks_per_shard", "pack", "seq_len"),
        *("text_field", "min_characters", "min_tokens"),
        *("dedup", "decontaminate", "decontaminate_ngram", "on_bad_document"),
    )
    return {**{name: getattr(cfg, name) for name in names}, "weights": list(weights_of(cfg))}


def fingerprint_of(
    settings: dict[str, Any], plan: Plan, tokenizer: list[Any] | None, ngrams: str | None
) -> str:
    """sha256 of all that decides the bytes of the shards.

    `tokenizer` is its fingerprint and EOT id: its name does not count. None: to be trained.
    `ngrams` is the fingerprint of what must not be in the text, None: nothing.
    """
    facts = {
        **settings,
        "tokenizer": tokenizer,
        "eot": None,
        "decontaminate": ngrams,
        "inputs": plan.sha256,
        "recipe": RECIPE_VERSION,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def make_plan(inputs: Sequence[str], out: str, weights: Sequence[float] = ()) -> Plan:
    """Find and check the inputs and cut them into pieces. `weights`: of each input, default 1.

    Raises InputError: nothing named, nothing there, an unknown extension, `out` among the inputs.
    """
    if not inputs:
        raise InputError("no input was named; give files, folders or globs of documents")
    weights = tuple(weights) or (1.0,) * len(inputs)
    sources: list[Source] = []
    files: list[tuple[int, str, Format, int]] = []
    for number, path in enumerate(inputs):
        found, skipped = _known_files(path, out)
        sizes = [storage.size_of(file) for file, _ in found]
        sources.append(Source(path, len(found), sum(sizes), skipped, weights[number]))
        files += [
            (number, file, format, size) for (file, format), size in zip(found, sizes, strict=True)
        ]
    total = sum(source.bytes for source in sources if source.weight)
    piece_bytes = min(_MAX_PIECE_BYTES, max(_MIN_PIECE_BYTES, total // _PIECES_WANTED))
    all_spans = [
        Span(file, source, path, format, start, stop, n_bytes, weights[source])
        for file, (source, path, format, _) in enumerate(files)
        if weights[source]
        for start, stop, n_bytes in spans(path, format, piece_bytes)
    ]
    pieces = tuple(Piece(n, group) for n, group in enumerate(_packed(all_spans, piece_bytes)))
    sha256 = _fingerprint([(path, format, size) for _, path, format, size in files])
    return Plan(tuple(sources), pieces, sha256)


def _known_files(path: str, out: str) -> tuple[list[tuple[str, Format]], int]:
    """The readable files of one input, and how many others its folder holds."""
    found = storage.list_files(path)
    known = [(file, format) for file in found if (format := format_of(file)) is not None]
    # in a folder there may be other things (a licence, caches); a file named by hand must fit
    is_folder = found != [path] and not glob.has_magic(path)
    if not storage.is_remote(path):
        is_folder = os.path.isdir(storage.local_path(path))
    if not known or (len(known) < len(found) and not is_folder):
        unknown = next((file for file in found if format_of(file) is None), None)
        if unknown is None:
            raise InputError(f"{path}: the folder holds no files")
        raise InputError(f"{unknown}: unknown extension; known are {known_extensions()}")
    out_place = _place(out)
    for file, _ in known:
        if _place(file).startswith(out_place):
            raise InputError(f"{path}: {file} lies in the out folder {out}; choose another --out")
    if is_folder and out_place.startswith(_place(path)):
        raise InputError(f"{out}: the out folder lies in the input folder {path}; choose another")
    return known, len(found) - len(known)


def _place(path: str) -> str:
    """A folder or file as a prefix that can be compared: with a / at its end."""
    if storage.is_remote(path):
        return path.rstrip("/") + "/"
    return os.path.realpath(storage.local_path(path)) + os.sep


def _packed(all_spans: list[Span], piece_bytes: int) -> Iterator[tuple[Span, ...]]:
    """Neighbouring spans together, up to about `piece_bytes`: many small files are one piece."""
    group: list[Span] = []
    weight = 0
    for span in all_spans:
        if group and weight + span.bytes > piece_bytes:
            yield tuple(group)
            group, weight = [], 0
        group.append(span)
        weight += span.bytes
    if group:
        yield tuple(group)


def _fingerprint(files: list[tuple[str, Format, int]]) -> str:
    """Names and times stay out: a moved or freshly copied corpus is the same corpus."""
    digest = hashlib.sha256()
    for path, format, size in files:
        digest.update(f"{format.kind} {format.compression} {size}\n".encode())
        with open_input(path) as file:
            digest.update(file.read(_PROBE_BYTES))
            if size > _PROBE_BYTES:
                file.seek(max(_PROBE_BYTES, size - _PROBE_BYTES))
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()
