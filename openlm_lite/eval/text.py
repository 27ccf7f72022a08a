"""Text from a trained model: a batch of prompts in, whole characters out, piece by piece.

prompts --> ids --> generate.stream_ids --> TextStream of each row --> pieces of text
                               ^                     |
                               +--- a stop string ---+
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from openlm_lite.data.tokenizer import Tokenizer, load_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.eval.generate import (
    Sampling,
    Step,
    cached_steps,
    check_length,
    hf_steps,
    stream_ids,
)
from openlm_lite.hf.compare import load_hf, max_positions
from openlm_lite.hf.source import open_source, with_tokenizer


class TextStream:
    """The text of ids that come one by one, given out once it is settled.

    A character may be spread over tokens: a piece waits while the text ends in U+FFFD. Decoding
    starts again at the last settled token, so the work does not grow with the text. The text ends
    before the first of the `stop` strings; what may become one waits too.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        """whether a stop string was met: nothing comes after it"""
        self._held: list[int] = []  # the tokens before `_given` give context to the ones behind
        self._given = 0
        self._waiting = ""  # settled text that may be the beginning of a stop string

    def feed(self, token: int) -> str:
        """The text that is settled by this token; often empty."""
        self._held.append(token)
        before = self.tokenizer.decode(self._held[: self._given])
        now = self.tokenizer.decode(self._held)
        if now.endswith("\N{REPLACEMENT CHARACTER}") or not now.startswith(before):
            return ""
        if now != before:
            self._held, self._given = self._held[self._given :], len(self._held) - self._given
        return self._up_to_stop(now[len(before) :])

    def finish(self) -> str:
        """What was waiting, once no more tokens come."""
        before = self.tokenizer.decode(self._held[: self._given])
        piece = self._up_to_stop(self.tokenizer.decode(self._held)[len(before) :])
        rest, self._waiting, self._held, self._given = self._waiting, "", [], 0
        return piece + rest

    def _up_to_stop(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._waiting + piece
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self._waiting = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._waiting = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: one on each line, or, of .jsonl, the `prompt` of each line's object.

    Empty lines are passed over. Raises InputError for a file that holds none, with the line of one
    that is no prompt.
    """
    with open(path, encoding="utf-8", errors="strict") as f:
        try:
            lines = f.read().splitlines()
        except UnicodeDecodeError as e:
            raise InputError(f"{path}: is not UTF-8 text: {e}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompts.append(_prompt_of(line, f"{path}:{number}") if path.endswith(".jsonl") else line)
    if not prompts:
        raise InputError(f"{path}: holds no prompts; write one on each line")
    return prompts


def _prompt_of(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise InputError(f'{place}: is no object with a text "prompt": {line[:60]}')
    return prompt


class Piece(NamedTuple):
    """A part of the continuation of one prompt."""

    prompt: int
    text: str
    ended: str
    """why this is the last one: `end of text`, `length` or `stop string`; empty before that"""


def generate_texts(
    path: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    tokenizer: str | None = None,
    device: str = "cpu",
    average: str | None = None,
) -> Iterator[Piece]:
    """The continuations of `prompts`, piece by piece, by the model at `path`.

    path: a run's or a checkpoint's folder, or an exported folder (by transformers' own class).
    stop: strings before the first of which a text ends. batch_size: prompts that are continued
    together, those of like length first; pieces come in the order in which they are made. Prompt i
    is drawn with the seed sampling.seed + i. average: the name of an average in the checkpoint,
    which is taken in place of the weights. An empty prompt begins a document.

    Everything is read and checked before this returns. Raises InputError for bad input.
    """
    sampling = sampling or Sampling()
    _check_device(device)
    if not prompts:
        raise InputError("there are no prompts; give one, or a file with one on each line")
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: must be at least 1")
    if "" in stop:
        raise InputError("a stop string is empty: every text would end before it begins")
    exported = os.path.isfile(os.path.join(path, "config.json"))
    load = _load_exported if exported else _load_ours
    model = load(path, tokenizer, device, average)
    words = model.tokenizer
    ids = [i.tolist() or [words.eot_id] for i in words.encode_batch(prompts)]
    for number, prompt_ids in enumerate(ids):
        try:
            check_length(prompt_ids, max_new_tokens, model.max_seq_len, model.vocab_size)
        except InputError as e:
            if len(ids) == 1:
                raise
            raise InputError(f"prompt {number}, {prompts[number][:40]!r}: {e}") from None
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return _pieces(model, ids, batches, max_new_tokens, sampling, stop)


def _pieces(
    model: _Loaded,
    ids: list[list[int]],
    batches: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
) -> Iterator[Piece]:
    for numbers in batches:
        texts = [TextStream(model.tokenizer, stop) for _ in numbers]
        counts = [0] * len(numbers)
        prompts = [ids[number] for number in numbers]
        stream = stream_ids(
            model.make_step(max_new_tokens),
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eot_id=model.tokenizer.eot_id,
            seeds=[sampling.seed + number for number in numbers],
            stop=lambda row, token: texts[row].stopped,  # noqa: B023  (used up before the next)
        )
        for row, token in stream:
            counts[row] += 1
            if text := texts[row].feed(token):
                yield Piece(numbers[row], text, "")
        for row, number in enumerate(numbers):
            rest = texts[row].finish()
            at_length = counts[row] == max_new_tokens
            ended = "length" if at_length else "end of text"
            yield Piece(number, rest, "stop string" if texts[row].stopped else ended)


# --- models --------------------------------------------------------------------------------------


class _Loaded(NamedTuple):
    tokenizer: Tokenizer
    max_seq_len: int
    vocab_size: int
    make_step: Callable[[int], Step]
    """new tokens -> what makes the steps of a batch with as many"""


def _load_ours(path: str, tokenizer: str | None, device: str, average: str | None) -> _Loaded:
    model, words = with_tokenizer(open_source(path, average=average), tokenizer)
    model, cfg = model.to(device), model.cfg
    return _Loaded(words, cfg.max_seq_len, cfg.vocab_size, lambda room: cached_steps(model, room))


def _load_exported(path: str, tokenizer: str | None, device: str, average: str | None) -> _Loaded:
    if average is not None:
        raise InputError(f"{path}: is a Hugging Face folder, which has no average {average!r}")
    words = load_tokenizer(tokenizer or path)
    model = load_hf(path, "auto").to(device)
    config = model.config
    return _Loaded(words, max_positions(config), config.vocab_size, lambda _: hf_steps(model))


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device = {device!r} cannot be used here; try cpu") from e
