"""The order of the data as a function: which row is sample i, for any i, without any state.

    shards   -> C lanes with about equal rows; a lane keeps its shards for the whole run
    sample i -> epoch e = i // rows_per_epoch; lane c = i mod C, and its k-th row of this epoch
    epoch e  -> lane c's permutation of its shards:  [ 7 2 | 9 0 | 4 1 | 3 ]   (windows of K / C)
    row k    -> window w that holds k (prefix sums over the windows' rows)
    window w -> its own permutation of its rows:     p = permute(k - start_w)
    p        -> shard of the window (prefix sums over its shards), row in that shard

Rank r of W reads the samples i = r mod W: when W divides C, or C divides W, these lie in a part of
the lanes, so that on many nodes a rank opens its own shards only. The last rows of an epoch, which
lanes of unequal size leave over, are read by whoever's turn it is. The order depends on C, never on
W, and each row comes once per epoch.

Both permutations are computed, never stored. A Feistel network over Z_a x Z_b with a*b just above
n (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002: generalised Feistel plus cycle
walking) permutes range(n); Philox4x64-10 (Salmon et al. 2011; numpy's bit generator, whose raw
stream is fixed) turns (seed, purpose, epoch, window) into its round keys.

A golden test freezes the numbers. Whoever changes them changes ORDER_VERSION.
"""

from __future__ import annotations

import heapq
from math import isqrt
from typing import NamedTuple

import numpy as np

from openlm_lite.errors import InputError

ORDER_VERSION = 2

# Purposes keep the keys of different uses of one seed apart.
SHARDS, ROWS, DOCUMENTS, SPLIT, SOURCES, PACKED = 1, 2, 3, 4, 5, 6

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


def distinct(values: np.ndarray) -> list[int]:
    """The different values among these integers, in order.

    The few that lie close together, as windows and sources do, ten times as fast as np.unique.
    """
    if not values.size:
        return []
    low, high = int(values.min()), int(values.max())
    if high - low > len(values):
        return np.unique(values).tolist()
    return (np.flatnonzero(np.bincount(values - low)) + low).tolist()


class Places(NamedTuple):
    """Where samples lie; int64 arrays of one length."""

    epoch: np.ndarray
    shard: np.ndarray  # number of the shard in the manifest
    row: np.ndarray  # number of the row within the shard


def auto_lanes(n_shards: int, shuffle_shards: int) -> int:
    """The lanes of a run that does not choose: a power of two that leaves each 8 shards or more."""
    most = max(1, min(n_shards // 8, shuffle_shards))
    return 1 << (most.bit_length() - 1)


class RowOrder:
    """The order over shards that hold `rows_per_shard` rows each; pure in all its arguments.

    `shuffle_shards` counts the shards whose rows are mixed at a time, over all lanes.
    Raises InputError for arguments that are out of range.
    """

    def __init__(
        self, rows_per_shard: np.ndarray, *, seed: int, shuffle_shards: int, lanes: int = 1
    ) -> None:
        check_seed(seed, "data.seed")
        if shuffle_shards < 1:
            raise InputError(f"data.shuffle_shards: {shuffle_shards} is too small; allowed: >= 1")
        if not 1 <= lanes <= len(rows_per_shard):
            raise InputError(
                f"data.lanes: {lanes} is out of range; allowed are 1 to {len(rows_per_shard)}, "
                "the number of shards"
            )
        rows = rows_per_shard.astype(np.int64)
        window = max(1, shuffle_shards // lanes)
        owned = _dealt(rows, lanes)
        self._lanes = [_Lane(c, owned[c], rows, seed, window) for c in range(lanes)]
        self._rows = np.array([lane.n_rows for lane in self._lanes])
        self.rows_per_epoch = int(rows.sum())

    def locate(self, indices: np.ndarray) -> Places:
        """The places of the samples `indices` (int64, >= 0; any order, any epochs)."""
        indices = np.asarray(indices, dtype=np.int64)
        epochs, places = np.divmod(indices, self.rows_per_epoch)
        shards, rows = np.empty_like(indices), np.empty_like(indices)
        for epoch in distinct(epochs):
            here = np.flatnonzero(epochs == epoch)
            lanes, ks = self._deal(epoch, places[here])
            for lane in distinct(lanes):
                mine = lanes == lane
                shards[here[mine]], rows[here[mine]] = self._lanes[lane].locate(epoch, ks[mine])
        return Places(epochs, shards, rows)

    def shards_ahead(self, indices: np.ndarray) -> list[int]:
        """The shards of the windows in which `indices` lie, then those of the windows after."""
        epochs, places = np.divmod(np.asarray(indices, dtype=np.int64), self.rows_per_epoch)
        now: dict[int, None] = {}
        later: dict[int, None] = {}
        for epoch in distinct(epochs):
            lanes, ks = self._deal(epoch, places[epochs == epoch])
            for lane in distinct(lanes):
                current, following = self._lanes[lane].windows(epoch, ks[lanes == lane])
                now |= dict.fromkeys(current)
                later |= dict.fromkeys(following)
        return [*now, *(shard for shard in later if shard not in now)]

    def _deal(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(lane, number of the row within the lane's epoch) of the places in an epoch.

        Place j belongs to lane (j + offset) mod C, so that a sample's lane is its index mod C in
        every epoch, up to the first place whose lane is used up; then lane after lane.
        """
        lanes = len(self._lanes)
        offset = epoch * self.rows_per_epoch % lanes
        firsts = (np.arange(lanes) - offset) % lanes  # each lane's first place
        regular = int((firsts + self._rows * lanes).min())  # the first that its lane cannot fill
        lane = (places + offset) % lanes
        k = (places - firsts[lane]) // lanes
        tail = np.flatnonzero(places >= regular)
        if tail.size:
            used = np.maximum(0, -(-(regular - firsts) // lanes))
            ends = np.cumsum(self._rows - used)
            lane[tail] = np.searchsorted(ends, places[tail] - regular, side="right")
            k[tail] = self._rows[lane[tail]] - (ends[lane[tail]] - (places[tail] - regular))
        return lane, k


def _dealt(rows: np.ndarray, lanes: int) -> list[np.ndarray]:
    """Shard numbers of each lane: the largest shards first, each to the lane with the fewest rows.

    Equal shards (all but a dataset's last) thus go round: lane c has c, c + C, c + 2 C, ….
    """
    owned: list[list[int]] = [[] for _ in range(lanes)]
    heap = [(0, c) for c in range(lanes)]
    for shard in np.argsort(-rows, kind="stable").tolist():
        filled, lane = heapq.heappop(heap)
        owned[lane].append(shard)
        heapq.heappush(heap, (filled + int(rows[shard]), lane))
    return [np.array(sorted(shards)) for shards in owned]


class _Epoch(NamedTuple):
    shards: np.ndarray  # the lane's shard numbers, permuted
    window_starts: np.ndarray  # the lane's first row in each window, and its rows at the end


class _Lane:
    """The rows of some of the shards, permuted anew in each epoch."""

    def __init__(
        self, number: int, shards: np.ndarray, rows: np.ndarray, seed: int, window: int
    ) -> None:
        self._number, self._shards, self._rows = number, shards, rows
        self._seed, self._window = seed, window
        self.n_rows = int(rows[shards].sum())
        self._epochs: dict[int, _Epoch] = {}

    def locate(self, epoch: int, ks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row within it) of the lane's rows `ks` in an epoch."""
        order, starts = self._epoch(epoch)
        windows = np.searchsorted(starts, ks, side="right") - 1
        shards, rows = np.empty_like(ks), np.empty_like(ks)
        for window in distinct(windows):
            here = np.flatnonzero(windows == window)
            start, end = int(starts[window]), int(starts[window + 1])
            part = (self._number << 32) + window
            keys = philox_keys(self._seed, ROWS, _FEISTEL_ROUNDS, epoch=epoch, part=part)
            within = permute(ks[here] - start, end - start, keys)
            members = order[window * self._window : (window + 1) * self._window]
            ends = np.cumsum(self._rows[members])
            which = np.searchsorted(ends, within, side="right")
            shards[here] = members[which]
            rows[here] = within - (ends[which] - self._rows[members[which]])
        return shards, rows

    def windows(self, epoch: int, ks: np.ndarray) -> tuple[list[int], list[int]]:
        """The shards of the windows that hold rows `ks`, and those of the window after the last."""
        order, starts = self._epoch(epoch)
        windows = distinct(np.searchsorted(starts, ks, side="right") - 1)
        size, last = self._window, windows[-1] + 1
        now = [s for w in windows for s in order[w * size : (w + 1) * size].tolist()]
        if last * size < len(order):
            return now, order[last * size : (last + 1) * size].tolist()
        return now, self._epoch(epoch + 1).shards[:size].tolist()

    def _epoch(self, epoch: int) -> _Epoch:
        known = self._epochs.get(epoch)
        if known is None:
            n = len(self._shards)
            keys = philox_keys(self._seed, SHARDS, _FEISTEL_ROUNDS, epoch=epoch, part=self._number)
            shards = self._shards[permute(np.arange(n), n, keys)]
            ends = np.cumsum(self._rows[shards])
            last = np.append(np.arange(self._window - 1, n - 1, self._window), n - 1)
            known = _Epoch(shards, np.concatenate([[0], ends[last]]))
            if len(self._epochs) >= 3:  # a batch may span two epochs and look into the next
                self._epochs = {}
            self._epochs[epoch] = known
        return known
