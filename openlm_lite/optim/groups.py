"""Other learning rates and weight decay for the parameters that a rule names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from openlm_lite.errors import InputError


@dataclass(frozen=True)
class GroupConfig:
    """A rule for the parameters whose names fit; where several fit, the last rule decides."""

    match: str
    """parameter name, with * for any text (dots too), ? for a character, [01] for one of these"""
    lr_scale: float = 1.0
    """times the learning rate of the step; 0 freezes"""
    weight_decay: float | None = None
    """instead of optim.weight_decay and of what optim.decay spares; null: as without the rule"""

    def __post_init__(self) -> None:
        problems = []
        if not self.match:
            problems.append("match is empty, give the name of a parameter or a pattern")
        for name, value in (("lr_scale", self.lr_scale), ("weight_decay", self.weight_decay)):
            if value is not None and value < 0:
                problems.append(f"{name} = {value}, must not be negative")
        if problems:
            raise InputError("optim.groups: " + "; ".join(problems))


def rules_of(names: Iterable[str], groups: Mapping[str, GroupConfig]) -> dict[str, GroupConfig]:
    """Parameter name -> the rule that decides on it; names without a rule are left out.

    Raises InputError for rules that decide on nothing, with the names that there are.
    """
    names = list(names)
    found: dict[str, str] = {}
    for rule, group in groups.items():
        found |= {name: rule for name in names if fnmatchcase(name, group.match)}
    used, problems = set(found.values()), []
    for rule in groups.keys() - used:
        match = groups[rule].match
        fits = any(fnmatchcase(name, match) for name in names)
        why = "later rules decide on all of them" if fits else "no parameter has such a name"
        problems.append(f"optim.groups.{rule}: match = {match!r}: {why}")
    if problems:
        listed = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))
        raise InputError(f"{'; '.join(sorted(problems))}; there are {listed} (N: layer, from 0)")
    return {name: groups[rule] for name, rule in found.items()}
