"""README.md of an exported folder: what the model is, how it was trained, how to load it.

Only what is known is written; what nobody recorded has no line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openlm_lite import run_files
from openlm_lite.checkpoint import read_document
from openlm_lite.config import flatten, parse_yaml
from openlm_lite.errors import InputError
from openlm_lite.hf.source import Source
from openlm_lite.log import human, read_metrics

# What of a run's config tells a reader how the model was made; the whole of it is in config.yaml.
_RECIPE = (
    "data.train",
    "data.seq_len",
    "global_batch_tokens",
    "optim.",
    "schedule.",
    "loss.",
    "parallel.precision",
    "run.seed",
)


def model_card(source: Source, name: str, report: Mapping[str, Any], has_tokenizer: bool) -> str:
    """The text of README.md for an export of `source`; `report` is the ExportReport's fields."""
    cfg = source.cfg
    sections = [
        _front_matter(report),
        f"# {name}",
        f"A decoder-only language model of {human(cfg.n_params)} parameters "
        f"({cfg.n_params:,}), exported by openlm_lite {version('openlm-lite')}.",
        "## Use",
        _usage(report, has_tokenizer),
        "## Architecture",
        _table({k: v for k, v in asdict(cfg).items() if v is not None}),
        _form(report),
    ]
    run = _run_config(source.path)
    if run:
        flat = flatten(run)
        recipe = {k: v for k, v in flat.items() if k.startswith(_RECIPE) and v is not None}
        sections += ["## Training", _trained(source), _table(recipe)]
    elif "soup" in source.facts:
        sections += ["## Origin", "A weighted mean of models:", _soup(source.facts["soup"])]
    elif "source" in source.facts:
        sections += ["## Origin", _table(_plain(source.facts["source"]))]
    elif source.kind != "checkpoint":
        sections += ["## Origin", _table(_plain(source.facts))]
    if results := _results(source):
        sections += ["## Results", _table(results)]
    return "\n\n".join(part for part in sections if part) + "\n"


def _front_matter(report: Mapping[str, Any]) -> str:
    tags = ["openlm_lite"] if report["native"] else ["openlm_lite", "custom_code"]
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _usage(report: Mapping[str, Any], has_tokenizer: bool) -> str:
    trust = "" if report["native"] else ", trust_remote_code=True"
    lines = ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})']
    if has_tokenizer:
        lines += [
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    return "\n".join([*lines, "```"])


def _form(report: Mapping[str, Any]) -> str:
    said = f"The folder holds `{report['hf_class']}`"
    said += ", a class of transformers." if report["native"] else ", whose code lies in it."
    if report["rewritten"]:
        said += (
            " The weights were brought into its form without changing the function ("
            f"{'; '.join(report['rewritten'])})."
        )
    return said + (
        f" Largest difference of logits from the trained model, fp32: "
        f"{report['max_logit_difference']:.1e}."
    )


def _trained(source: Source) -> str:
    facts = source.facts
    said = f"{human(facts['tokens'])} tokens in {facts['step']} steps."
    if average := facts.get("average"):
        said += f" The weights are their average `{average['name']}` ({average['kind']})."
    if sha256 := facts.get("manifest_sha256"):
        said += f" sha256 of the data's manifest: `{sha256}`."
    return said


def _soup(parts: Sequence[Mapping[str, Any]]) -> str:
    keys = ("weight", "kind", "step", "tokens", "commit_sha256")
    rows = [", ".join(f"{k} {part[k]}" for k in keys if part.get(k) is not None) for part in parts]
    return _table({str(i): row for i, row in enumerate(rows, 1)})


def _run_config(path: str) -> dict[str, Any] | None:
    try:
        config = parse_yaml(read_document(path, run_files.CONFIG), run_files.CONFIG)
    except InputError:
        return None
    return config if isinstance(config, dict) else None


def _results(source: Source) -> dict[str, Any]:
    """The newest validation losses up to the checkpoint's step, from the run's metrics.jsonl."""
    run = os.path.dirname(os.path.dirname(os.path.abspath(source.path)))
    metrics = os.path.join(run, run_files.METRICS)
    if source.kind != "checkpoint" or not os.path.isfile(metrics):
        return {}
    found: dict[str, Any] = {}
    for record in read_metrics(Path(metrics)):
        if record["step"] <= source.facts["step"]:
            found |= {k: f"{v:.4f}" for k, v in record.items() if k.startswith("val/")}
    return found


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without paths of the machine that made it."""
    return {k: v for k, v in flatten(dict(facts)).items() if k not in ("path", "model") and v}


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
