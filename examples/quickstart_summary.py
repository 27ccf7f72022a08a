"""The short table at the end of the quickstart, from a run's metrics.jsonl.

python examples/quickstart_summary.py runs/quickstart
"""

import statistics
import sys
from pathlib import Path

from openlm_lite.log import human, read_metrics


def main(run: str) -> None:
    records = read_metrics(Path(run) / "metrics.jsonl")
    steps = [r for r in records if "train/loss" in r]
    key = next(k for r in records for k in r if k.startswith("val/"))
    losses = [r[key] for r in records if key in r]
    rate = statistics.median(r["perf/tokens_per_second"] for r in steps)
    rows = {
        "trained": f"{human(steps[-1]['tokens'])} tokens in {steps[-1]['step']} steps",
        "speed": f"{human(rate)} tokens/s (median step)",
        key: f"{losses[0]:.3f} before, {losses[-1]:.3f} after training",
        "run": f"{run}/ (config.yaml, metrics.jsonl, log.txt, checkpoints/)",
        "curve": f"{run}/loss.png",
        "Hugging Face": f"{run}/hf/",
    }
    print("\n" + "\n".join(f"{name:<16} {value}" for name, value in rows.items()))
    print(
        f"\nNext:\n  .venv/bin/openlm generate {run} 'import os'\n"
        f"  .venv/bin/openlm inspect {run} --step 0\n"
        "  .venv/bin/openlm config recipes/dclm_1b_1x.yaml --gpus 8\n"
        "  your own text: .venv/bin/openlm prepare my_texts/ --out data/mine --tokenizer gpt2"
    )
    assert losses[-1] < losses[0] - 2, "the held-out loss did not fall: something is wrong"


if __name__ == "__main__":
    main(*sys.argv[1:])
