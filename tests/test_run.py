"""Shipped recipes and architectures, derived values, `openlm config`."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from openlm_lite import config
from openlm_lite.cli import main
from openlm_lite.derived import derived
from openlm_lite.errors import InputError
from openlm_lite.model.config import ModelConfig
from openlm_lite.optim.schedule import lr_at
from openlm_lite.run import load_model, load_run

RECIPES = sorted(p.stem for p in config.assets("recipes").glob("*.yaml") if p.stem != "ladder")
ARCHITECTURES = sorted(p.stem for p in config.assets("model_configs").glob("*.json"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_resolves_and_its_resolved_form_is_itself(name: str) -> None:
    cfg = load_run(name)
    text = config.dump_yaml(cfg)
    tree = config.to_tree(config.parse_yaml(text, "again"), "again")
    assert config.decode(type(cfg), tree) == cfg


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_shipped_architecture_is_complete(name: str) -> None:
    plain = json.loads((config.assets("model_configs") / f"{name}.json").read_text())
    plain.pop("comment", None)
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    assert plain.keys() == fields
    assert ModelConfig(**plain) == load_model([f"model.base={name}"])


def test_published_parameter_counts() -> None:
    assert load_model(["model.base=dclm_1b"]).n_params == 1_439_893_504


def test_dclm_1b_1x_has_the_published_numbers() -> None:
    found = derived(load_run("dclm_1b_1x"))
    assert found["total_tokens"] == 28_795_904_000
    assert found["trained_tokens"] == 54_923 * 256 * 2048
    assert found["total_steps"] == 54_923
    assert found["n_params"] == 1_439_893_504


def test_overrides_of_an_architecture_keep_the_rest() -> None:
    base, changed = (
        load_model(["model.base=quickstart"]),
        load_run("quickstart", ["model.n_layers=1"]),
    )
    assert changed.model.architecture == dataclasses.replace(base, n_layers=1)


def test_a_base_for_a_resolved_recipe_is_refused(tmp_path: Path) -> None:
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.dump_yaml(load_run("quickstart")))
    with pytest.raises(InputError, match="names every field of its architecture"):
        load_run(str(resolved), ["model.base=dclm_1b"])


def test_config_prints_yaml_that_loads_and_derived_values(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["config", "quickstart", "optim.lr=1e-3"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_run(str(printed)) == load_run("quickstart", ["optim.lr=1e-3"])
    assert "# n_params: " in printed.read_text()


def test_config_as_json_and_the_schedule_as_csv(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = tmp_path / "lr.csv"
    assert main(["config", "quickstart", "--json", "--schedule", str(table)]) == 0
    found = json.loads(capsys.readouterr().out)
    cfg = load_run("quickstart")
    assert found["config"] == config.to_plain(cfg)
    assert {"n_params", "flops_per_token", "total_tokens", "total_steps"} <= found.keys()
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == cfg.steps
    for step in (0, 7, cfg.steps - 1):
        assert int(rows[step]["step"]) == step
        assert int(rows[step]["tokens"]) == step * cfg.global_batch_tokens
        assert float(rows[step]["lr"]) == lr_at(step, cfg.steps, cfg.optim.lr, cfg.schedule)


def test_an_architecture_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "model.base=dclm_1b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_params"] == 1_439_893_504


def test_two_misspelt_keys_are_both_named_with_the_right_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "quickstart", "optim.lerning_rate=1", "data.seqlen=3"]) == 2
    message = capsys.readouterr().err
    assert "optim.lerning_rate: no such field; did you mean optim.lr?" in message
    assert "data.seqlen: no such field; did you mean data.seq_len?" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["config", "quickstart", "model=quickstart"], "must be a mapping; write"),
        (["config", "quickstart", "model.base=dclm_1x"], "did you mean dclm_1b"),
        (["config", "model.base=dclm_1b", "optim.lr=3"], "without a recipe only model"),
        (["config", "quickstart", "--schedule", "/proc/no/x.csv"], "/proc/no/x.csv: No such file"),
        (["config", "quickstart", "--gpus", "0"], "--gpus 0: must be at least 1"),
        (["config", "model.base=dclm_1b", "--schedule", "x.csv"], "--schedule needs a recipe"),
    ],
)
def test_bad_words_are_one_error_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_words_and_options_may_stand_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    words, found = ["quickstart", "run.seed=5", "--json", "--gpus", "1"], set()
    for order in ((0, 1, 2, 3, 4), (0, 2, 1, 3, 4), (3, 4, 0, 2, 1), (0, 3, 4, 1, 2)):
        assert main(["config", *(words[i] for i in order)]) == 0
        found.add(capsys.readouterr().out)
    assert len(found) == 1 and json.loads(found.pop())["config"]["run"]["seed"] == 5
    with pytest.raises(SystemExit):
        main(["generate", "run", "--average", "lawa", "one", "--averag", "two", "--no-such"])
    assert "unrecognized arguments: --no-such" in capsys.readouterr().err
    for words in (["inspect", "a", "b"], ["config", "quickstart", "--jason", "optim.lr=1"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert f"unrecognized arguments: {words[2]}" in capsys.readouterr().err


def test_without_a_verb_the_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for verb in ("prepare", "inspect", "train", "export", "generate", "plot", "config"):
        assert f"\n    {verb} " in text


def test_the_memory_estimate_shrinks_with_more_gpus_and_checkpointing() -> None:
    cfg = load_run("dclm_1b_1x")
    one, eight = derived(cfg, 1), derived(cfg, 8)
    assert one["memory_gib_per_gpu"] > 16 * one["n_params"] / 2**30
    assert eight["memory_gib_per_gpu"] < one["memory_gib_per_gpu"]
    saving = load_run("dclm_1b_1x", ["parallel.activation_checkpointing=true"])
    assert derived(saving, 8)["memory_gib_per_gpu"] < eight["memory_gib_per_gpu"]
