"""µP: learning rates found at one width stay right at another (Tensor Programs V, Table 3).

With r = base width / width (arXiv:2203.03466; `model.init.init_std` has the first column):

    parameters                      deviation at the start      AdamW lr    Muon lr
    embeddings, gains, biases       that of the base width      1           1 (AdamW)
    matrices of the blocks          1/sqrt(fan_in), as always   r           sqrt(r)
    output matrix                   1/sqrt(fan_in) sqrt(r)      r           r (AdamW)

An update of Muon has the spectral norm 0.2 lr sqrt(max(n, m)), which is to stay the same at every
width. Weight decay per step, lr x weight_decay, stays the same too. At the base width all factors
are 1: it is the standard parametrisation.

What has to grow with the width: d_ff and the number of heads. What has to stay: head_dim (the
scores are divided by its root, where µP divides by head_dim itself) and the number of layers.
"""

from __future__ import annotations

import math


def lr_factor(name: str, ndim: int, *, width: int, base_width: int, muon: bool) -> float:
    """What the learning rate of the parameter `name` is multiplied with; `muon` has its update."""
    if ndim < 2 or "embedding" in name:
        return 1.0
    ratio = base_width / width
    return math.sqrt(ratio) if muon else ratio


def problems_of_mup(base_width: int, d_model: int, n_heads: int, tied: bool) -> list[str]:
    """What makes a transfer from `base_width` impossible, one sentence each."""
    found = []
    if tied:
        found.append(
            "optim.mup_base_width needs an output matrix of its own, which starts and learns "
            "otherwise than the embedding: set model.tie_embeddings = false"
        )
    if n_heads * base_width % d_model:
        found.append(
            f"optim.mup_base_width = {base_width}: model.head_dim has to be the same at both "
            f"widths, and model.n_heads = {n_heads} at model.d_model = {d_model} make "
            f"{n_heads * base_width / d_model:.4g} heads there; choose widths of whole heads"
        )
    return found
