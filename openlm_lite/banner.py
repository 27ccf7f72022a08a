"""What a run says of itself at its start, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator

from openlm_lite.data.stream import TokenStream
from openlm_lite.dist import World
from openlm_lite.log import human
from openlm_lite.metrics import device_name
from openlm_lite.model.kernels import Choice
from openlm_lite.run import RunConfig


def banner_lines(
    cfg: RunConfig, world: World, stream: TokenStream, attention: Choice
) -> Iterator[str]:
    """Model, data, length, batch, devices, attention."""
    model, steps, tokens = cfg.model, cfg.steps, cfg.tokens_at(cfg.steps)
    flops = model.flops_per_token(cfg.data.seq_len)
    inner = model.n_params_non_embedding
    without = "" if inner == model.n_params else f" ({human(inner)} without the embedding)"
    yield (
        f"model    {human(model.n_params)} parameters{without}: {model.n_layers} layers, "
        f"d_model {model.d_model}, vocabulary {model.vocab_size:,}"
    )
    sets = [rows.dataset for rows in stream.sources]
    listed = ", ".join(f"{s.folder} ({human(s.n_blocks * s.block_tokens)} tokens)" for s in sets)
    yield f"data     {listed}"
    yield (
        f"length   {steps:,} steps, {human(tokens)} tokens ({tokens / model.n_params:.3g} per "
        f"parameter), {tokens * flops:.3g} FLOPs"
    )
    growing = "" if cfg.batch_at(0) == cfg.global_batch else f"{cfg.batch_at(0)} to "
    sizes = cfg.parallel.sizes(world.world_size)
    micro = cfg.micro_batches(sizes.data_ranks, steps - 1)
    rows = cfg.global_batch // (micro * sizes.data_ranks)
    ranks = "rank" if sizes.data_ranks == 1 else "ranks"
    if sizes.data_ranks != world.world_size:
        ranks = f"data {ranks}"
    parts = f"{sizes.data_ranks} {ranks} x {rows} rows" + (
        f" x {micro} micro-batches" if micro > 1 else ""
    )
    yield f"batch    {growing}{cfg.global_batch} x {cfg.data.seq_len} tokens: {parts}"
    compiled = ", compiled" if cfg.parallel.compile else ""
    layout = "" if sizes.dp_shard == world.world_size else f", {sizes.describe()}"
    yield (
        f"devices  {world.world_size} x {device_name(world.device)}{layout}, "
        f"{cfg.parallel.precision}{compiled}"
    )
    yield f"attention by {attention.name} ({attention.why})"
