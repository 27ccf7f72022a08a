"""Alice in Wonderland: the paper's prompts and parsing, exact answers, honest rates."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError, RunError
from openlm_lite.eval.aiw import (
    VARIATIONS,
    AIWConfig,
    Form,
    drawn_problems,
    parsed_answer,
    prompt_of,
    read_instruction,
    run_aiw,
)
from openlm_lite.eval.intervals import beta_interval
from openlm_lite.eval.model_scorer import ModelScorer
from openlm_lite.model.transformer import Transformer
from tests.tiny_run import process_group, tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(tiny_config(max_seq_len=256))


PAPER = {"base": (87, 88, 89, 90), "standard": (55, 56, 63, 69), "thinking": (57, 58, 64, 70),
         "restricted": (53, 54, 65, 71)}  # fmt: skip


@pytest.mark.parametrize("form", PAPER)
def test_prompts_and_answers_are_the_papers(shared_data: Path, form: Form) -> None:
    entries = {e["id"]: e for e in json.loads((shared_data / "aiw/prompts.json").read_text())}
    instruction = read_instruction(str(shared_data), form)
    for name, number in zip("1234", PAPER[form], strict=True):
        assert prompt_of(VARIATIONS[name], instruction) == entries[number]["prompt"]
        assert str(VARIATIONS[name].answer) == entries[number]["right_answer"]


@given(seed=st.integers(0, 9), n=st.integers(0, 60))
def test_drawn_problems_are_new_and_not_answered_by_copying(seed: int, n: int) -> None:
    problems = drawn_problems(n, seed)
    assert len(set(problems)) == n and drawn_problems(n, seed) == problems
    known = {(p.brothers, p.sisters) for p in VARIATIONS.values()}
    for problem in problems:
        assert (problem.brothers, problem.sisters) not in known
        numbers = re.findall(r"\d+", problem.question)
        assert sorted(map(int, numbers)) == sorted((problem.brothers, problem.sisters))
        assert str(problem.answer) not in numbers and 2 <= problem.answer <= 9

        assert not re.search(r"\b1 (brothers|sisters)", problem.question)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("### Answer: 7", "7"),
        ("First, the answer: she has\n3. ### Answer: 4", "3"),
        ("ANSWER: twelve, i.e. 12", "12"),
        ("Each brother has 5 sisters, 6 with Alice", "5"),
        ("He has two sisters", None),
        ("", None),
        ("### Problem: Alice has 3 brothers …\n### Answer: \n\n8", "8"),
    ],
)
def test_answers_are_taken_as_the_paper_takes_them(response: str, answer: str | None) -> None:
    assert parsed_answer(response) == answer


def run(model: Transformer, words: Tokenizer, cfg: AIWConfig, data: str = "") -> dict[str, Any]:
    with process_group():
        return run_aiw(ModelScorer(model), words, cfg, data)


def test_rates_are_counts_with_their_intervals_whatever_the_batch(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    cfg = AIWConfig(drawn=2, trials=3, max_new_tokens=12, batch_size=5, temperature=1.0)
    found = run(model, tokenizer, cfg)
    sampled = found["sampled"]
    assert list(sampled["variations"]) == list("123456")
    assert sampled["drawn"]["trials"] == 6
    for report in sampled["variations"].values():
        assert report["trials"] == 3 and 0 <= report["right"] <= 3
        interval = (report["lower_95"], report["upper_95"])
        assert interval == beta_interval(report["right"], 3)
    rates = [r["rate"] for r in sampled["variations"].values()]
    assert (sampled["lowest"], sampled["highest"]) == (min(rates), max(rates))
    again = run(model, tokenizer, replace(cfg, batch_size=24))
    assert again == found
    json.dumps(found, allow_nan=False)


def test_seeds_share_no_text_and_a_text_keeps_its_seed_whatever_else_is_asked(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[dict[tuple[int, ...], list[int]]] = []

    def seen(_: Any, prompts: list[list[int]], *, seeds: list[int], **how: Any) -> list[list[int]]:
        for prompt, seed in zip(prompts, seeds, strict=True):
            used[-1].setdefault(tuple(prompt), []).append(seed)
        return [[] for _ in prompts]

    monkeypatch.setattr("openlm_lite.eval.aiw.generate", seen)
    how: dict[str, Any] = {"likelihood": False, "batch_size": 7}
    for seed, trials, drawn in ((0, 4, 0), (1, 4, 0), (0, 9, 3)):
        used.append({})
        run(model, tokenizer, AIWConfig(seed=seed, trials=trials, drawn=drawn, **how))
    zero, one, more = used
    every = [seed for found in (zero, one) for seeds in found.values() for seed in seeds]
    assert len(set(every)) == len(every) == 2 * 6 * 4
    for prompt, seeds in zero.items():
        assert sorted(more[prompt][:4]) == sorted(seeds) and len(more[prompt]) == 9


class _Digits(torch.nn.Module):
    """Says one digit behind everything, then a line's end: what a model with an opinion does."""

    def __init__(self, model: Transformer, words: Tokenizer, digit: str) -> None:
        super().__init__()
        self.cfg, self.embedding = model.cfg, model.embedding
        self.digit, self.end = (int(words.encode(text)[-1]) for text in (digit, "\n"))

    def forward(self, tokens_BT: Any, cache: Any = None, logits_at: Any = None, **_: Any) -> Any:
        logits_nV = torch.zeros(len(logits_at), self.cfg.vocab_size)
        last_n = tokens_BT.flatten()[logits_at]
        logits_nV[:, self.digit] = 20.0
        logits_nV[last_n == self.digit, self.digit] = 0.0
        logits_nV[last_n == self.digit, self.end] = 20.0
        return logits_nV


def test_a_model_that_always_says_4_is_right_where_4_is_the_answer(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    says_4: Any = _Digits(model, tokenizer, "4")
    cfg = AIWConfig(drawn=0, trials=2, max_new_tokens=8, likelihood=False)
    found = run(says_4, tokenizer, cfg)["sampled"]
    assert {name: r["rate"] for name, r in found["variations"].items()} == {
        "1": 0.0, "2": 0.0, "3": 0.0, "4": 0.0, "5": 1.0, "6": 0.0,
    }  # fmt: skip
    assert found["highest"] == 1.0 and found["rate"] == pytest.approx(1 / 6)
    assert all(r["unparsed"] == 0 for r in found["variations"].values())


def test_the_likelihood_form_compares_digits_and_counts_ties(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    cfg = AIWConfig(drawn=3, trials=0)
    found = run(model, tokenizer, cfg)["likelihood"]
    assert found["right"]["trials"] == found["over_m"]["trials"] == 9
    context = tokenizer.encode(prompt_of(VARIATIONS["5"], None).rstrip()).tolist()
    logliks = []
    for digit in range(1, 10):
        ids = tokenizer.encode(f" {digit}").tolist()
        logits = model(torch.tensor([context + ids]))[0, len(context) - 1 : -1].detach()
        logliks.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item())
    row = found["variations"]["5"]
    assert row["margin_over_m"] == pytest.approx(logliks[3] - logliks[2], abs=1e-4)
    assert row["answer"] == 1 + max(range(9), key=logliks.__getitem__)
    constant = tiny_model(tiny_config(max_seq_len=256))
    torch.nn.init.zeros_(constant.output.weight)
    found = run(constant, tokenizer, cfg)["likelihood"]
    lengths = Counter(len(tokenizer.encode(f" {digit}")) for digit in range(1, 10))
    assert lengths.most_common(1)[0][1] == 9  # so that all digits tie
    assert found["ties"] == 9 and found["right"]["right"] == found["over_m"]["right"] == 0


def test_bad_input_is_named_before_the_model_is_asked(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for wrong, message in (
        ({"trials": -1}, "must not be negative"),
        ({"trials": 0, "likelihood": False}, "asks nothing"),
        ({"temperature": 0.0}, "set trials = 1"),
        ({"top_p": 2.0, "top_k": -1, "seed": -1}, r"aiw: top_k = -1, .*top_p = 2.0, .*seed = -1"),
    ):
        with pytest.raises(InputError, match=message):
            AIWConfig(**wrong)
    with pytest.raises(InputError, match=r"there are 1\d\d different ones"):
        drawn_problems(999, 0)
    cfg = AIWConfig(form="standard", trials=1)
    with pytest.raises(InputError, match=r"holds no aiw/prompts\.json"):
        run(model, tokenizer, cfg, str(tmp_path))
    (tmp_path / "prompts.json").write_text('[{"id": 55, "prompt": "Bob has"}]')
    with pytest.raises(InputError, match=r"is not the paper's prompts\.json"):
        run(model, tokenizer, cfg, str(tmp_path))
    short = tiny_model(tiny_config())
    with pytest.raises(InputError, match="max_seq_len = 64"):
        run(short, tokenizer, AIWConfig(trials=1))
    with pytest.raises(InputError, match="the model takes 64"):
        run(short, tokenizer, AIWConfig(trials=0))
    broken = tiny_model(tiny_config(max_seq_len=256))
    with torch.no_grad():
        broken.output.weight[3] = float("nan")
    for cfg in (AIWConfig(trials=1, likelihood=False), AIWConfig(trials=0)):
        with pytest.raises(RunError, match="not finite"):
            run(broken, tokenizer, cfg)
