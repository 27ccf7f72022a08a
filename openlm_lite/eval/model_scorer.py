"""The two scorers: our Transformer, and a class of transformers.

What the choices of a question begin with alike is computed once: its keys and values are cached,
and the rest of every choice is read behind it, side by side in one row (`Branches`). Logits are
computed where an answer is predicted and nowhere else::

    question 1   [ shots and question ]  cached      ->  [ answer a | answer b | answer c ]
    question 2   [ shots and question - - ]          ->  [ answer a | answer b - - - - - - ]

Under `no_grad` and not `inference_mode`: FSDP keeps buffers, and training goes on with them.

Shapes: B batch (questions, or sequences), T position, S cached positions, V vocabulary, n tokens
of answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openlm_lite.eval.generate import (
    Sampling,
    Step,
    cached_steps,
    hf_steps,
    padded,
    prefill,
    stream_ids,
)
from openlm_lite.eval.scorer import Choice, ChoiceScore, Question, Tokens, shared_prefix
from openlm_lite.hf.compare import max_positions
from openlm_lite.model.attention import Branches
from openlm_lite.model.transformer import Transformer

_DECODE_EVERY = 8  # steps of generation between two looks at the text


# --- our model -----------------------------------------------------------------------------------


class ModelScorer:
    """Our Transformer, on the device that its weights are on.

    `dtype` is what it computes in: the weights' own, unless FSDP casts them.
    """

    backend = "openlm"
    shares_prefixes = True

    def __init__(
        self, model: Transformer, *, dtype: torch.dtype | None = None, lockstep: bool = False
    ) -> None:
        self.model, self.lockstep = model, lockstep
        self.dtype = dtype or model.embedding.weight.dtype
        self.max_seq_len, self.vocab_size = model.cfg.max_seq_len, model.cfg.vocab_size

    @property
    def _weight(self) -> Tensor:
        return self.model.embedding.weight

    @torch.no_grad()
    def score(self, questions: Sequence[Question]) -> list[list[ChoiceScore]]:
        """See `Scorer`."""
        self.model.eval()
        prefixes = [shared_prefix(question) for question in questions]
        if not any(prefixes):
            flat = [choice for question in questions for choice in question]
            scores = iter(self._score_rows(flat))
            return [[next(scores) for _ in question] for question in questions]
        cache, cached_BS = prefill(
            self.model,
            [question[0].tokens[:n] for question, n in zip(questions, prefixes, strict=True)],
            max(
                sum(len(choice.tokens) - n for choice in question)
                for question, n in zip(questions, prefixes, strict=True)
            ),
            self.dtype,
        )
        rows, branches, positions, wanted = [], [], [], []
        for question, n in zip(questions, prefixes, strict=True):
            lengths = [len(choice.tokens) - n for choice in question]
            ends = np.cumsum(lengths)
            for choice, end in zip(question, ends, strict=True):
                wanted.append((len(rows), int(end) - len(choice.tokens), choice))
            rows.append(np.concatenate([choice.tokens[n:] for choice in question]))
            branches.append(np.repeat(np.arange(len(question)), lengths))
            positions.append(np.concatenate([np.arange(n, n + length) for length in lengths]))
        device = self._weight.device
        tokens_BT = padded(rows, 0, device)
        branching = Branches(padded(branches, -1, device), padded(positions, 0, device), cached_BS)
        T = tokens_BT.shape[1]
        at = [
            row * T + offset + i - 1
            for row, offset, choice in wanted
            for i in range(choice.start, len(choice.tokens))
        ]
        logits_nV = self.model(
            tokens_BT,
            cache=cache,
            branches=branching,
            logits_at=torch.tensor(at, device=device),
        )
        scores = iter(_scores(logits_nV, [choice for _, _, choice in wanted]))
        return [[next(scores) for _ in question] for question in questions]

    def _score_rows(self, choices: Sequence[Choice]) -> list[ChoiceScore]:
        """One row per sequence; what is behind its end does not matter to a causal model."""
        device = self._weight.device
        # the last token predicts nothing
        tokens_BT = padded([choice.tokens[:-1] for choice in choices], 0, device)
        logits_nV = self.model(tokens_BT, logits_at=_before_answers(choices, tokens_BT))
        return _scores(logits_nV, choices)

    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        eot_id: int,
        is_done: Callable[[list[int]], bool],
    ) -> list[list[int] | None]:
        """See `Scorer`."""
        self.model.eval()
        step = cached_steps(self.model, max_new_tokens, dtype=self.dtype)
        return _likeliest(step, prompts, max_new_tokens, eot_id, is_done, self.lockstep)


# --- transformers' model -------------------------------------------------------------------------


class HFScorer:
    """A model of transformers' own class, whole sequences at a time."""

    backend = "transformers"
    lockstep = False
    shares_prefixes = False

    def __init__(self, model: Any) -> None:
        self.model = model
        # where the class states no limit, the suite's own holds
        self.max_seq_len = max_positions(model.config)
        self.vocab_size = model.config.vocab_size

    @torch.no_grad()
    def score(self, questions: Sequence[Question]) -> list[list[ChoiceScore]]:
        """See `Scorer`."""
        choices = [choice for question in questions for choice in question]
        device = self.model.device
        tokens_BT = padded([choice.tokens[:-1] for choice in choices], 0, device)
        logits_BTV = self.model(tokens_BT, use_cache=False).logits
        logits_nV = logits_BTV.flatten(0, 1)[_before_answers(choices, tokens_BT)].float()
        scores = iter(_scores(logits_nV, choices))
        return [[next(scores) for _ in question] for question in questions]

    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        eot_id: int,
        is_done: Callable[[list[int]], bool],
    ) -> list[list[int] | None]:
        """See `Scorer`."""
        return _likeliest(hf_steps(self.model), prompts, max_new_tokens, eot_id, is_done, False)


# --- both ----------------------------------------------------------------------------------------


def _before_answers(choices: Sequence[Choice], tokens_BT: Tensor) -> Tensor:
    """Where the tokens of the answers are predicted, one choice per row; of B * T positions."""
    T = tokens_BT.shape[1]
    at = [
        row * T + i - 1
        for row, choice in enumerate(choices)
        for i in range(choice.start, len(choice.tokens))
    ]
    return torch.tensor(at, device=tokens_BT.device)


def _scores(logits_nV: Tensor, choices: Sequence[Choice]) -> list[ChoiceScore]:
    """The scores of `choices`; the logits of their answers' tokens stand one after another."""
    counts = [len(choice.tokens) - choice.start for choice in choices]
    answers = [np.asarray(choice.tokens[choice.start :], dtype=np.int64) for choice in choices]
    targets_n = torch.from_numpy(np.concatenate(answers)).to(logits_nV.device)
    best = logits_nV.max(dim=-1)
    among_best_n = logits_nV.gather(1, targets_n[:, None])[:, 0] == best.values
    logp_n = -F.cross_entropy(logits_nV, targets_n, reduction="none")
    several_n = (logits_nV == best.values[:, None]).sum(dim=-1) > 1
    per_token = (logp_n, best.indices == targets_n, among_best_n, several_n)
    per_choice = zip(*(t.cpu().split(counts) for t in per_token), strict=True)
    return [
        ChoiceScore(
            loglik=logp.double().sum().item(),
            n_tokens=len(logp),
            greedy=bool(greedy.all()),
            tied=bool(among_best.all() and several.any()),
        )
        for logp, greedy, among_best, several in per_choice
    ]


def _likeliest(
    step: Step,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    eot_id: int,
    is_done: Callable[[list[int]], bool],
    lockstep: bool,
) -> list[list[int] | None]:
    """`Scorer.generate`."""
    new: list[list[int]] = [[] for _ in prompts]
    lost: set[int] = set()
    for row, token in stream_ids(
        step,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(),
        eot_id=eot_id,
        stop=lambda row, _: len(new[row]) % _DECODE_EVERY == 0 and is_done(new[row]),
        lost=lost,
        lockstep=lockstep,
    ):
        new[row].append(token)
    return [None if row in lost else tokens for row, tokens in enumerate(new)]
