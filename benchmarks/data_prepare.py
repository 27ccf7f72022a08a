"""`openlm prepare` against its tokenizer alone, on one and on two processes, and its memory.

    python benchmarks/data_prepare.py CORPUS.jsonl … --tokenizer NAME_OR_FILE [--workers 1 2] \
        [--options '{"dedup": true}'] [--repeats 3] [--without-alone]

Prints one JSON line per case; a process has one thread that tokenises. `share` is the speed of
prepare divided by that of the tokenizer alone on as many processes (1.0: nothing else costs
anything); `cpu_share` is the same per second that the processes had a core, which a busy machine
changes less. `inside` is the tokenizer's share of the time of prepare itself (one process), which
a machine that is faster at one time than at another does not change. `scaling` is the speed divided
by that of the same on one process: two cores of a machine seldom give twice one. The load is
printed with each line. Memory is of all processes together, file pages left out.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from openlm_lite.data.plan import PrepareConfig
from openlm_lite.data.prepare import prepare
from openlm_lite.data.read import format_of, read_documents
from openlm_lite.data.tokenizer import Tokenizer, load_tokenizer

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
        "seconds": seconds,
        "tokens_per_second": n_tokens / seconds,
        "tokens_per_cpu_second": n_tokens / cpu_seconds,
    }


def tokenizers_alone(paths: list[str], name: str, processes: int) -> dict[str, Any]:
    """The same on several processes at a time, each with all of the documents."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        found = pool.starmap(tokenizer_alone, [(paths, name)] * processes, chunksize=1)
    return {
        "case": f"tokenizer alone, {processes} processes",
        "seconds": statistics.fmean(one["seconds"] for one in found),
        "tokens_per_second": sum(one["tokens_per_second"] for one in found),
        "tokens_per_cpu_second": statistics.fmean(one["tokens_per_cpu_second"] for one in found),
    }


def _cpu_seconds() -> float:
    """Of this process, of all below it, and of those that these have waited for."""
    ticks = 0
    for process in _descendants(os.getpid()):
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:  # it has ended meanwhile, and is counted where it was waited for
            continue
        ticks += sum(map(int, stat.rpartition(")")[2].split()[11:15]))
    return sum(os.times()[:4]) + ticks / os.sysconf("SC_CLK_TCK")


class Memory(threading.Thread):
    """The highest anonymous memory (bytes) of this process and all below it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            processes = [os.getpid(), *_descendants(os.getpid())]
            self.peak = max(self.peak, sum(map(_anonymous, processes)))


def _descendants(process: int) -> list[int]:
    found: list[int] = []
    for path in glob.glob(f"/proc/{process}/task/*/children"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += map(int, Path(path).read_text().split())
    return [*found, *(below for child in found for below in _descendants(child))]


def _anonymous(process: int) -> int:
    try:
        with open(f"/proc/{process}/smaps_rollup") as file:  # what two share, each has in half
            lines = [line.split() for line in file if line.startswith("Pss_Anon:")]
        return int(lines[0][1]) << 10
    except (OSError, IndexError):  # it has ended meanwhile
        return 0


@contextlib.contextmanager
def timed_tokenizer() -> Iterator[list[float]]:
    """Seconds of each call of a tokenizer in this process."""
    seconds: list[float] = []
    original = Tokenizer.encode_batch

    def encode_batch(self: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
        started = time.perf_counter()
        try:
            return original(self, texts)
        finally:
            seconds.append(time.perf_counter() - started)

    Tokenizer.encode_batch = encode_batch
    try:
        yield seconds
    finally:
        Tokenizer.encode_batch = original


def prepared(paths: list[str], name: str, workers: int, options: dict[str, Any]) -> dict[str, Any]:
    """The wall time of a whole run, in a process that has made none before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_prepared, paths, name, workers, options).result()


def _prepared(paths: list[str], name: str, workers: int, options: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=".") as folder, timed_tokenizer() as in_tokenizer:
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
        "tokens_per_second": report.tokens_per_second,
        "tokens_per_cpu_second": report.tokens_per_second * report.seconds / cpu_seconds,
        "peak_MB": memory.peak / 1e6,
        **({"inside": sum(in_tokenizer) / report.seconds} if workers == 1 else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--options", type=json.loads, default={}, help="more of PrepareConfig")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-alone", action="store_true", help="only `prepare`, for scaling")
    args = parser.parse_args()
    for _ in range(args.repeats):
        ones: dict[str, float] = {}  # kind of case -> tokens/s on one process
        for workers in args.workers:
            result = prepared(args.paths, args.tokenizer, workers, args.options)
            cases = [result]
            if not args.without_alone:
                alone = tokenizers_alone(args.paths, args.tokenizer, workers)
                result["share"] = result["tokens_per_second"] / alone["tokens_per_second"]
                rate = "tokens_per_cpu_second"
                result["cpu_share"] = result[rate] / alone[rate]
                cases = [alone, result]
            for case in cases:
                kind = case["case"].split(",")[0]
                case["scaling"] = case["tokens_per_second"] / ones.setdefault(
                    kind, case["tokens_per_second"]
                )
                print(json.dumps({**case, "load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
