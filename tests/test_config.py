"""Strict decoding: every mistake named at once, with its place and the right name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite import config
from openlm_lite.config import ConfigError
from openlm_lite.errors import InputError


@dataclass(frozen=True)
class Room:
    lr: float = 1e-3
    name: Literal["cosine", "linear"] = "cosine"
    sizes: tuple[int, ...] = ()
    limit: int | None = None
    on: bool = False


@dataclass(frozen=True)
class House:
    width: int
    room: Room = field(default_factory=Room)
    paths: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.width < 0:
            raise InputError(f"width = {self.width}, must not be negative")


def decode(text: str, *words: str) -> House:
    tree = config.to_tree(config.parse_yaml(text, "house.yaml"), "house.yaml")
    return config.decode(House, config.merge(tree, config.override_tree(words)))


houses = st.builds(
    House,
    width=st.integers(0, 10**12),
    room=st.builds(
        Room,
        lr=st.floats(allow_nan=False, allow_infinity=False),
        name=st.sampled_from(["cosine", "linear"]),
        sizes=st.lists(st.integers()).map(tuple),
        limit=st.none() | st.integers(),
        on=st.booleans(),
    ),
    paths=st.dictionaries(
        st.from_regex(r"[a-z]{1,5}", fullmatch=True),
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    ),
)


@given(houses)
def test_dump_and_decode_are_inverse(house: House) -> None:
    text = config.dump_yaml(house)
    tree = config.to_tree(config.parse_yaml(text, "x"), "x")
    assert config.decode(House, tree) == house


def test_the_command_line_wins_over_the_file() -> None:
    house = decode("{width: 3, room: {lr: 1, on: true}}", "room.lr=2e-3", "paths.a=b/c.txt")
    assert house == House(3, Room(lr=2e-3, on=True), {"a": "b/c.txt"})
    assert decode("{width: 3}", "room.sizes=[1, 2]", "room.limit=null").room.sizes == (1, 2)


def test_numbers_are_read_as_people_write_them() -> None:
    assert decode("{width: 1e3}").width == 1000
    assert decode("{width: 1_000, room: {lr: 3e-4}}").room.lr == 3e-4


def test_scalars_are_those_of_yaml_1_2() -> None:
    assert decode("{width: 0300}").width == 300
    house = decode("{width: 1}", "paths.a=2024-01-01", "paths.b=10:00", "paths.c=on")
    assert house.paths == {"a": "2024-01-01", "b": "10:00", "c": "on"}
    with pytest.raises(ConfigError, match="width: expected a whole number, got '10:00'"):
        decode("{width: 10:00}")


def test_an_empty_mapping_replaces() -> None:
    assert decode("{width: 1, paths: {a: x}}", "paths={}").paths == {}
    assert decode("{width: 1, paths: {a: x}}", "paths.b=y").paths == {"a": "x", "b": "y"}


def test_all_mistakes_are_reported_at_once_with_their_places() -> None:
    text = "{room: {lerning_rate: 3, name: cosin, on: 1, limit: x}, wdth: 5}"
    with pytest.raises(ConfigError) as caught:
        decode(text, "room.sizes=[a]", "room=3")
    assert caught.value.problems == [
        "house.yaml: wdth: no such field; did you mean width?",
        "width: missing; give a value (a whole number)",
        "command line: room: 3 is not a mapping; it has the fields lr, name, sizes, limit, on",
    ]
    with pytest.raises(ConfigError) as caught:
        decode(text, "room.sizes=[a]")
    assert caught.value.problems == [
        "house.yaml: wdth: no such field; did you mean width?",
        "width: missing; give a value (a whole number)",
        "house.yaml: room.lerning_rate: no such field; did you mean room.lr?",
        "house.yaml: room.name: 'cosin' is none of cosine, linear; did you mean cosine?",
        "command line: room.sizes: expected a whole number, got 'a'",
        "house.yaml: room.limit: expected a whole number or null, got 'x'",
        "house.yaml: room.on: expected true or false, got 1",
    ]


def test_a_field_in_the_wrong_room_is_found() -> None:
    with pytest.raises(ConfigError, match=r"command line: lr: no such field; did you mean room.lr"):
        decode("{width: 1}", "lr=3")


def test_a_rule_of_a_dataclass_names_the_file() -> None:
    with pytest.raises(ConfigError, match=r"house.yaml: width = -1, must not be negative"):
        decode("{width: -1}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{width: 1, width: 2}", "the key 'width' stands twice"),
        ("{width: [}", "not readable as YAML"),
        ("{[1]: 2}", "not readable as YAML"),
        ("!!python/object/apply:os.system ['true']", "not readable as YAML"),
    ],
)
def test_bad_yaml_is_one_error(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        decode(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{width: true}", "{width: 1.5}", "{width: '3'}", "{width: null}"])
def test_nothing_but_whole_numbers_is_a_whole_number(text: str) -> None:
    with pytest.raises(ConfigError, match="width: expected a whole number, got"):
        decode(text)


@pytest.mark.parametrize("text", [".nan", ".inf", "true", "'1'"])
def test_nothing_but_finite_numbers_is_a_number(text: str) -> None:
    with pytest.raises(ConfigError, match=r"room\.lr: expected a number, got"):
        decode(f"{{width: 1, room: {{lr: {text}}}}}")


def test_files_are_found_by_path_and_by_shipped_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("{}")
    assert config.find_file(str(mine), "recipes", ".yaml") == mine
    shipped = config.find_file("quickstart", "recipes", ".yaml")
    assert shipped == config.find_file("recipes/quickstart.yaml", "recipes", ".yaml").resolve()
    with pytest.raises(InputError, match="did you mean quickstart"):
        config.find_file("quikstart", "recipes", ".yaml")
    with pytest.raises(InputError, match="no such file"):
        config.find_file(str(tmp_path / "quickstart.yaml"), "recipes", ".yaml")
    with pytest.raises(InputError, match="no such file"):
        config.find_file(str(tmp_path / "recipes" / "quickstart.yaml"), "recipes", ".yaml")


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("DCLM-1B", "dclm_1b"),
        ("dclm_1b.json", "dclm_1b"),
        ("model_configs/DCLM-1B.json", "dclm_1b"),
        ("mistral-7b-v0.3", "mistral_7b_v0.3"),
        ("stablelm-2-1_6b", "stablelm_2_1.6b"),
        ("OLMo-2-1B", "olmo2_1b"),
        ("openlm_1b", "open_lm_1b"),
        ("openlm_7b", "openlm_7b"),
        ("OpenLM-7B", "openlm_7b"),
        ("Open-LM-7B", "open_lm_7b"),
        ("open_lm_7b", "open_lm_7b"),
    ],
)
def test_a_shipped_name_may_differ_in_case_and_separators(written: str, found: str) -> None:
    shipped = config.assets("model_configs")
    assert config.find_file(written, "model_configs", ".json") == shipped / f"{found}.json"


@pytest.mark.parametrize(
    "written",
    [
        "OpenLM7B",  # openlm_7b or open_lm_7b?
        "qwen3_17b",  # is not 1.7b
        "llama-27b",  # is not 2-7b
        "elsewhere/DCLM-1B",
        "...",
        "",
    ],
)
def test_a_shipped_name_is_never_guessed(written: str) -> None:
    with pytest.raises(InputError, match="no such file, nor one of model_configs/"):
        config.find_file(written, "model_configs", ".json")
