"""What a run costs besides training: logging, checks and watchdog per step; the start-up.

    python benchmarks/overheads.py RECIPE [a.b=c …] [--steps 200] [--starts 3]

Per step: the recipe is trained with its loop, and the seconds that pass inside the parts that are
no training are added up: the record of a step (`Sinks.step`, with the file, console and sinks
behind it), the guard, the watchdog, the agreement of the ranks, the profiler's question and the
garbage collection between steps. Reading the data is not among them, nor are saves. The watchdog's
thread is counted by its CPU seconds.

Start-up: `openlm train` of one step (with the save at its end), against a process that imports
torch, builds the same model and does the step by hand; CPU seconds, in turn, median of `--starts`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

BY_HAND = """
import json
import sys
import torch
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer
fields, micro_batch, micro_batches, seq_len = json.loads(sys.argv[1])
with torch.device("meta"):
    model = Transformer(ModelConfig(**fields))
model.to_empty(device="cpu")
init_weights(model, 0)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
tokens = torch.randint(fields["vocab_size"], (micro_batch, seq_len))
for _ in range(micro_batches):
    model(tokens, tokens).total.backward()
optimizer.step()
"""


def per_step(recipe: str, words: list[str], steps: int) -> dict[str, float]:
    """Seconds of each part, and of whole steps, from the third step on, and how many they were."""
    from openlm_lite import train
    from openlm_lite.guard import Guard
    from openlm_lite.profile import Profiler
    from openlm_lite.run import load_run
    from openlm_lite.sinks import Sinks
    from openlm_lite.watchdog import Watchdog

    spent: dict[str, float] = {}
    done = 0

    def timed(owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                if done >= 2:
                    spent[part] = spent.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, name, wrapper)

    timed(Sinks, "step", "record")
    timed(Sinks, "judged", "record")
    timed(Guard, "judge", "guard")
    timed(Guard, "leaves_out", "guard")
    timed(Watchdog, "enter", "watchdog")
    timed(train, "agree_on", "agreement of the ranks")
    timed(train, "share_bad_shards", "agreement of the ranks")
    timed(Profiler, "begin", "profiler")
    timed(Profiler, "end", "profiler")
    inner_step, whole = train.Loop.step, 0.0

    def step(loop: Any) -> bool:
        nonlocal done, whole
        start = time.perf_counter()
        result = inner_step(loop)
        if done >= 2:
            whole += time.perf_counter() - start
        done += 1
        return result

    train.Loop.step = step
    inner_tick = Watchdog._arm_backup
    ticks = [0, 0.0]

    def tick(self: Any, limit: float) -> None:
        inner_tick(self, limit)
        ticks[0] += 1
        ticks[1] = time.thread_time()

    Watchdog._arm_backup = tick
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = [f"run.dir={folder}/run", f"total_steps={steps}", "total_tokens=null"]
        run += ["eval.every_steps=0", "checkpoint.every_steps=1000000", "log.every_steps=10"]
        train.train(load_run(recipe, [*words, *run]))
    spent["watchdog's thread (CPU)"] = ticks[1] * whole / (time.monotonic() - start)
    return {"whole": whole, "steps": done - 2, **spent}


def cpu_seconds_of(command: list[str]) -> float:
    """User and system seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode} of {' '.join(command)}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start_up(recipe: str, words: list[str], starts: int) -> dict[str, float]:
    """CPU seconds of both ways to a first step, in turn."""
    from openlm_lite.run import load_run

    cfg = load_run(recipe, words)
    fields = dataclasses.asdict(cfg.model.architecture)
    sizes = [fields, cfg.micro_batch_size, cfg.micro_batches(1, 0), cfg.data.seq_len]
    by_hand = [sys.executable, "-c", BY_HAND, json.dumps(sizes)]
    found: dict[str, list[float]] = {"openlm train": [], "by hand": [], "import torch": []}
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as folder:
            run = [f"run.dir={folder}/run", "total_steps=1", "total_tokens=null", "data.val={}"]
            run += ["checkpoint.every_steps=1000000"]
            run += [
                "schedule.name=constant",
                "schedule.warmup_steps=0",
                "schedule.cooldown_steps=0",
            ]
            train = [sys.executable, str(ROOT / "train.py"), recipe, *words, *run]
            found["openlm train"].append(cpu_seconds_of(train))
        found["by hand"].append(cpu_seconds_of(by_hand))
        found["import torch"].append(cpu_seconds_of([sys.executable, "-c", "import torch"]))
    ratios = [a / b for a, b, _ in zip(*found.values(), strict=True)]
    medians = {name: statistics.median(times) for name, times in found.items()}
    return {**medians, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("words", nargs="*", metavar="a.b=c")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--starts", type=int, default=3)
    args = parser.parse_args()
    starts = start_up(args.recipe, args.words, args.starts)
    spent = per_step(args.recipe, args.words, args.steps)
    whole, steps = spent.pop("whole"), spent.pop("steps")
    shares = {name: seconds / whole for name, seconds in spent.items()}
    result = {
        "seconds_per_step": whole / steps,
        "milliseconds_per_step": {k: 1000 * v / steps for k, v in spent.items()},
        "share_of_a_step": shares,
        "share_in_all": sum(shares.values()),
        "start_up_cpu_seconds": starts,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
