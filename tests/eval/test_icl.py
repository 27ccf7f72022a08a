"""Suites: prompts and scores as llm-foundry's, bad input told, interrupted ones gone on with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openlm_lite import dist
from openlm_lite.data.tokenizer import Tokenizer, load_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.eval.icl import Record, SuiteResult, SuiteSettings, _own_batches, run_suite
from openlm_lite.eval.journal import FolderJournal
from openlm_lite.eval.model_scorer import ModelScorer, _scores
from openlm_lite.eval.prompts import Example, examples, find_data, read_data
from openlm_lite.eval.scorer import Choice, ChoiceScore, Question, Scorer, score_all
from openlm_lite.eval.scoring import begins_right, chosen, final_answer, is_tie, perplexity
from openlm_lite.eval.tasks import Task, all_tasks, task_named, tasks_of
from tests.tiny_run import save_with_bos, tiny_config, tiny_model, tiny_tokenizer

# --- against llm-foundry -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def neox(shared_data: Path) -> Tokenizer:
    return load_tokenizer(str(shared_data / "tokenizers" / "gpt-neox-20b-pii.json"))


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "eval" / "golden_prompts.json").read_text())["tasks"]


def as_golden(example: Example) -> list[Any]:
    spans = None if example.spans is None else [list(span) for span in example.spans]
    return [list(example.fewshot_idxs), [seq.tolist() for seq in example.seqs], spans]


def check_prompts(name: str, expected: dict[str, Any], neox: Tokenizer, shared_data: Path) -> None:
    label, _, category = name.partition("/")
    task = task_named(label)
    assert (task.kind, task.shots, task.core) == tuple(
        expected[key] for key in ("type", "num_fewshot", "core")
    )
    path = find_data(task, str(shared_data / "eval"))
    assert path is not None
    data = read_data(task, path)
    assert len(data.categories[category]) == expected["n_rows"]
    found = list(examples(task, data, neox, limit=expected["k"], category=category))
    told = json.dumps([as_golden(example) for example in found])
    for example in expected["examples"]:
        ours = found[example["i"]]
        start = example["fewshot_text"].removesuffix("...")
        assert ours.fewshot_text.startswith(start)
        for i, value in enumerate(example[key] for key in ("fewshot_idxs", "seqs", "spans")):
            assert value is None or as_golden(ours)[i] == value
        assert example.get("gold", ours.gold) == ours.gold
        assert sorted(example.get("aliases", ours.aliases)) == sorted(ours.aliases)
        assert example.get("max_new_tokens", ours.max_new_tokens) == ours.max_new_tokens
    assert hashlib.sha256(told.encode()).hexdigest() == expected["sha256_first_k"]


QUICK = ("jeopardy/science", "aqua_cot", "copa", "winogrande", "bigbench_operators")


@pytest.mark.parametrize("name", QUICK)
def test_prompts_are_llm_foundrys_token_for_token(
    name: str, golden: dict[str, Any], neox: Tokenizer, shared_data: Path
) -> None:
    check_prompts(name, golden[name], neox, shared_data)


@pytest.mark.slow
def test_every_golden_prompt_is_llm_foundrys_token_for_token(
    golden: dict[str, Any], neox: Tokenizer, shared_data: Path
) -> None:
    assert len(golden) == 24
    for name, expected in golden.items():
        check_prompts(name, expected, neox, shared_data)


def test_metrics_are_llm_foundrys(shared_data: Path) -> None:
    golden = json.loads((shared_data / "eval" / "golden_metrics.json").read_text())
    for case in golden["generation_exact_match"]:
        stop, how = case["stopping_criteria"] or [], {"normalize": case["do_normalization"]}
        assert (
            final_answer(case["output"], stop, case["cot_delimiter"], **how) == (case["normalized"])
        )
        right = begins_right(case["output"], case["labels"], stop, case["cot_delimiter"], **how)
        assert right == bool(case["correct"]), case

    mc, lm = golden["mc"], golden["lm"]
    pairs = zip(mc["input_ids"], mc["spans"], strict=True)
    choices = [Choice(ids[:end], start) for ids, (start, end) in pairs]
    logits = torch.tensor(mc["logits"])

    def scores_of(logits: torch.Tensor) -> list[ChoiceScore]:
        rows = [logits[b, start - 1 : end - 1] for b, (start, end) in enumerate(mc["spans"])]
        return _scores(torch.cat(rows), choices)

    scores = scores_of(logits)
    found = [perplexity(score) for score in scores]
    assert found == pytest.approx(mc["perplexity"], rel=1e-6)
    assert [chosen(scores[a:b]) for a, b in mc["groups"]] == mc["selected"]
    for row in (0, 2):
        start, end = mc["spans"][row]
        for at in range(start, end):
            logits[row, at - 1, mc["input_ids"][row][at]] += 50
    assert [int(score.greedy) for score in scores_of(logits)] == lm["result"]


def test_the_task_list_is_dclms(shared_data: Path) -> None:
    manifest = json.loads((shared_data / "eval" / "manifest.json").read_text())
    assert [task.label for task in all_tasks()] == [row["label"] for row in manifest]
    assert len(tasks_of("core")) == 22 and len(tasks_of("extended,copa")) == 53
    for row, task in zip(manifest, all_tasks(), strict=True):
        assert row["uri"] == task.file and row.get("rows", task.rows) == task.rows
        assert (row["cont"] or " ", row["cats"]) == (
            task.continuation_delimiter,
            task.has_categories,
        )
    with pytest.raises(InputError, match="'hellaswg': not known; did you mean hellaswag"):
        tasks_of("core,hellaswg")


# --- a small suite -------------------------------------------------------------------------------

COPA, OPERATORS = task_named("copa"), task_named("bigbench_operators")
GSM8K, WINOGRAD = task_named("gsm8k_cot"), task_named("winograd")
JEOPARDY = task_named("jeopardy")

ROWS: dict[str, list[dict[str, Any]]] = {
    "copa": [
        {"query": f"It was {i} ", "choices": [f"small {i}", "a text", "again"], "gold": i % 3}
        for i in range(9)
    ],
    "bigbench_operators": [
        {"context": f"op {i}", "continuation": " again and"[: 6 + i % 4]} for i in range(13)
    ],
    "winograd": [
        {"context_options": ["A small", "A text"], "continuation": "was trained", "gold": 1}
        for _ in range(3)
    ],
    "jeopardy": [
        {"context": f"C {i}", "continuation": "text", "category": "ab"[i % 3 // 2]}
        for i in range(12)
    ],
    "gsm8k_cot": [
        {"context": f"{i} and {i}", "answer": f"{2 * i}", "chain_of_thought": "sum"}
        for i in range(6)
    ],
}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for label, rows in ROWS.items():
        write_rows(tmp_path / "data", task_named(label), rows)
    return tmp_path / "data"


def write_rows(folder: Path, task: Task, rows: Sequence[Any]) -> Path:
    path = folder / task.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def scorer() -> ModelScorer:
    return ModelScorer(tiny_model(tiny_config(max_seq_len=512)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def run(
    scorer: Scorer, tokenizer: Tokenizer, data_dir: Path, tasks: Sequence[Task], **more: Any
) -> SuiteResult:
    return run_suite(scorer, tokenizer, tasks, str(data_dir), progress=False, **more)


def test_a_suite_scores_every_kind_and_names_what_is_missing(
    scorer: ModelScorer, tokenizer: Tokenizer, data_dir: Path
) -> None:
    tasks = [JEOPARDY, GSM8K, COPA, task_named("squad"), WINOGRAD, OPERATORS]
    result = run(scorer, tokenizer, data_dir, tasks)
    assert list(result.tasks) == ["jeopardy", "gsm8k_cot", "copa", "winograd", "bigbench_operators"]
    assert result.missing == {
        "squad": f"no data: local_data/reading_comprehension/squad.jsonl is not in {data_dir}"
    }
    assert set(result.tasks["jeopardy"].categories) == {"a", "b"}
    # the score of each row by itself
    data = read_data(COPA, str(data_dir / COPA.file))
    right = []
    for example in examples(COPA, data, tokenizer, max_seq_len=512):
        assert example.spans is not None
        pairs = zip(example.seqs, example.spans, strict=True)
        [scores] = score_all(scorer, [[Choice(seq, start) for seq, (start, _) in pairs]])
        right.append(chosen(scores) == example.gold)
    assert result.tasks["copa"].accuracy == pytest.approx(np.mean(right))


def test_categories_weigh_the_same(tokenizer: Tokenizer, data_dir: Path) -> None:
    """8 rows of a, 4 of b: a model that is right in b alone gets one half."""

    class RightInB(ModelScorer):
        def score(self, questions: Sequence[Question]) -> list[list[ChoiceScore]]:
            text = [tokenizer.decode(q[0].tokens) for q in questions]
            in_b = [int(t.rsplit("C ", 1)[1].split("\n")[0]) % 3 == 2 for t in text]
            return [[ChoiceScore(-1.0, 1, right, False)] for right in in_b]

    model = RightInB(tiny_model(tiny_config(max_seq_len=512)))
    result = run(model, tokenizer, data_dir, [JEOPARDY])
    assert result.tasks["jeopardy"].categories == {"a": 0.0, "b": 1.0}
    assert result.tasks["jeopardy"].accuracy == 0.5


def test_a_limit_leaves_the_prompts_as_they_are(tokenizer: Tokenizer, data_dir: Path) -> None:
    data = read_data(OPERATORS, str(data_dir / OPERATORS.file))
    every = list(examples(OPERATORS, data, tokenizer))
    few = list(examples(OPERATORS, data, tokenizer, limit=4))
    assert [as_golden(e) for e in few] == [as_golden(e) for e in every[:4]]
    assert len(every) == 13 and every[0].fewshot_idxs != every[1].fewshot_idxs


def test_what_the_tokenizers_file_begins_with_stands_first_once(
    tokenizer: Tokenizer, data_dir: Path, tmp_path: Path
) -> None:
    with_bos = save_with_bos(tokenizer, tmp_path)
    assert tokenizer.bos_ids == ()
    for task in (COPA, OPERATORS):  # without and with shots
        data = read_data(task, str(data_dir / task.file))
        plain = next(examples(task, data, with_bos))
        framed = next(examples(task, data, with_bos, bos_ids=with_bos.bos_ids))
        assert framed.seqs[0].tolist() == [tokenizer.eot_id, *plain.seqs[0].tolist()]


def test_what_is_too_long_is_cut_on_the_left_and_counted(
    tokenizer: Tokenizer, data_dir: Path
) -> None:
    model = ModelScorer(tiny_model(tiny_config(max_seq_len=20)))
    result = run(model, tokenizer, data_dir, [OPERATORS, GSM8K])
    assert result.tasks["bigbench_operators"].trimmed == 13
    assert result.missing["gsm8k_cot"].endswith("and the model takes 20 with the question")
    data = read_data(OPERATORS, str(data_dir / OPERATORS.file))
    whole = next(examples(OPERATORS, data, tokenizer))
    cut = next(examples(OPERATORS, data, tokenizer, max_seq_len=20))
    assert cut.seqs[0].tolist() == whole.seqs[0][-20:].tolist()
    assert cut.trimmed == len(whole.seqs[0]) - 20


def test_ranks_share_the_batches_and_keep_step_where_they_have_to(
    scorer: ModelScorer, tokenizer: Tokenizer, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Example] = []
    for task in (COPA, OPERATORS):  # with a shared part, and without
        data = read_data(task, str(data_dir / task.file))
        asked += examples(task, data, tokenizer, max_seq_len=512)
    limits = replace(SuiteSettings().batch, sequences=5)
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    for lockstep in (False, True):
        shares = []
        for rank in range(4):
            monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
            either = ModelScorer(scorer.model, lockstep=lockstep)
            shares.append(list(_own_batches(either, False, asked, limits)))
        own = [i for share in shares for indices, is_own in share if is_own for i in indices]
        assert sorted(own) == list(range(len(asked)))
        kinds = [[len(asked[indices[0]].seqs) for indices, _ in share] for share in shares]
        if lockstep:  # as many forward passes everywhere, and of the same kind
            assert all(kind == kinds[0] for kind in kinds)


# --- what must not score -------------------------------------------------------------------------


@pytest.mark.parametrize("task", [COPA, OPERATORS, WINOGRAD, GSM8K], ids=lambda task: task.kind)
def test_a_constant_model_has_no_score(task: Task, tokenizer: Tokenizer, data_dir: Path) -> None:
    rows = [{**row, "gold": 0} if "gold" in row else row for row in ROWS[task.label]]
    write_rows(data_dir, task, rows)
    model = tiny_model(tiny_config(max_seq_len=512))
    torch.nn.init.zeros_(model.output.weight)
    result = run(ModelScorer(model), tokenizer, data_dir, [task])
    found = result.tasks[task.label]
    assert found.accuracy is None and result.accuracies == {}
    assert found.problem is not None
    assert "does not tell them apart" in found.problem or "all the same" in found.problem


@pytest.mark.parametrize("task", [COPA, OPERATORS, GSM8K], ids=lambda task: task.kind)
def test_logits_that_are_not_finite_have_no_score(
    task: Task, tokenizer: Tokenizer, data_dir: Path
) -> None:
    model = tiny_model(tiny_config(max_seq_len=512))
    torch.nn.init.constant_(model.output.weight, float("nan"))
    found = run(ModelScorer(model), tokenizer, data_dir, [task]).tasks[task.label]
    assert found.accuracy is None and found.problem is not None
    assert "not finite" in found.problem and "first in row" in found.problem


def test_equal_choices_are_no_tie_and_unequal_ones_are() -> None:
    best, other = ChoiceScore(-2.0, 2, False, False), ChoiceScore(-9.0, 3, False, False)
    assert not is_tie([other, best, best], [b"a", b"b", b"b"])
    assert is_tie([other, best, best], [b"a", b"b", b"c"])
    assert not is_tie([best, other], [b"a", b"b"])
    assert chosen([other, best, best]) == 1


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        (COPA, "{", r"task copa: .*copa.jsonl, row 10: not JSON"),
        (COPA, [1], "row 10: holds a list, must hold an object"),
        (COPA, {"query": "q", "choices": ["a", "b"]}, "row 10: has no 'gold'; it needs query, ch"),
        (COPA, {"query": "q", "choices": ["a", "b"], "gold": 2}, "gold = 2, must be from 0 to 1"),
        (COPA, {"query": "q", "choices": ["a", " "], "gold": 0}, "choices has no text: an empty"),
        (COPA, {"query": "q", "choices": "ab", "gold": 0}, "choices = 'ab', must be texts"),
        (COPA, {"query": 3, "choices": ["a", "b"], "gold": 0}, "query = 3, must be text"),
        (OPERATORS, {"context": "c", "continuation": " "}, "row 14: continuation has no text"),
        (JEOPARDY, {"context": "c", "continuation": "d"}, "row 13: has no 'category'"),
        (GSM8K, {"context": "c", "answer": "1", "aliases": "2"}, "aliases = '2', must be a list"),
        (WINOGRAD, {"context_options": ["a"], "continuation": "b", "gold": 0}, "has 1 entries"),
    ],
)
def test_a_malformed_row_is_told_with_task_and_row(
    task: Task, row: Any, told: str, data_dir: Path, scorer: ModelScorer, tokenizer: Tokenizer
) -> None:
    path = write_rows(data_dir, task, ROWS[task.label])
    with path.open("a") as f:
        f.write(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(InputError, match=told):
        run(scorer, tokenizer, data_dir, [OPERATORS, task] if task != OPERATORS else [task])


def test_a_question_without_a_token_before_the_answer_is_told_before_any_task_is_asked(
    scorer: ModelScorer, tokenizer: Tokenizer, data_dir: Path
) -> None:
    write_rows(data_dir, COPA, [{"query": " ", "choices": ["a", "b"], "gold": 0}])
    counting = Counting(scorer)
    with pytest.raises(InputError, match=r"task copa, row 0 \(from 0\), choice 0: there is no tok"):
        run(counting, tokenizer, data_dir, [OPERATORS, COPA])
    assert counting.asked == 0
    # behind shots an empty question has tokens before its answer
    write_rows(data_dir, OPERATORS, [{"context": " ", "continuation": " and"}] * 3)
    assert "bigbench_operators" in run(scorer, tokenizer, data_dir, [OPERATORS]).tasks


def test_a_folder_without_any_of_the_data_is_refused(
    scorer: ModelScorer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"holds none of local_data/.*copa.jsonl; give the folder"):
        run(scorer, tokenizer, tmp_path, [COPA])


# --- going on ------------------------------------------------------------------------------------


class BrokenDownError(Exception):
    pass


class Counting(ModelScorer):
    """Counts the questions that it is asked, and breaks down at a batch."""

    def __init__(self, scorer: ModelScorer, at: int = -1) -> None:
        super().__init__(scorer.model)
        self.asked, self.batches, self.at = 0, 0, at

    def score(self, questions: Sequence[Question]) -> list[list[ChoiceScore]]:
        self.batches += 1
        if self.batches == self.at:
            raise BrokenDownError
        self.asked += len(questions)
        return super().score(questions)


def small_batches() -> SuiteSettings:
    settings = SuiteSettings()
    return replace(settings, batch=replace(settings.batch, sequences=6))


def test_an_interrupted_suite_goes_on_with_the_rows_that_are_left(
    scorer: ModelScorer, tokenizer: Tokenizer, data_dir: Path, tmp_path: Path
) -> None:
    tasks, identity = [COPA, OPERATORS], {"model": "m"}
    out, settings = str(tmp_path / "out"), small_batches()
    broken = Counting(scorer, at=4)
    with FolderJournal(out, identity) as journal, pytest.raises(BrokenDownError):
        run(broken, tokenizer, data_dir, tasks, settings=settings, journal=journal)
    assert broken.asked > 0
    with (tmp_path / "out" / "records" / "copa.0.jsonl").open("a") as f:
        f.write('\n{"wording": "')  # as a kill leaves it
    rest = Counting(scorer)
    with FolderJournal(out, identity) as journal:
        result = run(rest, tokenizer, data_dir, tasks, settings=settings, journal=journal)
    assert broken.asked + rest.asked == 22
    again = Counting(scorer)
    with FolderJournal(out, identity) as journal:
        same = run(again, tokenizer, data_dir, tasks, settings=settings, journal=journal)
    assert again.asked == 0
    direct = run(scorer, tokenizer, data_dir, tasks, settings=settings)
    assert result.accuracies == same.accuracies == direct.accuracies


def test_records_of_other_data_are_not_taken(
    scorer: ModelScorer, tokenizer: Tokenizer, data_dir: Path, tmp_path: Path
) -> None:
    for rows in (ROWS["copa"], ROWS["copa"][::-1]):
        write_rows(data_dir, COPA, rows)
        counting = Counting(scorer)
        with FolderJournal(str(tmp_path / "out"), {}) as journal:
            run(counting, tokenizer, data_dir, [COPA], journal=journal)
        assert counting.asked == 9


def test_a_larger_limit_asks_only_the_rows_that_are_new(
    scorer: ModelScorer, tokenizer: Tokenizer, data_dir: Path, tmp_path: Path
) -> None:
    asked = []
    for limit in (4, 7, 2, None):
        counting = Counting(scorer)
        with FolderJournal(str(tmp_path / "out"), {}) as journal:
            result = run(
                counting,
                tokenizer,
                data_dir,
                [OPERATORS],
                settings=SuiteSettings(limit=limit),
                journal=journal,
            )
        asked.append(counting.asked)
        assert result.tasks["bigbench_operators"].rows == (limit or 13)
    assert asked == [4, 3, 0, 6]


def test_a_folder_is_claimed_once_by_one_journal(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with FolderJournal(out, {"model": "a"}, {"aiw": {"seed": 0}}) as journal:
        journal.claim()
        journal.claim()
        with FolderJournal(out, {"model": "a"}) as other:
            for _ in range(2):
                with pytest.raises(InputError, match="another evaluation works there"):
                    other.claim()
    (tmp_path / "out" / "result.json").write_text("[]")
    with FolderJournal(out, {"model": "a"}) as other, pytest.raises(InputError, match="not ours"):
        other.claim()


def test_one_folder_is_for_one_model_and_one_process_at_a_time(
    data_dir: Path, tmp_path: Path
) -> None:
    out, data = str(tmp_path / "out"), read_data(COPA, str(data_dir / COPA.file))
    with FolderJournal(out, {"model": "a"}) as first:
        first.load(COPA, data)
        with (
            FolderJournal(out, {"model": "a"}) as second,
            pytest.raises(InputError, match="another evaluation works there"),
        ):
            second.load(COPA, data)
    with (
        FolderJournal(out, {"model": "b"}) as third,
        pytest.raises(InputError, match="holds an evaluation with model = 'a', this one has 'b'"),
    ):
        third.load(COPA, data)
    shutil.rmtree(out)
    with FolderJournal(out, {"model": "b"}) as fourth:
        assert fourth.load(COPA, data) == {}
        fourth.add(COPA, [Record("", 3, True, False, True, [-1.0], [1])])
        assert fourth.load(COPA, data)["", 3].right
