"""From rows of a task's file to what the model reads, token for token as llm-foundry makes it.

    multiple_choice   shots + query        |  choice     one sequence per choice
    schema            shots + option       |  ending     one sequence per option, one ending
    language_modeling shots + context      |  ending     one sequence
    generation        shots + context      |             the model goes on by itself

    shot = [example_delimiter] prelimiter question continuation_delimiter answer
    question asked = the same without the answer, its end stripped

Shots, question and answer are encoded apart. What is too long loses tokens on the left. Source:
llm-foundry 8c8dd48, llmfoundry/eval/datasets/in_context_learning_evaluation.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError
from openlm_lite.eval.tasks import Kind, Task
from openlm_lite.storage import read_bytes

FEWSHOT_SEED = 1234
MAX_SEQ_LEN = 2048
"""tokens of question and answer together, in DCLM's settings"""
_EXAMPLE_DELIMITER = "\n"
_MORE_THAN_LONGEST_ANSWER = 10  # tokens that a chain of thought may be longer than any in the data
_ROWS_AT_ONCE = 64  # encoded together

Row = dict[str, Any]

# The fields of a row: name -> what it must be.
_FIELDS: dict[Kind, dict[str, str]] = {
    "multiple_choice": {"query": "text", "choices": "texts", "gold": "index of choices"},
    "schema": {"context_options": "texts", "continuation": "text", "gold": "index"},
    "language_modeling": {"context": "text", "continuation": "text"},
    "generation_task_with_answers": {"context": "text", "answer": "text"},
}


class NotScorableError(Exception):
    """A task cannot be scored with this model, through no fault of its file; the text says why."""


@dataclass(frozen=True)
class Data:
    """The rows of a task, a list per category ("" where it has none)."""

    path: str
    sha256: str
    categories: dict[str, list[Row]]


@dataclass(frozen=True)
class Example:
    """One row as the model reads it."""

    category: str
    index: int
    """of the row within its category"""
    fewshot_idxs: tuple[int, ...]
    fewshot_text: str
    text: str
    """the question behind the shots; of a schema the first option's"""
    seqs: tuple[np.ndarray, ...]
    """ids per choice, question and answer; of a generation task the question's alone"""
    spans: tuple[tuple[int, int], ...] | None
    """[start, end) of the answer in each of `seqs`; None for generation"""
    gold: int | None
    """index of the right choice; None for the other kinds"""
    aliases: tuple[str, ...]
    """right answers of a generation task"""
    max_new_tokens: int | None
    trimmed: int
    """tokens lost on the left, the most of any choice"""


# --- rows ----------------------------------------------------------------------------------------


def find_data(task: Task, data_dir: str) -> str | None:
    """The path of the task's file; None where `data_dir` has none.

    `data_dir` holds `local_data/`, or is that folder.
    """
    inner = task.file.partition("/")[2]
    places = [os.path.join(data_dir, task.file), os.path.join(data_dir, inner)]
    return next((path for path in places if os.path.isfile(path)), None)


def read_data(task: Task, path: str) -> Data:
    """The rows of the file, each checked. Raises InputError with task, file and row (from 1)."""
    content = read_bytes(path)
    categories: dict[str, list[Row]] = {}
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"task {task.label}: {path}, row {number}"
        try:
            row = json.loads(line)
        except ValueError as e:
            raise InputError(f"{place}: not JSON ({e})") from None
        _check_row(row, task, place)
        row = {k: v.strip() if isinstance(v, str) else v for k, v in row.items()} | {
            "longest": _longest_answer_texts(row, task)
        }
        category = str(row["category"]) if task.has_categories else ""
        categories.setdefault(category, []).append(row)
    if not categories:
        raise InputError(f"task {task.label}: {path} holds no rows; fetch it again")
    sha256 = hashlib.sha256(content).hexdigest()
    return Data(path, sha256, dict(sorted(categories.items())))


def _check_row(row: Any, task: Task, place: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{place}: holds a {type(row).__name__}, must hold an object")
    fields = dict(_FIELDS[task.kind])
    if task.has_categories:
        fields["category"] = "text"
    for name, what in fields.items():
        value = row.get(name)
        if name not in row:
            raise InputError(f"{place}: has no {name!r}; it needs {', '.join(fields)}")
        texts: Any = value if what == "texts" else [value]
        if what.startswith("index"):
            n = len(row["choices" if task.kind == "multiple_choice" else "context_options"])
            if type(value) is not int or not 0 <= value < n:
                raise InputError(f"{place}: {name} = {value!r}, must be from 0 to {n - 1}")
            continue
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{place}: {name} = {value!r:.80}, must be {what}")
        if what == "texts" and len(texts) < 2:
            raise InputError(f"{place}: {name} has {len(texts)} entries, must have at least 2")
        if name in ("continuation", "answer", "choices") and not all(t.strip() for t in texts):
            raise InputError(f"{place}: {name} has no text: an empty answer cannot be scored")
    aliases = row.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise InputError(f"{place}: aliases = {aliases!r:.80}, must be a list of texts")
    if not isinstance(row.get("chain_of_thought", ""), str):
        raise InputError(f"{place}: chain_of_thought must be text")


def _longest_answer_texts(row: Row, task: Task) -> list[str]:
    """The answers as a model would write them, unstripped: the longest sets the tokens given."""
    if task.kind != "generation_task_with_answers":
        return []
    answers = dict.fromkeys([row["answer"], *row.get("aliases", [])])
    if "chain_of_thought" not in row:
        return list(answers)
    return [f"{row['chain_of_thought']}{task.cot_delimiter}{answer}" for answer in answers]


# --- examples ------------------------------------------------------------------------------------


def examples(
    task: Task,
    data: Data,
    tokenizer: Tokenizer,
    *,
    max_seq_len: int = MAX_SEQ_LEN,
    limit: int | None = None,
    bos_ids: Sequence[int] = (),
    category: str | None = None,
) -> Iterator[Example]:
    """The first `limit` rows of every category (or of the one named) as the model reads them.

    The shots are drawn from all rows, so a limit changes no prompt.
    Raises InputError for a row without tokens to score, NotScorableError where question and answer
    cannot fit `max_seq_len`.
    """
    for name, rows in data.categories.items():
        if category is None or name == category:
            yield from _Category(task, name, rows, tokenizer, max_seq_len, bos_ids).examples(limit)


def check_rows(
    task: Task,
    data: Data,
    tokenizer: Tokenizer,
    *,
    max_seq_len: int = MAX_SEQ_LEN,
    limit: int | None = None,
    bos_ids: Sequence[int] = (),
) -> None:
    """Raises InputError where `examples` would for the same rows, in a part of its time.

    One shot stands for several: they matter here only as the tokens before an empty question.
    """
    few = replace(task, shots=min(task.shots, 1))
    with suppress(NotScorableError):  # which is no mistake in the data
        for _ in examples(
            few, data, tokenizer, max_seq_len=max_seq_len, limit=limit, bos_ids=bos_ids
        ):
            pass


def fewshot_indices(n_rows: int, shots: int, index: int, rng: random.Random) -> list[int]:
    """Which rows stand before row `index`, in the order of the prompt: a set's own order."""
    chosen = set(rng.sample(range(n_rows), min(n_rows - 1, shots)))
    if index in chosen:
        chosen.remove(index)
        if len(chosen) >= n_rows - 1:
            return list(chosen)
        other = rng.choice(range(n_rows))
        while other in chosen or other == index:
            other = rng.choice(range(n_rows))
        chosen.add(other)
    return list(chosen)


class _Category:
    """The rows of one category, with what is the same for all of them."""

    def __init__(
        self,
        task: Task,
        name: str,
        rows: list[Row],
        tokenizer: Tokenizer,
        max_seq_len: int,
        bos_ids: Sequence[int],
    ) -> None:
        self.task, self.name, self.rows, self.tokenizer = task, name, rows, tokenizer
        self.max_seq_len, self.bos_ids = max_seq_len, list(bos_ids)
        self.prefix_space = len(tokenizer.encode(" a")) == 1
        self.is_generation = task.kind == "generation_task_with_answers"
        self.has_cot = self.is_generation and any("chain_of_thought" in row for row in rows)
        self.max_answer = self._max_answer_tokens() if self.is_generation else 0

    def examples(self, limit: int | None) -> Iterator[Example]:
        rng = random.Random(FEWSHOT_SEED)
        n = len(self.rows) if limit is None else min(limit, len(self.rows))
        for start in range(0, n, _ROWS_AT_ONCE):
            numbers = range(start, min(start + _ROWS_AT_ONCE, n))
            drawn = [fewshot_indices(len(self.rows), self.task.shots, i, rng) for i in numbers]
            texts = [self._texts(i, shots) for i, shots in zip(numbers, drawn, strict=True)]
            flat = [text for shots, asked, answers in texts for text in (shots, *asked, *answers)]
            ids = iter(self.tokenizer.encode_batch(flat))
            for i, shots, (shot_text, asked, answers) in zip(numbers, drawn, texts, strict=True):
                before = self.bos_ids + _ids(next(ids))
                if len(before) > 1 and before[-1] == self.tokenizer.eot_id:
                    before.pop()
                contexts = [before + _ids(next(ids)) for _ in asked]
                endings = [_ids(next(ids)) for _ in answers]
                yield self._example(i, shots, shot_text, asked[0], contexts, endings)

    def _texts(self, index: int, shots: list[int]) -> tuple[str, list[str], list[str]]:
        """(shots, questions, answers): one question for all answers, or one answer for all."""
        text = ""
        for shot in shots:
            text += self._shot(self.rows[shot], text)
        row, task = self.rows[index], self.task
        between = _EXAMPLE_DELIMITER if text else ""
        if task.kind == "schema":
            end = task.continuation_delimiter.rstrip() if text else ""
            asked = [f"{task.prelimiter}{between}{o}{end}" for o in row["context_options"]]
            return text, asked, [self._spaced(row["continuation"])]
        question = row["query" if task.kind == "multiple_choice" else "context"]
        asked = f"{between}{task.prelimiter}{question}{task.continuation_delimiter}".rstrip()
        if task.kind == "multiple_choice":
            return text, [asked], [self._spaced(choice) for choice in row["choices"]]
        answers = [] if self.is_generation else [self._spaced(row["continuation"])]
        return text, [asked], answers

    def _shot(self, row: Row, preceding: str) -> str:
        task, between = self.task, _EXAMPLE_DELIMITER if preceding else ""
        if task.kind == "schema":
            option = row["context_options"][row["gold"]]
            delimiter, ending = task.continuation_delimiter, row["continuation"]
            return f"{task.prelimiter}{between}{option}{delimiter}{ending}"
        if task.kind == "multiple_choice":
            question, answer = row["query"], row["choices"][row["gold"]]
        elif self.has_cot:
            question = row["context"]
            answer = f"{row.get('chain_of_thought', '')}{task.cot_delimiter}{row['answer']}"
        else:
            question = row["context"]
            answer = row["answer" if self.is_generation else "continuation"]
        return f"{between}{task.prelimiter}{question}{task.continuation_delimiter}{answer}"

    def _spaced(self, answer: str) -> str:
        return f" {answer}" if self.prefix_space and not answer.startswith(" ") else answer

    def _max_answer_tokens(self) -> int:
        texts = [text for row in self.rows for text in row["longest"]]
        longest = max(len(ids) for ids in self.tokenizer.encode_batch(texts)) + len(self.bos_ids)
        return longest + (_MORE_THAN_LONGEST_ANSWER if self.task.cot_delimiter else 0)

    def _example(
        self,
        index: int,
        shots: list[int],
        shot_text: str,
        text: str,
        contexts: list[list[int]],
        endings: list[list[int]],
    ) -> Example:
        row, trimmed = self.rows[index], 0
        seqs, spans = [], []
        for choice in range(max(len(contexts), len(endings))):
            context = contexts[min(choice, len(contexts) - 1)]
            ending = endings[min(choice, len(endings) - 1)] if endings else []
            room = self.max_seq_len - self.max_answer - len(ending)
            self._check(index, choice, context, ending, room)
            trimmed = max(trimmed, len(context) - room)
            context = context[-room:]
            seqs.append(np.array(context + ending, dtype=np.int32))
            spans.append((len(context), len(context) + len(ending)))
        return Example(
            category=self.name,
            index=index,
            fewshot_idxs=tuple(shots),
            fewshot_text=shot_text,
            text=text,
            seqs=tuple(seqs),
            spans=None if self.is_generation else tuple(spans),
            gold=row["gold"] if self.task.kind in ("multiple_choice", "schema") else None,
            aliases=tuple(dict.fromkeys([row["answer"], *row.get("aliases", [])]))
            if self.is_generation
            else (),
            max_new_tokens=max(self.max_answer, 1) if self.is_generation else None,
            trimmed=max(trimmed, 0),
        )

    def _check(
        self, index: int, choice: int, context: list[int], ending: list[int], room: int
    ) -> None:
        where = f"{self.name}, row {index}" if self.name else f"row {index}"
        place = f"task {self.task.label}, {where} (from 0), choice {choice}"
        if not self.is_generation and not ending:
            raise InputError(f"{place}: the answer has no tokens: there is nothing to score")
        if not context:
            raise InputError(f"{place}: there is no token before the answer that could predict it")
        if room < 1:
            needed = len(ending) or self.max_answer
            raise NotScorableError(
                f"{where} needs {needed} tokens for its answer, and the model takes "
                f"{self.max_seq_len} with the question"
            )


def _ids(array: Any) -> list[int]:
    return array.tolist()
