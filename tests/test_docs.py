"""The documentation says what the code says."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openlm_lite import cli, config
from openlm_lite.run import RunConfig, load_run

ROOT = Path(__file__).parents[1]
DOCS = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"])
WITH_COMMANDS = [*DOCS, ROOT / "README.md", ROOT / "CHANGELOG.md"]
CONFIG_TEXT = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")

# | `path` | type | `default` or required | meaning |
FIELD_ROW = re.compile(r"^\| `([\w.]+)` \| (.+?) \| (`[^`]*`|required) \| .+ \|$", re.MULTILINE)
# What looks like a field path in the text and is none.
NO_FIELDS = {"model.base"}
FILE_ENDINGS = (".py", ".json", ".txt", ".yaml")
# Pages that name the options of OpenLM itself.
OF_OPENLM = ("docs/from_openlm.md", "docs/architectures.md")
OTHER_OPTIONS = {  # of other programs, by page
    "CONTRIBUTING.md": "--basetemp --check",  # pytest, ruff
    "README.md": "--nodes",  # sbatch
    "docs/averages.md": "--averagers",  # OpenLM
    # wandb, OpenLM
    "docs/config.md": "--id --squash-mask-left --target-mask-individual --target-mask-left",
    "docs/lm_eval.md": "--batch_size --model_args --tasks",
    "docs/optimizers.md": "--optimizer --zero-head",  # benchmarks/
    # pip, benchmarks/
    "docs/performance.md": "--no-deps --only --part --rounds --target --threads --toy --vocab",
    "docs/reliability.md": "--id --repeats --shutdown-timeout",  # wandb, benchmarks/, torchrun
    "docs/science.md": "--redraw",  # benchmarks/
}
OF_TORCHRUN = (
    "--master-addr --master-port --nnodes --node-rank --nproc-per-node --rdzv-backend "
    "--rdzv-endpoint --rdzv-id --standalone"
)
# A command of ours: its verb (none behind train.py) and what follows it.
COMMAND = re.compile(r"(?<![\w/.-])(?:(?:openlm|-m openlm_lite) ([a-z]+)|train\.py)\b([^`\n]*)")
OPTION = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


def fields_of(cls: type, path: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Dotted path -> leaf field of a config dataclass."""
    hints = typing.get_type_hints(cls)
    found: dict[str, dataclasses.Field[Any]] = {}
    for field in dataclasses.fields(cls):
        at = f"{path}.{field.name}" if path else field.name
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= fields_of(hint, at)
        else:
            found[at] = field
    return found


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default as docs/config.md writes it."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    names = {None: "null", True: "true", False: "false", (): "[]"}
    special = value is None or value == () or isinstance(value, bool)
    return f"`{names[value] if special else value}`"


def test_config_md_has_a_row_for_every_field_and_no_other() -> None:
    rows = [match[1] for match in FIELD_ROW.finditer(CONFIG_TEXT)]
    assert sorted(rows) == sorted(fields_of(RunConfig))


def test_config_md_has_the_defaults_of_the_dataclasses() -> None:
    written = {match[1]: match[3] for match in FIELD_ROW.finditer(CONFIG_TEXT)}
    assert written == {path: default_of(field) for path, field in fields_of(RunConfig).items()}


def test_no_text_names_a_field_that_does_not_exist() -> None:
    """Inline code `room.name` in any document; code blocks may show mistakes on purpose."""
    known = set(fields_of(RunConfig)) | NO_FIELDS
    rooms = {path.split(".")[0] for path in known if "." in path}
    for path in DOCS:
        prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        named = set(re.findall(r"`([a-z]\w*\.[a-z][\w.]*)(?:=[^`]*)?`", prose))
        named = {name for name in named if not name.endswith(FILE_ENDINGS)}
        fields = {n for n in named if n.split(".")[0] in rooms}
        unknown = fields - known
        assert not unknown, f"{path.name}: {', '.join(sorted(unknown))}"


def test_the_recipes_in_config_md_load(tmp_path: Path) -> None:
    recipes = re.findall(r"```yaml\n(.*?)```", CONFIG_TEXT, flags=re.DOTALL)
    assert recipes
    for text in recipes:
        (tmp_path / "recipe.yaml").write_text(text)
        load_run(str(tmp_path / "recipe.yaml"))


def test_the_error_shown_in_config_md_is_the_one_that_comes() -> None:
    words = re.search(r"^\$ openlm config (\w+) (.+)$", CONFIG_TEXT, flags=re.MULTILINE)
    assert words is not None
    with pytest.raises(config.ConfigError) as caught:
        load_run(words[1], words[2].split())
    assert f"openlm: {caught.value}\n" in CONFIG_TEXT


def test_tests_named_in_the_docs_exist() -> None:
    sources = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    for path in DOCS:
        for name in re.findall(r"`(test_\w+)`", path.read_text(encoding="utf-8")):
            assert f"def {name}(" in sources, f"{path.name}: {name}"


def test_links_between_documents_lead_somewhere() -> None:
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_commands_in_the_docs_have_the_verbs_and_options_of_the_parser() -> None:
    """Also those with `…` or `[…]` in them, which are no command yet."""
    options = options_by_verb()
    for path in WITH_COMMANDS:
        for verb, rest in commands_in(path.read_text(encoding="utf-8")):
            assert verb in options, f"{path.name}: openlm {verb}"
            unknown = set(OPTION.findall(rest)) - options[verb]
            assert not unknown, f"{path.name}: openlm {verb}: no option {', '.join(unknown)}"


def test_options_in_the_docs_are_those_of_a_verb_or_known_to_be_of_another_program() -> None:
    ours = set[str]().union(*options_by_verb().values())
    for path in WITH_COMMANDS:
        page = path.relative_to(ROOT).as_posix()
        named = set(OPTION.findall(path.read_text(encoding="utf-8")))
        others = set(OTHER_OPTIONS.get(page, "").split())
        unknown = named - ours - others - set(OF_TORCHRUN.split())
        assert page in OF_OPENLM or not unknown, f"{page}: {', '.join(sorted(unknown))}"
        assert others <= named, f"{page} no longer names {', '.join(sorted(others - named))}"


def options_by_verb() -> dict[str, set[str]]:
    (verbs,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {
        verb: {option for action in parser._actions for option in action.option_strings}
        for verb, parser in verbs.choices.items()
    }


def commands_in(text: str) -> Iterator[tuple[str, str]]:
    """(verb, the rest of the line) of our commands; a line that ends with a \\ goes on."""
    for match in COMMAND.finditer(re.sub(r"\\\n\s*", " ", text)):
        yield match[1] or "train", match[2]
