"""Documents inside a row: each gives the logits and the gradients that it gives alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from openlm_lite import dist
from openlm_lite.errors import InputError
from openlm_lite.layout import build_layout
from openlm_lite.model import attention, cpu_attention
from openlm_lite.model.attention import KVCache
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.transformer import Transformer
from openlm_lite.parallel import ParallelConfig, parallelize
from tests.model.test_transformer import TINY, architectures, build

POSITIONS = ["rope", "alibi", "learned", "none"]


def random_documents(batch: int, length: int, chance: float, seed: int = 0) -> Tensor:
    """doc_ids_BT whose documents end at each position with this chance."""
    draws = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    return (draws < chance).cumsum(1).int()


def spans(doc_ids_BT: Tensor) -> Iterator[tuple[int, slice]]:
    """(row, positions) of every document."""
    for row, ids in enumerate(doc_ids_BT):
        start = 0
        for count in ids.unique_consecutive(return_counts=True)[1].tolist():
            yield row, slice(start, start + count)
            start += count


def alone(model: Transformer, tokens_BT: Tensor, doc_ids_BT: Tensor) -> Tensor:
    """The logits of every document in a forward pass of its own."""
    out = torch.empty(*tokens_BT.shape, model.cfg.vocab_size)
    for row, where in spans(doc_ids_BT):
        out[row, where] = model(tokens_BT[row : row + 1, where])[0]
    return out


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@settings(max_examples=30, deadline=None)
@given(cfg=architectures(), chance=st.sampled_from([0.0, 0.1, 0.4, 1.0]), seed=st.integers(0, 99))
def test_each_document_of_a_row_gives_what_it_gives_alone(
    cfg: ModelConfig, chance: float, seed: int
) -> None:
    # norms over three features that are nearly equal would magnify rounding 300-fold (eps = 1e-5)
    model = build(dataclasses.replace(cfg, d_model=cfg.d_model + 8, norm_eps=0.1))
    doc_ids = random_documents(2, 13, chance, seed)
    tokens = torch.randint(cfg.vocab_size, (2, 14), generator=torch.Generator().manual_seed(seed))
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():  # the mask goes to scaled_dot_product_attention
        expected = alone(model, tokens, doc_ids)
        torch.testing.assert_close(
            model(tokens, doc_ids_BT=doc_ids), expected, rtol=1e-5, atol=1e-5
        )
    # with gradients, to cpu_attention.causal_attention
    torch.testing.assert_close(model(tokens, doc_ids_BT=doc_ids), expected, rtol=1e-5, atol=1e-5)

    model(tokens, targets, doc_ids_BT=doc_ids, z_weight=1e-3).total.backward()
    packed = gradients(model)
    for row, where in spans(doc_ids):
        part = slice(row, row + 1)
        model(tokens[part, where], targets[part, where], z_weight=1e-3).total.backward()
    single = gradients(model)
    assert packed.keys() == single.keys()
    for name, grad in packed.items():
        difference = (grad - single[name]).abs().max() / single[name].abs().max().clamp(min=1.0)
        assert difference <= 1e-5, name


@pytest.mark.parametrize("positions", POSITIONS)
def test_one_document_per_row_is_the_plain_model(positions: str) -> None:
    model = build(dataclasses.replace(TINY, positions=positions))
    tokens = torch.randint(50, (2, 20))
    for number in (0, 7):
        same = torch.full((2, 20), number)
        torch.testing.assert_close(
            model(tokens, doc_ids_BT=same), model(tokens), rtol=1e-5, atol=1e-5
        )


def test_learned_positions_begin_anew_in_each_document() -> None:
    doc_ids = torch.tensor([[0, 0, 0, 1, 2, 2], [4, 4, 4, 4, 4, 9]])
    found = attention.positions_in_documents(doc_ids)
    assert found.tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 0]]


def test_documents_and_a_cache_together_are_refused() -> None:
    with pytest.raises(InputError, match="one document per row"):
        build(TINY)(
            torch.zeros(1, 4, dtype=torch.long),
            cache=KVCache(TINY, 1, 8),
            doc_ids_BT=torch.zeros(1, 4, dtype=torch.int32),
        )


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 300),
    chance=st.sampled_from([0.0, 0.02, 0.3]),
    block=st.sampled_from([7, 64, 128]),
)
def test_masked_attention_in_blocks_equals_the_whole(
    length: int, chance: float, block: int
) -> None:
    seen = random_documents(2, length, chance)
    seen = (seen[:, :, None] == seen[:, None, :]).tril_()[:, None]
    q, k, v = (torch.randn(2, 3, length, 5, requires_grad=True) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "BLOCK", block)
        ours = cpu_attention.causal_attention(q, k, v, seen)
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        weights = torch.randn_like(ours)
        for a, b in zip(
            torch.autograd.grad((ours * weights).sum(), (q, k, v)),
            torch.autograd.grad((plain * weights).sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- under activation checkpointing, FSDP and torch.compile --------------------------------------


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    doc_ids = random_documents(2, 24, 0.2)
    tokens = torch.randint(50, (2, 25), generator=torch.Generator().manual_seed(3))
    found = []
    world = dist.init()
    try:
        for checkpointing in (False, True):
            model = build(TINY)
            cfg = ParallelConfig(precision="fp32", activation_checkpointing=checkpointing)
            parallelize(model, build_layout(cfg, world), cfg)
            model(tokens[:, :-1], tokens[:, 1:], doc_ids_BT=doc_ids).total.backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    finally:
        dist.close()
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_sharded_bf16_model_sees_no_other_document() -> None:
    doc_ids = torch.tensor([[0] * 9 + [1] * 7, [0] * 3 + [1] * 13])
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
    changed = torch.where(doc_ids == 0, (tokens + 1) % 50, tokens)
    world = dist.init()
    try:
        model = build(TINY)
        cfg = ParallelConfig(precision="bf16", activation_checkpointing=True)
        parallelize(model, build_layout(cfg, world), cfg)
        logits, others = (model(t, doc_ids_BT=doc_ids) for t in (tokens, changed))
        model(tokens, tokens, doc_ids_BT=doc_ids).total.backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.close()
    assert torch.equal(logits[doc_ids == 1], others[doc_ids == 1])
    assert not torch.equal(logits[doc_ids == 0], others[doc_ids == 0])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inner workings
def test_compiled_blocks_give_the_same_losses() -> None:
    doc_ids = random_documents(2, 24, 0.2)
    tokens = torch.randint(50, (2, 25), generator=torch.Generator().manual_seed(3))
    found = []
    for compiled in (False, True):
        model = build(TINY)
        if compiled:
            for block in model.layers:
                block.compile()
        loss = model(tokens[:, :-1], tokens[:, 1:], doc_ids_BT=doc_ids)
        loss.total.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        found.append((loss.total.item(), torch.stack(norms)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


# --- FlexAttention: its forward pass exists on a CPU too -----------------------------------------

WIDE = dataclasses.replace(TINY, head_dim=16, max_seq_len=512)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 520),
    chance=st.sampled_from([0.0, 0.002, 0.02, 0.5]),
    seed=st.integers(0, 99),
)
def test_the_block_mask_is_the_one_that_pytorch_computes(
    length: int, chance: float, seed: int
) -> None:
    doc_ids = random_documents(2, length, chance, seed)
    expected = create_block_mask(
        lambda b, h, q, k: (q >= k) & (doc_ids[b, q] == doc_ids[b, k]),
        2,
        None,
        length,
        length,
        device="cpu",
    )
    ours = attention._document_blocks(doc_ids)
    assert ours.seq_lengths == expected.seq_lengths == (length, length)
    assert ours.BLOCK_SIZE == expected.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert listed(ours, kind) == listed(expected, kind)


def listed(mask: BlockMask, kind: str) -> list[list[list[int]]]:
    """Per row of the batch and block: the blocks on the other side."""
    counts = getattr(mask, f"{kind}_num_blocks")[:, 0]
    indices = getattr(mask, f"{kind}_indices")[:, 0]
    return [
        [blocks[:n].tolist() for n, blocks in zip(row_counts, row, strict=True)]
        for row_counts, row in zip(counts.tolist(), indices, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("positions", POSITIONS)
def test_flex_attention_equals_the_whole_mask(
    monkeypatch: pytest.MonkeyPatch, positions: str
) -> None:
    model = build(dataclasses.replace(WIDE, positions=positions))
    tokens, doc_ids = torch.randint(50, (2, 300)), random_documents(2, 300, 0.02)
    with torch.no_grad():
        expected = model(tokens, doc_ids_BT=doc_ids)
        monkeypatch.setattr(attention, "uses_flex", lambda cfg, device: True)
        monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
        found = model(tokens, doc_ids_BT=doc_ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inner workings
@pytest.mark.parametrize("blocks_compiled", [False, True])
def test_compiled_flex_attention_is_compiled_once_for_all_documents(
    monkeypatch: pytest.MonkeyPatch, blocks_compiled: bool
) -> None:
    plain, model = build(WIDE), build(WIDE)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    if blocks_compiled:
        for block in model.layers:
            block.compile()
    for seed in range(3):
        tokens, doc_ids = torch.randint(50, (2, 200)), random_documents(2, 200, 0.02, seed)
        with torch.no_grad():
            expected = plain(tokens, doc_ids_BT=doc_ids)
            with monkeypatch.context() as patch:
                patch.setattr(attention, "uses_flex", lambda cfg, device: True)
                found = model(tokens, doc_ids_BT=doc_ids)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
