"""One training step on a CPU, side by side with transformers' LlamaForCausalLM of the same shape.

    python benchmarks/cpu_step.py [--threads 2] [--rounds 15] [--vocab 8192]

Every subject does the whole step on the same batch, in fp32: loss, gradients, clipping at norm 1,
fused AdamW. One step of each in turn makes a round, so that noise of the machine meets all alike;
reported are medians over the rounds, and the median of the ratios within each round. Ours is the
real step of the training loop (FSDP2 on one process included). `transformers eager` has the
attention that its config calls `eager`, `transformers sdpa` the one that it chooses by default.
The result goes to benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from openlm_lite import dist
from openlm_lite.data.stream import Batch
from openlm_lite.layout import build_layout
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.loss import LossConfig
from openlm_lite.optim.build import OptimConfig, build_optimizer, clip_gradients
from openlm_lite.parallel import ParallelConfig, build_sharded_model
from openlm_lite.train import agree_on, forward_backward

MICRO_BATCH, SEQ_LEN = 4, 512
SHAPE = {"d_model": 384, "n_layers": 8, "n_heads": 6, "d_ff": 1024}
Step = Callable[[], object]


def ours(vocab: int, rows: torch.Tensor, world: dist.World, compiled: bool) -> Step:
    """The step of `openlm_lite.train`."""
    cfg = ModelConfig(vocab, **SHAPE, n_kv_heads=SHAPE["n_heads"], head_dim=64, max_seq_len=SEQ_LEN)
    parallel = ParallelConfig(precision="fp32", compile=compiled)
    layout = build_layout(parallel, world)
    model = build_sharded_model(cfg, layout, parallel, world.device, seed=0)
    optim = OptimConfig(lr=1e-3)
    (optimizer,) = build_optimizer(model, optim)
    batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None, 0)

    def step() -> None:
        n_targets = agree_on(batch, world, layout, False).n_targets
        forward_backward(model, batch, 1, LossConfig(), world, layout.sizes, n_targets)
        clip_gradients(model, optim.grad_clip).item()
        optimizer.step()
        optimizer.zero_grad()

    return step


def llama(vocab: int, rows: torch.Tensor, attention: str, compiled: bool) -> Step:
    """The step that one writes around transformers' class."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=SHAPE["d_model"],
        intermediate_size=SHAPE["d_ff"],
        num_hidden_layers=SHAPE["n_layers"],
        num_attention_heads=SHAPE["n_heads"],
        max_position_embeddings=SEQ_LEN,
        rms_norm_eps=1e-5,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = rows[:, :-1].contiguous()
    run = torch.compile(model) if compiled else model

    def step() -> None:
        loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--vocab", type=int, default=8192)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = torch.randint(args.vocab, (MICRO_BATCH, SEQ_LEN + 1))
    world = dist.init()
    subjects: dict[str, Step] = {
        "transformers eager": llama(args.vocab, rows, "eager", False),
        "transformers sdpa": llama(args.vocab, rows, "sdpa", False),
        "transformers sdpa, compiled": llama(args.vocab, rows, "sdpa", True),
        "openlm_lite": ours(args.vocab, rows, world, False),
        "openlm_lite, compile: true": ours(args.vocab, rows, world, True),
    }
    for step in subjects.values():  # compile, fill caches
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(args.rounds):
        for name, step in subjects.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    dist.close()

    base = seconds["transformers eager"]
    table = {}
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(base, times, strict=True)]
        table[name] = {
            "tokens_per_second": round(MICRO_BATCH * SEQ_LEN / statistics.median(times)),
            "seconds_median": round(statistics.median(times), 4),
            "seconds_min": round(min(times), 4),
            "seconds_max": round(max(times), 4),
            "ratio_to_transformers_eager": round(statistics.median(ratios), 3),
        }
    report(args, table)


def report(args: argparse.Namespace, table: dict[str, dict[str, float]]) -> None:
    """Print the table and keep it."""
    import transformers

    print(f"{'':30} tokens/s   median s   min     max     ratio")
    for name, row in table.items():
        print(
            f"{name:30} {row['tokens_per_second']:8,}   {row['seconds_median']:.3f}   "
            f"{row['seconds_min']:.3f}   {row['seconds_max']:.3f}   "
            f"{row['ratio_to_transformers_eager']:.3f}"
        )
    today = datetime.date.today().isoformat()
    result = {
        "command": f"python benchmarks/cpu_step.py --threads {args.threads} "
        f"--rounds {args.rounds} --vocab {args.vocab}",
        "date": today,
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": {**SHAPE, "seq_len": SEQ_LEN, "micro_batch": MICRO_BATCH, "dtype": "fp32"},
        "results": table,
    }
    path = Path(__file__).parent / "results" / f"cpu_step_v{args.vocab}_{today}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path.relative_to(Path(__file__).parents[1])}")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
