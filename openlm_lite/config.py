"""YAML or JSON and `a.b=c` words to frozen dataclasses, strictly; all mistakes in one error.

Sources are merged into one tree of plain values first, each leaf remembering where it came from;
one decode then checks every name and type against the dataclasses::

    model_configs/<base>.json  <  recipe  <  command line   ──merge──>  Tree  ──decode──>  dataclass
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from openlm_lite.errors import InputError
from openlm_lite.redact import refuse_credentials

T = TypeVar("T")


class ConfigError(InputError):
    """All that is wrong with a configuration, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Value:
    """A leaf of the merged tree: what was written, and where (`recipes/x.yaml`, `command line`)."""

    value: Any
    origin: str


Tree = dict[str, "Tree | Value"]


def assets(folder: str) -> Path:
    """`model_configs` or `recipes`: inside an installed package, else on top of the checkout."""
    package = Path(__file__).parent
    installed = package / folder
    return installed if installed.is_dir() else package.parent / folder


def find_file(name: str, folder: str, suffix: str) -> Path:
    """The file that the user means: a path, or the name of one that is shipped in `folder`.

    A shipped name may differ in case, dashes, underscores and dots where only one file fits. A
    file with as many separators wins: `OpenLM-7B` is openlm_7b, though open_lm_7b is near.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = assets(folder)
    stem = path.name.removesuffix(suffix)
    names = sorted(p.stem for p in shipped.glob(f"*{suffix}"))
    if str(path.parent) in (".", folder):
        for spelling in (str, _with_dashes, _squeezed):
            fits = [other for other in names if spelling(other) == spelling(stem)]
            if len(fits) == 1:
                return shipped / f"{fits[0]}{suffix}"
    close = difflib.get_close_matches(stem, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise InputError(f"{name}: no such file, nor one of {folder}/ ({', '.join(names)}){hint}")


def _with_dashes(name: str) -> str:
    return re.sub(r"[_.]", "-", name).casefold()


def _squeezed(name: str) -> str:
    """Without the separators, but for those between two digits: 17b is not 1.7b."""
    return re.sub(r"(?<!\d)-+|-+(?!\d)", "", _with_dashes(name))


_NOT_AS_IN_YAML_1_1 = ("bool", "int", "timestamp")


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2, and no key twice.

    In the YAML 1.1 of PyYAML, 1e-3 is a text, `on`, `off`, `yes`, `no` are booleans, 010 is eight,
    10:00 is six hundred and 2024-01-01 is a date.
    """

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in _NOT_AS_IN_YAML_1_1]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
_DECIMAL = re.compile(r"^[-+]?[0-9][0-9_]*$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""), 10)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _DECIMAL, list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


class _Dumper(yaml.SafeDumper):
    """Quotes text that this loader, or one of YAML 1.1, would read as a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _DECIMAL, list("-+0123456789"))


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def parse_yaml(text: str, origin: str) -> Any:
    """The plain value of YAML (or JSON) text."""
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader: plain values only
        _check_size(value, {})
        return value
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as e:
        raise InputError(f"{origin}: not readable as YAML: {' '.join(str(e).split())}") from None


_MOST_VALUES = 100_000


def _check_size(value: Any, sizes: dict[int, int]) -> int:
    """The number of plain values in `value`, what is referred to (`*name`) counted each time.

    Ten lines of references to references make 10**10. Raises ValueError above _MOST_VALUES.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) in sizes:
        if not sizes[id(value)]:
            raise ValueError("a value that holds itself")
        return sizes[id(value)]
    sizes[id(value)] = 0  # under way
    inner = value.values() if isinstance(value, dict) else value
    size = 1 + sum(_check_size(item, sizes) for item in inner)
    if size > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES} values")
    sizes[id(value)] = size
    return size


def load_tree(path: Path) -> Tree:
    """The tree of a YAML or JSON file whose top is a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read: {e}") from None
    plain = parse_yaml(text, str(path))
    if plain is None:
        plain = {}
    if not isinstance(plain, dict):
        raise InputError(f"{path}: holds a {type(plain).__name__}, must hold `key: value` lines")
    return to_tree(plain, str(path))


def to_tree(plain: Mapping[str, Any], origin: str) -> Tree:
    """Plain nested mappings as a tree whose leaves know their origin."""
    return {
        str(key): to_tree(value, origin) if isinstance(value, dict) else Value(value, origin)
        for key, value in plain.items()
    }


def override_tree(words: Sequence[str]) -> Tree:
    """The tree of command line words `a.b=c`; c is read as YAML, so `[1, 2]` and `null` work."""
    tree: Tree = {}
    for word in words:
        dotted, separator, text = word.partition("=")
        keys = dotted.split(".")
        if not separator or not all(keys):
            raise InputError(f"command line: {word!r} is not of the form name=value or a.b=value")
        node: Tree = {}
        top = node
        for key in keys[:-1]:
            child: Tree = {}
            node[key] = child
            node = child
        value = parse_yaml(text, f"command line: {dotted}")
        origin = "command line"
        node[keys[-1]] = to_tree(value, origin) if isinstance(value, dict) else Value(value, origin)
        tree = merge(tree, top)
    return tree


def merge(low: Tree, high: Tree) -> Tree:
    """`high` wins leaf by leaf; mappings are merged, but an empty one replaces what was there."""
    merged = dict(low)
    for key, value in high.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value:
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def decode(cls: type[T], tree: Tree) -> T:
    """The dataclass `cls` from a tree.

    Raises:
        ConfigError: every unknown name (with the nearest right one), wrong type, missing field
            and impossible combination found, each with its origin and dotted path.
    """
    problems: list[str] = []
    value = _decode_dataclass(cls, tree, "", problems, _all_paths(cls))
    if problems:
        raise ConfigError(problems)
    return value


def to_plain(config: Any) -> Any:
    """Dataclasses, tuples and mappings as plain values for YAML and JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_plain(item) for item in config]
    return config


def dump_yaml(config: Any) -> str:
    """YAML text that `decode` reads back to the same dataclass."""
    return yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flatten(plain: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain mappings as `{a.b.c: value}`."""
    if not isinstance(plain, dict):
        return {prefix: plain}
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def is_named(key: str, names: Sequence[str]) -> bool:
    """Whether `names` has the dotted `key`, or a section that it lies in."""
    return any(key == name or key.startswith(name + ".") for name in names)


def _decode_dataclass(
    cls: type, tree: Tree, path: str, problems: list[str], known: list[str]
) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    before = len(problems)
    for key in tree:
        if key not in fields:
            problems.append(_unknown(tree[key], key, path, known, list(fields)))
    arguments = {}
    for name, field in fields.items():
        at = f"{path}.{name}" if path else name
        if name in tree:
            arguments[name] = _decode(hints[name], tree[name], at, problems, known)
        elif dataclasses.is_dataclass(hints[name]):
            arguments[name] = _decode(hints[name], {}, at, problems, known)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{at}: missing; give a value ({_type_name(hints[name])})")
    if len(problems) > before:
        return None
    try:
        return cls(**arguments)
    except ConfigError as e:
        problems.extend(e.problems)
    except InputError as e:
        where = _origin_of(tree)
        problems.append(f"{where}: {e}" if where else str(e))
    return None


def _decode(hint: Any, node: Tree | Value, path: str, problems: list[str], known: list[str]) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(node, Value):
            problems.append(
                f"{node.origin}: {path}: {node.value!r} is not a mapping; it has the fields "
                f"{', '.join(f.name for f in dataclasses.fields(hint))}"
            )
            return None
        return _decode_dataclass(hint, node, path, problems, known)
    origin_type, args = typing.get_origin(hint), typing.get_args(hint)
    if origin_type is dict:
        if isinstance(node, Value):
            problems.append(f"{node.origin}: {path}: {node.value!r} is not a mapping of names")
            return None
        return {k: _decode(args[1], v, f"{path}.{k}", problems, known) for k, v in node.items()}
    if isinstance(node, dict):
        problems.append(
            f"{_origin_of(node)}: {path}: expected {_type_name(hint)}, got a mapping with "
            f"{', '.join(node)}"
        )
        return None
    try:
        value = _coerce(hint, node.value)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):  # it would stand in config.yaml and in every checkpoint
                refuse_credentials(text, f"{node.origin}: {path}")
        return value
    except _WrongTypeError as e:
        problems.append(f"{node.origin}: {path}: {e}")
    except InputError as e:
        problems.append(str(e))
    return None


class _WrongTypeError(Exception):
    pass


# What other frameworks call it: used only to say "did you mean", never to accept the name.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "max_lr": "lr",
    "peak_lr": "lr",
    "min_lr": "end_lr",
    "wd": "weight_decay",
    "clip": "grad_clip",
    "max_grad_norm": "grad_clip",
    "grad_clip_norm": "grad_clip",
    "warmup": "warmup_steps",
    "scheduler": "schedule",
    "optimizer": "optim",
    "max_steps": "total_steps",
    "train_steps": "total_steps",
    "max_tokens": "total_tokens",
    "batch_size": "global_batch_tokens",
    "global_batch_size": "global_batch_tokens",
    "sequence_length": "seq_len",
    "block_size": "seq_len",
    "context_length": "max_seq_len",
    "max_position_embeddings": "max_seq_len",
    "hidden_size": "d_model",
    "hidden_dim": "d_model",
    "dim": "d_model",
    "n_embd": "d_model",
    "intermediate_size": "d_ff",
    "ffn_hidden": "d_ff",
    "num_hidden_layers": "n_layers",
    "num_layers": "n_layers",
    "depth": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "n_head": "n_heads",
    "tie_word_embeddings": "tie_embeddings",
    "weight_tying": "tie_embeddings",
    "rms_norm_eps": "norm_eps",
    "z_loss_coefficient": "z_loss",
    "output_dir": "dir",
    "save_every": "every_steps",
    "pretrained": "init_from",
    "attn": "attention",
    "mlp": "feed_forward",
    "ffn": "feed_forward",
    "embed": "embeddings",
    "ln_f": "final_norm",
    "lm_head": "head",
    "torchcompile": "compile",
    "dtype": "precision",
}


def _coerce(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`; 3 is a float, 1e3 is an int, nothing else is converted."""
    origin_type, args = typing.get_origin(hint), typing.get_args(hint)
    if origin_type in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in args:
            if option is not type(None):
                try:
                    return _coerce(option, value)
                except _WrongTypeError:
                    continue
    elif origin_type is typing.Literal:
        if value in args and not isinstance(value, bool):
            return value
        close = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
        hint_text = f"; did you mean {close[0]}?" if close else ""
        raise _WrongTypeError(f"{value!r} is none of {', '.join(map(str, args))}{hint_text}")
    elif origin_type is tuple and isinstance(value, list):
        return tuple(_coerce(args[0], item) for item in value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif (
        hint in (int, str, bool)
        and isinstance(value, hint)
        and not (hint is int and isinstance(value, bool))
    ):
        return value
    raise _WrongTypeError(f"expected {_type_name(hint)}, got {value!r}")


def _type_name(hint: Any) -> str:
    origin_type, args = typing.get_origin(hint), typing.get_args(hint)
    if origin_type in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type_name(a) for a in args)
    if origin_type is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin_type is tuple:
        return f"a list of {_type_name(args[0])}"
    if origin_type is dict:
        return f"a mapping of names to {_type_name(args[1])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _unknown(node: Tree | Value, key: str, path: str, known: list[str], siblings: list[str]) -> str:
    """The error line of a name that does not exist, with the nearest one that does."""
    at = f"{path}.{key}" if path else key
    origin = node.origin if isinstance(node, Value) else _origin_of(node)
    best = _nearest(key, path, siblings, cutoff=0.6) or _nearest_anywhere(key, known)
    hint = f"did you mean {best}?" if best else f"allowed here: {', '.join(siblings)}"
    return f"{origin}: {at}: no such field; {hint}"


def _nearest(key: str, path: str, names: list[str], cutoff: float) -> str | None:
    """The full path of the sibling that `key` resembles, under its own or another name."""
    candidates = {name: name for name in names}
    candidates |= {other: own for other, own in _OTHER_NAMES.items() if own in names}
    close = difflib.get_close_matches(key, candidates, n=1, cutoff=cutoff)
    if not close:
        return None
    return f"{path}.{candidates[close[0]]}" if path else candidates[close[0]]


def _nearest_anywhere(key: str, known: list[str]) -> str | None:
    """The full path, in any room, of a field with about this name."""
    by_leaf = {path.rsplit(".", 1)[-1]: path for path in reversed(known)}
    leaf = _nearest(key, "", list(by_leaf), cutoff=0.75)
    return by_leaf[leaf] if leaf else None


def _origin_of(node: Tree) -> str:
    for value in node.values():
        origin = value.origin if isinstance(value, Value) else _origin_of(value)
        if origin:
            return origin
    return ""


def _all_paths(cls: type, path: str = "") -> list[str]:
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        at = f"{path}.{name}" if path else name
        paths.append(at)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            paths += _all_paths(hint, at)
    return paths
