"""Training steps on one GPU, side by side with other trainers, beside a roofline of that GPU.

    python benchmarks/gpu_step.py [--minutes 7] [--sizes 160m 411m 1.4b] [--toy]

One run of at most `--minutes`; it needs torch, and transformers for the peer (litgpt takes part
where it is installed: none of it is fetched). Order: rates of the device (matrix
products, copies, every attention kernel), then for each size all subjects in turn, round after
round, until that size's share of the time is used up. Every subject does the whole step on the same
batch: bf16 forward and backward over fp32 master weights, clipping at norm 1, fused AdamW. Ours is
the step of the training loop (FSDP2 on one process), as `openlm bench` runs it. All subjects of a
size are held at once; those that do not fit beside the ones before are left out, and named.

FLOPs per token = 6 (block matrices + output head) + 12 n_layers d_model seq_len, no discount for
the causal mask. The roofline adds the least times of a step's parts at the measured rates: matrix
products, causal attention (its half of the scores), and what has to be read and written besides
(optimizer, loss, norms and residual stream). What the step takes beyond it has no better
explanation here: launches, and kernels under those rates.

`--toy` runs the same code, compilation left out, at a very small size, on a CPU too: its figures
mean nothing.
The result goes to benchmarks/results/ as JSON and as a table.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import torch

from openlm_lite import dist
from openlm_lite.bench import Stepper, synthetic_batches
from openlm_lite.data.sources import DataConfig
from openlm_lite.dist import World
from openlm_lite.errors import InputError
from openlm_lite.metrics import peak_flops
from openlm_lite.model import kernels
from openlm_lite.model.kernels import KernelConfig
from openlm_lite.optim.build import OptimConfig
from openlm_lite.parallel import ParallelConfig
from openlm_lite.run import RunConfig, RunModel, RunSettings


class Size(NamedTuple):
    """A Llama shape: RMSNorm, SwiGLU, rotary embedding, no biases, untied."""

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    micro_batch: int  # sequences of a step
    vocab: int = 50_432
    seq_len: int = 2_048


SIZES = {
    "160m": Size(768, 12, 12, 2_048, 32),
    "411m": Size(1_024, 24, 16, 2_816, 24),
    "1.4b": Size(2_048, 24, 16, 5_632, 12),
}
TOY = {"toy": Size(32, 2, 2, 64, 2, 128, 64)}
Step = Callable[[], object]
Build = Callable[[Size, torch.device], Step]


def run_config(size: Size, device: torch.device, attention: Any, compiled: bool) -> RunConfig:
    """This package's run of that shape; bf16 as in training, fp32 on a CPU."""
    on_gpu = device.type == "cuda"
    model = RunModel(
        vocab_size=size.vocab,
        d_model=size.d_model,
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        n_kv_heads=size.n_heads,
        head_dim=size.d_model // size.n_heads,
        d_ff=size.d_ff,
        max_seq_len=size.seq_len,
    )
    return RunConfig(
        run=RunSettings(dir="unused", device="cuda" if on_gpu else "cpu"),
        model=model,
        data=DataConfig(seq_len=size.seq_len, train="unused"),
        global_batch_tokens=size.micro_batch * size.seq_len,
        micro_batch_size=size.micro_batch,
        total_steps=1000,
        optim=OptimConfig(lr=1e-4),
        parallel=ParallelConfig(precision="bf16" if on_gpu else "fp32", compile=compiled),
        kernels=KernelConfig(attention),
    )


def ours(attention: Any, compiled: bool, world: World) -> Build:
    def build(size: Size, device: torch.device) -> Step:
        cfg = run_config(size, device, attention, compiled)
        stepper = Stepper(cfg, world)
        batches = synthetic_batches(cfg, stepper.layout)
        return lambda: stepper.step(next(batches))

    return build


def transformers(compiled: bool) -> Build:
    """LlamaForCausalLM with fp32 weights under bf16 autocast: what its Trainer does."""

    def build(size: Size, device: torch.device) -> Step:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=size.vocab,
            hidden_size=size.d_model,
            intermediate_size=size.d_ff,
            num_hidden_layers=size.n_layers,
            num_attention_heads=size.n_heads,
            max_position_embeddings=size.seq_len,
            attn_implementation="sdpa",
        )
        with device:
            model = LlamaForCausalLM(config)
        run = torch.compile(model) if compiled else model
        tokens = torch.randint(size.vocab, (size.micro_batch, size.seq_len), device=device)
        return plain_step(
            model, lambda: run(input_ids=tokens, labels=tokens, use_cache=False).loss, device
        )

    return build


def litgpt(compiled: bool) -> Build:
    def build(size: Size, device: torch.device) -> Step:
        from litgpt.config import Config
        from litgpt.model import GPT

        config = Config(
            block_size=size.seq_len,
            vocab_size=size.vocab,
            padded_vocab_size=size.vocab,
            n_layer=size.n_layers,
            n_head=size.n_heads,
            n_embd=size.d_model,
            intermediate_size=size.d_ff,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
        with device:
            model = GPT(config)
        run = torch.compile(model) if compiled else model
        rows = torch.randint(size.vocab, (size.micro_batch, size.seq_len + 1), device=device)
        tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].flatten()
        entropy = torch.nn.functional.cross_entropy
        return plain_step(model, lambda: entropy(run(tokens).flatten(0, 1), targets), device)

    return build


def plain_step(model: Any, loss_of: Callable[[], Any], device: torch.device) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def subjects(world: World, compiled: bool) -> dict[str, Build]:
    """Those that are missed least come last: time or memory may not suffice for them."""
    peers = {"transformers": transformers, "litgpt": litgpt}
    peers = {name: build for name, build in peers.items() if util.find_spec(name) is not None}
    found = {"openlm_lite, compiled": ours("auto", True, world)}
    found |= {f"{name}, compiled": build(True) for name, build in peers.items()}
    found["openlm_lite, compiled, sdpa"] = ours("sdpa", True, world)
    found["openlm_lite"] = ours("auto", False, world)
    found |= {name: build(False) for name, build in peers.items()}
    return {name: build for name, build in found.items() if compiled or "compiled" not in name}


# --- rates of the device -------------------------------------------------------------------------


def seconds_of(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of one call, with the device waited for."""
    action()
    found = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        action()
        wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_rates(size: Size, device: torch.device, repeats: int) -> dict[str, float]:
    """FLOP/s of matrix products (square, and those of this size), bytes/s of copies."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = size.micro_batch * size.seq_len
    square = 8192 if device.type == "cuda" else 256
    shapes = {
        "square": (square, square, square),
        "attention projections": (tokens, size.d_model, size.d_model),
        "feed-forward": (tokens, size.d_model, size.d_ff),
        "output head": (min(tokens, 4096), size.d_model, size.vocab),
    }
    found = {}
    for name, (n, k, m) in shapes.items():
        a, b = (torch.randn(s, device=device, dtype=dtype) for s in ((n, k), (m, k)))
        seconds = seconds_of(lambda a=a, b=b: a @ b.t(), device, repeats)
        found[f"matmul, {name}, FLOP/s"] = 2 * n * k * m / seconds
    numel = 2**30 // 4 if device.type == "cuda" else 2**18
    a, b = torch.empty(numel, device=device), torch.empty(numel, device=device)
    seconds = seconds_of(lambda: b.copy_(a), device, repeats)
    found["copy, bytes/s (read and written)"] = 2 * a.nbytes / seconds
    return found


def attention_rates(size: Size, device: torch.device, repeats: int) -> dict[str, float | str]:
    """FLOP/s of forward and backward of every kernel: of the causal half, backward 2.5 forward."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = run_config(size, device, "auto", False).model.architecture
    shape = (size.micro_batch, size.n_heads, size.seq_len, model.head_dim)
    flops = 3.5 * 4 * size.micro_batch * size.seq_len**2 * size.d_model / 2
    found: dict[str, float | str] = {}
    for name in kernels.KERNELS:
        try:
            kernels.choose_attention(KernelConfig(name), model, device, dtype)
        except InputError as e:
            found[name] = str(e)
            continue
        q, k, v = (
            torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in "qkv"
        )
        weights = torch.randn(shape, device=device, dtype=dtype)

        def both(name: Any = name, q: Any = q, k: Any = k, v: Any = v, w: Any = weights) -> None:
            torch.autograd.backward(kernels.KERNELS[name](q, k, v), w, inputs=(q, k, v))

        found[name] = flops / seconds_of(both, device, repeats)
    return found


def roofline(size: Size, rates: dict[str, float], attention: float) -> dict[str, float]:
    """Least seconds of the parts of a step at the measured rates.

    Bytes: AdamW reads weight, gradient and two moments and writes three of them in fp32 (28 per
    parameter), clipping reads the gradient (4), and FSDP2 casts weights to bf16 and gradients back
    (6 and 6); the loss writes and reads fp32 and bf16 logits and their gradient (20 per logit); a
    block moves 30 vectors of d_model and 14 of d_ff per token, in bf16, in both directions.
    """
    tokens = size.micro_batch * size.seq_len
    attention_weights = 4 * size.d_model**2 * size.n_layers
    ffn_weights = 3 * size.d_model * size.d_ff * size.n_layers
    head = size.vocab * size.d_model
    n_params = attention_weights + ffn_weights + 2 * head
    copy = rates["copy, bytes/s (read and written)"]
    streams = (30 * size.d_model + 14 * size.d_ff) * 2 * size.n_layers * tokens
    return {
        "attention projections": 6
        * attention_weights
        * tokens
        / rates["matmul, attention projections, FLOP/s"],
        "feed-forward": 6 * ffn_weights * tokens / rates["matmul, feed-forward, FLOP/s"],
        "output head": 6 * head * tokens / rates["matmul, output head, FLOP/s"],
        "attention": 3.5 * 4 * tokens * size.seq_len * size.d_model / 2 * size.n_layers / attention,
        "optimizer, clipping, casts": 44 * n_params / copy,
        "loss": 20 * size.vocab * tokens / copy,
        "norms, activations, residual stream": streams / copy,
    }


# --- the run -------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A step that is ready, and the bytes of the device that it needs."""

    step: Step
    own: int  # held between its steps: weights and moments
    of_a_step: int  # besides, while it takes one


def start(build: Build, size: Size, device: torch.device) -> Subject:
    """Build it, compile, fill caches, and see what memory a step takes."""
    before = allocated(device)
    step = build(size, device)
    for _ in range(3):
        step()
    wait(device)
    after = allocated(device)
    reset_peak(device)
    step()
    wait(device)
    return Subject(step, after - before, peak_allocated(device) - after)


def fit(subjects: Sequence[Subject], memory: float) -> bool:
    """Whether all can be held at once while any of them takes its step; 5 % are left to others."""
    needed = sum(s.own for s in subjects) + max(s.of_a_step for s in subjects)
    return needed <= 0.95 * memory


def measure(
    size: Size, builds: dict[str, Build], device: torch.device, until: float, rounds: int
) -> dict[str, Any]:
    """Seconds and memory of every subject, a step of each in turn, until the time is up."""
    held: dict[str, Subject] = {}
    failed: dict[str, str] = {}
    for name, build in builds.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        if time.monotonic() > until:
            failed[name] = "no time left"
            continue
        subject = None
        try:
            subject = start(build, size, device)
        except (RuntimeError, InputError, ImportError, AttributeError, TypeError, ValueError) as e:
            failed[name] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        if subject is not None and not fit([*held.values(), subject], total_memory(device)):
            failed[name] = "does not fit into the device's memory beside those before it"
            subject = None
        if subject is None:
            release_memory(device)
        else:
            held[name] = subject
    seconds: dict[str, list[float]] = {name: [] for name in held}
    for i in range(rounds):
        if i >= 3 and time.monotonic() > until:
            break
        for name, subject in held.items():
            wait(device)
            begin = time.perf_counter()
            for _ in range(3):  # in a row: a step may begin while the one before is under way
                subject.step()
            wait(device)
            seconds[name].append((time.perf_counter() - begin) / 3)
    tokens = size.micro_batch * size.seq_len
    flops = run_config(size, device, "auto", False).model.flops_per_token(size.seq_len)
    peak = peak_flops(device)
    peers = [n for n in held if not n.startswith("openlm_lite")]
    best = min(peers, key=lambda n: statistics.median(seconds[n]), default=None)
    table = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        table[name] = {
            "tokens_per_second": round(tokens / median),
            "seconds_median": median,
            "seconds_min": min(times),
            "seconds_max": max(times),
            "rounds": len(times),
            "mfu": None if peak is None else tokens / median * flops / peak,
            "peak_memory_gib": round((held[name].own + held[name].of_a_step) / 2**30, 2),
            "ratio_to_best_peer": None
            if best is None
            else statistics.median(b / t for b, t in zip(seconds[best], times, strict=True)),
        }
    return {"best_peer": best, "subjects": table, "left_out": failed, "flops_per_token": flops}


def total_memory(device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if on_gpu else float("inf")


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_allocated(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=30, help="at most")
    parser.add_argument("--toy", action="store_true", help="a check of this script, on any machine")
    parser.add_argument("--out", default=None, help="folder (default benchmarks/results)")
    args = parser.parse_args(argv)
    # many models come and go in one process; read when the device is first asked for memory
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    begin = time.monotonic()
    if not args.toy and not torch.cuda.is_available():
        raise SystemExit("gpu_step.py: torch finds no CUDA device here; --toy checks the script")
    sizes = TOY if args.toy else {name: SIZES[name] for name in args.sizes}
    world = dist.init("auto")
    try:
        found = {
            name: measure_size(size, world, begin + 60 * args.minutes * (i + 1) / len(sizes), args)
            for i, (name, size) in enumerate(sizes.items())
        }
    finally:
        dist.close()
    return report(args, sizes, found, world.device, time.monotonic() - begin)


def measure_size(size: Size, world: World, until: float, args: Any) -> dict[str, Any]:
    """Rates, subjects and roofline of one size."""
    device = world.device
    torch.compiler.reset()  # what it knows of the size before would make this one's shapes dynamic
    repeats = 2 if args.toy else 10
    rates = device_rates(size, device, repeats)
    attention = attention_rates(size, device, repeats)
    found = measure(size, subjects(world, not args.toy), device, until, args.rounds)
    release_memory(device)
    parts = roofline(size, rates, max(r for r in attention.values() if not isinstance(r, str)))
    tokens, peak = size.micro_batch * size.seq_len, peak_flops(device)
    ceiling = (
        None if peak is None else tokens * found["flops_per_token"] / sum(parts.values()) / peak
    )
    return {
        "shape": size._asdict(),
        **found,
        "rates": rates,
        "attention, FLOP/s": attention,
        "roofline_seconds": parts,
        "roofline_seconds_total": sum(parts.values()),
        "roofline_mfu": ceiling,
    }


def report(
    args: Any, sizes: dict[str, Size], found: dict[str, Any], device: torch.device, seconds: float
) -> dict[str, Any]:
    """Print the table and keep it; returns what was kept."""
    on_gpu = device.type == "cuda"
    today = datetime.date.today().isoformat()
    packages = [p for p in ("torch", "transformers", "litgpt") if util.find_spec(p)]
    words = ["--toy"] if args.toy else ["--sizes", *sizes]
    result = {
        "command": " ".join(["python benchmarks/gpu_step.py", *words]),
        "date": today,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "cuda": torch.version.cuda,
        "versions": {p: metadata.version(p) for p in packages},
        "peak_flops_of_device": peak_flops(device),
        "seconds_in_all": round(seconds, 1),
        "sizes": found,
    }
    lines = [f"{result['device']}, {result['versions']}, {today}"]
    for name, one in found.items():
        lines += [
            "",
            f"{name:30} tokens/s  median s     min     max    MFU    GiB   ratio to best peer",
        ]
        for subject, row in one["subjects"].items():
            mfu = "     -" if row["mfu"] is None else f"{row['mfu']:6.3f}"
            ratio = "-" if row["ratio_to_best_peer"] is None else f"{row['ratio_to_best_peer']:.3f}"
            lines.append(
                f"{subject:30} {row['tokens_per_second']:8,}  {row['seconds_median']:8.4f}"
                f"{row['seconds_min']:8.4f}{row['seconds_max']:8.4f} {mfu}"
                f"{row['peak_memory_gib']:7.1f}   {ratio}"
            )
        lines += [f"left out: {subject}: {why}" for subject, why in one["left_out"].items()]
        mfu = "" if one["roofline_mfu"] is None else f", MFU {one['roofline_mfu']:.3f}"
        lines.append(f"roofline: {one['roofline_seconds_total']:.4f} s{mfu}, of it")
        lines += [f"    {part:36} {s:.4f} s" for part, s in one["roofline_seconds"].items()]
        lines += [f"    {rate:36} {value:.3g}" for rate, value in one["rates"].items()]
        for kernel, rate in one["attention, FLOP/s"].items():
            shown = rate if isinstance(rate, str) else f"{rate:.3g} FLOP/s"
            lines.append(f"    attention by {kernel:12} {shown}")
    folder = Path(args.out) if args.out else Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"gpu_step_{'toy_' if args.toy else ''}{today}"
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return result


if __name__ == "__main__":
    main()
