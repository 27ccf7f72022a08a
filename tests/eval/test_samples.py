"""Samples along a run: what generation gives, at each validation, without a trace in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openlm_lite.errors import InputError, RunError
from openlm_lite.eval.generate import generate
from openlm_lite.eval.samples import SampleConfig, Sampler
from openlm_lite.log import read_metrics
from openlm_lite.model.transformer import Transformer
from openlm_lite.recorded import read_run
from openlm_lite.report import facts
from tests.tiny_run import tiny_config, tiny_model, tiny_tokenizer
from tests.train_server import TrainServer

GOLDEN = Path(__file__).parents[1] / "golden" / "toy_losses.txt"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_tokenizer().save(folder)
    return folder


def texts(sampler: Sampler, model: Transformer) -> list[tuple[str, str]]:
    return sampler.texts(model, torch.float32, lambda: None)


@pytest.mark.parametrize("positions", ["rope", "alibi", "learned"])
def test_a_text_is_what_greedy_generation_gives_up_to_the_end_of_text(
    data: Path, positions: str
) -> None:
    sampler = Sampler(SampleConfig(("A small", "A", "one, two, three"), 20), str(data), 64, 320)
    model = tiny_model(tiny_config(positions=positions))
    words = sampler.tokenizer
    found = texts(sampler, model)
    assert [prompt for prompt, _ in found] == ["A small", "A", "one, two, three"]
    for ids, (_, text) in zip(sampler.ids, found, strict=True):
        (new,) = generate(model, [ids], max_new_tokens=20, eot_id=words.eot_id)
        assert text == words.decode([i for i in new if i < words.vocab_size])
        assert "<|endoftext|>" not in text


def test_a_model_that_has_diverged_gives_no_text(data: Path) -> None:
    model = tiny_model(tiny_config())
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    with pytest.raises(RunError, match="not finite"):
        texts(Sampler(SampleConfig(("A",), 4), str(data), 64, 320), model)


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
