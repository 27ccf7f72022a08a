from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import random
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_lite.data.bpe import (
    CL100K_PATTERN,
    GPT2_PATTERN,
    KNOWN_PATTERNS,
    O200K_PATTERN,
    ByteBPE,
    from_tokenizer_json,
    merges_of,
    parse_ranks,
    to_tokenizer_json,
)
from openlm_lite.data.tokenizer import (
    JsonCoder,
    TiktokenCoder,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from openlm_lite.errors import InputError

# sha256 of what decides GPT-2's ids; datasets carry it, so it may never change
GPT2_FINGERPRINT = "bf012f731254570b50a3acb39a0461b7abb0d6512da545e82c1eb8cdb7a0fa85"

TEXT = (
    "def f(x):\n    return x + 1  # it's 12345\n\n\nWe'll see: the cat isn't the dog.\n"
    "\tfor i in range(100):\n\t\tprint(i, i * i)\r\nÜber naïve façades, 東京 and 🙂🙃.\n"
)


def odd_strings(count: int) -> list[str]:
    """Slices of the standard library's code, random unicode, contractions, digits, broken bytes."""
    draw = random.Random(0)
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = [p.read_text(errors="replace") for p in sorted(folder.glob("*.py"))[:60]]
    kinds = ["code"] * 11 + ["unicode"] * 4 + ["contraction", "digits", "bytes", "surrogate"]

    def one() -> str:
        kind, length = draw.choice(kinds), draw.randint(1, 120)
        if kind == "code":
            source = draw.choice(sources)
            start = draw.randrange(max(1, len(source) - length))
            return source[start : start + length]
        if kind == "unicode":
            points = (draw.choice((0x80, 0x3000, 0xD7FF, 0x1FFFF)) for _ in range(length // 4))
            return "".join(chr(draw.randrange(p)) for p in points)
        if kind == "contraction":
            parts = ["'s", "'T", "'RE", "'ve", "'ſ", "I", "we", "\u2019ll", " ", "  ", "\n"]
            return "".join(draw.choices(parts, k=length // 8 + 1))
        if kind == "digits":
            return "".join(draw.choices("0123456789.,- ٣५", k=length))
        if kind == "bytes":
            return draw.randbytes(length).decode("utf-8", "replace")
        return "a" + chr(draw.randrange(0xD800, 0xE000)) + "b"

    return [one() for _ in range(count)]


@pytest.fixture(scope="session")
def gpt2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(str(shared_data / "tokenizers" / "gpt2.tiktoken"))


@pytest.fixture(scope="session")
def trained() -> Tokenizer:
    return train_bpe(iter([TEXT] * 4), 330)


def bpe_of(tokenizer: Tokenizer) -> ByteBPE:
    assert isinstance(tokenizer.coder, TiktokenCoder)
    return tokenizer.coder.bpe


def same_arrays(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# --- the two notations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)], ids=["some", "all"]
)
@pytest.mark.parametrize(
    "pattern", [GPT2_PATTERN, CL100K_PATTERN, O200K_PATTERN], ids=["gpt2", "cl100k", "o200k"]
)
def test_tiktoken_and_its_tokenizer_json_give_the_same_ids_and_text(
    gpt2: Tokenizer, pattern: str, count: int
) -> None:
    bpe = ByteBPE(pattern, bpe_of(gpt2).ranks, bpe_of(gpt2).specials)
    fast, file = TiktokenCoder(bpe), JsonCoder(to_tokenizer_json(bpe))
    texts = odd_strings(count)
    ids = fast.encode_batch(texts)
    assert same_arrays(ids, file.encode_batch(texts))
    for text, one in zip(texts, ids, strict=True):
        decoded = fast.decode(one.tolist())
        assert decoded == file.decode(one.tolist())
        assert decoded == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", KNOWN_PATTERNS)
def test_both_libraries_split_alike_around_every_unicode_character(
    gpt2: Tokenizer, pattern: str
) -> None:
    bpe = ByteBPE(pattern, bpe_of(gpt2).ranks, {})
    fast, file = TiktokenCoder(bpe), JsonCoder(to_tokenizer_json(bpe))
    points = [p for p in range(0x110000) if not 0xD800 <= p < 0xE000]
    for start in range(0, len(points), 20_000):
        letters = [chr(p) for p in points[start : start + 20_000]]
        texts = [f"a{c}1{c}{c} {c}b'{c}x'{c.upper()}{c}ll  {c}\n" for c in letters]
        assert same_arrays(fast.encode_batch(texts), file.encode_batch(texts))


@settings(max_examples=40, deadline=None)
@given(
    corpus=st.lists(st.text("ab c\n1é", min_size=1, max_size=60), min_size=1, max_size=8),
    texts=st.lists(st.text("ab c\n1é'", max_size=60), min_size=1, max_size=8),
    merges=st.integers(1, 40),
)
def test_ranks_read_from_any_trained_tokenizer_json_encode_like_it(
    corpus: list[str], texts: list[str], merges: int
) -> None:
    try:
        tokenizer = train_bpe(iter(corpus * 2), 257 + merges)
    except InputError:
        return  # too little text for so many merges
    bpe = bpe_of(tokenizer)
    file = JsonCoder(to_tokenizer_json(bpe))
    assert same_arrays(tokenizer.encode_batch(texts), file.encode_batch(texts))
    assert from_tokenizer_json(json.loads(file.to_json())) == bpe


def test_holes_and_scattered_specials_keep_every_id(trained: Tokenizer, tmp_path: Path) -> None:
    ranks = {token: rank + (rank > 300) for token, rank in bpe_of(trained).ranks.items()}
    bpe = ByteBPE(CL100K_PATTERN, ranks, {"<|endoftext|>": 0, "<|x|>": 340, "<|y|>": 345})
    coder = TiktokenCoder(bpe)
    assert coder.vocab_size == 346
    assert set(bpe.fillers.values()) == {301, *range(331, 340), *range(341, 345)}
    file = JsonCoder(to_tokenizer_json(bpe))
    assert file.vocab_size == 346
    assert [file.token_id(t) for t in ("<|endoftext|>", "<|x|>", "<|y|>")] == [0, 340, 345]
    assert same_arrays(coder.encode_batch([TEXT]), file.encode_batch([TEXT]))
    assert coder.decode(range(346)) == file.decode(range(346))
    assert from_tokenizer_json(json.loads(file.to_json())) == bpe


def edited(tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    document = json.loads(tokenizer.coder.to_json())
    document["model"] |= changes.pop("model", {})
    return document | changes


def test_a_tokenizer_json_that_ranks_would_not_reproduce_stays_with_tokenizers(
    trained: Tokenizer,
) -> None:
    assert from_tokenizer_json(edited(trained)) is not None
    document = edited(trained)
    merges = document["model"]["merges"]
    swapped = [*merges[:-2], merges[-1], merges[-2]]
    added = [*document["added_tokens"], {"id": 330, "content": "xx", "special": False}]
    split = json.loads(json.dumps(document["pre_tokenizer"]).replace("{1,3}", "{1,2}"))
    shifted = [{"id": 500, "content": "<|z|>", "special": True}]
    for unlike in (
        edited(trained, model={"merges": swapped}),
        edited(trained, model={"merges": merges[:-1]}),
        edited(trained, model={"dropout": 0.1}),
        edited(trained, model={"type": "Unigram"}),
        edited(trained, normalizer={"type": "NFC"}),
        edited(trained, pre_tokenizer=split),
        edited(trained, added_tokens=added),
        edited(trained, added_tokens=shifted),
    ):
        assert from_tokenizer_json(unlike) is None


def test_a_token_that_no_merge_makes_has_no_tokenizer_json(trained: Tokenizer) -> None:
    ranks = bpe_of(trained).ranks | {b"\x00\x01\x02": 330}
    assert merges_of(ranks) is None
    with pytest.raises(InputError, match="no merge"):
        to_tokenizer_json(ByteBPE(CL100K_PATTERN, ranks, {}))


# --- what a tokenizer promises -------------------------------------------------------------------


def test_gpt2_has_its_known_ids_and_a_fingerprint_that_never_changes(
    gpt2: Tokenizer, tmp_path: Path
) -> None:
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot, gpt2.eot_id) == (
        "gpt2",
        50257,
        "<|endoftext|>",
        50256,
    )
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert gpt2.encode("").tolist() == []
    assert gpt2.fingerprint == GPT2_FINGERPRINT
    gpt2.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).fingerprint == GPT2_FINGERPRINT


def test_gpt2_is_found_by_name_in_tiktokens_cache(
    gpt2: Tokenizer, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    content = (shared_data / "tokenizers" / "gpt2.tiktoken").read_bytes()
    (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    named = load_tokenizer("gpt2")
    assert (named.name, named.fingerprint) == ("gpt2", gpt2.fingerprint)


@pytest.fixture(scope="session")
def neox(shared_data: Path) -> Tokenizer:
    return load_tokenizer(str(shared_data / "tokenizers" / "20B_tokenizer.json"))


def test_text_that_looks_like_a_special_token_is_ordinary_text(
    gpt2: Tokenizer, neox: Tokenizer, trained: Tokenizer
) -> None:
    text = "a<|endoftext|>b<|endoftext|>"
    for tokenizer in (gpt2, neox, trained):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.eot_id]) == "<|endoftext|>"


def test_gpt_neox_keeps_its_runs_of_spaces_and_its_identity(
    neox: Tokenizer, tmp_path: Path
) -> None:
    assert (neox.vocab_size, neox.eot_id) == (50277, 0)
    assert neox.encode("x   y").tolist() == [89, 50275, 90]
    neox.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint == neox.fingerprint
    assert same_arrays(again.encode_batch([TEXT]), neox.encode_batch([TEXT]))


def test_fingerprints_tell_tokenizers_apart_but_not_spellings(
    trained: Tokenizer, neox: Tokenizer, shared_data: Path, tmp_path: Path
) -> None:
    pii = load_tokenizer(str(shared_data / "tokenizers" / "gpt-neox-20b-pii.json"))
    other = train_bpe(iter([TEXT] * 4), 329)
    assert len({t.fingerprint for t in (pii, neox, trained, other)}) == 4
    document = edited(trained, padding=None, post_processor={"type": "ByteLevel"})
    document["model"]["merges"] = [m.split(" ") for m in document["model"]["merges"]]
    (tmp_path / "x.json").write_text(json.dumps(document, indent=1))
    assert load_tokenizer(str(tmp_path / "x.json")).fingerprint == trained.fingerprint


def test_tokenizers_survive_pickling_into_worker_processes(
    neox: Tokenizer, trained: Tokenizer
) -> None:
    for tokenizer in (neox, trained):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.fingerprint == tokenizer.fingerprint
        assert same_arrays(copy.encode_batch([TEXT]), tokenizer.encode_batch([TEXT]))


def test_lone_surrogates_become_replacement_characters(neox: Tokenizer, trained: Tokenizer) -> None:
    for tokenizer in (neox, trained):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_ids_past_the_vocabulary_have_no_text(neox: Tokenizer, trained: Tokenizer) -> None:
    for tokenizer in (neox, trained):
        ids = [*tokenizer.encode("hi").tolist(), tokenizer.vocab_size, 10**9, -1]
        assert tokenizer.decode(ids) == "hi"


def test_a_saved_tokenizer_loads_with_auto_tokenizer_and_encodes_alike(
    gpt2: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    gpt2.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert auto.eos_token_id == auto.bos_token_id == gpt2.eot_id
    texts = [t for t in odd_strings(200) if not any("\ud800" <= c < "\ue000" for c in t)]
    for text, ids in zip(texts, gpt2.encode_batch(texts), strict=True):
        assert auto(text)["input_ids"] == ids.tolist()
        assert auto.decode(ids.tolist()) == text
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "model_max_length" not in config


def test_saved_files_are_as_readable_as_the_umask_allows(
    trained: Tokenizer, tmp_path: Path
) -> None:
    old = os.umask(0o027)
    try:
        trained.save(tmp_path / "new")
    finally:
        os.umask(old)
    files = sorted((tmp_path / "new").iterdir())
    assert [f.name for f in files] == ["tokenizer.json", "tokenizer_config.json"]
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o640}


# --- training ------------------------------------------------------------------------------------


def test_training_gives_exactly_the_asked_ids_end_of_text_first(trained: Tokenizer) -> None:
    assert (trained.vocab_size, trained.eot_id, trained.eot) == (330, 0, "<|endoftext|>")
    ids = trained.encode_batch([TEXT, "東京 ünseen \x00 bytes"])
    assert [trained.decode(i) for i in ids] == [TEXT, "東京 ünseen \x00 bytes"]
    assert len(ids[0]) < len(TEXT.encode())
    assert isinstance(trained.coder, TiktokenCoder)  # the fast way


def test_training_depends_on_the_texts_alone(trained: Tokenizer) -> None:
    assert train_bpe(iter([TEXT] * 4), 330).fingerprint == trained.fingerprint
    more = [TEXT, "another text, again another text", "and a third, and a third"] * 3
    shuffled = sorted(more)
    assert train_bpe(iter(more), 330).fingerprint == train_bpe(iter(shuffled), 330).fingerprint


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, 257])
def test_training_refuses_a_vocabulary_without_room_for_a_merge(vocab_size: int) -> None:
    with pytest.raises(InputError, match="at least 258"):
        train_bpe(iter([TEXT]), vocab_size)


def test_training_on_too_little_text_says_what_can_be_had() -> None:
    with pytest.raises(InputError, match=r"only 259 ids.*at most 259") as refused:
        train_bpe(iter(["abc abc"]), 1000)
    assert "1000" in str(refused.value)
    assert train_bpe(iter(["abc abc"]), 259).vocab_size == 259
    with pytest.raises(InputError, match="only 257 ids"):
        train_bpe(iter([]), 300)


# --- bad input -----------------------------------------------------------------------------------


def test_paths_that_hold_no_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bad.json").write_text("{]")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "latin.json").write_bytes(b"\xff")
    for spec, message in (
        (str(tmp_path), "no tokenizer.json"),
        (str(tmp_path / "none.json"), "no such file"),
        (str(tmp_path / "none.tiktoken"), "no such file"),
        (str(tmp_path / "notes.txt"), "must end in"),
        (str(tmp_path / "bad.json"), "not a readable tokenizer.json"),
        (str(tmp_path / "other.json"), "not a readable tokenizer.json"),
        (str(tmp_path / "latin.json"), "cannot be read"),
        (str(tmp_path / "nowhere"), "no such file or folder"),
        ("", "no such file or folder"),
        ("a b", "no such file or folder"),
    ):
        with pytest.raises(InputError, match=message):
            load_tokenizer(spec)


def test_a_ranks_file_of_an_unknown_encoding_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    lines = [
        base64.b64encode(token) + b" %d" % rank for token, rank in bpe_of(trained).ranks.items()
    ]
    path = tmp_path / "own.tiktoken"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=r"329 ranks of an unknown encoding.*r50k_base"):
        load_tokenizer(str(path))
    for line in (b"only-one-word", b"YQ== x", b"Y?== 1", b"a b c"):
        path.write_bytes(lines[0] + b"\n" + line)
        with pytest.raises(InputError, match="line 2"):
            load_tokenizer(str(path))


def test_a_known_encoding_is_recognised_whatever_the_order_of_its_lines(
    shared_data: Path, gpt2: Tokenizer
) -> None:
    lines = (shared_data / "tokenizers" / "gpt2.tiktoken").read_bytes().splitlines()
    assert parse_ranks(b"\r\n".join(reversed(lines)), "x") == bpe_of(gpt2)
    with pytest.raises(InputError, match="unknown encoding"):
        parse_ranks(b"\n".join(lines[:-1]), "x")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network here")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    yield


@pytest.mark.usefixtures("no_network")
def test_names_that_need_the_network_fail_with_one_message() -> None:
    with pytest.raises(InputError, match=r"cl100k_base.*could not fetch.*TIKTOKEN_CACHE_DIR"):
        load_tokenizer("cl100k_base")
    with pytest.raises(InputError, match=r"someone/some-model.*did not give it.*tokenizer.json"):
        load_tokenizer("someone/some-model")


def test_the_end_of_text_must_be_certain(trained: Tokenizer, tmp_path: Path) -> None:
    def with_specials(*names: str, config: str | None = None) -> str:
        bpe = bpe_of(trained)
        specials = {name: 330 + i for i, name in enumerate(names)}
        folder = tmp_path / "-".join(n.strip("<|/>") for n in names) / str(config is None)
        folder.mkdir(parents=True, exist_ok=True)
        text = to_tokenizer_json(ByteBPE(bpe.pattern, bpe.ranks, specials))
        (folder / "tokenizer.json").write_text(text)
        if config is not None:
            (folder / "tokenizer_config.json").write_text(config)
        return str(folder)

    assert load_tokenizer(with_specials("</s>", "<s>")).eot == "</s>"
    with pytest.raises(InputError, match=r"has several: </s>, <eos>.*name the token"):
        load_tokenizer(with_specials("</s>", "<eos>"))
    assert load_tokenizer(with_specials("</s>", "<eos>"), eot="<eos>").eot_id == 331
    with pytest.raises(InputError, match="none that is known"):
        load_tokenizer(with_specials("<end>"))
    assert load_tokenizer(with_specials("<end>"), eot="<end>").eot_id == 330
    with pytest.raises(InputError, match="no special token '<nope>'"):
        load_tokenizer(with_specials("<end>"), eot="<nope>")
    for eos in ('"<end>"', '{"content": "<end>", "special": true}'):
        folder = with_specials("<end>", "</s>", config=f'{{"eos_token": {eos}}}')
        assert load_tokenizer(folder).eot == "<end>"
        assert load_tokenizer(folder, eot="</s>").eot == "</s>"
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(with_specials("<end>", config="[]"))
