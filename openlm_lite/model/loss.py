"""Cross entropy over the vocabulary without ever holding all logits.

[tokens, vocabulary] logits are the largest tensor of a step (8 sequences of 2,048 tokens over
50,432 ids: 3.3 GB in fp32). Here they exist one chunk of tokens at a time: the chunk's gradient
is taken at once, in the forward pass, and only the gradients of the hidden states and of the head
are kept. The backward pass scales them. Each logit is computed once (no recomputation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from openlm_lite.errors import InputError

IGNORE_INDEX = -100
"""A target with this id is not learned from."""
LOGITS_ON_GPU = 2**27
"""about as many at once"""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised: cross entropy, and z_loss * mean(logsumexp(logits)^2)."""

    z_loss: float = 0.0
    z_loss_over: Literal["positions", "targets"] = "positions"
    """of which the mean is taken: all positions (OpenLM), or those whose target counts"""

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise InputError(f"loss.z_loss = {self.z_loss}, must not be negative")


class LossSums(NamedTuple):
    """Sums over tokens, fp32 scalars: divide by a count of your choice (all ranks, all batches)."""

    total: Tensor
    """ce + z_weight * z: the one to call `backward` on; the others are for the log"""
    ce: Tensor
    """sum of -log p(target) over the targets, nats"""
    z: Tensor
    """sum of logsumexp(logits)^2 over all positions, as OpenLM takes it, or over the targets
    (0 without z-loss)"""
    n_targets: Tensor
    """number of targets that are not IGNORE_INDEX"""
    ce_N: Tensor
    """the addends of `ce`, one per position"""


def default_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens per chunk: 16 MB of fp32 logits on a CPU (its cache), 512 MB on a GPU.

    Not under 512 tokens: narrower products run below the speed of the large ones.
    """
    budget = 2**22 if device.type == "cpu" else LOGITS_ON_GPU
    return max(512, budget // vocab_size // 64 * 64)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    z_weight: float | Tensor = 0.0,
    z_over_targets: bool = False,
    chunk_tokens: int | None = None,
) -> LossSums:
    """Cross entropy of softmax(hidden @ weight.T) against `targets_N`, summed, in chunks.

    The logits are computed in the dtype of `hidden_ND` and reduced in fp32. With a `z_weight` the
    z-loss joins in (PaLM, arXiv:2204.02311, section 5), summed over all positions or, with
    `z_over_targets`, without the ignored ones.
    """
    chunk = chunk_tokens or default_chunk_tokens(weight_VD.shape[0], hidden_ND.device)
    # grad mode is always off inside a Function's forward, so it is asked here
    needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    total, ce_N, z = _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, targets_N, z_weight, z_over_targets, chunk, needs_grad
    )
    return LossSums(total, ce_N.sum(), z, (targets_N != IGNORE_INDEX).sum(), ce_N)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward takes the gradient chunk by chunk; backward scales it by what arrives.

    With p = softmax(logits), lse = logsumexp(logits) and y the one-hot target:
    d ce / d logits = p - y (0 where ignored);  d z / d logits = 2 lse p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_weight: float | Tensor,
        z_over_targets: bool,
        chunk: int,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        has_z = isinstance(z_weight, Tensor) or z_weight != 0.0
        ce = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        z = hidden.new_zeros((), dtype=torch.float32)
        grad_h = torch.empty_like(hidden) if needs_grad else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            ce[rows], lse, grad = _of_chunk(
                hidden[rows],
                weight,
                targets[rows],
                z_weight if has_z else None,
                z_over_targets,
                grad_w,
            )
            if has_z:
                z += lse.square().sum()
            if grad_h is not None and grad is not None:
                grad_h[rows] = grad
        if grad_h is not None and grad_w is not None:
            ctx.save_for_backward(grad_h, grad_w.to(weight.dtype))
        ctx.mark_non_differentiable(ce, z)
        total = ce.sum()
        return total + z_weight * z if has_z else total, ce, z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_w = ctx.saved_tensors
        scale = grad_outputs[0]
        # in place: a second gradient of the head would be the largest tensor of a step
        return grad_h.mul_(scale), grad_w.mul_(scale), *(None,) * 5


def _of_chunk(
    h: Tensor,
    weight: Tensor,
    y: Tensor,
    z_weight: float | Tensor | None,
    z_over_targets: bool,
    grad_w: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross entropies, logsumexps, and the gradient of `h` where that of the head is summed up.

    A function of its own, so that a chunk's logits are freed before the next one's are made.
    """
    kept = y != IGNORE_INDEX
    index = torch.where(kept, y, 0).unsqueeze(1)
    logits = (h @ weight.t()).float()
    # The largest probability is exp(largest logit - lse): cheaper than log_softmax, whose
    # exponentials would be taken again for the gradient.
    largest = logits.amax(dim=1, keepdim=True)
    target = logits.gather(1, index).sub_(largest)
    p = torch.softmax(logits, dim=1, out=logits)
    log_largest_p = p.amax(dim=1, keepdim=True).log_()
    ce = torch.where(kept, -(target + log_largest_p).squeeze(1), 0.0)
    lse = largest - log_largest_p
    if z_over_targets:
        lse = torch.where(kept.unsqueeze(1), lse, 0.0)
    if grad_w is None:
        return ce, lse, None
    # d total / d logits = a p - kept y, with a = kept + 2 z_weight lse
    keep = kept.unsqueeze(1).to(p.dtype)
    if z_weight is not None:
        p *= keep + 2.0 * z_weight * lse
        d_logits = p.scatter_add_(1, index, -keep).to(h.dtype)
        del logits, p  # in bf16 twice the bytes of d_logits, before the products take theirs
        _add_product(grad_w, d_logits, h)
        return ce, lse, d_logits @ weight
    # without z-loss an ignored row is all zero: cheaper to blank it in [N, D]
    d_logits = p.scatter_add_(1, index, torch.full_like(keep, -1.0)).to(h.dtype)
    del logits, p
    keep = keep.to(h.dtype)
    _add_product(grad_w, d_logits, h * keep)
    return ce, lse, (d_logits @ weight) * keep


def _add_product(grad_VD: Tensor, d_logits_NV: Tensor, h_ND: Tensor) -> None:
    """grad += d_logits^T h, the product in its own dtype (tensor cores), the sum in fp32."""
    if h_ND.dtype == grad_VD.dtype:
        grad_VD.addmm_(d_logits_NV.t(), h_ND)
    else:
        grad_VD += d_logits_NV.t() @ h_ND
