"""What follows from a run's config: sizes, tokens, operations, memory and time of a step.

`openlm config` prints it, before anything is started.
"""

from __future__ import annotations

from typing import Any

from openlm_lite.cost import MACHINES, Plan, estimate
from openlm_lite.layout import Sizes
from openlm_lite.memory import Need, fitting, parts_of, remedies, usable
from openlm_lite.model.config import ModelConfig
from openlm_lite.run import RunConfig


def derived(cfg: RunConfig, gpus: int | None = None, gpu: str | None = None) -> dict[str, Any]:
    """What follows from a run's config; memory is per GPU on `gpus` of them.

    `gpus`: None is the fewest that the layout allows. `gpu`, a name of `memory.GPU_GIB`, asks
    whether the run fits it. `total_tokens` is what was asked for, `trained_tokens` what whole steps
    make of it.
    """
    gpus = cfg.parallel.least_ranks if gpus is None else gpus
    need = memory_need(cfg, gpus)
    memory = parts_of(need)
    fits = {"fits": ", ".join(fitting(memory.total)) or "none"}
    if gpu is not None:
        fits[f"fits_{gpu}"] = "yes" if memory.total <= usable(gpu) else "no"
        if memory.total > usable(gpu):
            fits["would_fit_with"] = "; ".join(remedies(need, gpu)) or "nothing that was tried"
    step = {} if gpu is None else {"step_estimate": step_estimate(cfg, need.sizes, gpu)}
    trained = cfg.tokens_at(cfg.steps)
    warmup = {"batch_warmup_steps": n} if (n := cfg.batch_sizes.warmup_steps) else {}
    return {
        **derived_model(cfg.model, cfg.data.seq_len),
        "total_steps": cfg.steps,
        "total_tokens": trained if cfg.total_tokens is None else cfg.total_tokens,
        "trained_tokens": trained,
        "global_batch_sequences": cfg.global_batch,
        **warmup,
        "total_flops": float(trained * cfg.model.flops_per_token(cfg.data.seq_len)),
        "tokens_per_parameter": round(trained / cfg.model.n_params, 2),
        "gpus": gpus,
        **({"layout": need.sizes.describe()} if gpus > 1 else {}),
        "memory_gib_per_gpu": round(memory.total / 2**30, 2),
        "memory_parts_gib": {
            name: round(part / 2**30, 2) for name, part in memory._asdict().items()
        },
        **fits,
        **step,
    }


def derived_model(model: ModelConfig, seq_len: int) -> dict[str, Any]:
    """What follows from an architecture."""
    return {
        "n_params": model.n_params,
        "n_params_non_embedding": model.n_params_non_embedding,
        "flops_per_token": model.flops_per_token(seq_len),
    }


def memory_need(cfg: RunConfig, gpus: int) -> Need:
    """What decides on the memory of each of `gpus` GPUs."""
    sizes = cfg.parallel.sizes(gpus)
    return Need(
        cfg.model,
        cfg.parallel,
        sizes,
        seq_len=cfg.data.seq_len,
        micro_batch=cfg.micro_batch_size,
        accumulates=cfg.global_batch > sizes.data_ranks * cfg.micro_batch_size,
        muon=cfg.optim.name == "muon",
        copies=sum(average.copies for average in cfg.averages.values()),
    )


def step_estimate(cfg: RunConfig, sizes: Sizes, gpu: str) -> dict[str, float]:
    """What `cost.estimate` makes of a full step on these ranks: to plan, not to promise."""
    parallel = cfg.parallel
    plan = Plan(
        cfg.model,
        sizes,
        cfg.data.seq_len,
        cfg.micro_batch_size,
        max(1, cfg.global_batch // (sizes.data_ranks * cfg.micro_batch_size)),
        recomputation=parallel.recomputation,
        float8=parallel.float8,
        reduce_bytes=4 if parallel.reduce_dtype == "fp32" else 2,
        reshard=parallel.reshard_after_forward is not False,
    )
    step = estimate(plan, MACHINES[gpu])
    return {
        "seconds": float(f"{step.seconds:.3g}"),
        "tokens_per_second_per_gpu": float(f"{step.tokens_per_second_per_gpu:.3g}"),
        "mfu": round(step.mfu, 3),
    }
