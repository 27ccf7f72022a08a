"""Text from a trained model: ours with a cache of keys and values, or an exported folder.

    prompt ids --> step --> logits of the next token --> pick --> id --> step --> …
                    |                                      |
      our Transformer or transformers' class     one sampler for both

Shapes: B batch (1), T position, V vocab.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.data.tokenizer import Tokenizer, load_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.hf.compare import load_hf
from openlm_lite.hf.source import find_tokenizer, read_model
from openlm_lite.model.attention import KVCache
from openlm_lite.model.transformer import Transformer

Step = Callable[[Sequence[int]], Tensor]
"""Takes the next tokens of one sequence, remembers them, gives the logits [V] behind the last."""


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
    logits_V = filtered_logits(logits_V, seen, sampling)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # drawn on the CPU, so that a seed gives the same text on every device
    return int(torch.multinomial(logits_V.softmax(0).cpu(), 1, generator=generator))


# --- generating ids ------------------------------------------------------------------------------


def cached_steps(model: Transformer, max_len: int) -> Step:
    """Steps of our model for one sequence of up to `max_len` tokens, with a KV cache."""
    weight = model.embedding.weight
    cache = KVCache(model.cfg, 1, max_len, weight.device, weight.dtype)

    def step(tokens: Sequence[int]) -> Tensor:
        tokens_BT = torch.tensor([list(tokens)], dtype=torch.long, device=weight.device)
        logits_BTV = model(tokens_BT, cache=cache)
        assert isinstance(logits_BTV, Tensor)
        return logits_BTV[0, -1]

    return step


def stream_ids(
    step: Step,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eot_id: int | None,
) -> Iterator[int]:
    """New tokens one by one, until `eot_id` (which is not given out) or `max_new_tokens`."""
    tokens, fresh = list(prompt), list(prompt)
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(max_new_tokens):
        with torch.inference_mode():  # not around the yield: it would leak to the caller
            token = _pick(step(fresh), tokens, sampling, generator)
        if token == eot_id:
            return
        yield token
        tokens.append(token)
        fresh = [token]


def generate(
    model: Transformer,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    eot_id: int | None = None,
    seed: int = 0,
) -> list[int]:
    """The continuation of `tokens`, without them and without the end of text.

    Raises InputError if the prompt is empty, has ids that the model lacks, or does not fit
    max_seq_len together with `max_new_tokens`.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, seed)
    check_length(tokens, max_new_tokens, model.cfg.max_seq_len, model.cfg.vocab_size)
    model.eval()
    step = cached_steps(model, len(tokens) + max_new_tokens)
    return list(
        stream_ids(step, tokens, max_new_tokens=max_new_tokens, sampling=sampling, eot_id=eot_id)
    )


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


# --- generating text -----------------------------------------------------------------------------


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text pieces whose sum is `tokenizer.decode(all ids)`, each given out once it is settled.

    A character may be spread over tokens: a piece waits while the text ends in U+FFFD. Decoding
    starts again at the last settled token, so the work does not grow with the text.
    """
    held: list[int] = []  # the tokens before `given` give context to the ones behind
    given = 0
    for token in ids:
        held.append(token)
        before, now = tokenizer.decode(held[:given]), tokenizer.decode(held)
        if now.endswith("\N{REPLACEMENT CHARACTER}") or not now.startswith(before):
            continue
        if now != before:
            yield now[len(before) :]
        held, given = held[given:], len(held) - given
    if rest := tokenizer.decode(held)[len(tokenizer.decode(held[:given])) :]:
        yield rest


def generate_text(
    path: str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    tokenizer: str | None = None,
    device: str = "cpu",
    average: str | None = None,
) -> Iterator[str]:
    """The continuation of `prompt`, piece by piece, by the model at `path`.

    `path`: a run's or a checkpoint's folder, or an exported folder (by transformers' own class).
    `average`: the name of an average in the checkpoint, which is taken in place of the weights.
    An empty prompt begins a document. Everything is read and checked before this returns.
    Raises InputError for bad input.
    """
    sampling = sampling or Sampling()
    _check_device(device)
    exported = os.path.isfile(os.path.join(path, "config.json"))
    load = _load_exported if exported else _load_ours
    words, max_seq_len, vocab_size, make_step = load(path, tokenizer, device, average)
    prompt_ids = [int(i) for i in words.encode(prompt)] or [words.eot_id]
    check_length(prompt_ids, max_new_tokens, max_seq_len, vocab_size)
    ids = stream_ids(
        make_step(len(prompt_ids) + max_new_tokens),
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eot_id=words.eot_id,
    )
    return stream_text(words, ids)


Loaded = tuple[Tokenizer, int, int, Callable[[int], Step]]
"""tokenizer, max_seq_len, vocab_size, and what makes the steps of a sequence of a given length"""


def _load_ours(path: str, tokenizer: str | None, device: str, average: str | None) -> Loaded:
    step_folder = resolve_checkpoint(path)
    model = read_model(step_folder, average).to(device)
    words = find_tokenizer(step_folder, tokenizer, model.cfg.vocab_size)
    return (
        words,
        model.cfg.max_seq_len,
        model.cfg.vocab_size,
        lambda max_len: cached_steps(model, max_len),
    )


def _load_exported(path: str, tokenizer: str | None, device: str, average: str | None) -> Loaded:
    if average is not None:
        raise InputError(f"{path}: is a Hugging Face folder, which has no average {average!r}")
    words = load_tokenizer(tokenizer or path)
    model = load_hf(path, "auto").to(device)

    def make_step(_max_len: int) -> Step:
        past = None

        def step(tokens: Sequence[int]) -> Tensor:
            nonlocal past
            tokens_BT = torch.tensor([list(tokens)], dtype=torch.long, device=device)
            output = model(tokens_BT, past_key_values=past, use_cache=True)
            past = output.past_key_values
            return output.logits[0, -1]

        return step

    config = model.config
    return words, config.max_position_embeddings, config.vocab_size, make_step


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device = {device!r} cannot be used here; try cpu") from e
