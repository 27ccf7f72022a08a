"""`openlm average`: the weighted mean of several models, as a checkpoint of weights alone.

    runs/a=0.8    hf/b=0.2    …        checkpoints, runs, Hugging Face folders
        |            |
     tensor       tensor               read one by one, in order
        \\            /
    0.8 * a + 0.2 * b  in fp32 --> written, let go of --> the next name

Model soups (arXiv:2203.05482), WiSE-FT's interpolation (arXiv:2109.01903), LAWA over the saved
checkpoints of one run (arXiv:2306.03241).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openlm_lite import run_files, storage
from openlm_lite.checkpoint import checkpoints_of_run
from openlm_lite.checkpoint_place import place_of
from openlm_lite.commit import step_of_folder
from openlm_lite.config import to_plain
from openlm_lite.data.tokenizer import load_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.hf.native import is_read
from openlm_lite.hf.source import Source, open_source, tokenizer_documents, tokenizer_folder
from openlm_lite.hf.weights import Weights
from openlm_lite.model.config import ModelConfig
from openlm_lite.weights_io import save_weights

_SUM_TOLERANCE = 1e-6
_MOST_TOLD = 10


@dataclass(frozen=True)
class SoupReport:
    """What was written."""

    path: str
    n_params: int
    sources: list[dict[str, Any]]
    """path, kind and weight of each; step and tokens of a checkpoint"""
    normalised: bool
    """whether the weights were divided by their sum"""
    tokenizer: bool
    """whether a source has one, which then lies in the checkpoint, too"""
    notes: list[str]


def average_models(out: str, words: Sequence[str], *, normalise: bool = False) -> SoupReport:
    """Write the mean of the models `words` (SOURCE or SOURCE=WEIGHT) to the new folder `out`.

    Without weights all weigh the same. Sums are in fp32; a few tensors are in memory at a time, the
    models never. `out` is whole or absent. Raises InputError for bad input before anything is
    written, and for values that are not finite.
    """
    _check_free(out)
    paths, weights = parse_sources(words)
    problems = _weight_problems(paths, weights, normalise)
    if problems:
        raise InputError("; ".join(problems))
    total = math.fsum(weights)
    divided = normalise and total != 1
    weights = [weight / total for weight in weights] if divided else weights
    return _write(out, paths, weights, divided)


def _write(out: str, paths: Sequence[str], weights: Sequence[float], divided: bool) -> SoupReport:
    """`weights` are final; `divided` says whether they were others."""
    sources = [_open(path) for path in paths]
    _check_distinct(sources)
    _check_outside(out, sources)
    _check_alike(sources)
    tokenizers, notes = _tokenizer(sources)
    notes += [f"{source.path}: {note}" for source in sources for note in source.notes]
    records = [_record(source, weight) for source, weight in zip(sources, weights, strict=True)]
    classes = {source.hf_class for source in sources}
    origin = {} if None in classes or len(classes) > 1 else {"source": {"hf_class": classes.pop()}}
    cfg = sources[0].cfg
    save_weights(
        out,
        mean_weights(out, sources, weights),
        documents={run_files.MODEL: json.dumps(to_plain(cfg), indent=2) + "\n", **tokenizers},
        facts={"soup": records, "notes": notes, **origin},
    )
    shown = ("path", "kind", "weight", "step", "tokens")
    return SoupReport(
        path=out,
        n_params=cfg.n_params,
        sources=[{k: record[k] for k in shown if k in record} for record in records],
        normalised=divided,
        tokenizer=bool(tokenizers),
        notes=notes,
    )


def average_last(out: str, run: str, last: int, every: int = 1) -> SoupReport:
    """The plain mean of the `last` newest checkpoints of a run whose steps `every` divides.

    Raises InputError where the run keeps fewer, and as `average_models`.
    """
    _check_free(out)
    problems = [f"--last {last}: must be at least 2"] if last < 2 else []
    problems += [f"--every {every}: must be at least 1"] if every < 1 else []
    if problems:
        raise InputError("; ".join(problems))
    root = run if storage.is_remote(run) else checkpoints_of_run(storage.local_path(run))
    if not storage.is_remote(root) and not os.path.isdir(root):
        root = run  # its checkpoints folder itself
    kept = {step: path for path in place_of(root).steps() if (step := _step(path)) is not None}
    chosen = [step for step in sorted(kept, reverse=True) if step % every == 0][:last]
    if len(chosen) < last:
        there = ", ".join(map(str, sorted(kept))) or "none"
        raise InputError(
            f"{run}: --last {last} --every {every} wants {last} checkpoints, but {len(chosen)} "
            f"fit; there are those of the steps: {there} (checkpoint.keep_last and keep_every of "
            "the run say what is kept)"
        )
    return _write(out, [kept[step] for step in reversed(chosen)], [1 / last] * last, False)


def _step(path: str) -> int | None:
    return step_of_folder(path.rstrip("/").rsplit("/", 1)[-1])


# --- what is given -------------------------------------------------------------------------------


def parse_sources(words: Sequence[str]) -> tuple[list[str], list[float]]:
    """(paths, weights) of SOURCE or SOURCE=WEIGHT words; without weights all are 1 / n.

    A word that is the path of something there is a SOURCE, whatever it looks like.
    Raises InputError where only some have weights.
    """
    pairs = [_parsed(word) for word in words]
    bare = [path for path, weight in pairs if weight is None]
    if bare and len(bare) < len(pairs):
        raise InputError(
            f"no weight is given for {', '.join(bare)}, but for others; write SOURCE=WEIGHT for "
            "all of them, or for none (then all weigh the same)"
        )
    n = len(pairs)
    return [path for path, _ in pairs], [1 / n if w is None else w for _, w in pairs]


def _parsed(word: str) -> tuple[str, float | None]:
    path, separator, number = word.rpartition("=")
    if not separator or os.path.lexists(storage.local_path(word) if "://" not in word else word):
        return word, None
    try:
        return path, float(number)
    except ValueError:
        raise InputError(
            f"{word}: nothing is there, and {number!r} is no number; give SOURCE or SOURCE=WEIGHT"
        ) from None


def _weight_problems(paths: list[str], weights: list[float], normalise: bool) -> list[str]:
    problems = []
    if len(paths) < 2:
        problems.append(
            f"{', '.join(paths) or 'no source'}: an average needs two sources or more (of one run: "
            "RUN --last N)"
        )
        return problems
    for path, weight in zip(paths, weights, strict=True):
        if not math.isfinite(weight) or weight == 0:
            problems.append(f"{path}={weight}: a weight must be a number other than 0")
    if problems:
        return problems
    total = math.fsum(weights)
    if normalise and total <= 0:
        problems.append(f"the weights sum to {total:.9g}, which cannot be normalised to 1")
    elif not normalise and abs(total - 1) > _SUM_TOLERANCE:
        problems.append(
            f"the weights sum to {total:.9g}, not to 1; correct them, or divide them by their sum "
            "with --normalise"
        )
    return problems


def _check_free(out: str) -> None:
    if "://" in out:
        raise InputError(f"{out}: give a local folder; it can be copied from there")
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise InputError(f"{out}: exists and is no empty folder; name a new one")


def _open(path: str) -> Source:
    if os.path.isfile(path):
        raise InputError(
            f"{path}: is a file of weights alone; make a checkpoint of it first: openlm import "
            f"{path} CHECKPOINT --model JSON"
        )
    return open_source(path)


def _check_distinct(sources: Sequence[Source]) -> None:
    """The same model twice is nearly always a slip; who means it says so by a weight."""
    for i, source in enumerate(sources):
        for other in sources[:i]:
            is_copy = source.facts.get("commit_sha256", "") == other.facts.get("commit_sha256")
            if is_copy or os.path.realpath(source.path) == os.path.realpath(other.path):
                what = f"is a copy of {other.path}" if source.path != other.path else "stands twice"
                raise InputError(
                    f"{source.path}: {what}; name it once, with the sum of the weights"
                )


def _check_outside(out: str, sources: Sequence[Source]) -> None:
    final = os.path.realpath(out)
    for source in sources:
        inside = os.path.realpath(source.path)
        if os.path.commonpath([final, inside]) == inside:
            raise InputError(f"{out}: lies in the source {source.path}; name a folder outside it")


def _check_alike(sources: Sequence[Source]) -> None:
    """Raises InputError with every field and shape in which they differ from the first."""
    first = sources[0]
    problems: list[str] = []
    for source in sources[1:]:
        fields = _read_fields(first.cfg), _read_fields(source.cfg)
        for name in sorted(fields[0].keys() | fields[1].keys()):
            here, there = (values.get(name, "absent") for values in fields)
            if here != there:
                problems.append(f"{source.path}: {name}: {there}, but {here} in {first.path}")
        ours, theirs = first.weights.shapes, source.weights.shapes
        odd = [n for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n)]
        problems += [
            f"{source.path}: {name}: {_shape(theirs, name)}, but {_shape(ours, name)} in "
            f"{first.path}"
            for name in odd[:_MOST_TOLD]
        ]
        if len(odd) > _MOST_TOLD:
            problems.append(f"{source.path}: and {len(odd) - _MOST_TOLD} more tensors")
    if problems:
        raise InputError(
            "only models of one architecture can be averaged:\n  " + "\n  ".join(problems)
        )


def _read_fields(cfg: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(cfg).items() if is_read(cfg, name)}


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "absent"


# --- what is written -----------------------------------------------------------------------------


def mean_weights(place: str, sources: Sequence[Source], weights: Sequence[float]) -> Weights:
    """The weighted sum of the sources' tensors in fp32, each made when it is asked for."""

    def read(name: str) -> Tensor:
        total = _part(sources[0], name).mul_(weights[0])
        for source, weight in zip(sources[1:], weights[1:], strict=True):
            total.add_(_part(source, name), alpha=weight)
        return total

    return Weights(place, sources[0].weights.shapes, read)


def _part(source: Source, name: str) -> Tensor:
    tensor = source.weights[name]
    if not tensor.is_floating_point():
        raise InputError(
            f"{source.path}: tensor {name} holds {tensor.dtype}, weights are floating point "
            "numbers; name a source that is not quantised"
        )
    tensor = tensor.float()
    lowest, highest = torch.aminmax(tensor)  # NaN if one is there; no copy, as isfinite makes
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            f"{source.path}: tensor {name} has {bad} values that are NaN or infinite; leave this "
            "source out"
        )
    return tensor


def _record(source: Source, weight: float) -> dict[str, Any]:
    """What COMMIT.json says of one part."""
    record: dict[str, Any] = {"path": source.path, "kind": source.kind, "weight": weight}
    for name in ("step", "tokens", "commit_sha256", "files", "hf_class", "soup"):
        if name in source.facts:
            record[name] = source.facts[name]
    return record


def _tokenizer(sources: Sequence[Source]) -> tuple[dict[str, str], list[str]]:
    """(documents of the first tokenizer among the sources, what is odd about the others)."""
    documents: dict[str, str] = {}
    first, notes = None, []
    for source in sources:
        try:
            folder = tokenizer_folder(source.path)
        except InputError:  # it has none, which is no mistake
            continue
        found = load_tokenizer(folder)
        if first is None:
            first, documents = found, tokenizer_documents(folder)
        elif found.fingerprint != first.fingerprint:
            notes.append(f"{source.path}: another tokenizer ({found.name}, here {first.name})")
    return documents, notes
