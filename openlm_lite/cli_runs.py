"""The verbs of `openlm` that look at runs: runs, plot and report. None of them needs torch."""

from __future__ import annotations

import argparse

from openlm_lite.cli_data import AddVerb
from openlm_lite.errors import InputError


def add_verbs(verb: AddVerb) -> None:
    """Add the words of each to the parser."""
    p = verb("runs", _runs, "list the runs below a folder: state, step, loss, last checkpoint")
    p.add_argument("folder", nargs="?", default="runs", metavar="DIR", help="default: runs")
    p.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    p.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="of --watch")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")

    p = verb("plot", _plot, "draw the curves of runs, or the learning rates of recipes")
    p.add_argument("runs", nargs="+", metavar="RUN")
    p.add_argument("--x", choices=["tokens", "flops", "time", "step"], help="default: tokens")
    p.add_argument("--smooth", type=int, metavar="STEPS", help="default: a fiftieth of a run")
    p.add_argument(
        "--schedule",
        action="store_true",
        help="instead of runs: recipes, each with its a.b=c words behind it",
    )
    p.add_argument("--out", help="PNG or SVG file (default RUN/loss.png, schedule.png)")

    p = verb("report", _report, "write one HTML page about runs, which needs no network")
    p.add_argument("runs", nargs="+", metavar="RUN")
    p.add_argument("--out", metavar="FILE.html", help="default: report.html in the first run")
    p.add_argument("--title", help="default: the names of the runs")


def _runs(args: argparse.Namespace) -> int:
    from openlm_lite.runs import print_table, table, watch

    if not 0.1 <= args.every <= 86400:
        raise InputError(f"--every {args.every:g}: must be from 0.1 to 86400 seconds")
    if not args.watch:
        print_table(table(args.folder), args.json)
        return 0
    try:
        watch(args.folder, args.every, args.json)
    except KeyboardInterrupt:  # how it is meant to end
        print()
    return 0


def _plot(args: argparse.Namespace) -> int:
    from openlm_lite.plots import plot_runs, plot_schedules

    if args.schedule:
        if args.x is not None or args.smooth is not None:
            raise InputError("--x and --smooth: not with --schedule, which draws no run")
        print(plot_schedules(args.runs, args.out))
        return 0
    if args.smooth is not None and args.smooth < 1:
        raise InputError(f"--smooth {args.smooth}: must be at least 1 (1: not smoothed)")
    print(plot_runs(args.runs, args.out, args.x or "tokens", args.smooth))
    return 0


def _report(args: argparse.Namespace) -> int:
    from openlm_lite.report.page import write_report

    print(write_report(args.runs, args.out, args.title))
    return 0
