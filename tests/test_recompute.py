"""What a block computes again, and what it keeps instead."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from openlm_lite.model.kernels import set_attention
from openlm_lite.recompute import _ATTENTION, Recomputation, _policy, recomputed
from openlm_lite.run import load_run
from tests.tiny_run import bytes_kept, tiny_config, tiny_model


@given(
    budget=st.floats(0, 1),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=9),
)
def test_products_are_kept_within_the_budget_and_both_passes_know_which(
    budget: float, sizes: list[tuple[int, int]]
) -> None:
    policy = _policy(budget)
    keep, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    mm, attention = torch.ops.aten.mm.default, _ATTENTION[0]
    answers = []
    for recomputes in (False, True):
        ctx = SimpleNamespace(is_recompute=recomputes)
        assert policy(ctx, torch.ops.aten.silu.default, torch.ones(2)) == again
        assert policy(ctx, attention) == (keep if budget > 0 else again)
        kept = seen = 0
        answers.append([])
        for rows, columns in sizes:
            answers[-1].append(policy(ctx, mm, torch.empty(rows, 3), torch.empty(3, columns)))
            seen += rows * columns
            kept += rows * columns if answers[-1][-1] == keep else 0
            assert kept <= budget * seen
        if budget == 1:
            assert kept == seen
    assert answers[0] == answers[1]


def test_selective_recomputation_computes_again_what_the_budget_leaves_out() -> None:
    """By the operations that run, in two blocks of seven products."""

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            ran[func] += 1
            return func(*args, **(kwargs or {}))

    def counts(how: Recomputation, budget: float = 0.0) -> tuple[int, int]:
        """Products, attentions."""
        ran.clear()
        model = tiny_model(tiny_config(qk_norm="none"))
        set_attention(model, "sdpa")
        for i, block in enumerate(model.layers):
            model.layers[i] = recomputed(block, how, budget)
        tokens = torch.randint(300, (2, 33))
        with Counted():
            model(tokens[:, :-1], tokens[:, 1:]).total.backward()
        return ran[torch.ops.aten.mm.default], sum(ran[op] for op in _ATTENTION)

    ran: Counter[Any] = Counter()
    products, attentions = counts("none")
    assert attentions == 2
    # nothing in a block needs again what its last product put out
    assert counts("full") == counts("selective", 0.0) == (products + 2 * 6, 4)
    # in this order, per token: q 32, k 16, v 16, output 32, gate 48, up 48, down 32
    for budget, recomputed_products in ((0.25, 5), (0.5, 3), (0.75, 2), (1.0, 0)):
        assert counts("selective", budget) == (products + 2 * recomputed_products, 2)


def test_recomputation_holds_less_between_forward_and_backward() -> None:
    """Of what autograd holds, by bytes."""

    def held(how: Recomputation, budget: float) -> int:
        model = tiny_model(tiny_config(qk_norm="none", norm="rms_norm"))
        for i, block in enumerate(model.layers):
            model.layers[i] = recomputed(block, how, budget)
        return bytes_kept(model, torch.randint(300, (2, 33)))

    assert held("full", 0.0) < held("none", 0.0)


def test_old_words_for_activation_checkpointing_still_work() -> None:
    on = load_run("dclm_1b_1x", ["parallel.activation_checkpointing=true"]).parallel
    off = load_run("dclm_1b_1x", ["parallel.activation_checkpointing=false"]).parallel
    assert (on.recomputation, off.recomputation) == ("full", "none")
