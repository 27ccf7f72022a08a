"""The map of the code, held by its syntax trees; and no config field that nobody reads."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

from openlm_lite.data.plan import PrepareConfig
from openlm_lite.model.config import ModelConfig
from openlm_lite.run import RunConfig

PACKAGE = Path(__file__).parents[1] / "openlm_lite"
LAYERS = [
    {
        "errors",
        "stop",
        "config",
        "redact",
        "storage",
        "retries",
        "remote",
        "object_store",
        "dist",
        "parameter_names",
        "host_memory",
        "run_files",
    },
    {
        "model",
        "data",
        "optim",
        "metrics",
        "readback",
        "log",
        "watchdog",
        "guard",
        "telemetry",
        "wandb_sink",
        "wandb_process",
        "history",
        "console",
        "sensors",
    },
    {
        "layout",
        "tensor_parallel",
        "context_parallel",
        "recompute",
        "float8",
        "parallel",
        "memory",
        "cost",
        "profile",
        "coordinate_check",
        "commit",
        "safe_dcp",
        "average",
        "remote_checkpoints",
        "remote_lock",
        "checkpoint_place",
        "checkpoint",
        "weights_io",
        "lineage",
        "inherit",
        "hf",
        "eval",
    },
    {"run", "toy", "derived", "same_run"},
    {
        "train",
        "step",
        "bench",
        "branch",
        "run_folder",
        "saver",
        "sinks",
        "banner",
        "inspection",
        "scaling",
        "recorded",
        "runs",
        "curves",
        "plots",
        "report",
    },
    {
        "cli",
        "cli_bench",
        "cli_data",
        "cli_science",
        "cli_fit",
        "cli_eval",
        "cli_runs",
        "__main__",
    },
]
APART = {"model", "data", "optim"}  # these never see each other
FILES = sorted(PACKAGE.rglob("*.py"))
TRAVELS = PACKAGE / "hf" / "modeling_openlm.py"  # copied into exported folders
REGISTERS = (
    PACKAGE / "hf" / "__init__.py"
)  # for `from openlm_lite.hf import *`, as OpenLM's users write


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(room: str) -> int:
    return next(i for i, rooms in enumerate(LAYERS) if room in rooms)


def imports_of(path: Path) -> set[str]:
    """Rooms of this package that a file imports, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "openlm_lite":
            names = [f"openlm_lite.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if path == TRAVELS and node.level == 1:
                continue  # it lies beside its sibling in exported folders too
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        rooms |= {n.split(".")[1] for n in names if n.startswith("openlm_lite.")}
    return rooms


def test_modules_import_only_from_lower_layers_or_their_own_room() -> None:
    for path in FILES:
        if path.name == "__init__.py":
            continue
        here = room_of(path)
        for room in imports_of(path) - {here}:
            same_layer_ok = layer_of(room) == layer_of(here) and not {room, here} <= APART
            assert layer_of(room) < layer_of(here) or same_layer_ok, f"{path} imports {room}"
            if here in APART:
                assert room not in APART, f"{path} imports {room}"


def test_init_files_export_nothing() -> None:
    for path in FILES:
        if path.name == "__init__.py" and path.parent != PACKAGE and path != REGISTERS:
            assert path.read_text() == "", path


def test_a_run_s_files_are_named_in_one_place() -> None:
    names = {"config.yaml", "metrics.jsonl", "events.jsonl", "stopped.json", "log.txt"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                assert path.name == "run_files.py", f"{path}:{node.lineno}: {node.value!r}"


def test_every_config_field_is_read_somewhere() -> None:
    """A field counts as read where its name is an attribute outside its own __post_init__."""
    read: set[str] = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)

    def check(cls: type) -> None:
        for name, hint in typing.get_type_hints(cls).items():
            assert name in read, f"{cls.__name__}.{name} is read nowhere"
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                check(hint)

    for cls in (RunConfig, PrepareConfig, ModelConfig):
        check(cls)


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, openlm_lite.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
