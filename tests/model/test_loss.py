"""The chunked loss equals the plain one, whatever the chunks, masks and z-loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from openlm_lite.model.loss import IGNORE_INDEX, linear_cross_entropy


def plain(h: Tensor, w: Tensor, y: Tensor, z_weight: float) -> Tensor:
    logits = h @ w.t()
    ce = F.cross_entropy(logits, y, ignore_index=IGNORE_INDEX, reduction="sum")
    return ce + z_weight * logits.logsumexp(-1).square().sum()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    vocab=st.integers(2, 50),
    chunk=st.integers(1, 45),
    z_weight=st.sampled_from([0.0, 1e-4, 0.3]),
    ignored=st.floats(0, 1),
    scale=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_value_and_gradients_equal_the_plain_loss(
    n: int, vocab: int, chunk: int, z_weight: float, ignored: float, scale: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    h = (scale * torch.randn(n, 8, generator=g, dtype=torch.float64)).requires_grad_()
    w = torch.randn(vocab, 8, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.randint(vocab, (n,), generator=g)
    y[torch.rand(n, generator=g) < ignored] = IGNORE_INDEX
    expected = torch.autograd.grad(plain(h, w, y, z_weight), (h, w))
    sums = linear_cross_entropy(h, w, y, z_weight=z_weight, chunk_tokens=chunk)
    found = torch.autograd.grad(sums.total, (h, w))
    value = plain(h, w, y, z_weight).item()
    assert sums.total.item() == pytest.approx(value, rel=1e-5, abs=1e-4)
    assert sums.n_targets == (y != IGNORE_INDEX).sum()
    for a, b in zip(found, expected, strict=True):
        # the logits are reduced in fp32
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


@given(ignored=st.floats(0, 0.9), chunk=st.integers(1, 25), seed=st.integers(0, 2**31))
def test_z_loss_over_targets_is_that_of_the_rows_that_count(
    ignored: float, chunk: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(20, 8, generator=g, dtype=torch.float64).requires_grad_()
    w = torch.randn(9, 8, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.randint(9, (20,), generator=g)
    y[torch.rand(20, generator=g) < ignored] = IGNORE_INDEX
    kept = y != IGNORE_INDEX
    expected = torch.autograd.grad(plain(h[kept], w, y[kept], 0.3), (h, w))
    sums = linear_cross_entropy(h, w, y, z_weight=0.3, z_over_targets=True, chunk_tokens=chunk)
    found = torch.autograd.grad(sums.total, (h, w))
    z = (h[kept] @ w.t()).logsumexp(-1).square().sum()
    assert sums.z.item() == pytest.approx(z.item(), rel=1e-5, abs=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


def test_gradients_scale_with_what_arrives() -> None:
    h, w = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    y = torch.arange(6)
    once = torch.autograd.grad(linear_cross_entropy(h, w, y).total, (h, w))
    thrice = torch.autograd.grad(3 * linear_cross_entropy(h, w, y).total, (h, w))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, and how many bytes lived at once."""

    elements = 0
    products = 0
    bytes = 0

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.products += "mm" in str(func)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
                storage = tensor.untyped_storage()
                self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(self._alive.values()))
        return out


@pytest.mark.parametrize("z_weight", [0.0, 1e-4])
def test_all_logits_never_exist_at_once(z_weight: float) -> None:
    n, vocab, chunk = 64, 500, 8
    h, w = torch.randn(n, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    with Largest() as largest:
        sums = linear_cross_entropy(
            h, w, torch.zeros(n, dtype=torch.long), z_weight=z_weight, chunk_tokens=chunk
        )
        sums.total.backward()
    assert largest.elements == chunk * vocab < n * vocab


@pytest.mark.parametrize("z_weight", [0.0, 1e-4])
@pytest.mark.parametrize(("dtype", "bytes_of_logit"), [(torch.float32, 4), (torch.bfloat16, 4 + 2)])
def test_logits_of_one_chunk_exist_at_once(
    z_weight: float, dtype: torch.dtype, bytes_of_logit: int
) -> None:
    n, vocab, chunk = 64, 500, 8
    h = torch.randn(n, 4, dtype=dtype, requires_grad=True)
    w = torch.randn(vocab, 4, dtype=dtype, requires_grad=True)
    with Largest() as largest:
        linear_cross_entropy(
            h, w, torch.zeros(n, dtype=torch.long), z_weight=z_weight, chunk_tokens=chunk
        )
    of_head = 3 * w.numel() * 4  # itself, its gradient, the product that is added to that
    assert largest.bytes <= bytes_of_logit * chunk * vocab + of_head + 4096


def test_logits_of_an_evaluation_exist_a_chunk_at_a_time() -> None:
    h, w = torch.randn(64, 4), torch.randn(500, 4)
    with torch.no_grad(), Largest() as largest:
        linear_cross_entropy(h, w, torch.zeros(64, dtype=torch.long), chunk_tokens=8)
    assert largest.bytes <= 4 * 8 * 500 + 4 * w.numel() + 4096


def test_evaluation_takes_no_gradient() -> None:
    h, w = torch.randn(6, 4), torch.randn(9, 4, requires_grad=True)
    with torch.no_grad(), Largest() as largest:
        sums = linear_cross_entropy(h, w, torch.arange(6))
    assert largest.products == 1  # the logits: no gradient of the head is computed
    assert not sums.total.requires_grad
    expected = F.cross_entropy(h @ w.t(), torch.arange(6), reduction="sum")
    torch.testing.assert_close(sums.ce, expected.detach())
