"""Requests to stop: remembered from the first line on, harmless in any number, given back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite import stop as stop_module
from openlm_lite.stop import StopRequest
from tests.train_server import ROOT

TERM, USR1, INT = StopRequest.SIGNALS

# A program as `openlm train` is one: the request first, then an import that takes its time.
PROGRAM = """
import sys
from openlm_lite.stop import INTERRUPTED, StopRequest

with StopRequest(until_exit=True) as stop:
    try:
        import slow
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(75 if stop.requested else 0)
"""
# Takes until the test has done what it wants to do meanwhile.
SLOW = """
import os, time
print("importing", flush=True)
while not os.path.exists(__file__ + ".go"):
    time.sleep(0.01)
"""


def start(
    tmp_path: Path, program: str, *wrapper: str, words: Sequence[str] = (), slow: str = SLOW
) -> subprocess.Popen[str]:
    """The program in a process of its own, in the midst of its slow import."""
    (tmp_path / "slow.py").write_text(slow)
    process = subprocess.Popen(
        [*wrapper, sys.executable, "-c", program, *words],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    return process


def press(process: subprocess.Popen[str]) -> None:
    """A first Ctrl-C that was heard, and the time in which another one would be the same."""
    process.send_signal(INT)
    assert process.stderr is not None
    while "Ctrl-C again ends at once" not in (line := process.stderr.readline()):
        assert line, "it ended"
    time.sleep(0.8)


def finish(process: subprocess.Popen[str], tmp_path: Path) -> tuple[int, str]:
    """Exit code and standard error, after the end of the import."""
    (tmp_path / "slow.py.go").touch()
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize(
    "signals",
    [[], [TERM], [USR1], [INT], [TERM, TERM], [USR1, USR1], [INT, INT], [USR1, TERM, INT, TERM]],
    ids=lambda signals: "-".join(s.name for s in signals) or "none",
)
def test_signals_during_a_slow_import_are_one_request(
    tmp_path: Path, signals: list[signal.Signals]
) -> None:
    """Those that follow at once too: launchers pass on what the process already got."""
    process = start(tmp_path, PROGRAM)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.02)  # else the kernel makes two of a kind one
    code, said = finish(process, tmp_path)
    assert code == (75 if signals else 0)
    assert said.count("stopping after this step") == (1 + (signals == [USR1, TERM, INT, TERM])) * (
        len(signals) > 0
    )


# `openlm train` up to its StopRequest: the import of the command line is the slow one.
DOOR = """
import sys, openlm_lite
from types import SimpleNamespace
from openlm_lite.__main__ import main
from openlm_lite.stop import StopRequest

def train(words):
    with StopRequest(until_exit=True) as stop:
        return 75 if stop.requested else 0

def imported(name):
    import slow
    return SimpleNamespace(main=train)

openlm_lite.__getattr__ = imported
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_while_the_command_line_is_imported_is_a_request(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, DOOR, words=["train", "recipe.yaml"])
    process.send_signal(number)
    assert finish(process, tmp_path)[0] == 75


def test_ctrl_c_ends_the_other_verbs_while_they_are_imported(tmp_path: Path) -> None:
    # a launcher in the background has it ignored, and that would be inherited
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)"
    wrapper = [sys.executable, "-c", f"{heard}; os.execv(sys.argv[1], sys.argv[1:])"]
    process = start(tmp_path, DOOR, *wrapper, words=["config", "recipe.yaml"])
    process.send_signal(INT)
    assert process.wait(60) == -INT
    process.communicate()


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, PROGRAM)
    press(process)
    process.send_signal(INT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "ending at once" in said


# An extension module that meets the interrupt while it is imported may drop it, or make another
# error of it.
SWALLOWS = """
try:
    import slow_import
except KeyboardInterrupt as e:
    print("went on", flush=True)
    ANSWER
"""

# The real verb, whose import of torch does that.
TRAIN = """
import sys
from openlm_lite.__main__ import main

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            import slow

sys.meta_path.insert(0, Finder())
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("answer", ["pass", "raise ImportError('initialization failed') from e"])
def test_a_second_ctrl_c_ends_imports_that_swallow_it(tmp_path: Path, answer: str) -> None:
    (tmp_path / "slow_import.py").write_text(SLOW)
    words = ["train", "nowhere.yaml"]
    process = start(tmp_path, TRAIN, words=words, slow=SWALLOWS.replace("ANSWER", answer))
    press(process)
    process.send_signal(INT)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "ending at once" in said and "Traceback" not in said
    assert "went on" not in printed


def test_an_error_that_the_second_ctrl_c_became_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, StopRequest() as stop:
        stop._pressed_at = 0.0
        try:
            signal.raise_signal(INT)
        except KeyboardInterrupt as e:
            raise RuntimeError("in C code") from e
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="before it"), StopRequest():
        signal.raise_signal(INT)
        raise RuntimeError("before it")


def test_ctrl_c_after_another_signal_is_still_a_request(tmp_path: Path) -> None:
    process = start(tmp_path, PROGRAM)
    process.send_signal(TERM)
    time.sleep(0.8)
    process.send_signal(INT)
    assert finish(process, tmp_path)[0] == 75


@pytest.mark.parametrize("how", ["ignored", "blocked"])
def test_what_the_launcher_ignored_or_blocked_is_listened_to(tmp_path: Path, how: str) -> None:
    if how == "ignored":
        wrapper = ["bash", "-c", "trap '' USR1; exec \"$@\"", "-"]
    else:
        block = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])"
        wrapper = [
            sys.executable,
            "-c",
            f"import os, signal, sys; {block}; os.execv(sys.argv[1], sys.argv[1:])",
        ]
    process = start(tmp_path, PROGRAM, *wrapper)
    process.send_signal(USR1)
    assert finish(process, tmp_path)[0] == 75


def test_a_request_with_standard_error_closed_is_no_failure(tmp_path: Path) -> None:
    process = start(tmp_path, "import os; os.close(2)" + PROGRAM)
    process.send_signal(INT)
    assert finish(process, tmp_path) == (75, "")


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_second_signal_while_the_interpreter_ends_keeps_the_exit_code(
    tmp_path: Path, number: signal.Signals
) -> None:
    """At any moment: in the handlers of the end, and when the interpreter has let go of its own."""
    late = f"""
import atexit, signal, sys
class Last:
    def __del__(self, ask=signal.raise_signal):
        ask({int(number)})
sys.last = Last()
atexit.register(signal.raise_signal, {int(number)})
"""
    process = start(tmp_path, late + PROGRAM)
    process.send_signal(TERM)
    assert finish(process, tmp_path)[0] == 75


def test_only_rank_0_says_that_it_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    process = start(tmp_path, PROGRAM)
    process.send_signal(TERM)
    assert finish(process, tmp_path) == (75, "")


def test_nothing_slow_is_imported_before_the_signals_are_taken() -> None:
    code = """
import sys, openlm_lite.stop
loaded = {"torch", "numpy", "yaml", "logging", "dataclasses", "openlm_lite.errors"}
sys.exit(str(loaded & set(sys.modules)) if loaded & set(sys.modules) else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture
def handlers() -> Iterator[list[Any]]:
    """Those of this process, which a test must leave as they were."""
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    yield before
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before


def test_released_signals_are_whose_they_were(handlers: list[Any]) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with StopRequest() as stop:
        assert stop.listens
        assert [signal.getsignal(n) for n in StopRequest.SIGNALS] != handlers
        stop.release()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    assert fd == -1
    assert not stop.insisted()


def test_in_another_thread_the_signals_are_left_alone_and_asking_works(
    handlers: list[Any],
) -> None:
    found: list[StopRequest] = []
    thread = threading.Thread(target=lambda: found.append(StopRequest()))
    thread.start()
    thread.join()
    stop = found[0]
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == handlers
    assert not stop.listens and not stop.requested and not stop.insisted()
    stop.ask()
    assert stop.requested
    stop.release()


@given(
    st.lists(st.tuples(st.sampled_from(["ask", TERM, USR1, INT]), st.floats(0, 2)), max_size=8),
)
def test_any_sequence_is_one_request_and_only_a_later_ctrl_c_ends(
    events: list[tuple[signal.Signals | str, float]],
) -> None:
    clock = [100.0]
    pressed_at = None
    with pytest.MonkeyPatch.context() as patch, StopRequest() as stop:
        patch.setattr(stop_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        for event, wait in events:
            clock[0] += wait
            ends = event == INT and pressed_at is not None and clock[0] - pressed_at >= 0.5
            if event == INT and pressed_at is None:
                pressed_at = clock[0]
            if isinstance(event, str):
                stop.ask()
            elif ends:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(event)
                assert stop.insisted()
                break
            else:
                signal.raise_signal(event)
            assert stop.requested
            assert not stop.insisted() or (pressed_at and clock[0] - pressed_at > 2)
        assert stop.requested == bool(events)
