"""Does µP move activations alike at every width? A picture and numbers.

    python benchmarks/coordinate_check.py --out DIR [--optimizer muon] [--widths 32 64 128 256]

Writes DIR/coordinate_check.json (movement of every place, width, step and seed; its growth with the
width as a power) and DIR/coordinate_check.png (standard parametrisation left, µP right). The model
learns random ids with a repeated pattern: what counts here are sizes, not losses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from openlm_lite.coordinate_check import growth, movements
from openlm_lite.model.config import ModelConfig
from openlm_lite.optim.build import OptimConfig

VOCAB, ROWS, LENGTH, HEAD_DIM, LAYERS = 256, 8, 64, 16, 3


def config_of(width: int) -> ModelConfig:
    """d_ff and heads grow with the width, head_dim stays."""
    heads = width // HEAD_DIM
    return ModelConfig(VOCAB, width, LAYERS, heads, heads, HEAD_DIM, 3 * width, LENGTH)


def batches(steps: int, seed: int) -> torch.Tensor:
    """[steps, ROWS, LENGTH + 1]: every row repeats one of four texts from some place on."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(VOCAB, (4, 2 * LENGTH), generator=generator)
    rows = []
    for _ in range(steps * ROWS):
        text, start = torch.randint(0, LENGTH - 1, (2,), generator=generator).tolist()
        rows.append(texts[text % 4, start : start + LENGTH + 1])
    return torch.stack(rows).view(steps, ROWS, LENGTH + 1)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Parametrisation -> place -> width -> mean movement of each step; growth at the last."""
    found: dict[str, Any] = {}
    for name, base in (("standard", None), ("mup", min(args.widths))):
        optim = OptimConfig(name=args.optimizer, lr=args.lr, mup_base_width=base)
        places: dict[str, dict[int, torch.Tensor]] = {}
        for width in args.widths:
            runs = [
                movements(config_of(width), optim, batches(args.steps, seed), seed, args.zero_head)
                for seed in range(args.seeds)
            ]
            for place in runs[0]:
                mean = torch.tensor([run[place] for run in runs]).mean(0)
                places.setdefault(place, {})[width] = mean
        found[name] = {
            place: {
                "movement": {width: sizes.tolist() for width, sizes in by_width.items()},
                "growth": growth(args.widths, [by_width[w][-1].item() for w in args.widths]),
            }
            for place, by_width in places.items()
        }
    return found


def draw(found: dict[str, Any], widths: list[int], steps: int, path: Path) -> None:
    """Movement after the last step over the width, one line for each place."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (name, places) in zip(axes, found.items(), strict=True):
        for place, values in places.items():
            sizes = [values["movement"][width][-1] for width in widths]
            power = values["growth"]
            ax.loglog(widths, sizes, marker="o", label=f"{place} (width^{power:.2f})", base=2)
        ax.set(title=name, xlabel="width", xticks=widths, xticklabels=widths)
        ax.legend(fontsize=7)
    axes[0].set_ylabel(f"mean |change| after {steps} steps")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--zero-head", action="store_true", help="the head starts at zero")
    args = parser.parse_args()
    args.widths.sort()
    args.out.mkdir(parents=True, exist_ok=True)
    found = measured(args)
    options = {key: str(value) if key == "out" else value for key, value in vars(args).items()}
    record = {"options": options, "torch": torch.__version__, **found}
    (args.out / "coordinate_check.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(found, args.widths, args.steps, args.out / "coordinate_check.png")
    for place in found["mup"]:
        powers = [f"{name} width^{found[name][place]['growth']:+.2f}" for name in found]
        print(f"{place:12} {', '.join(powers)}")


if __name__ == "__main__":
    main()
