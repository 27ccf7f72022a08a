"""Token ids from a trained model, a batch of prompts at a time; text.py makes text of them.

    prompts' ids --> step --> logits of the next tokens --> pick --> ids --> step --> …
                      |                                      |
        our Transformer or transformers' class     one sampler for both

Shapes: B batch, T position, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from openlm_lite.errors import InputError, RunError
from openlm_lite.model.attention import KVCache
from openlm_lite.model.transformer import Transformer

Step = Callable[[Tensor], Tensor]
"""Takes the next tokens [B, T] of the sequences, remembers them, gives the logits [B, V] behind."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The filters act in this order, as in transformers."""

    repetition_penalty: float = 1.0
    """above 1: seen tokens get less likely (CTRL, arXiv:1909.05858, section 4.1)"""
    temperature: float = 0.0
    """logits are divided by it; 0: always the most likely token, the filters below play no part"""
    top_k: int = 0
    """only the k most likely tokens; 0: all"""
    top_p: float = 1.0
    """only the fewest tokens that hold this probability together (arXiv:1904.09751)"""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not self.repetition_penalty > 0:
            problems.append(f"repetition_penalty = {self.repetition_penalty}, must be above 0")
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature = {self.temperature}, must be 0 or a positive number")
        if self.top_k < 0:
            problems.append(f"top_k = {self.top_k}, must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p = {self.top_p}, must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed = {self.seed}, must be from 0 to 2**63 - 1")
        if problems:
            raise InputError("generation: " + "; ".join(problems))


# --- choosing a token ----------------------------------------------------------------------------


def filtered_logits(logits_V: Tensor, seen: Iterable[int], sampling: Sampling) -> Tensor:
    """The logits to draw from, excluded tokens at -inf; fp32."""
    logits_V = logits_V.float().clone()
    if sampling.repetition_penalty != 1.0:
        seen_ids = torch.tensor(sorted(set(seen)), dtype=torch.long, device=logits_V.device)
        scores = logits_V[seen_ids]
        penalty = sampling.repetition_penalty
        logits_V[seen_ids] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if sampling.temperature == 0:
        return logits_V
    logits_V /= sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        least = logits_V.topk(sampling.top_k).values[-1]
        logits_V[logits_V < least] = -torch.inf
    if sampling.top_p < 1:
        ordered, order = logits_V.sort(descending=True, stable=True)
        probabilities = ordered.softmax(0)
        before = probabilities.cumsum(0) - probabilities  # probability of all that rank higher
        before[0] = 0.0  # the most likely one always stays
        logits_V[order[before >= sampling.top_p]] = -torch.inf
    return logits_V


def _pick(logits_V: Tensor, seen: list[int], sampling: Sampling, generator: Any) -> int:
    if not bool(logits_V.isfinite().all()):
        raise RunError(
            f"the model's logits behind token {len(seen)} are not finite: its weights are damaged, "
            "or its training diverged; look at its loss with `openlm plot`"
        )
    logits_V = filtered_logits(logits_V, seen, sampling)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # drawn on the CPU, so that a seed gives the same text on every device
    return int(torch.multinomial(logits_V.softmax(0).cpu(), 1, generator=generator))


# --- generating ids ------------------------------------------------------------------------------


def cached_steps(
    model: Transformer,
    batch_size: int,
    max_len: int,
    *,
    dtype: torch.dtype | None = None,
    shared: bool = False,
) -> Step:
    """Steps of our model for `batch_size` sequences of up to `max_len` tokens, with a KV cache.

    dtype: of keys and values, where FSDP computes in another one than the weights have. shared: all
    ranks do the same steps, on a model that they hold together; rank 0's logits are everybody's, so
    that no rounding lets one draw another token.
    """
    weight = model.embedding.weight
    cache = KVCache(model.cfg, batch_size, max_len, weight.device, dtype or weight.dtype)

    def step(tokens_BT: Tensor) -> Tensor:
        B, T = tokens_BT.shape
        last = torch.arange(T - 1, B * T, T, device=weight.device)
        logits_BV = model(tokens_BT.to(weight.device), cache=cache, logits_at=last)
        assert isinstance(logits_BV, Tensor)
        if shared:
            torch.distributed.broadcast(logits_BV, 0)
        return logits_BV

    return step


def stream_ids(
    step: Step,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eot_id: int | None,
    seeds: Sequence[int] | None = None,
    stop: Callable[[int, int], bool] = lambda row, token: False,
) -> Iterator[tuple[int, int]]:
    """(row, its next new token), until every row has ended.

    A row ends before `eot_id`, after `max_new_tokens`, or behind a token for which
    `stop(row, token)` holds. `seeds`: one per row (default: sampling.seed for all).

    Prompts of unequal length need no padding: all rows begin together with as many tokens as the
    shortest prompt has, and a row that has more takes these in place of drawn ones::

        A A A + + + +      A, B, C: the prompts; +: new tokens
        B B B B B + +      one column per step, but the first three are one
        C C C C + + +
    """
    width = min(map(len, prompts))
    rows = [list(prompt) for prompt in prompts]
    ends = [len(prompt) + max_new_tokens for prompt in prompts]
    own = [sampling.seed] * len(rows) if seeds is None else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in own]
    alive = set(range(len(rows)))
    fresh_BT = torch.tensor([row[:width] for row in rows], dtype=torch.long)
    while True:
        with torch.no_grad():  # not around the yield; not inference_mode: FSDP keeps tensors
            logits_BV = step(fresh_BT)
        for i, prompt in enumerate(prompts):
            if len(prompt) > width or i not in alive:
                continue
            with torch.no_grad():
                token = _pick(logits_BV[i], rows[i], sampling, generators[i])
            if token == eot_id:
                alive.remove(i)
                continue
            rows[i].append(token)
            yield i, token
            if stop(i, token) or len(rows[i]) == ends[i]:
                alive.remove(i)
        if not alive:
            return
        # what has ended goes on with any token: nobody looks at it, and no row sees another
        fresh_BT = torch.tensor([[row[width] if len(row) > width else row[-1]] for row in rows])
        width += 1


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eot_id: int | None = None,
    stop: Callable[[int, int], bool] = lambda row, token: False,
) -> list[list[int]]:
    """The continuation of each of `prompts`, without it and without the end of text; one batch.

    `stop`: see `stream_ids`. Row i is drawn with the seed sampling.seed + i. Raises InputError if
    a prompt is empty, has ids that the model lacks, or does not fit max_seq_len together with
    `max_new_tokens`.
    """
    sampling = sampling or Sampling()
    for prompt in prompts:
        check_length(prompt, max_new_tokens, model.cfg.max_seq_len, model.cfg.vocab_size)
    model.eval()
    new: list[list[int]] = [[] for _ in prompts]
    step = cached_steps(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    for row, token in stream_ids(
        step,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eot_id=eot_id,
        seeds=[sampling.seed + i for i in range(len(prompts))],
        stop=stop,
    ):
        new[row].append(token)
    return new


def check_length(
    prompt: Sequence[int], max_new_tokens: int, max_seq_len: int, vocab_size: int
) -> None:
    """Raises InputError for a prompt and a length that the model cannot hold."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if not prompt:
        raise InputError("the prompt has no tokens; begin with the end-of-text token")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise InputError(
            f"the prompt has ids from {min(prompt)} to {max(prompt)}, the model knows 0 to "
            f"{vocab_size - 1}: it was trained with another tokenizer"
        )
    if len(prompt) >= max_seq_len:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, the model takes max_seq_len = {max_seq_len} "
            f"together with what it adds; give at most {max_seq_len - 1}"
        )
    if len(prompt) + max_new_tokens > max_seq_len:
        raise InputError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens = {max_new_tokens} are more than "
            f"max_seq_len = {max_seq_len}; ask for at most {max_seq_len - len(prompt)} new tokens"
        )
