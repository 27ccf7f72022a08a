"""Tasks along a training run: when, of what, and without a trace in the training itself.

The loop asks `due` after each step, and where it is time calls `measure` once for the weights and
once for each average. All ranks do this together, on the model as it is sharded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from openlm_lite import dist
from openlm_lite.data.tokenizer import Tokenizer, dataset_tokenizer, load_tokenizer
from openlm_lite.errors import InputError
from openlm_lite.eval.aiw import AIWConfig
from openlm_lite.eval.icl import SuiteSettings, read_suite
from openlm_lite.eval.measures import Measures, check_measures, measure_all
from openlm_lite.eval.model_scorer import ModelScorer
from openlm_lite.eval.perplexity import PerplexityConfig
from openlm_lite.eval.scorer import BatchLimits
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.transformer import Transformer


@dataclass(frozen=True)
class TaskEvalConfig:
    """What is measured along a run besides the validation loss, and when; also after the end."""

    suite: str = ""
    """as of `openlm eval --suite`: core, extended, aiw, tasks, last lm-eval:TASK,…; empty: none"""
    texts: dict[str, str] = field(default_factory=dict)
    """held-out text besides data.val: name -> dataset, file, folder or glob"""
    every_steps: int = 0
    """0: not by steps"""
    every_tokens: int = 0
    """at the first step behind each multiple; 0: not by tokens"""
    data: str = ""
    """the folder of the tasks' data, as of `openlm eval --data`"""
    limit: int | None = None
    """rows of every task; null: all"""
    averages: bool = True
    """the same for every average of the weights"""
    batch_size: int = 32
    """sequences in one forward pass of a rank"""
    batch_tokens: int = 16_384
    """tokens in one, with padding"""
    bos: bool = True
    """begin with what the tokenizer's file wants before a text, as `openlm eval` does"""
    tokenizer: str | None = None
    """null: the training data's"""
    aiw: AIWConfig = field(default_factory=AIWConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"eval.tasks.{name} = {getattr(self, name)}, must be 0 or more")
        self.suite_settings  # noqa: B018  (raises for what is out of range)

    @property
    def suite_settings(self) -> SuiteSettings:
        """Those of `openlm eval`, so that a run and its checkpoint have the same scores."""
        batch = BatchLimits(self.batch_size, self.batch_tokens)
        return SuiteSettings(limit=self.limit, bos=self.bos, batch=batch)


class TaskEval:
    """The tasks of a run; nothing where none are asked for."""

    def __init__(
        self, cfg: TaskEvalConfig, model: ModelConfig, data_folder: str, val_names: tuple[str, ...]
    ) -> None:
        """Everything is read and checked: a mistake is told before the first step.

        data_folder: of the training data, whose tokenizer it is; val_names: of data.val. Raises
        InputError.
        """
        self.cfg = cfg
        self.wanted: Measures | None = None
        if not cfg.suite and not cfg.texts:
            return
        try:
            settings = cfg.suite_settings
            wanted = Measures(cfg.suite, cfg.data, settings, cfg.aiw, cfg.texts, cfg.perplexity)
            self.tokenizer = self._checked(wanted, model, data_folder, val_names)
        except InputError as e:
            raise InputError(f"eval.tasks: {e}") from None
        self.wanted = wanted

    def _checked(
        self, wanted: Measures, model: ModelConfig, data_folder: str, val_names: tuple[str, ...]
    ) -> Tokenizer:
        """The tokenizer, once all else is there."""
        for name in wanted.texts:
            if name in val_names or "/" in name:
                raise InputError(
                    f"texts.{name}: the name is that of a source in data.val, or has a / in it; "
                    "choose another, which val/<name>/loss is called by"
                )
        tokenizer = _tokenizer(self.cfg.tokenizer, data_folder)
        if tokenizer.vocab_size > model.vocab_size:
            raise InputError(
                f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model "
                f"{model.vocab_size}"
            )
        check_measures(wanted, tokenizer, model)
        if tasks := wanted.words.tasks:  # last: it takes the most time
            read_suite(tasks, wanted.data, tokenizer, wanted.settings, model.max_seq_len)
        return tokenizer

    def due(self, step: int, tokens_before: int, tokens: int, done: bool) -> bool:
        """Whether to measure after `step`, which took the run from `tokens_before` to `tokens`."""
        if self.wanted is None:
            return False
        by_steps = self.cfg.every_steps > 0 and step % self.cfg.every_steps == 0
        n = self.cfg.every_tokens
        return done or by_steps or (n > 0 and tokens // n > tokens_before // n)

    def measure(
        self, model: Transformer, dtype: torch.dtype, beat: Callable[[], None]
    ) -> dict[str, Any]:
        """`measures.measure_all` of the model; collective, and the training does not notice.

        dtype: what FSDP computes in; beat: called at every forward pass. Raises RunError where the
        model cannot be measured, InputError where a file is not any more what was checked; on all
        ranks alike.
        """
        assert self.wanted is not None
        scorer = ModelScorer(model, dtype=dtype, lockstep=dist.world_size() > 1)
        with untouched(model, beat):
            return measure_all(scorer, self.tokenizer, self.wanted)


def _tokenizer(spec: str | None, data_folder: str) -> Tokenizer:
    """The one that is named, else the one beside the training data, which may be at a URL."""
    if spec is not None:
        return load_tokenizer(spec)
    found = dataset_tokenizer(data_folder)
    if found is None:
        raise InputError(
            f"{data_folder} holds no tokenizer.json; name the tokenizer that it was "
            "made with (eval.tasks.tokenizer)"
        )
    return found


@contextmanager
def untouched(model: Transformer, beat: Callable[[], None]) -> Iterator[None]:
    """The model is read inside; generators, modes and compiled code are as they were afterwards.

    Compiled blocks run uncompiled meanwhile: the many shapes of tasks would make torch compile them
    again, for shapes in general, and the training would go on with that code and other rounding.
    """
    was_training = model.training
    hook = model.register_forward_hook(lambda *_: beat())
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        hook.remove()
        model.train(was_training)
