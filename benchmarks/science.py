"""The experiments of docs/science.md, on real text at a size for two CPU cores.

    python benchmarks/science.py EXPERIMENT [--jobs 2] [--out runs/science]

Each experiment is a handful of runs of recipes/quickstart.yaml with some settings changed: real
`openlm train` processes, one thread each, --jobs at a time. Run folders lie under --out and are
kept: a run that is finished is not run again, one that was stopped goes on. What they came to is
printed, written to benchmarks/results/science_EXPERIMENT.json, and drawn in
docs/images/science_EXPERIMENT.svg. Needs the data of `make quickstart`.

    cooldown     the same tokens with and without a cooldown, branched from one trunk
    averages     LAWA and EMA beside the raw weights, all along a run
    inheritune   a student from the first half of a teacher's layers, and the same from scratch,
                 as long, and as long as teacher and student together
    muon         AdamW and Muon, each at the best learning rate of one grid; Muon with 0.75 of the
                 tokens

The ladder has commands of its own: recipes/ladder.yaml.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openlm_lite.log import read_metrics

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
SEEDS = (0, 1, 2)
STEPS = 340  # of the quickstart recipe
VAL = "val/stdlib/loss"
Curve = list[tuple[int, float]]
"""(tokens, validation loss)"""


@dataclass(frozen=True)
class Run:
    """A run of the quickstart recipe with some of its settings changed."""

    name: str
    words: tuple[str, ...]

    def folder(self, out: Path) -> Path:
        return out / self.name

    def metrics(self, out: Path) -> list[dict[str, Any]]:
        return read_metrics(self.folder(out) / "metrics.jsonl")

    def curve(self, out: Path, key: str = VAL) -> Curve:
        return [(r["tokens"], r[key]) for r in self.metrics(out) if key in r]

    def final(self, out: Path, key: str = VAL) -> float:
        return self.curve(out, key)[-1][1]


def train(runs: Sequence[Run], out: Path, jobs: int) -> None:
    """Bring all of them to their ends, `jobs` at a time."""

    def one(run: Run) -> None:
        done = run.folder(out) / "finished"
        if done.exists():
            return
        command = [sys.executable, "-m", "openlm_lite", "train", "recipes/quickstart.yaml"]
        words = [f"run.dir={run.folder(out)}", "run.device=cpu", "micro_batch_size=8"]
        log = out / f"{run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            code = subprocess.run(
                [*command, *words, *run.words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code:
            raise SystemExit(f"{run.name}: exit code {code}; see {log}")
        done.touch()
        print(f"{run.name}: {VAL} {run.final(out):.4f}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "all": values}


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ours minus theirs, seed by seed: the seeds' own differences cancel."""
    return spread([a - b for a, b in zip(ours, theirs, strict=True)])


def seeded(seed: int) -> tuple[str, ...]:
    return f"run.seed={seed}", f"data.seed={seed}"


# --- the experiments -----------------------------------------------------------------------------


def cooldown(out: Path, jobs: int) -> tuple[dict[str, Any], dict[str, Curve]]:
    """One trunk at a constant rate; branches that cool down from three of its checkpoints."""
    length = 85
    schedule = "schedule={name: constant, warmup_steps: 30, cooldown_steps: 0}"
    trunks = {
        seed: Run(
            f"cooldown/trunk-{seed}",
            (*seeded(seed), schedule, f"checkpoint.every_steps={length}", "checkpoint.keep_last=9"),
        )
        for seed in SEEDS
    }
    train(list(trunks.values()), out, jobs)
    starts = (length, 2 * length, 3 * length)
    branches = {
        (seed, start): Run(
            f"cooldown/from-{start}-{seed}",
            (
                *seeded(seed),
                f"total_steps={start + length}",  # counted from the trunk's first
                "schedule={name: constant_cooldown, warmup_steps: 30, end_lr: 6e-5, "
                f"cooldown_steps: {length}}}",
                f"model.init_from={{path: {trunk.folder(out)}/checkpoints/step_{start:08d}, "
                "optimizer: true, data: continue}",
            ),
        )
        for seed, trunk in trunks.items()
        for start in starts
    }
    train(list(branches.values()), out, jobs)
    results: dict[str, Any] = {}
    for start in starts:
        tokens = (start + length) * 2048
        plain = [dict(trunks[seed].curve(out))[tokens] for seed in SEEDS]
        cooled = [branches[seed, start].final(out) for seed in SEEDS]
        results[f"{tokens} tokens"] = {
            "constant": spread(plain),
            "cooled down": spread(cooled),
            "difference": difference(cooled, plain),
        }
    curves = {"trunk, constant rate": trunks[0].curve(out)}
    for start in starts:
        curves[f"cooled down from step {start}"] = branches[0, start].curve(out)
    return results, curves


def averages(out: Path, jobs: int) -> tuple[dict[str, Any], dict[str, Curve]]:
    """LAWA and EMA of runs at a constant and at a cosine rate, evaluated every 20 steps."""
    kinds = (
        "averages={lawa: {kind: lawa, snapshots: 5, every_steps: 10}, "
        "ema: {kind: ema, decay: 0.95, every_steps: 1}}"
    )
    schedules = {
        "constant": "schedule={name: constant, warmup_steps: 30, cooldown_steps: 0}",
        "cosine": "schedule={name: cosine, warmup_steps: 30, end_lr: 6e-5, cooldown_steps: 0}",
    }
    runs = {
        (name, seed): Run(
            f"averages/{name}-{seed}", (*seeded(seed), schedule, kinds, "eval.every_steps=20")
        )
        for name, schedule in schedules.items()
        for seed in SEEDS
    }
    train(list(runs.values()), out, jobs)
    results: dict[str, Any] = {}
    keys = {"lawa": "val/stdlib/lawa/loss", "ema": "val/stdlib/ema/loss"}
    for schedule in schedules:
        for step in (60, 100, 160, 240, 340):
            tokens = step * 2048
            raw = [dict(runs[schedule, seed].curve(out))[tokens] for seed in SEEDS]
            row: dict[str, Any] = {"raw": spread(raw)}
            for name, key in keys.items():
                found = [dict(runs[schedule, seed].curve(out, key))[tokens] for seed in SEEDS]
                row |= {name: spread(found), f"{name} - raw": difference(found, raw)}
            results[f"{schedule}, step {step}"] = row
    curves = {
        f"{schedule}, {name}": runs[schedule, 0].curve(out, key)
        for schedule in schedules
        for name, key in {"raw": VAL, **keys}.items()
    }
    return results, {name: curve[2:] for name, curve in curves.items()}


def inheritune(out: Path, jobs: int) -> tuple[dict[str, Any], dict[str, Curve]]:
    """The first two of four trained layers, trained on; and two fresh layers, as long."""
    teachers = {seed: Run(f"inheritune/teacher-{seed}", seeded(seed)) for seed in SEEDS}
    train(list(teachers.values()), out, jobs)
    students: dict[tuple[str, int], Run] = {}
    for seed, teacher in teachers.items():
        # another order of the data than the teacher's
        common = (f"run.seed={seed}", f"data.seed={seed + 10}", "model.n_layers=2")
        words = (*common, "eval.every_steps=34")
        start = f"model.init_from={{path: {teacher.folder(out)}, layers: [0-1]}}"
        students["inherited", seed] = Run(f"inheritune/inherited-{seed}", (*words, start))
        students["from scratch", seed] = Run(f"inheritune/scratch-{seed}", words)
        students["from scratch, twice as long", seed] = Run(
            f"inheritune/long-{seed}",
            (
                *words,
                f"total_steps={2 * STEPS}",
                "schedule={name: cosine_cooldown, warmup_steps: 60, end_lr: 6e-5, "
                "cooldown_steps: 170}",
            ),
        )
    train(list(students.values()), out, jobs)
    results: dict[str, Any] = {
        "teacher, 4 layers": spread([teachers[seed].final(out) for seed in SEEDS]),
        "from scratch, twice as long": spread(
            [students["from scratch, twice as long", seed].final(out) for seed in SEEDS]
        ),
    }
    for step in (34, 102, 204, 340):
        tokens = step * 2048
        found = {
            name: [dict(students[name, seed].curve(out))[tokens] for seed in SEEDS]
            for name in ("inherited", "from scratch")
        }
        results[f"step {step}"] = {
            **{name: spread(values) for name, values in found.items()},
            "difference": difference(found["inherited"], found["from scratch"]),
        }
    curves = {
        f"student, {name}": students[name, 0].curve(out)
        for name in ("inherited", "from scratch", "from scratch, twice as long")
    }
    return results, curves


MUON_SHARE = 0.75
GRID = (3e-3, 6e-3, 12e-3, 24e-3)


def muon(out: Path, jobs: int) -> tuple[dict[str, Any], dict[str, Curve]]:
    """The grid with the first seed, then both optimizers' best rates with all seeds."""
    short = round(MUON_SHARE * STEPS)
    lengths = {"adamw": STEPS, "muon": short}

    def run(name: str, lr: float, seed: int) -> Run:
        steps = lengths[name]
        schedule = (
            f"schedule={{name: cosine_cooldown, warmup_steps: {round(30 * steps / STEPS)}, "
            f"end_lr: 6e-5, cooldown_steps: {steps // 4}}}"
        )
        return Run(
            f"muon/{name}-{lr:g}-{seed}",
            (
                *seeded(seed),
                f"optim.name={name}",
                f"optim.lr={lr}",
                f"total_steps={steps}",
                schedule,
                "eval.every_steps=17",
            ),
        )

    train([run(name, lr, SEEDS[0]) for name in lengths for lr in GRID], out, jobs)
    grid = {
        name: {f"{lr:g}": run(name, lr, SEEDS[0]).final(out) for lr in GRID} for name in lengths
    }
    best = {name: min(GRID, key=lambda lr, name=name: grid[name][f"{lr:g}"]) for name in lengths}
    runs = {(name, seed): run(name, best[name], seed) for name in lengths for seed in SEEDS}
    train(list(runs.values()), out, jobs)
    final = {name: [runs[name, seed].final(out) for seed in SEEDS] for name in lengths}
    results = {
        "grid (first seed)": grid,
        "best learning rate": best,
        "tokens": {name: steps * 2048 for name, steps in lengths.items()},
        **{name: spread(values) for name, values in final.items()},
        "muon - adamw": difference(final["muon"], final["adamw"]),
    }
    curves = {f"{name}, lr {best[name]:g}": runs[name, SEEDS[0]].curve(out) for name in lengths}
    return results, curves


Experiment = Callable[[Path, int], tuple[dict[str, Any], dict[str, Curve]]]
EXPERIMENTS: Mapping[str, Experiment] = {
    "cooldown": cooldown,
    "averages": averages,
    "inheritune": inheritune,
    "muon": muon,
}


# --- what is shown of them -----------------------------------------------------------------------

PANELS: Mapping[str, Sequence[str]] = {"averages": ("constant", "cosine")}
STYLES = ("o-", "s--", "^:", "v-.")  # curves that lie on each other stay visible
HEIGHT = 1.6  # of a picture, in nats


def draw(path: Path, curves: Mapping[str, Curve], panels: Sequence[str] = ("",)) -> None:
    """One panel of all curves, or one for each of `panels`, of the curves named "PANEL, …"."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "openlm_lite"  # the same picture, the same bytes
    from matplotlib import pyplot as plt

    figure, row = plt.subplots(
        1,
        len(panels),
        figsize=(7 if len(panels) == 1 else 4.6 * len(panels), 4.2),
        sharey=True,
        squeeze=False,
        constrained_layout=True,
    )
    for title, axes in zip(panels, row[0], strict=True):
        begins = f"{title}, " if title else ""
        shown = {n.removeprefix(begins): c for n, c in curves.items() if n.startswith(begins)}
        for (name, curve), style in zip(shown.items(), itertools.cycle(STYLES)):
            tokens, losses = zip(*curve, strict=True)
            axes.plot(tokens, losses, style, markersize=4, label=name)
        axes.set_title(title)
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:,.0f}k")
        axes.grid(alpha=0.3)
        axes.legend()
    row[0, 0].set_ylabel("validation loss (nats per token)")
    # the first evaluations, before anything was learnt, would flatten the rest
    last = min(curve[-1][1] for curve in curves.values())
    row[0, 0].set_ylim(last - 0.1, last + HEIGHT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", choices=[*EXPERIMENTS])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "science")
    parser.add_argument("--redraw", action="store_true", help="only the picture, from the results")
    args = parser.parse_args()
    path = RESULTS / f"science_{args.experiment}.json"
    picture = IMAGES / f"science_{args.experiment}.svg"
    panels = PANELS.get(args.experiment, ("",))
    if args.redraw:
        draw(picture, json.loads(path.read_text())["curves"], panels)
        return
    results, curves = EXPERIMENTS[args.experiment](args.out.absolute(), args.jobs)
    print(json.dumps(results, indent=2))
    document = {
        "experiment": args.experiment,
        "command": f"python benchmarks/science.py {args.experiment}",
        "seeds": SEEDS,
        "machine": f"{platform.processor() or platform.machine()}, one thread per run",
        "torch": torch.__version__,
        "results": results,
        "curves": curves,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    draw(picture, curves, panels)
    print(f"written to {path} and {picture}")


if __name__ == "__main__":
    main()
