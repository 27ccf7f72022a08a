"""Files of object stores and web servers, through fsspec; storage.py is the door to it.

    info, find, glob, get_file, cat_file, put_file of fsspec, one attempt each, ended by a time-out
    `retried` (retries.py) around each

The retries of the libraries below are switched off, and so are their caches: stacked retries make
a hang last minutes, and a cached listing hides what others wrote. (gcsfs and huggingface_hub have
some that cannot be: these stay within the time of one attempt.) Credentials come from where the
libraries look for them (~/.aws, AWS_*, gcloud, `hf auth login`, ~/.netrc), never from a URL, so
that no message, log or config can hold one.
"""

from __future__ import annotations

import base64
import io
import os
import tempfile
import threading
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from openlm_lite import retries
from openlm_lite.errors import InputError
from openlm_lite.redact import refuse_credentials
from openlm_lite.retries import ChangedError, MissingError, ShortError, retried

# scheme -> (the package that fsspec needs for it, the extra of this project that installs it)
SCHEMES = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "hf": ("huggingface_hub", "hf"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}
# A file up to this size is read whole: a store vouches for whole objects only, not for ranges.
_WHOLE_BYTES = 32 << 20
_RANGE_BYTES = 8 << 20
_UPLOAD_PARTS = 4  # of 50 MiB, of one big file, on the way (and in memory) at a time
# (process, scheme, store_checks, retry) -> filesystem
_filesystems: dict[tuple[int, str, bool, retries.Retry], Any] = {}


# --- what others call ----------------------------------------------------------------------------


def size_of(url: str) -> int:
    """Bytes of the file at `url`. Raises MissingError, InputError, RemoteError."""
    info = _info(url)
    if info["type"] != "file":
        raise MissingError(f"{url}: a folder, not a file; name a file in it")
    if info.get("size") is None:
        raise InputError(f"{url}: the server does not tell its size; copy the file to a local disk")
    return int(info["size"])


def exists(url: str) -> bool:
    """Whether a file or a folder is there. Raises if that cannot be found out."""
    try:
        _info(url)
    except MissingError:
        return False
    return True


def list_files(url: str) -> list[str]:
    """URLs of the files that `url` names, sorted: a file, a folder (walked) or a glob.

    Hidden files and marks such as `_SUCCESS` inside a folder are left out; a web server has no
    listing, so that there `url` is one file. Raises MissingError, InputError, RemoteError.
    """
    scheme = scheme_of(url)
    if scheme in ("http", "https") and ("*" in url or url.endswith("/")):
        raise InputError(f"{url}: a web server has no list of its files; name each file")
    is_glob = any(c in url for c in "*?[")
    try:
        if _info(url)["type"] == "file":
            return [url]
        found = _operate(url, "find", url.rstrip("/"), detail=True)
        root = _stripped(url).rstrip("/")
    except MissingError:
        if not is_glob:
            raise
        found = _operate(url, "glob", url, detail=True)
        root = ""
    names = sorted(name for name, info in found.items() if info["type"] == "file")
    if root:
        names = [name for name in names if not _is_hidden(name[len(root) :])]
    if not names:
        raise MissingError(f"{url}: no file is there; check the spelling, and list the folder")
    return [f"{scheme}://{name.lstrip('/')}" for name in names if not name.endswith("/")]


def read_bytes(url: str) -> bytes:
    """The file at `url`, whole. Raises MissingError, InputError, RemoteError, DamagedError."""
    with tempfile.TemporaryDirectory(prefix="openlm_lite-") as folder:
        local = os.path.join(folder, "file")
        download(url, local, _info(url).get("size"))
        with open(local, "rb") as file:
            return file.read()


def open_read(url: str) -> BinaryIO:
    """The file at `url` for reading and seeking, a few MiB in memory at a time.

    Small files are fetched whole, and checked by the store's own checksum where it keeps one.
    Bigger ones are read in ranges, for which stores have no checksum: there TLS guards the way.
    """
    size = size_of(url)
    if size <= _WHOLE_BYTES:
        return io.BytesIO(read_bytes(url))
    return io.BufferedReader(_RangeReader(url, size), _RANGE_BYTES)


def download(url: str, local: str, n_bytes: int | None, *, store_checks: bool = True) -> None:
    """Write the object at `url` to the file `local` in one piece; `n_bytes` is its length.

    `store_checks`: the store's own checksum is asked for and checked where the store keeps one;
    whoever has a checksum of his own says False. A failure leaves a part of the file.
    Raises MissingError, InputError, RemoteError, DamagedError; OSError of the local disk as it is.
    """
    scheme = scheme_of(url)
    fs = _filesystem(scheme, store_checks)
    seconds = (
        retries.RETRY.attempt_seconds + (n_bytes or 0) / retries.RETRY.slowest_bytes_per_second
    )

    def attempt() -> None:
        _call(fs, "get_file", url, local, seconds=seconds)
        found = os.path.getsize(local)
        if n_bytes is not None and found != n_bytes:
            raise ShortError(f"{found} of {n_bytes} bytes arrived")
        if store_checks and scheme == "gs":
            _check_crc32c(fs, url, local)

    retried(url, "reading", attempt)


def put_file(local: str, url: str) -> None:
    """Copy the local file to `url`, where it appears whole or not at all.

    The checksum goes along with the bytes, and the store refuses what does not fit (S3 by crc32,
    Google by md5); the length that the store has is compared afterwards.
    Raises RefusedError, RemoteError, DamagedError; OSError of the local disk as it is.
    """
    scheme = scheme_of(url)
    if scheme in ("http", "https"):
        raise InputError(
            f"{url}: a web server cannot be written to; allowed are s3://, gs://, hf://"
        )
    size = os.path.getsize(local)
    fs = _filesystem(scheme)
    seconds = retries.RETRY.attempt_seconds + size / retries.RETRY.slowest_bytes_per_second
    options = {"s3": {"max_concurrency": _UPLOAD_PARTS}, "gs": {"consistency": "md5"}}

    def attempt() -> None:
        _call(fs, "put_file", local, url, seconds=seconds, **options.get(scheme, {}))
        fs.invalidate_cache()
        try:
            found = _call(fs, "info", url, seconds=retries.RETRY.attempt_seconds).get("size")
        except FileNotFoundError:
            found = "nothing"
        if found != size:
            raise ShortError(f"{size} bytes were written, but the store has {found}")

    retried(url, "writing", attempt)


def perform(url: str, doing: str, method: str, *args: Any, **options: Any) -> Any:
    """The result of fsspec's `method` for the store of `url`, small and repeatable, with retries.

    `doing` is for the messages: "writing". No cached listing is looked at.
    Raises MissingError, ExistsError, RefusedError, RemoteError.
    """
    fs = _filesystem(scheme_of(url))

    def attempt() -> Any:
        fs.invalidate_cache()  # what others wrote since counts
        return _call(fs, method, *args, seconds=retries.RETRY.attempt_seconds, **options)

    return retried(url, doing, attempt)


def scheme_of(url: str) -> str:
    """The scheme, in small letters. Raises InputError for a URL with credentials in it."""
    refuse_credentials(url)
    return urlsplit(url).scheme.lower()


# --- one operation -------------------------------------------------------------------------------


def _info(url: str) -> dict[str, Any]:
    return _operate(url, "info", url)


def _operate(url: str, method: str, *args: Any, **options: Any) -> Any:
    """One call that only looks, with retries."""
    return perform(url, "looking at", method, *args, **options)


def _stripped(url: str) -> str:
    return _filesystem(scheme_of(url))._strip_protocol(url)


def _is_hidden(name: str) -> bool:
    *folders, last = name.strip("/").split("/")
    return last.startswith((".", "_")) or any(folder.startswith(".") for folder in folders)


def _check_crc32c(fs: Any, url: str, local: str) -> None:
    """Raises ChangedError unless the file has the crc32c that Google has for the object.

    gcsfs itself compares md5 only, which Google does not keep for objects composed of several.
    """
    import google_crc32c  # gcsfs needs it

    crc = google_crc32c.Checksum()
    with open(local, "rb") as file:
        while chunk := file.read(_RANGE_BYTES):
            crc.update(chunk)
    found = base64.b64encode(crc.digest()).decode()
    stored = _call(fs, "info", url, seconds=retries.RETRY.attempt_seconds).get("crc32c")
    if found != stored:
        raise ChangedError(
            f"the checksum crc32c of what arrived is {found}, the store has {stored}"
        )


def _filesystem(scheme: str, store_checks: bool = True) -> Any:
    """fsspec's filesystem for `scheme`, one for all threads: it keeps connections open."""
    key = (os.getpid(), scheme, store_checks, retries.RETRY)
    if key in _filesystems:
        return _filesystems[key]
    package, extra = SCHEMES[scheme]
    if scheme == "gs":
        # gcsfs' way for zonal buckets asks for the type of every bucket first, by gRPC outside of
        # our time-outs, and warns at each call of who may not ask
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec

        # fsspec's own cache has one for each thread that ever was
        fs = fsspec.filesystem(scheme, skip_instance_cache=True, **_options(scheme, store_checks))
    except ImportError:
        raise InputError(
            f'{scheme}:// needs {package}: pip install "openlm-lite[{extra}]"'
        ) from None
    if scheme == "s3":
        fs.retries = 1  # attempts, on top of those of botocore
    return _filesystems.setdefault(key, fs)


def _options(scheme: str, store_checks: bool) -> dict[str, Any]:
    """Time-outs that end a silence, no caches, no further retries, bytes as they are stored."""
    idle = retries.RETRY.idle_seconds
    if scheme == "s3":
        return {
            "use_listings_cache": False,
            # whole objects in one request each: only these have a checksum
            "max_concurrency": 1,
            "config_kwargs": {
                "connect_timeout": idle,
                "read_timeout": idle,
                "retries": {"total_max_attempts": 1},
                "response_checksum_validation": (
                    "when_supported" if store_checks else "when_required"
                ),
            },
        }
    if scheme == "hf":
        return {}
    import aiohttp

    silence = aiohttp.ClientTimeout(total=None, sock_connect=idle, sock_read=idle)
    if scheme == "gs":
        return {"use_listings_cache": False, "requests_timeout": silence}
    return {
        "client_kwargs": {
            "timeout": silence,
            "trust_env": True,  # proxies, ~/.netrc
            # bytes as they are stored, or sizes and checksums would not fit
            "auto_decompress": False,
            "headers": {"Accept-Encoding": "identity"},
        }
    }


def _call(fs: Any, method: str, *args: Any, seconds: float, **options: Any) -> Any:
    """One attempt, which ends after `seconds` whatever the server does."""
    call = getattr(fs, method)
    if getattr(fs, "async_impl", False):
        return call(*args, timeout=seconds, **options)  # fsspec cancels the request
    # Nothing can end a blocked thread: it is left behind, and what it still does is not looked at.
    outcome: list[Any] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append((call(*args, **options), None))
        except BaseException as e:
            outcome.append((None, e))
        done.set()

    threading.Thread(target=run, daemon=True).start()
    if not done.wait(seconds):
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


class _RangeReader(io.RawIOBase):
    """A remote file as a stream, each read a request for a range."""

    def __init__(self, url: str, size: int) -> None:
        self.name = url
        self._size, self._position = size, 0
        self._fs = _filesystem(scheme_of(url))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = (0, self._position, self._size)[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:  # the inherited one asks for 8 KiB at a time
        pieces = []
        while self._position < self._size:
            piece = bytearray(min(_RANGE_BYTES, self._size - self._position))
            self.readinto(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        start = self._position
        stop = min(start + len(buffer), self._size)
        if start >= stop:
            return 0
        seconds = (
            retries.RETRY.attempt_seconds + (stop - start) / retries.RETRY.slowest_bytes_per_second
        )

        def attempt() -> bytes:
            data = _call(self._fs, "cat_file", self.name, start=start, end=stop, seconds=seconds)
            if len(data) == self._size != stop - start:
                raise InputError(
                    f"{self.name}: the server gives whole files only, and {self._size} bytes are "
                    "too many to read so; copy the file to a local disk"
                )
            if len(data) != stop - start:
                raise ShortError(f"{len(data)} of {stop - start} bytes arrived")
            return data

        data = retried(self.name, f"reading bytes {start} to {stop} of", attempt)
        buffer[: len(data)] = data
        self._position = stop
        return len(data)
