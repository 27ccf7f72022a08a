"""The verbs of `openlm` that compare and combine runs: average."""

from __future__ import annotations

import argparse
import dataclasses

from openlm_lite.cli_data import AddVerb, print_result
from openlm_lite.errors import InputError


def add_verbs(verb: AddVerb) -> None:
    """Add the words of each to the parser."""
    _add_average(verb)


def _add_average(verb: AddVerb) -> None:
    p = verb("average", _average, "write the weighted mean of models, as a checkpoint")
    p.add_argument("out", help="the folder to make")
    p.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE[=WEIGHT]",
        help="run folder, checkpoint or Hugging Face folder; without weights all weigh the same",
    )
    p.add_argument("--normalise", action="store_true", help="divide the weights by their sum")
    p.add_argument("--last", type=int, metavar="N", help="the N newest checkpoints of the one run")
    p.add_argument("--every", type=int, metavar="STEPS", help="of --last: steps that it divides")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _average(args: argparse.Namespace) -> int:
    from openlm_lite.average.soup import average_last, average_models

    if args.last is None:
        if args.every is not None:
            raise InputError("--every goes with --last N: the newest checkpoints of one run")
        report = average_models(args.out, args.sources, normalise=args.normalise)
    else:
        if len(args.sources) > 1 or args.normalise:
            raise InputError("--last takes one run, without weights and without --normalise")
        report = average_last(
            args.out, args.sources[0], args.last, 1 if args.every is None else args.every
        )
    print_result(dataclasses.asdict(report), args.json)
    return 0
