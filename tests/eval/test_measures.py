"""What `openlm eval` measures besides DCLM's tasks, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openlm_lite.cli import main
from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError
from openlm_lite.eval.measures import Words, metrics_of, words_of
from openlm_lite.eval.perplexity import PerplexityConfig, measure
from openlm_lite.model.transformer import Transformer
from tests.tiny_run import TEXT, save_tiny_run, tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(tiny_config(max_seq_len=192))


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any, model: Transformer, tokenizer: Tokenizer) -> Path:
    folder = save_tiny_run(tmp_path_factory.mktemp("measures") / "run", model, tokenizer)
    (folder / "held.txt").write_text(TEXT * 4)
    return folder


def test_the_words_of_a_suite_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openlm_lite.eval.measures.require_lm_eval", lambda: None)
    words = words_of("copa, aiw,lm-eval:hellaswag,arc_easy")
    assert [task.label for task in words.tasks] == ["copa"]
    assert words.aiw and words.harness == ("hellaswag", "arc_easy")
    assert words_of("aiw") == Words((), True, ())
    assert words_of("lm-eval:piqa").harness == ("piqa",)
    for wrong in ("", ",", "lm-eval:", "copa,lm-eval:a,,b"):
        with pytest.raises(InputError, match="an empty name"):
            words_of(wrong)
    with pytest.raises(InputError, match="did you mean copa"):
        words_of("cope,aiw")


def test_the_command_prints_text_losses_and_aiw_and_agrees_with_its_json(
    run: Path, model: Transformer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(run), "--perplexity", f"held={run}/held.txt", "--stride", "50"]
    words += ["--bootstrap", "100", "--suite", "aiw", "--aiw-trials", "0", "--device", "cpu"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    cfg = PerplexityConfig(stride=50, bootstrap=100)
    expected = measure(model, tokenizer, f"{run}/held.txt", cfg)
    held = found["texts"]["held"]
    assert held["loss"] == pytest.approx(expected.loss, abs=1e-6)
    assert f"held: loss {expected.loss:.4f}" in shown
    assert f"bits per byte {expected.bits_per_byte:.4f}" in shown
    assert "aiw, by likelihood, percent of 26 questions" in shown
    assert found["settings"]["aiw"]["trials"] == 0
    assert "task " not in shown  # no table of DCLM's tasks where none was asked
    metrics = metrics_of(found | {"suite": None})
    assert metrics["val/held/loss"] == held["loss"]
    right = found["aiw"]["likelihood"]["right"]
    assert metrics["eval/aiw/likelihood_right"] == right["right"] / right["trials"]


def test_scores_of_lm_eval_are_metrics_but_errors_and_versions_are_none() -> None:
    values = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm,custom": 0.25, "version": 1.0, "rows": 3}
    found = {"lm_eval": {"lm_eval_version": "0.4.9", "tasks": {"piqa": values}}}
    assert metrics_of(found) == {
        "eval/lm-eval/piqa/acc": 0.5,
        "eval/lm-eval/piqa/acc_norm,custom": 0.25,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "an evaluation needs --suite"),
        (["--suite", "copa"], "needs --data, the folder that holds local_data/, for copa"),
        (["--suite", "copa", "--aiw-trials", "3"], "--aiw-trials: not with a suite without aiw"),
        (["--suite", "aiw", "--stride", "3"], "--stride: not with an evaluation without"),
        (["--suite", "aiw", "--aiw-form", "thinking"], "holds no aiw/prompts.json"),
        (["--perplexity", "none.txt"], "none.txt"),
        (["--perplexity", "a=b", "a=c"], "a is given twice"),
        (["--perplexity", "a="], "must be PATH or NAME=PATH"),
        (["--suite", "aiw", "--aiw-trials", "-1"], "trials and drawn must not be negative"),
    ],
)
def test_words_that_do_not_belong_together_are_refused(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_an_absent_lm_eval_is_told_before_the_model_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", "no_such_model", "--suite", "lm-eval:piqa"]) == 2
    assert 'pip install "openlm-lite[lm-eval]"' in capsys.readouterr().err
