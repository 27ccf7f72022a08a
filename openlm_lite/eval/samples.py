"""Text that a run writes along its way: how it goes on from some prompts, at each validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from openlm_lite import dist
from openlm_lite.data.tokenizer import dataset_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.eval.during import untouched
from openlm_lite.eval.generate import generate
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
        found = dataset_tokenizer(data_folder)
        if found is None:
            raise InputError(
                f"eval.samples.prompts: {data_folder} holds no tokenizer.json to read them "
                "with; leave them out, or prepare the data with its tokenizer"
            )
        self.tokenizer = found
        for prompt in cfg.prompts:
            ids = [int(i) for i in self.tokenizer.encode(prompt)] or [self.tokenizer.eot_id]
            if len(ids) + cfg.tokens > max_seq_len or max(ids) >= vocab_size:
                raise InputError(
                    f"eval.samples.prompts: {prompt[:40]!r} is {len(ids)} tokens (ids up to "
                    f"{max(ids)}); with eval.samples.tokens = {cfg.tokens} it must fit into "
                    f"{max_seq_len} positions, and the ids into {vocab_size}"
                )
            self.ids.append(ids)

    def texts(
        self, model: Transformer, dtype: torch.dtype, beat: Callable[[], None]
    ) -> list[tuple[str, str]]:
        """(prompt, continuation) of each; collective, on every rank the same.

        dtype, beat, and what it leaves alone: as `TaskEval.measure`. Raises RunError where the
        logits are not finite.
        """
        if not self.ids:
            return []
        with untouched(model, beat):
            new = generate(
                model,
                self.ids,
                max_new_tokens=self.cfg.tokens,
                eot_id=self.tokenizer.eot_id,
                dtype=dtype,
                shared=dist.world_size() > 1,
            )
        n_ids = self.tokenizer.vocab_size  # a padded vocabulary has more
        texts = [self.tokenizer.decode([i for i in ids if i < n_ids]) for ids in new]
        return list(zip(self.cfg.prompts, texts, strict=True))
