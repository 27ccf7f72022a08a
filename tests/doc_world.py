"""A small world in which the commands of the documents find what they name: texts, shards, runs.

my_texts/ corpus/ books/ wiki.jsonl.gz prompts.jsonl     texts
runs/quickstart-data/ data/ dclm_tokenized/              token shards, ours and OpenLM's
runs/quickstart, runs/a, …                               one run of four steps, by many names
mine.yaml wide.yaml trunk.yaml                           recipes of a reader's own
eval_data/ SCORES.json evals/                            tasks of a few rows, their scores
recipes/ benchmarks/ examples/ train.py …                those of the checkout
runs/quickstart/hf path/to/llama hf_folder epoch_5.pt    exported models
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch

from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.cli import main
from openlm_lite.eval.tasks import task_named
from openlm_lite.hf.weights import checkpoint_weights
from openlm_lite.run import load_run
from openlm_lite.scaling.laws import OverTraining
from tests.data.test_openlm_shards import make_shards, rows_of
from tests.doc_commands import ROOT
from tests.eval.test_icl import ROWS, write_rows
from tests.recorded_run import write_run

LAW = OverTraining(1.8, 200.0, 300.0, 0.14)
CHECKOUT = ("recipes", "model_configs", "benchmarks", "examples", "slurm", "train.py")
RUNS = (
    *("a", "b", "mine", "averaged", "lr_6e-3", "lr_2e-2", "dclm_1b", "dclm_1b_1x"),
    *("cooldown_a", "cooldown_b", "dclm_7b_cooldown_a", "dclm_7b_cooldown_b"),
    *("quickstart_toy", "../models/mine"),
)
MADE_BY_DOCUMENTS = ("tutorial", "tutorial_low")
"""whose own commands train them: the whole world has none"""
TASKS = {
    "copa": ROWS["copa"],
    "jeopardy": ROWS["jeopardy"],
    "arc_easy": [{"query": f"Q {i}", "choices": ["a", "text"], "gold": i % 2} for i in range(12)],
}
SMALL = """
model: {vocab_size: 300, d_model: 16, n_layers: 16, n_heads: 2, n_kv_heads: 2, head_dim: 8,
        d_ff: 32, max_seq_len: 64}
data: {train: runs/quickstart-data/train, seq_len: 32}
global_batch_tokens: 256
micro_batch_size: 4
total_steps: 4
optim: {lr: 5e-3}
schedule: {name: cosine, end_lr: 1e-4}
parallel: {precision: fp32}
"""
RECIPES = {
    "mine": "run: {dir: runs/of_mine, device: cpu}" + SMALL,
    "wide": "run: {dir: runs/wide, device: cpu}"
    + SMALL.replace("d_model: 16, n_layers: 16", "d_model: 512, n_layers: 1"),
    "trunk": "run: {dir: runs/trunk, device: cpu}"
    + SMALL.replace("n_layers: 16", "n_layers: 1").replace(
        "cosine, end_lr: 1e-4", "constant, warmup_steps: 1"
    )
    + "checkpoint: {every_steps: 2}\n",
}


def quick_world(root: Path) -> None:
    """The recipes, and runs written by hand: for commands that only look at these."""
    for name in CHECKOUT:
        (root / name).symlink_to(ROOT / name)
    for name in ("docs/images", "build", "soups"):
        (root / name).mkdir(parents=True)
    for name, text in RECIPES.items():
        (root / f"{name}.yaml").write_text(text)
    for name in ("quickstart", *RUNS, *MADE_BY_DOCUMENTS):
        write_run(root / "runs" / name)
    (root / "SCORES.json").write_text(json.dumps({"copa": 0.6, "arc_easy": 0.5}))
    (root / "evals/mine").mkdir(parents=True)
    shutil.copy(root / "SCORES.json", root / "evals/mine/result.json")


def whole_world(root: Path) -> None:
    """All of it; `root` is the present folder."""
    quick_world(root)
    _write_texts(root)
    how = [
        "--train-tokenizer",
        "300",
        "--val-fraction",
        "0.2",
        "--block-tokens",
        "512",
        "--workers",
        "1",
    ]
    _openlm("prepare", "my_texts", "--out", "runs/quickstart-data", *how)
    for copy in ("data", "data/mine"):
        shutil.copytree("runs/quickstart-data", copy, dirs_exist_ok=True)
    make_shards(root / "dclm_tokenized", [rows_of(5, 1, below=300), rows_of(7, 2, below=300)])
    for label, rows in TASKS.items():
        write_rows(root / "eval_data", task_named(label), rows)

    average = "averages={lawa: {kind: lawa, snapshots: 2}, ema: {kind: ema, decay: 0.9}}"
    every = ("checkpoint.every_steps=2", "eval.every_steps=2")
    words = ("scale=toy", "model.max_seq_len=256", "total_steps=4", *every, average)
    for name in ("quickstart", *RUNS, *MADE_BY_DOCUMENTS):
        shutil.rmtree(f"runs/{name}")
    for seed, name in enumerate(("quickstart", "b")):  # a mean is one of different runs
        _openlm("train", "quickstart", f"run.dir=runs/{name}", f"run.seed={seed}", *words)
    for name in RUNS:
        if name != "b":
            like = "b" if name.endswith("_b") else "quickstart"
            shutil.copytree(f"runs/{like}", f"runs/{name}")
    _add_exports()
    data = ("data.train=runs/quickstart-data/train", "data.val={}")
    one_step = ("scale=toy", "total_tokens=null", "total_steps=1")
    _openlm("train", "dclm_7b_2x", "run.dir=runs/dclm_7b_soup_toy", *one_step, *data)
    _openlm("train", "mine.yaml", "model.n_layers=12", "run.dir=runs/reference", "total_steps=1")
    _openlm("train", "trunk.yaml", "total_steps=8", "checkpoint.keep_last=10")


def _write_texts(root: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(80)]
    for folder in ("my_texts", "corpus", "books"):
        (root / folder).mkdir()
    documents = [" ".join(rng.choices(words, k=400)) for _ in range(40)]
    for i, text in enumerate(documents):
        (root / "my_texts" / f"{i:02}.txt").write_text(text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (root / "corpus" / "0.jsonl").write_text(lines)
    (root / "books" / "0.txt").write_text(documents[0])
    with gzip.open(root / "wiki.jsonl.gz", "wt") as f:
        f.write(lines)
    (root / "prompts.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "de"}\n')


def _add_exports() -> None:
    _openlm("export", "runs/quickstart", "runs/quickstart/hf")
    shutil.copytree("runs/quickstart/hf", "path/to/llama")
    _openlm("export", "runs/quickstart", "hf_folder", "--bundled")
    weights = dict(checkpoint_weights(resolve_checkpoint("runs/quickstart")))
    torch.save(weights, "epoch_5.pt")
    (commit,) = sorted(Path("runs/quickstart/checkpoints").glob("step_*4"))
    shutil.copy(commit / "model.json", "model.json")


def finish_ladder(folder: Path) -> None:
    """What `bash FOLDER/run.sh` leaves after minutes of training: losses that follow a law."""
    for entry in json.loads((folder / "ladder.json").read_text())["runs"]:
        run = folder / entry["name"]
        run.mkdir()
        shutil.copy(folder / entry["recipe"], run / "config.yaml")
        (name,) = load_run(str(run / "config.yaml")).data.val
        loss = float(LAW.loss(np.array(float(entry["N"])), np.array(float(entry["D"]))))
        record = {"step": entry["steps"], "tokens": entry["D"], f"val/{name}/loss": loss}
        (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def _openlm(*words: str) -> None:
    torch.manual_seed(0)
    assert main(words) == 0, words
