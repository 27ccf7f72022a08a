"""A run that takes more from its parent than the weights: the optimizer's state, the place in the
data, or both (`model.init_from.optimizer`, `model.init_from.data`)::

    trunk               0 ──────── 200 ──────── 400 ──── …     runs/trunk: never written to
    data: continue                  ├─ 201 … 260               step, tokens, data of the trunk
    data: restart                   └─ 0 … 60                  its own count, its own data

What `continue` goes on in is the count, too: schedule and total_steps (total_tokens) are those of
the whole line from the root on. A branch that takes both and has the trunk's own schedule trains
what the trunk itself would have trained, to the bit.
"""

from __future__ import annotations

from torch import nn

from openlm_lite import checkpoint, dist, run, run_files
from openlm_lite.checkpoint import metadata_of
from openlm_lite.commit import Commit, DamagedError, TrainState, read_commit
from openlm_lite.data.sources import bad_shards_of, data_facts
from openlm_lite.data.stream import TokenStream
from openlm_lite.errors import InputError, RunError
from openlm_lite.inherit import Record
from openlm_lite.run import RunConfig
from openlm_lite.safe_dcp import Optimizers
from openlm_lite.same_run import differences

OPTIMIZER_STATE = "optim."
"""in front of the names of the optimizer's tensors in a checkpoint"""
# Keys of the configuration, or their beginnings:
_OPTIMIZER = ("optim.name",)  # the kind; rates and betas are the branch's own
_DATA = ("data.", "global_batch_tokens", "batch_warmup")  # which rows make the next batch
_LENGTH = ("total_tokens", "total_steps")


def takes_more(cfg: RunConfig) -> bool:
    """Whether the run wants more of its parent than weights."""
    init = cfg.model.init_from
    return init.path is not None and (init.optimizer or init.data == "continue")


def check_branch(cfg: RunConfig, path: str, kind: str, stream: TokenStream) -> None:
    """Whether the parent at `path`, a step folder if it is a checkpoint, has what is asked for.

    Nothing is written. Raises InputError that names everything that is missing or differs.
    """
    if not takes_more(cfg):
        return
    where = f"model.init_from: {path} ({kind})"
    if kind != "checkpoint":
        raise InputError(
            f"{where} holds weights alone; for model.init_from.optimizer=true and "
            "model.init_from.data=continue name a run of openlm, or one of its checkpoints"
        )
    try:
        commit = read_commit(path)
    except DamagedError as problem:
        raise InputError(f"{where}: {problem}; use another checkpoint") from None
    if run_files.CONFIG not in commit.files:
        raise InputError(
            f"{where} was not written by a run: it has no config.yaml, no optimizer state and no "
            "place in any data; leave model.init_from.optimizer and .data out"
        )
    text = checkpoint.read_document(path, run_files.CONFIG)
    parent = run.parse_run(text, f"{path}/config.yaml")
    problems: list[str] = []
    if cfg.model.init_from.optimizer:
        problems += _optimizer_problems(cfg, parent, commit)
    if cfg.model.init_from.data == "continue":
        problems += _data_problems(cfg, parent, commit, stream)
    if problems:
        raise InputError(f"{where} does not fit:\n  " + "\n  ".join(problems))


def _optimizer_problems(cfg: RunConfig, parent: RunConfig, commit: Commit) -> list[str]:
    remedy = "use the parent's optimizer, or model.init_from.optimizer=false"
    names = metadata_of(commit).state_dict_metadata
    if not any(name.startswith(OPTIMIZER_STATE) for name in names):
        return [f"it has no optimizer state (weights alone, or no step was made); {remedy}"]
    differing = differences(cfg, parent)
    return [f"{text}; {remedy}" for key, text in differing.items() if key in _OPTIMIZER]


def _data_problems(
    cfg: RunConfig, parent: RunConfig, commit: Commit, stream: TokenStream
) -> list[str]:
    """Why the run cannot go on in the parent's data."""
    deciding = _DATA
    if any(source.epochs or source.tokens for source in cfg.data.sources.values()):
        deciding += _LENGTH  # budgets are spread over the whole of it
    differing = [t for key, t in differences(cfg, parent).items() if key.startswith(deciding)]
    now = data_facts(stream)
    differing += [
        f"{what}: not as in the parent's checkpoint ({', '.join(stream.names)})"
        for key, what in (("order_version", "order of the data"), ("data", "manifests and lanes"))
        if commit.facts.get(key) != now[key]
    ]
    problems = [
        f"{text}; to go on in the data they must be the parent's: with other data, another "
        "mixture or another seed, model.init_from.data=restart"
        for text in differing
    ]
    if cfg.steps <= commit.step:
        problems.append(
            f"the parent stands at step {commit.step}, the run ends at step {cfg.steps}: with "
            "data=continue steps and tokens are counted from the parent's start; train longer"
        )
    if not cfg.model.init_from.optimizer and cfg.guard.on_spike == "rewind":
        problems.append(
            "guard.on_spike = rewind saves before the first step, which a fresh optimizer at step "
            f"{commit.step} has no state for; take the optimizer, too, or use guard.on_spike=skip"
        )
    return problems


def take_over(
    cfg: RunConfig,
    record: Record | None,
    model: nn.Module,
    optimizer: Optimizers,
    stream: TokenStream,
) -> TrainState | None:
    """After the weights: the optimizer's state, and where to go on; collective.

    record: of the first weights, which says what they were taken from. Returns the parent's state
    for a run that goes on from there, None for one that begins anew.
    """
    if record is None or not takes_more(cfg):
        return None
    path = record["path"]
    dist.on_all_ranks(lambda: check_branch(cfg, path, record["kind"], stream), RunError)
    state = None
    if cfg.model.init_from.optimizer:
        state = checkpoint.load_checkpoint(path, model, optimizer)
    if cfg.model.init_from.data != "continue":
        return None
    stream.bad_shards.update(bad_shards_of(record["facts"]))
    return state or read_commit(path).state
