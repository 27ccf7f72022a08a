"""Where a run's weights come from: its parent, the parent's parent, up to the root.

A record of a start (`init_from.json`, of inherit.py) holds the facts of the parent's checkpoint,
and these hold the record of the parent's own start::

    branch ── facts of trunk's step 200 ── init_from ── facts of the root's step 1000 ── …

Nothing else has to be kept, and nothing of it has to be there any more when it is asked for. The
chain ends with an import, whose root was trained elsewhere, and with the parts of a soup.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from openlm_lite.log import human


def ancestors(record: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Plain values about every ancestor, the parent first; none for fresh weights.

    `step` and `tokens` are the ancestor's own count, null where it has none.
    """
    return [
        {
            "path": one["path"],
            "kind": one.get("kind", one.get("hf_class")),
            "step": facts.get("step"),
            "tokens": facts.get("tokens"),
        }
        for one, facts in _chain(record)
    ]


def tokens_before(record: Mapping[str, Any] | None) -> int | None:
    """Tokens that the weights had seen when the run's own count began; null where one is unknown.

    Of a soup it is null: its parts have seen different ones.
    A run that goes on in its parent's data has the parent's tokens in its own count.
    """
    total = 0
    for one, facts in _chain(record):
        if one.get("data") == "continue":
            continue
        if facts.get("tokens") is None:
            return None
        total += facts["tokens"]
    return total


def facts_of(record: Mapping[str, Any] | None, tokens: int) -> dict[str, Any]:
    """For `openlm inspect`, of a run that has trained on `tokens`; nothing for fresh weights."""
    if not record:
        return {}
    before = tokens_before(record)
    seen = None if before is None else before + tokens
    return {"lineage": ancestors(record), "tokens_seen": seen}


def describe_lineage(record: Mapping[str, Any]) -> str:
    """The chain as a line of the log."""
    names = []
    for one in ancestors(record):
        step, tokens = one["step"], one["tokens"]
        if step is None or tokens is None:
            at = one["kind"]
        else:
            at = f"step {step}, {human(tokens)} tokens"
        names.append(f"{one['path']} ({at})")
    before = tokens_before(record)
    seen = "an unknown number of" if before is None else human(before)
    return f"lineage: {' <- '.join(names)}; {seen} tokens seen before"


def _chain(record: Mapping[str, Any] | None) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """(record, facts of the checkpoint that it started from), the parent's first."""
    while isinstance(record, Mapping) and "path" in record:
        facts = record.get("facts")
        facts = dict(facts) if isinstance(facts, Mapping) else {}
        if isinstance(parts := facts.get("soup"), list):  # of `openlm average`: several parents
            yield record, facts | {"step": None, "tokens": None}
            yield from ((part, dict(part)) for part in parts)
            return
        yield record, facts
        imported = facts.get("source")  # of `openlm import`: trained elsewhere
        if isinstance(imported, Mapping) and "path" in imported:
            record = {**imported, "facts": {}}
        else:
            record = facts.get("init_from")
