"""A whole run as one config: the rooms' configs side by side, and the rules across them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from openlm_lite import config, toy
from openlm_lite.average.config import AverageConfig, check_averages
from openlm_lite.checkpoint import CheckpointConfig
from openlm_lite.config import ConfigError, Tree, Value
from openlm_lite.data.sources import DataConfig
from openlm_lite.errors import InputError
from openlm_lite.eval.loss import EvalConfig
from openlm_lite.guard import GuardConfig
from openlm_lite.hf.layouts import parameter_shapes
from openlm_lite.inherit import InitFrom
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.kernels import KernelConfig
from openlm_lite.model.loss import LossConfig
from openlm_lite.optim.batch_size import BatchSizes, BatchWarmupConfig
from openlm_lite.optim.build import OptimConfig
from openlm_lite.optim.groups import rules_of
from openlm_lite.optim.mup import problems_of_mup
from openlm_lite.optim.schedule import ScheduleConfig
from openlm_lite.parallel import ParallelConfig, check_reshard, problems
from openlm_lite.profile import ProfileConfig
from openlm_lite.telemetry import TelemetryConfig
from openlm_lite.watchdog import WatchdogConfig


@dataclass(frozen=True)
class RunSettings:
    """Where a run lives and what makes it repeatable."""

    dir: str
    """everything that the run writes; the same command on the same folder resumes"""
    seed: int = 0
    """of the initial weights (the order of the data has data.seed)"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA where there is a device; cuda: an error where there is none"""
    deterministic: bool = False
    """bit-identical repetition on a GPU too, at some cost in speed (a CPU always is)"""


@dataclass(frozen=True)
class LogConfig(TelemetryConfig):
    """How often the console gets a line; `metrics.jsonl` gets one for every step."""

    every_steps: int = 10
    norms_every: int = 0
    """steps between norms of gradients and weights by layer; 0: none"""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise InputError(f"log.every_steps = {self.every_steps}, must be at least 1")
        if self.norms_every < 0:
            raise InputError(f"log.norms_every = {self.norms_every}, must not be negative")


@dataclass(frozen=True)
class RunModel(ModelConfig):
    """The architecture, and the model that its first weights come from."""

    init_from: InitFrom = field(default_factory=InitFrom)

    def problems(self) -> list[str]:
        return super().problems() + self.init_from.problems(self.n_layers)

    @property
    def architecture(self) -> ModelConfig:
        """What stays once the weights are there."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


@dataclass(frozen=True)
class RunConfig:
    """One training run. The four sizes on top decide how much is trained, in which portions."""

    run: RunSettings
    model: RunModel
    data: DataConfig
    global_batch_tokens: int
    """tokens of one optimizer step, over all ranks and micro-batches"""
    micro_batch_size: int
    """sequences per rank in one forward pass"""
    total_tokens: int | None = None
    """trained in whole steps, rounded down; give this or total_steps"""
    total_steps: int | None = None
    batch_warmup: BatchWarmupConfig = field(default_factory=BatchWarmupConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    averages: dict[str, AverageConfig] = field(default_factory=dict)
    """of the weights, by name: kept beside them, validated and saved"""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> list[str]:
        found = []
        seq_len = self.data.seq_len
        if self.micro_batch_size < 1:
            found.append(f"micro_batch_size = {self.micro_batch_size}, must be at least 1")
        if seq_len > self.model.max_seq_len:
            found.append(
                f"data.seq_len = {seq_len} is longer than model.max_seq_len = "
                f"{self.model.max_seq_len}"
            )
        found += self._optim_problems()
        found += self._eval_problems()
        if seq_len < 1 or self.global_batch_tokens < 1 or self.global_batch_tokens % seq_len:
            near = max(1, round(self.global_batch_tokens / max(1, seq_len))) * seq_len
            found.append(
                f"global_batch_tokens = {self.global_batch_tokens} is not a multiple of "
                f"data.seq_len = {seq_len}; the nearest is {near}"
            )
        else:
            found += self.batch_warmup.problems(self.global_batch_tokens, seq_len)
        if (self.total_tokens is None) == (self.total_steps is None):
            found.append("give total_tokens or total_steps, one of them")
        elif self.steps < 1:
            found.append(
                f"total_tokens = {self.total_tokens} is less than the first step, of "
                f"{self.batch_sizes.at(0)} tokens"
                if self.total_steps is None
                else f"total_steps = {self.total_steps}, must be at least 1"
            )
        else:
            try:
                self.schedule_in_steps.check_length(self.steps)
            except InputError as e:
                found.append(str(e))
        if 0 < seq_len <= self.model.max_seq_len:
            masked = self.data.document_masking
            if self.parallel.cp > 1 and self.kernels.attention not in ("auto", "sdpa"):
                found.append(
                    f"kernels.attention = {self.kernels.attention}: context parallelism "
                    f"(parallel.cp = {self.parallel.cp}) has a kernel of its own; set "
                    "kernels.attention=auto"
                )
            found += problems(self.parallel, self.model, seq_len, self.optim.name, masked)
        return found + check_averages(self.averages, self.steps, self.data.val)

    def _eval_problems(self) -> list[str]:
        tasks, layout = self.eval.tasks, self.parallel
        if layout.tp * layout.cp == 1:
            return []
        asked = {
            "eval.tasks": bool(tasks.suite or tasks.texts),
            "eval.samples": bool(self.eval.samples.prompts),
        }
        return [
            f"{name}: with parallel.tp = {layout.tp} and parallel.cp = {layout.cp} several ranks "
            "share a row, which these cannot; leave them out, and ask the checkpoints (openlm "
            "eval, openlm generate)"
            for name, is_asked in asked.items()
            if is_asked
        ]

    def _optim_problems(self) -> list[str]:
        model, optim, found = self.model, self.optim, []
        if optim.groups:
            try:
                rules_of(parameter_shapes(model.architecture), optim.groups)
            except InputError as e:
                found.append(str(e))
        if optim.mup_base_width is not None:
            tied = model.tie_embeddings
            found += problems_of_mup(optim.mup_base_width, model.d_model, model.n_heads, tied)
        return found

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        if self.total_steps is not None:
            return self.total_steps
        return self.steps_for(self.total_tokens or 0)

    def steps_for(self, tokens: int) -> int:
        """Whole optimizer steps that the run's first `tokens` make."""
        return self.batch_sizes.steps_for(tokens)

    def tokens_at(self, step: int) -> int:
        """Tokens trained on before the zero-based `step`."""
        return self.batch_sizes.before(step)

    @property
    def batch_sizes(self) -> BatchSizes:
        """Tokens of each step."""
        return BatchSizes.of(max(1, self.global_batch_tokens), self.batch_warmup)

    def batch_at(self, step: int) -> int:
        """Sequences of the zero-based `step`, over all ranks."""
        return self.batch_sizes.at(step) // self.data.seq_len

    @property
    def schedule_in_steps(self) -> ScheduleConfig:
        """The schedule with its lengths in steps of this run."""
        return self.schedule.in_steps(self.steps_for, self.tokens_at(self.steps))

    @property
    def global_batch(self) -> int:
        """Sequences of an optimizer step of the full size, over all ranks."""
        return self.global_batch_tokens // self.data.seq_len

    def check_layout(self, world_size: int) -> None:
        """Raises InputError where the layout, or a batch of the run, does not fit the ranks."""
        sizes = self.parallel.sizes(world_size)
        check_reshard(self.parallel, sizes)
        step = 0
        for n_steps, _ in self.batch_sizes.stages(self.steps):
            self.micro_batches(sizes.data_ranks, step)
            step += n_steps

    def micro_batches(self, data_ranks: int, step: int) -> int:
        """Forward passes of one rank in the zero-based `step`; `data_ranks` have their own rows.

        While the batch is small, a rank with fewer rows than a micro-batch takes them in one.
        Raises InputError where the batch does not divide among the ranks.
        """
        rows = self.batch_at(step)
        full = rows == self.global_batch
        per_rank, rest = divmod(rows, data_ranks)
        if not full and not rest and per_rank < self.micro_batch_size:
            return 1
        if rest or per_rank % self.micro_batch_size:
            name = "global_batch_tokens" if full else "batch_warmup: steps of"
            ranks = "ranks" if self.parallel.cp == self.parallel.tp == 1 else "data ranks"
            raise InputError(
                f"{name} {'= ' if full else ''}{rows * self.data.seq_len} "
                f"{'' if full else 'tokens '}are {rows} sequences, which {data_ranks} {ranks} x "
                f"micro_batch_size = {self.micro_batch_size} do not divide; change one of them"
            )
        return per_rank // self.micro_batch_size


def load_run(source: str, words: Sequence[str] = ()) -> RunConfig:
    """The run of a recipe (path, or name of a shipped one) with `a.b=c` words on top."""
    path = config.find_file(source, "recipes", ".yaml")
    recipe = with_init_path(config.load_tree(path))
    overrides: Tree = {}
    for word in words:  # one by one: a bare path and further words about it come in any order
        overrides = config.merge(overrides, with_init_path(config.override_tree([word])))
    written, given = recipe.get("model"), overrides.get("model")
    base_given = isinstance(given, dict) and "base" in given
    names = written.keys() - {"init_from"} if isinstance(written, dict) else ()
    if base_given and names and "base" not in names:
        raise InputError(
            f"command line: model.base: {path} names every field of its architecture, and these "
            "win over a base; set model.… fields, or start from a recipe that has a model.base"
        )
    if toy.take_scale(recipe, overrides):
        try:
            full = config.decode(RunConfig, with_base_model(recipe))
        except InputError as e:
            raise InputError(f"scale: toy needs a recipe that is whole by itself:\n{e}") from None
        recipe = config.merge(recipe, toy.toy_sizes(full, overrides))
    tree = config.merge(recipe, overrides)
    return config.decode(RunConfig, with_base_model(tree))


def parse_run(text: str, origin: str) -> RunConfig:
    """The run of the text of a resolved config.yaml; `origin` is for the messages."""
    plain = config.parse_yaml(text, origin)
    if not isinstance(plain, dict):
        raise InputError(f"{origin}: holds a {type(plain).__name__}, must hold `key: value` lines")
    return config.decode(RunConfig, with_base_model(with_init_path(config.to_tree(plain, origin))))


def load_model(words: Sequence[str]) -> ModelConfig:
    """An architecture alone, from `model.…=…` words."""
    tree = with_base_model(config.override_tree(words))
    extra = [key for key in tree if key != "model"]
    if extra:
        raise InputError(
            f"command line: {', '.join(extra)}: without a recipe only model.… has a meaning; "
            "put a recipe first"
        )
    node = tree.get("model", {})
    return config.decode(ModelConfig, node if isinstance(node, dict) else {})


def with_init_path(tree: Tree) -> Tree:
    """`model: {init_from: PATH}` as `{init_from: {path: PATH}}`; null as a mapping of nothing."""
    node = tree.get("model")
    given = node.get("init_from") if isinstance(node, dict) else None
    if not isinstance(node, dict) or not isinstance(given, Value):
        return tree
    if given.value is not None and not isinstance(given.value, str):
        return tree  # decoding says what is wrong with it
    mapping: Tree = {} if given.value is None else {"path": given}
    return {**tree, "model": {**node, "init_from": mapping}}


def with_base_model(tree: Tree) -> Tree:
    """`model: {base: NAME, …}` with the file of that architecture put under it."""
    node = tree.get("model")
    if isinstance(node, Value) and isinstance(node.value, str):
        raise InputError(
            f"{node.origin}: model: {node.value!r} must be a mapping; write "
            f"model: {{base: {node.value}}} (on the command line model.base={node.value})"
        )
    if not isinstance(node, dict) or "base" not in node:
        return tree
    node = dict(node)
    base = node.pop("base")
    if not isinstance(base, Value) or not isinstance(base.value, str):
        raise InputError("model.base: must be the name or path of a file in model_configs/")
    try:
        path = config.find_file(base.value, "model_configs", ".json")
    except InputError as e:
        raise InputError(f"{base.origin}: model.base: {e}") from None
    architecture = config.load_tree(path)
    architecture.pop("comment", None)
    return {**tree, "model": config.merge(architecture, node)}


def resolved_yaml(cfg: RunConfig) -> str:
    """The run as a recipe that needs no other file."""
    return config.dump_yaml(cfg)


def model_json(model: ModelConfig) -> str:
    """The architecture in the form of the files in model_configs/."""
    return json.dumps(config.to_plain(model), indent=2) + "\n"
