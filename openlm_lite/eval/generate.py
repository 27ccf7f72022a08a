"""Token ids from a trained model, a batch of prompts at a time; text.py makes text of them.

    prompts' ids --> step --> logits of the next tokens --> pick --> ids --> step --> …
                      |                                      |
        our Transformer or transformers' class     one sampler for both

Everything that generates comes through here: `openlm generate`, samples along a run, AIW, lm-eval
and DCLM's generation tasks.

Shapes: B batch, T position, S cached positions, V vocab.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from openlm_lite import dist
from openlm_lite.errors import InputError, RunError
from openlm_lite.eval.scorer import Tokens
from openlm_lite.model.attention import Branches, KVCache
from openlm_lite.model.transformer import Transformer

Step = Callable[[Sequence[Tokens]], Tensor]
"""Takes what every sequence goes on with (first its prompt, then one token), and remembers it; the
logits [B, V] behind."""


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


def _picked(
    logits_BV: Tensor,
    alive: set[int],
    rows: Sequence[list[int]],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    lost: set[int] | None,
) -> dict[int, int]:
    """The next token of each row in `alive`; see `stream_ids`."""
    is_fine_B = logits_BV.isfinite().all(dim=-1)
    if lost is not None:
        is_fine_B &= logits_BV.amax(dim=-1) > logits_BV.amin(dim=-1)
    odd = alive - set(is_fine_B.nonzero()[:, 0].tolist())
    if odd and lost is None:
        raise RunError(
            f"the model's logits behind token {len(rows[min(odd)])} are not finite: its weights "
            "are damaged, or its training diverged; look at its loss with `openlm plot`"
        )
    if lost is not None:
        lost |= odd
    left = sorted(alive - odd)
    if sampling.temperature == 0 and sampling.repetition_penalty == 1:
        best = logits_BV.argmax(dim=-1).tolist()
        return {i: best[i] for i in left}
    return {i: _pick(logits_BV[i], rows[i], sampling, generators[i]) for i in left}


def _pick(logits_V: Tensor, seen: list[int], sampling: Sampling, generator: Any) -> int:
    logits_V = filtered_logits(logits_V, seen, sampling)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # drawn on the CPU, so that a seed gives the same text on every device
    return int(torch.multinomial(logits_V.softmax(0).cpu(), 1, generator=generator))


# --- steps of a model ----------------------------------------------------------------------------


def cached_steps(
    model: Transformer, room: int, *, dtype: torch.dtype | None = None, shared: bool = False
) -> Step:
    """Steps of our model, with a KV cache that takes `room` tokens behind the prompts.

    Prompts of unequal length are read in one pass, and each goes on at its own position. dtype: of
    keys and values, where FSDP computes in another one than the weights have. shared: all ranks do
    the same steps, on a model that they hold together; rank 0's logits are everybody's, so that no
    rounding lets one draw another token.
    """
    device = model.embedding.weight.device
    cached: tuple[KVCache, Tensor] | None = None
    positions_B = torch.empty(0)

    def step(rows: Sequence[Tokens]) -> Tensor:
        nonlocal cached, positions_B
        if cached is None:
            prefixes = [row[:-1] for row in rows]  # the last token's logits are wanted
            cached = prefill(model, prefixes, room, dtype)
            positions_B = torch.tensor([len(prefix) for prefix in prefixes], device=device)
        cache, cached_BS = cached
        position_BT = positions_B[:, None]
        logits_BV = model(
            torch.tensor([[int(row[-1])] for row in rows], device=device),
            cache=cache,
            branches=Branches(torch.zeros_like(position_BT), position_BT, cached_BS),
            logits_at=torch.arange(len(rows), device=device),
        )
        assert isinstance(logits_BV, Tensor)
        cached = cache, torch.cat((cached_BS, position_BT), dim=1)
        positions_B = positions_B + 1
        if shared:
            torch.distributed.broadcast(logits_BV, 0)
        return logits_BV

    return step


def prefill(
    model: Transformer, prefixes: Sequence[Tokens], room: int, dtype: torch.dtype | None
) -> tuple[KVCache, Tensor]:
    """(a cache with the tokens of every row and `room` behind them, their positions [B, S]).

    Rows are padded on the right; a padded position is -1 (`Branches`).
    """
    weight = model.embedding.weight
    tokens_BS = padded(prefixes, 0, weight.device)
    B, S = tokens_BS.shape
    cache = KVCache(model.cfg, B, S + room, weight.device, dtype or weight.dtype)
    if S:
        nothing = torch.empty(0, dtype=torch.long, device=weight.device)
        model(tokens_BS, cache=cache, logits_at=nothing)
    lengths_B = torch.tensor([len(prefix) for prefix in prefixes], device=weight.device)
    positions_S = torch.arange(S, device=weight.device)
    return cache, torch.where(positions_S < lengths_B[:, None], positions_S, -1)


def padded(rows: Sequence[Tokens], fill: int, device: torch.device) -> Tensor:
    """[rows, longest], filled up on the right."""
    full = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for into, row in zip(full, rows, strict=True):
        into[: len(row)] = row
    return torch.from_numpy(full).to(device)


def hf_steps(model: Any) -> Step:
    """Steps of a class of transformers, with its own cache. Prompts are padded on the left."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    past: Any = None
    seen_BS = torch.empty(0)

    def step(rows: Sequence[Tokens]) -> Tensor:
        nonlocal past, seen_BS
        longest = max(map(len, rows))
        tokens = [[0] * (longest - len(row)) + [int(i) for i in row] for row in rows]
        is_token = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        new_BT = torch.tensor(is_token, device=model.device)
        seen_BS = new_BT if past is None else torch.cat((seen_BS, new_BT), dim=1)
        how = {"attention_mask": seen_BS, "past_key_values": past, "use_cache": True}
        if takes_positions:
            how["position_ids"] = (seen_BS.cumsum(dim=1) - 1).clamp(min=0)[:, -longest:]
        output = model(torch.tensor(tokens, device=model.device), **how)
        past = output.past_key_values
        return output.logits[:, -1]

    return step


# --- generating ids ------------------------------------------------------------------------------


def stream_ids(
    step: Step,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eot_id: int | None,
    seeds: Sequence[int] | None = None,
    stop: Callable[[int, int], bool] = lambda row, token: False,
    lost: set[int] | None = None,
    lockstep: bool = False,
) -> Iterator[tuple[int, int]]:
    """(row, its next new token), until every row has ended.

    A row ends before `eot_id`, after `max_new_tokens`, or behind a token for which
    `stop(row, token)` holds. `seeds`: one per row (default: sampling.seed for all). `lost`: takes
    the rows whose logits are not finite, or all the same; they end. None: RunError where they are
    not finite. lockstep: go on until the rows of every rank have ended.
    """
    rows = [[int(i) for i in prompt] for prompt in prompts]
    own = [sampling.seed] * len(rows) if seeds is None else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in own]
    alive = set(range(len(rows)))
    fresh: Sequence[Tokens] = rows
    for _ in range(max_new_tokens):
        with torch.no_grad():  # not around the yield; not inference_mode: FSDP keeps tensors
            tokens = _picked(step(fresh), alive, rows, sampling, generators, lost)
        alive = {i for i, token in tokens.items() if token != eot_id}
        for i in sorted(alive):
            rows[i].append(tokens[i])
            yield i, tokens[i]
            if stop(i, tokens[i]):
                alive.remove(i)
        if not (any(dist.all_gather(bool(alive))) if lockstep else alive):
            return
        # what has ended goes on with any token: nobody looks at it, and no row sees another
        fresh = [row[-1:] for row in rows]


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eot_id: int | None = None,
    seeds: Sequence[int] | None = None,
    stop: Callable[[int, int], bool] | None = None,
    dtype: torch.dtype | None = None,
    shared: bool = False,
) -> list[list[int]]:
    """The continuation of each of `prompts`, without it and without the end of text; one batch.

    `stop`: see `stream_ids`. Row i is drawn with seeds[i] (default: sampling.seed + i). dtype,
    shared: see `cached_steps`. Leaves the model in evaluation mode. Raises InputError if a prompt
    is empty, has ids that the model lacks, or does not fit max_seq_len together with
    `max_new_tokens`, RunError for logits that are not finite.
    """
    sampling = sampling or Sampling()
    for prompt in prompts:
        check_length(prompt, max_new_tokens, model.cfg.max_seq_len, model.cfg.vocab_size)
    model.eval()
    new: list[list[int]] = [[] for _ in prompts]
    for row, token in stream_ids(
        cached_steps(model, max_new_tokens, dtype=dtype, shared=shared),
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eot_id=eot_id,
        seeds=seeds or [sampling.seed + i for i in range(len(prompts))],
        stop=stop or (lambda row, token: False),
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
