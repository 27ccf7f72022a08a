"""`openlm eval` from its words to its output."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openlm_lite import cli
from openlm_lite.eval.model_scorer import ModelScorer
from openlm_lite.eval.tasks import task_named
from openlm_lite.hf.export import export_checkpoint
from tests.eval.test_icl import ROWS, write_rows
from tests.run_faults import fault
from tests.tiny_run import save_tiny_run, tiny_config, tiny_model, tiny_tokenizer
from tests.train_server import TrainServer

SUITE = "copa,bigbench_operators,gsm8k_cot,jeopardy,squad"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for label, rows in ROWS.items():
        write_rows(folder, task_named(label), rows)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(tiny_config(max_seq_len=512, norm="rms_norm", qk_norm="none"))
    return save_tiny_run(tmp_path_factory.mktemp("run"), model, tiny_tokenizer())


def openlm(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    code, out, err = openlm(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_checkpoint_is_scored_and_the_result_says_what_repeats_it(
    capsys: pytest.CaptureFixture[str], run_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    words = ("eval", run_folder, "--suite", SUITE, "--data", data_dir, "--limit", 3)
    result = as_json(capsys, *words, "--out", tmp_path / "out")
    assert result["core"] is None and result["extended"] is None
    assert list(result["missing"]) == ["squad"]
    assert result["tasks"]["copa"]["rows"] == 3 and result["tasks"]["jeopardy"]["rows"] == 6
    assert result["model"]["step"] == 7 and len(result["model"]["commit_sha256"]) == 64
    assert result["settings"]["limit"] == 3 and result["settings"]["dtype"] == "float32"
    assert result["settings"]["tokenizer"] == tiny_tokenizer().fingerprint
    assert json.loads((tmp_path / "out" / "result.json").read_text())["tasks"] == result["tasks"]
    code, out, _ = openlm(capsys, *words)
    assert code == 0
    assert "missing: squad: no data: local_data/reading_comprehension/squad.jsonl is not" in out
    assert "first 3 of 9 rows" in out and "19 of its 22 tasks lack: hellaswag_zeros" in out


@pytest.mark.slow  # imports transformers
def test_a_hugging_face_folder_scores_as_the_checkpoint_does(
    capsys: pytest.CaptureFixture[str], run_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """By our model and by transformers' class alike."""
    folder = tmp_path / "hf"
    export_checkpoint(str(run_folder), str(folder))
    words = ("--suite", "copa,bigbench_operators,gsm8k_cot", "--data", data_dir)
    found = []
    for path, backend in ((run_folder, "auto"), (folder, "auto"), (folder, "transformers")):
        out = tmp_path / f"{path.name}-{backend}"
        result = as_json(capsys, "eval", path, *words, "--backend", backend, "--out", out)
        assert result["settings"]["backend"] == (
            "transformers" if backend == "transformers" else "openlm"
        )
        lines = [
            json.loads(line)
            for file in sorted((out / "records").iterdir())
            for line in file.read_text().splitlines()
        ]
        found.append({(r["text"], r["category"], r["index"], len(r["logliks"])): r for r in lines})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, record in found[0].items():
            assert other[key]["logliks"] == pytest.approx(record["logliks"], abs=1e-4)
            assert other[key]["right"] == record["right"]


@pytest.mark.slow
def test_two_ranks_score_as_one(run_folder: Path, data_dir: Path, tmp_path: Path) -> None:
    program = """
import os, sys
from openlm_lite import cli
from openlm_lite.eval import evaluate
base, *words = sys.argv[1:]
def go(rank, world, out):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=base)
    os._exit(cli.main([*words, "--out", out]))
def ranks(world, out):
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            go(rank, world, out)
        pids.append(pid)
    return [os.waitpid(pid, 0)[1] for pid in pids]
print(ranks(2, "two"), ranks(1, "one"))
"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["eval", str(run_folder), "--suite", SUITE, "--data", str(data_dir)]
    words += ["--batch-size", "6", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", program, str(port), *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "[0, 0] [0]" in done.stdout, done.stderr
    two, one = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("two", "one"))
    assert two["settings"]["ranks"] == 2
    for label, task in one["tasks"].items():
        assert two["tasks"][label]["accuracy"] == task["accuracy"], label
    names = {path.name for path in (tmp_path / "two" / "records").iterdir()}
    assert {"copa.0.jsonl", "copa.1.jsonl"} <= names


def records_of(out: Path) -> list[tuple[str, int]]:
    return sorted(
        (file.name.split(".")[0], json.loads(line)["index"])
        for file in (out / "records").iterdir()
        for line in file.read_text().splitlines()
        if line.strip()
    )


@pytest.mark.slow
def test_an_evaluation_goes_on_with_another_number_of_ranks_one_of_which_comes_late(
    capsys: pytest.CaptureFixture[str],
    train_server: TrainServer,
    run_folder: Path,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    """Rank 1 comes to the second task when rank 0 may have written of it."""
    words = [run_folder, "--suite", "copa,bigbench_operators", "--data", data_dir]
    words += ["--batch-size", "6", "--device", "cpu", "--out", tmp_path / "out"]
    alone = as_json(capsys, "eval", *words)
    whole = records_of(tmp_path / "out")
    for file in (tmp_path / "out" / "records").iterdir():
        file.write_text("\n".join(file.read_text().splitlines()[:3]))
    (tmp_path / "out" / "result.json").unlink()
    late = [fault("sleep", 1, "journal", 2)]
    done = train_server.train(*map(str, words), verb="eval", world=2, faults=late)
    assert done["codes"] == [0, 0]
    together = json.loads((tmp_path / "out" / "result.json").read_text())
    assert together["settings"]["ranks"] == 2
    for label, task in alone["tasks"].items():
        assert together["tasks"][label]["accuracy"] == task["accuracy"]
    assert records_of(tmp_path / "out") == whole  # each row was asked once


def test_what_stands_in_a_result_alone_is_not_given_up_for_another_evaluation(
    capsys: pytest.CaptureFixture[str],
    run_folder: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And that is told before the model is asked. AIW has no records, yet holds its folder."""
    out = tmp_path / "out"
    aiw = ("--suite", "aiw", "--aiw-trials", "0", "--aiw-drawn", "1", "--device", "cpu")
    first = as_json(capsys, "eval", run_folder, *aiw, "--out", out)
    assert as_json(capsys, "eval", run_folder, *aiw, "--out", out)["aiw"] == first["aiw"]
    more = (*aiw[:1], "copa,aiw", *aiw[2:], "--data", data_dir, "--out", out)
    both = as_json(capsys, "eval", run_folder, *more)
    assert both["aiw"] == first["aiw"] and list(both["tasks"]) == ["copa"]
    kept = (out / "result.json").read_text()

    monkeypatch.setattr(ModelScorer, "score", None)  # asked nothing
    for words, told in (
        (aiw, "its result.json has copa, and this evaluation, which does not ask for that"),
        ((*more[:-4], "--aiw-seed", 3, *more[-4:]), 'its result.json has aiw with {"form": "base"'),
        ((*more, "--no-bos", "--max-seq-len", "99"), "max_seq_len = 512, this one has 99"),
    ):
        code, _, err = openlm(capsys, "eval", run_folder, *words, "--out", out)
        assert code == 2 and told in err
        assert (out / "result.json").read_text() == kept
    with (out / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = openlm(capsys, "eval", run_folder, *aiw, "--out", out)
        assert code == 2 and "another evaluation works there" in err


def test_means_of_scores_are_printed(
    capsys: pytest.CaptureFixture[str], shared_data: Path, tmp_path: Path
) -> None:
    card = shared_data / "dclm" / "dclm1b_card_scores.json"
    _, out, _ = openlm(capsys, "eval", "--aggregate", card, "--baselines", "v1")
    assert "core                       42.33" in out and "extended                   25.06" in out
    found = as_json(capsys, "eval", "--aggregate", card)
    assert round(found["core"], 2) == 40.54 and found["missing"] == []
    part = tmp_path / "part.json"
    part.write_text('{"copa": 0.7, "mine": 0.1}')
    _, out, _ = openlm(capsys, "eval", "--aggregate", part)
    assert "core                           -  21 of its 22 tasks lack: hellaswag_zeroshot" in out
    assert "counted nowhere, as no tasks of DCLM's: mine" in out


def test_prompts_are_printed_a_row_a_line(
    capsys: pytest.CaptureFixture[str], data_dir: Path, tmp_path: Path
) -> None:
    tiny_tokenizer().save(tmp_path)
    words = ("--data", data_dir, "--tokenizer", tmp_path, "--limit", 2)
    _, out, _ = openlm(capsys, "eval", "--dump-prompts", "jeopardy/b", *words)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["category"], row["i"]) for row in rows] == [("b", 0), ("b", 1)]
    assert rows[0]["text"][0].startswith(rows[0]["fewshot_text"])
    assert rows[0]["spans"][0][1] == len(rows[0]["seqs"][0])
    code, _, err = openlm(capsys, "eval", "--dump-prompts", "jeopardy/c", *words)
    assert code == 2 and "has no category 'c'; it has a, b" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("m", "--suite", "core"), "an evaluation needs --data"),
        (("--suite", "core", "--data", "d"), "an evaluation needs MODEL"),
        (("--aggregate", "s", "--limit", "3"), "--limit: not with --aggregate"),
        (("m", "--table", "r"), "MODEL: not with --table"),
        (("--dump-prompts", "copa", "--data", "d"), "--dump-prompts needs --tokenizer"),
        (("m", "--suite", "core", "--data", "d", "--limit", "0"), "limit = 0: must be at least 1"),
        (("m", "--suite", "core,,copa", "--data", "d"), "--suite 'core,,copa': an empty name"),
        (("m", "--suite", "core", "--data", "/nowhere"), "--data /nowhere: holds none of local_"),
    ],
)
def test_words_that_do_not_go_together_are_told(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = openlm(capsys, "eval", *words)
    assert code == 2 and told in err


def test_a_tokenizer_without_an_end_of_text_is_told(
    capsys: pytest.CaptureFixture[str], data_dir: Path, tmp_path: Path
) -> None:
    tiny_tokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|other|>"))
    (tmp_path / "tokenizer_config.json").unlink()
    words = ("--data", data_dir, "--tokenizer", path)
    code, _, err = openlm(capsys, "eval", "--dump-prompts", "copa", *words)
    assert code == 2 and "which token ends a document? It has none that is known" in err
