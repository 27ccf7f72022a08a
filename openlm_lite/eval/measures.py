"""Everything that a model in memory can be measured with, behind one call: `measure_all`.

    core, extended, TASK …   DCLM's tasks             icl.run_suite
    aiw                      Alice in Wonderland      aiw.run_aiw
    lm-eval:TASK,TASK        lm-evaluation-harness    harness.run_harness
    texts                    held-out text            perplexity.measure

`openlm eval` calls it with a model from a file, training with the one that is being trained.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError
from openlm_lite.eval.aggregate import aggregate, harness_scores
from openlm_lite.eval.aiw import AIWConfig, check_aiw, run_aiw
from openlm_lite.eval.harness import PREFIX, Requests, check_tasks, require_lm_eval, run_harness
from openlm_lite.eval.icl import SuiteResult, SuiteSettings, run_suite
from openlm_lite.eval.model_scorer import ModelScorer
from openlm_lite.eval.perplexity import PerplexityConfig, check_text, measure
from openlm_lite.eval.tasks import Task, tasks_of
from openlm_lite.model.config import ModelConfig

AIW = "aiw"


@dataclass(frozen=True)
class Words:
    """What the words of a suite name."""

    tasks: tuple[Task, ...]
    """DCLM's"""
    aiw: bool
    harness: tuple[str, ...]
    """lm-eval's"""


def words_of(suite: str) -> Words:
    """`core,aiw,lm-eval:hellaswag,arc_easy`: all that follows `lm-eval:` is lm-eval's.

    Raises InputError for a word that is nothing, and where lm-eval is named but not installed.
    """
    ours, found, theirs = suite.partition(PREFIX)
    words = [word.strip() for word in ours.rstrip(", ").split(",")] if ours.strip(", ") else []
    harness = tuple(word.strip() for word in theirs.split(",")) if found else ()
    if (found and not all(harness)) or not (words or harness):
        raise InputError(
            f"suite {suite!r}: an empty name; give core, extended, {AIW}, tasks, or "
            f"{PREFIX}TASK, separated by commas"
        )
    if harness:
        require_lm_eval()
    own = [word for word in words if word != AIW]
    return Words(tasks_of(",".join(own)) if own else (), AIW in words, harness)


@dataclass(frozen=True)
class Measures:
    """What is measured, and how. Raises InputError as `words_of`."""

    suite: str = ""
    """words; empty: held-out text alone"""
    data: str = ""
    """the folder of DCLM's local_data/, the paper's aiw/prompts.json, task files of lm-eval"""
    settings: SuiteSettings = field(default_factory=SuiteSettings)
    """of DCLM's tasks; lm-eval's have its batches, its limit and its beginning of text"""
    aiw: AIWConfig = field(default_factory=AIWConfig)
    texts: Mapping[str, str] = field(default_factory=dict)
    """held-out text: name -> dataset, file, folder or glob"""
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)

    def __post_init__(self) -> None:
        self.words  # noqa: B018  (raises for what is no word)

    @functools.cached_property
    def words(self) -> Words:
        return words_of(self.suite) if self.suite else Words((), False, ())

    @property
    def parts(self) -> dict[str, Any]:
        """What a result has: name -> how it is asked; None for DCLM's tasks, which have records."""
        found: dict[str, Any] = {task.label: None for task in self.words.tasks}
        if self.words.aiw:
            found[AIW] = dataclasses.asdict(self.aiw)
        how = {"limit": self.settings.limit, "bos": self.settings.bos}
        found |= {f"{PREFIX}{task}": how for task in self.words.harness}
        how = dataclasses.asdict(self.perplexity)
        return found | {f"text {n}": {"path": p, **how} for n, p in self.texts.items()}


def check_measures(wanted: Measures, tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raises InputError for what cannot be had, or cannot be asked of such a model.

    Not of DCLM's tasks (`icl.read_suite`).
    """
    words = wanted.words
    if words.aiw:
        check_aiw(tokenizer, wanted.aiw, wanted.data, model.max_seq_len, model.vocab_size)
    for path in wanted.texts.values():
        check_text(model, tokenizer, path, wanted.perplexity)
    if words.harness:
        check_tasks(words.harness, wanted.data or None)


def measure_all(scorer: ModelScorer, tokenizer: Tokenizer, wanted: Measures) -> dict[str, Any]:
    """Plain values, the same on every rank; collective.

    `wanted` has been found good by `check_measures` and `icl.read_suite`. Keys: `suite` (a
    SuiteResult) and those of `measure_others`; what was asked for.
    """
    found: dict[str, Any] = {}
    if tasks := wanted.words.tasks:
        found["suite"] = run_suite(
            scorer, tokenizer, tasks, wanted.data, wanted.settings, progress=False, checked=True
        )
    return found | measure_others(scorer, tokenizer, wanted)


def measure_others(scorer: ModelScorer, tokenizer: Tokenizer, wanted: Measures) -> dict[str, Any]:
    """All but DCLM's tasks, as `measure_all`. Keys: `aiw`, `lm_eval`, `texts`.

    Leaves the model in evaluation mode. lm-eval seeds the global generators; nothing else touches
    them.
    """
    found: dict[str, Any] = {}
    if wanted.words.aiw:
        found["aiw"] = run_aiw(scorer, tokenizer, wanted.aiw, wanted.data)
    if harness := wanted.words.harness:
        how = wanted.settings
        requests = Requests(scorer, tokenizer, batch=how.batch, bos=how.bos)
        found["lm_eval"] = run_harness(
            requests, harness, tasks_dir=wanted.data or None, limit=how.limit
        )
    if wanted.texts:
        found["texts"] = {
            name: dataclasses.asdict(measure(scorer.model, tokenizer, path, wanted.perplexity))
            for name, path in wanted.texts.items()
        }
    return found


def metrics_of(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers for a curve: `eval/<task>/<what>`, accuracies and rates from 0 to 1.

    A task that the model cannot be scored on has none. core and extended are there where all of
    their tasks are, with DCLM's present baselines, centered, from 0 to 1 too.
    """
    metrics: dict[str, float] = {}
    suite: SuiteResult | None = found.get("suite")
    if suite is not None:
        metrics |= {f"eval/{name}/accuracy": value for name, value in suite.accuracies.items()}
        means = aggregate(suite.accuracies, "v2")
        for name, value in (("core", means.core), ("extended", means.extended)):
            if value is not None:
                metrics[f"eval/{name}"] = value / 100
    aiw = found.get("aiw", {})
    if "sampled" in aiw:
        for name in ("rate", "lowest", "highest"):
            metrics[f"eval/aiw/{name}"] = aiw["sampled"][name]
        if "drawn" in aiw["sampled"]:
            metrics["eval/aiw/drawn"] = aiw["sampled"]["drawn"]["rate"]
    for name in ("right", "over_m"):
        if "likelihood" in aiw:
            metrics[f"eval/aiw/likelihood_{name}"] = aiw["likelihood"][name]["rate"]
    for name, value in harness_scores(found.get("lm_eval")).items():
        metrics[f"eval/{name}"] = value
    for source, values in found.get("texts", {}).items():
        for name in ("loss", "bits_per_byte"):
            if values[name] is not None:
                metrics[f"val/{source}/{name}"] = values[name]
    return metrics


def problems_of(found: Mapping[str, Any]) -> dict[str, str]:
    """task -> why it has no number; what is missing is named and never averaged away."""
    suite: SuiteResult | None = found.get("suite")
    if suite is None:
        return {}
    withheld = {t.label: t.problem for t in suite.tasks.values() if t.problem is not None}
    return {**suite.missing, **withheld}


# --- for people ----------------------------------------------------------------------------------


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """AIW, lm-eval and held-out text as lines; DCLM's tasks have a table of their own."""
    lines = []
    if "aiw" in found:
        lines += _aiw_lines(found["aiw"])
    if "lm_eval" in found:
        lines.append(f"lm-eval {found['lm_eval']['lm_eval_version']}")
        for task, values in found["lm_eval"]["tasks"].items():
            numbers = {k: v for k, v in values.items() if isinstance(v, float)}
            shown = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
            lines.append(f"  {task:<32}{values['rows']!s:>8} rows  {shown}")
    for name, values in found.get("texts", {}).items():
        lines += _text_lines(name, values)
    return lines


def _aiw_lines(aiw: Mapping[str, Any]) -> list[str]:
    lines = []
    if "sampled" in aiw:
        sampled = aiw["sampled"]
        rows = {f"variation {name}": rate for name, rate in sampled["variations"].items()}
        if "drawn" in sampled:
            rows["drawn questions"] = sampled["drawn"]
        lines.append(f"aiw, {aiw['form']} form: right answers of sampled texts, percent")
        lines += [f"  {name:<18}{_rate(rate)}" for name, rate in rows.items()]
        lines.append(
            f"  mean of variations {100 * sampled['rate']:.1f}, lowest "
            f"{100 * sampled['lowest']:.1f}, highest {100 * sampled['highest']:.1f}"
        )
    if "likelihood" in aiw:
        found = aiw["likelihood"]
        ties = f", {found['ties']} ties" if found["ties"] else ""
        lines.append(f"aiw, by likelihood, percent of {found['right']['trials']} questions{ties}")
        lines.append(f"  right of 1 to 9   {_rate(found['right'])}")
        lines.append(f"  M + 1 over M      {_rate(found['over_m'])}")
    return lines


def _rate(rate: Mapping[str, Any]) -> str:
    shown = (
        f"{100 * rate['rate']:6.1f}  ({100 * rate['lower_95']:.1f} to {100 * rate['upper_95']:.1f})"
    )
    unparsed = rate.get("unparsed", 0)
    return f"{shown}  {rate['right']} of {rate['trials']}" + (
        f", {unparsed} without an answer" if unparsed else ""
    )


def _text_lines(name: str, values: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{name}: loss {values['loss']:.4f}"
        + (f"  perplexity {values['perplexity']:.2f}" if values["perplexity"] else "")
        + (f"  bits per byte {values['bits_per_byte']:.4f}" if values["bits_per_byte"] else "")
    ]
    for kind in ("tokens", "sequences"):
        lower = values[f"loss_{kind}_lower_95"]
        between = f"{lower:.4f} to {values[f'loss_{kind}_upper_95']:.4f}" if lower else "-"
        lines.append(f"  95 % over {values[kind]:,} {kind}: {between}")
    if values["empty"]:
        lines.append(f"  {values['empty']} documents without a token")
    return lines
