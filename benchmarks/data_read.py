"""How fast training batches are delivered: ours, OpenLM's way, other libraries, the ceiling.

    python benchmarks/data_read.py [--tokens 67108864] [--repeats 5] [--peers-python PYTHON]

All read the same random ids below 50,257 (the worst case for text and for gzip) from a local disk,
in the page cache after the first repetition, and deliver int64 torch tensors, tokens and targets,
[batch, seq_len]:

    native          our shards: train_batches, shuffled, checked at first open, background thread
    native, cold    the same with a newly opened dataset in every repetition, checks included
    native, 2 proc  two processes, each with its half of every global batch; their sum
    json.gz, json   OpenLM's shards as they are: opened, checked, decoded, shuffled, every time
    json.gz, zlib   the same without isal
    openlm json.gz, openlm json
                    OpenLM's way: webdataset's decoder, lists of ints and batches in one DataLoader
                    worker (its default), LongTensor in the training process; unshuffled, as it
                    reads with a manifest; the start of the worker is not counted
    inline json.gz, inline json
                    not its way: the same without the worker, all in one process
    webdataset      stock webdataset over our shards: .decode(), blocks cut into rows, unshuffled
    mosaic, litdata MosaicML Streaming and litdata over their own files, shuffled, in a process of
                    PYTHON each (default: this one), where they are installed
    memmap          np.memmap over one flat file of ids, rows in random order: the ceiling

Repetitions are interleaved; the table shows the median and the spread over them, and the tokens per
second that the process had a core, which a busy machine changes less. The slow readers
get fewer tokens, which does not change their rate. Writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import gzip
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from openlm_lite.data import decode_ids
from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.manifest import (
    DatasetInfo,
    ShardEntry,
    TokenizerInfo,
    info_text,
    manifest_text,
)
from openlm_lite.data.shards import npy_dtype, write_shard
from openlm_lite.data.stream import TokenStream, single_stream, train_batches

BLOCK_TOKENS = 65_536
BLOCKS_PER_SHARD = 256
ROWS_PER_JSON_SHARD = 1024
SHUFFLE_SHARDS = 16
VOCAB_SIZE = 50_257
# --tokens divided by this, for readers that are so much slower
SHARE = {"webdataset": 4, "json": 4, "openlm": 32, "mosaic": 8, "litdata": 4}

Pair = tuple[torch.Tensor, torch.Tensor]
Reader = Callable[[], Iterator[Pair]]


# --- the files --------------------------------------------------------------------------------


def write_native(folder: Path, ids: np.ndarray) -> None:
    """Our shards and their manifest."""
    folder.mkdir()
    n_blocks = (len(ids) - 1) // BLOCK_TOKENS
    entries: list[ShardEntry] = []
    for number, first in enumerate(range(0, n_blocks, BLOCKS_PER_SHARD)):
        count = min(BLOCKS_PER_SHARD, n_blocks - first)
        starts = range(first * BLOCK_TOKENS, (first + count) * BLOCK_TOKENS, BLOCK_TOKENS)
        name = f"shard-{number:06d}"
        blocks = (ids[s : s + BLOCK_TOKENS + 1] for s in starts)
        _, size, crc = write_shard(str(folder / f"{name}.tar"), first, blocks)
        entries.append(ShardEntry(name, count, count * BLOCK_TOKENS, size, crc))
    info = DatasetInfo(
        format_version=1,
        block_tokens=BLOCK_TOKENS,
        dtype="uint16",
        tokenizer=TokenizerInfo("random", "0" * 64, VOCAB_SIZE, 0),
        n_documents=0,
        n_empty_documents=0,
        n_tokens=n_blocks * BLOCK_TOKENS,
        n_tokens_dropped=0,
        sources=(),
        config={},
        fingerprint="0" * 64,
        seed=0,
    )
    (folder / "manifest.jsonl").write_text(manifest_text(entries))
    (folder / "dataset.json").write_text(info_text(info))


def write_openlm(folder: Path, ids: np.ndarray, n_rows: int, seq_len: int, ending: str) -> None:
    """Shards as OpenLM's tools write them, through webdataset's writer: a pax header each."""
    folder.mkdir()
    lines: list[str] = []
    for number, first in enumerate(range(0, n_rows, ROWS_PER_JSON_SHARD)):
        rows = range(first, min(first + ROWS_PER_JSON_SHARD, n_rows))
        with tarfile.open(folder / f"shard_{number:08d}.tar", "w") as tar:
            for row in rows:
                content = json.dumps(ids[row * seq_len : (row + 1) * seq_len + 1].tolist()).encode()
                if ending == "json.gz":
                    content = gzip.compress(content)
                member = tarfile.TarInfo(f"{row:032x}.{ending}")
                member.size = len(content)
                member.mtime = time.time()  # pyright: ignore  (a float makes the pax header)
                tar.addfile(member, io.BytesIO(content))
        lines.append(json.dumps({"shard": f"shard_{number:08d}", "num_sequences": len(rows)}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))


# --- the readers ------------------------------------------------------------------------------


def split(rows: np.ndarray) -> Pair:
    inputs, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def stream_of(folder: Path, seq_len: int) -> TokenStream:
    return single_stream(open_dataset(str(folder)), seq_len, seed=0, shuffle_shards=SHUFFLE_SHARDS)


def read_ours(
    stream: TokenStream, n_batches: int, batch: int, rank: int = 0, world: int = 1
) -> Iterator[Pair]:
    batches = train_batches(
        stream,
        first_sample=0,
        global_batch=batch * world,
        rank=rank,
        world_size=world,
        prefetch=4,
    )
    with contextlib.closing(batches):  # pyright: ignore  (it is a generator)
        for item in itertools.islice(batches, n_batches):
            yield item.tokens_BT, item.targets_BT


def read_memmap(path: Path, n_batches: int, batch: int, seq_len: int) -> Iterator[Pair]:
    flat = np.memmap(path, dtype="<u2", mode="r")
    order = np.random.default_rng(0).permutation((len(flat) - 1) // seq_len)
    for b in range(n_batches):
        rows = np.empty((batch, seq_len + 1), dtype=flat.dtype)
        for k, row in enumerate(order[b * batch : (b + 1) * batch].tolist()):
            rows[k] = flat[row * seq_len : (row + 1) * seq_len + 1]
        yield split(rows)


def samples_of(folder: Path) -> Iterator[dict[str, Any]]:
    import webdataset

    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    return iter(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode())  # pyright: ignore


def read_webdataset(folder: Path, n_batches: int, batch: int, seq_len: int) -> Iterator[Pair]:
    rows: list[np.ndarray] = []
    for sample in samples_of(folder):
        ids = sample["npy"]
        rows += [ids[s : s + seq_len + 1] for s in range(0, len(ids) - 1, seq_len)]
        while len(rows) >= batch:
            yield split(np.stack(rows[:batch]))
            rows = rows[batch:]
            n_batches -= 1
            if n_batches == 0:
                return


def read_openlm_inline(folder: Path, n_batches: int, batch: int, ending: str) -> Iterator[Pair]:
    samples = samples_of(folder)
    for _ in range(n_batches):
        rows = [sample[ending] for sample in itertools.islice(samples, batch)]
        ids = torch.LongTensor(rows)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def read_openlm(
    folder: Path, n_batches: int, batch: int, seq_len: int, ending: str
) -> Iterator[Pair]:
    import webdataset as wds

    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    pipeline = wds.DataPipeline(  # pyright: ignore
        wds.SimpleShardList(paths),  # pyright: ignore
        wds.split_by_worker,  # pyright: ignore
        wds.tarfile_to_samples(),  # pyright: ignore
        wds.decode(),  # pyright: ignore
        wds.to_tuple(ending),  # pyright: ignore
        wds.select(lambda sample: len(sample[0]) > seq_len),  # pyright: ignore
        wds.batched(batch, partial=False),  # pyright: ignore
    )
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=1)  # pyright: ignore
    for (rows,) in itertools.islice(loader, n_batches):
        ids = torch.LongTensor(rows)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


# --- the measurement --------------------------------------------------------------------------


class Rate(NamedTuple):
    """Tokens per second, and per second that the process (all of its threads) had a core."""

    wall: float
    cpu: float | None = None  # not known of other processes


def consume(pairs: Iterator[Pair], batch: int, seq_len: int) -> Rate:
    """The rate at which these batches come."""
    gc.collect()
    started, started_cpu, count = time.perf_counter(), time.process_time(), 0
    for tokens, targets in pairs:
        assert tokens.shape == targets.shape == (batch, seq_len)
        assert tokens.dtype == targets.dtype == torch.int64
        count += tokens.numel()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    return Rate(count / seconds, count / cpu_seconds)


def serve_rank(
    connection: Any, folder: Path, seq_len: int, batch: int, n_batches: int, rank: int, world: int
) -> None:
    """A process of `TwoProcesses`: reads its part whenever it is told to."""
    torch.set_num_threads(1)
    stream = stream_of(folder, seq_len)
    connection.send("ready")
    while connection.recv():
        connection.send(consume(read_ours(stream, n_batches, batch, rank, world), batch, seq_len))


class TwoProcesses:
    """Two ranks that read at the same time; warm, as the dataset of one process is."""

    def __init__(self, *job: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            context.Process(target=serve_rank, args=(theirs, *job, rank, 2), daemon=True).start()
            self.pipes.append(ours)
        self._receive()

    def _receive(self) -> list[Any]:
        return [pipe.recv() for pipe in self.pipes]

    def rate(self) -> Rate:
        for pipe in self.pipes:
            pipe.send(True)
        return Rate(sum(rate.wall for rate in self._receive()))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(False)


class Peer:
    """A process of data_read_peers.py."""

    def __init__(self, python: str, name: str, *job: Any) -> None:
        script = Path(__file__).with_name("data_read_peers.py")
        self.process = subprocess.Popen(
            [python, "-W", "ignore", str(script), name, *map(str, job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        while (line := self._line()) != "ready":
            print(f"{name}: {line}", file=sys.stderr)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended")
        return line.strip()

    def rate(self) -> Rate:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Rate(float(self._line()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def has_module(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


@contextlib.contextmanager
def inflating_with(module: Any) -> Iterator[None]:
    """isal's zlib or the standard library's for what is decoded inside."""
    before = decode_ids.inflate_module
    decode_ids.inflate_module = lambda: module
    try:
        yield
    finally:
        decode_ids.inflate_module = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1 << 26)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers-python", default=sys.executable, metavar="PYTHON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # webdataset leaves files open
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="openlm-bench-") as name:
        rates = measure(Path(name), args)
    report(rates, {k: v for k, v in vars(args).items() if k != "peers_python"})


def measure(folder: Path, args: argparse.Namespace) -> dict[str, list[Rate]]:
    seq_len, batch = args.seq_len, args.batch
    n_batches = args.tokens // (seq_len * batch)
    n_of = {key: max(1, n_batches // share) for key, share in SHARE.items()}
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, args.tokens + 1)
    ids = ids.astype(npy_dtype("uint16"))
    native = folder / "native"
    write_native(native, ids)
    ids.tofile(folder / "flat.bin")
    for ending in ("json.gz", "json"):
        write_openlm(folder / ending, ids, n_of["json"] * batch, seq_len, ending)
    warm = stream_of(native, seq_len)

    def decoded(ending: str) -> Iterator[Pair]:
        return read_ours(stream_of(folder / ending, seq_len), n_of["json"], batch)

    def without_isal() -> Iterator[Pair]:
        with inflating_with(zlib):
            yield from decoded("json.gz")

    readers: dict[str, Reader] = {
        "native": lambda: read_ours(warm, n_batches, batch),
        "native, cold": lambda: read_ours(stream_of(native, seq_len), n_batches, batch),
        "json.gz": lambda: decoded("json.gz"),
        "json.gz, zlib": without_isal,
        "json": lambda: decoded("json"),
        "inline json.gz": lambda: read_openlm_inline(
            folder / "json.gz", n_of["openlm"], batch, "json.gz"
        ),
        "inline json": lambda: read_openlm_inline(folder / "json", n_of["openlm"], batch, "json"),
        "webdataset": lambda: read_webdataset(native, n_of["webdataset"], batch, seq_len),
        "memmap": lambda: read_memmap(folder / "flat.bin", n_batches, batch, seq_len),
    }
    sources: dict[str, Callable[[], Rate]] = {
        key: (lambda read=read: consume(read(), batch, seq_len)) for key, read in readers.items()
    }

    def openlm(ending: str) -> Rate:
        batches = read_openlm(folder / ending, 1 + n_of["openlm"], batch, seq_len, ending)
        next(batches)  # the start of its worker
        return Rate(consume(batches, batch, seq_len).wall)  # the worker's cpu time is not known

    for ending in ("json.gz", "json"):
        sources[f"openlm {ending}"] = functools.partial(openlm, ending)
    with contextlib.ExitStack() as stack:
        two = TwoProcesses(native, seq_len, batch, n_batches)
        stack.callback(two.close)
        sources["native, 2 proc"] = two.rate
        for key, module in (("mosaic", "streaming"), ("litdata", "litdata")):
            if has_module(args.peers_python, module):
                peer = Peer(args.peers_python, key, folder, seq_len, batch, n_of[key])
                stack.callback(peer.close)
                sources[key] = peer.rate
            else:
                print(f"{key}: {module} is not installed for {args.peers_python}", file=sys.stderr)
        for rate in sources.values():
            rate()  # warm-up: page cache, imports
        rates: dict[str, list[Rate]] = {key: [] for key in sources}
        for _ in range(args.repeats):
            for key, rate in sources.items():
                rates[key].append(rate())
    return rates


def report(rates: dict[str, list[Rate]], settings: dict[str, int]) -> None:
    wall = {key: [rate.wall for rate in values] for key, values in rates.items()}
    cpu_rates = {
        key: [rate.cpu for rate in values if rate.cpu is not None]
        for key, values in rates.items()
        if values[0].cpu is not None
    }
    medians = {key: statistics.median(values) for key, values in wall.items()}
    slowest = medians["openlm json.gz"]
    print(f"{'reader':15} {'Mtok/s':>9} {'min':>9} {'max':>9} {'x openlm':>9} {'per core':>9}")
    for key, values in wall.items():
        cells = (medians[key] / 1e6, min(values) / 1e6, max(values) / 1e6)
        numbers = " ".join(f"{cell:9.1f}" for cell in cells)
        per_core = statistics.median(cpu_rates.get(key, [math.nan])) / 1e6
        print(f"{key:15} {numbers} {medians[key] / slowest:9.1f} {per_core:9.1f}")
    pairs = zip(wall["native, 2 proc"], wall["native"], strict=True)
    two = statistics.median(both / one for both, one in pairs)
    print(f"two processes read {two:.2f} times as fast as one (median over the repetitions)")
    for ending in ("json.gz", "json"):
        pairs = zip(wall[ending], wall[f"openlm {ending}"], strict=True)
        over = statistics.median(ours / theirs for ours, theirs in pairs)
        print(f"{ending} is read {over:.1f} times as fast as OpenLM's way (median, likewise)")
    cpu = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [x for x in cpu_info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "webdataset", "isal"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    result = {
        "benchmark": "data_read",
        "settings": settings,
        "tokens_per_second": {
            key: {"median": medians[key], "all": values} for key, values in wall.items()
        },
        "tokens_per_cpu_second": {
            key: {"median": statistics.median(values), "all": values}
            for key, values in cpu_rates.items()
        },
        "two_processes_over_one": two,
        "hardware": {"cpu": cpu, "cores": os.cpu_count(), "load_1min": os.getloadavg()[0]},
        "versions": versions,
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"data_read_cpu_{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
