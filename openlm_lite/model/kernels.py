"""Which kernel computes causal attention: chosen once, before training, and said.

Every kernel has one signature, (q_BNTH, k_BKTH, v_BKTH) -> y_BNTH: softmax(q k^T / sqrt(H)) v where
a query sees the keys up to its own, with N a multiple of K. What they take:

    name         device  numbers     heads (H)        positions        from
    sdpa         any     any         any              any              torch picks among its own
    sdpa_flash   CUDA    bf16        up to 256        all but ALiBi    torch (FlashAttention-2)
    sdpa_cudnn   CUDA    bf16        8 | H, to 128    all but ALiBi    torch (cuDNN)
    flash_attn   CUDA    bf16        8 | H, to 256    all but ALiBi    flash-attn
    xformers     CUDA    bf16, fp32  8 | H            all but ALiBi    xformers
    flex         CUDA    any         from 16          any              torch (FlexAttention)
    blocks       CPU     fp32        any              all but ALiBi    `cpu_attention.py`

Documents inside a row are kept apart by FlexAttention on CUDA and by a mask elsewhere, whatever is
chosen here (`attention.document_mask`); generation with a cache uses `sdpa`.

Shapes: B batch, T position, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openlm_lite.errors import InputError
from openlm_lite.model.attention import (
    Attention,
    Kernel,
    attend,
    causal_flex_mask,
    sdpa,
    train_on_cpu,
    ungrouped,
)
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.transformer import Transformer

Name = Literal["sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn", "xformers", "flex", "blocks"]
_PROBE_TOKENS = 128
_PROBE_TOLERANCE = 0.05  # of bf16 sums over 128 keys, against the same in fp32


@dataclass(frozen=True)
class KernelConfig:
    """Which kernels compute what the model says."""

    attention: Literal["auto", Name] = "auto"
    """auto: blocks on a CPU in fp32; cuDNN's on Hopper and Blackwell GPUs, in bf16 and where it
    runs; else sdpa"""


class Choice(NamedTuple):
    """The kernel of a run."""

    name: Name
    why: str
    """for the log: who chose, and what was passed over"""


def choose_attention(
    cfg: KernelConfig,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> Choice:
    """The kernel for this model here; one that was asked for is run once, on a small input.

    Raises InputError where it is absent or does not take the model, with what to set instead.
    """
    if cfg.attention != "auto":
        name = cfg.attention
        problem = problem_with(name, model, device.type, dtype) or _probe(
            name, model, device, dtype
        )
        if problem:
            raise InputError(
                f"kernels.attention = {name}: {problem}; set kernels.attention=auto, or one of "
                + ", ".join(_possible(model, device.type, dtype))
            )
        return Choice(name, "as configured")
    if device.type == "cpu":
        fits = problem_with("blocks", model, "cpu", dtype) is None
        return Choice("blocks" if fits else "sdpa", "auto")
    if deterministic or torch.cuda.get_device_capability(device) < (9, 0):
        return Choice("sdpa", "auto")
    problem = problem_with("sdpa_cudnn", model, device.type, dtype) or _probe(
        "sdpa_cudnn", model, device, dtype
    )
    return (
        Choice("sdpa", f"auto; sdpa_cudnn: {problem}") if problem else Choice("sdpa_cudnn", "auto")
    )


def set_attention(model: Transformer, name: Name) -> None:
    """Have every attention of the model computed by this kernel; not where a layout has its own."""
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    if any(attention.kernel is not None for attention in attentions):
        return
    for attention in attentions:
        attention.kernel = KERNELS[name]
    model.causal_by_flex = name == "flex"


def problem_with(
    name: Name, model: ModelConfig, device_type: str, dtype: torch.dtype
) -> str | None:
    """Why this kernel cannot train this model there; None where nothing is known against it."""
    head = model.head_dim
    if name != "sdpa" and device_type != ("cpu" if name == "blocks" else "cuda"):
        return f"runs on {'a CPU' if name == 'blocks' else 'CUDA devices'}, not on {device_type}"
    if name == "blocks" and dtype != torch.float32:
        return "computes in fp32: needs parallel.precision=fp32"
    if name in ("sdpa_flash", "sdpa_cudnn", "flash_attn") and dtype != torch.bfloat16:
        return "computes in bf16: needs parallel.precision=bf16"
    if name not in ("sdpa", "flex") and model.positions == "alibi":
        return "model.positions = alibi adds to the scores, which only sdpa and flex do"
    largest = {"sdpa_flash": 256, "sdpa_cudnn": 128, "flash_attn": 256}.get(name)
    if largest is not None and head > largest:
        return f"model.head_dim = {head}, it takes up to {largest}"
    if name in ("sdpa_cudnn", "flash_attn", "xformers") and head % 8:
        return f"model.head_dim = {head}, it takes multiples of 8"
    if name == "flex" and head < 16:
        return f"model.head_dim = {head}, it takes 16 and more"
    package = {"flash_attn": "flash-attn", "xformers": "xformers"}.get(name)
    if package and importlib.util.find_spec(name) is None:
        extra = {"flash_attn": "flash", "xformers": "xformers"}[name]
        return f'{package} is not installed here: pip install "openlm-lite[{extra}]"'
    return None


def _possible(model: ModelConfig, device_type: str, dtype: torch.dtype) -> list[Name]:
    return [name for name in KERNELS if problem_with(name, model, device_type, dtype) is None]


def _probe(name: Name, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Forward and backward of a small input against the same in fp32; what went wrong, or None."""
    if name in ("sdpa", "blocks") or (name == "flex" and model.positions == "alibi"):
        return None  # made of plain operations; needs a mask
    generator = torch.Generator(device).manual_seed(0)
    heads = (model.n_heads, model.n_kv_heads, model.n_kv_heads)
    inputs = [
        torch.randn(1, n, _PROBE_TOKENS, model.head_dim, generator=generator, device=device)
        for n in heads
    ]
    results = []
    for kernel, used in ((KERNELS[name], dtype), (sdpa, torch.float32)):
        leaves = [t.to(used).requires_grad_() for t in inputs]
        try:
            y = kernel(*leaves)
            y.float().square().sum().backward()
        except (RuntimeError, NotImplementedError, ValueError, ImportError) as e:
            return f"does not run here: {str(e).strip().splitlines()[0]}"
        results.append([y.detach(), *(t.grad for t in leaves if t.grad is not None)])
    for found, expected in zip(*results, strict=True):
        error = float((found.float() - expected).norm() / expected.norm())
        if not error <= _PROBE_TOLERANCE:
            return f"computes something else here (off by {error:.0%})"
    return None


def _sdpa_flash(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    grouped = k_BKTH.shape[1] != q_BNTH.shape[1]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(
            q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=grouped
        )


def _sdpa_cudnn(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    k, v = ungrouped(q_BNTH, k_BKTH, v_BKTH)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q_BNTH, k, v, is_causal=True)


def _flash_attn(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    y_BTNH = flash_attn_func(
        *(t.transpose(1, 2) for t in (q_BNTH, k_BKTH, v_BKTH)),
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return y_BTNH.transpose(1, 2)


def _xformers(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    from xformers.ops import (  # pyright: ignore[reportMissingImports]
        LowerTriangularMask,
        memory_efficient_attention,
    )

    q, k, v = (t.transpose(1, 2) for t in (q_BNTH, *ungrouped(q_BNTH, k_BKTH, v_BKTH)))
    return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask()).transpose(1, 2)


def _flex(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    return attend(q_BNTH, k_BKTH, v_BKTH, causal_flex_mask(None, q_BNTH.shape[2], q_BNTH.device))


KERNELS: dict[Name, Kernel] = {
    "sdpa": sdpa,
    "sdpa_flash": _sdpa_flash,
    "sdpa_cudnn": _sdpa_cudnn,
    "flash_attn": _flash_attn,
    "xformers": _xformers,
    "flex": _flex,
    "blocks": train_on_cpu,
}
