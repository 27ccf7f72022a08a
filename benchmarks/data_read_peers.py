"""Other libraries that read token data, for data_read.py: each in a process of its own.

    python data_read_peers.py NAME FOLDER SEQ_LEN BATCH N_BATCHES

NAME is mosaic or litdata. FOLDER holds flat.bin, uint16 ids; the library's own files are made from
it once, in FOLDER/NAME. After the line `ready`, each line on standard input starts one reading of
N_BATCHES shuffled batches, after a first one that is not counted, and its tokens/s are printed.
Needs numpy, torch and the library alone, so that it runs in another environment than ours
(mosaicml-streaming asks for an older numpy and transformers).
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


def rows_of(folder: Path, seq_len: int) -> tuple[np.ndarray, int]:
    flat = np.memmap(folder / "flat.bin", dtype="<u2", mode="r")
    return flat, (len(flat) - 1) // seq_len


def batches_of(rows: Iterator[np.ndarray], batch: int) -> Iterator[tuple[Any, Any]]:
    """int64 tokens and targets of `batch` rows of seq_len + 1 ids."""
    while True:
        together = np.stack([next(rows) for _ in range(batch)])
        inputs, targets = together[:, :-1].astype(np.int64), together[:, 1:].astype(np.int64)
        yield torch.from_numpy(inputs), torch.from_numpy(targets)


def mosaic(folder: Path, seq_len: int, batch: int) -> Any:
    """MosaicML Streaming: MDS shards of one row of uint16 ids per sample."""
    from streaming import MDSWriter, StreamingDataset

    out = folder / "mosaic"
    if not out.exists():
        flat, n_rows = rows_of(folder, seq_len)
        with MDSWriter(out=str(out), columns={"tokens": f"ndarray:uint16:{seq_len + 1}"}) as mds:
            for row in range(n_rows):
                ids = np.array(flat[row * seq_len : (row + 1) * seq_len + 1])
                mds.write({"tokens": ids})

    def read() -> Iterator[np.ndarray]:
        dataset = StreamingDataset(local=str(out), shuffle=True, batch_size=batch)
        while True:
            for sample in dataset:
                yield sample["tokens"]

    return read


def token_rows(job: tuple[Path, int]) -> Iterator[torch.Tensor]:
    """What litdata's `optimize` writes."""
    folder, seq_len = job
    flat, n_rows = rows_of(folder, seq_len)
    for row in range(n_rows):
        yield torch.from_numpy(np.array(flat[row * seq_len : (row + 1) * seq_len + 1]))


def litdata(folder: Path, seq_len: int, batch: int) -> Any:
    """litdata: chunks of ids, read by its TokensLoader a row and its last target at a time."""
    from litdata import StreamingDataset, TokensLoader, optimize

    out, loader = folder / "litdata", TokensLoader(block_size=seq_len + 1)
    if not out.exists():
        optimize(
            fn=token_rows,
            inputs=[(folder, seq_len)],
            output_dir=str(out),
            chunk_size=(seq_len + 1) * 2048,
            item_loader=loader,
            num_workers=1,
            verbose=False,
        )

    def read() -> Iterator[np.ndarray]:
        dataset = StreamingDataset(str(out), item_loader=loader, shuffle=True)
        while True:
            for ids in dataset:
                yield ids.numpy()

    return read


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    seq_len, batch, n_batches = map(int, sys.argv[3:])
    read = {"mosaic": mosaic, "litdata": litdata}[name](folder, seq_len, batch)
    print("ready", flush=True)
    for _ in sys.stdin:
        batches = batches_of(iter(read()), batch)
        next(batches)  # their start takes seconds, and is not what is compared
        started, count = time.perf_counter(), 0
        for _ in range(n_batches):
            tokens, targets = next(batches)
            assert tokens.shape == targets.shape == (batch, seq_len)
            count += tokens.numel()
        print(count / (time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
