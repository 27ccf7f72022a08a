"""Text to ids and back: one class over tiktoken and Hugging Face `tokenizers`.

    spec ---------------------------+--> ByteBPE (ranks) --> tiktoken      7 to 10 times as fast
    gpt2, r50k_base, cl100k_base …  |         ^
    ranks.tiktoken                  |         | where that is exactly the same (data/bpe.py)
    tokenizer.json or its folder    +--> tokenizer.json ---> tokenizers    everything else
    a name on the Hugging Face hub

`save` writes tokenizer.json in every case, so whatever a dataset was encoded with travels with it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
import tokenizers

from openlm_lite.data.bpe import (
    CL100K_PATTERN,
    END_OF_TEXT,
    ByteBPE,
    from_tokenizer_json,
    hugging_face_pattern,
    parse_ranks,
    to_tokenizer_json,
)
from openlm_lite.errors import InputError
from openlm_lite.storage import exists, read_bytes, write_bytes, write_json

TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json")
"""the files that `Tokenizer.save` writes"""

# What tokenizers call the token between documents, where their files do not say.
EOT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
)
MIN_VOCAB_SIZE = 258  # every byte, the end of text, and one merge
MAX_VOCAB_SIZE = 1 << 24  # 16M: far above any; a file with one id of 2**30 fills the memory
MIN_PAIR_COUNT = 2  # a pair seen once says nothing about the next text


class Coder(Protocol):
    """What the two libraries share."""

    @property
    def vocab_size(self) -> int: ...
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def describe(self) -> dict[str, Any]: ...
    def to_json(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back.

    `eot` / `eot_id` is the token that ends a document; `vocab_size` is one more than the highest
    id, so unused ids count; `fingerprint` is a sha256 of what decides the ids (vocabulary, merges,
    split pattern, special tokens): two tokenizers that share it encode alike.
    `bos_ids`: what its file wants before a text (Llama: one id; most: none). Our data has none.
    """

    name: str
    eot: str
    eot_id: int
    vocab_size: int
    fingerprint: str
    coder: Coder
    bos_ids: tuple[int, ...] = ()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array per text; nothing is added.

        Text that looks like a special token ("<|endoftext|>") is encoded as ordinary text.
        Lone surrogates, which are no text, become U+FFFD.
        """
        return self.coder.encode_batch(texts)

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text, uint32."""
        return self.coder.encode_batch([text])[0]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`, special tokens included; ids past the vocabulary have no text."""
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self.coder.decode(known, skip_special)

    def save(self, folder: str | Path) -> None:
        """Write `folder`/tokenizer.json and tokenizer_config.json, for AutoTokenizer as for us."""
        config = {
            # transformers 4.x refuses the class name that 5.x writes; both know this one
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.eot,
            "eos_token": self.eot,
            "clean_up_tokenization_spaces": False,
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_bytes(str(Path(folder) / "tokenizer.json"), self.coder.to_json().encode())
        write_json(str(Path(folder) / "tokenizer_config.json"), config)


# --- the two libraries ---------------------------------------------------------------------------


class TiktokenCoder:
    """Byte-level BPE through tiktoken."""

    def __init__(self, bpe: ByteBPE):
        self.bpe = bpe
        self.specials = bpe.specials | bpe.fillers  # so that every id below vocab_size decodes
        self._special_ids = frozenset(self.specials.values())
        self._encoding = tiktoken.Encoding(
            "openlm_lite",
            pat_str=bpe.pattern,
            mergeable_ranks=bpe.ranks,
            special_tokens=self.specials,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TiktokenCoder, (self.bpe,)

    @property
    def vocab_size(self) -> int:
        return self.bpe.vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encode = self._encoding.encode_to_numpy
        return [encode(_valid(text), disallowed_special=()) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        return self._encoding.decode(ids)

    def token_id(self, token: str) -> int | None:
        return self.bpe.specials.get(token)

    def describe(self) -> dict[str, Any]:
        return self.bpe.describe()

    def to_json(self) -> str:
        return self._json

    @functools.cached_property
    def _json(self) -> str:
        return to_tokenizer_json(self.bpe)  # takes a second for 50,000 ids


class JsonCoder:
    """A tokenizer.json through `tokenizers`.

    Added tokens that are not special (GPT-NeoX's runs of spaces) are found in text, as the file
    wants it; special ones are not.
    """

    def __init__(self, content: str):
        self._tokenizer = tokenizers.Tokenizer.from_str(content)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # i.e. encode their text as text

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonCoder, (self.to_json(),)

    @property
    def vocab_size(self) -> int:
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        batch = [_valid(text) for text in texts]
        with _errors_told("it cannot encode this text"):
            encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def describe(self) -> dict[str, Any]:
        document = json.loads(self._tokenizer.to_str())
        # options that are off are left out: later versions of the library list more of them
        off = (None, False, "")
        model = {key: v for key, v in document["model"].items() if not any(v is x for x in off)}
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = sorted(model["vocab"].items())
        if model.get("type") == "BPE":  # "a b" and ["a", "b"] are two spellings of one merge
            merges = model.get("merges", [])
            model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
        return {
            "kind": "tokenizer.json",
            "model": model,
            "normalizer": document["normalizer"],
            "pre_tokenizer": document["pre_tokenizer"],
            "added_tokens": sorted(document["added_tokens"], key=lambda token: token["id"]),
        }

    def to_json(self) -> str:
        return self._tokenizer.to_str()


@contextmanager
def _errors_told(what: str) -> Iterator[None]:
    """InputError for what `tokenizers` raises: bare Exceptions, and panics of Rust."""
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise  # Ctrl-C
        raise InputError(f"not a usable tokenizer.json: {what}: {e}") from None


def _check_ids(document: Any) -> None:
    """Raises ValueError for ids that no vocabulary has: `tokenizers` counts up to the highest."""
    vocab = document["model"].get("vocab")
    ids = [*vocab.values()] if isinstance(vocab, dict) else []
    ids += [token["id"] for token in document.get("added_tokens") or []]
    for i in ids:
        if type(i) is not int or not 0 <= i < MAX_VOCAB_SIZE:
            raise ValueError(f"the id {i!r}; allowed are 0 to {MAX_VOCAB_SIZE - 1}")


def _valid(text: str) -> str:
    """`text` itself, unless it holds lone surrogates: those become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# --- loading -------------------------------------------------------------------------------------


def dataset_tokenizer(folder: str) -> Tokenizer | None:
    """The tokenizer beside the shards in `folder`, a path or a URL; None where none lies there."""
    if not exists(f"{folder}/{TOKENIZER_NAMES[0]}"):
        return None
    with tempfile.TemporaryDirectory() as copy:
        for name in TOKENIZER_NAMES:
            if exists(f"{folder}/{name}"):
                data = read_bytes(f"{folder}/{name}")
                write_bytes(str(Path(copy) / name), data)
        return load_tokenizer(copy)


def load_tokenizer(spec: str, *, eot: str | None = None) -> Tokenizer:
    """The tokenizer that `spec` names (the forms are in the drawing at the top of this file).

    `eot` is the text of the token that ends a document; without it, `eos_token` of the
    tokenizer_config.json beside a tokenizer.json, else the one of EOT_NAMES that the tokenizer has.

    Raises InputError for a spec that cannot be had, a file that cannot be read, and an end of text
    that is absent or not certain. Takes about a second at 50,000 ids.
    """
    path = Path(spec)
    if spec and path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{spec}: this folder holds no tokenizer.json")
        return _from_json_file(path, path.parent.resolve().name, eot)
    if path.suffix in (".json", ".tiktoken"):
        if not path.is_file():
            raise InputError(f"tokenizer {spec}: no such file")
        if path.suffix == ".json":
            return _from_json_file(path, path.name, eot)
        return _tokenizer(path.stem, TiktokenCoder(parse_ranks(path.read_bytes(), spec)), eot)
    if path.is_file():
        raise InputError(f"tokenizer {spec}: a file must end in .json or .tiktoken")
    if spec in tiktoken.list_encoding_names():
        return _tokenizer(spec, TiktokenCoder(_published_encoding(spec)), eot)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec, flags=re.ASCII) and not spec.startswith("."):
        return _from_hub(spec, eot)
    raise InputError(
        f"tokenizer {spec!r}: no such file or folder, and no tiktoken encoding or hub name either"
    )


def _tokenizer(name: str, coder: Coder, eot: str | None) -> Tokenizer:
    """Put the parts together; here the end of text is settled."""
    if eot is None:
        found = [token for token in EOT_NAMES if coder.token_id(token) is not None]
        if len(found) != 1:
            what = f"has several: {', '.join(found)}" if found else "has none that is known"
            raise InputError(
                f"tokenizer {name}: which token ends a document? It {what}; name the token"
            )
        eot = found[0]
    eot_id = coder.token_id(eot)
    if eot_id is None:
        raise InputError(f"tokenizer {name}: it has no special token {eot!r} to end documents with")
    canonical = json.dumps(coder.describe(), sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
    return Tokenizer(name, eot, eot_id, coder.vocab_size, fingerprint, coder)


def _from_json(name: str, content: str, eot: str | None) -> Tokenizer:
    try:
        document = json.loads(content)
        _check_ids(document)
        bpe = from_tokenizer_json(document)
        with _errors_told("it cannot be read"):
            coder = JsonCoder(content) if bpe is None else TiktokenCoder(bpe)
            bos_ids = _bos_ids(document, content)
    except InputError as e:
        raise InputError(f"tokenizer {name}: {e}") from None
    except Exception as e:  # a damaged or hostile document makes nearly anything happen
        raise InputError(f"tokenizer {name}: not a readable tokenizer.json: {e!r}") from e
    return dataclasses.replace(_tokenizer(name, coder, eot), bos_ids=bos_ids)


def _bos_ids(document: dict[str, Any], content: str) -> tuple[int, ...]:
    """The ids that the post-processor of a tokenizer.json puts before a text."""
    if (document.get("post_processor") or {}).get("type") in (None, "ByteLevel"):
        return ()
    tokenizer = tokenizers.Tokenizer.from_str(content)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a").ids
    starts = range(len(framed) - len(plain) + 1)
    start = next((i for i in starts if framed[i : i + len(plain)] == plain), 0)
    return tuple(framed[:start])


def _from_json_file(path: Path, name: str, eot: str | None) -> Tokenizer:
    config_path = path.with_name("tokenizer_config.json")
    try:
        content = path.read_text(encoding="utf-8")
        if eot is None and path.name == "tokenizer.json" and config_path.is_file():
            eos = json.loads(config_path.read_text(encoding="utf-8")).get("eos_token")
            eot = eos.get("content") if isinstance(eos, dict) else eos
    except (OSError, ValueError, AttributeError) as e:
        raise InputError(f"{path}: the tokenizer cannot be read: {e}") from e
    return _from_json(name, content, eot)


def _published_encoding(name: str) -> ByteBPE:
    """One of tiktoken's own encodings, from its cache or the network."""
    # "gpt2" and "r50k_base" have the same ids, but the first wants two older files
    source = "r50k_base" if name == "gpt2" else name
    try:
        encoding = tiktoken.get_encoding(source)
    except Exception as e:  # whatever requests, urllib3 or the cache may raise
        raise InputError(
            f"tokenizer {name}: tiktoken could not fetch it ({type(e).__name__}). Without network, "
            "give the path of its .tiktoken file or of a tokenizer.json, or point "
            "TIKTOKEN_CACHE_DIR at a folder where tiktoken has it"
        ) from e
    # tiktoken has no public names for the three
    return ByteBPE(encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def _from_hub(name: str, eot: str | None) -> Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_pretrained(name)
    except Exception as e:  # huggingface_hub's errors, or tokenizers' bare Exception
        raise InputError(
            f"tokenizer {name!r}: no such file, no tiktoken encoding "
            f"({', '.join(tiktoken.list_encoding_names())}), and the Hugging Face hub did not give "
            f"it ({type(e).__name__}). Without network, give the path of its tokenizer.json"
        ) from e
    return _from_json(name, tokenizer.to_str(), eot)


# --- training ------------------------------------------------------------------------------------


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` ids; "<|endoftext|>" is id 0, then the 256 bytes.

    Text is split as cl100k does it, which keeps line breaks and indentation together and numbers
    in groups of three digits. The same texts give the same tokenizer.

    Raises InputError for a vocabulary below 258, and for texts with too few pairs that occur twice.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"a vocabulary of {vocab_size}: at least {MIN_VOCAB_SIZE} (256 bytes, the end of text "
            "and one merge) are needed to train a tokenizer"
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.Regex(hugging_face_pattern(CL100K_PATTERN))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(split, behavior="isolated"), byte_level]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_valid(text) for text in texts), trainer=trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise InputError(
            f"a vocabulary of {vocab_size}: the texts have pairs that occur twice for only "
            f"{reached} ids; give more text or ask for at most {reached}"
        )
    return _from_json(f"bpe-{vocab_size}", tokenizer.to_str(), END_OF_TEXT)
