"""A small model, tokenizer and run folder, for tests of what starts from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from openlm_lite import dist
from openlm_lite.checkpoint import CheckpointConfig, TrainState, save_checkpoint
from openlm_lite.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer

TEXT = "A small tokenizer, for a small model: it was trained on a small text, again and again. "


def tiny_config(**changes: Any) -> ModelConfig:
    """The DCLM kind of model, small; its padded vocabulary has more rows than the tokenizer."""
    fields: dict[str, Any] = {
        "vocab_size": 320,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "d_ff": 48,
        "max_seq_len": 64,
        "norm": "layer_norm",
        "qk_norm": "full",
    }
    return ModelConfig(**fields | changes)


def tiny_model(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """Initialised as for training, then gains and biases moved off 1 and 0."""
    model = Transformer(cfg)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def bytes_kept(model: Transformer, tokens_BT: torch.Tensor) -> int:
    """What autograd holds between forward and backward pass, besides the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        sums = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
    assert sums.total.requires_grad
    return sum(kept.values())


def tiny_tokenizer() -> Tokenizer:
    return train_bpe(iter([TEXT * 4]), 290)


def save_with_bos(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, whose file there begins a text with the end-of-text token."""
    tokenizer.save(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": tokenizer.eot, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    token = {"id": tokenizer.eot, "ids": [tokenizer.eot_id], "tokens": [tokenizer.eot]}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {tokenizer.eot: token},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    found = load_tokenizer(str(folder))
    assert found.bos_ids == (tokenizer.eot_id,)
    return found


@contextmanager
def process_group() -> Iterator[None]:
    dist.init()
    try:
        yield
    finally:
        dist.close()


def save_tiny_run(folder: Path, model: Transformer, tokenizer: Tokenizer | None) -> Path:
    """folder/{tokenizer.json, tokenizer_config.json, checkpoints/step_00000007/}; returns folder"""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    documents = {"model.json": json.dumps(asdict(model.cfg)), "config.yaml": "run: {}\n"}
    with process_group():
        save_checkpoint(
            str(folder / "checkpoints"),
            model,
            optimizer,
            TrainState(step=7, tokens=7, next_sample=7),
            documents=documents,
            facts={},
            cfg=CheckpointConfig(),
        )
    if tokenizer is not None:
        tokenizer.save(folder)
    return folder
