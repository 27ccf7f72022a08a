"""The wheel holds all that the commands need outside a checkout."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(words: list[str], cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sources_are_of_the_oldest_python_that_is_promised() -> None:
    """As far as a newer Python can tell (`ast.parse`): 3.12's `type X = …` would not parse."""
    with (ROOT / "pyproject.toml").open("rb") as f:
        settings = tomllib.load(f)
    oldest = settings["project"]["requires-python"].removeprefix(">=")
    version = tuple(map(int, oldest.split(".")))
    for folder in ("openlm_lite", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=version)
    assert settings["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert settings["tool"]["pyright"]["pythonVersion"] == oldest
    found = re.findall(r"Python :: (3\.\d+)$", "\n".join(settings["project"]["classifiers"]), re.M)
    assert found[0] == oldest and found == [f"3.{version[1] + i}" for i in range(len(found))]


@pytest.mark.slow
def test_a_wheel_made_of_the_sdist_works_outside_a_checkout(tmp_path: Path) -> None:
    run(["-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path / "sdist")], cwd=ROOT)
    (sdist,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    run(["-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")], cwd=source)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")

    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    package = installed / "openlm_lite"
    packaged = {str(path.relative_to(package)) for path in package.rglob("*")}
    in_the_tree = {
        str(path.relative_to(ROOT / "openlm_lite"))
        for path in (ROOT / "openlm_lite").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    beside = {
        f"{folder}/{path.name}"
        for folder in ("model_configs", "recipes")
        for path in (ROOT / folder).iterdir()
    }
    assert in_the_tree | beside <= packaged

    env = os.environ | {"PYTHONPATH": str(installed)}
    where = run(["-c", "import openlm_lite; print(openlm_lite.__file__)"], tmp_path, env)
    assert where.startswith(str(installed))
    config = ["-m", "openlm_lite", "config", "--json"]
    assert '"n_params": 1439893504' in run([*config, "model.base=dclm_1b"], tmp_path, env)
    assert '"total_tokens": 28795904000' in run([*config, "dclm_1b_1x"], tmp_path, env)
