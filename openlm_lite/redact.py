"""Credentials: recognised by name or form, refused where they come in, masked where text goes out.

    config, command line --> refuse_credentials    one error: use the environment instead
    run -----------------> files that are read back (config.yaml, COMMIT.json, dataset.json, …):
                           nothing to mask, because nothing was let in
        -----------------> log, errors, tracebacks, telemetry --> redacted, redacted_tree

A config is never masked on its way to the disk: what is read back must be what was meant. Messages
are, because the libraries below write URLs, headers and settings into theirs.

Names are taken apart into words (`HF_TOKEN`, `apiKey`, `X-Amz-Signature`), so `tokenizer`,
`max_tokens`, `eos_token` and `num_key_value_heads` are no secrets.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TextIO, cast
from urllib.parse import quote, unquote

from openlm_lite.errors import InputError

MASK = "***"
# Shorter values of the environment are words that occur by chance ("testing").
_LEAST_VALUE = 8

# --- what is secret ------------------------------------------------------------------------------

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET_WORDS = """
    secret secrets password passwords passwd passphrase pwd credential credentials authorization
    cookie signature sig sas apikey accesskey secretkey privatekey authtoken accesstoken pat
"""
_GLUED = ("password", "passwd", "secret")  # pgpassword
# A last `token` is an access token, unless the word before says that it is a piece of text …
_TEXT_TOKENS = """
    eos bos eot pad unk mask sep cls begin end start stop special added first last next previous
    max min per a the this each every of image text
"""
# … and a last `key` is one to a lock, unless it is one of these; many keys are where they say so.
_OTHER_KEYS = "sort primary foreign public cache dict query unknown"
_KEYS = "api access secret private account encryption signing ssh"
# Last words of what says where a secret is, or how it looks, and is none.
_ABOUT = "file path dir folder url uri type name version algorithm expires length size"


@lru_cache(4096)
def is_secret_name(name: str) -> bool:
    """Whether what `name` (of a key, an option, a variable) stands for is to be kept secret."""
    words = [word.lower() for word in _WORD.findall(name)]
    # PWD is the current folder, and a pat (personal access token) has somebody's name before it
    if not words or words[-1] in _ABOUT.split() or words in (["pwd"], ["pat"]):
        return False
    secret = _SECRET_WORDS.split()
    if any(word in secret or word.endswith(_GLUED) for word in words):
        return True
    is_id = words[-1] == "id" and len(words) > 1  # access_key_id, but not token_id
    *before, last = words[:-1] if is_id else words
    adjective = before[-1] if before else ""
    if last == "token":
        return not is_id and adjective not in _TEXT_TOKENS.split()
    if last == "key":
        return adjective not in _OTHER_KEYS.split()
    return last == "keys" and adjective in _KEYS.split()


def secret_values(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Secret text -> the environment variable that holds it; of many lines, each of them."""
    found: dict[str, str] = {}
    for name, value in (os.environ if environment is None else environment).items():
        if not is_secret_name(name) or _is_path(value):
            continue
        for line in map(str.strip, value.splitlines()):
            if len(line) >= _LEAST_VALUE and not line.startswith("-----"):
                found[line] = name
    return found


def _is_path(value: str) -> bool:
    """Whether `value` says where a secret lies (GOOGLE_APPLICATION_CREDENTIALS)."""
    return value.startswith(("/", "~/", "./")) and os.path.exists(os.path.expanduser(value))


def _spellings(value: str) -> set[str]:
    """`value` as it is, in a URL, in JSON and in a Python literal."""
    inner = {value, quote(value, safe=""), quote(value), json.dumps(value)[1:-1], repr(value)[1:-1]}
    return {text for text in inner if len(text) >= _LEAST_VALUE}


# --- in a text -----------------------------------------------------------------------------------

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>]+")
# user:password@ (the password may hold slashes, as AWS's do), or user@ before the first slash
_USERINFO = re.compile(
    r"(?<=//)(?:[^\s'\"<>/@:]*:(?!\d{1,5}[/?#])[^\s'\"<>@]*@(?:[^\s'\"<>/@]*@)*|[^\s'\"<>/?#]*@)"
)
_VALUE = (
    r"""\\"[^"\\]*\\"|\\'[^'\\]*\\'"""  # in quotes inside of quotes
    r"""|b?"(?:\\.|[^"\\])*"|b?'(?:\\.|[^'\\])*'|[^\s&'"<>]+"""
)
# name=value, "name": value, name: value; what replaces it looks at the name
_PAIR = re.compile(
    rf"(?P<name>[A-Za-z][\w.\-%]*)(?P<between>\\?[\"']?\]?\s*[=:]\s*)(?P<value>{_VALUE})"
)
_HEADER = re.compile(
    r"(?i)((?:proxy-)?authorization|(?:set-)?cookie)(\\?['\"]?\s*[:=](?!\s*\*)\s*)"
    r"(b?\\?\"[^\"\n]*\"?|b?\\?'[^'\n]*'?|[^\n]*)"
)
_HARMLESS = re.compile(r"(?:None|null|True|False|true|false|\d{1,7}|[-+]?\d+\.\d+|\*+|\.\.\.|…)\Z")
# Forms that name no key: Hugging Face, GitHub, AWS's and Google's keys, bearer and JSON web tokens.
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w\-]{35}|\bya29\.[\w\-.]{20,}"
    r"|\beyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]*|(?<=[Bb]earer )[\w\-.~+/=]{16,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)


def without_secret_values(text: str) -> str:
    """`text` without the values of secret environment variables, and otherwise as it is."""
    spellings = {s for value in secret_values() for s in _spellings(value)}
    for spelling in sorted(spellings, key=len, reverse=True):  # one may be part of another
        text = text.replace(spelling, MASK)
    return text


def redacted(text: str) -> str:
    """`text` for people: without secret values of the environment and what looks like a credential.

    Masked are user:password@ in URLs, values behind names as `is_secret_name` knows them (in URLs,
    JSON, `a=b` and `a: b`), the headers Authorization and Cookie, and well-known forms of tokens.
    """
    text = without_secret_values(text)
    text = _USERINFO.sub(f"{MASK}@", text)
    text = _FORMS.sub(MASK, text)
    text = _HEADER.sub(rf"\1\2{MASK}", text)
    return _PAIR.sub(_masked_pair, text)


def _masked_pair(match: re.Match[str]) -> str:
    name, between, value = match["name"], match["between"], match["value"]
    tail = "" if value[-1] in "'\"" else value[len(value.rstrip(",;.)]}")) :]
    body = value[: len(value) - len(tail)]
    bare = body.removeprefix("b" if body[:2] in ("b'", 'b"') else "").strip("\\\"'")
    # "key: x" and "token: x" in a sentence are no secrets; in JSON and with `=` they are
    in_words = between.strip() == ":" and name.lower() in ("key", "token", "sig", "sas")
    if not bare or _HARMLESS.match(bare) or in_words or not is_secret_name(unquote(name)):
        return name + between + _PAIR.sub(_masked_pair, value)  # it may hold pairs itself
    start = body.index(bare)
    return name + between + body[:start] + MASK + body[start + len(bare) :] + tail


def redacted_tree(value: Any, is_secret: bool = False) -> Any:
    """Nested plain values for a place that nothing is read back from: telemetry, reports.

    Texts and numbers under a secret name are masked whole, all other texts as by `redacted`.
    """
    if isinstance(value, Mapping):
        return {k: redacted_tree(v, is_secret or is_secret_name(str(k))) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_tree(item, is_secret) for item in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if is_secret:
        return MASK
    return redacted(value) if isinstance(value, str) else value


# --- the gate ------------------------------------------------------------------------------------


def credential_in(text: str) -> str | None:
    """What credential `text` (a path, a URL, a setting) holds, in words; None: none."""
    for value, variable in secret_values().items():
        if any(spelling in text for spelling in _spellings(value)):
            return f"the value of the environment variable {variable}"
    if _FORMS.search(text):
        return "an access token"
    for url in _URL.findall(text):
        rest = url.split("://", 1)[1]
        authority, _, _ = rest.partition("/")
        authority = re.split(r"[?#]", authority)[0]
        _, colon, port = authority.rpartition(":")
        odd_port = colon and not port.isdigit() and not port.endswith("]") and "@" in rest
        if "@" in authority or odd_port:
            return "a login (user:password@)"
        for part in re.split(r"[?&;#]", rest)[1:]:
            name = unquote(part.partition("=")[0])
            if "=" in part and is_secret_name(name):
                return f"the parameter {name}"
    return None


def refuse_credentials(text: str, place: str = "") -> None:
    """Raises InputError, which does not repeat it, where `text` holds a credential."""
    found = credential_in(text)
    if found is not None:
        raise InputError(
            f"{place}{': ' if place else ''}{redacted(text)}: what has credentials in it is "
            f"refused (here: {found}), as it would stand in logs, configs and checkpoints; put "
            "them where the library looks: the environment (AWS_PROFILE, HF_TOKEN), ~/.aws, "
            "gcloud, `hf auth login`, ~/.netrc"
        )


# --- where text goes out -------------------------------------------------------------------------


class Formatter(logging.Formatter):
    """Masks the finished line: message, arguments and traceback. The record stays as it was."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _Stream:
    """A text stream that cleans what is written to it, and is the one below in all else."""

    def __init__(self, below: TextIO, clean: Callable[[str], str]) -> None:
        self._below, self._clean = below, clean

    def write(self, text: str) -> int:
        self._below.write(self._clean(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)


@contextmanager
def guarded_output() -> Iterator[None]:
    """Standard error (messages, warnings, tracebacks) masked by `redacted` meanwhile.

    Standard output may be data (a config, a continuation, JSON): there only the secret values of
    the environment are masked.
    """
    before = sys.stdout, sys.stderr
    guard_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def guard_output() -> None:
    """The same to the end of the process: for workers."""
    if not isinstance(sys.stderr, _Stream):
        sys.stdout = cast(TextIO, _Stream(sys.stdout, without_secret_values))
        sys.stderr = cast(TextIO, _Stream(sys.stderr, redacted))
