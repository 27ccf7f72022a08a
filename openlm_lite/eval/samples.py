"""Text that a run writes along its way: how it goes on from some prompts, at each validation."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openlm_lite import storage
from openlm_lite.data.tokenizer import Tokenizer, load_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.model.transformer import Transformer


@dataclass(frozen=True)
class SampleConfig:
    """Greedy continuations, into `metrics.jsonl` and reports. They change nothing in training."""

    prompts: tuple[str, ...] = ()
    """each is continued at every validation, by the weights (not their averages)"""
    tokens: int = 48
    """of each continuation"""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"eval.samples.tokens = {self.tokens}, must be at least 1")


class Sampler:
    """The prompts of a run as ids."""

    def __init__(
        self, cfg: SampleConfig, data_folder: str, max_seq_len: int, vocab_size: int
    ) -> None:
        """With the tokenizer that lies beside the training data in `data_folder`.

        Raises InputError, before the run begins, where there is none or a prompt does not fit.
        """
        self.cfg = cfg
        self.ids: list[list[int]] = []
        if not cfg.prompts:
            return
        self.tokenizer = _tokenizer_of(data_folder)
        for prompt in cfg.prompts:
            ids = [int(i) for i in self.tokenizer.encode(prompt)] or [self.tokenizer.eot_id]
            if len(ids) + cfg.tokens > max_seq_len or max(ids) >= vocab_size:
                raise InputError(
                    f"eval.samples.prompts: {prompt[:40]!r} is {len(ids)} tokens (ids up to "
                    f"{max(ids)}); with eval.samples.tokens = {cfg.tokens} it must fit into "
                    f"{max_seq_len} positions, and the ids into {vocab_size}"
                )
            self.ids.append(ids)

    def texts(self, model: Transformer, device: torch.device) -> list[tuple[str, str]]:
        """(prompt, continuation) of each; collective, on every rank the same."""
        if not self.ids:
            return []
        found = continuations(model, self.ids, self.cfg.tokens, device)
        texts = []
        for prompt, ids in zip(self.cfg.prompts, found, strict=True):
            if self.tokenizer.eot_id in ids:
                ids = ids[: ids.index(self.tokenizer.eot_id)]
            known = [i for i in ids if i < self.tokenizer.vocab_size]  # a padded vocabulary
            texts.append((prompt, self.tokenizer.decode(known)))
        return texts


@torch.no_grad()
def continuations(
    model: Transformer, prompts: Sequence[Sequence[int]], n_tokens: int, device: torch.device
) -> list[list[int]]:
    """The likeliest `n_tokens` ids behind each prompt, one after the other.

    Every rank makes `n_tokens` forward passes of one shape, whatever it finds, as the collectives
    of a sharded model need. Short prompts are padded behind: no position sees what comes after it.
    Compiled blocks run uncompiled: a new shape would have torch compile them again, and training
    would go on with that code.
    """
    lengths_B = torch.tensor([len(ids) for ids in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    tokens_BT = torch.zeros(
        len(prompts), int(lengths_B.max()) + n_tokens, dtype=torch.long, device=device
    )
    for row, ids in enumerate(prompts):
        tokens_BT[row, : len(ids)] = torch.tensor(list(ids), device=device)
    with torch.compiler.set_stance("force_eager"):
        for i in range(n_tokens):
            logits_BTV = model(tokens_BT)
            assert isinstance(logits_BTV, torch.Tensor)
            tokens_BT[rows, lengths_B + i] = logits_BTV[rows, lengths_B + i - 1].argmax(-1)
    return [
        tokens_BT[row, len(ids) : len(ids) + n_tokens].tolist() for row, ids in enumerate(prompts)
    ]


def _tokenizer_of(data_folder: str) -> Tokenizer:
    """The one of a dataset, which may be at a URL."""
    names = ("tokenizer.json", "tokenizer_config.json")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            place = f"{data_folder.rstrip('/')}/{name}"
            if storage.exists(place):
                storage.write_bytes(os.path.join(folder, name), storage.read_bytes(place))
            elif name == names[0]:
                raise InputError(
                    f"eval.samples.prompts: {data_folder} holds no tokenizer.json to read them "
                    "with; leave them out, or prepare the data with its tokenizer"
                )
        return load_tokenizer(folder)
