"""One training step on a CPU, side by side with other trainers' models of the same shape.

    python benchmarks/cpu_step.py [--threads 2] [--rounds 15] [--vocab 8192 50432] [--only WORD …]

Subjects: this package's step (of the training loop: `forward_backward`, clipping, optimizer),
transformers' LlamaForCausalLM (eager and sdpa attention, compiled), litgpt's GPT and torchtitan's
llama3 where they are installed; all of the Llama shape below, in fp32, on the same random batch:
loss, gradients, clipping at norm 1, fused AdamW, the loss as a number. torchtitan has its
`ScaledDotProductAttention`: the kernels of its language models need a GPU to train. Peers compile
the whole model, torchtitan its loss too; this package compiles block by block, as it does in runs.

Every subject is a process of its own, so that its memory is its own; one step of each in turn
makes a round, so that noise of the machine meets all alike. Reported are medians over the rounds,
and the median over the rounds of the ratios to `transformers eager` in the same round: by the
clock, and by CPU seconds, which other users of the machine disturb less. How threads wait for each
other is left to OpenMP's default, as in everybody's runs. Memory is the largest
resident set (VmHWM) of the whole run less that after the imports. `openlm train` sets how memory is
had from Linux (`openlm_lite/host_memory.py`), and so does this package's process here.

The result goes to benchmarks/results/ as JSON and as a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

MICRO_BATCH, SEQ_LEN = 4, 512
SHAPE = {"d_model": 384, "n_layers": 8, "n_heads": 6, "d_ff": 1024}
BASE = "transformers eager"
SUBJECTS = [
    BASE,
    "transformers sdpa",
    "litgpt",
    "torchtitan",
    "openlm_lite",
    "transformers sdpa, compiled",
    "litgpt, compiled",
    "torchtitan, compiled",
    "openlm_lite, compiled",
]
Step = Callable[[], float]


def openlm_lite(vocab: int, rows: Any, compiled: bool, variant: str) -> Step:
    """The step of `openlm_lite.train`."""
    from openlm_lite import dist
    from openlm_lite.data.stream import Batch
    from openlm_lite.layout import build_layout
    from openlm_lite.model.config import ModelConfig
    from openlm_lite.model.loss import LossConfig
    from openlm_lite.optim.build import OptimConfig, build_optimizer, clip_gradients
    from openlm_lite.parallel import ParallelConfig, build_sharded_model
    from openlm_lite.step import agree_on, forward_backward

    world = dist.init("cpu")
    cfg = ModelConfig(vocab, **SHAPE, n_kv_heads=SHAPE["n_heads"], head_dim=64, max_seq_len=SEQ_LEN)
    parallel = ParallelConfig(precision="fp32", compile=compiled)
    layout = build_layout(parallel, world)
    model = build_sharded_model(cfg, layout, parallel, world.device, seed=0)
    optim = OptimConfig(lr=1e-3)
    (optimizer,) = build_optimizer(model, optim)
    batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None, 0)

    def step() -> float:
        n_targets = agree_on(batch, layout.sizes, False).n_targets
        found = forward_backward(model, batch, 1, LossConfig(), world, layout.sizes, n_targets)
        clip_gradients(model, optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(found[0])

    return step


def _plain_step(model: Any, loss_of: Callable[[], Any]) -> Step:
    """The step that one writes around a model."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def transformers(vocab: int, rows: Any, compiled: bool, attention: str) -> Step:
    import torch
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
    tokens = rows[:, :-1].contiguous()
    run = torch.compile(model) if compiled else model
    return _plain_step(model, lambda: run(input_ids=tokens, labels=tokens, use_cache=False).loss)


def litgpt(vocab: int, rows: Any, compiled: bool, variant: str) -> Step:
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=SEQ_LEN,
        vocab_size=vocab,
        padded_vocab_size=vocab,
        n_layer=SHAPE["n_layers"],
        n_head=SHAPE["n_heads"],
        n_embd=SHAPE["d_model"],
        intermediate_size=SHAPE["d_ff"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    run = torch.compile(model) if compiled else model
    entropy = torch.nn.functional.cross_entropy
    return _plain_step(model, lambda: entropy(run(tokens).flatten(0, 1), targets.flatten()))


def torchtitan(vocab: int, rows: Any, compiled: bool, variant: str) -> Step:
    import torch
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention

    dim = SHAPE["d_model"]
    llama3.get_attention_config = lambda _: ScaledDotProductAttention.Config()
    config = llama3.Llama3Model.Config(
        dim=dim,
        vocab_size=vocab,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab, embedding_dim=dim, param_init=llama3._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=dim, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=dim, out_features=vocab, param_init=llama3._output_linear_init(dim)
        ),
        layers=llama3._build_llama3_layers(
            n_layers=SHAPE["n_layers"],
            dim=dim,
            n_heads=SHAPE["n_heads"],
            hidden_dim=SHAPE["d_ff"],
            rope=ComplexRoPE.Config(dim=dim // SHAPE["n_heads"], max_seq_len=SEQ_LEN),
            attn_backend="ours, above",
        ),
    )
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    run = torch.compile(model) if compiled else model
    entropy = torch.compile(cross_entropy_loss) if compiled else cross_entropy_loss
    return _plain_step(model, lambda: entropy(run(tokens), targets) / targets.numel())


def imported(name: str, vocab: int, threads: int) -> Callable[[], Step]:
    """Import what a subject needs, in a process of its own; returns what builds its step."""
    if name.startswith("openlm_lite"):
        from openlm_lite.host_memory import keep_freed_memory, take_large_pages

        take_large_pages()
        keep_freed_memory()
        import openlm_lite.train  # noqa: F401
    elif name.startswith("transformers"):
        import transformers.models.llama.modeling_llama  # noqa: F401
    elif name.startswith("litgpt"):
        import litgpt.model  # noqa: F401
    else:
        import torchtitan.components.loss
        import torchtitan.models.llama3  # noqa: F401
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = torch.randint(vocab, (MICRO_BATCH, SEQ_LEN + 1))
    package, _, variant = name.removesuffix(", compiled").partition(" ")
    compiled = name.endswith("compiled")
    return lambda: globals()[package](vocab, rows, compiled, variant)


def serve(name: str, vocab: int, threads: int) -> None:
    """A subject's process: a step for each line of standard input, its numbers as a line out."""
    build = imported(name, vocab, threads)
    of_imports = _peak_mib()
    step = build()
    print(json.dumps({"ready": step()}), flush=True)  # compiled, and caches filled
    for _ in sys.stdin:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        loss = step()
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        memory = _peak_mib()
        print(
            json.dumps(
                {"s": seconds, "cpu": cpu, "loss": loss, "mib": memory, "own": memory - of_imports}
            ),
            flush=True,
        )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Subject:
    """One process, and what it measured."""

    def __init__(self, name: str, vocab: int, threads: int) -> None:
        self.name, self.rounds = name, []
        words = [sys.executable, "-W", "ignore", __file__, "--serve", name]
        words += ["--vocab", str(vocab), "--threads", str(threads)]
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )  # packages that print warnings print them on standard error, which is left alone
        self._line("ready")

    def _line(self, key: str) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                if key in found:
                    return found
        raise SystemExit(f"{self.name}: its process ended; its error is above")

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rounds.append(self._line("s"))

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(names: list[str], vocab: int, threads: int, rounds: int) -> dict[str, Any]:
    """One step of each in turn, `rounds` times."""
    subjects = []
    for name in names:
        print(f"V = {vocab}: {name} …", file=sys.stderr, flush=True)
        subjects.append(Subject(name, vocab, threads))
    for _ in range(rounds):
        for subject in subjects:
            subject.step()
    for subject in subjects:
        subject.end()
    base = subjects[0].rounds
    found = {}
    for subject in subjects:
        seconds, cpu = ([r[key] for r in subject.rounds] for key in ("s", "cpu"))
        pairs = list(zip(base, subject.rounds, strict=True))
        ratios = {key: [b[key] / r[key] for b, r in pairs] for key in ("s", "cpu")}
        found[subject.name] = {
            "tokens_per_second": round(MICRO_BATCH * SEQ_LEN / statistics.median(seconds)),
            "seconds_median": round(statistics.median(seconds), 4),
            "seconds_min": round(min(seconds), 4),
            "seconds_max": round(max(seconds), 4),
            "cpu_seconds_median": round(statistics.median(cpu), 4),
            "cpu_seconds_min": round(min(cpu), 4),
            "cpu_seconds_max": round(max(cpu), 4),
            "ratio": round(statistics.median(ratios["s"]), 3),
            "cpu_ratio": round(statistics.median(ratios["cpu"]), 3),
            "cpu_ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios["cpu"], n=4)]
            if rounds > 1
            else [],
            "peak_mib": round(max(r["mib"] for r in subject.rounds)),
            "peak_mib_after_imports": round(max(r["own"] for r in subject.rounds)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--vocab", type=int, nargs="+", default=[8192, 50432])
    parser.add_argument("--only", nargs="+", help="subjects with one of these words in their name")
    parser.add_argument("--part", choices=["eager", "compiled"], help="one of the two groups alone")
    parser.add_argument("--out", help="name of the files in benchmarks/results/")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.vocab[0], args.threads)
        return
    absent = [p for p in ("transformers", "litgpt", "torchtitan") if util.find_spec(p) is None]
    names = [n for n in SUBJECTS if not n.startswith(tuple(absent))]
    if args.only:
        names = [n for n in names if n == BASE or any(word in n for word in args.only)]
    if args.part:
        names = [n for n in names if n == BASE or ("compiled" in n) == (args.part == "compiled")]
    results = {}
    for vocab in args.vocab:  # two groups: all processes at once would need too much memory
        eager = [] if args.part == "compiled" else [n for n in names if "compiled" not in n]
        found = measure(eager, vocab, args.threads, args.rounds) if eager else {}
        compiled = [n for n in names if "compiled" in n]
        if compiled:
            again = measure([BASE, *compiled], vocab, args.threads, args.rounds)
            found[f"{BASE} (with the compiled)"] = again.pop(BASE)
            found |= again
        results[str(vocab)] = found
    report(args, results, absent)


def report(args: argparse.Namespace, results: dict[str, Any], absent: list[str]) -> None:
    """Print the table and keep it."""
    today = datetime.date.today().isoformat()
    name = args.out or f"cpu_step_{today}"
    only = f" --only {' '.join(args.only)}" if args.only else ""
    only += f" --part {args.part}" if args.part else ""
    vocab = " ".join(map(str, args.vocab))
    command = f"python benchmarks/cpu_step.py --threads {args.threads} --rounds {args.rounds}"
    packages = ["torch", "transformers", "litgpt", "torchtitan"]
    facts = {
        "command": f"{command} --vocab {vocab}{only}",
        "date": today,
        "processor": processor(),
        "load_average_at_the_end": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {p: metadata.version(p) for p in packages if p not in absent},
        "absent": absent,
        "shape": {**SHAPE, "seq_len": SEQ_LEN, "micro_batch": MICRO_BATCH, "dtype": "fp32"},
    }
    lines = [
        f"{facts['command']}",
        f"{today}, {facts['processor']}, {facts['versions']}, load {os.getloadavg()[0]:.1f}",
        f"shape {facts['shape']}",
    ]
    for vocab, table in results.items():
        lines += [
            "",
            f"{'V = ' + vocab:36} tokens/s  median s    min    max   ratio  CPU s  CPU ratio   MiB",
        ]
        lines += [
            f"{name:36} {row['tokens_per_second']:8,}  {row['seconds_median']:8.3f}"
            f"{row['seconds_min']:7.3f}{row['seconds_max']:7.3f}  {row['ratio']:6.3f}"
            f"{row['cpu_seconds_median']:7.3f}  {row['cpu_ratio']:9.3f}"
            f"{row['peak_mib_after_imports']:6,}"
            for name, row in table.items()
        ]
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")
    (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written to benchmarks/results/{name}.json and .txt")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
