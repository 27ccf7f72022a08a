"""`openlm prepare` against its tokenizer alone, on one and on two processes, and its memory.

    python benchmarks/data_prepare.py CORPUS.jsonl … --tokenizer NAME_OR_FILE [--workers 1 2] \
        [--options '{"dedup": true}'] [--repeats 3]

Prints one JSON line per case; a process has one thread that tokenises. `share` is the tokenizer's
own time on the same texts, divided by that of prepare (1.0: nothing else costs anything);
`cpu_share` is the same of the time that the processes had a core, which a busy machine changes
less. The load is printed with each line. Memory is of all processes together, file pages left out.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import tempfile
import threading
import time
from typing import Any

from openlm_lite.data.plan import PrepareConfig
from openlm_lite.data.prepare import prepare
from openlm_lite.data.read import format_of, read_documents
from openlm_lite.data.tokenizer import load_tokenizer

BATCH = 512
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker is one core


def tokenizer_alone(paths: list[str], name: str) -> dict[str, Any]:
    """Seconds in `encode_batch` for all documents, one process."""
    tokenizer = load_tokenizer(name)
    seconds, cpu_seconds, n_tokens, batch = 0.0, 0.0, 0, []

    def encode() -> None:
        nonlocal seconds, cpu_seconds, n_tokens
        started, cpu_started = time.perf_counter(), _cpu_seconds()
        n_tokens += sum(map(len, tokenizer.encode_batch(batch)))
        seconds += time.perf_counter() - started
        cpu_seconds += _cpu_seconds() - cpu_started
        batch.clear()

    for path in paths:
        format = format_of(path)
        assert format is not None, path
        for document in read_documents(path, format, text_field="text"):
            batch.append(document.text)
            if len(batch) == BATCH:
                encode()
    encode()
    return {
        "case": "tokenizer alone",
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": n_tokens / seconds,
    }


def _cpu_seconds() -> float:
    """Of this process and those of its children that have ended."""
    return sum(os.times()[:4])


class Memory(threading.Thread):
    """The highest anonymous memory (bytes) of this process and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.peak = max(self.peak, sum(map(_anonymous, [os.getpid(), *_children()])))


def _children() -> list[int]:
    found: list[int] = []
    for path in glob.glob(f"/proc/{os.getpid()}/task/*/children"):
        with open(path) as file:
            found += map(int, file.read().split())
    return found


def _anonymous(process: int) -> int:
    try:
        with open(f"/proc/{process}/smaps_rollup") as file:
            lines = [line.split() for line in file if line.startswith("Anonymous:")]
        return int(lines[0][1]) << 10
    except (OSError, IndexError):  # it has ended meanwhile
        return 0


def prepared(paths: list[str], name: str, workers: int, options: dict[str, Any]) -> dict[str, Any]:
    """The wall time of a whole run."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        memory = Memory()
        memory.start()
        cpu_started = _cpu_seconds()
        report = prepare(
            PrepareConfig(
                inputs=tuple(paths),
                out=os.path.join(folder, "out"),
                tokenizer=name,
                workers=workers,
                **options,
            )
        )
        cpu_seconds = _cpu_seconds() - cpu_started
        memory.over.set()
        memory.join()
    return {
        "case": f"prepare, {workers} processes",
        "seconds": report.seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": report.tokens_per_second,
        "peak_MB": memory.peak / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--options", type=json.loads, default={}, help="more of PrepareConfig")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for _ in range(args.repeats):
        alone = tokenizer_alone(args.paths, args.tokenizer)
        print(json.dumps({**alone, "load": os.getloadavg()[0]}), flush=True)
        for workers in args.workers:
            result = prepared(args.paths, args.tokenizer, workers, args.options)
            result["share"] = alone["seconds"] / workers / result["seconds"]
            result["cpu_share"] = alone["cpu_seconds"] / result["cpu_seconds"]
            print(json.dumps({**result, "load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
