"""The folder of an evaluation, which an interrupted one goes on from.

    OUT/
      eval.json                  what the records are of: model, tokenizer, how it is asked
      records/TASK.RANK.jsonl    what the model said, a line per row
      result.json                appears when all is done
      lock                       held while one works here

A record is of one task in one wording with one data file: its line carries a hash of these, and
lines with another are not read. So a new data file, or another limit, mixes with nothing.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from openlm_lite import dist
from openlm_lite.errors import InputError
from openlm_lite.eval.icl import Key, Record
from openlm_lite.eval.prompts import Data
from openlm_lite.eval.tasks import Task
from openlm_lite.storage import local_path, write_json


class FolderJournal:
    """Records under `path`, for `icl.run_suite`; a context that lets the folder go.

    `identity`: JSON values that say which model is asked, and how. The first `load`, which is
    collective, makes the folder and holds it. It raises InputError where the folder has the
    evaluation of something else, or another process works there.
    """

    def __init__(self, path: str, identity: Mapping[str, Any]) -> None:
        self.path = local_path(path)
        self._identity = json.loads(json.dumps(identity))
        self._data: dict[str, Data] = {}
        self._is_claimed = False
        self._lock: int | None = None

    def __enter__(self) -> FolderJournal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _claim(self) -> None:
        os.makedirs(os.path.join(self.path, "records"), exist_ok=True)
        self._lock = os.open(os.path.join(self.path, "lock"), os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--out {self.path}: another evaluation works there; wait for it, or name another "
                "folder"
            ) from None
        place = os.path.join(self.path, "eval.json")
        if not os.path.exists(place):
            write_json(place, self._identity)
            return
        with open(place, encoding="utf-8") as f:
            known = json.load(f)
        unlike = [n for n in {**known, **self._identity} if known.get(n) != self._identity.get(n)]
        if unlike:
            name = unlike[0]
            raise InputError(
                f"--out {self.path}: holds an evaluation with {name} = {known.get(name)!r}, this "
                f"one has {self._identity.get(name)!r}; name another folder"
            )

    def load(self, task: Task, data: Data) -> dict[Key, Record]:
        """The records of earlier runs, of all their ranks; what was cut off in a line is lost."""
        if not self._is_claimed:  # not before: all input has been checked now
            dist.on_main(self._claim)
            self._is_claimed = True
        self._data[task.label] = data
        wording, found = self._wording(task, data), {}
        folder = os.path.join(self.path, "records")
        for name in sorted(os.listdir(folder)):
            if not name.startswith(task.label + "."):
                continue
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                for line in f:
                    try:
                        plain = json.loads(line)
                        if plain.pop("wording") == wording:
                            record = Record(**plain)
                            found[record.category, record.index] = record
                    except (ValueError, TypeError, KeyError, AttributeError):
                        continue  # a kill cut it off: the row is asked again
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
