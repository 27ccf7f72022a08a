"""The plan of a ladder, as plain values and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openlm_lite.scaling.ladder import TARGET_NAME, Plan, PlannedRun


def plan_report(plan: Plan, budget: float | None) -> dict[str, Any]:
    """The plan as plain values for JSON."""
    total = sum(run.flops for run in plan.runs)
    runs = [run_facts(run) | {"share": run.flops / (budget or total)} for run in plan.runs]
    return {
        "ladder": plan.name,
        "budget": budget,
        "total_flops": total,
        "runs": runs,
        "target": run_facts(plan.target)
        | {"times_largest": plan.target.flops / plan.runs[-1].flops},
    }


def run_facts(run: PlannedRun) -> dict[str, Any]:
    """What the table and the manifest say of a run."""
    model = run.cfg.model
    return {
        "name": run.name,
        "d_model": model.d_model,
        "n_layers": model.n_layers,
        "N": run.N,
        "N_in_blocks": model.n_block_matrix_params,
        "D": run.D,
        "M": run.D / run.N,
        "steps": run.cfg.steps,
        "lr": run.cfg.optim.lr,
        "flops": run.flops,
    }


def plan_lines(found: Mapping[str, Any]) -> list[str]:
    """The table of `openlm fit --plan`, and what to do next."""
    of = "the budget" if found["budget"] else "the grid"
    lines = [
        f"{'run':<12} {'d x L':>9} {'N':>14} {'in blocks':>14} {'D':>16} {'M':>7} {'steps':>9} "
        f"{'lr':>8} {'FLOPs':>9}  of {of}"
    ]
    for run in [*found["runs"], found["target"]]:
        share = f"{100 * run['share']:.1f} %" if "share" in run else "—"
        lines.append(
            f"{run['name']:<12} {run['d_model']:>5} x{run['n_layers']:>2} {run['N']:>14,} "
            f"{run['N_in_blocks']:>14,} {run['D']:>16,} {run['M']:>7.3g} {run['steps']:>9,} "
            f"{run['lr']:>8.2g} {run['flops']:>9.3g}  {share}"
        )
    target, budget = found["target"], found["budget"]
    lines.append(
        f"{len(found['runs'])} runs, {found['total_flops']:.3g} FLOPs"
        + (f" of {budget:.3g}" if budget else "")
        + f"; the target is {target['times_largest']:.3g} times the largest of them"
    )
    out = found.get("written", "DIR")
    lines += [
        f"written: {out}" if "written" in found else "--out DIR writes their recipes; then:",
        f"  bash {out}/run.sh             # or sbatch {out}/array.sbatch",
        f"  openlm fit {out} --predict N={target['N']},D={target['D']}",
        f"  bash {out}/run.sh {TARGET_NAME}      # to compare",
    ]
    return lines
