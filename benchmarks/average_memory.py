"""Peak memory of `openlm average` over two checkpoints, as a multiple of one model's fp32 size.

    python benchmarks/average_memory.py [--models dclm_1b] [--folder DIR]

Each step is a process of its own; its peak is what the kernel counts (ru_maxrss: pages of mapped
files included). Weights are random. A 1B model takes about 18 GB of disk under --folder while it
is measured. The result goes to benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

STEPS = ("imports", "make a", "make b", "average")
RUN_STEP = """
import json, resource, sys
from benchmarks.average_memory import run_step
result = run_step(*sys.argv[1:])
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({**result, "peak_bytes": kilobytes * 1024}))
"""


def run_step(step: str, model: str, folder: str) -> dict[str, Any]:
    """Do one of STEPS under `folder`, in this process; returns what it says."""
    from openlm_lite.average.soup import average_models
    from openlm_lite.config import to_plain
    from openlm_lite.hf.layouts import parameter_shapes
    from openlm_lite.hf.weights import Weights
    from openlm_lite.run import load_model
    from openlm_lite.weights_io import save_weights

    cfg = load_model([f"model.base={model}"])
    started = time.monotonic()
    if step.startswith("make"):
        name = step.removeprefix("make ")
        torch.manual_seed(ord(name))
        shapes = parameter_shapes(cfg)
        weights = Weights(model, shapes, lambda name: torch.randn(shapes[name]))
        documents = {"model.json": json.dumps(to_plain(cfg))}
        save_weights(f"{folder}/{name}", weights, documents=documents, facts={"name": name})
    elif step == "average":
        average_models(f"{folder}/soup", [f"{folder}/a=0.8", f"{folder}/b=0.2"])
    return {"n_params": cfg.n_params, "seconds": round(time.monotonic() - started, 1)}


def measure(model: str, folder: Path) -> dict[str, Any]:
    """STEPS of one model, and their peaks over 4 bytes per parameter."""
    root = Path(__file__).parents[1]
    found: dict[str, Any] = {"model": model}
    for step in STEPS:
        command = [sys.executable, "-c", RUN_STEP, step, model, str(folder)]
        done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        size = found["fp32_bytes"] = 4 * result["n_params"]
        found[step] = {**result, "peak_over_size": result["peak_bytes"] / size}
        print(
            f"{model:16} {step:10} {result['peak_bytes'] / 2**30:6.2f} GiB, "
            f"{found[step]['peak_over_size']:.3f} of one model, {result['seconds']} s",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["dclm_1b"])
    parser.add_argument("--folder", default=None, help="where the files go (default: temporary)")
    args = parser.parse_args()
    results = []
    for model in args.models:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            results.append(measure(model, folder))
        finally:
            shutil.rmtree(folder)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "results": results,
    }
    out = Path(__file__).parent / "results" / f"average_memory_{record['date']}.json"
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    main()
