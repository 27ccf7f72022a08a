"""A run's first weights from another model, tensor by tensor::

    source layers               0 1 2 3
    layers: [0-1]          ->   0 1            Inheritune (arXiv:2404.08634): the first k
    layers: [0-2, 1-3]     ->   0 1 2 1 2 3    depth up-scaling (SOLAR, arXiv:2312.15166)
    layers: [0-3, new]     ->   0 1 2 3 *      growth; * keeps its fresh initialisation
    no layers              ->   0 1 2 3        continued pretraining

Optimizer, step, schedule and data begin anew, unless `optimizer` and `data` say otherwise
(branch.py). Growing further is another run with a larger map.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from openlm_lite import dist, lineage, run_files, storage
from openlm_lite.checkpoint import checkpoints_of_run
from openlm_lite.checkpoint_place import place_of, root_of
from openlm_lite.commit import step_folder_name, step_folders, step_of_folder
from openlm_lite.errors import InputError, RunError
from openlm_lite.hf.layouts import parameter_shapes
from openlm_lite.hf.source import Source, open_source
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import copy_shard
from openlm_lite.model.transformer import Transformer
from openlm_lite.parameter_names import plain_name

Record = dict[str, Any]
"""what was taken from where: plain values, kept in the run folder and in every checkpoint"""

NEW = "new"
_RANGE = re.compile(r"([0-9]{1,6})-([0-9]{1,6})")
_AT_STEP = re.compile(r"(.+)@([0-9]{1,12})")

# Which switch of InitFrom decides on a parameter: by its module's name, in a block or outside.
_COMPONENT = {
    "embedding": "embeddings",
    "position_embedding": "embeddings",
    "embedding_norm": "embeddings",
    "attention": "attention",
    "feed_forward": "feed_forward",
    "attention_norm": "norms",
    "ffn_norm": "norms",
    "norm": "final_norm",
    "output": "head",
}
_BLOCK_COMPONENTS = {"attention", "feed_forward", "norms"}
# May differ: a longer context changes them on purpose. The log and the record name the difference.
_MAY_DIFFER = ("rope_theta", "max_seq_len")


@dataclass(frozen=True)
class InitFrom:
    """Another model to start from, and what to take of it."""

    path: str | None = None
    """run (RUN@200: its step 200), checkpoint, Hugging Face folder, .pt or .safetensors file; null:
    fresh weights"""
    model: str | None = None
    """the architecture as a JSON file, for weights that state none"""
    layers: tuple[int | str, ...] | None = None
    """the source's layer for each layer: numbers from 0, ranges with both ends such as 0-11, `new`
    for a fresh layer; null: layer i from layer i"""
    embeddings: bool = True
    """tables of tokens and of learned positions, norm of the embedding"""
    attention: bool = True
    """of the blocks, with qk-norm"""
    feed_forward: bool = True
    """of the blocks"""
    norms: bool = True
    """of the blocks"""
    final_norm: bool = True
    head: bool = True
    """output matrix; a tied table is taken if `embeddings` or `head` is"""
    optimizer: bool = False
    """the optimizer's state too, with all of the weights: of a run's checkpoint"""
    data: Literal["restart", "continue"] = "restart"
    """continue: step, tokens and place in the data go on from where the parent stood"""

    def __post_init__(self) -> None:
        found = []
        if self.path is None:
            given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            if given:
                found.append(
                    f"model.init_from.{given[0]} is given without model.init_from.path, the model "
                    "to start from"
                )
        elif not self.components:
            found.append(
                "model.init_from takes nothing: switch a part on, or leave init_from.path out"
            )
        elif self.layers is not None and not _BLOCK_COMPONENTS.intersection(self.components):
            found.append(
                "model.init_from.layers is given, but nothing of a layer is taken: switch "
                "attention, feed_forward or norms on, or leave layers out"
            )
        if self.optimizer and (self.layers is not None or len(self.components) < 6):
            found.append(
                "model.init_from.optimizer is given, but not all of the weights are taken; take "
                "them all (no layers, no part switched off), or leave the optimizer out"
            )
        found += [
            f"model.init_from.layers: {word!r} is no layer; give numbers from 0, ranges such as "
            f"0-11 (first to last, both included) or {NEW}"
            for word in self.layers or ()
            if word != NEW and _range_of(word) is None
        ]
        if found:
            raise InputError("; ".join(found))

    @property
    def components(self) -> tuple[str, ...]:
        """The parts that are taken."""
        switches = {
            "embeddings": self.embeddings,
            "attention": self.attention,
            "feed_forward": self.feed_forward,
            "norms": self.norms,
            "final_norm": self.final_norm,
            "head": self.head,
        }
        return tuple(name for name, is_on in switches.items() if is_on)

    def problems(self, n_layers: int) -> list[str]:
        """What the layer map lacks for a model of `n_layers`, without a look at the source."""
        ranges = [_range_of(word) for word in self.layers or ()]
        count = sum(1 if r is None else r.stop - r.start for r in ranges)
        if self.layers is None or count == n_layers:
            return []
        return [f"init_from.layers names {count} layers, but n_layers = {n_layers}"]

    def layer_map(self, n_layers: int) -> tuple[int | None, ...]:
        """The source's layer for each of `n_layers`, None for a fresh one."""
        if not _BLOCK_COMPONENTS.intersection(self.components):
            return (None,) * n_layers
        if self.layers is None:
            return tuple(range(n_layers))
        return tuple(i for word in self.layers for i in _range_of(word) or (None,))


def _range_of(word: int | str) -> range | None:
    """The layers that one entry of a layer map names; None for `new` and for what is no entry."""
    if isinstance(word, int):
        return range(word, word + 1) if word >= 0 else None
    match = _RANGE.fullmatch(word)
    first, last = (int(match[1]), int(match[2])) if match else (1, 0)
    return range(first, last + 1) if first <= last else None


def open_init_source(
    init: InitFrom, cfg: ModelConfig, folder: Path, checkpoint_dir: str | None = None
) -> Source | None:
    """The model that the run in `folder` starts from, opened and checked to fit `cfg`.

    checkpoint_dir: checkpoint.dir of the run. None for fresh weights, and for a run that has
    checkpoints: it resumes, and needs no source.
    Raises InputError that names everything that does not fit; nothing is written here.
    """
    if init.path is None or place_of(root_of(checkpoint_dir, str(folder))).steps():
        return None
    return _open(init.path, init, cfg)


def _open(path: str, init: InitFrom, cfg: ModelConfig) -> Source:
    try:
        source = open_source(_with_step(path), init.model)
    except InputError as e:
        raise InputError(f"model.init_from: {e}") from None
    source_names(init, cfg, source)
    return source


def _with_step(path: str) -> str:
    """RUN@200 as the folder of that checkpoint; any other path as it is."""
    match = _AT_STEP.fullmatch(path)
    if match is None or os.path.exists(path):
        return path
    run, name = match[1], step_folder_name(int(match[2]))
    root = run if storage.is_remote(run) else checkpoints_of_run(run)
    if not storage.is_remote(root) and not os.path.isdir(os.path.join(root, name)):
        there = sorted(step_of_folder(os.path.basename(f)) or 0 for f in step_folders(root))
        raise InputError(
            f"{path}: no checkpoint of step {match[2]} in {root}; steps there: "
            f"{', '.join(map(str, there)) or 'none'}"
        )
    return f"{root}/{name}"


def first_weights(
    model: Transformer, init: InitFrom, source: Source | None, folder: Path
) -> Record | None:
    """Fill the initialised model of a new run, and keep the record in `folder`; collective.

    A source that was not opened, because there were checkpoints (all damaged, as it turned out), is
    opened now. Returns the record; None for fresh weights.
    """

    def fill() -> Record | None:
        if init.path is None:
            return None
        opened = _open(init.path, init, model.cfg) if source is None else source
        return inherit(model, init, opened)

    def write() -> None:
        if record is None:
            # of a beginning with another config
            (folder / run_files.INIT_FROM).unlink(missing_ok=True)
        else:
            storage.write_json(str(folder / run_files.INIT_FROM), record)

    record = dist.on_all_ranks(fill, RunError)[0]
    dist.on_main(write, RunError)
    return record


@torch.no_grad()
def inherit(model: Transformer, init: InitFrom, source: Source) -> Record:
    """Put the source's tensors into the initialised model, in fp32; the rest stays as it is.

    The model may be sharded: every rank reads the source and keeps its shard. All names and shapes
    are checked before the first weight changes. Returns the record of what was taken, plain values.
    Raises InputError where the source does not fit.
    """
    names = source_names(init, model.cfg, source)
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    ours_of: dict[str, list[str]] = {}
    for ours, theirs in names.items():
        ours_of.setdefault(theirs, []).append(ours)
    for theirs, targets in ours_of.items():  # a tensor that goes to several places is read once
        tensor = source.weights[theirs]
        if not tensor.is_floating_point():
            raise InputError(
                f"{source.weights.place}: tensor {theirs} holds {tensor.dtype}, weights are "
                "floating point numbers; name a source that is not quantised"
            )
        for ours in targets:
            parameter = parameters[ours]
            copy_shard(parameter, tensor.to(parameter.device, torch.float32))
    n_taken = sum(parameters[name].numel() for name in names)
    record = {
        "path": source.path,
        "kind": source.kind,
        "facts": source.facts,
        "optimizer": init.optimizer,
        "data": init.data,
        "notes": list(source.notes),
        "layers": [NEW if i is None else i for i in init.layer_map(model.cfg.n_layers)],
        "components": list(init.components),
        "differences": {
            name: [getattr(source.cfg, name), getattr(model.cfg, name)]
            for name in _MAY_DIFFER
            if getattr(source.cfg, name) != getattr(model.cfg, name)
        },
        "n_params_taken": n_taken,
        "n_params_fresh": sum(p.numel() for p in parameters.values()) - n_taken,
    }
    before = {"lineage": lineage.ancestors(record), "tokens_before": lineage.tokens_before(record)}
    return record | before


def describe(record: Record, init: InitFrom) -> Iterator[str]:
    """The record as lines of the log."""
    layers = "" if init.layers is None else f"; layers {', '.join(map(str, init.layers))}"
    n_taken, n_fresh = record["n_params_taken"], record["n_params_fresh"]
    yield (
        f"weights from {record['path']} ({record['kind']}): {', '.join(record['components'])}"
        f"{layers}; {n_taken:,} parameters taken, {n_fresh:,} fresh"
    )
    yield lineage.describe_lineage(record)
    taken = "taken" if record["optimizer"] else "fresh"
    goes_on = "goes on where it stood" if record["data"] == "continue" else "begins anew"
    yield f"optimizer state {taken}; step and place in the data: {goes_on}"
    yield from record["notes"]
    for name, (theirs, ours) in record["differences"].items():
        yield f"model.{name} differs from the source's: {theirs} there, {ours} here"


def source_names(init: InitFrom, ours: ModelConfig, source: Source) -> dict[str, str]:
    """Our parameter's name -> the name of the source's that it starts from.

    Raises InputError that lists every field, layer and tensor in which the two do not fit.
    """
    layers = init.layer_map(ours.n_layers)
    where = f"model.init_from: {source.path} ({source.kind})"
    problems = [
        *_field_problems(init, ours, source.cfg),
        *_layer_problems(init, layers, source.cfg),
    ]
    if problems:
        raise InputError(
            f"{where} does not fit the model here:\n  "
            + "\n  ".join(problems)
            + "\nchange the model's fields, or take less (model.init_from.NAME=false)"
        )
    shapes = parameter_shapes(ours)
    names = {}
    for name in shapes:
        theirs = _source_name(name, init, layers, ours, source.cfg)
        if theirs is not None:
            names[name] = theirs
    found = source.weights.shapes
    wrong = [
        f"{theirs}: {tuple(found[theirs]) if theirs in found else 'absent'} there, expected "
        f"{shapes[name]}"
        for name, theirs in names.items()
        if theirs not in found or tuple(found[theirs]) != shapes[name]
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise InputError(
            f"{where} lacks weights that its architecture should have:\n  "
            + "\n  ".join(wrong[:10])
            + more
            + "\nthe source is damaged, or its architecture (model.init_from.model) is another's"
        )
    return names


def _source_name(
    name: str,
    init: InitFrom,
    layers: Sequence[int | None],
    ours: ModelConfig,
    theirs: ModelConfig,
) -> str | None:
    """The source's parameter for ours; None where it stays fresh."""
    head = "embedding.weight" if theirs.tie_embeddings else "output.weight"
    if name == "embedding.weight" and ours.tie_embeddings and init.head and not init.embeddings:
        return head
    first, *rest = name.split(".")
    if first != "layers":
        if _COMPONENT[first] not in init.components:
            return None
        return head if name == "output.weight" else name
    layer, module, *rest = rest
    theirs_layer = layers[int(layer)]
    if theirs_layer is None or _COMPONENT[module] not in init.components:
        return None
    return ".".join(("layers", str(theirs_layer), module, *rest))


def _layer_problems(
    init: InitFrom, layers: Sequence[int | None], theirs: ModelConfig
) -> Iterator[str]:
    beyond = sorted({i for i in layers if i is not None and i >= theirs.n_layers})
    if not beyond:
        return
    if init.layers is None:
        yield (
            f"n_layers: {theirs.n_layers} there, {len(layers)} here; say in model.init_from.layers "
            "which layer each one starts from"
        )
    else:
        yield (
            f"layers: {', '.join(map(str, beyond))} not there: it has layers 0 to "
            f"{theirs.n_layers - 1}"
        )


def _field_problems(init: InitFrom, ours: ModelConfig, theirs: ModelConfig) -> Iterator[str]:
    """A line for each field that decides on something taken, and differs."""
    needing = _deciding_fields(init, ours, theirs)
    for field in fields(ModelConfig):
        if field.name not in needing:
            continue
        there, here = getattr(theirs, field.name), getattr(ours, field.name)
        if there != here:
            yield f"{field.name}: {there} there, {here} here ({', '.join(needing[field.name])})"
    if ours.tie_embeddings and not theirs.tie_embeddings and init.embeddings and init.head:
        yield (
            "tie_embeddings: false there, true here; the one table here cannot be both tables "
            "there: take one of embeddings and head"
        )


def _deciding_fields(
    init: InitFrom, ours: ModelConfig, theirs: ModelConfig
) -> dict[str, list[str]]:
    """Field -> the taken components whose shapes or meaning it decides."""

    def both(field: str, value: object) -> bool:
        return getattr(ours, field) == value == getattr(theirs, field)

    def either(field: str, value: object) -> bool:
        return value in (getattr(ours, field), getattr(theirs, field))

    norm = ["norm", "norm_gain", "norm_bias", "norm_eps"]
    attention = ["block", "n_heads", "n_kv_heads", "head_dim", "qk_norm", "attn_bias", "clip_qkv"]
    attention += ["positions"] + ([] if either("qk_norm", "none") else norm)
    if both("positions", "rope"):
        attention += ["rotary_pct", "rope_style", "rope_freq_dtype"]
    if both("positions", "alibi"):
        attention += ["alibi_bias_max"]
    embeddings = ["vocab_size", "embedding_norm"] + (norm if both("embedding_norm", True) else [])
    if either("positions", "learned"):
        embeddings += ["positions"]
    if both("positions", "learned"):
        embeddings += ["max_seq_len"]
    deciding = {
        "embeddings": embeddings,
        "attention": attention,
        "feed_forward": ["block", "d_ff", "activation", "mlp_bias"],
        "norms": ["block", *norm],
        "final_norm": norm,
        "head": ["vocab_size"],
    }
    found: dict[str, list[str]] = {}
    for component in init.components:
        for field in ("d_model", *deciding[component]):
            found.setdefault(field, []).append(component)
    return found
