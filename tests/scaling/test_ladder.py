"""`openlm fit --plan`: what it plans loads, adds up, fits its budget and is not overwritten."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from openlm_lite import config
from openlm_lite.cli import BAD_INPUT, main
from openlm_lite.log import read_metrics
from openlm_lite.run import load_run
from openlm_lite.scaling.ladder import count_params
from openlm_lite.scaling.laws import OverTraining
from tests.train_server import TrainServer

LAW = OverTraining(1.8, 200.0, 300.0, 0.14)


@pytest.fixture
def ladder(tmp_path: Path, toy_recipe: Path) -> Path:
    return small_ladder(tmp_path, toy_recipe)


def small_ladder(tmp_path: Path, toy_recipe: Path) -> Path:
    """A very small ladder on the toy corpus."""
    recipe = yaml.safe_load(toy_recipe.read_text())
    for name in ("run", "global_batch_tokens", "total_steps"):
        del recipe[name]
    sizes = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff")
    base = {name: recipe["model"].pop(name) for name in sizes}
    model = recipe["model"] | {k: v for k, v in recipe["model"].items() if k not in sizes}
    whole = config.to_plain(load_run(str(toy_recipe)).model.architecture) | base
    (tmp_path / "base.json").write_text(json.dumps(whole))
    recipe["model"] = {"base": str(tmp_path / "base.json"), "qk_norm": model["qk_norm"]}
    recipe["schedule"] = {"name": "cosine", "end_lr": 1e-4}
    batch = {"global_batch_tokens": 256, "warmup_steps": 2}
    plan = {
        "recipe": recipe,
        "multipliers": [0.1, 0.3],
        "rungs": {
            "a": {"d_model": 16, "n_layers": 1, "n_heads": 2, **batch},
            "b": {"d_model": 32, "n_layers": 1, "n_heads": 4, "lr": 1e-3, **batch},
            "c": {"d_model": 32, "n_layers": 2, "n_heads": 4, "multipliers": [0.2], **batch},
        },
        "target": {"d_model": 64, "n_layers": 2, "n_heads": 4, "multiplier": 1, **batch},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


def changed(path: Path, **changes: Any) -> Path:
    """The ladder with some keys (a__b for nested ones) replaced; None takes them out."""
    plan = yaml.safe_load(path.read_text())
    for dotted, value in changes.items():
        *way, last = dotted.split("__")
        node = plan
        for key in way:
            node = node[key]
        if value is None:
            del node[last]
        else:
            node[last] = value
    path.write_text(yaml.safe_dump(plan))
    return path


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["fit", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["fit", *map(str, words)]) == BAD_INPUT
    return capsys.readouterr().err


def test_the_recipes_of_a_plan_load_and_are_what_the_manifest_says(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, "--plan", ladder, "--out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert [r["name"] for r in manifest["runs"]] == [r["name"] for r in found["runs"]] + ["target"]
    assert len(found["runs"]) == 5
    for entry in manifest["runs"]:
        cfg = load_run(str(tmp_path / "out" / entry["recipe"]))
        assert cfg.run.dir == str(tmp_path / "out" / entry["folder"])
        assert count_params(cfg.model.architecture) == entry["N"]
        assert cfg.tokens_at(cfg.steps) == entry["D"] and cfg.steps == entry["steps"]
        assert entry["flops"] == 6 * entry["N"] * entry["D"]
    flops = [r["flops"] for r in found["runs"]]
    assert flops == sorted(flops)
    assert found["total_flops"] == pytest.approx(sum(flops))
    assert sum(r["share"] for r in found["runs"]) == pytest.approx(1)
    rates = {r["name"]: r["lr"] for r in found["runs"]}
    assert rates["b_0.1x"] == 1e-3 and rates["a_0.1x"] == 5e-3
    model = load_run(str(tmp_path / "out" / "a_0.1x.yaml")).model
    assert (model.n_kv_heads, model.head_dim, model.d_ff) == (1, 8, 32)  # in the base's ratios


def test_the_tokens_are_the_multiple_of_the_parameters_to_half_a_step(
    ladder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in as_json(capsys, "--plan", ladder)["runs"]:
        wanted = float(run["name"].split("_")[1].removesuffix("x")) * run["N"]
        assert abs(run["D"] - wanted) <= 256 / 2


def test_a_budget_is_kept_or_what_fits_is_named(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, "--plan", ladder)
    total, first = found["total_flops"], found["runs"][0]
    enough = as_json(capsys, "--plan", ladder, "--budget", total * 1.01)
    assert sum(r["share"] for r in enough["runs"]) == pytest.approx(1 / 1.01)
    words = ("--plan", ladder, "--out", tmp_path / "out", "--budget")
    error = error_of(capsys, *words, total * 0.99)
    assert "the 5 runs of the grid need" in error and f"{first['name']}, " in error
    assert f"not even {first['name']} fits" in error_of(capsys, *words, first["flops"] / 2)
    assert "above 0" in error_of(capsys, *words, -1)
    assert not (tmp_path / "out").exists()


def test_the_shipped_ladder_is_small_and_its_target_ten_times_larger(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = as_json(capsys, "--plan", "ladder", "--budget", 1.1e13)
    assert 9 < found["target"]["times_largest"] < 11
    assert len({r["N"] for r in found["runs"]}) == 4 and len(found["runs"]) > 2 * 4


def test_a_folder_is_written_once_and_never_over_another(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--plan", ladder, "--out", tmp_path / "out")
    as_json(capsys, *words)
    (tmp_path / "out" / "a_0.1x").mkdir()  # a run that has begun
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    as_json(capsys, *words)  # the same plan: nothing to do
    changed(ladder, multipliers=[0.1, 0.4])
    assert "exists and holds another plan" in error_of(capsys, *words)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    (tmp_path / "mine").mkdir()
    assert "other things" in error_of(capsys, "--plan", ladder, "--out", tmp_path / "mine")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": None}, "no `recipe:` section"),
        ({"target": None}, "target.d_model: missing"),
        ({"rungs__a__d_mdel": 3}, "rungs.a.d_mdel: no such field; did you mean rungs.a.d_model?"),
        ({"rungs__a__n_heads": 3}, "d_model = 16 is not a multiple of n_heads = 3"),
        ({"rungs__a__warmup_steps": 900}, "a_0.1x: "),
        ({"rungs__a__global_batch_tokens": 100}, "is not a multiple of data.seq_len"),
        ({"rungs__a__multipliers": [-1]}, "must be above 0"),
        ({"rungs__a__multipliers": []}, "rungs.a: give multipliers"),
        ({"rungs__target": {}}, "rungs.target"),
        ({"recipe__total_steps": 7}, "recipe: total_steps: follows from the rungs"),
        ({"recipe__model__d_model": 7}, "recipe: model.d_model: follows from the rungs"),
        ({"recipe__model__base": "quikstart"}, "did you mean quickstart?"),
        ({"recipe__optim__lerning_rate": 1}, "optim.lerning_rate: no such field"),
        ({"rungs__a": None, "rungs__b": None}, "are needed to fit it on, and there is 1"),
        ({"rungs__a__multipliers": [0.1, 0.1001]}, "are one run"),
        ({"target__multiplier": 0}, "target.multiplier = 0.0: must be above 0"),
    ],
)
def test_mistakes_in_a_ladder_are_one_clear_error(
    ladder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    error = error_of(capsys, "--plan", changed(ladder, **changes))
    assert message in error and error.count("openlm:") == 1


def test_the_scripts_are_sound(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "it's here"  # quoted where it stands in a script
    as_json(capsys, "--plan", ladder, "--out", out)
    for name in ("run.sh", "array.sbatch"):
        subprocess.run(["bash", "-n", out / name], check=True)
        assert "@" not in (out / name).read_text().replace('"$@"', "").replace("[@]", "").replace(
            "B:USR1@120", ""
        )
    assert "#SBATCH --array=0-4\n" in (out / "array.sbatch").read_text()


def test_run_sh_trains_what_is_not_done_and_the_fit_reads_it(
    ladder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in for python that writes what a run would, and fails once."""
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)  # where there is no .venv, whose python would come first
    as_json(capsys, "--plan", ladder, "--out", out)
    for entry in json.loads((out / "ladder.json").read_text())["runs"]:
        loss = float(LAW.loss(np.array(float(entry["N"])), np.array(float(entry["D"]))))
        record = {"step": entry["steps"], "tokens": entry["D"], "val/toy/loss": loss}
        (tmp_path / f"{entry['name']}.jsonl").write_text(json.dumps(record) + "\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    stand_in = tools / "python"
    stand_in.write_text(
        f"""#!/bin/bash
# -m openlm_lite train DIR/NAME.yaml run.dir=DIR/NAME
[ "$1 $2 $3" = "-m openlm_lite train" ] || exit 3
name=$(basename "$4" .yaml)
echo "$name" >> "{tmp_path}/called"
if [ "$name" = c_0.2x ] && [ ! -e "{tmp_path}/failed" ]; then touch "{tmp_path}/failed"; exit 75; fi
mkdir "${{5#run.dir=}}"
cp "$4" "${{5#run.dir=}}/config.yaml"
cp "{tmp_path}/$name.jsonl" "${{5#run.dir=}}/metrics.jsonl"
"""
    )
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}"}

    def train(*names: str) -> int:
        command = ["bash", str(out / "run.sh"), *names]
        return subprocess.run(command, env=environment, capture_output=True).returncode

    assert train() == 75
    assert not (out / "c_0.2x.done").exists()
    assert train() == 0
    calls = called(tmp_path)
    assert len(calls) == 6 and calls.count("c_0.2x") == 2
    assert train() == 0 and called(tmp_path) == calls  # all done
    assert train("nonsense") == 2

    target = json.loads((out / "ladder.json").read_text())["runs"][-1]
    predict = ("--predict", f"N={target['N']},D={target['D']}")
    found = as_json(capsys, out, *predict)
    assert len(found["fitted_on"]) == 5 and found["left_out"] == []
    assert "loss_measured" not in found["predictions"][0]
    assert train("target") == 0
    found = as_json(capsys, out, *predict)
    assert len(found["fitted_on"]) == 5
    assert found["predictions"][0]["loss_relative_error"] < 1e-4


def called(tmp_path: Path) -> list[str]:
    return (tmp_path / "called").read_text().split()


def test_a_planned_recipe_trains(
    ladder: Path, tmp_path: Path, train_server: TrainServer, capsys: pytest.CaptureFixture[str]
) -> None:
    as_json(capsys, "--plan", ladder, "--out", tmp_path / "out")
    recipe = tmp_path / "out" / "a_0.1x.yaml"
    steps = load_run(str(recipe)).steps
    assert train_server.train(str(recipe))["codes"] == [0]
    records = read_metrics(tmp_path / "out" / "a_0.1x" / "metrics.jsonl")
    assert records[-1]["step"] == steps
    error = error_of(capsys, tmp_path / "out")
    assert "there is 1 (fitting on all: a_0.1x; 4 more are left out as not finished)" in error
