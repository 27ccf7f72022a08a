"""DCLM's tasks over a model: `run_suite`.

    tasks, data --> examples --> batches (alike lengths) --> ranks --> records --> scores
                     prompts       scorer.plan_batches                 journal    TaskResult

A record is what the model said of one row. Records of an earlier run that was interrupted come
from the journal, and their rows are not read again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from openlm_lite import dist
from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError
from openlm_lite.eval.progress import Progress
from openlm_lite.eval.prompts import (
    MAX_SEQ_LEN,
    Data,
    Example,
    NotScorableError,
    check_rows,
    examples,
    find_data,
    read_data,
)
from openlm_lite.eval.scorer import (
    BatchLimits,
    Choice,
    ChoiceScore,
    Scorer,
    plan_batches,
    plan_prompts,
)
from openlm_lite.eval.scoring import begins_right, chosen, has_stopped, is_finite, is_tie
from openlm_lite.eval.tasks import Task

MOST_TIES = 0.5
"""share of the rows that may tie; above it the model tells no answer from another"""

Key = tuple[str, int]
"""category and row within it"""


@dataclass(frozen=True)
class SuiteSettings:
    """What decides the prompts, and how the work is cut."""

    limit: int | None = None
    """rows of every task (of every category, where it has some), from the first; None: all"""
    max_seq_len: int = MAX_SEQ_LEN
    """of question and answer; a model that takes fewer tokens lowers it"""
    bos: bool = True
    """begin with what the tokenizer's file wants before a text, as llm-foundry does"""
    batch: BatchLimits = field(default_factory=BatchLimits)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit = {self.limit}: must be at least 1 row")
        if self.max_seq_len < 2:
            raise InputError(f"max_seq_len = {self.max_seq_len}: must be at least 2 tokens")


@dataclass(frozen=True)
class Record:
    """What the model said of one row; JSON's own types alone."""

    category: str
    index: int
    right: bool
    tie: bool
    finite: bool
    logliks: list[float] = field(default_factory=list)
    """per choice, nats; empty for generation"""
    n_tokens: list[int] = field(default_factory=list)
    text: str = ""
    """that was generated"""


class Journal(Protocol):
    """Where records are kept while a suite runs; `claim` and `load` are collective."""

    def claim(self) -> None: ...

    def load(self, task: Task, data: Data) -> dict[Key, Record]: ...

    def add(self, task: Task, records: Sequence[Record]) -> None: ...


@dataclass(frozen=True)
class TaskResult:
    """One task's score, and what has to be known of it."""

    label: str
    kind: str
    shots: int
    accuracy: float | None
    """from 0 to 1; the plain mean over the categories where there are some; None: see `problem`"""
    stderr: float | None
    """of the accuracy, for rows drawn independently"""
    rows: int
    rows_of_task: int
    ties: int
    """rows in which the best answer is not the only best one"""
    trimmed: int
    """rows that lost tokens on the left"""
    categories: dict[str, float]
    data_file: str
    data_sha256: str
    seconds: float
    problem: str | None = None
    """why there is no accuracy"""


@dataclass(frozen=True)
class SuiteResult:
    """The tasks that were asked, in the suite's order, and why others were not."""

    tasks: dict[str, TaskResult]
    missing: dict[str, str]
    """label -> reason"""

    @property
    def accuracies(self) -> dict[str, float]:
        """Of the tasks that have one."""
        scored = {label: task.accuracy for label, task in self.tasks.items()}
        return {label: value for label, value in scored.items() if value is not None}


def run_suite(
    scorer: Scorer,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    data_dir: str,
    settings: SuiteSettings | None = None,
    *,
    journal: Journal | None = None,
    progress: bool = True,
    checked: bool = False,
) -> SuiteResult:
    """Ask the model every task of `tasks` whose data is under `data_dir`; collective.

    All files are read and checked before the model is asked anything (`checked`: their rows have
    been tried with `read_suite`, and are not again). Every rank returns the same. Raises InputError
    for a row that cannot be asked (task and row in the message), where no task has data, and for a
    journal that cannot be had.
    """
    settings = settings or SuiteSettings()
    data: dict[str, Data] = {}
    missing: dict[str, str] = {}

    def read(check: bool) -> None:
        found, lacking = read_suite(
            tasks, data_dir, tokenizer, settings, scorer.max_seq_len, check=check
        )
        data.update(found)
        missing.update(lacking)

    dist.on_main(lambda: read(check=not checked))  # bad input is told once
    dist.on_all_ranks(lambda: None if dist.rank() == 0 else read(check=False))
    if journal is not None:
        journal.claim()
    tasks_here = [task for task in tasks if task.label in data]
    results = {}
    bar = Progress(tasks_here, data, settings.limit, enabled=progress and dist.rank() == 0)
    with bar:
        for task in tasks_here:
            bar.begin(task)
            try:
                results[task.label] = _run_task(
                    scorer, tokenizer, task, data[task.label], settings, journal, bar
                )
            except NotScorableError as e:
                missing[task.label] = str(e)
                bar.skip(task)
    order = {task.label: i for i, task in enumerate(tasks)}
    return SuiteResult(results, dict(sorted(missing.items(), key=lambda item: order[item[0]])))


def read_suite(
    tasks: Sequence[Task],
    data_dir: str,
    tokenizer: Tokenizer,
    settings: SuiteSettings,
    max_seq_len: int,
    *,
    check: bool = True,
) -> tuple[dict[str, Data], dict[str, str]]:
    """(label -> its rows, label -> why there are none), on this rank alone.

    max_seq_len: the model's; check: each row is tried, too. Raises InputError as `run_suite`.
    """
    files, missing = find_files(tasks, data_dir)
    data = {task.label: read_data(task, files[task.label]) for task in tasks if task.label in files}
    for task in tasks if check else ():
        if task.label in data:
            check_rows(task, data[task.label], tokenizer, **_how(tokenizer, settings, max_seq_len))
    return data, missing


def _how(tokenizer: Tokenizer, settings: SuiteSettings, max_seq_len: int) -> dict[str, Any]:
    """The settings of `examples`."""
    return {
        "max_seq_len": min(settings.max_seq_len, max_seq_len),
        "limit": settings.limit,
        "bos_ids": tokenizer.bos_ids if settings.bos else (),
    }


def find_files(tasks: Sequence[Task], data_dir: str) -> tuple[dict[str, str], dict[str, str]]:
    """(label -> path, label -> why there is none). Raises InputError where no task has data."""
    found, missing = {}, {}
    for task in tasks:
        path = find_data(task, data_dir)
        if path is None:
            missing[task.label] = f"no data: {task.file} is not in {data_dir}"
        else:
            found[task.label] = path
    if not found:
        raise InputError(
            f"--data {data_dir}: holds none of {', '.join(task.file for task in tasks[:3])}"
            f"{' …' if len(tasks) > 3 else ''}; give the folder that holds local_data/"
        )
    return found, missing


# --- one task ------------------------------------------------------------------------------------


def _run_task(
    scorer: Scorer,
    tokenizer: Tokenizer,
    task: Task,
    data: Data,
    settings: SuiteSettings,
    journal: Journal | None,
    bar: Progress,
) -> TaskResult:
    start = time.monotonic()
    how = _how(tokenizer, settings, scorer.max_seq_len)
    asked = list(examples(task, data, tokenizer, **how))
    wanted = {(example.category, example.index) for example in asked}
    known = {} if journal is None else journal.load(task, data)
    known = {key: record for key, record in known.items() if key in wanted}
    bar.add(task, len(known))
    open_ones = [e for e in asked if (e.category, e.index) not in known]
    is_generation = task.kind == "generation_task_with_answers"
    answer = _generate if is_generation else _choose
    for indices, is_own in _own_batches(scorer, is_generation, open_ones, settings.batch):
        records = answer(scorer, tokenizer, task, [open_ones[i] for i in indices])
        if not is_own:
            continue
        known |= {(record.category, record.index): record for record in records}
        if journal is not None:
            journal.add(task, records)
        bar.add(task, len(records) * dist.world_size())
    records = {key: record for part in dist.all_gather(known) for key, record in part.items()}
    seconds = time.monotonic() - start
    return _result(task, data, asked, [records[e.category, e.index] for e in asked], seconds)


def _own_batches(
    scorer: Scorer, is_generation: bool, asked: Sequence[Example], limits: BatchLimits
) -> Iterator[tuple[list[int], bool]]:
    """(indices, whether they are this rank's) of every world_size-th batch.

    Where the ranks have to keep step, one that has no batch left does another's again.
    """
    if is_generation:
        room = max((example.max_new_tokens or 0 for example in asked), default=0)
        batches = plan_prompts([len(example.seqs[0]) for example in asked], room, limits)
    else:
        questions = [_question(e) for e in asked]
        batches = plan_batches(questions, limits, scorer.vocab_size, scorer.shares_prefixes)
    rank, world = dist.rank(), dist.world_size()
    for cached in (True, False):
        of_kind = [batch.indices for batch in batches if batch.cached is cached]
        rounds = math.ceil(len(of_kind) / world)
        for i in range(rank, rounds * world if scorer.lockstep else len(of_kind), world):
            yield of_kind[min(i, len(of_kind) - 1)], i < len(of_kind)


def _question(example: Example) -> list[Choice]:
    assert example.spans is not None
    return [Choice(seq, start) for seq, (start, _) in zip(example.seqs, example.spans, strict=True)]


def _choose(
    scorer: Scorer, tokenizer: Tokenizer, task: Task, asked: Sequence[Example]
) -> list[Record]:
    scores = scorer.score([_question(example) for example in asked])
    return [_judged(example, found) for example, found in zip(asked, scores, strict=True)]


def _judged(example: Example, scores: Sequence[ChoiceScore]) -> Record:
    finite = is_finite(scores)
    if example.gold is None:
        right, tie = scores[0].greedy, scores[0].tied
    else:
        right = finite and chosen(scores) == example.gold
        tie = finite and is_tie(scores, [seq.tobytes() for seq in example.seqs])
    return Record(
        example.category,
        example.index,
        right=finite and right,
        tie=tie,
        finite=finite,
        logliks=[score.loglik if math.isfinite(score.loglik) else 0.0 for score in scores],
        n_tokens=[score.n_tokens for score in scores],
    )


def _generate(
    scorer: Scorer, tokenizer: Tokenizer, task: Task, asked: Sequence[Example]
) -> list[Record]:
    def text_of(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special=True)

    found = scorer.generate(
        [example.seqs[0] for example in asked],
        max(example.max_new_tokens or 1 for example in asked),
        tokenizer.eot_id,
        lambda tokens: has_stopped(text_of(tokens), task),
    )
    records = []
    for example, tokens in zip(asked, found, strict=True):
        text = "" if tokens is None else text_of(tokens)
        records.append(
            Record(
                example.category,
                example.index,
                right=tokens is not None
                and begins_right(text, example.aliases, task.stop, task.cot_delimiter),
                tie=False,
                finite=tokens is not None,
                text=text,
            )
        )
    return records


# --- scores --------------------------------------------------------------------------------------


def _result(
    task: Task, data: Data, asked: Sequence[Example], records: Sequence[Record], seconds: float
) -> TaskResult:
    by_category: dict[str, list[bool]] = {}
    for record in records:
        by_category.setdefault(record.category, []).append(record.right)
    means = {name: sum(rights) / len(rights) for name, rights in by_category.items()}
    variances = [
        means[name] * (1 - means[name]) / len(rights) for name, rights in by_category.items()
    ]
    ties = sum(record.tie for record in records)
    odd = [record for record in records if not record.finite]
    problem = None
    if odd:
        where = f"{odd[0].category}, row {odd[0].index}" if odd[0].category else f"{odd[0].index}"
        problem = (
            f"in {len(odd)} of {len(records)} rows the logits are not finite or all the same, "
            f"first in row {where} (from 0)"
        )
    elif ties > MOST_TIES * len(records):
        problem = (
            f"in {ties} of {len(records)} rows the best answer ties with another: the model does "
            "not tell them apart"
        )
    accuracy = sum(means.values()) / len(means)
    return TaskResult(
        label=task.label,
        kind=task.kind,
        shots=task.shots,
        accuracy=None if problem else accuracy,
        stderr=None if problem else math.sqrt(sum(variances)) / len(means),
        rows=len(records),
        rows_of_task=sum(map(len, data.categories.values())),
        ties=ties,
        trimmed=sum(example.trimmed > 0 for example in asked),
        categories=means if task.has_categories and not problem else {},
        data_file=task.file,
        data_sha256=data.sha256,
        seconds=round(seconds, 3),
        problem=problem,
    )
