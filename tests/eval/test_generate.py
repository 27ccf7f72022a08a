from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError
from openlm_lite.eval.generate import (
    Sampling,
    cached_steps,
    filtered_logits,
    generate,
    generate_text,
    stream_text,
)
from openlm_lite.hf.compare import load_hf
from openlm_lite.hf.export import export_checkpoint
from openlm_lite.model.transformer import Transformer
from tests.tiny_run import TEXT, save_tiny_run, tiny_config, tiny_model, tiny_tokenizer

ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"norm": "rms_norm", "qk_norm": "none"},
    {"norm": "rms_norm", "qk_norm": "per_head", "tie_embeddings": True},
    {"qk_norm": "none", "norm_bias": True},
    {"qk_norm": "none", "norm_gain": False, "n_kv_heads": 4},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(tiny_config())


def greedy_without_cache(model: Transformer, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    with torch.inference_mode():
        for _ in range(count):
            logits_BTV = model(torch.tensor([tokens]))
            assert isinstance(logits_BTV, torch.Tensor)
            tokens.append(int(logits_BTV[0, -1].argmax()))
    return tokens[-count:]


# --- the same tokens on every way ----------------------------------------------------------------


@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_greedy_generation_equals_without_cache_and_transformers_token_for_token(
    changes: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model(tiny_config(**changes))
    prompt = tokenizer.encode(TEXT[:30]).tolist()
    ours = generate(model, prompt, max_new_tokens=30)
    assert ours == greedy_without_cache(model, prompt, 30)
    run = save_tiny_run(tmp_path / "run", model, tokenizer)
    export_checkpoint(str(run), str(tmp_path / "hf"))
    native = load_hf(str(tmp_path / "hf"), torch.float32)
    tokens_BT = torch.tensor([prompt])
    theirs = native.generate(
        tokens_BT,
        attention_mask=torch.ones_like(tokens_BT),
        do_sample=False,
        min_new_tokens=30,
        max_new_tokens=30,
        eos_token_id=None,
    )
    assert ours == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("split", [1, 5, 19])
def test_a_prompt_may_be_given_to_the_cache_in_parts(model: Transformer, split: int) -> None:
    tokens = list(range(1, 21))
    with torch.inference_mode():
        whole = cached_steps(model, 20)(tokens)
        step = cached_steps(model, 20)
        step(tokens[:split])
        parts = step(tokens[split:])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_a_seed_decides_the_samples(model: Transformer) -> None:
    def draw(seed: int) -> list[int]:
        return generate(model, [1, 2, 3], max_new_tokens=40, temperature=1.0, seed=seed)

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(5)}) == 5


def test_generation_ends_at_the_end_of_text_which_is_not_part_of_it(model: Transformer) -> None:
    free = generate(model, [1, 2, 3], max_new_tokens=20, temperature=1.0, seed=3)
    eot = free[7]
    stopped = generate(model, [1, 2, 3], max_new_tokens=20, temperature=1.0, seed=3, eot_id=eot)
    assert stopped == free[: free.index(eot)]


# --- the sampler ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=12, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
)
@example([0.0, 0.5, 1.4e-45], 2.0, 0, 0.5, 0.5)  # the last underflows to the first
def test_the_filters_are_those_of_transformers(
    logits: list[float], temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    seen = [0, 1, 0]
    chain = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    logits_V = torch.tensor(logits)
    # equal logits may be taken in another order than ours, and top_p sums probabilities in another:
    # a tie, among logits or with the limit, may fall either way
    theirs = LogitsProcessorList(chain)(torch.tensor([seen]), logits_V[None].clone())[0]  # pyright: ignore
    ours = filtered_logits(logits_V, seen, Sampling(penalty, temperature, top_k, top_p))
    if torch.equal(ours.isinf(), theirs.isinf()):
        torch.testing.assert_close(ours, theirs)
    elif not torch.equal(ours.sort().values, theirs.sort().values):
        order = theirs.softmax(0).sort(descending=True).values
        assert order.cumsum(0).sub(top_p).abs().min() < 1e-5
    assert ours.isfinite().any()


def test_greedy_takes_the_repetition_penalty_into_account() -> None:
    logits_V = torch.tensor([2.0, 1.5, -1.0])
    assert filtered_logits(logits_V, [0, 2], Sampling(2.0)).tolist() == [1.0, 1.5, -2.0]
    assert logits_V.tolist() == [2.0, 1.5, -1.0]  # the caller's logits stay


def test_impossible_sampling_is_refused_all_at_once() -> None:
    with pytest.raises(InputError) as refused:
        Sampling(repetition_penalty=0, temperature=-1, top_k=-1, top_p=0, seed=-1)
    for name in ("repetition_penalty = 0", "temperature = -1", "top_k", "top_p = 0", "seed"):
        assert name in str(refused.value)
    for temperature in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="temperature"):
            Sampling(temperature=temperature)


# --- text ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), tail=st.binary(max_size=6))
def test_streamed_pieces_are_whole_characters_and_add_up(text: str, tail: bytes) -> None:
    tokenizer = BYTES
    ids = tokenizer.encode(text).tolist()
    ids += [BYTE_IDS[b] for b in tail]
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(pieces)
    if not tail and "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


BYTES = tiny_tokenizer()
BYTE_IDS = [
    int(i)
    for b in range(256)
    for i in range(1, 257)
    if BYTES.coder.bpe.ranks[bytes([b])] == i  # pyright: ignore[reportAttributeAccessIssue]
]


def test_text_streams_before_the_last_token_is_there(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).tolist()
    seen = 0

    def count() -> Any:
        nonlocal seen
        for i in ids:
            seen += 1
            yield i

    pieces = stream_text(tokenizer, count())
    assert "".join(islice(pieces, 3)) == tokenizer.decode(ids[:3])
    assert seen == 3


@pytest.fixture
def run(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> Path:
    return save_tiny_run(tmp_path / "run", model, tokenizer)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, 0.8, 20, 0.9, seed=5)])
def test_a_run_and_its_export_write_the_same_text(
    run: Path, model: Transformer, tokenizer: Tokenizer, tmp_path: Path, sampling: Sampling
) -> None:
    export_checkpoint(str(run), str(tmp_path / "hf"))
    for prompt in ("A small", ""):
        texts = {
            "".join(generate_text(str(path), prompt, max_new_tokens=20, sampling=sampling))
            for path in (run, run / "checkpoints", tmp_path / "hf")
        }
        ids = tokenizer.encode(prompt).tolist() or [tokenizer.eot_id]
        expected = generate(
            model,
            ids,
            max_new_tokens=20,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            eot_id=tokenizer.eot_id,
            seed=sampling.seed,
        )
        assert texts == {tokenizer.decode(expected)}


# --- bad input -----------------------------------------------------------------------------------


def test_lengths_that_do_not_fit_are_refused(model: Transformer) -> None:
    for prompt, count, message in (
        ([], 5, "no tokens"),
        ([1] * 64, 1, "at most 63"),
        ([1] * 60, 5, "at most 4 new tokens"),
        ([1], 0, "at least 1"),
        ([1, 320], 5, "knows 0 to 319"),
        ([-1], 5, "knows 0 to 319"),
    ):
        with pytest.raises(InputError, match=message):
            generate(model, prompt, max_new_tokens=count)
    assert len(generate(model, [1] * 60, max_new_tokens=4)) == 4


def test_generating_text_checks_everything_before_the_first_piece(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="found nothing"):
        generate_text(str(tmp_path / "none"), "A")
    with pytest.raises(InputError, match="max_seq_len = 64"):
        generate_text(str(run), TEXT * 10)
    with pytest.raises(InputError, match="device = 'abacus'"):
        generate_text(str(run), "A", device="abacus")
    (run / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        generate_text(str(run), "A", max_new_tokens=5)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        generate_text(str(broken), "A", max_new_tokens=5)


def test_an_exported_folder_with_foreign_code_is_not_run(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "code.C", '
        '"AutoModelForCausalLM": "code.M"}}'
    )
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')\n")
    with pytest.raises(InputError, match="transformers cannot load"):
        generate_text(str(tmp_path), "A", max_new_tokens=5)


def test_prompts_may_be_numpy_ids(model: Transformer) -> None:
    prompt = np.array([1, 2, 3], dtype=np.uint32)
    assert generate(model, prompt.tolist(), max_new_tokens=3)
