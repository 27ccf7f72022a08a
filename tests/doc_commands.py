"""The commands that the documents show, and what their own parsers say of them.

A command is a line of a fenced block that starts, perhaps behind `$ ` or `NAME=value`, with one of
`PROGRAMS`; where one line of a block has `$ `, the others are output. A line goes on behind a
backslash and within quotes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "slurm" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = (
    *("openlm", "python", "python3", "torchrun", "make", "pip", "uv", "bash", "sh", "source"),
    *("sbatch", "srun", "scontrol", "scancel", "ray", "mkdocs", "pytest", "wandb", "tensorboard"),
    *("git", "curl", "wget", "docker", "apt", "apt-get", "sudo", "export", "cd", "cat", "mkdir"),
    *("mv", "rm", "ls", "tar", "nvidia-smi"),
)
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_SHELL = {"", "sh", "bash", "shell", "console", "text"}
_VARIABLE = re.compile(r"[A-Z_]+=\S*$")


class Command(NamedTuple):
    """One command of a document, without its comment."""

    document: str
    line: int
    text: str
    output: str
    """what the block shows below it, up to the next command"""

    @property
    def where(self) -> str:
        return f"{self.document}:{self.line}: {self.text}"


def all_commands() -> list[Command]:
    return [command for path in DOCUMENTS for command in commands_of(path)]


def commands_of(path: Path) -> Iterator[Command]:
    text = path.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        if match[2] in _SHELL:
            first = text[: match.start(3)].count("\n") + 1
            lines = [line[len(match[1]) :] for line in match[3].split("\n")]
            yield from _of_block(str(path.relative_to(ROOT)), first, lines)


def files_of(path: Path) -> dict[str, str]:
    """The YAML blocks that begin with `# NAME.yaml`, by that name."""
    blocks = _FENCE.findall(path.read_text(encoding="utf-8"))
    named = {
        re.match(r"# ([\w-]+\.yaml)\n", text): text for _, kind, text in blocks if kind == "yaml"
    }
    return {name[1]: text for name, text in named.items() if name is not None}


def _of_block(document: str, first: int, lines: list[str]) -> Iterator[Command]:
    prompted = any(line.startswith("$ ") for line in lines)
    if lines[0].startswith("#!"):  # a script: shown whole
        return
    at = 0
    while at < len(lines):
        start, line = at, lines[at]
        at += 1
        if not (line.startswith("$ ") if prompted else is_command(line)):
            continue
        whole = line.removeprefix("$ ")
        while at < len(lines) and (whole.endswith("\\") or words_of(whole) is None):
            whole = whole.removesuffix("\\") + ("" if whole.endswith("\\") else "\n") + lines[at]
            at += 1
        end = at
        while prompted and end < len(lines) and not lines[end].startswith("$ "):
            end += 1
        yield Command(document, first + start, _plain(whole), "\n".join(lines[at:end]))


def is_command(line: str) -> bool:
    """Whether it starts with a program that we know, variables aside."""
    words = [word for word in line.split() if not _VARIABLE.match(word)]
    return bool(words) and words[0].rpartition("/")[2] in PROGRAMS and line == line.lstrip()


def words_of(text: str) -> list[str] | None:
    """As a shell takes it apart, comments left out; None: a quote is open."""
    escaped = re.sub(
        r"\$'([^']*)'", lambda m: shlex.quote(m[1].encode().decode("unicode_escape")), text
    )
    try:
        return shlex.split(escaped, comments=True)
    except ValueError:
        return None


def _plain(text: str) -> str:
    """Without a comment, and with single blanks outside quotes."""
    text = re.sub(r"\s+#\s.*$", "", text)
    return re.sub(r" {2,}", " ", text).strip()


def flags_of(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[\w-]+", text)
