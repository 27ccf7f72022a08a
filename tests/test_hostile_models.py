"""Models, tokenizers and caches that somebody made on purpose: nothing runs, one clear error.

(Checkpoints and weights: test_checkpoint_hostile.py, hf/test_weights.py.)
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from openlm_lite import cli
from openlm_lite.data.cache import Cache
from openlm_lite.data.tokenizer import load_tokenizer, train_bpe
from openlm_lite.errors import InputError
from tests.test_hostile_files import Bomb, refused
from tests.tiny_run import save_tiny_run, tiny_config, tiny_model, tiny_tokenizer

# --- Hugging Face folders ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of transformers, as exported."""
    pytest.importorskip("transformers")
    from openlm_lite.hf.export import export_checkpoint

    root = tmp_path_factory.mktemp("exported")
    cfg = tiny_config(norm="rms_norm", qk_norm="none")
    save_tiny_run(root / "run", tiny_model(cfg), tiny_tokenizer())
    export_checkpoint(str(root / "run"), str(root / "hf"))
    return root / "hf"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """Its own copy, with a module beside it that makes the folder `boom` when it is imported."""
    copy = tmp_path / "hf"
    shutil.copytree(exported, copy)
    code = f"import os\nos.mkdir({str(tmp_path / 'boom')!r})\n"
    code += "class Evil: pass\ndef generate(*_, **__): pass\n"
    (copy / "evil.py").write_text(code)
    (copy / "custom_generate").mkdir()
    shutil.copy(copy / "evil.py", copy / "custom_generate" / "generate.py")
    return copy


AUTO_MAP = {
    "AutoConfig": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}


def words_of(verb: str, folder: Path) -> list[str]:
    if verb == "import":
        return ["import", str(folder), str(folder.parent / "checkpoint")]
    return ["generate", str(folder), "A small", "--max-new-tokens", "2"]


@pytest.mark.parametrize("verb", ["import", "generate"])
@pytest.mark.parametrize("kind", ["known", "unknown"])
def test_code_in_a_hugging_face_folder_never_runs(
    kind: str,
    verb: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is anybody asked whether it may: transformers would, on a terminal."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    edit(folder / "config.json", lambda c: c.update(auto_map=AUTO_MAP))
    edit(folder / "tokenizer_config.json", lambda c: c.update(auto_map=AUTO_MAP))
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="Evil"))
    edit(folder / "generation_config.json", lambda c: c.update(custom_generate="custom_generate"))
    if kind == "known":  # transformers' own class is taken
        assert cli.main(words_of(verb, folder)) == 0
    else:
        edit(folder / "config.json", lambda c: c.update(model_type="evil", architectures=["Evil"]))
        message = "model_type = 'evil' is not known" if verb == "import" else "custom code"
        refused(capsys, message, *words_of(verb, folder))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("verb", ["import", "generate"])
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", "someone/kernel@main:f", "flash_attention_2"])
def test_an_attention_that_is_code_from_the_hub_is_refused(
    value: str, key: str, verb: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder / "config.json", lambda c: c.update({key: value}))
    refused(capsys, f"{key} = {value!r} in its config.json may fetch", *words_of(verb, folder))


@pytest.mark.parametrize("verb", ["import", "generate"])
def test_a_bomb_in_the_weights_of_a_folder_does_not_go_off(
    verb: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb(tmp_path / "boom")}, folder / "pytorch_model.bin")
    message = "asks for posix.mkdir" if verb == "import" else "Weights only load failed"
    refused(capsys, message, *words_of(verb, folder))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "load", "torch_dtype": "load"},
        {"hidden_act": "__import__"},
        {"num_hidden_layers": 10**12},
        {"vocab_size": -1},
        {"hidden_size": "x"},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("verb", ["import", "generate"])
def test_a_config_with_surprising_values_is_one_error(
    change: dict[str, Any], verb: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "num_hidden_layers" in change:
        change = {"num_hidden_layers": 10**12, "model_type": ["llama"]}
    edit(folder / "config.json", lambda c: c.update(change))
    refused(capsys, str(folder), *words_of(verb, folder))


# --- tokenizers ----------------------------------------------------------------------------------


def tokenizer_json() -> dict[str, Any]:
    return json.loads(
        train_bpe(iter(["some words and some more words " * 20]), 260).coder.to_json()
    )


def more_ids(document: dict[str, Any], **ids: int) -> dict[str, Any]:
    document["model"]["vocab"] |= ids
    return document


def with_(**fields: Any) -> dict[str, Any]:
    return tokenizer_json() | fields


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
CHARSMAP = base64.b64encode(b"\x04\0\0\0\0\0\0\0").decode()
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "no object": lambda: [],
    "nothing": lambda: None,
    "an id of 2**30": lambda: more_ids(tokenizer_json(), evil=2**30),
    "an id of 2**40": lambda: more_ids(tokenizer_json(), evil=2**40),
    "a negative id": lambda: more_ids(tokenizer_json(), evil=-1),
    "an id that is text": lambda: more_ids(tokenizer_json(), evil="x"),  # pyright: ignore
    "an added id of 2**30": lambda: with_(added_tokens=[{"id": 2**30, "content": "x"}]),
    "added tokens that are text": lambda: with_(added_tokens=["x"]),
    "an unknown model": lambda: with_(model={"type": "Evil"}),
    "a model that is a list": lambda: with_(model=[]),
    "a broken pattern": lambda: with_(pre_tokenizer={**SPLIT, "pattern": {"Regex": "("}}),
    "a map of characters that is none": lambda: with_(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a map of characters that ends early": lambda: with_(
        normalizer={"type": "Precompiled", "precompiled_charsmap": CHARSMAP}
    ),
    "a prefix longer than the tokens": lambda: with_(
        model=tokenizer_json()["model"] | {"continuing_subword_prefix": "##"}
    ),
    "no unknown token where one is needed": lambda: with_(
        model={"type": "WordLevel", "vocab": {"<|endoftext|>": 0}, "unk_token": "x"}
    ),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_with_surprising_content_is_one_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(TOKENIZERS[kind]()))
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(str(path)).encode("some words 123")


@pytest.mark.parametrize(
    "text", ["", "\0", "{", "[" * 100_000, '{"a":' * 100_000, '{"v": "\\ud800"}']
)
def test_a_tokenizer_that_is_no_json_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    "name", ["../x", "a/..", "../../etc", "/etc/passwd", "a/b/c", "pipe:x", ""]
)
def test_a_tokenizer_name_is_no_way_out_of_a_cache(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        load_tokenizer(name)


# --- the cache of shards -------------------------------------------------------------------------


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Content that every URL has."""
    from openlm_lite import storage

    content = b"a shard's bytes" * 10

    def download(url: str, local: str, n_bytes: int | None, *, store_checks: bool) -> None:
        with open(local, "xb") as file:
            file.write(content)

    monkeypatch.setattr(storage, "download", download)
    return content


@pytest.mark.parametrize("crc", ["checked", "unchecked"])
def test_a_link_in_the_cache_is_not_followed_and_its_target_stays(
    crc: str, fetched: bytes, tmp_path: Path
) -> None:
    import zlib

    cache = Cache(str(tmp_path / "cache"), 1 << 20)
    crc32 = zlib.crc32(fetched) if crc == "checked" else None
    path = Path(cache.fetch("s3://bucket/x.tar", len(fetched), crc32))
    outside = tmp_path / "outside"
    outside.write_bytes(fetched if crc == "checked" else fetched[::-1])
    os.utime(outside, (1, 1))
    path.unlink()
    path.symlink_to(outside)
    part = path.with_name(f".{path.name}.part-{os.getpid()}-7")
    part.symlink_to(tmp_path / "planted")
    again = Path(Cache(cache.folder, 1 << 20).fetch("s3://bucket/x.tar", len(fetched), crc32))
    assert again == path and not again.is_symlink() and again.read_bytes() == fetched
    assert outside.stat().st_mtime == 1 and not (tmp_path / "planted").exists()


def test_a_cache_that_anybody_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    with pytest.raises(InputError, match=r"anybody may write to .*open; name a folder of your own"):
        Cache(str(tmp_path / "open"), 1 << 20)
    assert not list((tmp_path / "open").iterdir())
    inside = Cache(str(tmp_path / "open" / "mine"), 1 << 20)
    assert os.stat(inside.folder).st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "url", ["s3://b/..", "s3://b/.", "s3://b/x?a=../../y", "s3://b/" + "x" * 300, "s3://b/.lock-00"]
)
def test_no_url_makes_a_name_outside_of_the_cache(url: str, fetched: bytes, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "cache"), 1 << 20)
    path = Path(cache.fetch(url, len(fetched), None))
    assert path.parent == tmp_path / "cache" and path.resolve() == path
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}
