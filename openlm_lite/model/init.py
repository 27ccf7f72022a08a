"""OpenLM's initialisation, the same weights at every world size.

Every parameter is drawn whole from its own generator, keyed by the seed and the parameter's name,
and each rank keeps its shard: neither the number of ranks nor the order of drawing enters.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openlm_lite.model.config import ModelConfig
from openlm_lite.model.transformer import Transformer
from openlm_lite.parameter_names import plain_name


def init_std(cfg: ModelConfig, name: str, base_width: int | None = None) -> float:
    """Standard deviation before the cut, of the matrix `name`.

    Embedding, head and everything that reads the residual stream: 1/sqrt(D). What writes to it in
    block l (from 0): 1/sqrt(fan_in) / sqrt(2 (l + 1)), so that early blocks write more. OpenLM
    uses 1/sqrt(D) for `wo`, whatever its fan-in.

    With a `base_width`, µP's (arXiv:2203.03466, Table 3): embeddings 1/sqrt(base) at every width,
    the head 1/sqrt(D) sqrt(base/D), the blocks as always. The same at D = base.
    """
    ratio = 1.0 if base_width is None else base_width / cfg.d_model
    if name.endswith(("wo.weight", "w_down.weight")):
        layer = int(name.split(".")[1])
        fan_in = cfg.d_ff if name.endswith("w_down.weight") else cfg.d_model
        return 1.0 / math.sqrt(fan_in) / math.sqrt(2 * (layer + 1))
    if "embedding" in name:
        return 1.0 / math.sqrt(cfg.d_model) / math.sqrt(ratio)
    return 1.0 / math.sqrt(cfg.d_model) * (math.sqrt(ratio) if name == "output.weight" else 1.0)


@torch.no_grad()
def init_weights(model: Transformer, seed: int, base_width: int | None = None) -> None:
    """Fill every parameter: normal values cut at 3 standard deviations, gains 1, biases 0.

    base_width: of µP (`init_std`); None is the standard parametrisation.
    """
    for name, parameter in model.named_parameters():
        # activation checkpointing wraps a block, which shows in the names of its parameters
        name = plain_name(name)
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            std = init_std(model.cfg, name, base_width)
            copy_shard(parameter, _draw(name, parameter, std, seed))


def _draw(name: str, like: nn.Parameter, std: float, seed: int) -> Tensor:
    """The whole parameter, from a generator keyed by (seed, name)."""
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    device = like.to_local().device if isinstance(like, DTensor) else like.device
    generator = torch.Generator(device).manual_seed(int.from_bytes(key, "little") >> 1)
    full = torch.empty(like.shape, dtype=torch.float32, device=device)
    return nn.init.trunc_normal_(full, 0.0, std, -3 * std, 3 * std, generator=generator)


@torch.no_grad()
def copy_shard(parameter: nn.Parameter, full: Tensor) -> None:
    """Put this rank's part of the whole tensor `full` into `parameter`; no communication."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    # not distribute_tensor: it knows nothing of a dimension that two mesh dimensions share
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        full = full.narrow(dim, start, size) if size else full.narrow(dim, 0, 0)
    parameter.to_local().copy_(full)
