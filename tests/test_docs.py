"""The documentation says what the code says."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from openlm_lite import config
from openlm_lite.run import RunConfig, load_run

ROOT = Path(__file__).parents[1]
DOCS = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"])
CONFIG_TEXT = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")

# | `path` | type | `default` or required | meaning |
FIELD_ROW = re.compile(r"^\| `([\w.]+)` \| (.+?) \| (`[^`]*`|required) \| .+ \|$", re.MULTILINE)
# What looks like a field path in the text and is none.
NO_FIELDS = {"model.base"}
FILE_ENDINGS = (".py", ".json", ".txt", ".yaml")


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
