"""The order of the data as a function: which row is sample i, for any i, without any state.

    sample i -> epoch e = i // rows_per_epoch, place j = i % rows_per_epoch
    epoch e  -> its own permutation of the shards:   [ 7 2 | 9 0 | 4 1 | 3 ]   (windows of K = 2)
    place j  -> window w that holds j (prefix sums over the windows' rows)
    window w -> its own permutation of its rows:     p = permute(j - start_w)
    p        -> shard of the window (prefix sums over its K shards), row in that shard

Both permutations are computed, never stored. A Feistel network over Z_a x Z_b with a*b just above
n (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002: generalised Feistel plus cycle
walking) permutes range(n); Philox4x64-10 (Salmon et al. 2011; numpy's bit generator, whose raw
stream is fixed) turns (seed, purpose, epoch, window) into its round keys.

A golden test freezes the numbers. Whoever changes them changes ORDER_VERSION.
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

import numpy as np

from openlm_lite.errors import InputError

ORDER_VERSION = 1

# Purposes keep the keys of different uses of one seed apart.
SHARDS, ROWS, DOCUMENTS, SPLIT = 1, 2, 3, 4

_FEISTEL_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def check_seed(seed: int, name: str) -> None:
    """Raises InputError unless 0 <= seed < 2**63."""
    if not 0 <= seed < 2**63:
        raise InputError(f"{name}: {seed} is out of range; allowed are 0 to 2**63 - 1")


def philox_keys(
    seed: int, purpose: int, count: int, *, epoch: int = 0, part: int = 0
) -> np.ndarray:
    """`count` uint64 words that depend on all arguments; `part` is a window within the epoch."""
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, epoch, part, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keyed_hash(keys: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A uint64 hash of the pairs (first, second) under two uint64 `keys`."""
    inner = mix64(first.astype(np.uint64) * _GOLDEN + keys[0])
    return mix64(inner ^ mix64(second.astype(np.uint64) * _GOLDEN + keys[1]))


def permute(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The images of `indices` (int64, in range(n)) under the permutation that `keys` choose."""
    a = isqrt(n - 1) + 1 if n > 1 else 1  # ceil(sqrt(n)), so that a*b < n + a: few walks
    b = -(-n // a)
    images = _feistel(indices.astype(np.uint64), a, b, keys)
    outside = np.flatnonzero(images >= n)
    while outside.size:  # cycle walking: step along the cycle until it is back inside range(n)
        images[outside] = _feistel(images[outside], a, b, keys)
        outside = outside[images[outside] >= n]
    return images.astype(np.int64)


def _feistel(x: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    """One pass over the network: x = left*b + right; the halves are added to in turn."""
    sizes = (np.uint64(a), np.uint64(b))
    halves = [x // sizes[1], x % sizes[1]]
    half_word = np.uint64(32)
    for i, key in enumerate(keys):
        target, source = i % 2, 1 - i % 2
        noise = mix64(halves[source] * _GOLDEN + key)
        # the top 32 bits scaled to range(size): size < 2**32 because n < 2**63
        moved = halves[target] + (((noise >> half_word) * sizes[target]) >> half_word)
        halves[target] = np.where(moved >= sizes[target], moved - sizes[target], moved)
    return halves[0] * sizes[1] + halves[1]


class Places(NamedTuple):
    """Where samples lie; int64 arrays of one length."""

    epoch: np.ndarray
    shard: np.ndarray  # number of the shard in the manifest
    row: np.ndarray  # number of the row within the shard


class _Epoch(NamedTuple):
    shards: np.ndarray  # the permuted shard numbers
    window_starts: np.ndarray  # first place of each window, and rows_per_epoch at the end


class RowOrder:
    """The order over shards that hold `rows_per_shard` rows each; pure in all its arguments."""

    def __init__(self, rows_per_shard: np.ndarray, *, seed: int, shuffle_shards: int) -> None:
        check_seed(seed, "data.seed")
        if shuffle_shards < 1:
            raise InputError(f"data.shuffle_shards: {shuffle_shards} is too small; allowed: >= 1")
        self._rows_per_shard = rows_per_shard.astype(np.int64)
        self._seed = seed
        self._window = shuffle_shards
        self.rows_per_epoch = int(self._rows_per_shard.sum())
        self._epochs: dict[int, _Epoch] = {}

    def locate(self, indices: np.ndarray) -> Places:
        """The places of the samples `indices` (int64, >= 0; any order, any epochs)."""
        indices = np.asarray(indices, dtype=np.int64)
        epochs, places = np.divmod(indices, self.rows_per_epoch)
        shards, rows = np.empty_like(indices), np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            shards[here], rows[here] = self._locate_in_epoch(epoch, places[here])
        return Places(epochs, shards, rows)

    def _locate_in_epoch(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order, starts = self._epoch(epoch)
        windows = np.searchsorted(starts, places, side="right") - 1
        shards, rows = np.empty_like(places), np.empty_like(places)
        for window in np.unique(windows).tolist():
            here = np.flatnonzero(windows == window)
            start, end = int(starts[window]), int(starts[window + 1])
            keys = philox_keys(self._seed, ROWS, _FEISTEL_ROUNDS, epoch=epoch, part=window)
            within = permute(places[here] - start, end - start, keys)
            members = order[window * self._window : (window + 1) * self._window]
            ends = np.cumsum(self._rows_per_shard[members])
            which = np.searchsorted(ends, within, side="right")
            shards[here] = members[which]
            rows[here] = within - (ends[which] - self._rows_per_shard[members[which]])
        return shards, rows

    def _epoch(self, epoch: int) -> _Epoch:
        known = self._epochs.get(epoch)
        if known is None:
            n = len(self._rows_per_shard)
            keys = philox_keys(self._seed, SHARDS, _FEISTEL_ROUNDS, epoch=epoch)
            shards = permute(np.arange(n), n, keys)
            ends = np.cumsum(self._rows_per_shard[shards])
            last = np.append(np.arange(self._window - 1, n - 1, self._window), n - 1)
            known = _Epoch(shards, np.concatenate([[0], ends[last]]))
            if len(self._epochs) >= 2:  # a batch may span two epochs; older ones are done
                self._epochs = {}
            self._epochs[epoch] = known
        return known
