"""Clipping leaves a gradient alone where torch would multiply it by 1, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from openlm_lite.optim.build import clip_gradients


@given(
    norm=st.one_of(
        st.floats(0.0, 4.0, width=32),
        st.floats(1.0 - 3e-6, 1.0 + 3e-6),  # about the bound: torch adds 1e-6 to the norm
        st.sampled_from([float("nan"), float("inf")]),
    ),
    max_norm=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_clipping_is_torchs_to_the_bit(norm: float, max_norm: float) -> None:
    ours = nn.Linear(3, 5)
    for p in ours.parameters():
        p.grad = torch.full_like(p, norm / 20**0.5)  # 20 numbers of one size
    theirs = copy.deepcopy(ours)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    found = clip_gradients(ours, max_norm)
    if max_norm:
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        assert torch.equal(found, expected) or (found.isnan() and expected.isnan())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("norm", "multiplied"), [(0.5, False), (0.99999, False), (2.0, True)])
def test_a_small_gradient_is_not_even_touched(norm: float, multiplied: bool) -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.full_like(model.weight, norm)
    before = model.weight.grad._version
    clip_gradients(model, 1.0)
    assert (model.weight.grad._version != before) == multiplied
