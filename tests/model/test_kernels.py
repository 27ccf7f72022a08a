"""Attention kernels: one signature, chosen once; what cannot run is one error with a remedy."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from openlm_lite.errors import InputError
from openlm_lite.model import kernels
from openlm_lite.model.attention import sdpa
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.kernels import (
    KERNELS,
    Choice,
    KernelConfig,
    choose_attention,
    problem_with,
    set_attention,
)
from tests.model.test_transformer import TINY, build

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


def reference(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    """The textbook's formula in float64."""
    repeats = q_BNTH.shape[1] // k_BKTH.shape[1]
    k, v = (t.double().repeat_interleave(repeats, dim=1) for t in (k_BKTH, v_BKTH))
    scores = q_BNTH.double() @ k.transpose(2, 3) / q_BNTH.shape[3] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn and xformers, as far as they are called, with the shapes that they document."""

    def of_heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, T, heads, H]
        return reference(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).to(q.dtype)

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, deterministic: bool
    ) -> Tensor:
        assert causal
        return of_heads_last(q, k, v)

    class LowerTriangularMask:
        pass

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        assert isinstance(attn_bias, LowerTriangularMask)
        assert q.shape == k.shape == v.shape  # with four dimensions it knows no groups
        return of_heads_last(q, k, v)

    flash: Any = types.ModuleType("flash_attn")
    flash.flash_attn_func = flash_attn_func
    ops: Any = types.ModuleType("xformers.ops")
    ops.LowerTriangularMask = LowerTriangularMask
    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.parametrize("name", ["sdpa", "sdpa_flash", "flash_attn", "xformers", "blocks"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_kernels_of_one_signature_compute_the_formula(
    packages: None, name: kernels.Name, kv_heads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 150, 16, generator=generator) for n in (4, kv_heads, kv_heads))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    found = KERNELS[name](*leaves)
    torch.testing.assert_close(found.double(), reference(q, k, v), rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=generator)
    (found * weights).sum().backward()
    doubles = [t.double().requires_grad_() for t in (q, k, v)]
    (reference(*doubles) * weights).sum().backward()
    for leaf, double in zip(leaves, doubles, strict=True):
        torch.testing.assert_close(leaf.grad, double.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "flash_attn", "xformers", "blocks"])
def test_a_model_has_the_same_loss_and_gradients_by_every_kernel(
    packages: None, name: kernels.Name
) -> None:
    tokens = torch.randint(50, (2, 31), generator=torch.Generator().manual_seed(0))
    found = []
    for kernel in (name, "sdpa"):
        model = build(TINY)
        set_attention(model, kernel)
        sums: Any = model(tokens[:, :-1], tokens[:, 1:])
        sums.total.backward()
        found.append((sums.ce, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_does_not_use_the_kernel_of_training() -> None:
    from openlm_lite.model.attention import KVCache

    model = build(TINY)
    tokens = torch.randint(50, (1, 6))
    with torch.no_grad():
        expected = model(tokens)
        for module in model.modules():
            if hasattr(module, "kernel"):
                module.kernel = sdpa  # which sees as many keys as queries
        cache = KVCache(TINY, 1, 6)
        parts = [model(tokens[:, i : i + 1], cache=cache) for i in range(6)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


def choose(name: Any, dtype: torch.dtype = FP32, **fields: Any) -> Choice:
    return choose_attention(KernelConfig(name), dataclasses.replace(TINY, **fields), CPU, dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "fields", "what"),
    [
        ("flash_attn", BF16, {}, "runs on CUDA devices, not on cpu"),
        ("sdpa_cudnn", BF16, {}, "runs on CUDA devices, not on cpu"),
        ("blocks", BF16, {}, "needs parallel.precision=fp32"),
        ("blocks", FP32, {"positions": "alibi"}, "which only sdpa and flex do"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_one_error_with_what_to_set(
    name: str, dtype: torch.dtype, fields: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError) as error:
        choose(name, dtype, **fields)
    assert str(error.value).startswith(f"kernels.attention = {name}: ")
    assert what in str(error.value)
    assert "; set kernels.attention=auto, or one of sdpa" in str(error.value)


@pytest.mark.parametrize(
    ("name", "head_dim", "what"),
    [
        ("sdpa_flash", 264, "model.head_dim = 264, it takes up to 256"),
        ("sdpa_cudnn", 136, "model.head_dim = 136, it takes up to 128"),
        ("sdpa_cudnn", 36, "model.head_dim = 36, it takes multiples of 8"),
        ("flash_attn", 20, "model.head_dim = 20, it takes multiples of 8"),
        ("flex", 8, "model.head_dim = 8, it takes 16 and more"),
        ("sdpa_flash", 128, None),
        ("sdpa", 7, None),
    ],
)
def test_head_sizes_that_a_kernel_does_not_take_are_known_without_a_gpu(
    name: kernels.Name, head_dim: int, what: str | None
) -> None:
    model = dataclasses.replace(TINY, head_dim=head_dim, positions="none")
    assert problem_with(name, model, "cuda", BF16) == what


@pytest.mark.parametrize(("name", "extra"), [("flash_attn", "flash"), ("xformers", "xformers")])
def test_an_absent_package_is_told_with_its_install_line(
    monkeypatch: pytest.MonkeyPatch, name: kernels.Name, extra: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = dataclasses.replace(TINY, head_dim=64)
    problem = problem_with(name, model, "cuda", BF16)
    assert problem is not None and f'pip install "openlm-lite[{extra}]"' in problem


def test_a_cpu_trains_by_blocks_in_fp32_and_by_sdpa_else() -> None:
    assert choose("auto") == Choice("blocks", "auto")
    assert choose("auto", BF16) == Choice("sdpa", "auto")
    assert choose("auto", positions="alibi") == Choice("sdpa", "auto")
    assert choose("sdpa") == Choice("sdpa", "as configured")


def test_a_kernel_that_fails_or_computes_something_else_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nmore")

    model: ModelConfig = TINY
    for kernel, what in (
        (fails, "does not run here: no kernel image"),
        (lambda q, k, v: 1.2 * sdpa(q, k, v), "computes something else here (off by 20%)"),
        (sdpa, None),
    ):
        monkeypatch.setitem(KERNELS, "flash_attn", kernel)
        assert kernels._probe("flash_attn", model, CPU, FP32) == what


def test_rotary_tables_are_computed_once_for_all_passes_of_one_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from openlm_lite.model import transformer

    lengths = []
    inner = transformer.rope_tables

    def counted(positions_T: Tensor, cfg: ModelConfig) -> Any:
        lengths.append(len(positions_T))
        return inner(positions_T, cfg)

    monkeypatch.setattr(transformer, "rope_tables", counted)
    model = build(TINY)
    tokens = torch.randint(50, (2, 9))
    for length in (9, 9, 5, 5, 9):
        model(tokens[:, :length], tokens[:, :length])
    with torch.inference_mode():
        model(tokens)
    sums: Any = model(tokens, tokens)  # no table from inference mode meets the backward pass
    sums.total.backward()
    assert lengths == [9, 5, 9, 9, 9]
