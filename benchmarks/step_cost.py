"""The cost model (openlm_lite/cost.py) beside published measurements, and what it says of plans.

    python benchmarks/step_cost.py

Prints the tables of docs/scale.md. Runs no model. Every row of PUBLISHED is a figure of the source
that it names; nothing here was measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from openlm_lite.cost import MACHINES, Machine, Plan, estimate
from openlm_lite.layout import Sizes
from openlm_lite.model.config import ModelConfig
from openlm_lite.run import load_model

MOSAIC = "llm-foundry, scripts/train/benchmarking/README.md, H100 80GB BF16"
TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_TP = "torchtitan, benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md (vanilla TP)"
OLMO = "OLMo-core, README.md of late 2024 (H100; number of GPUs not given, 64 assumed)"
FITTED = "of_flops and of_flops_attention were chosen by these"

HBM2E = replace(MACHINES["H100"], memory=2.4e12)  # torchtitan's H100s; 500 W


def mpt(d_model: int, n_layers: int, n_heads: int, seq_len: int = 2048) -> ModelConfig:
    return ModelConfig(
        *(50_368, d_model, n_layers, n_heads, n_heads, d_model // n_heads, 4 * d_model, seq_len),
        norm="layer_norm",
        activation="gelu",
        positions="alibi",
        tie_embeddings=True,
    )


LLAMA_8B = load_model(["model.base=llama_3_8b"])
LLAMA_70B = replace(LLAMA_8B, d_model=8192, n_layers=80, n_heads=64, d_ff=28_672)
OLMO_7B, OLMO_13B = (load_model([f"model.base=olmo2_{size}"]) for size in ("7b", "13b"))


@dataclass(frozen=True)
class Row:
    name: str
    tokens_per_second_per_gpu: float
    source: str
    plan: Plan
    machine: Machine = MACHINES["H100"]
    note: str = ""


def mosaic(
    name: str,
    model: ModelConfig,
    gpus: int,
    rows: int,
    passes: int,
    full: bool,
    found: float,
    note: str = "",
) -> Row:
    plan = Plan(
        model,
        Sizes(1, gpus),
        model.max_seq_len,
        rows,
        passes,
        recomputation="full" if full else "none",
        reduce_bytes=2,
    )
    return Row(f"MPT {name}, T {model.max_seq_len}, {gpus} GPUs", found, MOSAIC, plan, note=note)


def titan(name: str, found: float, plan: Plan, source: str = TITAN, note: str = "") -> Row:
    return Row(name, found, source, plan, HBM2E, note)


def long_row(shards: int, cp: int, found: float, note: str = "") -> Row:
    T = 32_768 * cp
    model = replace(LLAMA_8B, max_seq_len=T)
    plan = Plan(model, Sizes(1, shards, cp), T, 1, recomputation="full", float8="tensorwise")
    return titan(f"Llama 8B, T {T}, dp {shards} x cp {cp}, float8", found, plan, note=note)


FSDP_8B = Plan(LLAMA_8B, Sizes(1, 8), 8192, 2, recomputation="selective")
TP_8B = Plan(LLAMA_8B, Sizes(1, 8, 1, 8), 8192, 12, recomputation="selective")
TP_70B = Plan(LLAMA_70B, Sizes(1, 32, 1, 8), 8192, 16, recomputation="full")
RING = "theirs is ring attention"

PUBLISHED = [
    mosaic("1B", mpt(2048, 24, 16), 8, 14, 1, False, 45_455, FITTED),
    mosaic("1B", mpt(2048, 24, 16), 64, 20, 1, False, 44_402),
    mosaic("3B", mpt(2560, 32, 20), 16, 10, 3, False, 24_142, FITTED),
    mosaic("3B", mpt(2560, 32, 20), 64, 6, 3, False, 22_525),
    mosaic("7B", mpt(4096, 32, 32), 8, 6, 1, False, 10_643, FITTED),
    mosaic("7B", mpt(4096, 32, 32, 8192), 8, 8, 2, True, 6_935, FITTED),
    mosaic("7B", mpt(4096, 32, 32, 32_768), 8, 2, 2, True, 3_318),
    mosaic("13B", mpt(5120, 40, 40), 8, 2, 1, False, 4_792),
    mosaic("13B", mpt(5120, 40, 40), 64, 2, 1, False, 4_800),
    mosaic("30B", mpt(7168, 48, 56), 8, 3, 21, True, 2_002),
    mosaic("30B", mpt(7168, 48, 56), 32, 14, 3, True, 2_308),
    mosaic("70B", mpt(8192, 80, 64), 32, 2, 16, True, 882),
    mosaic("70B", mpt(8192, 80, 64), 64, 8, 4, True, 1_039),
    titan("Llama 8B, T 8192, 8 GPUs", 6_667, FSDP_8B),
    titan("Llama 8B, T 8192, 128 GPUs", 6_514, replace(FSDP_8B, sizes=Sizes(1, 128))),
    titan("Llama 8B, T 8192, 8 GPUs, float8", 8_532, replace(FSDP_8B, float8="tensorwise")),
    titan("Llama 8B, T 8192, dp 8 x tp 8", 4_378, TP_8B, TITAN_TP),
    titan("Llama 70B, T 8192, dp 32 x tp 8", 597.3, TP_70B, TITAN_TP),
    titan("Llama 70B, dp 32 x tp 8, float8", 829, replace(TP_70B, float8="tensorwise")),
    long_row(8, 1, 3_890),
    long_row(4, 2, 2_540, RING),
    long_row(2, 4, 1_071, RING),
    long_row(1, 8, 548, RING),
    Row("OLMo 2 7B, T 4096", 9_850, OLMO, Plan(OLMO_7B, Sizes(1, 64), 4096, 2)),
    Row(
        "OLMo 2 13B, T 4096",
        4_500,
        OLMO,
        Plan(OLMO_13B, Sizes(1, 64), 4096, 2, recomputation="selective"),
    ),
]

DCLM_1B, DCLM_7B = (load_model([f"model.base=dclm_{size}"]) for size in ("1b", "7b"))


def plans() -> list[tuple[str, int, Plan]]:
    """What somebody would choose at T = 2,048 (70B: 8,192), with 4M tokens in a batch or more."""
    found = []
    for gpus in (8, 64, 256, 1024):
        nodes = gpus // 8
        flat, hsdp = Sizes(1, gpus), Sizes(nodes, 8)
        found.append(("1B, fsdp", gpus, Plan(DCLM_1B, flat, 2048, 8)))
        found.append(("1B, hsdp of a node each", gpus, Plan(DCLM_1B, hsdp, 2048, 8)))
        selective = {"recomputation": "selective"}
        found.append(("7B, fsdp", gpus, Plan(DCLM_7B, flat, 2048, 4, **selective)))
        wide = Sizes(max(1, gpus // 64), min(64, gpus))
        found.append(("7B, hsdp of 64", gpus, Plan(DCLM_7B, wide, 2048, 4, **selective)))
        if gpus >= 64:
            full = {"recomputation": "full"}
            found.append(("70B, fsdp", gpus, Plan(LLAMA_70B, flat, 8192, 1, **full)))
            tp = Sizes(1, gpus // 8, 1, 8)
            found.append(("70B, fsdp x tp 8", gpus, Plan(LLAMA_70B, tp, 8192, 8, **full)))
            hsdp_tp = Sizes(max(1, gpus // 256), min(256, gpus) // 8, 1, 8)
            if gpus > 256:
                name = "70B, hsdp of 256 x tp 8"
                found.append((name, gpus, Plan(LLAMA_70B, hsdp_tp, 8192, 8, **full)))
    return found


def main() -> None:
    print("| published | tokens/s/GPU | estimate | ratio | source |\n|---|---|---|---|---|")
    short = {MOSAIC: "M", TITAN: "T", TITAN_TP: "T2", OLMO: "O"}
    for row in PUBLISHED:
        rate = estimate(row.plan, row.machine).tokens_per_second_per_gpu
        ratio = rate / row.tokens_per_second_per_gpu
        mark = {FITTED: "; fitted", RING: "; ring attention"}.get(row.note, "")
        print(
            f"| {row.name} | {row.tokens_per_second_per_gpu:,.0f} | {rate:,.0f} | {ratio:.2f} | "
            f"{short[row.source]}{mark} |"
        )
    print("\n| plan | GPUs | step, s | tokens/s/GPU | MFU | not hidden: FSDP, tp |")
    print("|---|---|---|---|---|---|")
    for name, gpus, plan in plans():
        step = estimate(plan)
        share = [100 * part / step.seconds for part in (step.exposed, step.tensor)]
        print(
            f"| {name} | {gpus} | {step.seconds:.2f} | {step.tokens_per_second_per_gpu:,.0f} | "
            f"{100 * step.mfu:.0f} % | {share[0]:.0f} %, {share[1]:.0f} % |"
        )


if __name__ == "__main__":
    main()
