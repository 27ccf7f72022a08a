"""`openlm export`: a model as a folder that transformers, and what reads its format, loads.

Where a class of transformers computes the same function (`native.best_fit`), it is that class: no
code travels with the weights. Else, or on `--bundled`, it is `modeling_openlm.py`, which lies in
the folder. Either way the folder is loaded again and its logits are compared with our model's
before it gets its name.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Literal

import torch

from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError
from openlm_lite.hf.card import model_card
from openlm_lite.hf.compare import difference, our_logits, require_transformers, their_logits
from openlm_lite.hf.convert import to_class
from openlm_lite.hf.native import BY_CLASS, best_fit, fit, write_config
from openlm_lite.hf.openlm_fields import AUTO_MAP
from openlm_lite.hf.rewrite import Rewrite
from openlm_lite.hf.safetensors_file import write_safetensors
from openlm_lite.hf.source import (
    ARCHITECTURE_KEY,
    OPENLM,
    Source,
    find_tokenizer,
    open_source,
)
from openlm_lite.hf.weights import Weights
from openlm_lite.model.config import ModelConfig
from openlm_lite.storage import sync_folder, write_json

DEFAULT_SHARD_BYTES = 5 * 10**9
BUNDLED_FILES = ("modeling_openlm.py", "openlm_fields.py")
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Form:
    """How a model leaves: the class, the architecture as it holds it, and the way there."""

    hf_class: str
    cfg: ModelConfig
    rewrites: tuple[Rewrite, ...] = ()

    @property
    def is_native(self) -> bool:
        return self.hf_class != OPENLM


@dataclass(frozen=True)
class ExportReport:
    """What was written. Differences are the largest over the logits of random tokens, in fp32.

    `max_logit_difference` is between our model and the folder with fp32 weights;
    `rounding_difference` what storing them in bf16 adds to it (0 for float32).
    """

    path: str
    hf_class: str
    native: bool
    rewritten: list[str]
    """fields that the class holds in another form, with the same function"""
    n_params: int
    max_logit_difference: float
    rounding_difference: float
    why_bundled: str
    """what no class of transformers has; empty for a native export and where it was asked for"""


# --- which form ----------------------------------------------------------------------------------


def native_form(cfg: ModelConfig, hf_class: str | None = None) -> Form:
    """The class of transformers that holds `cfg` exactly, or `hf_class` if that does.

    Raises InputError that names the fields which do not fit.
    """
    found = best_fit(cfg, hf_class)
    if found.misfits:
        closest = "" if hf_class else " (the closest class)"
        raise InputError(
            f"model.{'; model.'.join(found.misfits)}: {found.family.hf_class}{closest} does not "
            "hold this architecture exactly; export it with --bundled"
        )
    return Form(found.family.hf_class, found.target, found.rewrites)


def choose_form(
    source: Source, how: Literal["auto", "native", "bundled"], hf_class: str | None
) -> tuple[Form, str]:
    """The form to export in, and for `auto` why it is not a native one.

    A model that was imported goes back to its class, where that holds it as well as any other.
    """
    if hf_class is not None:
        if how == "bundled":
            raise InputError(f"--bundled with --class {hf_class}: the bundled class is {OPENLM}")
        return native_form(source.cfg, hf_class), ""
    if how == "bundled":
        return Form(OPENLM, source.cfg), ""
    try:
        form = native_form(source.cfg)
    except InputError as misfit:
        if how == "native":
            raise
        return Form(OPENLM, source.cfg), str(misfit).replace("; export it with --bundled", "")
    if source.hf_class in BY_CLASS:
        own = fit(source.cfg, BY_CLASS[source.hf_class])
        if not own.misfits and len(own.rewrites) <= len(form.rewrites):
            return Form(source.hf_class, own.target, own.rewrites), ""
    return form, ""


def weights_in(form: Form, weights: Weights) -> Weights:
    """The tensors of the folder, by their names, made one by one."""
    for step in form.rewrites:
        weights = step.apply(weights)
    return to_class(form.hf_class, form.cfg, weights)


def config_of(
    form: Form, original: ModelConfig, eot_id: int | None, dtype: Dtype
) -> dict[str, Any]:
    """config.json."""
    if form.is_native:
        config = write_config(BY_CLASS[form.hf_class], form.cfg)
        if form.cfg != original:
            config[ARCHITECTURE_KEY] = {"architecture": asdict(original)}
    else:
        config = {"architectures": [OPENLM], "model_type": "openlm", "auto_map": AUTO_MAP}
        config |= asdict(form.cfg)
    ids = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": None}
    return config | ids | {"dtype": dtype, "torch_dtype": dtype}


# --- writing -------------------------------------------------------------------------------------


def write_folder(
    folder: str,
    source: Source,
    form: Form,
    tokenizer: Tokenizer | None,
    dtype: Dtype = "float32",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Fill the existing, empty `folder` with everything but the card."""
    eot_id = None if tokenizer is None else tokenizer.eot_id
    write_json(os.path.join(folder, "config.json"), config_of(form, source.cfg, eot_id, dtype))
    ids = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    write_json(os.path.join(folder, "generation_config.json"), ids)
    if tokenizer is not None:
        tokenizer.save(folder)
    if not form.is_native:
        for name in BUNDLED_FILES:
            code = resources.files("openlm_lite.hf").joinpath(name).read_bytes()
            with open(os.path.join(folder, name), "wb") as f:
                f.write(code)
    write_weights(folder, weights_in(form, source.weights), getattr(torch, dtype), max_shard_bytes)


def write_weights(
    folder: str, weights: Weights, dtype: torch.dtype, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """model.safetensors, or above `max_shard_bytes` numbered files and their index.

    One tensor is in memory at a time.
    """
    plan = _shards(weights, dtype.itemsize, max_shard_bytes)
    n = len(plan)
    files = (
        ["model.safetensors"]
        if n == 1
        else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    )
    for file, names in zip(files, plan, strict=True):
        write_safetensors(os.path.join(folder, file), names, weights, weights.shapes, dtype)
    if n > 1:
        weight_map = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        total = sum(_numel(shape) for shape in weights.shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(os.path.join(folder, "model.safetensors.index.json"), index)


def _shards(weights: Weights, itemsize: int, max_bytes: int) -> list[list[str]]:
    """The names of each file, in order."""
    plan: list[list[str]] = [[]]
    filled = 0
    for name, shape in weights.shapes.items():
        size = _numel(shape) * itemsize
        if plan[-1] and filled + size > max_bytes:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    return plan


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


# --- the verb ------------------------------------------------------------------------------------


def export_checkpoint(
    checkpoint: str,
    out: str,
    *,
    how: Literal["auto", "native", "bundled"] = "auto",
    hf_class: str | None = None,
    tokenizer: str | None = None,
    dtype: Dtype = "float32",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    average: str | None = None,
) -> ExportReport:
    """Write `checkpoint` (a run, a checkpoint, or what else `open_source` reads) to `out`.

    `average`: the name of an average in it, which is written in place of the weights.
    `out` appears whole, or not at all: it is written beside its place, loaded by transformers and
    compared with our model, then renamed. `tokenizer` "none" leaves the tokenizer out. The model
    is in memory once at a time. Raises InputError for bad input before anything is written, and
    where the logits differ.
    """
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise InputError(f"{out}: exists and is no empty folder; name a new one")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype = {dtype!r}: allowed are float32 and bfloat16")
    require_transformers()
    source = open_source(checkpoint, average=average)
    form, why_bundled = choose_form(source, how, hf_class)
    words = None
    if tokenizer != "none":
        words = find_tokenizer(source.path, tokenizer, source.cfg.vocab_size)
    ours = our_logits(source.cfg, source.weights)

    final = os.path.abspath(out)
    temporary = os.path.join(os.path.dirname(final), f".{os.path.basename(final)}.{os.getpid()}")
    os.makedirs(temporary)
    try:
        write_folder(temporary, source, form, words, "float32", max_shard_bytes)
        what = f"{source.path}: as {form.hf_class}"
        worst = difference(ours, their_logits(temporary, source.cfg), what)
        rounding = 0.0
        if dtype == "bfloat16":
            _empty(temporary)
            write_folder(temporary, source, form, words, dtype, max_shard_bytes)
            rounding = (ours - their_logits(temporary, source.cfg)).abs().max().item()
        report = ExportReport(
            path=out,
            hf_class=form.hf_class,
            native=form.is_native,
            rewritten=[_changed_field(step) for step in form.rewrites],
            n_params=source.cfg.n_params,
            max_logit_difference=worst,
            rounding_difference=rounding,
            why_bundled=why_bundled,
        )
        with open(os.path.join(temporary, "README.md"), "w", encoding="utf-8") as f:
            f.write(model_card(source, os.path.basename(final), asdict(report), words is not None))
        sync_folder(temporary)
        os.rename(temporary, final)  # replaces an empty folder
        sync_folder(os.path.dirname(final))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return report


def _changed_field(step: Rewrite) -> str:
    before, after = asdict(step.before), asdict(step.after)
    return ", ".join(f"{k}: {before[k]} -> {after[k]}" for k in before if before[k] != after[k])


def _empty(folder: str) -> None:
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))
