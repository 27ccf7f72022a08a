"""Tasks along a training run: the scores of the model, and not a bit of it changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from openlm_lite.cli import main
from openlm_lite.data.tokenizer import load_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.eval.during import TaskEval, TaskEvalConfig
from openlm_lite.eval.measures import metrics_of
from openlm_lite.eval.tasks import task_named
from openlm_lite.log import read_metrics
from tests.test_train import losses, same_weights
from tests.tiny_run import (
    save_tiny_run,
    save_with_bos,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from tests.train_server import TrainServer

SUITE = "copa,openbook_qa,lambada_openai,triviaqa_sm_sub"
"""two that compare choices, one of log-likelihoods, one of generated text"""


@pytest.fixture(scope="module")
def data(toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small tasks in DCLM's layout, a text, and the run's tokenizer with a beginning of text."""
    folder = tmp_path_factory.mktemp("tasks")
    choices: list[dict[str, Any]] = [
        {"query": f"bad cab {i} de", "choices": ["fig ace", "jade", "a bead"], "gold": i % 3}
        for i in range(9)
    ]
    letters = [{"context": f"bad cab {i} de", "continuation": "abcdefghij"[i]} for i in range(10)]
    answers = [{"context": f"bad {i}", "answer": "abcdefghij"[i]} for i in range(10)]
    for label, rows in zip(SUITE.split(","), (choices, choices, letters, answers), strict=True):
        path = folder / task_named(label).file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.txt").write_text("bad cab fig ace jade " * 40)
    save_with_bos(load_tokenizer(f"{toy_recipe.parent}/data/train"), folder)
    return folder


def words(data: Path) -> list[str]:
    return [
        "model.max_seq_len=192",  # the questions of AIW are longer than the rows that are trained
        "eval.every_steps=0",
        "total_steps=8",
        "averages={ema: {kind: ema, decay: 0.5}}",
        f"eval.tasks.suite={SUITE},aiw",
        f"eval.tasks.data={data}",
        f"eval.tasks.tokenizer={data}",
        "eval.tasks.batch_size=4",  # fewer batches of a kind than ranks, or an odd number
        f"eval.tasks.texts={{held: {data}/held_out.txt}}",
        "eval.tasks.every_steps=5",
        "eval.tasks.aiw={trials: 2, drawn: 1, max_new_tokens: 4}",
        "eval.tasks.perplexity.bootstrap=0",
    ]


def scores(run: Path) -> dict[int, dict[str, float]]:
    """step -> what was measured of tasks and texts."""
    found: dict[int, dict[str, float]] = {}
    for record in read_metrics(run / "metrics.jsonl"):
        values = {k: v for k, v in record.items() if k.startswith(("eval/", "val/held"))}
        if values:
            found.setdefault(record["step"], {}).update(values)
    return found


NAMES = {f"eval/{label}/accuracy" for label in SUITE.split(",")} | {
    "eval/aiw/rate", "eval/aiw/lowest", "eval/aiw/highest", "eval/aiw/drawn",
    "eval/aiw/likelihood_right", "eval/aiw/likelihood_over_m", "val/held/loss",
    "val/held/bits_per_byte",
}  # fmt: skip


def of_average(name: str) -> str:
    head, _, tail = name.rpartition("/")
    return f"{head}/ema/{tail}"


@pytest.fixture(scope="module")
def runs(
    train_server: TrainServer, toy_recipe: Path, data: Path, tmp_path_factory: Any
) -> tuple[Path, Path]:
    """On two ranks under FSDP2, with tasks and without."""
    root = tmp_path_factory.mktemp("runs")
    both = words(data)
    without = [word for word in both if not word.startswith("eval.tasks.")]
    for name, given in (("with", both), ("without", without)):
        done = train_server.train(str(toy_recipe), *given, f"run.dir={root / name}", world=2)
        assert done["codes"] == [0, 0]
    return root / "with", root / "without"


def test_tasks_along_a_run_change_no_loss_and_no_weight(runs: tuple[Path, Path]) -> None:
    measured, plain = runs
    assert scores(plain) == {}
    assert losses(measured) == losses(plain) and len(losses(plain)) == 8
    assert same_weights(measured, plain)


def test_weights_and_averages_are_measured_when_the_run_says_and_after_the_end(
    runs: tuple[Path, Path],
) -> None:
    found = scores(runs[0])
    assert list(found) == [5, 8]
    for values in found.values():
        assert set(values) == NAMES | {of_average(name) for name in NAMES}
    assert found[5]["val/held/loss"] != found[5]["val/held/ema/loss"]
    assert found[5]["val/held/loss"] > found[8]["val/held/loss"]


@pytest.mark.parametrize("average", [None, "ema"])
def test_the_scores_of_a_run_are_those_of_its_checkpoint(
    runs: tuple[Path, Path], data: Path, average: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(runs[0]), "--suite", f"{SUITE},aiw", "--data", str(data)]
    command += ["--perplexity", f"held={data}/held_out.txt", "--tokenizer", str(data), "--json"]
    command += ["--bootstrap", "0", "--aiw-trials", "2", "--aiw-drawn", "1", "--device", "cpu"]
    command += ["--average", average] if average else []
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    there = scores(runs[0])[8]

    def seen(name: str) -> float:
        return there[of_average(name) if average else name]

    texts, likelihood = found["texts"]["held"], found["aiw"]["likelihood"]
    assert seen("val/held/loss") == pytest.approx(texts["loss"], abs=1e-5)
    assert seen("val/held/bits_per_byte") == pytest.approx(texts["bits_per_byte"], abs=1e-5)
    assert seen("eval/aiw/likelihood_right") == likelihood["right"]["rate"]
    for label in SUITE.split(","):
        assert seen(f"eval/{label}/accuracy") == found["tasks"][label]["accuracy"]


def test_prompts_begin_alike_along_a_run_and_of_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what the tokenizer's file wants before a text, or, where so asked, without."""
    save_with_bos(tiny_tokenizer(), tmp_path)
    model = tiny_model(tiny_config())
    run = save_tiny_run(tmp_path / "run", model, None)
    words = [" small", " text", " model", " again", " it"]
    rows = [{"query": f"A {i}", "choices": words, "gold": i * i % 5} for i in range(80)]
    path = tmp_path / task_named("copa").file
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"suite": "copa", "data": str(tmp_path), "tokenizer": str(tmp_path)}
    command = ["eval", str(run), "--device", "cpu", "--json"]
    command += [word for name, value in given.items() for word in (f"--{name}", value)]
    accuracies = []
    for bos, flags in ((True, []), (False, ["--no-bos"])):
        cfg = TaskEvalConfig(**given) if bos else TaskEvalConfig(**given, bos=False)
        along = TaskEval(cfg, model.cfg, "", ())
        found = metrics_of(along.measure(model, torch.float32, lambda: None))
        assert main([*command, *flags]) == 0
        accuracy = json.loads(capsys.readouterr().out)["tasks"]["copa"]["accuracy"]
        assert found["eval/copa/accuracy"] == accuracy
        accuracies.append(accuracy)
    assert accuracies[0] != accuracies[1]


@pytest.mark.parametrize(
    ("every_steps", "every_tokens", "steps"),
    [(4, 0, [4, 8, 10]), (0, 700, [3, 6, 9, 10]), (0, 0, [10]), (5, 700, [3, 5, 6, 9, 10])],
)
def test_tasks_come_by_steps_by_tokens_and_at_the_end(
    data: Path, every_steps: int, every_tokens: int, steps: list[int], toy_recipe: Path
) -> None:
    cfg = TaskEvalConfig(
        texts={"held": f"{data}/held_out.txt"}, every_steps=every_steps, every_tokens=every_tokens
    )
    tasks = TaskEval(cfg, tiny_config(), f"{toy_recipe.parent}/data/train", ())
    due = [s for s in range(1, 11) if tasks.due(s, 256 * (s - 1), 256 * s, s == 10)]
    assert due == steps


def test_mistakes_in_eval_tasks_are_told_before_the_run_has_a_folder(
    toy_recipe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def refused(message: str, *changes: str) -> None:
        assert main(["train", str(toy_recipe), *words(data), *changes, f"run.dir={run}"]) == 2
        assert message in capsys.readouterr().err
        assert not run.exists()

    refused("did you mean copa", "eval.tasks.suite=cope")
    refused("holds none of local_data/commonsense_reasoning/copa.jsonl",
            "eval.tasks.suite=copa", f"eval.tasks.data={tmp_path}")  # fmt: skip
    refused("eval.tasks: texts.toy: the name is that of a source",
            f"eval.tasks.texts={{toy: {data}/held_out.txt}}")  # fmt: skip
    refused("none.txt", "eval.tasks.texts={a: none.txt}")
    refused("max_seq_len = 64", "model.max_seq_len=64")
    refused("aiw: temperature = 0", "eval.tasks.aiw.temperature=0")
    refused("aiw: top_p = 2.0, must be above 0", "eval.tasks.aiw.top_p=2.0")
    refused("seq_len = 500 is longer than the model's max_seq_len = 192",
            "eval.tasks.perplexity.seq_len=500")  # fmt: skip
    (data / "bare.jsonl").write_text('{"words": "bad cab"}\n')
    refused("no field 'text'; it has", f"eval.tasks.texts={{bare: {data}/bare.jsonl}}")
    odd = tmp_path / "odd"
    shutil.copytree(data / "local_data", odd / "local_data")
    with (odd / task_named("copa").file).open("a") as f:
        f.write('{"query": " ", "choices": ["a", "b"], "gold": 0}\n')
    refused("task copa, row 9 (from 0), choice 0: there is no token before the answer",
            f"eval.tasks.data={odd}", "eval.tasks.bos=false")  # fmt: skip
    (odd / task_named("copa").file).write_text('{"query": "a"}\n')
    refused("copa.jsonl, row 1: has no 'choices'", f"eval.tasks.data={odd}")
    refused("every_steps = -1", "eval.tasks.every_steps=-1")
    refused("no such file", "eval.tasks.tokenizer=none.json")
    refused("eval.tasks: with parallel.tp = 2", "parallel.tp=2")


def test_a_file_of_a_task_that_is_damaged_on_the_way_does_not_end_the_run(
    toy_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data / "local_data", tmp_path / "local_data")
    measure = TaskEval.measure

    def damaged(*args: Any) -> Any:
        (tmp_path / task_named("copa").file).write_text("{")
        return measure(*args)

    monkeypatch.setattr(TaskEval, "measure", damaged)
    run = tmp_path / "run"
    given = ["eval.tasks.suite=copa", f"eval.tasks.data={tmp_path}", f"run.dir={run}"]
    assert main(["train", str(toy_recipe), *given, "averages={}"]) == 0
    assert scores(run) == {} and len(losses(run)) == 12
    assert "step 12: no scores: task copa" in (run / "log.txt").read_text()


def test_tokenizers_that_do_not_fit_are_named(data: Path, toy_recipe: Path, tmp_path: Path) -> None:
    cfg = TaskEvalConfig(texts={"held": f"{data}/held_out.txt"})
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        TaskEval(cfg, tiny_config(), str(tmp_path), ())
    with pytest.raises(InputError, match="has 300 ids, the model 280"):
        TaskEval(cfg, tiny_config(vocab_size=280), f"{toy_recipe.parent}/data/train", ())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "changes"),
    [(2, ["parallel.precision=bf16"]), (1, ["parallel.compile=true"])],
)
def test_bf16_under_fsdp_and_compiled_blocks_do_not_notice_tasks_either(
    train_server: TrainServer,
    toy_recipe: Path,
    data: Path,
    tmp_path: Path,
    world: int,
    changes: list[str],
) -> None:
    both = [*words(data), *changes, "eval.tasks.every_steps=3"]
    for name, given in (
        ("with", both),
        ("without", [word for word in both if not word.startswith("eval.tasks.")]),
    ):
        done = train_server.train(
            str(toy_recipe), *given, f"run.dir={tmp_path / name}", world=world
        )
        assert set(done["codes"]) == {0}
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert same_weights(tmp_path / "with", tmp_path / "without")
    assert set(scores(tmp_path / "with")[3]) >= NAMES
