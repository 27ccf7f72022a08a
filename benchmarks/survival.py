"""What surviving costs: the stall of a save, the way back after a kill, the way out after a stop.

    python benchmarks/survival.py [--repeats 5] [--parameters 20000000]

    stall      seconds that training waits for a save in the background, and for one in the
               foreground, of a model of --parameters with AdamW (12 bytes each); interleaved
    restart    seconds from the start of the process to its first step: of a new run of the
               quickstart model, and of the same after SIGKILL (it loads and verifies a checkpoint)
    stop       seconds from SIGTERM to the end of the process, beside the median step and save

Everything on the CPU, one process; needs the data of `make quickstart`. Prints a table and writes
JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from openlm_lite import dist
from openlm_lite.checkpoint import CheckpointConfig, TrainState
from openlm_lite.saver import Saver

ROOT = Path(__file__).parents[1]
GLOBAL_BATCH_TOKENS = 2048  # of the quickstart recipe


def stalls(folder: Path, n_parameters: int, repeats: int) -> dict[str, list[float]]:
    """Seconds that the training thread waits, of each way to save."""
    torch.set_num_threads(1)
    dist.init("cpu")
    width = 1024
    model = nn.Sequential(
        *(nn.Linear(width, width, bias=False) for _ in range(n_parameters // width**2))
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    ways = {
        "background": Saver(str(folder / "behind"), CheckpointConfig(keep_last=1)),
        "foreground": Saver(str(folder / "front"), CheckpointConfig(keep_last=1, background=False)),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(repeats + 1):
        for name, saver in ways.items():
            saver.start(model, optimizer, TrainState(step, step, step), documents={}, facts={})
            (saved,) = saver.finish(must_succeed=True)
            if step:  # the first makes the memory for the copies
                found[name].append(saved.stalled_seconds)
    dist.close()
    return found


def launch(words: list[str], run: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words, f"run.dir={run}"],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )


def trained(run: Path) -> list[dict[str, float]]:
    """The records of the steps so far."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [r for r in map(json.loads, lines) if "train/loss" in r]
    except (FileNotFoundError, ValueError):
        return []


def seconds_to(run: Path, step: int, process: subprocess.Popen[bytes], since: float) -> float:
    """Waits until the run has made this step."""
    while not (records := trained(run)) or records[-1]["step"] < step:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode} before step {step}")
        time.sleep(0.02)
    return time.monotonic() - since


def launches(folder: Path, words: list[str], repeats: int) -> dict[str, list[float]]:
    """Seconds to the first step, new and after a kill, and from a stop request to the end."""
    found: dict[str, list[float]] = {
        key: [] for key in ("cold start", "restart", "stop to exit", "step", "save")
    }
    words = [*words, "checkpoint.every_steps=5", "eval.every_steps=0", "eval.tokens=256"]
    for k in range(repeats):
        run = folder / f"run{k}"
        started = time.monotonic()
        process = launch(words, run)
        found["cold start"].append(seconds_to(run, 1, process, started))
        seconds_to(run, 12, process, started)
        process.kill()
        process.wait()
        at = trained(run)[-1]["step"]
        started = time.monotonic()
        process = launch(words, run)
        while (records := trained(run)) and records[-1]["step"] >= at:
            time.sleep(0.01)  # until the records after the checkpoint are cut off
        first = records[-1]["step"] + 1
        found["restart"].append(seconds_to(run, int(first), process, started))
        seconds_to(run, int(first) + 5, process, started)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
        found["stop to exit"].append(time.monotonic() - asked)
        rates = [r["perf/tokens_per_second"] for r in trained(run)[-5:]]
        found["step"].append(GLOBAL_BATCH_TOKENS / statistics.median(rates))
        saves = [x for x in (run / "log.txt").read_text().splitlines() if " saved " in x]
        found["save"].append(float(saves[-1].split(" in ")[1].split()[0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=20_000_000)
    args = parser.parse_args()
    data = ROOT / "runs" / "quickstart-data"
    if not data.is_dir():
        raise SystemExit(f"{data} is not there; run `make quickstart` first")
    with tempfile.TemporaryDirectory(prefix="openlm-bench-", dir=ROOT / "runs") as name:
        found = stalls(Path(name), args.parameters, args.repeats)
        found |= launches(Path(name), ["recipes/quickstart.yaml"], args.repeats)
    medians = {key: statistics.median(values) for key, values in found.items()}
    for key, values in found.items():
        print(f"{key:14} {medians[key]:8.2f} s  ({min(values):.2f} to {max(values):.2f})")
    ratios = {
        "stall, background over foreground": medians["background"] / medians["foreground"],
        "restart over cold start": medians["restart"] / medians["cold start"],
    }
    for key, value in ratios.items():
        print(f"{key}: {value:.2f}")
    result = {
        "benchmark": "survival",
        "settings": vars(args),
        "seconds": {key: {"median": medians[key], "all": found[key]} for key in found},
        "ratios": ratios,
        "hardware": {"cores": os.cpu_count(), "load_1min": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    path = ROOT / "benchmarks" / "results" / f"survival_cpu_{day}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
