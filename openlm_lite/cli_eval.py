"""The verb `openlm eval`: a suite of tasks, means of scores, prompts, tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from openlm_lite.cli_data import AddVerb
from openlm_lite.errors import InputError

_OF_SUITE = ("limit", "max_seq_len", "no_bos", "batch_size", "batch_tokens")
_OF_MODEL = ("average", "device", "dtype", "backend", "out")
_OF_TEXT = ("perplexity", "stride", "tokens", "text_field", "bootstrap")
_OF_AIW = ("aiw_form", "aiw_trials", "aiw_drawn", "aiw_temperature", "aiw_seed")
_OTHERS = (*_OF_TEXT, *_OF_AIW)


def add_verbs(verb: AddVerb) -> None:
    """Add the words of `eval` to the parser."""
    p = verb("eval", _eval, "score a model on DCLM's tasks; means, prompts and tables of scores")
    p.add_argument("model", nargs="?", help="run folder, checkpoint or Hugging Face folder")
    p.add_argument(
        "--suite",
        metavar="NAMES",
        help="core, extended, aiw, tasks, by commas; last lm-eval:TASK,…",
    )
    p.add_argument("--data", metavar="DIR", help="the folder that holds local_data/")
    p.add_argument("--limit", type=int, metavar="N", help="rows of every task")
    p.add_argument("--out", metavar="DIR", help="keep records there, and go on from them")
    p.add_argument("--average", metavar="NAME", help="one of its averages, for its weights")
    p.add_argument("--tokenizer", help="instead of the model's own")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], help="default auto")
    p.add_argument("--dtype", metavar="NAME", help="float32 (default), bfloat16, float16")
    p.add_argument(
        "--backend",
        choices=["auto", "openlm", "transformers"],
        help="whose class computes; auto: ours where it can hold the model",
    )
    _add_others(p)
    p.add_argument("--max-seq-len", type=int, metavar="N", help="tokens of a prompt (2048)")
    p.add_argument("--no-bos", action="store_true", help="without what the tokenizer begins with")
    p.add_argument("--batch-size", type=int, metavar="N", help="sequences of a batch (32)")
    p.add_argument("--batch-tokens", type=int, metavar="N", help="tokens of a batch (16384)")
    others = p.add_argument_group("instead of a model").add_mutually_exclusive_group()
    others.add_argument("--aggregate", metavar="SCORES.json", help="the means of these scores")
    others.add_argument("--dump-prompts", metavar="TASK", help="what a model reads, a row a line")
    others.add_argument("--table", nargs="*", metavar="RUN", help="runs beside published models")
    p.add_argument("--baselines", choices=["v1", "v2"], help="of the means (v2; --table: v1)")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _add_others(p: argparse.ArgumentParser) -> None:
    text = p.add_argument_group("held-out text")
    text.add_argument(
        "--perplexity",
        nargs="+",
        metavar="[NAME=]PATH",
        help="token shards, or text: a file, a folder, a glob",
    )
    text.add_argument("--stride", type=int, metavar="N", help="tokens that windows move by")
    text.add_argument("--tokens", type=int, metavar="N", help="of each source (all)")
    text.add_argument("--text-field", metavar="NAME", help="of JSON lines and parquet (text)")
    text.add_argument("--bootstrap", type=int, metavar="N", help="resamples (10000); 0: none")
    aiw = p.add_argument_group("the suite aiw")
    aiw.add_argument(
        "--aiw-form",
        choices=["base", "standard", "thinking", "restricted"],
        help="base (default); the others need the paper's prompts in --data",
    )
    aiw.add_argument("--aiw-trials", type=int, metavar="N", help="texts per question (60)")
    aiw.add_argument("--aiw-drawn", type=int, metavar="N", help="questions besides the 6 (20)")
    aiw.add_argument("--aiw-temperature", type=float, metavar="T", help="of sampling (0.7)")
    aiw.add_argument("--aiw-seed", type=int, metavar="N", help="of questions and texts (0)")


def _eval(args: argparse.Namespace) -> int:
    if args.aggregate is not None:
        _refuse(
            args,
            "--aggregate",
            "model",
            "suite",
            "data",
            "tokenizer",
            *_OF_SUITE,
            *_OF_MODEL,
            *_OTHERS,
        )
        return _aggregate(args)
    if args.dump_prompts is not None:
        _refuse(
            args,
            "--dump-prompts",
            "model",
            "suite",
            "batch_size",
            "batch_tokens",
            *_OF_MODEL,
            *_OTHERS,
        )
        return _dump_prompts(args)
    if args.table is not None:
        _refuse(
            args, "--table", "model", "suite", "data", "tokenizer", *_OF_SUITE, *_OF_MODEL, *_OTHERS
        )
        return _table(args)
    return _suite(args)


def _refuse(args: argparse.Namespace, mode: str, *names: str) -> None:
    given = [name for name in names if vars(args)[name] not in (None, False)]
    if given:
        flags = ["MODEL" if n == "model" else "--" + n.replace("_", "-") for n in given]
        raise InputError(f"{', '.join(flags)}: not with {mode}")


def _need(args: argparse.Namespace, what: str, *names: str) -> None:
    missing = [name for name in names if vars(args)[name] is None]
    if missing:
        flags = ["MODEL" if n == "model" else "--" + n.replace("_", "-") for n in missing]
        raise InputError(f"{what} needs {', '.join(flags)}; see openlm eval --help")


def _suite_settings(args: argparse.Namespace) -> Any:
    from openlm_lite.eval.icl import SuiteSettings
    from openlm_lite.eval.scorer import BatchLimits

    batch = {"sequences": args.batch_size, "tokens": args.batch_tokens}
    given = {"limit": args.limit, "max_seq_len": args.max_seq_len}
    return SuiteSettings(
        bos=not args.no_bos,
        batch=BatchLimits(**{name: n for name, n in batch.items() if n is not None}),
        **{name: n for name, n in given.items() if n is not None},
    )


def _perplexity_config(args: argparse.Namespace) -> Any:
    from openlm_lite.eval.perplexity import PerplexityConfig

    names = {"seq_len": "max_seq_len", "stride": "stride", "max_tokens": "tokens"}
    names |= {"batch_size": "batch_size", "text_field": "text_field", "bootstrap": "bootstrap"}
    given = {field: vars(args)[word] for field, word in names.items()}
    return PerplexityConfig(**{field: value for field, value in given.items() if value is not None})


def _aiw_config(args: argparse.Namespace) -> Any:
    from openlm_lite.eval.aiw import AIWConfig

    given = {word.removeprefix("aiw_"): vars(args)[word] for word in _OF_AIW}
    if given["temperature"] == 0 and given["trials"] is None:
        given["trials"] = 1  # the likeliest text is one
    return AIWConfig(**{field: value for field, value in given.items() if value is not None})


def _sources(words: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH` words, or a path that is its own name."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or "/" in name:  # a path may have an =
            name = path = word
        if not name or not path:
            raise InputError(f"--perplexity {word}: must be PATH or NAME=PATH")
        if name in found:
            raise InputError(f"--perplexity {word}: {name} is given twice; name one of them NAME=…")
        found[name] = path
    return found


def _suite(args: argparse.Namespace) -> int:
    if args.perplexity is None:
        _need(args, "an evaluation", "model", "suite")
    _need(args, "--perplexity", "model")
    if args.perplexity is None:
        _refuse(args, "an evaluation without --perplexity", *_OF_TEXT)
    from openlm_lite import log
    from openlm_lite.eval.evaluate import EvalRequest, evaluate
    from openlm_lite.eval.measures import Measures, lines_of

    log.setup_console()
    wanted = Measures(
        suite=args.suite or "",
        data=args.data or "",
        settings=_suite_settings(args),
        aiw=_aiw_config(args),
        texts=_sources(args.perplexity or ()),
        perplexity=_perplexity_config(args),
    )
    if not wanted.words.aiw:
        _refuse(args, "a suite without aiw", *_OF_AIW)
    given = {name: vars(args)[name] for name in ("tokenizer", *_OF_MODEL)}
    given = {name: value for name, value in given.items() if value is not None}
    result = evaluate(EvalRequest(args.model, wanted, **given))
    if os.environ.get("RANK", "0") != "0":
        return 0
    baselines = args.baselines or "v2"
    result |= {"baselines": baselines, **result["aggregates"][baselines]}
    if args.json:
        print(json.dumps(result))
        return 0
    asked_tasks = result["tasks"] or result["missing"]
    print("\n".join([*(_result_lines(result) if asked_tasks else ()), *lines_of(result)]))
    return 0


def _result_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{'task':<34}{'shots':>5}{'rows':>8}{'accuracy':>10}{'± s.e.':>8}  notes"]
    for label, task in result["tasks"].items():
        notes = [f"first {task['rows']} of {task['rows_of_task']} rows"] * (
            task["rows"] < task["rows_of_task"]
        )
        notes += [f"{task['trimmed']} prompts cut on the left"] * (task["trimmed"] > 0)
        notes += [f"{task['ties']} ties"] * (task["ties"] > 0)
        notes += [task["problem"]] * (task["problem"] is not None)
        score = "-" if task["accuracy"] is None else f"{100 * task['accuracy']:.2f}"
        error = "-" if task["stderr"] is None else f"{100 * task['stderr']:.2f}"
        lines.append(
            f"{label:<34}{task['shots']:>5}{task['rows']:>8}{score:>10}{error:>8}  "
            f"{'; '.join(notes)}".rstrip()
        )
    lines += [f"missing: {label}: {why}" for label, why in result["missing"].items()]
    scored = {n: t for n, t in result["tasks"].items() if t["accuracy"] is not None}
    return [*lines, *_mean_lines({**result, "centered": scored})]


def _mean_lines(result: dict[str, Any]) -> list[str]:
    """CORE, EXTENDED and the categories, percent; of CORE the missing tasks by name."""
    from openlm_lite.eval.tasks import all_tasks

    scored = set(result["centered"])
    means = {"core": result["core"], "extended": result["extended"], **result["categories"]}
    lines = [f"centered means, percent (baselines {result['baselines']}):"]
    for name, value in means.items():
        of_it = [
            task.label
            for task in all_tasks()
            if name == "extended" or name == task.category or (name == "core" and task.core)
        ]
        if value is not None:
            lines.append(f"  {name:<26}{value:6.2f}")
            continue
        lacking = [label for label in of_it if label not in scored]
        names = f": {', '.join(lacking)}" if name == "core" or len(lacking) < 4 else ""
        lines.append(f"  {name:<26}     -  {len(lacking)} of its {len(of_it)} tasks lack{names}")
    return lines


def _aggregate(args: argparse.Namespace) -> int:
    from openlm_lite.eval.aggregate import aggregate, read_scores

    found = dataclasses.asdict(aggregate(read_scores(args.aggregate), args.baselines or "v2"))
    if args.json:
        print(json.dumps({**found, "unit": "percent"}))
        return 0
    lines = _mean_lines(found)
    if found["unknown"]:
        lines.append(f"counted nowhere, as no tasks of DCLM's: {', '.join(found['unknown'])}")
    print("\n".join(lines))
    return 0


def _dump_prompts(args: argparse.Namespace) -> int:
    _need(args, "--dump-prompts", "data", "tokenizer")
    from openlm_lite.eval.evaluate import dump_prompts

    settings = _suite_settings(args)
    for example in dump_prompts(args.dump_prompts, args.data, args.tokenizer, settings):
        print(json.dumps(example))
    return 0


def _table(args: argparse.Namespace) -> int:
    from openlm_lite.eval.table import make_table, table_lines, table_plain

    table = make_table(args.table, args.baselines or "v1")
    print(json.dumps(table_plain(table)) if args.json else "\n".join(table_lines(table)))
    return 0
