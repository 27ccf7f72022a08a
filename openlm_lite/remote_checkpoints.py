"""Checkpoints at a URL (s3://, gs://), where nothing can be renamed and no folder exists.

    all      write the share into a local .tmp-step_00001000/, as for a local checkpoint
    all      upload it to URL/step_00001000/, each file with its checksum and its size compared
    rank 0   when all have reported: URL/step_00001000/COMMIT.json, created by one request that the
             store refuses where one is there already          <- the commit: one atomic step
    rank 0   URL/newest.txt: a hint for listings that are late

    URL/step_00001000/{__0_0.distcp, …, COMMIT.json}    a checkpoint
    URL/step_00001000/{…, bad-COMMIT.json}              put aside: nothing of it is lost
    URL/step_00001000/{…}                               a save that was cut off: the next start
                                                        removes it
    URL/lock/00000001.json, …                           who runs (remote_lock.py)

A listing only proposes names; whether a step is a checkpoint is asked for by the name of its
COMMIT.json. To be read, a checkpoint is copied into a local folder, every file compared with the
size and crc32 of COMMIT.json.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from openlm_lite import object_store, remote, retries, storage
from openlm_lite.commit import (
    COMMIT_NAME,
    TEMPORARY,
    Commit,
    DamagedError,
    check_contents,
    check_sizes,
    crc32_of_file,
    parse_commit,
    read_commit,
    step_folder_name,
    step_of_folder,
)
from openlm_lite.errors import InputError, RunError
from openlm_lite.retries import DAMAGE_TRIES, ExistsError, MissingError, RefusedError, RemoteError

log = logging.getLogger(__name__)

BAD_COMMIT_NAME = "bad-COMMIT.json"
_NEWEST_NAME = "newest.txt"


def step_url(root: str, step: int) -> str:
    return f"{root.rstrip('/')}/{step_folder_name(step)}"


# --- looking -------------------------------------------------------------------------------------


def committed_steps(root: str) -> list[int]:
    """The steps that have a COMMIT.json below `root`, newest first."""
    names, _ = object_store.folder(root)
    hint = object_store.read(f"{root}/{_NEWEST_NAME}")
    if hint is not None:
        names.append(hint.decode(errors="replace").strip())
    proposed = {step for name in names if (step := step_of_folder(name)) is not None}
    steps = sorted(proposed, reverse=True)
    there = object_store.at_once(is_committed, [step_url(root, step) for step in steps])
    return [step for step, is_there in zip(steps, there, strict=True) if is_there]


def is_committed(url: str) -> bool:
    """Whether the step folder `url` has a COMMIT.json, asked for by its name."""
    return object_store.exists(f"{url}/{COMMIT_NAME}")


def read_commit_text(url: str) -> bytes:
    """COMMIT.json of the step folder `url`. Raises DamagedError where it is not there."""
    try:
        text = object_store.read(f"{url}/{COMMIT_NAME}")
    except retries.DamagedError as problem:
        raise DamagedError(f"{COMMIT_NAME}: {problem}") from None
    if text is None:
        raise DamagedError(f"{COMMIT_NAME} is missing: saving was not completed")
    return text


def commit_at(url: str) -> Commit:
    """COMMIT.json of the step folder `url`, checked; without a look at the other files.

    Raises DamagedError where it is absent or changed, InputError where a newer version wrote it.
    """
    return _checked_text(url)[0]


def _checked_text(url: str) -> tuple[Commit, bytes]:
    """A bit may also have flipped on the way: only what arrives so again and again is damaged."""
    for number in range(1, DAMAGE_TRIES + 1):
        text = read_commit_text(url)
        try:
            return parse_commit(text, url), text
        except DamagedError as problem:
            if number == DAMAGE_TRIES:
                raise
            log.warning("%s: %s (attempt %d)", url, problem, number)
    raise AssertionError("unreachable")


def check_stored_sizes(commit: Commit) -> None:
    """Every file of the step folder `commit.path` (a URL) is there with its size.

    Raises DamagedError naming the first that is not.
    """

    def size_of(name: str) -> int | None:
        try:
            return remote.size_of(f"{commit.path}/{name}")
        except MissingError:
            return None

    for name, found in zip(commit.files, object_store.at_once(size_of, commit.files), strict=True):
        if found is None:
            raise DamagedError(f"{name} is missing")
        if found != commit.files[name][0]:
            raise DamagedError(f"{name} has {found} bytes instead of {commit.files[name][0]}")


# --- writing -------------------------------------------------------------------------------------


def upload(folder: str, names: Iterable[str], url: str) -> None:
    """Copy these files of the local folder into the step folder `url`.

    Nothing becomes visible as a checkpoint by that. Raises RefusedError, RemoteError, DamagedError
    of retries.py (the store cut the file again and again).
    """

    def one(name: str) -> None:
        remote.put_file(os.path.join(folder, name), f"{url}/{name}")

    object_store.at_once(one, names)


def publish_commit(text: str, url: str) -> None:
    """Make the step folder `url` a checkpoint: its COMMIT.json, which must not be there yet.

    The same text there already is fine: the answer to an earlier attempt was lost. Raises RunError
    where there is another one or the store keeps something else, RefusedError, RemoteError.
    """
    place = f"{url}/{COMMIT_NAME}"
    try:
        object_store.create(place, text.encode())
    except ExistsError:
        raise RunError(
            f"{url}: was committed by somebody else in the meantime, and stays as it is; two runs "
            "must not share checkpoint.dir: stop one of them"
        ) from None
    try:
        kept = object_store.read(place)
    except retries.DamagedError:
        kept = None
    if kept != text.encode():
        object_store.delete([place])
        raise RunError(f"{place}: the store has not kept what was written; nothing is committed")
    root, name = url.rsplit("/", 1)
    try:
        object_store.put(f"{root}/{_NEWEST_NAME}", f"{name}\n".encode())
    except (RemoteError, RefusedError) as error:  # the checkpoint is there without it
        log.warning("%s/%s was not brought up to date: %s", root, _NEWEST_NAME, error)


# --- reading -------------------------------------------------------------------------------------


def fetch(url: str, folder: str, token: str | None = None) -> Commit:
    """The step folder `url` as the local folder `folder` (same name), each file verified.

    Any number of processes of a node may call it at once: one fetches, the others wait for it.
    What is in `folder` already is verified anew, unless a process with the same `token` (a random
    word that the ranks of one start share) did so.
    Raises DamagedError where the store holds something else than was saved, RunError where the
    local disk is full, RefusedError and RemoteError.
    """
    parent, name = os.path.split(folder)
    os.makedirs(parent, exist_ok=True)
    marker = os.path.join(parent, f".verified-{name}")
    with _locked(os.path.join(parent, f".lock-{name}")):
        commit, text = _checked_text(url)
        is_verified = token is not None and _text_of(marker) == token
        if not _is_here(folder, text, is_verified):
            part = os.path.join(parent, f"{TEMPORARY}{name}")
            for stale in (part, folder):
                shutil.rmtree(stale, ignore_errors=True)
            os.mkdir(part)
            try:
                _fetch_files(commit, part)
                _write(os.path.join(part, COMMIT_NAME), text)
                os.rename(part, folder)
            except BaseException as error:
                shutil.rmtree(part, ignore_errors=True)
                if storage.is_disk_full(error):
                    raise _full(commit, parent) from None
                raise
        _write(marker, (token or "").encode())
        return read_commit(folder)


def _is_here(folder: str, text: bytes, is_verified: bool) -> bool:
    """Whether the local folder is the checkpoint of this COMMIT.json, whole."""
    try:
        commit = read_commit(folder)
        with open(os.path.join(folder, COMMIT_NAME), "rb") as file:
            if file.read() != text:
                return False
        check_sizes(commit) if is_verified else check_contents(commit)
    except (DamagedError, InputError):
        return False
    return True


def _fetch_files(commit: Commit, folder: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < commit.n_bytes:
        raise _full(commit, folder)

    def one(name: str) -> None:
        size, crc32 = commit.files[name]
        url, path = f"{commit.path}/{name}", os.path.join(folder, name)
        for number in range(1, DAMAGE_TRIES + 1):
            try:
                remote.download(url, path, size, store_checks=False)
            except MissingError:
                raise DamagedError(f"{name} is missing") from None
            except retries.DamagedError as problem:
                raise DamagedError(f"{name}: {problem}") from None
            if crc32_of_file(path) == crc32:
                return
            log.warning("reading %s: attempt %d failed: its crc32 does not fit", url, number)
        raise DamagedError(f"{name} was changed: its crc32 does not fit ({DAMAGE_TRIES} times)")

    object_store.at_once(one, commit.files)


def _full(commit: Commit, folder: str) -> RunError:
    return RunError(
        f"{folder}: the disk is too full to fetch {commit.path} ({commit.n_bytes:,} bytes); free "
        "some space, or use another disk"
    )


def _write(path: str, data: bytes) -> None:
    """Without a sync: what a crash leaves of a copy is verified before it is used."""
    with open(path, "wb") as file:
        file.write(data)


def _text_of(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold the lock file; the kernel lets go of it when the process dies."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_checked_at(commit: Commit, name: str) -> bytes:
    """A small file of the step folder `commit.path` (a URL), compared with its crc32.

    Raises DamagedError where it is absent, or arrives with another checksum again and again.
    """
    url = f"{commit.path}/{name}"
    for _ in range(DAMAGE_TRIES):
        try:
            content = object_store.read(url)
        except retries.DamagedError as problem:
            raise DamagedError(f"{name}: {problem}") from None
        if content is None:
            raise DamagedError(f"{name} is missing")
        if zlib.crc32(content) == commit.files[name][1]:
            return content
        log.warning("reading %s: its crc32 does not fit", url)
    raise DamagedError(f"{name} was changed: its crc32 does not fit ({DAMAGE_TRIES} times)")


# --- putting aside and deleting ------------------------------------------------------------------


def put_aside(url: str, problem: object) -> None:
    """Make the step folder `url` no checkpoint any more; none of its objects is lost."""
    text = object_store.read(f"{url}/{COMMIT_NAME}")
    if text is not None:
        object_store.put(f"{url}/{BAD_COMMIT_NAME}", text)
        object_store.delete([f"{url}/{COMMIT_NAME}"])
    log.warning("%s is damaged (%s): its %s is now %s", url, problem, COMMIT_NAME, BAD_COMMIT_NAME)


def make_free(url: str) -> None:
    """Before a step is saved: what was put aside there goes to bad-step_…, leftovers go.

    Stores have no rename: the objects are copied, the one that marks them last, then deleted.
    Cut off at any time, it goes on when it is called again.
    """
    if object_store.exists(f"{url}/{BAD_COMMIT_NAME}"):
        target = _free_bad_url(url)
        mark = f"{url}/{BAD_COMMIT_NAME}"
        names = [name for name in object_store.files(url) if name != mark]
        for group in (names, [mark]):
            object_store.at_once(
                lambda name: object_store.copy(name, target + name.removeprefix(url)), group
            )
        object_store.delete([mark])  # from here on the rest is a leftover
        object_store.delete(names)
        log.warning("%s: what was put aside there is now in %s", url, target)
    else:
        object_store.delete(object_store.files(url))


def _free_bad_url(url: str) -> str:
    """The place for what was put aside at `url`: the first that is empty, or was begun."""
    root, name = url.rsplit("/", 1)
    target, number = f"{root}/bad-{name}", 1
    while object_store.exists(f"{target}/{BAD_COMMIT_NAME}"):
        number += 1
        target = f"{root}/bad-{name}.{number}"
    return target


def delete(url: str) -> None:
    """Delete the checkpoint `url`: its COMMIT.json first, so that no half of it looks whole."""
    names: set[str] = set()
    with suppress(DamagedError, InputError):
        names = {f"{url}/{name}" for name in commit_at(url).files}  # a listing may be late
    object_store.delete([f"{url}/{COMMIT_NAME}"])
    object_store.delete(names | object_store.files(url).keys())


def remove_leftovers(root: str) -> None:
    """What killed saves and deletions left; only for who holds the lock of `root`."""
    object_store.remove_clocks(root)
    for name in object_store.folder(root)[0]:
        url = f"{root}/{name}"
        if step_of_folder(name) is None or is_committed(url):
            continue
        if not object_store.exists(f"{url}/{BAD_COMMIT_NAME}"):
            object_store.delete(object_store.files(url))
            log.warning("%s: removed what a save that was cut off had left", url)
    if n_ended := object_store.abort_uploads(root):
        log.warning("%s: removed %d unfinished uploads", root, n_ended)
