"""Prints, after the zoo, the table of docs/architectures.md."""

from __future__ import annotations

from typing import Any

from tests.hf.zoo import MEASURED


def table() -> list[str]:
    rows = ["| class | largest difference in | largest difference out |", "|---|---|---|"]
    for name, row in sorted(MEASURED.items()):
        shown = [f"{row[way]:.1e}" if way in row else "" for way in ("in", "out")]
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return rows


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MEASURED:
        terminalreporter.section("logits, fp32, tiny random models")
        for line in table():
            terminalreporter.write_line(line)
