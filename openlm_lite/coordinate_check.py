"""The coordinate check of µP: how far activations move in the first steps, at several widths.

With the standard parametrisation one learning rate moves a wide model further than a narrow one;
with µP the movement is the same at every width, and with it the best learning rate
(arXiv:2203.03466, appendix D.1). benchmarks/coordinate_check.py draws it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from openlm_lite.errors import InputError
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer
from openlm_lite.optim.build import OptimConfig, build_optimizer


def movements(
    cfg: ModelConfig,
    optim: OptimConfig,
    tokens_SBT: Tensor,
    seed: int = 0,
    zero_head: bool = False,
) -> dict[str, list[float]]:
    """Place -> mean |x_t - x_0| of its activations after t = 1, … S steps at the rate `optim.lr`.

    tokens_SBT: the ids of each step, T + 1 in a row; the activations are those of the first step's.
    The places are the embedding, the residual stream behind each block, and the logits. With
    `zero_head` the output matrix starts at zero: its first weights carry none of the movement.
    """
    model = Transformer(cfg).to(tokens_SBT.device)
    init_weights(model, seed, optim.mup_base_width)
    if zero_head:
        torch.nn.init.zeros_(model.output.weight)
    optimizers = build_optimizer(model, optim, cfg.d_model)
    before = _activations(model, tokens_SBT[0, :, :-1])
    found: dict[str, list[float]] = {place: [] for place in before}
    for tokens_BT in tokens_SBT:
        sums = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
        (sums.total / sums.n_targets).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        for place, x in _activations(model, tokens_SBT[0, :, :-1]).items():
            found[place].append((x - before[place]).abs().mean().item())
    return found


def growth(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """The power of the width by which sizes grow: slope of log(size) over log(width).

    Raises InputError where a slope has no meaning.
    """
    if len(set(widths)) < 2 or min(sizes) <= 0:
        raise InputError(f"widths {list(widths)}, sizes {list(sizes)}: two widths, sizes above 0")
    xs, ys = [math.log(width) for width in widths], [math.log(size) for size in sizes]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return products / sum((x - mean_x) ** 2 for x in xs)


@torch.no_grad()
def _activations(model: Transformer, tokens_BT: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(place: str) -> torch.utils.hooks.RemovableHandle:
        module = model.get_submodule(place)
        return module.register_forward_hook(lambda _, __, x: found.update({place: x.float()}))

    places = ["embedding", *(f"layers.{i}" for i in range(len(model.layers)))]
    handles = [keep(place) for place in places]
    try:
        logits = model(tokens_BT)
    finally:
        for handle in handles:
            handle.remove()
    return found | {"logits": logits}
