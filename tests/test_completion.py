"""`openlm completion SHELL`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openlm_lite import cli


def test_without_shtab_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == cli.BAD_INPUT
    assert 'pip install "openlm-lite[completion]"' in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [(("openlm", "pl"), "plot"), (("openlm", "eval", "--agg"), "--aggregate")],
)
def test_bash_completes_verbs_and_options(
    words: tuple[str, ...], completed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "openlm.sh"
    script.write_text(capsys.readouterr().out)
    asked = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_openlm"
    found = subprocess.run(
        ["bash", "-c", f'source {script}; {asked}; echo "${{COMPREPLY[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [completed]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script_too(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    assert "openlm" in capsys.readouterr().out
