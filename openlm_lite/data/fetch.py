"""The shards of a remote dataset: fetched into the cache ahead of need.

RemoteShards.want(shards)    what is read next: background threads fetch these, in this order
RemoteShards.path_of(name)   waits for a shard; the file stays in the cache until let_go(name)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from openlm_lite import storage
from openlm_lite.data.cache import Cache, Held
from openlm_lite.data.manifest import ShardEntry

# Each is a file that is kept open, of which a process may have about a thousand.
_MOST_AHEAD = 64


class RemoteShards:
    """The shards that `entries` describe, in the folder at `url`. Safe to share by threads."""

    def __init__(self, url: str, entries: Sequence[ShardEntry], cache: Cache) -> None:
        self._url = url
        self._entries = {entry.file_name: entry for entry in entries}
        self._cache = cache
        self._ahead = Ahead(self._hold)
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()

    def want(self, names: Sequence[str]) -> None:
        """Fetch these shards, the first ones first, instead of what was wanted before.

        No more of them than the cache has room for beside those in use: it drops none for this.
        """
        with self._lock:
            room = self._cache.max_bytes - sum(map(self._size_of, self._held))
            missing = [name for name in dict.fromkeys(names) if name not in self._held]
        fitting: list[str] = []
        for name in missing[:_MOST_AHEAD]:
            room -= self._size_of(name)
            if room < 0 and fitting:
                break
            fitting.append(name)
        self._ahead.want(fitting)

    def path_of(self, name: str) -> str:
        """A local file with the bytes of the shard; it stays there until `let_go`.

        Raises MissingError, DamagedError; RefusedError, RemoteError, RunError, which say nothing
        about this shard.
        """
        with self._lock:
            held = self._held.get(name)
        if held is None:
            held = self._ahead.take(name)
            with self._lock:
                if name in self._held:  # two threads wanted it
                    held.close()
                held = self._held.setdefault(name, held)
        return held.path

    def let_go(self, name: str) -> None:
        """The cache may drop the shard's file; what is mapped stays readable."""
        with self._lock:
            held = self._held.pop(name, None)
        if held is not None:
            held.close()

    def close(self) -> None:
        """Let go of all shards and fetch nothing more."""
        self._ahead.want(())
        for name in list(self._held):
            self.let_go(name)

    def _size_of(self, name: str) -> int:
        return self._entries[name].bytes or 0  # OpenLM's manifests do not say

    def _hold(self, name: str) -> Held:
        entry = self._entries[name]
        url = storage.safe_join(self._url, name)
        n_bytes = storage.size_of(url) if entry.bytes is None else entry.bytes
        return self._cache.hold(url, n_bytes, entry.crc32)


class Ahead:
    """Holds shards before they are asked for, in daemon threads that end when idle."""

    def __init__(self, hold: Callable[[str], Held], threads: int = 4) -> None:
        self._hold = hold
        self._threads = threads
        self._running = 0
        self._wanted: list[str] = []
        self._busy: set[str] = set()
        self._done: dict[str, Held | Exception] = {}
        self._changed = threading.Condition()

    def want(self, names: Sequence[str]) -> None:
        """What is needed next, the next first; what was wanted before and is not begun is not."""
        with self._changed:
            for name in self._done.keys() - set(names):
                self._drop(name)
            known = self._busy | self._done.keys()
            self._wanted = [name for name in dict.fromkeys(names) if name not in known]
            for _ in range(min(self._threads - self._running, len(self._wanted))):
                self._running += 1
                threading.Thread(target=self._run, daemon=True).start()

    def take(self, name: str) -> Held:
        """The shard, once it is here; whoever takes it closes it. Raises what `hold` raised."""
        with self._changed:
            while name in self._busy:
                self._changed.wait()
            outcome = self._done.pop(name, None)
            if name in self._wanted:
                self._wanted.remove(name)
        if outcome is None:
            return self._hold(name)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._wanted:
                    self._running -= 1
                    return
                name = self._wanted.pop(0)
                self._busy.add(name)
            outcome: Held | Exception
            try:
                outcome = self._hold(name)
            except Exception as e:  # told to whoever takes the shard
                outcome = e
            with self._changed:
                self._busy.discard(name)
                self._done[name] = outcome
                self._changed.notify_all()

    def _drop(self, name: str) -> None:
        outcome = self._done.pop(name)
        if isinstance(outcome, Held):
            outcome.close()
