"""Peak memory of `openlm export` and `openlm import`, as a multiple of the model's fp32 size.

    python benchmarks/convert_memory.py [--models dclm_1b tinyllama_1.1b] [--folder DIR]

Each step is a process of its own; its peak is what the kernel counts (ru_maxrss: pages of mapped
files included). Weights are random. A 1B model takes about 25 GB of disk under --folder while it
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
from pathlib import Path

import torch

STEPS = ("make", "export", "import", "import --no-compare")
RUN_STEP = """
import json, resource, sys
from benchmarks.convert_memory import run_step
result = run_step(*sys.argv[1:])
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({**result, "peak_bytes": kilobytes * 1024}))
"""


def run_step(step: str, model: str, folder: str) -> dict[str, object]:
    """Do one of STEPS under `folder`, in this process; returns what it says of the model."""
    from openlm_lite.config import to_plain
    from openlm_lite.hf.export import export_checkpoint
    from openlm_lite.hf.importer import import_model
    from openlm_lite.hf.layouts import parameter_shapes
    from openlm_lite.hf.weights import Weights
    from openlm_lite.run import load_model
    from openlm_lite.weights_io import save_weights

    checkpoint, exported = f"{folder}/checkpoint", f"{folder}/hf"
    if step == "make":
        cfg = load_model([f"model.base={model}"])
        shapes = parameter_shapes(cfg)

        def random(name: str) -> torch.Tensor:
            shape = shapes[name]
            if len(shape) == 1:
                return 1 + 0.1 * torch.randn(shape)
            return torch.randn(shape).div_(shape[-1] ** 0.5)

        documents = {"model.json": json.dumps(to_plain(cfg))}
        save_weights(checkpoint, Weights(model, shapes, random), documents=documents, facts={})
        return {"n_params": cfg.n_params}
    if step == "export":
        report = export_checkpoint(checkpoint, exported, tokenizer="none")
        return {"hf_class": report.hf_class, "max_logit_difference": report.max_logit_difference}
    compare = step == "import"
    back = import_model(exported, f"{folder}/{step.replace(' ', '')}", compare=compare)
    return {"max_logit_difference": back.max_logit_difference}


def measure(model: str, folder: Path) -> dict[str, object]:
    """STEPS of one model, and their peaks over 4 bytes per parameter."""
    results: dict[str, dict[str, float]] = {}
    root = Path(__file__).parents[1]
    for step in STEPS:
        command = [sys.executable, "-c", RUN_STEP, step, model, str(folder)]
        done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
        results[step] = json.loads(done.stdout.splitlines()[-1])
    size = 4 * results["make"]["n_params"]
    found: dict[str, object] = {"model": model, "fp32_bytes": size}
    for step in STEPS[1:]:
        found[step] = {**results[step], "peak_over_size": results[step]["peak_bytes"] / size}
        print(f"{model:16} {step:20} {results[step]['peak_bytes'] / size:.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["dclm_1b", "tinyllama_1.1b"])
    parser.add_argument("--folder", default=None, help="where the files go (default: temporary)")
    args = parser.parse_args()
    results = []
    for model in args.models:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            results.append(measure(model, folder))
        finally:
            shutil.rmtree(folder)
    import transformers

    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "results": results,
    }
    out = Path(__file__).parent / "results" / f"convert_memory_{record['date']}.json"
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    main()
