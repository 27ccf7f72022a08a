"""`openlm eval MODEL --suite …`: load a model, ask it a suite, write down everything.

The result is one JSON object: scores, what they are of, and what repeats them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

import openlm_lite
from openlm_lite import dist
from openlm_lite.commit import crc32_of_file
from openlm_lite.data.tokenizer import Tokenizer, load_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.eval.aggregate import aggregate
from openlm_lite.eval.icl import SuiteResult, SuiteSettings, find_files, run_suite
from openlm_lite.eval.journal import FolderJournal
from openlm_lite.eval.measures import Measures, check_measures, measure_others
from openlm_lite.eval.model_scorer import HFScorer, ModelScorer
from openlm_lite.eval.prompts import Data, examples, find_data, read_data
from openlm_lite.eval.tasks import Task, task_named
from openlm_lite.hf.compare import load_hf
from openlm_lite.hf.source import Source, open_source, with_tokenizer
from openlm_lite.storage import write_json

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Backend = Literal["auto", "openlm", "transformers"]


@dataclass(frozen=True)
class EvalRequest:
    """What `openlm eval` was asked."""

    path: str
    wanted: Measures = field(default_factory=Measures)
    average: str | None = None
    tokenizer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: str = "float32"
    backend: Backend = "auto"
    """auto: our model, also for a Hugging Face folder whose architecture it can hold exactly"""
    out: str | None = None
    """the folder to keep records in; None: nothing is kept, and nothing can go on"""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be asked."""

    scorer: ModelScorer | HFScorer
    tokenizer: Tokenizer
    facts: dict[str, Any]
    """which model it is"""


def evaluate(request: EvalRequest) -> dict[str, Any]:
    """The result of a suite, on every rank the same; rank 0 writes it to `out`/result.json.

    Collective: under torchrun every rank holds the model and takes its share of the rows.
    Raises InputError for bad input, before anything is written.
    """
    wanted = request.wanted
    tasks = wanted.words.tasks
    if tasks:  # before a large model is loaded
        if not wanted.data:
            raise InputError(
                "an evaluation needs --data, the folder that holds local_data/, for "
                f"{tasks[0].label}"
            )
        find_files(tasks, wanted.data)
    began = time.monotonic()
    loaded = load_model(request)  # before the ranks meet: what is wrong is told once
    _check_others(request, loaded)
    world = dist.init(request.device)
    try:
        scorer, tokenizer = loaded.scorer, loaded.tokenizer
        scorer.model.to(world.device)
        identity = {
            "model": loaded.facts["fingerprint"],
            "average": request.average,
            "backend": scorer.backend,
            "dtype": request.dtype,
            "tokenizer": tokenizer.fingerprint,
            "max_seq_len": min(wanted.settings.max_seq_len, scorer.max_seq_len),
            "bos_ids": list(tokenizer.bos_ids) if wanted.settings.bos else [],
        }
        journal = None
        if request.out is not None:
            journal = FolderJournal(request.out, identity, wanted.parts)
        with journal or nullcontext():
            suite = SuiteResult({}, {})
            if tasks:  # which claims the folder once their files are read
                suite = run_suite(
                    scorer, tokenizer, tasks, wanted.data, wanted.settings, journal=journal
                )
            if journal is not None:
                journal.claim()
            others = {}
            if isinstance(scorer, ModelScorer):  # `_check_others`: else none is wanted
                others = measure_others(scorer, tokenizer, wanted)
            result = _result(request, loaded, identity, suite, time.monotonic() - began) | others
            result["settings"] |= {"device": str(world.device), "ranks": dist.world_size()}
            if journal is not None:
                dist.on_main(lambda: write_json(os.path.join(journal.path, "result.json"), result))
        return result
    finally:
        dist.close()


def _check_others(request: EvalRequest, loaded: Loaded) -> None:
    """Raises InputError where something else than DCLM's tasks is asked that cannot be had."""
    wanted = request.wanted
    if not (wanted.words.aiw or wanted.words.harness or wanted.texts):
        return
    if not isinstance(loaded.scorer, ModelScorer):
        raise InputError(
            f"{request.path}: only DCLM's tasks can be asked of transformers' class; aiw, lm-eval: "
            "and --perplexity need our model (--backend openlm), which cannot hold this one: "
            f"{loaded.facts['why_not_ours'] or 'transformers was asked for'}"
        )
    check_measures(wanted, loaded.tokenizer, loaded.scorer.model.cfg)


def _result(
    request: EvalRequest,
    loaded: Loaded,
    identity: dict[str, Any],
    suite: SuiteResult,
    seconds: float,
) -> dict[str, Any]:
    withheld = {t.label: t.problem for t in suite.tasks.values() if t.problem is not None}
    aggregates = {}
    for version in ("v1", "v2"):
        found = aggregate(suite.accuracies, version)
        aggregates[version] = {
            "core": found.core,
            "extended": found.extended,
            "categories": found.categories,
        }
    centered = aggregate(suite.accuracies, "v2").centered
    tasks = {
        label: {
            **dataclasses.asdict(task),
            "centered_v2": None if task.accuracy is None else centered[label] / 100,
        }
        for label, task in suite.tasks.items()
    }
    wanted = request.wanted
    versions = {"openlm_lite": openlm_lite.__version__, "torch": torch.__version__}
    return {
        "model": loaded.facts,
        "suite": wanted.suite,
        "parts": wanted.parts,
        **aggregates["v2"],
        "baselines": "v2",
        "aggregates": aggregates,
        "missing": {**suite.missing, **withheld},
        "tasks": tasks,
        "settings": {
            **dataclasses.asdict(wanted.settings),
            **identity,
            "tokenizer_name": loaded.tokenizer.name,
            "data": os.path.abspath(wanted.data) if wanted.data else None,
            **({"aiw": dataclasses.asdict(wanted.aiw)} if wanted.words.aiw else {}),
            **({"perplexity": dataclasses.asdict(wanted.perplexity)} if wanted.texts else {}),
        },
        "versions": {**versions, "python": platform.python_version()},
        "command": sys.argv,
        "seconds": round(seconds, 2),
    }


# --- the model -----------------------------------------------------------------------------------


def load_model(request: EvalRequest) -> Loaded:
    """The model at `request.path`, on the CPU: a checkpoint, a run, or a Hugging Face folder."""
    dtype = DTYPES.get(request.dtype)
    if dtype is None:
        raise InputError(f"--dtype {request.dtype}: must be one of {', '.join(DTYPES)}")
    path, backend = request.path, request.backend
    is_exported = os.path.isfile(os.path.join(path, "config.json"))
    if not is_exported and backend == "transformers":
        raise InputError(f"{path}: is no Hugging Face folder; leave --backend transformers out")
    source, why = None, ""
    if backend != "transformers":
        try:
            source = open_source(path, average=request.average)
        except InputError as e:
            if not is_exported or backend == "openlm" or request.average is not None:
                raise
            why = str(e)
    if source is not None:
        return _load_ours(source, request, dtype)
    if why:
        log.warning("our model cannot hold this one, so transformers' class is asked: %s", why)
    model = load_hf(path, dtype)
    facts = {"path": os.path.abspath(path), "class": type(model).__name__, "why_not_ours": why}
    facts["fingerprint"] = _fingerprint_of_folder(path)
    return Loaded(HFScorer(model), load_tokenizer(request.tokenizer or path), facts)


def _load_ours(source: Source, request: EvalRequest, dtype: torch.dtype) -> Loaded:
    model, words = with_tokenizer(source, request.tokenizer)
    model = model.to(dtype)
    names = ("path", "step", "tokens", "commit_sha256", "hf_class", "average")
    facts = {name: source.facts[name] for name in names if name in source.facts}
    fingerprint = source.facts.get("commit_sha256") or _fingerprint_of_folder(source.path)
    facts |= {"fingerprint": fingerprint, "n_params": source.cfg.n_params}
    return Loaded(ModelScorer(model), words, facts)


def _fingerprint_of_folder(path: str) -> str:
    """A hash over the names and crc32 of config.json and of the files of weights."""
    if os.path.isfile(path):
        return f"crc32-{crc32_of_file(path):08x}"
    names = sorted(
        n for n in os.listdir(path) if n == "config.json" or n.endswith((".safetensors", ".bin"))
    )
    told = [f"{name} {crc32_of_file(os.path.join(path, name))}" for name in names]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


# --- what a model would see ----------------------------------------------------------------------


def dump_prompts(
    task_name: str, data_dir: str, tokenizer: str, settings: SuiteSettings
) -> Iterator[dict[str, Any]]:
    """A JSON object per row: the shots, the text, ids and spans of every choice.

    `task_name`: a label, or LABEL/CATEGORY. Raises InputError before the first row.
    """
    label, _, category = task_name.partition("/")
    task = task_named(label)
    path = find_data(task, data_dir)
    if path is None:
        raise InputError(f"task {label}: {task.file} is not in {data_dir}; fetch it first")
    data = read_data(task, path)
    if category and category not in data.categories:
        raise InputError(
            f"task {label}: has no category {category!r}; it has "
            f"{', '.join(name for name in data.categories if name) or 'none'}"
        )
    words = load_tokenizer(tokenizer)
    return _dumped(task, data, words, settings, category or None)


def _dumped(
    task: Task, data: Data, words: Tokenizer, settings: SuiteSettings, category: str | None
) -> Iterator[dict[str, Any]]:
    for example in examples(
        task,
        data,
        words,
        max_seq_len=settings.max_seq_len,
        limit=settings.limit,
        bos_ids=words.bos_ids if settings.bos else (),
        category=category,
    ):
        seqs = [seq.tolist() for seq in example.seqs]
        plain = {
            "task": task.label,
            "category": example.category,
            "i": example.index,
            "fewshot_idxs": list(example.fewshot_idxs),
            "seqs": seqs,
            "spans": None if example.spans is None else [list(span) for span in example.spans],
            "gold": example.gold,
            "trimmed": example.trimmed,
            "fewshot_text": example.fewshot_text,
            "text": [words.decode(seq) for seq in seqs],
        }
        if example.max_new_tokens is not None:
            plain |= {"aliases": list(example.aliases), "max_new_tokens": example.max_new_tokens}
        yield plain
