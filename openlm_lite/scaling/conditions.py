"""`k=v,k2<v2`: which rows of a table are meant."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openlm_lite.errors import InputError

_FORM = re.compile(r"\s*([^=<>!\s][^=<>!]*?)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*")
SAME_NUMBER = 1e-6
"""relative: M = 20 is meant to hold for tokens that were rounded to whole numbers"""


@dataclass(frozen=True)
class Condition:
    """One comparison of a column with a value, as numbers where both are numbers."""

    column: str
    operator: str
    value: str

    def __str__(self) -> str:
        return f"{self.column}{self.operator}{self.value}"

    def holds(self, cell: Any) -> bool:
        """Whether a cell fulfils it; a cell that is missing fulfils != only."""
        number = number_in(self.value)
        is_number = isinstance(cell, int | float) and not isinstance(cell, bool)
        if is_number and number is not None:
            same = math.isclose(cell, number, rel_tol=SAME_NUMBER)
            return {
                "=": same,
                "!=": not same,
                "<": cell < number and not same,
                ">": cell > number and not same,
                "<=": cell < number or same,
                ">=": cell > number or same,
            }[self.operator]
        text = str(cell).lower() if isinstance(cell, bool) else str(cell)
        return {"=": text == self.value, "!=": text != self.value}.get(self.operator, False)


def parse_conditions(words: Sequence[str], option: str) -> list[Condition]:
    """The conditions of all words of an option, each of which may hold several."""
    found = []
    for part in (part for word in words for part in word.split(",")):
        match = _FORM.fullmatch(part)
        if match is None or not match[3]:
            raise InputError(
                f"{option} {part!r}: must be COLUMN=VALUE, or with != < <= > >= between them; "
                "several are separated by commas"
            )
        condition = Condition(match[1], match[2], match[3])
        if condition.operator[0] in "<>" and number_in(condition.value) is None:
            raise InputError(f"{option} {part}: {condition.value!r} is not a number")
        found.append(condition)
    return found


def number_in(text: str) -> float | None:
    """The number that a text is, or None."""
    try:
        return float(text)
    except ValueError:
        return None
