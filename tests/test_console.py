"""The console: one live line on a terminal, plain lines elsewhere, each warning once, rank 0."""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from openlm_lite import console, log
from openlm_lite.console import ConsoleHandler
from tests.train_server import TrainServer

RECORD = {"step": 40, "train/loss": 5.25, "perf/tokens_per_second": 2310.0}


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
        log.close_console()


def console_on(stream: Stream, monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    log.setup_console(*args)  # pyright: ignore[reportArgumentType]


def seen(text: str) -> list[str]:
    """The lines that stand on a terminal in the end."""
    return [line.split("\r\x1b[K")[-1] for line in text.split("\n")]


def test_a_terminal_has_one_live_line_below_the_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_REDRAW_SECONDS", 0.0)
    stream = Stream(terminal=True)
    console_on(stream, monkeypatch)
    log.show_progress(RECORD, 340, 204.0)
    log.logger.info("step 40: val/toy/loss 5.0")
    log.show_progress({**RECORD, "step": 41}, 340, 203.0)
    first, live = seen(stream.getvalue())
    assert first.endswith("step 40: val/toy/loss 5.0")
    assert re.fullmatch(r" 41/340 ━+─+  12 %  loss 5.2500  2.31k tokens/s  left 0:03:23", live)
    log.close_console()
    assert seen(stream.getvalue()) == [first, ""]  # gone at the end


def test_the_live_line_is_not_longer_than_the_terminal_and_not_drawn_too_often() -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stream, os.fdopen(master, "rb", 0) as screen:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
        handler = ConsoleHandler(stream)
        for i in range(100):
            handler.show(f"{i} " + "x" * 200)
        drawn = screen.read(4096).decode()
        assert drawn == "\r\x1b[K0 " + "x" * 27
        handler.close()
        assert screen.read(4096) == b"\r\x1b[K"


@pytest.mark.parametrize("case", ["no terminal", "dumb", "slurm"])
def test_elsewhere_there_are_plain_lines_only(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    stream = Stream(terminal=case != "no terminal")
    if case == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if case == "slurm":
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    console_on(stream, monkeypatch)
    log.show_progress(RECORD, 340, 204.0)
    log.logger.info("a line")
    log.close_console()
    assert re.fullmatch(r"\d\d:\d\d:\d\d a line\n", stream.getvalue())


def test_a_terminal_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_REDRAW_SECONDS", 0.0)
    stream = Stream(terminal=True)
    console_on(stream, monkeypatch)
    stream.close()
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log.show_progress(RECORD, 340, 204.0)
    log.logger.info("a line")
    log.show_progress(RECORD, 340, 204.0)


def test_a_warning_of_a_library_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream = Stream(terminal=False)
    console_on(stream, monkeypatch, tmp_path / "log.txt")
    for _ in range(3):
        warnings.warn("token=hunter2 is old", stacklevel=1)
    warnings.warn("another", stacklevel=1)
    log.close_console()
    for text in (stream.getvalue(), (tmp_path / "log.txt").read_text()):
        assert text.count("UserWarning: token=*** is old") == 1
        assert "UserWarning: another" in text and "hunter2" not in text


def test_another_rank_shows_errors_only_and_has_a_file_once_it_says_something(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream, path = Stream(terminal=True), tmp_path / "log-rank3.txt"
    console_on(stream, monkeypatch, path, 3)
    assert not path.exists()
    log.logger.warning("slow disk")
    warnings.warn("old", stacklevel=1)
    log.logger.error("out of memory")
    log.close_console()
    assert "out of memory" in stream.getvalue() and stream.getvalue().count("\n") == 1
    assert all(words in path.read_text() for words in ("slow disk", "old", "out of memory"))


def test_a_run_introduces_itself_once_and_estimates_its_end(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    said, run = tmp_path / "said.txt", tmp_path / "run"
    done = train_server.train(str(toy_recipe), f"run.dir={run}", world=2, log=said)
    assert done["codes"] == [0, 0]
    for text in (said.read_text(), (run / "log.txt").read_text()):
        lines = [line[9:] for line in text.splitlines()]
        assert lines[0].startswith("model    ") and "2 layers, d_model 32" in lines[0]
        assert lines[1].startswith("data     ") and "tokens)" in lines[1]
        assert lines[2].startswith("length   12 steps, 3.07k tokens (")
        assert lines[3] == "batch    8 x 32 tokens: 2 ranks x 4 rows"
        assert lines[4] == "devices  2 x cpu, fp32"
        assert [line for line in lines if re.match(r"about 0:00:\d\d to go, until \d{4}-", line)]
        assert "\x1b" not in text and text.count("model    ") == 1
    assert not list(run.glob("log-rank*"))
