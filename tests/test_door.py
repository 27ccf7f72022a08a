"""How a process of `openlm` ends: at once, with nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(code: str, *, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )


def test_the_end_writes_what_was_printed_calls_what_asked_for_it_and_takes_nothing_apart() -> None:
    done = run("""
import atexit, sys
from openlm_lite.__main__ import leave

class TakenApart:
    def __del__(self, write=sys.stderr.write):
        write("taken apart")

kept = TakenApart()
sys.kept = kept
atexit.register(print, "second")
atexit.register(print, "first")
print("printed")
leave(75)
""")
    assert (done.returncode, done.stdout, done.stderr) == (75, "printed\nfirst\nsecond\n", "")


def test_the_end_waits_for_a_thread_that_still_works() -> None:
    done = run("""
import threading, time
from openlm_lite.__main__ import leave

def work():
    time.sleep(0.3)
    print("worked", flush=True)

threading.Thread(target=work).start()
leave(3)
""")
    assert (done.returncode, done.stdout) == (3, "worked\n")


def test_output_that_cannot_be_written_is_no_success() -> None:
    with open("/dev/full", "w") as full:
        done = run(
            "from openlm_lite.__main__ import leave\nprint('lost')\nleave(0)", stdout=full.fileno()
        )
    assert done.returncode == 120 and "No space left" in done.stderr


def test_a_verb_ends_the_process_with_its_code(tmp_path: Path) -> None:
    for words in (["-m", "openlm_lite", "config"], ["train.py"]):
        done = subprocess.run(
            [sys.executable, *words, str(tmp_path / "absent.yaml")],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and "absent.yaml" in done.stderr
