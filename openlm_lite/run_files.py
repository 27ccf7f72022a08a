"""What the files of a run's folder and of a checkpoint are called; train.py says what they hold."""

from __future__ import annotations

CONFIG = "config.yaml"  # of a run, and of each checkpoint
MODEL = "model.json"  # of a checkpoint
INIT_FROM = "init_from.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
LOG = "log.txt"
STOPPED = "stopped.json"
"""after a stop on request: the run is to be launched again"""
LOCK = "lock"
CHECKPOINTS = "checkpoints"
"""the folder, where checkpoint.dir is not set"""


def log_of(rank: int) -> str:
    """log.txt, log-rank1.txt …"""
    return LOG if rank == 0 else f"log-rank{rank}.txt"


def is_log(name: str) -> bool:
    """Whether `log_of` has this name for some rank."""
    return name == LOG or name.startswith("log-rank")
