"""The folder of an evaluation, which an interrupted one goes on from.

    OUT/
      eval.json                  what the records are of: model, tokenizer, how it is asked
      records/TASK.RANK.jsonl    what the model said, a line per row
      result.json                appears when all is done
      lock                       held while one works here

A record is of one task in one wording with one data file: its line carries a hash of these, and
lines with another are not read, so a new data file mixes with nothing. The limit on rows is not in
the hash, as it changes no prompt: a larger one asks only the rows that are not there yet.

Records are of DCLM's tasks alone. What else is measured (AIW, lm-eval, held-out text) stands in
result.json and nowhere else, is computed again by the same command, and is not given up for
another one: such a claim is refused.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from openlm_lite import dist
from openlm_lite.errors import InputError
from openlm_lite.eval.icl import Key, Record
from openlm_lite.eval.prompts import Data
from openlm_lite.eval.tasks import Task
from openlm_lite.storage import local_path, write_json


class FolderJournal:
    """Records under `path`, for `icl.run_suite`; a context that lets the folder go.

    `identity`: JSON values that say which model is asked, and how. `parts`: what result.json will
    hold, name -> how it is asked (None: it has records).
    """

    def __init__(
        self, path: str, identity: Mapping[str, Any], parts: Mapping[str, Any] | None = None
    ) -> None:
        self.path = local_path(path)
        self._identity = json.loads(json.dumps(identity))
        self._parts = json.loads(json.dumps(parts or {}))
        self._data: dict[str, Data] = {}
        self._is_claimed = False
        self._lock: int | None = None

    def __enter__(self) -> FolderJournal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def claim(self) -> None:
        """Make the folder and hold it; collective. What is claimed already stays so.

        Raises InputError where another process works there, or where it has the evaluation of
        something else, or a result with parts that this one would not have.
        """
        if self._is_claimed:
            return
        dist.on_main(self._claim)
        self._is_claimed = True

    def _claim(self) -> None:
        os.makedirs(os.path.join(self.path, "records"), exist_ok=True)
        if self._lock is None:
            place = os.path.join(self.path, "lock")
            self._lock = os.open(place, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--out {self.path}: another evaluation works there; wait for it, or name another "
                "folder"
            ) from None
        self._check_identity()
        self._check_result()

    def _check_identity(self) -> None:
        known = self._read_json("eval.json")
        if known is None:
            write_json(os.path.join(self.path, "eval.json"), self._identity)
            return
        unlike = [n for n in {**known, **self._identity} if known.get(n) != self._identity.get(n)]
        if unlike:
            name = unlike[0]
            raise InputError(
                f"--out {self.path}: holds an evaluation with {name} = {known.get(name)!r}, this "
                f"one has {self._identity.get(name)!r}; name another folder"
            )

    def _check_result(self) -> None:
        there = (self._read_json("result.json") or {}).get("parts", {})
        lost = [n for n, how in there.items() if n not in self._parts or self._parts[n] != how]
        if lost:
            name = lost[0]
            settings = "" if there[name] is None else f" with {json.dumps(there[name])}"
            raise InputError(
                f"--out {self.path}: its result.json has {name}{settings}, and this evaluation, "
                "which does not ask for that, would replace it; ask for it too, or name another "
                "folder"
            )

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """What the file holds; None where there is none."""
        place = os.path.join(self.path, name)
        try:
            with open(place, encoding="utf-8") as f:
                found = json.load(f)
        except FileNotFoundError:
            return None
        except ValueError as e:
            raise InputError(f"{place}: not JSON ({e}); name another folder") from None
        if not isinstance(found, dict):
            raise InputError(f"{place}: not ours; name another folder")
        return found

    def load(self, task: Task, data: Data) -> dict[Key, Record]:
        """The records of earlier runs, of all their ranks; what was cut off in a line is lost.

        Collective: rank 0 reads them for all, so that none counts in what another one has written
        in the meantime.
        """
        self.claim()
        self._data[task.label] = data
        records = dist.on_main(lambda: self._read(task, data))
        return {(plain["category"], plain["index"]): Record(**plain) for plain in records}

    def _read(self, task: Task, data: Data) -> list[dict[str, Any]]:
        wording, found = self._wording(task, data), []
        folder = os.path.join(self.path, "records")
        for name in sorted(os.listdir(folder)):
            if not name.startswith(task.label + "."):
                continue
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                for line in f:
                    with suppress(ValueError, TypeError, KeyError, AttributeError):
                        # a kill may have cut it off: then the row is asked again
                        plain = json.loads(line)
                        if plain.pop("wording") == wording:
                            found.append(dataclasses.asdict(Record(**plain)))
        return found

    def add(self, task: Task, records: Sequence[Record]) -> None:
        """Append them to this rank's file."""
        wording = self._wording(task, self._data[task.label])
        lines = [json.dumps({"wording": wording, **dataclasses.asdict(r)}) for r in records]
        name = f"{task.label}.{dist.rank()}.jsonl"
        with open(os.path.join(self.path, "records", name), "a", encoding="utf-8") as f:
            if f.tell():
                f.write("\n")  # ends what a kill may have cut off
            f.write("\n".join(lines))

    def _wording(self, task: Task, data: Data) -> str:
        told = json.dumps([dataclasses.asdict(task), data.sha256, self._identity], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]
