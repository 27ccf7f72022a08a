"""What real runs read: at any number of ranks, of several sources, around bad shards."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from openlm_lite import cli
from openlm_lite.data.sources import check_same_data, data_facts, open_sources, open_stream
from openlm_lite.errors import InputError
from openlm_lite.log import read_metrics
from openlm_lite.run import load_run
from tests.train_server import TrainServer


def trained(run: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run / "metrics.jsonl") if "train/loss" in r]


def checksums(run: Path) -> list[int]:
    return [record["data/checksum"] for record in trained(run)]


def run_with(server: TrainServer, *words: str, world: int = 1, **more: Any) -> list[int]:
    return server.train(*words, world=world, **more)["codes"]


@pytest.fixture(scope="module")
def whole(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_with(train_server, str(toy_recipe), f"run.dir={run}") == [0]
    return run


def test_a_run_stopped_and_resumed_on_other_numbers_of_ranks_reads_the_same_batches(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, whole: Path
) -> None:
    words = [str(toy_recipe), f"run.dir={tmp_path / 'r'}", "micro_batch_size=2"]
    events = train_server.train(*words, f"run.dir={tmp_path / 'count'}")["events"][0]
    seen: list[int] = []
    for world, event in ((2, events // 4), (1, events * 2 // 5)):
        codes = run_with(train_server, *words, world=world, kill=(0, event))
        assert codes[0] == -signal.SIGKILL
        seen.append(len(checksums(tmp_path / "r")))
    assert 4 <= seen[0] < seen[1] < 12
    assert run_with(train_server, *words, world=4) == [0] * 4
    assert checksums(tmp_path / "r") == checksums(whole)
    assert len(set(checksums(whole))) == 12


def test_inspect_shows_the_checksum_of_what_a_step_read(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(whole), "--step", "7", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["data/checksum"] == checksums(whole)[7]
    assert {row["source"] for row in shown["rows"]} == {"train"}


def test_inspect_shows_the_rows_of_a_recipe_before_it_has_begun_and_says_what_else_to_name(
    toy_recipe: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*words: str) -> dict[str, Any]:
        assert cli.main(["inspect", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = shown(str(toy_recipe), "--step", "7")
    assert found["data/checksum"] == checksums(whole)[7]
    ids = tmp_path / "data"  # no tokenizer beside the shards, as beside OpenLM's
    shutil.copytree(toy_recipe.parent / "data" / "train", ids)
    (ids / "tokenizer.json").unlink()
    recipe = tmp_path / "ids.yaml"
    recipe.write_text(toy_recipe.read_text().replace(f"{toy_recipe.parent}/data/train", str(ids)))
    assert all("ids" in row for row in shown(str(recipe), "--step", "7")["rows"])
    words = ("--step", "7", "--tokenizer", str(toy_recipe.parent / "data" / "train"))
    assert shown(str(recipe), *words)["rows"] == found["rows"]
    for path, more, message in (
        (toy_recipe, ["--step", "12"], "has the steps 0 to 11"),
        (tmp_path, ["--step", "1"], "needs a run folder, whose config.yaml .* or a recipe"),
        (whole, ["--tokenizer", "x"], "--tokenizer x: goes with --step"),
        (toy_recipe.parent / "data", [], "holds the datasets train, val; name one"),
    ):
        assert cli.main(["inspect", str(path), *more]) == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.fixture
def mixture(toy_recipe: Path, tmp_path: Path) -> list[str]:
    """Words that make the toy run read two sources, one of them above its size."""
    data = toy_recipe.parent / "data"
    recipe = tmp_path / "mixture.yaml"
    text = toy_recipe.read_text()
    sources = (
        f"sources: {{big: {{path: {data}/train, weight: 0.75}}, "
        f"small: {{path: {data}/val, weight: 0.25}}}}, "
        "curriculum: {cooldown: {from_tokens: 2048, weights: {big: 1, small: 1}}}"
    )
    recipe.write_text(text.replace(f"train: {data}/train", sources))
    return [str(recipe), "eval.every_steps=0"]


def test_a_mixture_holds_its_weights_through_a_curriculum_and_logs_each_source(
    train_server: TrainServer, mixture: list[str], tmp_path: Path
) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    assert run_with(train_server, *mixture, f"run.dir={runs[0]}") == [0]
    assert run_with(train_server, *mixture, f"run.dir={runs[1]}", world=2) == [0, 0]
    one, two = (trained(run) for run in runs)
    for step, (a, b) in enumerate(zip(one, two, strict=True), start=1):
        tokens = 256 * step
        small = min(tokens, 2048) * 0.25 + max(0, tokens - 2048) * 0.5
        assert a["data/small/tokens"] == small
        assert a["data/big/tokens"] == tokens - small
        assert a["data/small/epoch"] > 0
        assert a["data/checksum"] == b["data/checksum"]
        share = 0.25 if step <= 8 else 0.5
        mean = (1 - share) * a["train/big/loss"] + share * a["train/small/loss"]
        assert mean == pytest.approx(a["train/loss"], rel=1e-5)
        for name in ("train/loss", "train/big/loss", "train/small/loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
    said = (runs[0] / "log.txt").read_text()
    assert "from token 0: big 0.75, small 0.25" in said
    assert "from token 2048: big 0.5, small 0.5" in said


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def damaged(toy_recipe: Path, tmp_path: Path) -> list[str]:
    """Words that make the toy run read a copy of its data with a flipped bit in one shard."""
    shutil.copytree(toy_recipe.parent / "data" / "train", tmp_path / "data")
    damage(tmp_path / "data" / "shard-000001.tar")
    return [str(toy_recipe), f"data.train={tmp_path / 'data'}", f"run.dir={tmp_path / 'run'}"]


def test_a_bad_shard_ends_a_run_with_its_name(
    train_server: TrainServer, damaged: list[str], tmp_path: Path
) -> None:
    assert run_with(train_server, *damaged) == [2]
    assert "shard-000001.tar: damaged" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bad_shards_up_to_the_limit_are_left_out_and_told(
    train_server: TrainServer, damaged: list[str], tmp_path: Path, world: int
) -> None:
    words = [*damaged, "data.max_bad_shards=1"]
    assert run_with(train_server, *words, world=world) == [0] * world
    said = (tmp_path / "run" / "log.txt").read_text()
    assert said.count("left out:") == 1 and "shard-000001.tar" in said
    commits = sorted((tmp_path / "run" / "checkpoints").glob("step_*/COMMIT.json"))
    ((source, shard, message),) = json.loads(commits[-1].read_text())["facts"]["bad_shards"]
    assert (source, shard) == ("train", 1) and "damaged" in message


def test_the_bad_shards_of_all_ranks_together_are_held_against_the_limit(
    train_server: TrainServer, damaged: list[str], tmp_path: Path
) -> None:
    """Each rank reads a lane of its own, with one bad shard: within the limit for either."""
    damage(tmp_path / "data" / "shard-000000.tar")
    words = [*damaged, "data.max_bad_shards=1", "data.lanes=2", "total_steps=40"]
    said = tmp_path / "said.txt"
    assert run_with(train_server, *words, world=2, log=said) == [2, 2]
    (message,) = [
        line for line in said.read_text().splitlines() if line.startswith("openlm: 2 shards")
    ]
    assert "are bad, more than data.max_bad_shards = 1" in message
    assert said.read_text().count("left out:") <= 1
    for name in ("shard-000000.tar", "shard-000001.tar"):
        assert name in said.read_text()


def test_a_change_of_the_lanes_is_refused_with_the_old_number(toy_recipe: Path) -> None:
    cfg = load_run(str(toy_recipe))
    datasets, _ = open_sources(cfg.data, cfg.model.vocab_size)
    stream = open_stream(cfg.data, datasets, total_tokens=1)
    facts = data_facts(stream)
    check_same_data(facts, stream)
    facts["data"]["train"]["lanes"] = 3
    with pytest.raises(InputError, match=r"data/train: .*in 3 lanes, now in 1; set data.lanes=3"):
        check_same_data(facts, stream)


def test_documents_kept_apart_train_alike_on_one_and_two_ranks(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, whole: Path
) -> None:
    words = [str(toy_recipe), "data.document_masking=true", "data.loss_mask_ids=[5]"]
    for world in (1, 2):
        run = tmp_path / str(world)
        assert run_with(train_server, *words, f"run.dir={run}", world=world) == [0] * world
    one, two = ([r["train/loss"] for r in trained(tmp_path / n)] for n in "12")
    assert one == pytest.approx(two, rel=1e-6)
    assert one != [r["train/loss"] for r in trained(whole)]
    assert checksums(tmp_path / "1") == checksums(whole)  # the same rows, otherwise read
