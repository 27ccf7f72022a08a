"""Scorers: what is cached, batched and left out changes no number."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite.eval.model_scorer import HFScorer, ModelScorer
from openlm_lite.eval.scorer import (
    BatchLimits,
    Choice,
    ChoiceScore,
    Question,
    plan_batches,
    plan_prompts,
    score_all,
    shared_prefix,
)
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=97, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
    max_seq_len=48,
)  # fmt: skip


def make_model(seed: int = 0, **changes: object) -> Transformer:
    model = Transformer(dataclasses.replace(CONFIG, **changes))
    init_weights(model, seed)
    return model.eval()


def make_questions(seed: int, n: int) -> list[list[Choice]]:
    """With and without a shared part, one choice or several, some as long as the model takes."""
    rng = random.Random(seed)
    questions = []
    for _ in range(n):
        context = rng.choices(range(97), k=rng.randint(1, 40))
        choices = []
        for _ in range(rng.randint(1, 5)):
            own = context if rng.random() < 0.8 else rng.choices(range(97), k=len(context))
            answer = rng.choices(range(97), k=rng.randint(1, 8))
            choices.append(Choice([*own, *answer], len(own)))
        questions.append(choices)
    return questions


@torch.inference_mode()
def alone(model: Transformer, choice: Choice) -> tuple[float, bool]:
    """Log-likelihood and greedy match from all logits of the one sequence."""
    logits = model(torch.tensor([choice.tokens]))[0, choice.start - 1 : -1]
    targets = torch.tensor(choice.tokens[choice.start :])
    logp = logits.log_softmax(-1).gather(1, targets[:, None])
    return logp.sum().item(), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "alibi"},
        {"positions": "learned", "norm": "layer_norm", "qk_norm": "full"},
        {"rope_style": "interleaved", "rotary_pct": 0.5, "block": "parallel"},
    ],
    ids=["rope", "alibi", "learned", "interleaved"],
)
def test_shared_contexts_and_batches_give_the_scores_of_each_sequence_alone(
    changes: dict[str, object],
) -> None:
    model, questions = make_model(**changes), make_questions(1, 24)
    scores = score_all(ModelScorer(model), questions, BatchLimits(sequences=12, tokens=300))
    for question, found in zip(questions, scores, strict=True):
        for choice, score in zip(question, found, strict=True):
            loglik, greedy = alone(model, choice)
            assert score.loglik == pytest.approx(loglik, abs=1e-4)
            assert score.greedy is greedy
            assert score.n_tokens == len(choice.tokens) - choice.start


def test_generated_text_is_that_of_each_prompt_alone() -> None:
    model = make_model(3)
    prompts = [list(range(5, 5 + n)) for n in (1, 9, 4, 20)]
    found = ModelScorer(model).generate(prompts, 12, 96, lambda tokens: False)
    for prompt, tokens in zip(prompts, found, strict=True):
        expected: list[int] = []
        with torch.inference_mode():
            while len(expected) < 12:
                token = int(model(torch.tensor([[*prompt, *expected]]))[0, -1].argmax())
                if token == 96:
                    break
                expected.append(token)
        assert tokens == expected


def test_generation_looks_whether_it_is_done() -> None:
    found = ModelScorer(make_model(3)).generate([[1, 2]], 40, 96, lambda tokens: len(tokens) >= 8)
    assert found[0] is not None and 8 <= len(found[0]) < 40


def test_constant_logits_are_told_from_an_opinion() -> None:
    model = make_model()
    torch.nn.init.zeros_(model.output.weight)
    scorer = ModelScorer(model)
    assert scorer.score([[Choice([1, 2, 0], 2)]]) == [
        [ChoiceScore(pytest.approx(-4.5747, abs=1e-4), 1, True, True)]
    ]
    assert scorer.generate([[1, 2]], 4, 96, lambda tokens: False) == [None]


def test_a_shared_prefix_ends_before_what_predicts_an_answer() -> None:
    assert shared_prefix([Choice([1, 2, 3, 4], 3), Choice([1, 2, 3, 5], 3)]) == 2
    assert shared_prefix([Choice([1, 2, 3, 4], 3), Choice([1, 9, 3, 4], 3)]) == 1
    assert shared_prefix([Choice([1, 2, 3, 4], 3)]) == 0
    assert shared_prefix([Choice([1, 2], 1), Choice([1, 3], 1)]) == 0


@given(st.integers(0, 999), st.integers(1, 30), st.integers(1, 20), st.integers(1, 500))
def test_batches_hold_every_question_once_and_keep_the_limits(
    seed: int, n: int, sequences: int, tokens: int
) -> None:
    questions: list[Question] = list(make_questions(seed, n))
    batches = plan_batches(questions, BatchLimits(sequences, tokens), 97)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(n))
    for batch in batches:
        members = [questions[i] for i in batch.indices]
        assert {shared_prefix(q) > 0 for q in members} == {batch.cached}
        if len(members) > 1:
            assert sum(map(len, members)) <= sequences
            longest = max(len(choice.tokens) for q in members for choice in q)
            assert longest * len(members) <= tokens


class _Rows:
    """What transformers' class is asked to compute: the shapes of its rows."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=97)
        self.device = torch.device("cpu")
        self.shapes: list[torch.Size] = []

    def __call__(self, tokens_BT: torch.Tensor, use_cache: bool) -> Any:
        self.shapes.append(tokens_BT.shape)
        return SimpleNamespace(logits=torch.zeros(*tokens_BT.shape, 97))


def test_a_scorer_that_reads_every_choice_whole_keeps_the_limits_with_that() -> None:
    context = list(range(40))
    questions = [[Choice([*context, i], 40) for i in range(4)] for _ in range(6)]
    limits = BatchLimits(sequences=24, tokens=400)
    rows = _Rows()
    score_all(HFScorer(rows), questions, limits)
    assert sum(B for B, _ in rows.shapes) == 24
    assert all(B * T <= 400 for B, T in rows.shapes)
    assert len(plan_batches(questions, limits, 97)) == 1  # where the context is read once


def test_prompts_are_batched_with_the_room_for_their_answers() -> None:
    batches = plan_prompts([10, 30, 20, 30], 10, BatchLimits(sequences=8, tokens=80))
    assert [batch.indices for batch in batches] == [[1, 3], [2, 0]]
