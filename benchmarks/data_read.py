"""How fast one process delivers training batches: ours, the ceiling, and two other ways.

    python benchmarks/data_read.py [--tokens 67108864] [--seq-len 2048] [--batch 32] [--repeats 5]

All read the same random ids from a local disk (in the page cache after the first repetition) and
deliver int64 torch tensors, tokens and targets, [batch, seq_len]:

    ours         train_batches, shuffled, crc32 and ids checked at first open, background thread
    ours, cold   the same with a newly opened dataset in every repetition, checks included
    memmap       np.memmap over one flat file of ids, rows in random order: the ceiling
    webdataset   stock webdataset over our shards: .decode(), blocks cut into rows, unshuffled
    json.gz      OpenLM's way: a tar of json.gz members, each a list of seq_len + 1 ids

Repetitions are interleaved; the table shows the median and the spread over them. The slow readers
get fewer tokens, which does not change their rate. Writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import io
import itertools
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.manifest import (
    DatasetInfo,
    ShardEntry,
    TokenizerInfo,
    info_text,
    manifest_text,
)
from openlm_lite.data.shards import npy_dtype, write_shard
from openlm_lite.data.stream import TokenStream, train_batches

BLOCK_TOKENS = 65_536
BLOCKS_PER_SHARD = 256
VOCAB_SIZE = 50_257
# of --tokens, for readers that are 10 and 100 times as slow
WEBDATASET_SHARE, JSON_SHARE = 4, 64

Pair = tuple[torch.Tensor, torch.Tensor]


def write_native(folder: Path, ids: np.ndarray) -> None:
    """Our shards, their manifest, and the flat file for the ceiling."""
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
    ids.tofile(folder / "flat.bin")


def write_json_gz(path: Path, ids: np.ndarray, n_rows: int, seq_len: int) -> None:
    with tarfile.open(path, "w") as tar:
        for row in range(n_rows):
            content = json.dumps(ids[row * seq_len : (row + 1) * seq_len + 1].tolist()).encode()
            content = gzip.compress(content, mtime=0)
            member = tarfile.TarInfo(f"{row:010d}.json.gz")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def split(rows: np.ndarray) -> Pair:
    inputs, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def read_ours(stream: TokenStream, n_batches: int, batch: int) -> Iterator[Pair]:
    batches = train_batches(
        stream, first_sample=0, global_batch=batch, rank=0, world_size=1, prefetch=4
    )
    for item in itertools.islice(batches, n_batches):
        yield item.tokens_BT, item.targets_BT
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]  (it is a generator)


def read_memmap(path: Path, n_batches: int, batch: int, seq_len: int) -> Iterator[Pair]:
    flat = np.memmap(path, dtype="<u2", mode="r")
    order = np.random.default_rng(0).permutation((len(flat) - 1) // seq_len)
    for b in range(n_batches):
        rows = np.empty((batch, seq_len + 1), dtype=flat.dtype)
        for k, row in enumerate(order[b * batch : (b + 1) * batch].tolist()):
            rows[k] = flat[row * seq_len : (row + 1) * seq_len + 1]
        yield split(rows)


def read_webdataset(paths: list[str], n_batches: int, batch: int, seq_len: int) -> Iterator[Pair]:
    import webdataset

    samples = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode()  # pyright: ignore
    rows: list[np.ndarray] = []
    for sample in samples:
        ids = sample["npy"]
        rows += [ids[s : s + seq_len + 1] for s in range(0, len(ids) - 1, seq_len)]
        while len(rows) >= batch:
            yield split(np.stack(rows[:batch]))
            rows = rows[batch:]
            n_batches -= 1
            if n_batches == 0:
                return


def read_json_gz(path: Path, n_batches: int, batch: int) -> Iterator[Pair]:
    with tarfile.open(path, "r|") as tar:
        members = iter(tar)
        for _ in range(n_batches):
            rows: list[list[int]] = []
            for member in itertools.islice(members, batch):
                content = tar.extractfile(member)
                assert content is not None
                rows.append(json.loads(gzip.decompress(content.read())))
            yield split(np.array(rows))


def tokens_per_second(read: Callable[[], Iterator[Pair]], batch: int, seq_len: int) -> float:
    gc.collect()
    started = time.perf_counter()
    count = 0
    for tokens, targets in read():
        assert tokens.shape == targets.shape == (batch, seq_len)
        assert tokens.dtype == targets.dtype == torch.int64
        count += tokens.numel()
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1 << 26)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # webdataset leaves files open
    torch.set_num_threads(1)
    seq_len, batch = args.seq_len, args.batch
    n_batches = args.tokens // (seq_len * batch)
    n_blocks = args.tokens // BLOCK_TOKENS
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, n_blocks * BLOCK_TOKENS + 1)
    ids = ids.astype(npy_dtype("uint16"))
    with tempfile.TemporaryDirectory(prefix="openlm-bench-") as name:
        folder = Path(name)
        write_native(folder, ids)
        json_batches = max(1, n_batches // JSON_SHARE)
        write_json_gz(folder / "json.tgz", ids, json_batches * batch, seq_len)
        shards = [str(p) for p in sorted(folder.glob("shard-*.tar"))]
        warm = TokenStream(open_dataset(name), seq_len, seed=0, shuffle_shards=16)

        def cold() -> Iterator[Pair]:
            stream = TokenStream(open_dataset(name), seq_len, seed=0, shuffle_shards=16)
            return read_ours(stream, n_batches, batch)

        readers: dict[str, Callable[[], Iterator[Pair]]] = {
            "ours": lambda: read_ours(warm, n_batches, batch),
            "ours, cold": cold,
            "memmap": lambda: read_memmap(folder / "flat.bin", n_batches, batch, seq_len),
            "webdataset": lambda: read_webdataset(
                shards, max(1, n_batches // WEBDATASET_SHARE), batch, seq_len
            ),
            "json.gz": lambda: read_json_gz(folder / "json.tgz", json_batches, batch),
        }
        rates: dict[str, list[float]] = {key: [] for key in readers}
        for read in readers.values():
            tokens_per_second(read, batch, seq_len)  # warm-up: page cache, imports
        for _ in range(args.repeats):
            for key, read in readers.items():
                rates[key].append(tokens_per_second(read, batch, seq_len))
    report(rates, vars(args))


def report(rates: dict[str, list[float]], settings: dict[str, int]) -> None:
    medians = {key: statistics.median(values) for key, values in rates.items()}
    print(f"{'reader':12} {'Mtok/s':>9} {'min':>9} {'max':>9} {'x json.gz':>9}")
    for key, values in rates.items():
        cells = (medians[key] / 1e6, min(values) / 1e6, max(values) / 1e6)
        numbers = " ".join(f"{cell:9.1f}" for cell in cells)
        print(f"{key:12} {numbers} {medians[key] / medians['json.gz']:9.0f}")
    cpu = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [x for x in cpu_info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    result = {
        "benchmark": "data_read",
        "settings": settings,
        "tokens_per_second": {
            key: {"median": medians[key], "all": values} for key, values in rates.items()
        },
        "hardware": {"cpu": cpu, "cores": os.cpu_count(), "load_1min": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"data_read_cpu_{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
