"""Alice in Wonderland (AIW): one family, one question, exact answers (arXiv:2406.02061).

    Alice has N brothers and she also has M sisters.
    How many sisters does Alice's brother have?          M + 1: Alice is one of them

The paper's point is how far the rate of right answers moves when nothing but N, M and their order
change, so every variation is reported with its own interval, and the spread over them.

    sampled      `trials` texts per question, the answer taken from them as the paper does
    likelihood   which digit the model thinks most likely behind `### Answer:` (base models)

Besides the paper's six variations, questions are drawn (`Problem`), which no training data has
been told the answers of, and whose answer is no number that stands in the question.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from openlm_lite import dist
from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError, RunError
from openlm_lite.eval.generate import Sampling, check_length, generate
from openlm_lite.eval.intervals import beta_interval
from openlm_lite.eval.model_scorer import ModelScorer
from openlm_lite.eval.scorer import BatchLimits, Choice, Scorer, score_all

Form = Literal["base", "standard", "thinking", "restricted"]

PROMPTS_FILE = "aiw/prompts.json"
# The number of the first variation's prompt in the paper's prompts.json, by form.
_PROMPT_IDS = {"standard": 55, "thinking": 57, "restricted": 53}
_EQUAL_NATS = 1e-6  # fp32's own noise


class Problem(NamedTuple):
    """A question with its answer."""

    brothers: int
    sisters: int
    first: Literal["brothers", "sisters"]
    """which of the two is named first"""

    @property
    def question(self) -> str:
        counts = {"brothers": self.brothers, "sisters": self.sisters}
        second = "sisters" if self.first == "brothers" else "brothers"
        a, b = (f"{counts[kind]} {kind[:-1] if counts[kind] == 1 else kind}"
                for kind in (self.first, second))  # fmt: skip
        return f"Alice has {a} and she also has {b}. How many sisters does Alice's brother have?"

    @property
    def answer(self) -> int:
        return self.sisters + 1


VARIATIONS: dict[str, Problem] = {
    "1": Problem(3, 6, "brothers"),
    "2": Problem(4, 2, "sisters"),
    "3": Problem(1, 4, "sisters"),
    "4": Problem(4, 1, "brothers"),
    "5": Problem(2, 3, "brothers"),
    "6": Problem(3, 5, "sisters"),
}
"""the paper's"""


def drawn_problems(n: int, seed: int) -> list[Problem]:
    """`n` different questions (at most 111), none of them one of the paper's.

    Numbers from 1 to 9 with a one-digit answer; N is not M + 1, so that no number that is copied
    from the question is right.
    """
    every: list[Problem] = [
        Problem(brothers, sisters, first)
        for brothers in range(1, 10)
        for sisters in range(1, 9)
        for first in ("brothers", "sisters")
        if brothers != sisters + 1
    ]
    paper = {(problem.brothers, problem.sisters) for problem in VARIATIONS.values()}
    every = [p for p in every if (p.brothers, p.sisters) not in paper]
    if not 0 <= n <= len(every):
        raise InputError(f"aiw: {n} drawn problems: there are {len(every)} different ones")
    return random.Random(seed).sample(every, n)


@dataclass(frozen=True)
class AIWConfig:
    """What is asked, and how often."""

    form: Form = "base"
    """base: `### Problem: …`, `### Answer:`; the others are instructions, read from the data"""
    drawn: int = 20
    """questions besides the paper's six"""
    trials: int = 60
    """texts per question; 0: the likelihood form alone"""
    likelihood: bool = True
    """ask the likelihood form too; it has the base form's prompt"""
    temperature: float = 0.7
    top_p: float = 0.7
    top_k: int = 50
    """sampled as the paper's base models were"""
    max_new_tokens: int = 64
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.trials < 0 or self.drawn < 0 or self.batch_size < 1 or self.max_new_tokens < 1:
            problems.append("trials and drawn must not be negative, the sizes at least 1")
        if not self.trials and not self.likelihood:
            problems.append("trials = 0 without the likelihood form asks nothing")
        if self.temperature == 0 and self.trials > 1:
            problems.append("temperature = 0 gives one text, however often: set trials = 1")
        try:
            self.sampling  # noqa: B018  (raises for what is out of range)
        except InputError as e:
            problems.append(str(e).removeprefix("generation: "))
        if problems:
            raise InputError("aiw: " + "; ".join(problems))

    @property
    def sampling(self) -> Sampling:
        return Sampling(1.0, self.temperature, self.top_k, self.top_p, self.seed)


# --- prompts and answers -------------------------------------------------------------------------


def prompt_of(problem: Problem, instruction: str | None) -> str:
    """The question as the model reads it: with an instruction behind it, or the base form."""
    if instruction is None:
        return f"### Problem: {problem.question}\n### Answer: "
    return problem.question + instruction


def read_instruction(data_dir: str, form: Form) -> str | None:
    """What the paper puts behind a question; None for the base form, which needs no data.

    Raises InputError where `data_dir` has no prompts.json of the paper, or one of another shape.
    """
    if form == "base":
        return None
    places = [os.path.join(data_dir, name) for name in (PROMPTS_FILE, "prompts.json")]
    path = next((place for place in places if os.path.isfile(place)), None)
    if path is None:
        raise InputError(
            f"aiw: the form {form} needs the paper's prompts; {data_dir} holds no {PROMPTS_FILE}; "
            "name the folder that does (--data), or take the form base"
        )
    number, question = _PROMPT_IDS[form], VARIATIONS["1"].question
    try:
        with open(path, encoding="utf-8") as f:
            prompt = next(entry["prompt"] for entry in json.load(f) if entry["id"] == number)
        if not prompt.startswith(question):
            raise ValueError(f"prompt {number} does not begin with {question!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as e:
        raise InputError(f"{path}: is not the paper's prompts.json: {e!r}") from None
    return prompt[len(question) :]


def parsed_answer(response: str) -> str | None:
    """The number that the paper takes for the answer; None where it takes none.

    The first one behind `answer:`, else the first one behind `has`. Of a base model the response
    is its prompt and what it wrote.
    """
    text = response.replace("\n", " ").lower()
    found = re.search(r"answer:.*?(\d+)", text) or re.search(r"has.*?(\d+)", text)
    return found[1] if found else None


# --- results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """Right answers to one question, or to several."""

    right: int
    trials: int
    unparsed: int
    """texts without an answer, which are not right"""

    def report(self) -> dict[str, Any]:
        """With the interval that a uniform prior gives."""
        lower, upper = beta_interval(self.right, self.trials)
        return {
            "right": self.right,
            "trials": self.trials,
            "unparsed": self.unparsed,
            "rate": self.right / self.trials,
            "lower_95": lower,
            "upper_95": upper,
        }


def run_aiw(
    scorer: ModelScorer, tokenizer: Tokenizer, cfg: AIWConfig, data_dir: str = ""
) -> dict[str, Any]:
    """Ask the questions; collective, and every rank gets the same plain values.

    Where the scorer's ranks hold the model together all of them do all of the work, else they share
    the texts. Raises InputError for what does not fit, before the model is asked anything, RunError
    for logits that are not finite.
    """
    check_aiw(tokenizer, cfg, data_dir, scorer.max_seq_len, scorer.vocab_size)
    instruction, problems = read_instruction(data_dir, cfg.form), _problems(cfg)
    found: dict[str, Any] = {"form": cfg.form, "seed": cfg.seed}
    if cfg.trials:
        rates = _sampled(scorer, tokenizer, problems, instruction, cfg)
        found["sampled"] = _by_variation(rates)
    if cfg.likelihood:
        found["likelihood"] = _likelihood(scorer, tokenizer, problems)
    return found


def check_aiw(
    tokenizer: Tokenizer, cfg: AIWConfig, data_dir: str, max_seq_len: int, vocab_size: int
) -> None:
    """Raises InputError where the prompts cannot be had, or do not fit the model."""
    instruction = read_instruction(data_dir, cfg.form)
    for problem in _problems(cfg).values():
        if cfg.trials:
            ids = tokenizer.encode(prompt_of(problem, instruction)).tolist()
            check_length(ids, cfg.max_new_tokens, max_seq_len, vocab_size)
        if not cfg.likelihood:
            continue
        longest = max(len(choice.tokens) for choice in _choices(tokenizer, problem))
        if longest > max_seq_len:
            raise InputError(
                f"aiw: a question with its answer has {longest} tokens, the model takes "
                f"{max_seq_len}"
            )


def _problems(cfg: AIWConfig) -> dict[str, Problem]:
    """Name -> question: the paper's variations and those that are drawn."""
    drawn = drawn_problems(cfg.drawn, cfg.seed)
    return VARIATIONS | {f"drawn_{i}": problem for i, problem in enumerate(drawn)}


def _by_variation(rates: Mapping[str, Rate]) -> dict[str, Any]:
    paper = {name: rates[name].report() for name in VARIATIONS}
    drawn = [rate for name, rate in rates.items() if name not in VARIATIONS]
    values = [report["rate"] for report in paper.values()]
    report: dict[str, Any] = {
        "variations": paper,
        "rate": math.fsum(values) / len(values),
        "lowest": min(values),
        "highest": max(values),
    }
    if drawn:
        report["drawn"] = _sum(drawn).report()
    return report


def _sum(rates: Iterable[Rate]) -> Rate:
    every = list(rates)
    return Rate(
        sum(rate.right for rate in every),
        sum(rate.trials for rate in every),
        sum(rate.unparsed for rate in every),
    )


# --- sampled -------------------------------------------------------------------------------------


def _sampled(
    scorer: ModelScorer,
    tokenizer: Tokenizer,
    problems: Mapping[str, Problem],
    instruction: str | None,
    cfg: AIWConfig,
) -> dict[str, Rate]:
    prompts = {name: prompt_of(problem, instruction) for name, problem in problems.items()}
    ids = {name: tokenizer.encode(prompt).tolist() for name, prompt in prompts.items()}
    work = [(name, trial) for name in ids for trial in range(cfg.trials)]
    work.sort(key=lambda item: len(ids[item[0]]))  # like lengths together
    batches = [work[i : i + cfg.batch_size] for i in range(0, len(work), cfg.batch_size)]
    mine = batches if scorer.lockstep else batches[dist.rank() :: dist.world_size()]
    answers: list[tuple[str, str | None]] = []
    for batch in mine:
        seeds = [text_seed(cfg.seed, problems[name], trial) for name, trial in batch]
        texts = _texts(scorer, tokenizer, [ids[name] for name, _ in batch], seeds, cfg)
        for (name, _), text in zip(batch, texts, strict=True):
            answers.append(
                (name, parsed_answer(prompts[name] + text if instruction is None else text))
            )
    if not scorer.lockstep:
        answers = [answer for part in dist.all_gather(answers) for answer in part]
    rates = {}
    for name, problem in problems.items():
        given = [answer for other, answer in answers if other == name]
        right = given.count(str(problem.answer))
        rates[name] = Rate(right, len(given), given.count(None))
    return rates


def text_seed(seed: int, problem: Problem, trial: int) -> int:
    """The seed of one text: of its question and number alone, whatever else is asked.

    A hash, so that neither two texts of a run nor those of two seeds are drawn alike.
    """
    told = json.dumps([seed, problem.question, trial]).encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:8]) >> 1  # 63 bits, as Sampling's


def _texts(
    scorer: ModelScorer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    cfg: AIWConfig,
) -> list[str]:
    written: list[list[int]] = [[] for _ in prompts]

    def has_answered(row: int, token: int) -> bool:
        """A base model goes on with anything; behind its first whole number nothing counts."""
        written[row].append(token)
        return re.search(r"\d\D", tokenizer.decode(written[row])) is not None

    new = generate(
        scorer.model,
        prompts,
        max_new_tokens=cfg.max_new_tokens,
        sampling=cfg.sampling,
        eot_id=tokenizer.eot_id,
        seeds=seeds,
        stop=has_answered if cfg.form == "base" else None,
        dtype=scorer.dtype,
        shared=scorer.lockstep,
    )
    return [tokenizer.decode(tokens) for tokens in new]


# --- likelihood ----------------------------------------------------------------------------------


def _choices(tokenizer: Tokenizer, problem: Problem) -> list[Choice]:
    context = tokenizer.encode(prompt_of(problem, None).rstrip()).tolist()
    answers = [tokenizer.encode(f" {digit}").tolist() for digit in range(1, 10)]
    return [Choice(context + answer, len(context)) for answer in answers]


def _likelihood(
    scorer: Scorer, tokenizer: Tokenizer, problems: Mapping[str, Problem]
) -> dict[str, Any]:
    """Of the digits 1 to 9, which is the likeliest behind `### Answer:`? And M + 1 or M?

    The space belongs to the digit, as everywhere in evaluation. Equal likelihoods are ties, which
    are counted, and not right.
    """
    questions = [_choices(tokenizer, problem) for problem in problems.values()]
    scores = score_all(scorer, questions, BatchLimits())
    rows = {}
    for (name, problem), found in zip(problems.items(), scores, strict=True):
        logliks = [score.loglik for score in found]
        if not all(map(math.isfinite, logliks)):
            raise RunError(f"aiw: the model's logits are not finite for {problem.question!r}")
        right, copied = logliks[problem.answer - 1], logliks[problem.sisters - 1]
        others = max(x for digit, x in enumerate(logliks, 1) if digit != problem.answer)
        rows[name] = {
            "answer": 1 + max(range(9), key=logliks.__getitem__),
            "right": right > others + _EQUAL_NATS,
            "over_m": right > copied + _EQUAL_NATS,
            "margin_over_m": right - copied,
            "tie": abs(right - others) <= _EQUAL_NATS,
        }
    report: dict[str, Any] = {
        "variations": {name: rows[name] for name in VARIATIONS},
        "ties": sum(row["tie"] for row in rows.values()),
    }
    for what in ("right", "over_m"):
        n_right = sum(row[what] for row in rows.values())
        report[what] = Rate(n_right, len(rows), 0).report()
        del report[what]["unparsed"]
    return report
