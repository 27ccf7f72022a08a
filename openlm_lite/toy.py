"""`scale=toy`: a recipe so small that a laptop runs it in seconds, to see that it works.

    default  <  model_configs/<base>.json  <  recipe  <  scale: toy  <  command line

It is taken apart before the one strict decode: what follows from it stands in the resolved config,
`scale` does not. Only sizes change, and where the run lives: what makes the recipe (optimizer,
rates, shape of the schedule, mixture, kind of model, what it starts from) stays. Warm-up, cooldown
and every interval keep their share of the run. The vocabulary stays: the data decides on it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from openlm_lite import config
from openlm_lite.config import Tree, Value
from openlm_lite.errors import InputError

if TYPE_CHECKING:
    from openlm_lite.run import RunConfig

STEPS, SEQUENCES, LAYERS = 40, 8, 2
WIDTH, HEADS, HEAD_DIM = 64, 4, 16
_SHORTEST = 32  # tokens of a row; rows of 2,048 and fewer get these, longer ones in proportion
_SUFFIX = "_toy"
_STEP = re.compile(r"(/checkpoints/step_\d+|@\d+)?/?$")  # of a path to start from: not the toy's


def take_scale(*trees: Tree) -> bool:
    """Whether one of the trees says `scale: toy`; takes the key out of all.

    Raises InputError for any other value.
    """
    found = [tree.pop("scale") for tree in trees if "scale" in tree]
    for one in found:
        if not isinstance(one, Value) or one.value not in ("toy", None):
            given = repr(one.value) if isinstance(one, Value) else "a mapping"
            where = f"{one.origin}: " if isinstance(one, Value) else ""
            raise InputError(f"{where}scale: {given}: must be toy (or null: the sizes as they are)")
    return bool(found) and isinstance(found[-1], Value) and found[-1].value == "toy"


def toy_sizes(cfg: RunConfig, given: Tree) -> Tree:
    """The sizes that `scale: toy` puts over the recipe `cfg`.

    given: the words of the command line, whose total_steps or total_tokens the shares are of.
    """
    long = max(1, cfg.data.seq_len // 64)
    seq_len = max(_SHORTEST, 1 << (long.bit_length() - 1))  # a power of two divides most blocks
    batch = SEQUENCES * seq_len
    steps = _total(given, batch) or min(STEPS, cfg.steps)
    share = steps / cfg.steps
    sizes: dict[str, Any] = {
        "run": {"dir": cfg.run.dir.rstrip("/") + _SUFFIX, "device": "cpu"},
        "model": _model(cfg, seq_len),
        "data": {"seq_len": seq_len} | _data(cfg, share * batch / cfg.global_batch_tokens, seq_len),
        "global_batch_tokens": batch,
        "micro_batch_size": min(cfg.micro_batch_size, SEQUENCES // 2),
        "schedule": _schedule(cfg, steps),
        "parallel": {"precision": "fp32", "compile": False},
        "checkpoint": {
            "every_steps": _scaled(cfg.checkpoint.every_steps, share),
            "keep_every": _scaled(cfg.checkpoint.keep_every, share),
        },
        "eval": {
            "every_steps": _scaled(cfg.eval.every_steps, share),
            "tokens": min(cfg.eval.tokens, 4 * batch),
        },
        "log": {"every_steps": _scaled(cfg.log.every_steps, share)},
        "averages": {
            name: {
                "every_steps": _scaled(one.every_steps, share),
                "start_step": int(one.start_step * share),
            }
            for name, one in cfg.averages.items()
        },
    }
    if cfg.batch_warmup.start_tokens is not None:
        halvings = (cfg.global_batch_tokens // cfg.batch_warmup.start_tokens).bit_length() - 1
        start = batch >> min(halvings, SEQUENCES.bit_length() - 1)
        grown = round(cfg.batch_warmup.tokens * share * batch / cfg.global_batch_tokens)
        sizes["batch_warmup"] = {"start_tokens": start, "tokens": max(grown, batch - start)}
        sizes["micro_batch_size"] = 1  # divides all of them
    if cfg.optim.mup_base_width is not None:  # as far from the model's width, in whole heads
        heads = max(1, round(HEADS * cfg.optim.mup_base_width / cfg.model.d_model))
        sizes["optim"] = {"mup_base_width": heads * HEAD_DIM}
    if cfg.total_steps is None:
        sizes["total_tokens"] = steps * batch
    else:
        sizes["total_steps"] = steps
    # an empty mapping would replace what is there
    return config.to_tree({k: v for k, v in sizes.items() if v != {}}, "scale: toy")


def _total(given: Tree, batch: int) -> int | None:
    """Steps that the command line asks for; what is no number is told by the decoding."""
    for name, each in (("total_steps", 1), ("total_tokens", batch)):
        node = given.get(name)
        if isinstance(node, Value) and isinstance(node.value, int | float):
            return max(1, int(node.value) // each)
    return None


def _scaled(n: int, share: float) -> int:
    """A number of steps in proportion: none stays none, some stay some."""
    return max(1, round(n * share)) if n else 0


def _model(cfg: RunConfig, seq_len: int) -> dict[str, Any]:
    model, init = cfg.model, cfg.model.init_from
    several = 1 if model.n_kv_heads == 1 else HEADS // 2
    sizes: dict[str, Any] = {
        "d_model": WIDTH,
        "n_layers": min(LAYERS, model.n_layers),
        "n_heads": HEADS,
        "n_kv_heads": HEADS if model.n_kv_heads == model.n_heads else several,
        "head_dim": HEAD_DIM,
        "d_ff": max(16, 8 * round(model.d_ff / model.d_model * WIDTH / 8)),
        "max_seq_len": seq_len * max(1, model.max_seq_len // cfg.data.seq_len),
    }
    if init.path is not None:
        start: dict[str, Any] = {"path": _STEP.sub("", init.path) + _SUFFIX}
        if init.layers is not None:
            map_here = init.layer_map(model.n_layers)[: sizes["n_layers"]]
            start["layers"] = ["new" if i is None else min(i, LAYERS - 1) for i in map_here]
        sizes["init_from"] = start
    return sizes


def _data(cfg: RunConfig, share: float, seq_len: int) -> dict[str, Any]:
    """Token counts of a mixture; its weights and epochs stay."""
    found: dict[str, Any] = {}
    budgets = {
        name: {"tokens": max(1, round(source.tokens * share))}
        for name, source in cfg.data.sources.items()
        if source.tokens
    }
    phases = {
        name: {"from_tokens": seq_len * round(phase.from_tokens * share / seq_len)}
        for name, phase in cfg.data.curriculum.items()
    }
    if budgets:
        found["sources"] = budgets
    if phases:
        found["curriculum"] = phases
    return found


def _schedule(cfg: RunConfig, steps: int) -> dict[str, Any]:
    """All lengths in steps, as shares of the run's."""
    full, share = cfg.schedule_in_steps, steps / cfg.steps
    cooldown = min(_scaled(full.cooldown_steps, share), max(1, steps - 1))
    sizes: dict[str, Any] = {
        "warmup_steps": min(_scaled(full.warmup_steps, share), steps - cooldown),
        "cooldown_steps": cooldown,
        **{f"{part}_tokens": None for part in ("warmup", "cooldown", "length")},
    }
    if full.length_steps is not None:
        sizes["length_steps"] = max(steps, round(full.length_steps * share))
    return sizes
