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

from openlm_lite import dist
from openlm_lite.eval.scorer import Choice, ChoiceScore, Question, Tokens, shared_prefix
from openlm_lite.model.attention import Branches, KVCache
from openlm_lite.model.transformer import Transformer

_DECODE_EVERY = 8  # steps of generation between two looks at the text


# --- our model -----------------------------------------------------------------------------------


class ModelScorer:
    """Our Transformer, on the device that its weights are on.

    `dtype` is what it computes in: the weights' own, unless FSDP casts them.
    """

    backend = "openlm"

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
        cache, cached_BS = self._prefill(
            [question[0].tokens[:n] for question, n in zip(questions, prefixes, strict=True)],
            max(
                sum(len(choice.tokens) - n for choice in question)
                for question, n in zip(questions, prefixes, strict=True)
            ),
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
        tokens_BT = _padded(rows, 0, device)
        branching = Branches(
            _padded(branches, -1, device), _padded(positions, 0, device), cached_BS
        )
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
        tokens_BT = _padded([choice.tokens[:-1] for choice in choices], 0, device)
        logits_nV = self.model(tokens_BT, logits_at=_before_answers(choices, tokens_BT))
        return _scores(logits_nV, choices)

    def _prefill(self, prefixes: Sequence[Tokens], room: int) -> tuple[KVCache, Tensor]:
        """(a cache with the tokens of every row and `room` behind them, their positions)."""
        weight = self._weight
        tokens_BS = _padded(prefixes, 0, weight.device)
        B, S = tokens_BS.shape
        cache = KVCache(self.model.cfg, B, S + room, weight.device, self.dtype)
        if S:
            nothing = torch.empty(0, dtype=torch.long, device=weight.device)
            self.model(tokens_BS, cache=cache, logits_at=nothing)
        lengths_B = torch.tensor([len(prefix) for prefix in prefixes], device=weight.device)
        positions_S = torch.arange(S, device=weight.device)
        return cache, torch.where(positions_S < lengths_B[:, None], positions_S, -1)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        eot_id: int,
        is_done: Callable[[list[int]], bool],
    ) -> list[list[int] | None]:
        """See `Scorer`."""
        self.model.eval()
        cache, cached_BS = self._prefill([prompt[:-1] for prompt in prompts], max_new_tokens)
        device, B = self._weight.device, len(prompts)
        tokens_B = torch.tensor([prompt[-1] for prompt in prompts], device=device)
        positions_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        branch_BT = torch.zeros(B, 1, dtype=torch.long, device=device)
        every_row = torch.arange(B, device=device)
        new: list[list[int]] = [[] for _ in prompts]
        lost: set[int] = set()
        running = set(range(B))
        for step in range(max_new_tokens):
            logits_BV = self.model(
                tokens_B[:, None],
                cache=cache,
                branches=Branches(branch_BT, positions_B[:, None], cached_BS),
                logits_at=every_row,
            )
            lost |= set((~_tells_apart(logits_BV)).nonzero()[:, 0].tolist()) & running
            running -= lost
            cached_BS = torch.cat((cached_BS, positions_B[:, None]), dim=1)
            positions_B = positions_B + 1
            tokens_B = logits_BV.argmax(-1)
            for row, token in enumerate(tokens_B.tolist()):
                if row not in running:
                    continue
                if token == eot_id:
                    running.discard(row)
                else:
                    new[row].append(token)
            if step % _DECODE_EVERY == _DECODE_EVERY - 1:
                running = {row for row in running if not is_done(new[row])}
            if not self._any_running(bool(running)):
                break
        return [None if row in lost else tokens for row, tokens in enumerate(new)]

    def _any_running(self, running: bool) -> bool:
        """On any rank, where the ranks hold the model together."""
        return any(dist.all_gather(running)) if self.lockstep else running


# --- transformers' model -------------------------------------------------------------------------


class HFScorer:
    """A model of transformers' own class, whole sequences at a time."""

    backend = "transformers"
    lockstep = False

    def __init__(self, model: Any) -> None:
        self.model = model
        # models with ALiBi (BLOOM) state no length: the suite's own limit holds then
        self.max_seq_len = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self.vocab_size = model.config.vocab_size

    @torch.no_grad()
    def score(self, questions: Sequence[Question]) -> list[list[ChoiceScore]]:
        """See `Scorer`."""
        choices = [choice for question in questions for choice in question]
        device = self.model.device
        tokens_BT = _padded([choice.tokens[:-1] for choice in choices], 0, device)
        logits_BTV = self.model(tokens_BT, use_cache=False).logits
        logits_nV = logits_BTV.flatten(0, 1)[_before_answers(choices, tokens_BT)].float()
        scores = iter(_scores(logits_nV, choices))
        return [[next(scores) for _ in question] for question in questions]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        eot_id: int,
        is_done: Callable[[list[int]], bool],
    ) -> list[list[int] | None]:
        """See `Scorer`; padded on the left, greedy, to the end of text."""
        device = self.model.device
        longest = max(map(len, prompts))
        rows = [[eot_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        prompt_BT, seen_BT = torch.tensor(rows, device=device), torch.tensor(seen, device=device)
        out = self.model.generate(
            prompt_BT,
            attention_mask=seen_BT,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=eot_id,
            pad_token_id=eot_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        fine_B = torch.stack([_tells_apart(logits_BV) for logits_BV in out.logits]).all(dim=0)
        new = [_until(row[longest:], eot_id) for row in out.sequences.tolist()]
        return [tokens if fine else None for tokens, fine in zip(new, fine_B.tolist(), strict=True)]


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


def _tells_apart(logits_BV: Tensor) -> Tensor:
    """Whether the logits [B] are finite and not all the same."""
    return logits_BV.isfinite().all(dim=-1) & (logits_BV.amax(dim=-1) > logits_BV.amin(dim=-1))


def _padded(rows: Sequence[Tokens], fill: int, device: torch.device) -> Tensor:
    """[rows, longest], filled up on the right."""
    full = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for into, row in zip(full, rows, strict=True):
        into[: len(row)] = row
    return torch.from_numpy(full).to(device)


def _until(tokens: list[int], eot_id: int) -> list[int]:
    return tokens[: tokens.index(eot_id)] if eot_id in tokens else tokens
