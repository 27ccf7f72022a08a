"""`openlm bench`: how fast does a recipe train here?"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from openlm_lite.cli_data import print_result
from openlm_lite.host_memory import take_large_pages


def add_verb(verb: Callable[..., Any]) -> None:
    """Add `bench`; `verb` makes a parser for a name, a function and a help text."""
    p = verb("bench", _bench, "time training steps of a recipe; nothing is saved")
    p.add_argument("recipe")
    p.add_argument("overrides", nargs="*", metavar="a.b=c")
    p.add_argument("--steps", type=int, default=10, help="that are timed (default 10)")
    p.add_argument("--warmup", type=int, default=3, help="before them, not timed (default 3)")
    p.add_argument(
        "--data",
        choices=["synthetic", "real"],
        default="synthetic",
        help="random tokens, or those of the recipe (default synthetic)",
    )
    p.add_argument("--trace", metavar="FILE.json", help="of one more step, for chrome://tracing")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _bench(args: argparse.Namespace) -> int:
    take_large_pages()
    from openlm_lite import log
    from openlm_lite.bench import bench
    from openlm_lite.run import load_run

    log.setup_console()
    found = bench(
        load_run(args.recipe, args.overrides),
        steps=args.steps,
        warmup=args.warmup,
        real_data=args.data == "real",
        trace=args.trace,
    )
    if found:  # rank 0
        print_result(found, args.json)
    return 0
