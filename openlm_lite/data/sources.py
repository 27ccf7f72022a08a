"""What a run reads: the `data` part of a recipe, and the datasets and the stream that it names.

data: {train: PATH}                            one dataset
data: {sources: {web: {path: …, weight: 0.7}, code: {path: …, weight: 0.3}}}
data: {…, curriculum: {cooldown: {from_tokens: 2.0e9, weights: {web: 0.4, code: 0.6}}}}
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openlm_lite import storage
from openlm_lite.config import is_named
from openlm_lite.data.cache import DEFAULT_GIB, Cache
from openlm_lite.data.dataset import Dataset, check_fits_model, load_dataset, open_dataset
from openlm_lite.data.masks import MaskConfig, eot_of
from openlm_lite.data.mixture import PhaseConfig, SourceConfig, check_mixture, mixture_of
from openlm_lite.data.openlm_shards import OpenLMOptions
from openlm_lite.data.order import ORDER_VERSION, SOURCES, auto_lanes, philox_keys
from openlm_lite.data.stream import SourceRows, TokenStream
from openlm_lite.errors import InputError

ALONE = "train"
"""the name of the one source of a run without `data.sources`"""


@dataclass(frozen=True, kw_only=True)
class DataConfig(MaskConfig):
    """What a run trains and validates on."""

    seq_len: int  # tokens per row; divides the block_tokens of every dataset
    train: str | None = None  # dataset folder (or its manifest.jsonl), path or URL; this or sources
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # name -> dataset and share
    curriculum: dict[str, PhaseConfig] = field(default_factory=dict)  # name -> other weights
    val: dict[str, str] = field(default_factory=dict)  # name -> dataset folder
    seed: int = 0  # of the order of the rows
    shuffle_shards: int = 16  # rows are shuffled within windows of this many shards
    pad_id: int | None = None  # fills up short rows of OpenLM's shards; null: they are an error
    lanes: int = 0  # parts of the shards that ranks keep to; 0: by the number of shards
    prefetch_batches: int = 4  # read ahead in a background thread; 0 = read when asked
    max_bad_shards: int = 0  # damaged or missing ones to leave out; more of them end the run
    cache_dir: str | None = None  # for the shards of URLs; null: the user's cache folder
    cache_gib: float = DEFAULT_GIB  # the most that it may hold

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        for name, least in (("seq_len", 1), ("seed", 0), ("shuffle_shards", 1), ("lanes", 0)):
            if getattr(self, name) < least:
                problems.append(f"{name} = {getattr(self, name)}, must be at least {least}")
        for name in ("prefetch_batches", "max_bad_shards"):
            if getattr(self, name) < 0:
                problems.append(f"{name} = {getattr(self, name)}, must not be negative")
        if not self.cache_gib > 0:
            problems.append(f"cache_gib = {self.cache_gib}, must be above 0")
        if (self.train is None) == (not self.sources):
            problems.append("give train (one dataset) or sources (a mixture), one of them")
        problems += check_mixture(self.sources, self.curriculum)
        if problems:
            raise InputError("data: " + "; ".join(problems))

    @property
    def paths(self) -> dict[str, str]:
        """Source name -> dataset folder."""
        if self.train is not None:
            return {ALONE: self.train}
        return {name: source.path for name, source in self.sources.items()}


def open_sources(cfg: DataConfig, vocab_size: int) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """(training, validation) datasets by name, checked against the model and each other."""
    cache = None
    if any(storage.is_remote(path) for path in (*cfg.paths.values(), *cfg.val.values())):
        cache = Cache(cfg.cache_dir, int(cfg.cache_gib * 2**30))
    # a missing shard is one to leave out, which is found where it is read
    opened = load_dataset if cfg.max_bad_shards else open_dataset
    openlm = OpenLMOptions(pad_id=cfg.pad_id, eot_id=cfg.eot_id)
    train = {name: opened(path, cache, openlm) for name, path in cfg.paths.items()}
    val = {name: open_dataset(path, cache, openlm) for name, path in cfg.val.items()}
    first = next(iter(train.values()))
    for dataset in (*train.values(), *val.values()):
        dataset.rows_per_block(cfg.seq_len)
        check_fits_model(dataset, vocab_size)
        if cfg.document_masking:
            eot_of(cfg, dataset.info.tokenizer.eot_id)
        prints = {dataset.info.tokenizer.fingerprint, first.info.tokenizer.fingerprint}
        if len(prints) > 1 and None not in prints:  # None: OpenLM's shards do not say
            raise InputError(
                f"{dataset.folder}: made with the tokenizer {dataset.info.tokenizer.name}, but "
                f"{first.folder} with {first.info.tokenizer.name}; prepare both with the same one"
            )
    return train, val


def open_stream(cfg: DataConfig, datasets: Mapping[str, Dataset], total_tokens: int) -> TokenStream:
    """The stream of a run of `total_tokens` over `datasets` (of `open_sources`)."""
    rows = {
        name: SourceRows(
            dataset,
            cfg.seq_len,
            seed=_seed_of(cfg.seed, name) if cfg.sources else cfg.seed,
            shuffle_shards=cfg.shuffle_shards,
            lanes=cfg.lanes or auto_lanes(len(dataset.manifest.shards), cfg.shuffle_shards),
        )
        for name, dataset in datasets.items()
    }
    if not cfg.sources:
        return TokenStream(rows, max_bad_shards=cfg.max_bad_shards)
    mixture = mixture_of(
        cfg.sources,
        cfg.curriculum,
        tokens_per_epoch={n: s.order.rows_per_epoch * cfg.seq_len for n, s in rows.items()},
        total_tokens=total_tokens,
        seq_len=cfg.seq_len,
    )
    return TokenStream(rows, mixture, cfg.max_bad_shards)


def _seed_of(seed: int, name: str) -> int:
    """A source's own seed: the same dataset under two names is read in two orders."""
    return int(philox_keys(seed, SOURCES, 1, part=zlib.crc32(name.encode()))[0] >> 1)


def data_facts(stream: TokenStream) -> dict[str, Any]:
    """What a checkpoint keeps of the data, for `check_same_data` and `bad_shards_of`."""
    sources = zip(stream.names, stream.sources, strict=True)
    facts: dict[str, Any] = {
        "order_version": ORDER_VERSION,
        "data": {
            name: {"manifest_sha256": rows.dataset.manifest_sha256, "lanes": rows.lanes}
            for name, rows in sources
        },
    }
    if stream.bad_shards:
        facts["bad_shards"] = [[*key, message] for key, message in stream.bad_shards.items()]
    return facts


def check_same_data(
    facts: Mapping[str, Any], stream: TokenStream, allow_change: Sequence[str] = ()
) -> list[str]:
    """A resumed run must read the data that it started on, in the order that it started with.

    Other data is taken where `allow_change` has its key (data.train, data.sources.NAME.path, or
    data); returned is what differs, as texts. Raises InputError otherwise.
    """
    now = data_facts(stream)
    if facts.get("order_version") != now["order_version"]:
        raise InputError(
            f"this run read its data in order {facts.get('order_version')}, this version of "
            f"openlm_lite reads in order {now['order_version']}; finish it with the version that "
            "began it"
        )
    then = facts.get("data") or {}
    changes: list[str] = []
    if sorted(then) != sorted(now["data"]):
        change = (
            f"this run was trained on the sources {', '.join(sorted(then))}, now there are "
            f"{', '.join(sorted(now['data']))}"
        )
        if not is_named("data.sources", allow_change):
            raise InputError(
                f"{change}; restore data.sources, use a new run.dir, or change it on purpose: "
                "--allow-change data.sources"
            )
        changes.append(change)
    for name, rows in zip(stream.names, stream.sources, strict=True):
        if name not in then:
            continue
        folder = rows.dataset.folder
        key = "data.train" if stream.mixture is None else f"data.sources.{name}.path"
        if then[name]["manifest_sha256"] != rows.dataset.manifest_sha256:
            change = f"{folder}: its manifest is not the one that this run was trained on"
            if not is_named(key, allow_change):
                raise InputError(
                    f"{change}; restore that data, use a new run.dir, or change it on purpose: "
                    f"--allow-change {key}"
                )
            changes.append(change)
        elif then[name]["lanes"] != rows.lanes and not is_named("data.lanes", allow_change):
            raise InputError(
                f"{folder}: this run read it in {then[name]['lanes']} lanes, now in {rows.lanes}; "
                f"set data.lanes={then[name]['lanes']} or use a new run.dir"
            )
    return changes


def bad_shards_of(facts: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """The shards that a checkpoint says were left out."""
    return {(source, shard): message for source, shard, message in facts.get("bad_shards", ())}
