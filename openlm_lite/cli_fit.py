"""The verb of `openlm` that fits scaling laws, and plans the runs to fit them on."""

from __future__ import annotations

import argparse
import json
from typing import Any

from openlm_lite.cli_data import AddVerb
from openlm_lite.errors import InputError

_FIT_ONLY = ("where", "loss", "error", "predict", "fit_on", "error_on", "budgets")
_FIT_ONLY += ("bootstrap", "leave_out", "plot")


def add_verbs(verb: AddVerb) -> None:
    """Add the words of `fit` to the parser."""
    p = verb("fit", _fit, "fit scaling laws to finished runs, or plan such runs")
    p.add_argument(
        "inputs", nargs="*", metavar="TABLE_OR_RUNS", help=".json, .csv, run folders, planned DIR"
    )
    p.add_argument(
        "--where", action="append", default=[], metavar="K=V,…", help="only these runs (< > != too)"
    )
    p.add_argument("--loss", metavar="COLUMN", help="what the loss law is fitted to")
    p.add_argument("--error", metavar="COLUMN", help="fit this from the loss too")
    p.add_argument(
        "--law", choices=["over-training", "chinchilla", "isoflop"], default="over-training"
    )
    p.add_argument(
        "--predict",
        action="append",
        default=[],
        metavar="N=…,D=…",
        help="a model (N=…,M=… too; C=… with --law isoflop); repeatable",
    )
    p.add_argument(
        "--fit-on",
        action="append",
        default=[],
        metavar="paper | all | K=V,…",
        help="fit on these runs only (repeatable: together); default: paper where there, else all",
    )
    p.add_argument(
        "--error-on",
        action="append",
        default=[],
        metavar="paper | all | K=V,…",
        help="the same for --error; default: as --fit-on, with paper's one more run",
    )
    p.add_argument("--budgets", metavar="C,C,…", help="of isoflop: read losses off at these FLOPs")
    p.add_argument("--bootstrap", type=int, default=0, metavar="N", help="intervals from N draws")
    p.add_argument("--seed", type=int, default=0, help="of --bootstrap")
    p.add_argument("--leave-out", action="store_true", help="predict each run from the others")
    p.add_argument("--plot", metavar="FILE", help="draw runs and laws: .png or .svg")
    plan = p.add_argument_group("instead of fitting")
    plan.add_argument("--plan", metavar="LADDER.yaml", help="show the runs of a ladder")
    plan.add_argument("--budget", type=float, metavar="FLOPS", help="that the runs must not exceed")
    plan.add_argument("--out", metavar="DIR", help="write their recipes and what trains them")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _fit(args: argparse.Namespace) -> int:
    if args.plan is not None:
        return _plan(args)
    if args.budget is not None or args.out is not None:
        raise InputError("--budget and --out go with --plan LADDER.yaml")
    if not args.inputs:
        raise InputError("give tables or run folders to fit on, or --plan LADDER.yaml")
    if args.bootstrap < 0:
        raise InputError(f"--bootstrap {args.bootstrap}: must be at least 1 (0: no intervals)")
    from openlm_lite.scaling.fit import FitRequest, fit
    from openlm_lite.scaling.plot import check_plot_path, plot_fit
    from openlm_lite.scaling.report import isoflop_report, report
    from openlm_lite.scaling.text import lines_of

    request = FitRequest(
        inputs=tuple(args.inputs),
        where=tuple(args.where),
        loss=args.loss,
        error=args.error,
        law=args.law,
        predict=tuple(args.predict),
        fit_on=tuple(args.fit_on),
        error_on=tuple(args.error_on),
        budgets=_flops(args.budgets),
        bootstrap=args.bootstrap,
        seed=args.seed,
        leave_out=args.leave_out,
    )
    if args.plot is not None:
        check_plot_path(args.plot)
    if args.law == "isoflop":
        if args.plot is not None:
            raise InputError("--plot: not with --law isoflop")
        found = isoflop_report(request)
    else:
        if args.budgets is not None:
            raise InputError("--budgets goes with --law isoflop")
        fitted = fit(request)
        found = report(fitted, request)
        if args.plot is not None:
            plot_fit(fitted, args.plot)
            found["plot"] = args.plot
    _print(found, lines_of(found), args.json)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from openlm_lite.scaling.ladder import plan_ladder
    from openlm_lite.scaling.launch import write_plan
    from openlm_lite.scaling.plan_text import plan_lines, plan_report

    given = [name for name in _FIT_ONLY if vars(args)[name]]
    if args.inputs or given:
        flags = [*args.inputs, *("--" + name.replace("_", "-") for name in given)]
        raise InputError(f"{', '.join(flags)}: not with --plan, which fits nothing")
    plan = plan_ladder(args.plan, args.out or "runs/ladder", args.budget)
    found = plan_report(plan, args.budget)
    if args.out is not None:
        write_plan(plan, args.out, args.budget)
        found["written"] = args.out
    _print(found, plan_lines(found), args.json)
    return 0


def _flops(text: str | None) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in (text.split(",") if text is not None else ()))
    except ValueError:
        found = (0.0,)
    if not all(0 < C < 1e40 for C in found):
        raise InputError(f"--budgets {text}: must be FLOPs, separated by commas, such as 1e18,3e18")
    return found


def _print(found: dict[str, Any], lines: list[str], as_json: bool) -> None:
    print(json.dumps(found) if as_json else "\n".join(lines))
