"""Under lm-evaluation-harness a checkpoint gives what its exported folder gives there."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from openlm_lite import cli
from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError, RunError
from openlm_lite.eval.during import TaskEval, TaskEvalConfig
from openlm_lite.eval.generate import Sampling, generate
from openlm_lite.eval.harness import (
    Requests,
    _plan,
    main,
    model_class,
    open_requests,
    require_lm_eval,
    run_harness,
)
from openlm_lite.eval.model_scorer import ModelScorer
from openlm_lite.eval.perplexity import PerplexityConfig, measure
from openlm_lite.eval.scorer import BatchLimits
from openlm_lite.hf.export import export_checkpoint
from openlm_lite.model.transformer import Transformer
from tests.tiny_run import (
    TEXT,
    save_tiny_run,
    save_with_bos,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)

PAIRS = [
    ("A small", " tokenizer"),
    ("A small", " text, again"),
    ("A small ", "model"),  # the space goes to the continuation
    ("", "again"),
    (TEXT * 3, " was trained"),  # longer than the model: cut on the left
    (TEXT * 3, " it"),
    ("A", " a" * 40),
    ("trained on", "\nünï"),
]
DOCUMENTS = ["again and again, " * 12, "", "A small text"]
CONTEXTS: list[tuple[str, dict[str, Any]]] = [
    ("A small", {"until": ["ag", "\n"], "max_gen_toks": 20}),
    ("for a small model: it", {"until": "zz", "max_gen_toks": 12, "do_sample": False}),
    (TEXT * 3, {"until": [], "max_gen_toks": 8}),
]
WITHOUT = "lm-eval is not installed (pip install 'openlm-lite[lm-eval]')"
# what lm-eval and its dependencies warn of at import is not ours to mend
theirs = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def requests(model: Transformer, tokenizer: Tokenizer) -> Requests:
    return Requests(ModelScorer(model), tokenizer, batch=BatchLimits(sequences=4))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Transformer, tokenizer: Tokenizer) -> Path:
    return save_tiny_run(tmp_path_factory.mktemp("harness") / "run", model, tokenizer)


# --- without lm-eval -----------------------------------------------------------------------------


def test_loglikelihoods_are_sums_over_the_continuation(
    requests: Requests,
    model: Transformer,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for (context, continuation), (loglik, greedy) in zip(
        PAIRS, requests.loglikelihoods(PAIRS), strict=True
    ):
        whole = tokenizer.encode(context + continuation).tolist()
        n_before = len(tokenizer.encode(context.rstrip())) if context else 0
        if not context:
            whole, n_before = [tokenizer.eot_id, *whole], 1
        n_scored = len(whole) - n_before
        tokens = whole[-65:]
        logits = model(torch.tensor([tokens[:-1]]))[0].detach().log_softmax(-1)[-n_scored:]
        wanted = torch.tensor(tokens[-n_scored:])
        assert loglik == pytest.approx(logits.gather(1, wanted[:, None]).sum().item(), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == wanted).all())
    assert "2 of 8 contexts are longer than the model takes" in caplog.text


def test_what_a_text_begins_with_is_read_once_and_scored_never(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Also before a context of spaces alone; and left out where bos is."""
    words = save_with_bos(tokenizer, tmp_path)
    begin = tokenizer.eot_id
    with_bos = Requests(ModelScorer(model), words)
    without = Requests(ModelScorer(model), words, bos=False)
    for context, continuation in (("A small", " text"), (" ", "text"), ("", "again")):
        plain = tokenizer.encode(context + continuation).tolist()
        n_before = len(tokenizer.encode(context.rstrip()))
        assert with_bos._ids_of(context, continuation) == (
            [begin, *plain[:n_before]],
            plain[n_before:],
        )
        before = plain[:n_before] or [begin]  # something has to predict the first token
        assert without._ids_of(context, continuation) == (before, plain[n_before:])
    assert without.encode("A") == with_bos.encode("A")[1:] == tokenizer.encode("A").tolist()


def test_rolling_loglikelihoods_are_those_of_perplexity(
    requests: Requests, model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    found = requests.rolling(DOCUMENTS)
    assert found[1] == 0.0
    for number in (0, 2):
        file = tmp_path / f"{number}.txt"
        file.write_text(DOCUMENTS[number])
        source = measure(model, tokenizer, str(file), PerplexityConfig(bootstrap=0))
        assert found[number] == pytest.approx(-source.loss * source.tokens, abs=1e-4)


def test_texts_are_greedy_ones_up_to_their_stop_strings(
    requests: Requests, model: Transformer, tokenizer: Tokenizer
) -> None:
    for (context, settings), text in zip(CONTEXTS, requests.texts(CONTEXTS), strict=True):
        n = settings["max_gen_toks"]
        ids = tokenizer.encode(context).tolist()[-(64 - n) :]
        [new] = generate(model, [ids], max_new_tokens=n, eot_id=tokenizer.eot_id)
        free = tokenizer.decode(new)
        until = settings["until"]
        for stop in [until] if isinstance(until, str) else until:
            free = free.split(stop)[0]
        assert text == free


def test_generation_settings_are_read_or_refused() -> None:
    plan = _plan({"until": "\n", "do_sample": True, "top_p": 0.9, "max_tokens": 7})
    assert (plan.stop, plan.max_new_tokens) == (("\n",), 7)
    assert plan.sampling == Sampling(temperature=1.0, top_p=0.9)
    assert _plan({"temperature": 0.8, "do_sample": False}).sampling == Sampling()
    assert _plan({"temperature": 0.8}).sampling.temperature == 0.8
    with pytest.raises(InputError, match=r"generation_kwargs: num_beams: not known"):
        _plan({"num_beams": 4})


def test_what_cannot_be_scored_is_named(requests: Requests, tokenizer: Tokenizer) -> None:
    for pair, message in (
        (("A", ""), "request 1: the continuation '' has 0 tokens"),
        (("A", " a" * 70), "has 70 tokens; a model of 64 positions"),
    ):
        with pytest.raises(InputError, match=message):
            requests.loglikelihoods([PAIRS[0], pair])
    with pytest.raises(InputError, match="64 new tokens leave no room"):
        requests.texts([("A", {"max_gen_toks": 64})])
    for value, message in ((float("nan"), "not finite"), (0.0, "the same logit")):
        broken = tiny_model(tiny_config())
        torch.nn.init.constant_(broken.output.weight, value)
        with pytest.raises(RunError, match=message):
            Requests(ModelScorer(broken), tokenizer).loglikelihoods(PAIRS)


def test_an_absent_lm_eval_is_an_error_with_the_install_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model_class.cache_clear()
    for call in (require_lm_eval, model_class):
        with pytest.raises(InputError, match=r'pip install "openlm-lite\[lm-eval\]"'):
            call()
    assert main() == 2
    assert "openlm-lite[lm-eval]" in capsys.readouterr().err


# --- with lm-eval --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval", reason=WITHOUT)


@pytest.fixture(scope="module")
def their_model(run: Path, lm_eval: Any) -> Any:
    """lm-eval's Hugging Face model on the exported folder."""
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    folder = str(run.parent / "hf")
    export_checkpoint(str(run), folder)
    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=3)


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two task files with their data, all on this machine."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "query": f"{i} is a small",
            "choices": [" text", " model", " tokenizer, again"],
            "gold": i % 3,
        }
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/rows.jsonl}}}}
test_split: validation
"""
    (folder / "small_mc.yaml").write_text(
        "task: small_mc\noutput_type: multiple_choice\nfewshot_split: validation\n" + shared +
        'doc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},"
        " {metric: acc_norm, aggregation: mean, higher_is_better: true}]\n"
    )  # fmt: skip
    (folder / "small_ppl.yaml").write_text(
        "task: small_ppl\noutput_type: loglikelihood_rolling\n" + shared +
        'doc_to_text: ""\ndoc_to_target: "{{query}} and {{choices[2]}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n"
    )  # fmt: skip
    return folder


@contextmanager
def offline(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(folder / "cache"))
        yield


@theirs
def test_loglikelihoods_and_texts_equal_lm_evals_hugging_face_path(
    requests: Requests, their_model: Any
) -> None:
    ours = model_class()(requests=requests)
    pairs = instances("loglikelihood", PAIRS)
    for mine, other in zip(
        ours.loglikelihood(pairs), their_model.loglikelihood(pairs), strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]
    rolling = instances("loglikelihood_rolling", [(text,) for text in DOCUMENTS if text])
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        their_model.loglikelihood_rolling(rolling), abs=1e-3
    )
    texts = instances("generate_until", CONTEXTS)
    assert ours.generate_until(texts) == their_model.generate_until(texts)


@theirs
@pytest.mark.parametrize("shots", [None, 2])
def test_local_tasks_score_alike_offline_with_and_without_shots(
    requests: Requests, their_model: Any, tasks: Path, shots: int | None
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ["small_mc", "small_ppl"]
    with offline(tasks):
        ours = run_harness(requests, names, tasks_dir=str(tasks), num_fewshot=shots, limit=9)
        theirs = simple_evaluate(
            model=their_model,
            tasks=list(names),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            num_fewshot=shots,
            limit=9,
            bootstrap_iters=0,
        )
    assert theirs is not None
    for metric in ("acc", "acc_norm"):
        assert ours["tasks"]["small_mc"][metric] == theirs["results"]["small_mc"][f"{metric},none"]
    assert ours["tasks"]["small_ppl"]["bits_per_byte"] == pytest.approx(
        theirs["results"]["small_ppl"]["bits_per_byte,none"], abs=1e-5
    )
    one = ours["tasks"]["small_mc"]
    assert (one["shots"], one["rows"], one["rows_of_task"]) == (shots or 0, 9, 12)
    json.dumps(ours, allow_nan=False)


@theirs
def test_a_task_that_lm_eval_does_not_know_is_told_before_the_model_is_asked(
    run: Path, tasks: Path, lm_eval: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks_eval: dict[str, Any] = {"suite": "lm-eval:small_mc,smal_mc", "data": str(tasks)}
    with offline(tasks):
        with pytest.raises(InputError, match=r"eval.tasks: lm-eval: smal_mc: no such task in"):
            TaskEval(TaskEvalConfig(**tasks_eval), tiny_config(), str(run), ())
        out = tasks / "out"
        words = [f"--{name}={value}" for name, value in tasks_eval.items()]
        assert cli.main(["eval", str(run), *words, "--device", "cpu", "--out", str(out)]) == 2
    assert "smal_mc: no such task" in capsys.readouterr().err
    assert not out.exists()


@theirs
@pytest.mark.slow
def test_lm_evals_own_command_knows_our_checkpoints(
    run: Path, tasks: Path, lm_eval: Any, tmp_path: Path
) -> None:
    words = ["run", "--model", "openlm", "--model_args", f"path={run}", "--tasks", "small_mc"]
    words += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    cache = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "openlm_lite.eval.harness", *words],
        env=os.environ | cache,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [file] = (tmp_path / "out").rglob("results_*.json")
    acc = json.loads(file.read_text())["results"]["small_mc"]["acc,none"]
    opened = open_requests(str(run), None, None, "cpu", 4)
    with offline(tasks):
        ours = run_harness(opened, ["small_mc"], tasks_dir=str(tasks))
        with pytest.raises(InputError, match="no_such_task: no such task in"):
            run_harness(opened, ["no_such_task"], tasks_dir=str(tasks))
    assert acc == ours["tasks"]["small_mc"]["acc"] and math.isfinite(acc)
