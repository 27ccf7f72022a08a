"""Tensor parallelism: the matrices of every block are cut among the ranks of a tp group.

Between the cut matrices the tokens are cut instead ("sequence parallel", arXiv:2205.05198), so that
no rank keeps an activation that another one keeps too. tp = 2, B rows of T tokens::

    tokens [B, T/2] ─ embedding ─ x [B, T/2, D] ─┬─ norm ─ gather ─ wq wk wv, half of the heads
                                                 │   attention over all T ─ wo ─ sum, cut ─(+)─┐
                      x [B, T/2, D] ──────────── └─ norm ─ gather ─ w_gate w_up, half of F     │
                                                     w_down ─ sum, cut ──────────────────(+)───┘
                      x [B, T/2, D] ─ norm ─ head ─ loss of T/2 tokens

Embedding, head and final norm are not cut: FSDP gathers them whole over all ranks, those of the tp
group included, and each rank takes the loss of its own tokens. A head cut by its vocabulary would
spare a gather of V D numbers per forward pass, and would need the vocabulary to divide, two more
sums per token, the hidden states of all T tokens on every rank and a loss of its own. At B T of
some thousand tokens the two send about as much; this one keeps one loss for all layouts.

Linear layers are cut by torch's own styles; DTensor knows from them which gradients to add up.
Norms see plain tensors (`_on_plain_tensors`), for their own backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from openlm_lite.model.layers import Norm
from openlm_lite.model.transformer import Transformer


def cut_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Lay the blocks' parameters out over the group `mesh`; the model then takes T / tp tokens."""
    tp = mesh.size()
    blocks: list[Any] = list(model.layers)
    for block in blocks:
        attention = block.attention
        attention.n_heads //= tp
        attention.n_kv_heads //= tp
        plan: dict[str, ParallelStyle] = {
            "attention": _Gathered(),
            "attention.wq": ColwiseParallel(),
            "attention.wk": ColwiseParallel(),
            "attention.wv": ColwiseParallel(),
            "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
            "feed_forward": _Gathered(),
            "feed_forward.w_up": ColwiseParallel(),
            "feed_forward.w_down": RowwiseParallel(output_layouts=Shard(1)),
            "attention_norm": _WholeNorm(),
        }
        if hasattr(block.feed_forward, "w_gate"):
            plan["feed_forward.w_gate"] = ColwiseParallel()
        if hasattr(block, "ffn_norm"):
            plan["ffn_norm"] = _WholeNorm()
        if attention.qk_norm != "none":
            style = _CutNorm if attention.qk_norm == "full" else _WholeNorm
            plan |= {"attention.q_norm": style(), "attention.k_norm": style()}
        parallelize_module(block, mesh, plan)
        if attention.qk_norm != "none":
            # compiled, tracing them backward does not come to an end (torch 2.13)
            for norm in (attention.q_norm, attention.k_norm):
                norm.forward = torch.compiler.disable(norm.forward)
    if model.cfg.positions == "learned":
        model.position_embedding.register_forward_hook(
            lambda module, args, out: out.chunk(tp, dim=-2)[mesh.get_local_rank()]
        )


class _Gathered(ParallelStyle):
    """The module's first argument comes as T / tp tokens, and enters it as all T (a DTensor)."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = DTensor.from_local(args[0], device_mesh, (Shard(1),), run_check=False)
            return x.redistribute(placements=(Replicate(),)), *args[1:]

        module.register_forward_pre_hook(gather)
        return module


class _WholeNorm(ParallelStyle):
    """A norm over features that each rank has whole; each has tokens, or heads, of its own."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Norm)
        _lay_out(module, device_mesh, Replicate())
        _on_plain_tensors(module, Partial(), Norm.forward)  # the gradients of all ranks add up
        return module


class _CutNorm(ParallelStyle):
    """A norm over the features of all heads, of which each rank has some."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Norm)
        _lay_out(module, device_mesh, Shard(0))

        def norm(part: Any, x: Tensor) -> Tensor:
            return _norm_of_parts(part, x, device_mesh)

        _on_plain_tensors(module, Shard(0), norm)
        return module


def _lay_out(module: nn.Module, mesh: DeviceMesh, placement: Any) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        laid_out = distribute_tensor(parameter.detach(), mesh, (placement,), src_data_rank=None)
        module.register_parameter(name, nn.Parameter(laid_out))


def _on_plain_tensors(
    module: Norm, gradient: Any, forward: Callable[[Any, Tensor], Tensor]
) -> None:
    """Let `forward` run on a stand-in for the module that has this rank's part of the parameters.

    gradient: the placement of what comes back for them.
    """
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}

    def on_parts(x: Tensor) -> Tensor:
        parts = {
            name: p.to_local(grad_placements=(gradient,)) if isinstance(p, DTensor) else p
            for name, p in module._parameters.items()
        }
        return forward(SimpleNamespace(**plain, **parts), x)

    module.forward = on_parts


def _norm_of_parts(part: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`Norm.forward` where each rank has equal parts of the features: the statistics are shared."""
    x32 = x.float()
    if part.kind == "layer_norm":
        x32 = x32 - _mean(x32, mesh)
    y = x32 * torch.rsqrt(_mean(x32.square(), mesh) + part.eps)
    if part.weight is not None:
        y = y * part.weight
    return (y if part.bias is None else y + part.bias).to(x.dtype)


def _mean(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Over the last dimension of all parts. Backward, all ranks' gradients of the mean add up."""
    own = DTensor.from_local(x.mean(-1, keepdim=True), mesh, (Shard(x.dim() - 1),), run_check=False)
    means = own.redistribute(placements=(Replicate(),)).to_local(grad_placements=(Partial(),))
    return means.mean(-1, keepdim=True)
