"""What changes an object store: small objects put, created once, copied, deleted, listed afresh.

    create   put where nothing is yet, decided by the store: If-None-Match: * (S3 and those that
             speak like it), ifGenerationMatch=0 (Google). An answer that was lost on the way does
             not matter: what is there is read, and the same bytes count as created.
    folder   what lies directly in a folder; files: everything below it

Listings are asked for afresh and may still be late on some stores: whoever decides something asks
for an object by its name. Requests, retries and errors are those of remote.py.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from openlm_lite import remote
from openlm_lite.errors import InputError
from openlm_lite.retries import ExistsError, MissingError, RefusedError

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

SCHEMES = ("s3", "gs")
_CLOCK = ".clock-"  # in front of the names of objects that are written to read the store's clock
_REQUESTS = 8  # at a time


def check_url(url: str) -> str:
    """`url` without a slash at its end. Raises InputError unless it is a folder in a bucket."""
    scheme = remote.scheme_of(url)
    if scheme not in SCHEMES:
        raise InputError(
            f"{url}: checkpoints cannot be kept at such a URL; allowed are local folders, "
            "s3://BUCKET/FOLDER and gs://BUCKET/FOLDER"
        )
    bucket, _, path = url.split("://", 1)[1].strip("/").partition("/")
    if not bucket or not path or "//" in path or any(c in url for c in "*?[]#"):
        raise InputError(
            f"{url}: is no folder in a bucket; give {scheme}://BUCKET/FOLDER, without any of "
            "* ? [ ] #"
        )
    return f"{scheme}://{bucket}/{path}"


def read(url: str) -> bytes | None:
    """The object at `url`; None where there is none."""
    try:
        return remote.read_bytes(url)
    except MissingError:
        return None


def exists(url: str) -> bool:
    """Whether there is an object of this very name."""
    try:
        return remote.perform(url, "looking at", "info", url)["type"] == "file"
    except MissingError:
        return False


def put(url: str, data: bytes) -> None:
    """Write the object, over one that may be there."""
    remote.perform(url, "writing", "pipe_file", url, data)


def create_strictly(url: str, data: bytes) -> None:
    """Write the object where there is none yet. Raises ExistsError."""
    remote.perform(url, "writing", "pipe_file", url, data, mode="create")


def create(url: str, data: bytes) -> None:
    """As `create_strictly`, but one that is there with the same bytes counts as written."""
    try:
        create_strictly(url, data)
    except ExistsError:
        if read(url) != data:
            raise


def copy(source: str, target: str) -> None:
    """Copy an object within the store, over one that may be there."""
    remote.perform(target, "writing", "cp_file", source, target)


def delete(urls: Iterable[str]) -> None:
    """Delete objects; those that are not there are fine."""

    def one(url: str) -> None:
        with suppress(MissingError):
            remote.perform(url, "deleting", "rm_file", url)

    at_once(one, urls)


def folder(url: str) -> tuple[list[str], list[str]]:
    """The names of the folders and of the objects directly in the folder `url`."""
    try:
        found = remote.perform(url, "listing", "ls", url, detail=True)
    except MissingError:
        return [], []
    names: dict[bool, list[str]] = {True: [], False: []}
    for info in found:
        name = str(info["name"]).rstrip("/").rsplit("/", 1)[-1]
        names[info["type"] == "directory"].append(name)
    return sorted(names[True]), sorted(names[False])


def files(url: str) -> dict[str, int]:
    """URL -> bytes of every object below the folder `url`."""
    try:
        found = remote.perform(url, "listing", "find", url, detail=True)
    except MissingError:
        return {}
    scheme = remote.scheme_of(url)
    urls = {f"{scheme}://{name.lstrip('/')}": info for name, info in found.items()}
    return {
        name: int(info["size"])
        for name, info in sorted(urls.items())
        if info["type"] == "file" and name.startswith(f"{url}/")
    }


def written_at(url: str) -> float:
    """When the object was written, in seconds of the store's clock. Raises MissingError."""
    info = remote.perform(url, "looking at", "info", url)
    when: Any = info.get("LastModified") or info.get("mtime")
    return when.timestamp()


def clock(url: str) -> float:
    """The time by the store's clock: that of an object written for it in the folder `url`.

    The clocks of two machines differ, by hours where one is set wrongly; the store has one.
    """
    probe = f"{url}/{_CLOCK}{uuid.uuid4().hex}"
    put(probe, b"")
    try:
        return written_at(probe)
    finally:
        delete([probe])


def remove_clocks(url: str) -> None:
    """What a kill in `clock` left in the folder `url`."""
    delete(f"{url}/{name}" for name in folder(url)[1] if name.startswith(_CLOCK))


def abort_uploads(url: str) -> int:
    """End the unfinished uploads of big objects below the folder `url`; returns how many.

    They are invisible, and paid for. Google drops its own after a week, and does not list them.
    """
    if remote.scheme_of(url) != "s3":
        return 0
    bucket, _, key = url.split("://", 1)[1].partition("/")
    marks: dict[str, str] = {}
    n_ended = 0
    try:
        while True:
            page = remote.perform(
                url, "listing", "call_s3", "list_multipart_uploads",
                Bucket=bucket, Prefix=f"{key}/", **marks,
            )  # fmt: skip
            for upload in page.get("Uploads", []):
                with suppress(MissingError):  # ended since
                    remote.perform(
                        url, "deleting", "call_s3", "abort_multipart_upload",
                        Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"],
                    )  # fmt: skip
                    n_ended += 1
            if not page.get("IsTruncated"):
                return n_ended
            marks = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }
    except RefusedError as error:  # a right of its own, which many do not have
        log.warning("unfinished uploads below %s are not removed: %s", url, error)
        return n_ended


def at_once(action: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results of `action` for the items, several at a time; the first failure is raised."""
    with ThreadPoolExecutor(max_workers=_REQUESTS) as pool:
        return list(pool.map(action, items))
