"""What would run code out of data, or a shell, stands nowhere in this project: held by its syntax.

Every construction is looked for under all the names that imports give it, called or only
mentioned. Each exception is listed with its reason, and has to be there still.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*(ROOT / "openlm_lite").rglob("*.py"), ROOT / "train.py"]
    + [path for name in ("benchmarks", "examples", "slurm") for path in (ROOT / name).rglob("*.py")]
)
SCRIPTS = sorted(
    path
    for name in ("benchmarks", "examples", "slurm")
    for path in (ROOT / name).rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
# (file, construction) -> why it is safe there
EXCEPTIONS = {
    ("openlm_lite/safe_dcp.py", "pickle"): "the unpickler below, which limits it",
    ("openlm_lite/safe_dcp.py", "pickle.Unpickler"): "find_class knows 13 harmless names, no more",
}
SHELL_EXCEPTIONS = {
    ("slurm/train.sbatch", "bash -c"): "a function of that very file; what was given goes as words",
}

# Mentioned at all.
_NAMES = """
    eval exec compile __import__ input breakpoint os.system os.popen os.spawnl os.spawnlp
    pty.spawn subprocess.getoutput subprocess.getstatusoutput asyncio.create_subprocess_shell
    pickle.load pickle.loads pickle.Unpickler pickle._Unpickler pandas.read_pickle
    numpy.lib.npyio.load torch.hub.load torch.jit.load torch.package.PackageImporter
    torch.serialization.load torch.utils.cpp_extension.load yaml.load_all yaml.unsafe_load
    yaml.unsafe_load_all yaml.full_load yaml.full_load_all yaml.Loader yaml.FullLoader
    yaml.UnsafeLoader yaml.CLoader yaml.CFullLoader yaml.CUnsafeLoader runpy.run_path
    runpy.run_module importlib.import_module importlib.util.spec_from_file_location
    shutil.unpack_archive code.interact
"""
NAMES = set(_NAMES.split())
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# Methods by their name alone: what they belong to cannot be told. Nothing is unpacked to a disk.
METHODS = {"extractall", "unpack_archive"}
PROCESSES = {
    f"subprocess.{name}" for name in ("run", "call", "Popen", "check_call", "check_output")
}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}
# Keywords that may only be given as this constant, wherever they are given.
KEYWORDS = {
    "shell": False,
    "weights_only": True,
    "allow_pickle": False,
    "trust_remote_code": False,
}


class Finder(ast.NodeVisitor):
    """The constructions in one file."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []
        self.alias: dict[str, str] = {}  # local name -> what it is
        self.safe_loaders = set(SAFE_LOADERS)

    def add(self, node: ast.AST, what: str) -> None:
        self.found.append((getattr(node, "lineno", 0), what))

    def name_of(self, node: ast.AST) -> str:
        """The dotted name that an expression means, aliases resolved; "" for anything else."""
        if isinstance(node, ast.Name):
            return self.alias.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            inner = self.name_of(node.value)
            return f"{inner}.{node.attr}".removeprefix("builtins.") if inner else ""
        return ""

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self.module(node, name.name)
            short = name.name.split(".")[0]
            self.alias[name.asname or short] = _usual(name.name if name.asname else short)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.module(node, node.module or "")
        for name in node.names:
            full = f"{_usual(node.module or '')}.{name.name}".removeprefix("builtins.")
            if name.name == "*" and any(known.startswith(full[:-1]) for known in NAMES):
                self.add(node, full)
            self.alias[name.asname or name.name] = full
            self.mention(node, full)

    def module(self, node: ast.AST, name: str) -> None:
        if name.split(".")[0] in MODULES:
            self.add(node, name.split(".")[0])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if any(self.name_of(base) in self.safe_loaders for base in node.bases):
            self.safe_loaders.add(node.name)
        self.generic_visit(node)

    def mention(self, node: ast.AST, name: str) -> None:
        if name in NAMES:
            self.add(node, name)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.mention(node, self.name_of(node))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.name_of(node)
        self.mention(node, name)
        if node.attr in METHODS and name not in NAMES:
            self.add(node, f".{node.attr}")
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                self.keyword(node, key.value, value)
        self.generic_visit(node)

    def keyword(self, node: ast.AST, name: str, value: ast.AST) -> None:
        if name in KEYWORDS and not (
            isinstance(value, ast.Constant) and value.value is KEYWORDS[name]
        ):
            self.add(node, f"{name}={ast.unparse(value)}")

    def visit_Call(self, node: ast.Call) -> None:
        name, given = self.name_of(node.func), {k.arg: k.value for k in node.keywords}
        for key, value in given.items():
            self.keyword(node, key or "", value)
        if name == "torch.load" and "weights_only" not in given:
            self.add(node, "torch.load without weights_only")
        if name == "yaml.load":
            loader = given.get("Loader", node.args[1] if len(node.args) > 1 else None)
            if loader is None or self.name_of(loader) not in self.safe_loaders:
                self.add(node, "yaml.load without a safe loader")
        if name == "numpy.load" and len(node.args) > 2:
            self.add(node, "numpy.load with a third argument")
        if name in PROCESSES:
            command = node.args[0] if node.args else given.get("args")
            if _is_text(command):
                self.add(node, f"{name} of a string")
        if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            self.mention(node, f"{self.name_of(node.args[0])}.{node.args[1].value}")
        self.generic_visit(node)


def _usual(module: str) -> str:
    return {"np": "numpy", "posix": "os", "_pickle": "pickle"}.get(module, module)


def _is_text(node: ast.AST | None) -> bool:
    if isinstance(node, ast.BinOp):  # two lists can be added, too
        return not any(isinstance(inner, ast.List) for inner in ast.walk(node))
    is_constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_constant or isinstance(node, ast.JoinedStr)


def constructions(source: str) -> list[str]:
    """What a Python source has of them, in order of lines."""
    finder = Finder()
    finder.visit(ast.parse(source))
    return [what for _, what in sorted(finder.found)]


def shell_constructions(script: str) -> list[str]:
    """Words of a shell script, outside of comments, that run text as code."""
    code = "\n".join(re.sub(r"(^|\s)#.*", "", line) for line in script.splitlines())
    pattern = r"(?<![\w-])(eval|bash -c|sh -c)(?![\w-])|\|\s*(?:ba|z|)sh\b|\b(?:curl|wget)\b"
    return [match[0] for match in re.finditer(pattern, code)]


def test_no_source_runs_code_from_data_or_a_shell() -> None:
    assert len(SOURCES) > 80 and ROOT / "train.py" in SOURCES
    found = {
        (str(path.relative_to(ROOT)), what)
        for path in SOURCES
        for what in constructions(path.read_text())
    }
    assert found == set(EXCEPTIONS)


def test_no_script_runs_text_as_code() -> None:
    assert len(SCRIPTS) >= 2
    found = {
        (str(path.relative_to(ROOT)), what)
        for path in SCRIPTS
        for what in shell_constructions(path.read_text())
    }
    assert found == set(SHELL_EXCEPTIONS)


FOUND = [
    ("eval('1')", "eval"),
    ("exec(x)", "exec"),
    ("run = eval", "eval"),
    ("import builtins\nbuiltins.eval(x)", "eval"),
    ("from builtins import exec as go\n", "exec"),
    ("compile(x, '', 'exec')", "compile"),
    ("__import__('os')", "__import__"),
    ("import os\nos.system('x')", "os.system"),
    ("import os as o\no.popen('x')", "os.popen"),
    ("from os import system as s", "os.system"),
    ("import os\nrun = os.system", "os.system"),
    ("import os\ngetattr(os, 'system')", "os.system"),
    ("import posix\nposix.system('x')", "os.system"),
    ("from os import *", "os.*"),
    ("import subprocess\nsubprocess.run('ls')", "subprocess.run of a string"),
    ("import subprocess\nsubprocess.run(f'ls {x}')", "subprocess.run of a string"),
    ("from subprocess import Popen as P\nP('ls ' + x)", "subprocess.Popen of a string"),
    (
        "import subprocess\nsubprocess.check_output(args='ls')",
        "subprocess.check_output of a string",
    ),
    ("import subprocess\nsubprocess.run(x, shell=True)", "shell=True"),
    ("import subprocess\nsubprocess.run(x, shell=y)", "shell=y"),
    ("import subprocess\nsubprocess.getoutput(x)", "subprocess.getoutput"),
    ("import pickle", "pickle"),
    ("from pickle import loads", "pickle"),
    ("import dill as d", "dill"),
    ("import cloudpickle, joblib", "cloudpickle"),
    ("import marshal", "marshal"),
    ("import shelve", "shelve"),
    ("import torch\ntorch.load(x)", "torch.load without weights_only"),
    ("from torch import load\nload(x)", "torch.load without weights_only"),
    ("import torch\ntorch.load(x, weights_only=False)", "weights_only=False"),
    ("import torch as t\nt.load(x, weights_only=w)", "weights_only=w"),
    ("import torch\ntorch.hub.load(x)", "torch.hub.load"),
    ("import yaml\nyaml.load(x)", "yaml.load without a safe loader"),
    ("import yaml\nyaml.load(x, Loader=Mine)", "yaml.load without a safe loader"),
    ("import yaml\nyaml.load(x, yaml.FullLoader)", "yaml.FullLoader"),
    ("from yaml import unsafe_load", "yaml.unsafe_load"),
    ("import numpy as np\nnp.load(x, allow_pickle=True)", "allow_pickle=True"),
    ("import numpy as np\nnp.load(x, None, True)", "numpy.load with a third argument"),
    ("M.from_pretrained(x, trust_remote_code=True)", "trust_remote_code=True"),
    ("more = {'trust_remote_code': flag}", "trust_remote_code=flag"),
    ("import tarfile\ntarfile.open(x).extractall()", ".extractall"),
    ("import importlib\nimportlib.import_module(x)", "importlib.import_module"),
]
PASSED = [
    "# eval('1')\n'os.system is bad; pickle.loads too'",
    "model.eval()\nre.compile(x)\ntorch.compile(m)",
    "import subprocess\nsubprocess.run(['ls', x])\nsubprocess.run([*a] + b, shell=False)",
    "import torch\ntorch.load(x, weights_only=True)\ntorch.load(x, mmap=True, weights_only=True)",
    "import yaml\nyaml.safe_load(x)\nyaml.load(x, Loader=yaml.SafeLoader)",
    "import yaml\nclass L(yaml.SafeLoader): pass\nclass M(L): pass\nyaml.load(x, Loader=M)",
    "import numpy as np\nnp.load(x)\nnp.load(x, allow_pickle=False)",
    "M.from_pretrained(x, trust_remote_code=False)\n{'trust_remote_code': False}",
    "import json\njson.loads(x)\nself.load(x)",
]


@pytest.mark.parametrize(("source", "what"), FOUND)
def test_each_construction_is_found_under_any_name(source: str, what: str) -> None:
    assert what in constructions(source)


@pytest.mark.parametrize("source", PASSED)
def test_what_is_harmless_is_not_found(source: str) -> None:
    assert constructions(source) == []


@pytest.mark.parametrize(
    "line", ['eval "$x"', "a; eval $x # no", 'bash -c "$x"', "curl -s x | sh", "cat x | bash"]
)
def test_each_shell_construction_is_found(line: str) -> None:
    assert shell_constructions(line)
    assert not shell_constructions(f"# {line}")
    assert not shell_constructions("retrieval evaluate --eval-every 3 sbatch")
