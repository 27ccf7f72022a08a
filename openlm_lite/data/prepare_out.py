"""Where `openlm prepare` works, and what it leaves there.

    --out FOLDER      made in FOLDER, scratch in FOLDER/.prepare (or in --scratch)
    --out s3://…      made in scratch/out; each shard is sent and deleted when it is done, and the
                      small files are sent at the end; dataset.json of the training part is last

The last dataset.json says that all is done; the folder without it is not a dataset.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from openlm_lite import storage
from openlm_lite.data import manifest as manifest_module
from openlm_lite.data.manifest import INFO_NAME, MANIFEST_NAME, DatasetInfo, ShardEntry
from openlm_lite.data.plan import PrepareConfig
from openlm_lite.data.tokenizer import TOKENIZER_NAMES, Tokenizer
from openlm_lite.errors import InputError

SCRATCH = ".prepare"
REPORT_NAME = "report.json"
_SAVED_TOKENIZER = "tokenizer-files"  # in the scratch


class ResumableError(InputError):
    """An InputError after which the work done so far stays, for the same command to go on."""


@dataclass(frozen=True)
class Place:
    """Where one run works."""

    out: str  # as it was named, without a / at its end
    folder: str  # local: here the dataset is made
    scratch: str  # local
    is_remote: bool
    splits: tuple[str, ...]  # ("train",) or ("train", "val")

    def inner(self, split: str) -> str:
        """The path of a split inside `out`: "" where there is only one."""
        return split if len(self.splits) > 1 else ""

    def folder_of(self, split: str) -> str:
        """The local folder of a split."""
        return os.path.join(self.folder, split) if self.inner(split) else self.folder

    def url_of(self, split: str) -> str | None:
        """Where a split is sent, None where it stays."""
        return "/".join(filter(None, (self.out, self.inner(split)))) if self.is_remote else None

    def named(self, split: str) -> str:
        """What the user will call the split."""
        return self.url_of(split) or self.folder_of(split)


def place_for(cfg: PrepareConfig) -> Place:
    """Where the run `cfg` works; nothing is made yet. Raises InputError for a refused path."""
    is_remote = storage.is_remote(cfg.out)
    out = cfg.out.rstrip("/") if is_remote else storage.local_path(cfg.out)
    if cfg.scratch is None and not is_remote:
        scratch = os.path.join(out, SCRATCH)
    else:  # the name makes sure that two runs in one scratch folder stay apart
        key = out if is_remote else os.path.realpath(out)
        name = f"{SCRATCH}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        scratch = os.path.join(storage.local_path(cfg.scratch or "."), name)
    folder = os.path.join(scratch, "out") if is_remote else out
    return Place(
        out, folder, scratch, is_remote, ("train", "val") if cfg.val_fraction > 0 else ("train",)
    )


def is_finished(place: Place, fingerprint: str) -> bool:
    """Whether `out` is finished with this fingerprint. Raises InputError if with another.

    Of a remote one, the small files are fetched into `place.folder`.
    """
    if place.is_remote:
        _fetch_small_files(place)
    inner = ("", "train", "val")
    found = [p for p in inner if os.path.exists(os.path.join(place.folder, p, INFO_NAME))]
    for path in found:
        folder = os.path.join(place.folder, path)
        if manifest_module.load_info(os.path.join(folder, INFO_NAME)).fingerprint != fingerprint:
            name = "/".join(filter(None, (place.out, path)))
            raise InputError(
                f"{name}: holds a dataset that was made from other inputs or with other settings "
                f"(see its {INFO_NAME}); choose another --out, or remove the folder first"
            )
    return all(place.inner(split) in found for split in place.splits)


def check_out(place: Place, fingerprint: str) -> None:
    """Raises InputError unless `out` is new, empty, or a stopped run of the same work."""
    plan = os.path.join(place.scratch, "plan.json")
    if os.path.exists(plan):
        with open(plan, encoding="utf-8") as file:
            if json.load(file)["fingerprint"] == fingerprint:
                return
        raise InputError(
            f"{place.out}: holds an unfinished run with other inputs or settings; repeat that run "
            f"to finish it, choose another --out, or remove {place.scratch} and the shards that "
            f"are in {place.out}"
        )
    if place.is_remote:
        found = sorted(name for name, _ in _remote_files(place))
        # a tokenizer is sent before the work, and may be all that a run left that met bad input
        names = [name for name in found if os.path.basename(name) not in TOKENIZER_NAMES]
    elif not os.path.exists(place.out):
        return
    elif not os.path.isdir(place.out):
        raise InputError(f"{place.out}: is not a folder; choose another --out")
    else:
        names = sorted(name for name in os.listdir(place.out) if name != SCRATCH)
    if names:
        raise InputError(
            f"{place.out}: the out folder is not empty (it holds {', '.join(names[:5])}); "
            "choose a new or an empty one"
        )


@contextmanager
def lock(scratch: str) -> Iterator[None]:
    """Keep a second run out of the folder; the kernel frees the lock of a killed one."""
    with open(os.path.join(scratch, "lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResumableError(
                f"{scratch}: another `openlm prepare` is writing here; wait for it or choose "
                "another --out"
            ) from None
        yield


def write_report(place: Place, report: dict[str, Any]) -> None:
    """OUT/report.json."""
    storage.write_json(os.path.join(place.folder, REPORT_NAME), report)
    if place.is_remote:
        storage.put_file(os.path.join(place.folder, REPORT_NAME), f"{place.out}/{REPORT_NAME}")


def read_report(place: Place) -> dict[str, Any]:
    """OUT/report.json of a finished run."""
    with open(os.path.join(place.folder, REPORT_NAME), encoding="utf-8") as file:
        return json.load(file)


def save_tokenizer(place: Place, tokenizer: Tokenizer) -> None:
    """Into the scratch, where `give_tokenizer` finds it: takes seconds for a large vocabulary."""
    tokenizer.save(os.path.join(place.scratch, _SAVED_TOKENIZER))


def give_tokenizer(place: Place, split: str) -> None:
    """The saved files into the folder of a split, and to where it is sent."""
    folder, url = place.folder_of(split), place.url_of(split)
    os.makedirs(folder, exist_ok=True)
    for name in TOKENIZER_NAMES:
        with open(os.path.join(place.scratch, _SAVED_TOKENIZER, name), "rb") as file:
            storage.write_bytes(os.path.join(folder, name), file.read())
        if url is not None:
            storage.put_file(os.path.join(folder, name), f"{url}/{name}")


def finish_split(place: Place, split: str, shards: list[ShardEntry], info: DatasetInfo) -> None:
    """Write (and send) what stands beside the shards, dataset.json last."""
    folder, url = place.folder_of(split), place.url_of(split)
    for name in os.listdir(folder):
        if name.startswith(".shard-") and ".tmp-" in name:  # of a writer that was killed
            os.unlink(os.path.join(folder, name))
    if url is None and os.path.exists(os.path.join(place.scratch, _SAVED_TOKENIZER)):
        give_tokenizer(place, split)  # of converted shards it may be unknown
    contents = {
        MANIFEST_NAME: manifest_module.manifest_text(shards),
        INFO_NAME: manifest_module.info_text(info),
    }
    for name, content in contents.items():
        storage.write_bytes(os.path.join(folder, name), content.encode())
        if url is not None:
            storage.put_file(os.path.join(folder, name), f"{url}/{name}")


def discard(place: Place, existed: bool) -> None:
    """Leave nothing of a run that bad input ended."""
    shutil.rmtree(place.scratch, ignore_errors=True)
    if not existed and os.path.isdir(place.folder) and not os.listdir(place.folder):
        os.rmdir(place.folder)


def _remote_files(place: Place) -> list[tuple[str, str]]:
    """(name inside of `out`, URL) of everything in a remote `out`."""
    if not storage.exists(place.out):
        return []
    urls = storage.list_files(place.out)
    return [(url.removeprefix(place.out).lstrip("/"), url) for url in urls]


def _fetch_small_files(place: Place) -> None:
    wanted = (INFO_NAME, MANIFEST_NAME, REPORT_NAME)
    # what lies here may be of a run that was killed before it was sent
    for inner in ("", "train", "val"):
        for name in wanted:
            path = os.path.join(place.folder, inner, name)
            if os.path.exists(path):
                os.unlink(path)
    for name, url in _remote_files(place):
        # a store's names may hold `..`: nothing but these three folders is written to
        if os.path.basename(name) in wanted and os.path.dirname(name) in ("", "train", "val"):
            path = os.path.join(place.folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with storage.open_read(url) as file:
                storage.write_bytes(path, file.read())
