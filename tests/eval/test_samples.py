"""Samples along a run: what generation gives, at each validation, without a trace in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openlm_lite.errors import InputError
from openlm_lite.eval.generate import generate
from openlm_lite.eval.samples import SampleConfig, Sampler, continuations
from openlm_lite.log import read_metrics
from openlm_lite.recorded import read_run
from openlm_lite.report import facts
from tests.tiny_run import tiny_config, tiny_model, tiny_tokenizer
from tests.train_server import TrainServer

GOLDEN = Path(__file__).parents[1] / "golden" / "toy_losses.txt"


@pytest.mark.parametrize("positions", ["rope", "alibi", "learned"])
def test_continuations_are_those_of_greedy_generation(positions: str) -> None:
    model = tiny_model(tiny_config(positions=positions))
    prompts = [[5, 9, 200], [17], [3, 4, 5, 6, 7, 8, 9]]
    found = continuations(model, prompts, 10, torch.device("cpu"))
    for prompt, ids in zip(prompts, found, strict=True):
        with torch.no_grad():
            assert generate(model, [prompt], max_new_tokens=10) == [ids]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_tokenizer().save(folder)
    return folder


def test_a_text_ends_where_the_document_ends(data: Path) -> None:
    sampler = Sampler(SampleConfig(("A small",), 20), str(data), 64, 320)
    model = tiny_model(tiny_config())
    ((prompt, text),) = sampler.texts(model, torch.device("cpu"))
    assert prompt == "A small" and "<|endoftext|>" not in text
    ids = continuations(model, sampler.ids, 20, torch.device("cpu"))[0]
    eot = sampler.tokenizer.eot_id
    ids = [i for i in ids[: ids.index(eot) if eot in ids else None] if i < 290]
    assert text == sampler.tokenizer.decode(ids)


def test_prompts_that_cannot_be_continued_are_told_before_the_run(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"holds no tokenizer.json to read them with"):
        Sampler(SampleConfig(("a",)), str(tmp_path), 64, 320)
    with pytest.raises(InputError, match=r"must fit into 64 positions, and the ids into 320"):
        Sampler(SampleConfig(("a",), 64), str(data), 64, 320)
    with pytest.raises(InputError, match=r"samples.tokens = 0, must be at least 1"):
        SampleConfig(tokens=0)
    assert Sampler(SampleConfig(), str(tmp_path), 64, 320).ids == []


def test_a_run_keeps_samples_and_trains_the_same_bits(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["eval.samples.prompts=['ab cd', '']", "eval.samples.tokens=8", f"run.dir={run}"]
    assert train_server.train(str(toy_recipe), *words, world=2)["codes"] == [0, 0]
    records = read_metrics(run / "metrics.jsonl")
    found = [(r["step"], r["sample/prompt"]) for r in records if "sample/text" in r]
    assert found == [(step, prompt) for step in (0, 5, 10, 12) for prompt in ("ab cd", "")]
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    golden = [float(line) for line in GOLDEN.read_text().split()]
    assert losses == pytest.approx(golden, rel=1e-5)
    shown = facts.samples(read_run(run, all_records=True))
    assert [sample["step"] for sample in shown[::2]] == ["12", "10", "5", "0"]
    assert "step 12: ab cd" in (run / "log.txt").read_text()
