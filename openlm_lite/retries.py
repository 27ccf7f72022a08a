"""Again, or not: which errors of a store pass, how long to wait, and what to say of the others.

attempt --> done
        --> transient (5xx, SlowDown, reset, time-out, cut short)  logged; wait; again, for up
        |                                                          to RETRY.total_seconds
        --> hopeless (not there, not allowed, no credentials)      one error, at once
"""

from __future__ import annotations

import errno
import itertools
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from openlm_lite.errors import InputError, RunError
from openlm_lite.redact import redacted

Result = TypeVar("Result")

logger = logging.getLogger("openlm_lite")

# What arrives whole with a wrong length or checksum this often is stored that way.
DAMAGE_TRIES = 3


@dataclass(frozen=True)
class Retry:
    """How long an operation may take, in seconds."""

    total_seconds: float = 900.0  # over all attempts: an outage of ten minutes is survived
    first_wait: float = 0.5  # doubled with each attempt …
    longest_wait: float = 30.0  # … up to this; each is shortened at random by up to a half
    idle_seconds: float = 30.0  # without a byte: the attempt is given up
    attempt_seconds: float = 60.0  # for an attempt in all, plus the time its bytes take:
    slowest_bytes_per_second: float = 1 << 20
    alarm_seconds: float = 30.0  # of failures in a row: said once, louder than each of them


RETRY = Retry()


class RemoteError(RunError):
    """A store could not be reached, or did not answer properly, for RETRY.total_seconds."""


class MissingError(InputError, FileNotFoundError):
    """There is no such file in the store."""


class ExistsError(InputError, FileExistsError):
    """There is such a file in the store already, and it was not to be overwritten."""


class RefusedError(InputError):
    """The store answers, but not to this: no credentials, no permission, a wrong setting."""


class DamagedError(InputError):
    """What the store holds is not what it should be, by its length or a checksum."""


class ShortError(OSError):
    """Fewer or more bytes than announced."""


class ChangedError(OSError):
    """Bytes that have not the checksum that the store has of them."""


def retried(url: str, doing: str, attempt: Callable[[], Result]) -> Result:
    """The result of `attempt`, tried until it succeeds, is hopeless or the time is up."""
    retry = RETRY
    started = time.monotonic()
    mismatches = 0
    alarmed = False
    for number in itertools.count(1):
        try:
            return attempt()
        except Exception as e:
            error = _hopeless(url, e)
            if error is e:
                raise
            if error is not None:
                raise error from None
            told = _told(e)
            if any(type(x).__name__ in _MISMATCHES for x in _chain(e)):
                mismatches += 1
                if mismatches == DAMAGE_TRIES:
                    raise DamagedError(
                        f"{url}: damaged: {told} ({mismatches} times); restore it from a good copy"
                    ) from None
            longest = min(retry.longest_wait, retry.first_wait * 2 ** min(number - 1, 30))
            wait = longest * random.uniform(0.5, 1.0)  # so that a thousand ranks spread out
            spent = time.monotonic() - started
            if spent > retry.alarm_seconds and not alarmed:
                alarmed = True
                logger.error(
                    "%s %s: has failed for %.0f s, %d attempts, the last with %s; it is tried for "
                    "%.0f s in all",
                    doing, url, spent, number, told, retry.total_seconds,
                )  # fmt: skip
            if spent >= retry.total_seconds:
                raise RemoteError(
                    f"{url}: given up after {number} attempts in {spent:.0f} s, the last failed "
                    f"with {told}; run the same command again once the store answers"
                ) from None
            wait = min(wait, retry.total_seconds - spent)  # the last attempt is when the time is up
            logger.warning(
                "%s %s: attempt %d failed (%s); again in %.1f s", doing, url, number, told, wait
            )
            time.sleep(wait)
    raise AssertionError("unreachable")


def _hopeless(url: str, error: Exception) -> Exception | None:
    """What to raise at once for `error`: itself where it is no fault of the store; None: retry."""
    if isinstance(error, InputError | RunError) or _is_local(url, error):
        return error
    chain = list(_chain(error))
    scheme = url.split("://")[0].lower()
    status = next((s for s in map(_status, chain) if s is not None), None)
    words = {type(e).__name__ for e in chain} | {_code(e) for e in chain}
    if words & (_TRANSIENT_WORDS | _CUT_OFF):
        return None
    if words & _NO_CREDENTIALS:
        return RefusedError(f"{url}: {_told(error)}; {_CREDENTIALS[scheme]}")
    if status == 412 or (status is None and isinstance(error, FileExistsError)):
        return ExistsError(f"{url}: is there already, and is not overwritten")
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError)):
        bucket = "bucket" if "NoSuchBucket" in words else "file or folder"
        return MissingError(f"{url}: no such {bucket}; check the spelling, and list the folder")
    refused = isinstance(error, PermissionError) or str(error).startswith(_GCSFS_403)
    if status in (401, 403) or (status is None and refused):
        return RefusedError(
            f"{url}: not allowed ({_told(error)}), or not there; {_CREDENTIALS[scheme]}"
        )
    if status == 501:
        return RefusedError(f"{url}: this store cannot do that ({_told(error)}); use another store")
    if status in (408, 425, 429) or (status is not None and status >= 500):
        return None
    if status is not None:
        hint = (
            "the bucket may lie in another region: set AWS_DEFAULT_REGION; " if status < 400 else ""
        )
        return RefusedError(f"{url}: refused ({_told(error)}); {hint}check the URL")
    if words & _MISTAKES:
        return RefusedError(f"{url}: {_told(error)}; check the URL and the settings of {scheme}://")
    modules = {type(e).__module__.split(".")[0] for e in chain}
    if isinstance(error, OSError | EOFError) or modules & _LIBRARIES:
        return None
    return error


def _is_local(url: str, error: Exception) -> bool:
    """Whether the local disk failed: such errors have a number, and name a local file if any."""
    if not isinstance(error, OSError) or error.errno is None:
        return False
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
    return error.errno in full or (error.filename is not None and str(error.filename) not in url)


_GCSFS_403 = "Forbidden: "  # how gcsfs begins the plain OSError that it makes of a status of 403
_MISMATCHES = {"FlexibleChecksumError", "ShortError", "ChangedError"}
_TRANSIENT_WORDS = {
    "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted",
    "FlexibleChecksumError", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
    "ConditionalRequestConflict",
}  # fmt: skip
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "LocalTokenNotFoundError",
    "TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError",
    "DefaultCredentialsError",
    "ExpiredToken", "ExpiredTokenException", "InvalidToken", "AuthorizationHeaderMalformed",
}  # fmt: skip
_MISTAKES = {
    "ParamValidationError", "NoRegionError", "InvalidURL", "NonHttpUrlClientError",
    "HFValidationError", "HfUriError", "OfflineModeIsEnabled", "InvalidRegionError",
    "ClientConnectorCertificateError", "SSLCertVerificationError",
}  # fmt: skip
# The true reason, wherever it stands in the chain: fsspec's http turns every failure to look into
# FileNotFoundError, and aiohttp an answer that was cut off into a status of 400.
_CUT_OFF = {
    "ClientConnectorError", "ClientConnectorDNSError", "ClientOSError", "ClientPayloadError",
    "ServerDisconnectedError", "ServerTimeoutError", "SocketTimeoutError", "ConnectionTimeoutError",
    "ConnectionResetError", "ConnectionRefusedError", "TimeoutError", "ClientConnectionResetError",
}  # fmt: skip
_LIBRARIES = {
    "aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "httpcore", "httpcore2", "httpx",
    "httpx2", "huggingface_hub", "requests", "ssl", "urllib3",
}  # fmt: skip
_CREDENTIALS = {
    "s3": "give credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID …, ~/.aws) that may do this; to "
    "read a public bucket set FSSPEC_S3_ANON=true",
    "gs": "give credentials (`gcloud auth application-default login`) that may do this",
    "hf": "log in (`hf auth login`), and accept the terms of the repository where it has some",
    "http": "give the login of this server in ~/.netrc",
    "https": "give the login of this server in ~/.netrc",
}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and what led to it, the last one first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of any of the libraries carries; None without one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        found = getattr(response, "status_code", None)
    else:
        # gcsfs says code; aiohttp's parser does too, of answers that were cut off on the way
        name = "code" if type(error).__module__.startswith("gcsfs") else "status"
        found = getattr(error, name, None)
    found = int(found) if isinstance(found, int | str) and str(found).isdigit() else None
    return found if found is not None and found >= 300 else None


def _code(error: BaseException) -> str:
    """S3's word for an error, such as NoSuchBucket."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return ""
    return str(response.get("Error", {}).get("Code", ""))


def _told(error: BaseException) -> str:
    """One line of what the libraries say of an error, without secrets."""
    words = " ".join(str(error).split()) or repr(error.__cause__ or error)
    words = re.sub(r"^\[Errno \d+\] ", "", words)
    code = next((c for c in map(_code, _chain(error)) if c), "") or type(error).__name__
    return redacted(f"{code}: {words}")[:300]
