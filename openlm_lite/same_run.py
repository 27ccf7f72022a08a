"""Whether a command goes on with the run that is there: what may differ, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

from openlm_lite import config
from openlm_lite.errors import InputError
from openlm_lite.run import RunConfig

# What a resumed run may change: none of it decides which model comes out (up to rounding).
MAY_CHANGE_ON_RESUME = (
    "run.dir",
    "micro_batch_size",
    "data.train",  # the manifest's checksum decides whether it is the same data
    "data.val",
    "data.prefetch_batches",
    "data.max_bad_shards",
    "data.cache_dir",
    "data.cache_gib",
    "parallel.",
    "kernels.",
    "profile.",
    "guard.on_nonfinite",  # these three decide where a run ends, not which model it would be
    "guard.max_skips",
    "guard.max_rewinds",
    "watchdog.",
    "checkpoint.",
    "eval.",
    "log.",
)


def _may_change(key: str) -> bool:
    moved = key.startswith("data.sources.") and key.endswith(".path")  # as data.train
    return moved or key.startswith(MAY_CHANGE_ON_RESUME)


def differences(cfg: RunConfig, there: RunConfig) -> dict[str, str]:
    """What decides on the model and differs from the run `there`: key -> a text that says how."""
    old = config.flatten(config.to_plain(there))
    new = config.flatten(config.to_plain(cfg))
    return {
        key: f"{key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_change(key)
    }


def check_same_run(
    cfg: RunConfig, there: RunConfig, place: str, setting: str, allow_change: Sequence[str] = ()
) -> list[str]:
    """What differs from the run there with permission (`allow_change`), as texts.

    place: where the run `there` was found; setting: run.dir or checkpoint.dir, which led there.
    Raises InputError where something else differs, naming it all.
    """
    known = {*config.flatten(config.to_plain(there)), *config.flatten(config.to_plain(cfg))}
    for key in allow_change:
        if not any(config.is_named(one, (key,)) for one in known):
            raise InputError(
                f"--allow-change {key}: no such key in the configuration; allowed are those of "
                "`openlm config`, such as optim.lr, or a section, such as optim"
            )
    differing = differences(cfg, there)
    refused = {
        key: text for key, text in differing.items() if not config.is_named(key, allow_change)
    }
    if refused:
        flags = " ".join(f"--allow-change {key}" for key in refused)
        raise InputError(
            f"{place}: holds a run with another configuration:\n  "
            + "\n  ".join(refused.values())
            + f"\nset {setting} to a new folder, go back to the values of the run there, or change "
            f"it on purpose: {flags}"
        )
    return list(differing.values())
