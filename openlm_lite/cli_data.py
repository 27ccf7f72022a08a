"""The verbs of `openlm` that are about data: prepare and inspect."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

from openlm_lite.errors import InputError

AddVerb = Callable[[str, Callable[[argparse.Namespace], int], str], Any]


def add_verbs(verb: AddVerb) -> None:
    """Add the words of both to the parser."""
    _add_prepare(verb)
    p = verb("inspect", _inspect, "show what a dataset, run or checkpoint holds")
    p.add_argument("path")
    p.add_argument("--verify", action="store_true", help="read everything, check sums and ranges")
    p.add_argument("--workers", type=int, default=0, help="of --verify; 0: all cores")
    p.add_argument("--journal", metavar="FILE", help="of --verify: goes on where it was stopped")
    p.add_argument(
        "--step", type=int, help="the rows that a step (from 0) of a run or recipe reads"
    )
    p.add_argument("--tokenizer", help="of --step: shows the rows of OpenLM's shards as text")
    p.add_argument("--json", action="store_true")


def _add_prepare(verb: AddVerb) -> None:
    p = verb("prepare", _prepare, "turn text into token shards")
    p.add_argument(
        "inputs", nargs="*", help="files, folders, globs or URLs: jsonl[.gz|.zst], parquet, text"
    )
    p.add_argument("--out", required=True, help="the folder (or s3://… URL) to make")
    how = p.add_mutually_exclusive_group()
    how.add_argument(
        "--tokenizer", help="tiktoken encoding, ranks file, tokenizer.json or hub name"
    )
    how.add_argument("--train-tokenizer", type=int, metavar="N", help="train a BPE of N ids first")
    p.add_argument("--eot", help="the token that ends documents, if the tokenizer has several")
    p.add_argument("--val-fraction", type=float, default=0.0, help="of the documents, held out")
    p.add_argument("--text-field", default="text", help="of jsonl and parquet (default text)")
    p.add_argument(
        "--block-tokens", type=int, help="tokens per block (default 65536; with --pack SEQ_LEN)"
    )
    p.add_argument("--pack", choices=["none", "best-fit"], default="none", help="whole documents")
    p.add_argument("--seq-len", type=int, help="tokens per row of --pack best-fit")
    p.add_argument("--blocks-per-shard", type=int, default=256)
    p.add_argument("--seed", type=int, default=0, help="of the shuffle and the split")
    p.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="INPUT=W",
        help="how often to take the documents of an input: 0.3, 2.5, … (default 1; repeatable)",
    )
    p.add_argument("--min-characters", type=int, default=0, metavar="N", help="drop shorter ones")
    p.add_argument("--min-tokens", type=int, default=0, metavar="N", help="drop shorter ones")
    p.add_argument("--dedup", action="store_true", help="of equal documents keep the first")
    p.add_argument(
        "--decontaminate",
        action="append",
        default=[],
        metavar="PATH",
        help="drop documents that share an n-gram with the text of these files (repeatable)",
    )
    p.add_argument("--decontaminate-ngram", type=int, default=13, metavar="N", help="words")
    p.add_argument(
        "--on-bad-document",
        choices=["stop", "skip"],
        default="stop",
        help="broken JSON, no text, not UTF-8: stop, or leave it out and count it",
    )
    p.add_argument("--workers", type=int, default=0, help="processes; 0: all cores")
    p.add_argument("--executor", choices=["local", "ray"], default="local", help="who works")
    p.add_argument("--ray-address", metavar="HOST:PORT", help="default: RAY_ADDRESS, else local")
    p.add_argument("--scratch", metavar="DIR", help="for the work in hand (default OUT/.prepare)")
    shards = p.add_argument_group("instead of text")
    shards.add_argument("--from-shards", metavar="FOLDER", help="convert OpenLM's or DCLM's shards")
    shards.add_argument("--vocab-size", type=int, help="of the shards, without --tokenizer")
    shards.add_argument("--pad-id", type=int, help="fills up rows that are short")
    shards.add_argument("--eot-id", type=int, help='for the text "<|endoftext|>" among the ids')
    p.add_argument("--json", action="store_true", help="the report as JSON on standard output")


def _prepare(args: argparse.Namespace) -> int:
    if args.from_shards is not None:
        return _convert(args)
    from openlm_lite.data.prepare import PrepareConfig, prepare

    given_alone = [n for n in ("vocab_size", "pad_id", "eot_id") if vars(args)[n] is not None]
    if given_alone:
        flags = ", ".join("--" + name.replace("_", "-") for name in given_alone)
        raise InputError(f"{flags}: goes with --from-shards FOLDER")
    names = {f.name for f in dataclasses.fields(PrepareConfig)}
    given: dict[str, Any] = {k: v for k, v in vars(args).items() if k in names}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if args.block_tokens is None:
        del given["block_tokens"]
    report = prepare(PrepareConfig(**given))
    result = dataclasses.asdict(report)
    if not args.json:  # a table of the splits reads better than nested mappings
        splits = result.pop("splits")
        result["splits"] = [{"split": name, **split} for name, split in splits.items()]
        result["seconds"] = round(report.seconds, 2)
        result["tokens_per_second"] = round(report.tokens_per_second)
    print_result(result, args.json)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from openlm_lite.data.convert import convert_shards

    if args.inputs or args.train_tokenizer is not None:
        raise InputError("--from-shards: takes the place of inputs and of --train-tokenizer")
    report = convert_shards(
        args.from_shards,
        args.out,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        block_tokens=args.block_tokens,
        pad_id=args.pad_id,
        eot_id=args.eot_id,
        workers=args.workers,
        scratch=args.scratch,
    )
    print_result(dataclasses.asdict(report), args.json)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from openlm_lite.inspection import inspect_path

    found = inspect_path(
        args.path,
        args.verify,
        args.step,
        workers=args.workers,
        journal=args.journal,
        tokenizer=args.tokenizer,
    )
    print_result(found, args.json)
    return 0


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """A verb's result: one JSON object, or a line per (dotted) name."""
    from openlm_lite.config import flatten

    if as_json:
        print(json.dumps(result))
        return
    lines = flatten(result)
    width = max(map(len, lines), default=0)
    for name, value in lines.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{name}:")
            for row in value:
                print("  " + "  ".join(f"{k}={v}" for k, v in row.items()))
        else:
            shown = (
                f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            )
            print(f"{name:<{width}}  {shown}")
