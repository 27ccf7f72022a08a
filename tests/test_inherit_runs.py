"""Runs that start from another model: the same on every number of ranks, recorded, repeatable."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.cli import main
from openlm_lite.commit import read_commit, step_folders
from openlm_lite.config import to_plain
from openlm_lite.hf.source import read_model_config
from openlm_lite.hf.weights import checkpoint_weights
from openlm_lite.log import read_metrics
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer
from openlm_lite.run import load_run
from tests.train_server import TrainServer

SHORT = ["total_steps=4", "checkpoint.every_steps=2", "eval.every_steps=2"]
PLAIN = ["schedule.name=constant", "schedule.warmup_steps=0", "schedule.cooldown_steps=0"]
# fp32 weights of any usual size stay as they are to the bit
STILL = [*PLAIN, "optim.lr=1e-30", "total_steps=1"]


def weights_of(run: Path) -> dict[str, Tensor]:
    return dict(checkpoint_weights(resolve_checkpoint(str(run))))


def measured(run: Path) -> list[dict[str, Any]]:
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def val_losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["val/toy/loss"] for r in measured(run) if "val/toy/loss" in r}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def there(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A trained run of three layers."""
    run = tmp_path_factory.mktemp("there") / "run"
    words = [str(toy_recipe), f"run.dir={run}", "model.n_layers=3", *SHORT, *PLAIN]
    assert train_server.train(*words)["codes"] == [0]
    return run


@pytest.fixture
def words(toy_recipe: Path, there: Path, tmp_path: Path) -> list[str]:
    """A run of two layers in tmp_path/here, on a copy of the source that a test may remove."""
    shutil.copytree(there, tmp_path / "there")
    return [
        str(toy_recipe),
        f"run.dir={tmp_path / 'here'}",
        f"model.init_from={tmp_path / 'there'}",
        *SHORT,
        *PLAIN,
    ]


def test_a_copy_of_all_layers_has_exactly_the_sources_loss_before_its_first_step(
    train_server: TrainServer, words: list[str], tmp_path: Path
) -> None:
    assert train_server.train(*words, "model.n_layers=3")["codes"] == [0]
    ours, theirs = val_losses(tmp_path / "here"), val_losses(tmp_path / "there")
    assert ours[0] == theirs[4] < theirs[0] - 0.1
    steps = [r["step"] for r in measured(tmp_path / "here") if "train/loss" in r]
    assert steps == [1, 2, 3, 4]  # step and tokens begin anew


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_one_process_and_two_ranks_start_from_the_same_weights(
    train_server: TrainServer, words: list[str], tmp_path: Path, precision: str
) -> None:
    words += [*STILL, "model.n_layers=4", "model.init_from.layers=[1-2, new, 0]"]
    words += ["model.init_from.final_norm=false", f"parallel.precision={precision}"]
    words += ["parallel.activation_checkpointing=true"]
    for world in (1, 2):
        done = train_server.train(*words, f"run.dir={tmp_path / str(world)}", world=world)
        assert set(done["codes"]) == {0}
    found, theirs = weights_of(tmp_path / "1"), weights_of(tmp_path / "there")
    assert equal(found, weights_of(tmp_path / "2"))

    cfg = load_run(words[0], words[1:])
    model = Transformer(cfg.model.architecture)
    init_weights(model, cfg.run.seed)
    fresh = model.state_dict()
    for name, weight in found.items():
        origin: int | None = None
        if name.startswith("layers."):
            layer, rest = name.removeprefix("layers.").split(".", 1)
            origin = (1, 2, None, 0)[int(layer)]
            theirs_name = f"layers.{origin}.{rest}"
        else:
            origin, theirs_name = (None if name == "norm.weight" else 0), name
        assert torch.equal(weight, fresh[name] if origin is None else theirs[theirs_name]), name


def test_a_run_starts_from_a_hugging_face_folder(
    train_server: TrainServer, words: list[str], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    cfg = transformers.Qwen3Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=64, max_position_embeddings=32,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(cfg)
    model.save_pretrained(tmp_path / "hf")
    words += [*STILL, f"model.init_from={tmp_path / 'hf'}"]
    assert train_server.train(*words)["codes"] == [0]
    found = weights_of(tmp_path / "here")
    layer = model.model.layers[1]
    assert torch.equal(found["embedding.weight"], model.model.embed_tokens.weight)
    assert torch.equal(found["layers.1.attention.wk.weight"], layer.self_attn.k_proj.weight)
    assert torch.equal(found["layers.1.feed_forward.w_gate.weight"], layer.mlp.gate_proj.weight)
    record = json.loads((tmp_path / "here" / "init_from.json").read_text())
    assert record["kind"] == "Qwen3ForCausalLM" and record["n_params_fresh"] == 0
    assert record["differences"]["max_seq_len"] == [32, 64]


def test_the_origin_is_kept_in_the_run_and_in_every_checkpoint(
    train_server: TrainServer,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "here"
    words += ["model.init_from.layers=[2, 0]", "model.init_from.head=false"]
    assert train_server.train(*words)["codes"] == [0]
    record = json.loads((run / "init_from.json").read_text())
    newest = resolve_checkpoint(str(tmp_path / "there"))
    assert record["path"] == newest and record["kind"] == "checkpoint"
    assert record["facts"]["step"] == 4 and record["layers"] == [2, 0]
    assert "head" not in record["components"] and "embeddings" in record["components"]
    cfg = load_run(str(run / "config.yaml"))
    assert cfg.model.init_from.layers == (2, 0)
    assert record["n_params_taken"] == cfg.model.n_params and record["n_params_fresh"] == 0
    folders = step_folders(str(run / "checkpoints"))
    assert len(folders) == 2
    for folder in folders:
        assert read_commit(folder).facts["init_from"] == record
        assert read_model_config(folder) == cfg.model.architecture
    assert "weights from " + newest in (run / "log.txt").read_text()
    assert main(["inspect", folders[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["init_from"] == record


def test_a_resumed_run_needs_no_source_and_keeps_its_origin(
    train_server: TrainServer, words: list[str], tmp_path: Path
) -> None:
    whole = train_server.train(*words, f"run.dir={tmp_path / 'whole'}")
    run = tmp_path / "here"
    killed = train_server.train(*words, kill=(0, whole["events"][0] * 3 // 4))
    assert killed["codes"] == [-signal.SIGKILL]
    assert len(step_folders(str(run / "checkpoints"))) == 1
    before = (run / "init_from.json").read_bytes()
    shutil.rmtree(tmp_path / "there")
    assert train_server.train(*words)["codes"] == [0]
    assert measured(run) == measured(tmp_path / "whole")
    assert equal(weights_of(run), weights_of(tmp_path / "whole"))
    assert (run / "init_from.json").read_bytes() == before
    for folder in step_folders(str(run / "checkpoints")):
        assert read_commit(folder).facts["init_from"] == json.loads(before)
    assert (run / "log.txt").read_text().count("weights from") == 1


def test_a_run_whose_checkpoints_are_all_damaged_starts_from_its_source_again(
    train_server: TrainServer, words: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "here"
    assert train_server.train(*words)["codes"] == [0]
    before = measured(run)
    for folder in step_folders(str(run / "checkpoints")):
        (Path(folder) / "state.json").write_text("{}")
    assert train_server.train(*words)["codes"] == [0]
    assert measured(run)[0] == pytest.approx(before[0], rel=1e-6)
    assert (run / "log.txt").read_text().count("weights from") == 2


def test_another_origin_is_another_run(
    train_server: TrainServer, words: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    assert train_server.train(*words)["codes"] == [0]
    assert train_server.train(*words, "model.init_from.norms=false", log=log)["codes"] == [2]
    assert "model.init_from.norms: True there, False now" in log.read_text()
    assert train_server.train(*words, "model.init_from=null", log=log)["codes"] == [2]
    assert "model.init_from.path: " in log.read_text()


def test_the_resolved_config_starts_from_the_same_weights(
    train_server: TrainServer, words: list[str], tmp_path: Path
) -> None:
    assert train_server.train(*words, "model.init_from.layers=[1-2]")["codes"] == [0]
    resolved = tmp_path / "here" / "config.yaml"
    again = train_server.train(str(resolved), f"run.dir={tmp_path / 'again'}")
    assert again["codes"] == [0]
    assert measured(tmp_path / "again") == measured(tmp_path / "here")


@pytest.mark.parametrize(
    ("world", "more", "message"),
    [
        (1, ["model.init_from=nowhere"], "model.init_from: nowhere"),
        (2, ["model.d_ff=96", "model.n_layers=4"], "d_ff: 64 there, 96 here (feed_forward)"),
        (1, ["model.n_layers=4"], "n_layers: 3 there, 4 here; say in model.init_from.layers"),
        (1, ["model.init_from.layers=[0, 3]"], "layers: 3 not there: it has layers 0 to 2"),
        (
            1,
            ["model.tie_embeddings=false", "model.vocab_size=301"],
            "vocab_size: 300 there, 301 here",
        ),
        (1, ["model.init_from.model=quickstart"], "which states its architecture"),
    ],
)
def test_what_does_not_fit_is_one_error_and_writes_nothing(
    train_server: TrainServer,
    words: list[str],
    tmp_path: Path,
    world: int,
    more: list[str],
    message: str,
) -> None:
    log = tmp_path / "log.txt"
    assert train_server.train(*words, *more, world=world, log=log)["codes"] == [2] * world
    text = log.read_text()
    assert text.count(message) == 1
    assert text.startswith("openlm: model.init_from: ") and "Traceback" not in text
    assert not (tmp_path / "here").exists()


def test_the_shipped_recipe_fits_what_the_quickstart_leaves(tmp_path: Path) -> None:
    source, recipe = load_run("quickstart"), load_run("inheritune_quickstart")
    init = recipe.model.init_from
    assert init.path == source.run.dir and recipe.data == source.data
    assert recipe.model.n_layers * 2 == source.model.n_layers
    ours = to_plain(recipe.model.architecture) | {"n_layers": source.model.n_layers}
    assert ours == to_plain(source.model.architecture)
    assert init.layer_map(recipe.model.n_layers) == (0, 1)
    assert not init.final_norm and {"embeddings", "head"} <= set(init.components)
