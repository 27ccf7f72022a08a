"""A model as evaluation sees it, and how its work is cut into batches.

    Question = one Choice per possible answer = tokens, and where its answer starts
    Scorer   = what gives the log-likelihoods of answers, and greedy text

`model_scorer.py` has the two that exist: our Transformer, and a class of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from openlm_lite.errors import InputError

_MAX_LOGITS = 1 << 28  # numbers of a batch's logits: 1 GiB in fp32


Tokens = Sequence[int] | np.ndarray


class Choice(NamedTuple):
    """One sequence; the tokens from `start` (at least 1) on are scored."""

    tokens: Tokens
    start: int


Question = Sequence[Choice]


class ChoiceScore(NamedTuple):
    """What the model says of the scored tokens of one choice."""

    loglik: float
    """sum of log p over them, nats; not finite where the logits are not"""
    n_tokens: int
    greedy: bool
    """whether each of them is the most likely one"""
    tied: bool
    """whether they are the most likely ones together with others: of constant logits all are"""


@dataclass(frozen=True)
class BatchLimits:
    """What one forward pass may hold; a question is never split."""

    sequences: int = 32
    """choices, all questions together"""
    tokens: int = 16_384
    """with padding"""

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.tokens < 1:
            raise InputError("a batch must hold at least 1 sequence and 1 token")


class Scorer(Protocol):
    """A model that can be evaluated: ours (`ModelScorer`) or transformers' (`HFScorer`)."""

    max_seq_len: int
    vocab_size: int
    backend: str
    lockstep: bool
    """whether all ranks have to call it equally often, because they hold it together (FSDP)"""
    shares_prefixes: bool
    """whether what the choices of a question begin with alike is computed once, and logits at the
    answers alone; else every choice is a row, with logits at all of its positions"""

    def score(self, questions: Sequence[Question]) -> list[list[ChoiceScore]]:
        """The scores of one batch, in its order."""
        ...

    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        eot_id: int,
        is_done: Callable[[list[int]], bool],
    ) -> list[list[int] | None]:
        """The likeliest continuation of every prompt, without the end of text.

        None where the logits are not finite, or constant. `is_done` looks at the new tokens of
        one prompt now and then, so that some may follow what it waits for.
        """
        ...


# --- batches -------------------------------------------------------------------------------------


def shared_prefix(question: Question) -> int:
    """How many first tokens all choices share and none scores: 0 for a single choice.

    One less than the tokens before the answer, because the last of these predicts the answer.
    """
    if len(question) == 1:
        return 0
    most = min(choice.start for choice in question) - 1
    first = np.asarray(question[0].tokens[:most])
    for choice in question[1:]:
        unlike = np.flatnonzero(first != np.asarray(choice.tokens[: len(first)]))
        first = first[: unlike[0]] if len(unlike) else first
    return len(first)


class _Size(NamedTuple):
    """What a question takes in a batch."""

    prefix: int
    """tokens that are cached; 0: every choice is a row of its own"""
    width: int
    """of its row or rows, behind the prefix"""
    rows: int
    sequences: int
    scored: int
    """positions whose logits are computed"""
    index: int


def _size(question: Question, index: int, shares_prefixes: bool) -> _Size:
    n = len(question)
    if not shares_prefixes:
        width = max(len(choice.tokens) for choice in question)
        return _Size(0, width, n, n, n * width, index)
    prefix = shared_prefix(question)
    lengths = [len(choice.tokens) - prefix for choice in question]
    scored = sum(len(choice.tokens) - choice.start for choice in question)
    if prefix:
        return _Size(prefix, sum(lengths), 1, n, scored, index)
    return _Size(0, max(lengths), n, n, scored, index)


class Batch(NamedTuple):
    """Questions for one call of a scorer."""

    indices: list[int]
    cached: bool
    """whether they have prefixes to cache, which takes one forward pass more"""


def plan_batches(
    questions: Sequence[Question],
    limits: BatchLimits,
    vocab_size: int,
    shares_prefixes: bool = True,
) -> list[Batch]:
    """Indices of `questions`, batch by batch: the longest first, alike ones together.

    shares_prefixes: see `Scorer`. Batches with cached prefixes (they come first) and those without
    are not mixed; a question that is over the limits makes a batch by itself.
    """
    sizes = [_size(question, i, shares_prefixes) for i, question in enumerate(questions)]
    return _plan(sizes, limits, vocab_size)


def plan_prompts(lengths: Sequence[int], max_new_tokens: int, limits: BatchLimits) -> list[Batch]:
    """The same for prompts of these lengths, behind which text is generated."""
    sizes = [_Size(n, max_new_tokens, 1, 1, 0, i) for i, n in enumerate(lengths)]
    return _plan(sizes, limits, 1)


def _plan(sizes: Sequence[_Size], limits: BatchLimits, vocab_size: int) -> list[Batch]:
    batches = []
    for cached in (True, False):
        of_kind = [size for size in sizes if (size.prefix > 0) is cached]
        of_kind.sort(key=lambda size: (-size.prefix - size.width, size.index))
        batch: list[_Size] = []
        for size in of_kind:
            if batch and not _fits([*batch, size], limits, vocab_size):
                batches.append(Batch([other.index for other in batch], cached))
                batch = []
            batch.append(size)
        if batch:
            batches.append(Batch([other.index for other in batch], cached))
    return batches


def _fits(batch: list[_Size], limits: BatchLimits, vocab_size: int) -> bool:
    width = max(size.prefix for size in batch) + max(size.width for size in batch)
    return (
        sum(size.sequences for size in batch) <= limits.sequences
        and sum(size.rows for size in batch) * width <= limits.tokens
        and sum(size.scored for size in batch) * vocab_size <= _MAX_LOGITS
    )


def score_all(
    scorer: Scorer, questions: Sequence[Question], limits: BatchLimits | None = None
) -> list[list[ChoiceScore]]:
    """The scores of any number of questions, in their order, on this rank alone."""
    scores: list[list[ChoiceScore]] = [[] for _ in questions]
    limits = limits or BatchLimits()
    for indices, _ in plan_batches(questions, limits, scorer.vocab_size, scorer.shares_prefixes):
        for i, found in zip(indices, scorer.score([questions[i] for i in indices]), strict=True):
            scores[i] = found
    return scores
