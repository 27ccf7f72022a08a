"""The loss on held-out text equals plain formulas, transformers' loss and the bootstrap's own."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.stream import val_batches
from openlm_lite.data.tokenizer import Tokenizer, load_tokenizer
from openlm_lite.errors import InputError, RunError
from openlm_lite.eval.held_out import text_bytes, windows
from openlm_lite.eval.intervals import beta_interval, bootstrap_mean
from openlm_lite.eval.loss import validation_loss
from openlm_lite.eval.perplexity import PerplexityConfig, SourceLoss, measure
from openlm_lite.hf.compare import load_hf
from openlm_lite.hf.export import export_checkpoint
from openlm_lite.model.transformer import Transformer
from tests.tiny_run import (
    TEXT,
    process_group,
    save_tiny_run,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)

QUICK = PerplexityConfig(bootstrap=200, batch_size=3)
DOCUMENTS = ["A small model, again. " * 20, "", "ünïcödé €", TEXT]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return str(path)


# --- raw text ------------------------------------------------------------------------------------


@given(n=st.integers(1, 90), seq_len=st.integers(1, 20), data=st.data())
def test_each_token_is_scored_once_with_all_the_context_that_the_window_has(
    n: int, seq_len: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_len))
    ids = np.arange(100, 100 + n)
    seen = []
    for window in windows(ids, 7, seq_len, stride):
        assert len(window.inputs) == len(window.targets) <= seq_len
        for i in range(len(window.targets) - window.scored, len(window.targets)):
            token = int(window.targets[i])
            seen.append(token)
            before = [7, *range(100, token)]
            assert window.inputs[: i + 1].tolist() == before[-(i + 1) :]
            assert i + 1 >= min(len(before), seq_len - stride + 1)
    assert seen == ids.tolist()


@torch.no_grad()
def token_losses(model: Transformer, ids: list[int], stride: int, eot_id: int) -> list[float]:
    """Token by token: each from one sequence that ends before it."""
    losses, L = [], model.cfg.max_seq_len
    for t, token in enumerate(ids):
        # the windows end at L, L + stride, …
        end = L if t < L else L + math.ceil((t + 1 - L) / stride) * stride
        start = max(0, min(end, len(ids)) - L)
        context = [eot_id, *ids][start : t + 1]
        logits_V = model(torch.tensor([context]))[0, -1].double()
        losses.append(-logits_V.log_softmax(-1)[token].item())
    return losses


@pytest.mark.parametrize("stride", [None, 16])
def test_the_loss_on_text_is_the_mean_over_tokens_each_scored_alone(
    model: Transformer, tokenizer: Tokenizer, texts: str, stride: int | None
) -> None:
    found = measure(model, tokenizer, texts, replace(QUICK, stride=stride))
    by_document = [
        token_losses(model, tokenizer.encode(text).tolist(), stride or 64, tokenizer.eot_id)
        for text in DOCUMENTS
        if text
    ]
    flat = [loss for losses in by_document for loss in losses]
    assert found.loss == pytest.approx(np.mean(flat), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    n_bytes = len("".join(DOCUMENTS).encode())
    assert found.bits_per_byte == pytest.approx(sum(flat) / math.log(2) / n_bytes, abs=1e-5)
    assert (found.tokens, found.sequences, found.empty) == (len(flat), 3, 1)
    assert (found.bytes, found.kind, found.stride) == (n_bytes, "text", stride or 64)
    assert len(by_document[0]) > 128  # or no window would have moved twice
    means = np.array([np.mean(losses) for losses in by_document])
    expected = bootstrap_mean(means, 200)
    assert (found.loss_sequences_lower_95, found.loss_sequences_upper_95) == pytest.approx(
        expected, abs=1e-5
    )


def test_the_loss_on_text_is_that_of_the_exported_folder_in_transformers(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    export_checkpoint(str(save_tiny_run(tmp_path / "run", model, tokenizer)), str(tmp_path / "hf"))
    theirs = load_hf(str(tmp_path / "hf"), torch.float32)
    (tmp_path / "held_out.txt").write_text(DOCUMENTS[0])
    found = measure(model, tokenizer, str(tmp_path / "held_out.txt"), replace(QUICK, stride=24))
    ids = np.array([tokenizer.eot_id, *tokenizer.encode(DOCUMENTS[0])], dtype=np.int64)
    nats, n, L = 0.0, 0, 64
    for end in [L, *range(L + 24, len(ids) + 23, 24)]:  # as in transformers' page on perplexity
        end = min(end, len(ids) - 1)
        labels = torch.from_numpy(ids[max(0, end - L) : end + 1].copy())
        inputs = labels.clone()
        labels[: len(labels) - (end - n)] = -100
        # its loss is over labels moved by one: give it one input more than the window has
        logits = theirs(inputs[None, :-1]).logits
        loss = theirs.loss_function(logits, None, theirs.config.vocab_size,
                                    shift_labels=labels[None, 1:])  # fmt: skip
        nats += loss.item() * (end - n)
        n = end
    assert n == found.tokens
    assert found.loss == pytest.approx(nats / n, abs=1e-5)


# --- token shards --------------------------------------------------------------------------------


def test_the_loss_on_shards_is_the_validation_loss_and_counts_their_text(
    toy_recipe: Path, model: Transformer
) -> None:
    path = str(toy_recipe.parent / "data" / "val")
    words, dataset = load_tokenizer(path), open_dataset(path)
    found = measure(model, words, path, replace(QUICK, seq_len=32, max_tokens=1024))
    how = {"seq_len": 32, "batch_size": 4, "max_tokens": 1024, "rank": 0, "world_size": 1}
    batches = list(val_batches(dataset, **how))
    with process_group():
        expected = validation_loss(model, batches, torch.device("cpu"))
    assert found.loss == pytest.approx(expected, abs=1e-6)
    assert (found.kind, found.tokens, found.sequences, found.seq_len) == ("shards", 1024, 32, 32)
    nats = n_bytes = 0.0
    for batch in batches:
        logits = model(batch.tokens_BT).detach()
        ce_BT = F.cross_entropy(logits.mT, batch.targets_BT, reduction="none")
        is_text = batch.targets_BT != words.eot_id
        nats += ce_BT[is_text].sum().item()
        n_bytes += sum(len(words.decode([i])) for i in batch.targets_BT[is_text].tolist())
    assert found.bytes == n_bytes  # the toy text is ASCII
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-5)
    assert found.loss_tokens_lower_95 is not None and found.loss_tokens_upper_95 is not None
    assert found.loss_tokens_lower_95 < found.loss < found.loss_tokens_upper_95
    alone = measure(model, None, path, replace(QUICK, max_tokens=64, bootstrap=0))
    assert (alone.bits_per_byte, alone.bytes, alone.loss_tokens_lower_95) == (None, None, None)
    assert alone.seq_len == 64


@given(text=st.text(max_size=40))
def test_the_bytes_of_ids_are_those_of_their_text(text: str) -> None:
    ids = BYTES.encode(text)
    with_ends = np.concatenate((ids, np.array([BYTES.eot_id], dtype=ids.dtype)))
    assert text_bytes(BYTES, with_ends) == len(BYTES.decode(ids.tolist()).encode())
    if not any("\ud800" <= c <= "\udfff" for c in text):
        assert text_bytes(BYTES, ids) == len(text.encode())


BYTES = tiny_tokenizer()


# --- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [40, 20_000])
def test_the_bootstrap_of_counts_is_the_bootstrap_of_draws(n: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.lognormal(0.5, 1.0, n).astype(np.float32)  # skewed, as losses of tokens are
    draws = [values[rng.integers(0, n, n)].mean(dtype=np.float64) for _ in range(1000)]
    plain = np.percentile(draws, (2.5, 97.5))
    ours = bootstrap_mean(values, 2000)
    width = plain[1] - plain[0]
    assert ours == pytest.approx(tuple(plain), abs=0.12 * width)  # 2,000 draws' own noise


def test_more_values_than_bins_lose_no_width() -> None:
    values = np.random.default_rng(1).lognormal(0.5, 1.0, 30_000)
    lower, upper = bootstrap_mean(values, 4_000)
    normal = 2 * 1.959964 * values.std() / math.sqrt(len(values))
    assert (upper - lower) / normal == pytest.approx(1.0, abs=0.03)


@settings(max_examples=15)
@given(trials=st.integers(0, 200), data=st.data())
def test_the_beta_interval_holds_95_percent_of_the_posterior(
    trials: int, data: st.DataObject
) -> None:
    right = data.draw(st.integers(0, trials))
    lower, upper = beta_interval(right, trials)
    edges = np.linspace(0, 1, 20_001)
    p = (edges[1:] + edges[:-1]) / 2
    log_density = right * np.log(p) + (trials - right) * np.log1p(-p)
    density = np.exp(log_density - log_density.max())
    below = np.concatenate(([0.0], np.cumsum(density))) / density.sum()
    found = np.interp((lower, upper), edges, below)
    assert found == pytest.approx((0.025, 0.975), abs=1e-4)
    assert beta_interval(trials - right, trials) == pytest.approx((1 - upper, 1 - lower))


# --- bad input -----------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_named(
    model: Transformer, tokenizer: Tokenizer, texts: str, toy_recipe: Path, tmp_path: Path
) -> None:
    val = str(toy_recipe.parent / "data" / "val")

    def refused(message: str, path: str = texts, words: Tokenizer | None = tokenizer,
                cfg: PerplexityConfig = QUICK) -> None:  # fmt: skip
        with pytest.raises(InputError, match=message):
            measure(model, words, path, cfg)

    refused("needs the model's tokenizer", words=None)
    refused("seq_len = 65 is longer than the model's", cfg=replace(QUICK, seq_len=65))
    refused("stride = 20 is longer than the window, 10", cfg=replace(QUICK, seq_len=10, stride=20))
    refused("was encoded with the tokenizer", path=val)
    refused("nothing|no such", path=str(tmp_path / "none"))
    (tmp_path / "a.png").write_bytes(b"")
    refused("neither a dataset", path=str(tmp_path / "a.png"))
    (tmp_path / "empty.txt").write_text("")
    refused("no token to score", path=str(tmp_path / "empty.txt"))
    (tmp_path / "bad.jsonl").write_text('{"text": "A"}\n{"txt": "B"}\n')
    refused(r"bad\.jsonl:2", path=str(tmp_path / "bad.jsonl"))
    for wrong in ({"stride": 0}, {"batch_size": 0}, {"bootstrap": -1}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} = "):
            PerplexityConfig(**wrong)


def test_a_loss_that_is_not_finite_is_an_error_with_its_place(
    tokenizer: Tokenizer, texts: str
) -> None:
    broken = tiny_model(tiny_config())
    with torch.no_grad():
        broken.output.weight[3] = float("nan")
    with pytest.raises(RunError, match=r"not finite for .* the first in document 0"):
        measure(broken, tokenizer, texts, QUICK)


def test_sources_know_the_names_of_openlm() -> None:
    names = set(SourceLoss.__annotations__)
    for kind in ("sequences", "tokens"):
        assert {kind, f"loss_{kind}_lower_95", f"loss_{kind}_upper_95"} <= names
