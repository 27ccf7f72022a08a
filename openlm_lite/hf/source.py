"""A model, wherever it lies: its architecture, its weights under our names, its tokenizer.

    run or checkpoint of ours     runs/mine, runs/mine/checkpoints/step_00001000
    Hugging Face folder           config.json and safetensors; a class of `families.py`, or openlm
    OpenLM's checkpoint           epoch_5.pt, with the architecture's JSON
    bare weights                  .pt or .safetensors, with the architecture's JSON

Weights are read one tensor at a time, when asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from openlm_lite import run_files, storage
from openlm_lite.average.saved import FACTS_KEY
from openlm_lite.checkpoint import read_document, resolve_checkpoint
from openlm_lite.commit import COMMIT_NAME, read_commit
from openlm_lite.config import (
    decode,
    find_file,
    load_tree,
    parse_yaml,
    to_tree,
)
from openlm_lite.data.tokenizer import TOKENIZER_NAMES, Tokenizer, load_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.hf.convert import from_class
from openlm_lite.hf.families import BY_CLASS, BY_MODEL_TYPE
from openlm_lite.hf.layouts import parameter_shapes
from openlm_lite.hf.native import best_fit, fit, is_read, read_config
from openlm_lite.hf.openlm_fields import model_fields
from openlm_lite.hf.rewrite import CannotUndoError
from openlm_lite.hf.weights import Weights, checkpoint_weights, open_weights
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.transformer import Transformer

OPENLM = "OpenLMForCausalLM"
ARCHITECTURE_KEY = "openlm_lite"
"""of config.json: our architecture, where the class holds it in another form"""


@dataclass(frozen=True)
class Source:
    """One model. `facts` are plain values that say where it came from."""

    path: str
    kind: str
    """`checkpoint`, `weights`, or the class of a Hugging Face folder"""
    cfg: ModelConfig
    weights: Weights
    facts: dict[str, Any]
    hf_class: str | None = None
    """of the folder that it is, or was imported from"""
    notes: tuple[str, ...] = field(default=())
    """what a user should know about how it was read"""


def open_source(path: str, model: str | None = None, average: str | None = None) -> Source:
    """The model at `path`; `model` is the JSON of its architecture, ours or OpenLM's.

    `average`: of a checkpoint, the average of that name in place of the weights.
    `model` is needed where nothing beside the weights says what they are, and refused elsewhere.
    Raises InputError for what is not there, not whole, or not an architecture of ours.
    """
    path = resolve_checkpoint(path) if storage.is_remote(path) else storage.local_path(path)
    if not os.path.exists(path):
        raise InputError(
            f"{path}: found nothing; give a run, a checkpoint, a Hugging Face folder or a file of "
            "weights"
        )
    is_exported = os.path.isfile(os.path.join(path, "config.json"))
    if average is not None and (is_exported or os.path.isfile(path)):
        raise InputError(
            f"{path}: holds one set of weights; leave the average {average!r} out, or name the "
            "checkpoint that it is in"
        )
    if os.path.isfile(path):
        return _bare(path, model)
    if is_exported:
        if model is not None:
            raise InputError(
                f"{path}: has a config.json, which states the architecture; leave {model} out"
            )
        return _hf_folder(path)
    if _has_weights(path) and not os.path.isfile(os.path.join(path, COMMIT_NAME)):
        return _bare(path, model)
    if model is not None:
        raise InputError(
            f"{path}: is a checkpoint, which states its architecture; leave {model} out"
        )
    return _checkpoint(path, average)


def _has_weights(folder: str) -> bool:
    return any(
        name.endswith((".safetensors", ".safetensors.index.json")) or name == "pytorch_model.bin"
        for name in os.listdir(folder)
    )


# --- ours ----------------------------------------------------------------------------------------


def _checkpoint(path: str, average: str | None) -> Source:
    step_folder = resolve_checkpoint(path)
    cfg = read_model_config(step_folder)
    weights = checkpoint_weights(step_folder, average)
    expected = parameter_shapes(cfg)
    if dict(weights.shapes) != dict(expected):
        odd = [n for n in expected.keys() | weights if weights.shapes.get(n) != expected.get(n)]
        raise InputError(
            f"{step_folder}: the weights do not fit its model.json: {', '.join(sorted(odd)[:4])}"
        )
    commit = read_commit(step_folder)
    with open(os.path.join(step_folder, COMMIT_NAME), "rb") as f:
        sha256 = hashlib.sha256(f.read()).hexdigest()
    imported = commit.facts.get("source")
    facts = {
        "path": os.path.abspath(step_folder),
        "step": commit.state.step,
        "tokens": commit.state.tokens,
        "commit_sha256": sha256,
        **commit.facts,
    }
    if average is not None:
        facts["average"] = {"name": average, **commit.facts[FACTS_KEY][average]}
    hf_class = imported.get("hf_class") if isinstance(imported, Mapping) else None
    return Source(step_folder, "checkpoint", cfg, weights, facts, hf_class)


def read_model_config(step_folder: str) -> ModelConfig:
    """The architecture that `step_folder`/model.json states; InputError if it states none."""
    place = os.path.join(step_folder, run_files.MODEL)
    return _decoded(parse_yaml(read_document(step_folder, run_files.MODEL), place), place)


def _decoded(plain: Any, place: str) -> ModelConfig:
    if not isinstance(plain, dict):
        raise InputError(f"{place}: holds a {type(plain).__name__}, must hold an architecture")
    plain.pop("comment", None)
    return decode(ModelConfig, to_tree(plain, place))


# --- Hugging Face folders ------------------------------------------------------------------------


def _hf_folder(path: str) -> Source:
    place = os.path.join(path, "config.json")
    with open(place, encoding="utf-8") as f:
        config = parse_yaml(f.read(), place)
    if not isinstance(config, dict):
        raise InputError(f"{place}: holds a {type(config).__name__}, must hold a mapping")
    kind = config.get("model_type")
    if kind == "openlm":
        hf_class, cfg = OPENLM, _openlm_architecture(config, place)
    elif isinstance(kind, str) and kind in BY_MODEL_TYPE:
        family = BY_MODEL_TYPE[kind]
        hf_class, cfg = family.hf_class, read_config(family, config, place)
    else:
        known = ", ".join(sorted([*BY_MODEL_TYPE, "openlm"]))
        raise InputError(f"{place}: model_type = {kind!r} is not known here; known are {known}")
    weights = from_class(hf_class, cfg, open_weights(path))
    facts = {"path": os.path.abspath(path), "hf_class": hf_class, "files": _sizes(path)}
    source = Source(path, hf_class, cfg, weights, facts, hf_class)
    return _as_it_was(source, config, place)


def _as_it_was(source: Source, config: Mapping[str, Any], place: str) -> Source:
    """Back in the form that it was exported from, where config.json tells it and it still holds."""
    recorded = config.get(ARCHITECTURE_KEY)
    if not isinstance(recorded, Mapping) or source.hf_class not in BY_CLASS:
        return source
    original = _decoded(dict(recorded.get("architecture") or {}), f"{place}: {ARCHITECTURE_KEY}")
    found = fit(original, BY_CLASS[source.hf_class])
    if found.misfits or _as_held(found.target) != _as_held(source.cfg):
        note = f"config.json was changed since it was exported: read as {source.hf_class}"
        return replace(source, notes=(note,))
    weights = source.weights
    try:
        for step in reversed(found.rewrites):
            weights = step.undo(weights)
    except CannotUndoError as reason:
        note = f"the weights were changed since they were exported ({reason}): read as they are"
        return replace(source, notes=(note,))
    return replace(source, cfg=original, weights=weights)


def _as_held(cfg: ModelConfig) -> dict[str, Any]:
    """The fields that something reads."""
    return {name: value for name, value in vars(cfg).items() if is_read(cfg, name)}


def _openlm_architecture(config: Mapping[str, Any], place: str) -> ModelConfig:
    try:
        return ModelConfig(**model_fields(config))
    except (ValueError, TypeError, InputError) as e:
        raise InputError(f"{place}: {e}") from None


def _sizes(path: str) -> dict[str, int]:
    """Bytes of the weight files, which identify a download well enough."""
    if os.path.isfile(path):
        return {os.path.basename(path): os.path.getsize(path)}
    ends = (".safetensors", ".bin", ".pt")
    names = sorted(name for name in os.listdir(path) if name.endswith(ends))
    return {name: os.path.getsize(os.path.join(path, name)) for name in names}


# --- bare weights --------------------------------------------------------------------------------


def _bare(path: str, model: str | None) -> Source:
    files = open_weights(path)
    if model is None:
        raise InputError(
            f"{path}: nothing beside these weights says what they are; name the architecture "
            "(--model JSON, in a recipe model.init_from.model: ours, or OpenLM's)"
        )
    cfg, notes = _read_architecture(model, path)
    facts = {"path": os.path.abspath(path), "files": _sizes(path), "model": model}
    ours = parameter_shapes(cfg)
    if "embedding.weight" in files:
        weights = _own_names(files, cfg)
        return Source(path, "weights", cfg, weights, facts, notes=notes)
    if "tok_embeddings.weight" in files or "model.tok_embeddings.weight" in files:
        hf_class = OPENLM
    else:
        found = best_fit(cfg)
        if found.misfits or found.rewrites:
            known = "embedding.weight, tok_embeddings.weight or the names of a transformers class"
            raise InputError(
                f"{path}: these names are not known ({', '.join(list(files)[:4])}, …); expected "
                f"are {known} that holds the architecture as it is"
            )
        hf_class = found.family.hf_class
    weights = from_class(hf_class, cfg, files)
    assert weights.shapes == ours
    return Source(path, "weights", cfg, weights, {**facts, "hf_class": hf_class}, None, notes)


def _own_names(files: Weights, cfg: ModelConfig) -> Weights:
    expected = parameter_shapes(cfg)
    for name in sorted(expected.keys() | files.shapes.keys()):
        there, here = files.shapes.get(name), expected.get(name)
        if there != here:
            raise InputError(
                f"{files.place}: tensor {name} is {there and list(there)}, the architecture says "
                f"{here and list(here)} (none: it should not be there)"
            )
    return Weights(files.place, expected, lambda name: files[name].float())


def _read_architecture(model: str, weights: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """Our JSON, or OpenLM's: completed by the params.txt of its run, else by its defaults."""
    path = find_file(model, "model_configs", ".json")
    plain = {k: v.value for k, v in load_tree(path).items() if not isinstance(v, dict)}
    plain.pop("comment", None)
    if "d_model" in plain:
        return _decoded(plain, str(path)), ()
    params = _params_txt(weights)
    cfg = _openlm_architecture({**params, **plain}, str(path))
    options = ("model_norm", "qk_norm", "ffn_type", "positional_embedding_type")
    assumed = [name for name in options if name not in plain and name not in params]
    note = f"{path} does not say {', '.join(assumed)}: OpenLM's defaults were taken"
    return cfg, ((note,) if assumed else ())


def _params_txt(weights: str) -> dict[str, Any]:
    """The model options in the params.txt that OpenLM's trainer writes beside its checkpoints."""
    folder = os.path.dirname(os.path.abspath(weights))
    for place in (folder, os.path.dirname(folder)):
        try:
            with open(os.path.join(place, "params.txt"), encoding="utf-8") as f:
                pairs = [line.partition(":") for line in f]
        except OSError:
            continue
        wanted = ("model_norm", "qk_norm", "ffn_type", "positional_embedding_type")
        found = {key.strip(): value.strip() for key, _, value in pairs}
        spelt: dict[str, Any] = {"True": True, "False": False}
        return {k: spelt.get(found[k], found[k]) for k in wanted if k in found}
    return {}


# --- models and tokenizers -----------------------------------------------------------------------


def build_model(cfg: ModelConfig, weights: Mapping[str, torch.Tensor]) -> Transformer:
    """The model with these weights, fp32, on the CPU, in evaluation mode; once in memory."""
    with torch.device("meta"):
        model = Transformer(cfg)
    model.load_state_dict({name: weights[name].float() for name in weights}, assign=True)
    return model.eval()


def read_model(path: str, average: str | None = None) -> Transformer:
    """The model at `path` (`open_source`), as `build_model`."""
    source = open_source(path, average=average)
    return build_model(source.cfg, source.weights)


def with_tokenizer(source: Source, tokenizer: str | None) -> tuple[Transformer, Tokenizer]:
    """The model, as `build_model`, and what it reads with (`find_tokenizer`), which is looked for
    before the weights are read."""
    words = find_tokenizer(source.path, tokenizer, source.cfg.vocab_size)
    return build_model(source.cfg, source.weights), words


def tokenizer_documents(folder: str) -> dict[str, str]:
    """The tokenizer in `folder`, if there is one, as documents of a checkpoint: name -> text.

    Raises InputError for what is no text.
    """
    found = {}
    for name in TOKENIZER_NAMES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8", newline="") as f:
                    found[name] = f.read()
            except UnicodeDecodeError as e:
                raise InputError(f"{path}: the tokenizer cannot be read: {e}") from None
    return found


def find_tokenizer(folder: str, spec: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer named by `spec`, else the one in the checkpoint, its run's, its data's.

        run/{tokenizer.json, checkpoints/step_00001000/tokenizer.json}

    It may have fewer ids than the model has rows (padding), never more: InputError.
    """
    tokenizer = load_tokenizer(spec if spec is not None else tokenizer_folder(folder))
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the model "
            f"{folder} has vocab_size = {vocab_size}: it was trained with another tokenizer"
        )
    return tokenizer


def tokenizer_folder(folder: str) -> str:
    """Where the tokenizer of the model at `folder` lies (`find_tokenizer`); InputError: nowhere."""
    parent = os.path.dirname(os.path.abspath(folder))
    run = os.path.dirname(parent) if os.path.basename(parent) == run_files.CHECKPOINTS else parent
    places = [folder, run]
    if data := _training_data(folder):
        places.append(data if os.path.isdir(data) else os.path.dirname(data))
    for place in places:
        if os.path.isfile(os.path.join(place, "tokenizer.json")):
            return place
    raise InputError(
        f"{folder}: no tokenizer.json in {', '.join(places)}; name the tokenizer that the "
        "model was trained with (--tokenizer NAME_OR_FILE)"
    )


def _training_data(step_folder: str) -> str | None:
    """The (first) training dataset in the checkpoint's config.yaml; None where it states none."""
    try:
        text = read_document(step_folder, run_files.CONFIG)
        data = parse_yaml(text, run_files.CONFIG)["data"]
        paths = [data["train"], *(source["path"] for source in data["sources"].values())]
        path = next(path for path in paths if path)
    except (InputError, KeyError, TypeError, AttributeError, StopIteration):
        return None
    return path if isinstance(path, str) else None
