"""From what a model said to right or wrong, as llm-foundry decides it.

    multiple_choice, schema     the choice with the lowest perplexity per token; of equal ones the
                                first
    language_modeling           every token of the answer is the most likely one
    generation                  the text, cut and normalised, begins with a right answer

Source: llm-foundry 8c8dd48, llmfoundry/eval/metrics/nlp.py.
"""

from __future__ import annotations

import functools
import math
import re
import string
from collections.abc import Sequence

import numpy as np

from openlm_lite.eval.scorer import ChoiceScore
from openlm_lite.eval.tasks import Task

_PUNCTUATION = set(string.punctuation) | set("‘’´`")
_EQUAL_NATS = 1e-6  # two means over tokens that are closer say nothing: it is fp32's own noise


def perplexity(score: ChoiceScore) -> float:
    """exp of the mean cross entropy per token, rounded to fp32 as there."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.float32(-score.loglik / score.n_tokens)))


def chosen(scores: Sequence[ChoiceScore]) -> int:
    """The index of the choice with the lowest perplexity, the first of equal ones."""
    perplexities = [perplexity(score) for score in scores]
    return perplexities.index(min(perplexities))


def is_tie(scores: Sequence[ChoiceScore], answers: Sequence[Sequence[int]]) -> bool:
    """Whether the model does not tell the best choice from another one, with other tokens.

    `answers`: what the model read, per choice. Equal choices, which some data have, are no tie.
    """
    means = [score.loglik / score.n_tokens for score in scores]
    best = max(range(len(means)), key=means.__getitem__)
    return any(
        means[best] - mean <= _EQUAL_NATS and tuple(answer) != tuple(answers[best])
        for mean, answer in zip(means, answers, strict=True)
    )


def is_finite(scores: Sequence[ChoiceScore]) -> bool:
    """Whether the model gave every token a probability."""
    return all(math.isfinite(score.loglik) for score in scores)


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (TriviaQA's rules)."""
    text = text.replace("_", " ").lower()
    text = "".join(" " if ch in _PUNCTUATION else ch for ch in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def final_answer(
    text: str, stop: Sequence[str], cot_delimiter: str, *, normalize: bool = True
) -> str:
    """What of a generated text is compared: up to a stop string, behind the last delimiter."""
    if stop:
        text = re.split("|".join(stop), text)[0]
    if cot_delimiter:
        text = text.split(cot_delimiter)[-1]
    return normalized(text) if normalize else text.strip()


def begins_right(
    text: str,
    aliases: Sequence[str],
    stop: Sequence[str] = (),
    cot_delimiter: str = "",
    *,
    normalize: bool = True,
) -> bool:
    """Whether the answer begins with one of `aliases` ("180" does with "18")."""
    answer = final_answer(text, stop, cot_delimiter, normalize=normalize)
    known = (
        {normalized(alias) for alias in aliases}
        if normalize
        else {alias.strip() for alias in aliases}
    )
    return any(answer.startswith(alias) for alias in known)


def has_stopped(text: str, task: Task) -> bool:
    """Whether what follows `text` cannot change its answer any more."""
    return bool(task.stop) and _stop_pattern(task.stop).search(text) is not None


@functools.cache
def _stop_pattern(stop: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(stop))
