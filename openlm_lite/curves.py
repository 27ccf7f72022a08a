"""Curves of runs for pictures and reports: what stands on the x axis, smoothing, fewer points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from openlm_lite.recorded import Recorded, number

X = Literal["step", "tokens", "flops", "time"]


class Axis(NamedTuple):
    """Where each training step of a run stands; lists of one length."""

    step: list[int]
    tokens: list[float]
    """trained on up to then; a branch that goes on in its parent's data counts on from it"""
    seconds: list[float]
    """of training steps: what validations, saves and times of standstill took is not in it"""


class Curve(NamedTuple):
    step: list[int]
    value: list[float]


def axis_of(run: Recorded) -> Axis:
    """Of the training steps whose record has `tokens`."""
    axis = Axis([], [], [])
    seconds = 0.0
    for record in run.trained:
        tokens = number(record, "tokens")
        if tokens is None or (axis.step and record["step"] <= axis.step[-1]):
            continue
        if axis.tokens or record["step"] == 1:
            trained = tokens - (axis.tokens[-1] if axis.tokens else 0.0)
            speed = number(record, "perf/tokens_per_second")
            seconds += trained / speed if speed and trained > 0 else 0.0
        axis.step.append(record["step"])
        axis.tokens.append(tokens)
        axis.seconds.append(seconds)
    return axis


def curve_of(records: Sequence[dict[str, Any]], key: str) -> Curve:
    """The finite numbers of `key`, by step; of several of one step the first."""
    curve, last = Curve([], []), -1
    for record in records:
        if key in record and record["step"] > last and (value := number(record, key)) is not None:
            last = record["step"]
            curve.step.append(last)
            curve.value.append(value)
    return curve


def at(axis: Axis, steps: Sequence[int], x: X, flops_per_token: float) -> list[float]:
    """Where `steps` (rising) stand on an axis; between and before training steps, in a line."""
    if x == "step":
        return [float(step) for step in steps]
    values = axis.seconds if x == "time" else axis.tokens
    known = [0, *axis.step]
    places = [axis.tokens[0] - _first_batch(axis) if x != "time" and values else 0.0, *values]
    found, i = [], 0
    for step in steps:
        while i + 1 < len(known) and known[i + 1] < step:
            i += 1
        if i + 1 == len(known):
            place = places[i]
        else:
            part = (step - known[i]) / max(1, known[i + 1] - known[i])
            place = places[i] + part * (places[i + 1] - places[i])
        found.append(place)
    return [place * flops_per_token for place in found] if x == "flops" else found


def _first_batch(axis: Axis) -> float:
    """Tokens before the first record: all of its own, unless it goes on from a parent's."""
    if axis.step[0] == 1 or len(axis.step) == 1:
        return axis.tokens[0]
    per_step = (axis.tokens[1] - axis.tokens[0]) / (axis.step[1] - axis.step[0])
    return min(axis.tokens[0], per_step * axis.step[0])


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Exponential moving average over about `window` values, corrected for its start (as Adam)."""
    weight = 1 - 1 / max(1, window)
    smoothed, average, missing = [], 0.0, 1.0
    for value in values:
        average = weight * average + (1 - weight) * value
        missing *= weight
        smoothed.append(average / (1 - missing))
    return smoothed


def window_of(n_steps: int) -> int:
    """Steps that a smoothed curve looks back over, unless it is said: a fiftieth of the run, but
    5 to 1000, and none for the first 25 steps."""
    return 1 if n_steps < 25 else max(5, min(1000, n_steps // 50))


def thin(curve: Curve, n: int) -> Curve:
    """At most `n` (4 or more) of its points, with its first, its last and every extreme.

    The points are cut into parts of one length, and each gives its least and its greatest: a spike
    of a single step stays as high as it was.
    """
    total = len(curve.step)
    if total <= n:
        return curve
    parts = (n - 2) // 2
    kept = {0, total - 1}
    for part in range(parts):
        inside = range(part * total // parts, (part + 1) * total // parts)
        kept.add(min(inside, key=curve.value.__getitem__))
        kept.add(max(inside, key=curve.value.__getitem__))
    order = sorted(kept)
    return Curve([curve.step[i] for i in order], [curve.value[i] for i in order])


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for n in range(1, max(map(len, parts), default=1) + 1):
        found = ["/".join(p[-n:]) for p in parts]
        if len(set(found)) == len(set(parts)):
            return found
    return ["/".join(p) for p in parts]
