"""Workers share their arguments, the first error ends the work, and progress is said."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from openlm_lite.data import pool
from openlm_lite.errors import InputError
from tests.train_server import ROOT


def add(job: int, more: int) -> int:
    return job + more


def fail_on_two(job: int) -> int:
    if job == 2:
        raise InputError("job 2 is bad")
    return job


def die(job: int) -> int:
    os._exit(job)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_once_with_the_shared_arguments(workers: int) -> None:
    assert sorted(pool.each_done(add, range(5), (10,), workers)) == [(i, i + 10) for i in range(5)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_input_error_in_a_worker_arrives_as_it_is(workers: int) -> None:
    with pytest.raises(InputError, match="job 2 is bad"):
        list(pool.each_done(fail_on_two, range(5), (), workers))


def setting(_: int, name: str) -> str | None:
    return os.environ.get(name)


def test_workers_see_the_environment_as_it_is_when_the_work_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not as it was when the first workers began: credentials may have come since."""
    for value in ("one", "two"):
        monkeypatch.setenv("OPENLM_LITE_SETTING", value)
        found = list(pool.each_done(setting, range(2), ("OPENLM_LITE_SETTING",), 2))
        assert [result for _, result in found] == [value, value]


def test_workers_start_in_a_temporary_folder_of_a_long_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert sorted(pool.each_done(add, range(3), (10,), 2)) == [(i, i + 10) for i in range(3)]


def test_workers_hold_no_more_than_was_imported_for_them(tmp_path: Path) -> None:
    """Nor a thread, lock or module of the process that asked for them."""
    (tmp_path / "program.py").write_text("""
import sys
from openlm_lite.data import pool

def loaded(_):
    return "sqlite3" in sys.modules, "openlm_lite.data.gather" in sys.modules

if __name__ == "__main__":
    pool.get_ready("openlm_lite.data.prepare")
    import sqlite3
    print([result for _, result in pool.each_done(loaded, range(2), (), 2)])
""")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[(False, True), (False, True)]\n", "")


def test_a_killed_worker_says_that_the_run_can_go_on() -> None:
    with pytest.raises(RuntimeError, match="run the same command again"):
        list(pool.each_done(die, [9, 9], (), 2))


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = pool.Progress("tokenise", 100, "B")
    progress.add(30, 10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(pool, "_SECONDS_BETWEEN_LINES", 0.0)
    progress.add(20, 10)
    progress.close()
    line = capsys.readouterr().err
    assert line.startswith("tokenise: 50% of 100 B, 20 tokens, ")
    assert line.endswith("M tokens/s\n")


def test_on_a_terminal_progress_is_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress: Any = pool.Progress("tokenise", 100, "B")
    progress.add(50, 10)
    progress.close()
    assert "tokenise:  50%" in capsys.readouterr().err
