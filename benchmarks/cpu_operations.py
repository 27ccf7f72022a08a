"""Where a training step on a CPU spends its time: every operation of the step, timed.

    python benchmarks/cpu_operations.py [--threads 2] [--vocab 8192] [--steps 5]

The subject is this package's eager step of `cpu_step.py`. A TorchDispatchMode times the operations
one by one; `torch.profiler` would not do, as its records take the memory that the next tensors
would have had again, and page faults come with new memory. Matrix products have their FLOP/s.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import cpu_step

PRODUCTS = ("aten.mm.", "aten.addmm_.")


def kind_of(operation: str) -> str:
    if operation.startswith(PRODUCTS):
        return "matrix products"
    return (
        "attention" if operation.startswith("openlm_lite.causal_attention") else "everything else"
    )


def flops_of(shapes: Sequence[tuple[int, ...]]) -> int:
    """Of the last two matrices: [n, k] times [k, m]."""
    (n, k), (_, m) = shapes[-2:]
    return 2 * n * k * m


def timed(step: cpu_step.Step, steps: int) -> dict[tuple[str, Any], list[float]]:
    """Seconds of every call, by operation and the shapes of what it was given."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode

    found: dict[tuple[str, Any], list[float]] = defaultdict(list)

    class Clock(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            start = time.perf_counter()
            out = func(*args, **(kwargs or {}))
            seconds = time.perf_counter() - start
            shapes = tuple(tuple(a.shape) for a in args if isinstance(a, Tensor))
            found[str(func), shapes].append(seconds)
            return out

    with Clock():
        step()  # the mode's own first time
        found.clear()
        for _ in range(steps):
            step()
    return dict(found)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print the tables; returns each kind's share of the seconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=25, help="operations that are shown")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    step = cpu_step.imported("openlm_lite", args.vocab, args.threads)()
    for _ in range(8):  # until what is allocated fits what was freed
        step()
    found = timed(step, args.steps)
    seconds: dict[str, float] = defaultdict(float)
    for (operation, _), times in found.items():
        seconds[kind_of(operation)] += math.fsum(times) / args.steps
    whole = math.fsum(seconds.values())
    print(f"{whole:.3f} s of a step in operations, {args.threads} threads, V = {args.vocab:,}")
    for kind, one in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"    {kind:16} {one:7.3f} s  {one / whole:6.1%}")
    print(f"\n{'operation':44} calls  ms/step  GFLOP/s  shapes")
    ranked = sorted(found.items(), key=lambda item: -sum(item[1]))
    for (operation, shapes), times in ranked[: args.rows]:
        rate = ""
        if kind_of(operation) == "matrix products":
            rate = f"{len(times) * flops_of(shapes) / sum(times) / 1e9:.0f}"
        per_step = 1000 * sum(times) / args.steps
        calls = len(times) // args.steps
        print(f"{operation[:44]:44} {calls:5} {per_step:8.2f} {rate:>8}  {list(shapes)}")
    return {kind: one / whole for kind, one in seconds.items()}


if __name__ == "__main__":
    main()
