"""Workers share their arguments, the first error ends the work, and progress is said."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from openlm_lite.data import pool
from openlm_lite.errors import InputError


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
