"""Folders as runs leave them, written by hand: for tests of what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from openlm_lite.commit import Commit, TrainState, encode_commit, step_folder_name

CONFIG = """
run: {dir: runs/x}
model: {vocab_size: 300, d_model: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, head_dim: 8,
        d_ff: 64, max_seq_len: 64, tie_embeddings: true}
data: {train: data/train, val: {toy: data/val}, seq_len: 32}
global_batch_tokens: 256
micro_batch_size: 4
total_steps: 12
optim: {lr: 5.0e-3}
"""


def step_record(step: int, **more: Any) -> dict[str, Any]:
    """As `Sinks.step` writes one."""
    return {
        "step": step,
        "tokens": 256 * step,
        "train/loss": 3 + 5 * math.exp(-step / 40),
        "train/grad_norm": 1 + 0.1 * math.sin(step),
        "train/lr": 5e-3,
        "perf/tokens_per_second": 1000.0,
        "perf/tokens_per_second_per_gpu": 1000.0,
        "perf/data_wait": 0.01,
        "data/checksum": 7,
        "data/toy/epoch": 0.01 * step,
        **more,
    }


def write_run(
    folder: Path,
    steps: int = 5,
    *,
    config: str | None = CONFIG,
    events: tuple[dict[str, Any], ...] = (),
    records: list[dict[str, Any]] | None = None,
    checkpoint: int | None = None,
) -> Path:
    """A run that stood at `steps`; its lock is free."""
    folder.mkdir(parents=True)
    (folder / "lock").write_text("pid 1 on nowhere\n")
    if config is not None:
        (folder / "config.yaml").write_text(config)
    found = [step_record(i + 1) for i in range(steps)] if records is None else records
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    if events:
        lines = "".join(json.dumps({"time": 1.7e9, **e}) + "\n" for e in events)
        (folder / "events.jsonl").write_text(lines)
    if checkpoint is not None:
        path = folder / "checkpoints" / step_folder_name(checkpoint)
        path.mkdir(parents=True)
        state = TrainState(step=checkpoint, tokens=256 * checkpoint, next_sample=8 * checkpoint)
        commit = Commit(str(path), state, world_size=1, facts={}, files={})
        (path / "COMMIT.json").write_text(encode_commit(commit))
    return folder
