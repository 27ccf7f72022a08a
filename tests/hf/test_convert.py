from __future__ import annotations

import importlib.util
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from openlm_lite.data.tokenizer import Tokenizer, train_bpe
from openlm_lite.errors import InputError
from openlm_lite.hf import convert, names
from openlm_lite.hf.convert import (
    export_checkpoint,
    is_centred,
    load_native,
    logit_difference,
    native_class_of,
    native_weights,
    write_native,
)
from openlm_lite.model.config import ModelConfig
from tests.tiny_run import TEXT, save_tiny_run, tiny_config, tiny_model, tiny_tokenizer

TOLERANCE = 1e-5

LAYER_NORM = {"norm": "layer_norm"}
RMS_NORM = {"norm": "rms_norm"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rms": ("LlamaForCausalLM", {**RMS_NORM, "qk_norm": "none"}),
    "rms without gain": ("LlamaForCausalLM", {**RMS_NORM, "qk_norm": "none", "norm_gain": False}),
    "rms, per-head qk-norm": ("Qwen3ForCausalLM", {**RMS_NORM, "qk_norm": "per_head"}),
    "rms, full qk-norm": ("OlmoeForCausalLM", {**RMS_NORM, "qk_norm": "full"}),
    "non-parametric": ("OlmoForCausalLM", {**LAYER_NORM, "qk_norm": "none", "norm_gain": False}),
    "gain": ("StableLmForCausalLM", {**LAYER_NORM, "qk_norm": "none"}),
    "gain and bias": ("StableLmForCausalLM", {**LAYER_NORM, "qk_norm": "none", "norm_bias": True}),
    "gain, per-head qk-norm": ("Qwen3ForCausalLM", {**LAYER_NORM, "qk_norm": "per_head"}),
    "gain, full qk-norm (DCLM)": ("OlmoeForCausalLM", {**LAYER_NORM, "qk_norm": "full"}),
    "no gain, full qk-norm": (
        "OlmoeForCausalLM",
        {**LAYER_NORM, "qk_norm": "full", "norm_gain": False},
    ),
}


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    n_kv_heads = draw(st.integers(1, 2))
    n_heads = 2 * n_kv_heads * draw(st.integers(1, 2))
    # transformers runs experts by a grouped product, which wants rows of 16 bytes: widths of 4
    head_dim = 4 * draw(st.integers(4, 6))
    return {
        "vocab_size": draw(st.integers(290, 330)),
        "d_model": n_heads * head_dim,
        "n_layers": draw(st.integers(1, 2)),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "d_ff": 4 * draw(st.integers(2, 16)),
        "max_seq_len": draw(st.sampled_from([7, 32, 64])),
        "rope_theta": draw(st.sampled_from([1e4, 5e5])),
        "tie_embeddings": draw(st.booleans()),
    }


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


# --- numerics ------------------------------------------------------------------------------------


# The same examples always: plain copies differ by 0, but where weights are centred the rounding of
# fp32 alone comes to 3e-6 to 1e-5 on logits of size 5 (as far as both are from fp64).
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(sizes=sizes(), seed=st.integers(0, 1000), eps=st.sampled_from([1e-5, 1e-6]))
def test_transformers_own_class_computes_the_same_logits(
    case: str,
    sizes: dict[str, Any],
    seed: int,
    eps: float,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    native_class, norms = CASES[case]
    eps = 1e-5 if case == "non-parametric" else eps
    cfg = ModelConfig(**sizes, **norms, norm_eps=eps)
    assert native_class_of(cfg) == native_class
    model = tiny_model(cfg, seed)
    folder = tmp_path_factory.mktemp("native")
    write_native(str(folder), model, tokenizer)
    difference, size = logit_difference(model, str(folder))
    assert size > 0.1
    assert difference <= TOLERANCE
    native = load_native(str(folder), torch.float32)
    assert type(native).__name__ == native_class
    assert native.config.tie_word_embeddings == (cfg.tie_embeddings and not is_centred(cfg))


@pytest.mark.parametrize("qk_norm", ["none", "per_head"])
def test_head_dim_is_free_where_the_class_has_it(
    qk_norm: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cfg = tiny_config(norm="rms_norm", qk_norm=qk_norm, head_dim=16)
    model = tiny_model(cfg)
    write_native(str(tmp_path), model, tokenizer)
    assert logit_difference(model, str(tmp_path))[0] <= TOLERANCE


@pytest.mark.parametrize("qk_norm", ["full", "per_head"])
def test_without_centring_the_logits_would_differ(
    qk_norm: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_config(qk_norm=qk_norm))
    monkeypatch.setattr(convert, "is_centred", lambda _: False)
    write_native(str(tmp_path), model, tokenizer)
    assert logit_difference(model, str(tmp_path))[0] > 0.01


def test_the_old_rotary_keys_say_the_same_as_the_new_ones() -> None:
    for native_class, norms in CASES.values():
        config = convert.native_config(tiny_config(rope_theta=5e5, **norms), 0, "float32")
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
        if native_class == "StableLmForCausalLM":
            assert config["partial_rotary_factor"] == 1.0
            assert config["rope_parameters"]["partial_rotary_factor"] == 1.0


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_exactly_one_native_name(case: str) -> None:
    native_class, norms = CASES[case]
    cfg = tiny_config(**norms)
    ours = [name for name, _ in names.names_of(native_class, cfg)]
    theirs = [name for _, name in names.names_of(native_class, cfg)]
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    assert set(dict(tiny_model(cfg).named_parameters())) <= set(ours)


# --- what cannot be exported ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"norm_bias": True}, "model.norm_bias"),
        ({"norm_bias": True, "qk_norm": "per_head"}, "model.norm_bias"),
        ({"head_dim": 16}, "model.head_dim"),
        ({"head_dim": 16, "qk_norm": "none"}, "model.head_dim"),
        ({"d_model": 30, "norm": "rms_norm", "qk_norm": "none"}, "model.n_heads"),
    ],
)
def test_an_architecture_without_native_class_is_refused_by_the_field(
    changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputError, match=rf"^{field} = .* cannot be exported"):
        native_class_of(tiny_config(**changes))


def test_non_parametric_layer_norm_with_another_eps_goes_to_the_class_that_has_eps() -> None:
    cfg = tiny_config(qk_norm="none", norm_gain=False)
    assert native_class_of(cfg) == "OlmoForCausalLM"
    assert native_class_of(replace(cfg, norm_eps=1e-6)) == "StableLmForCausalLM"


# --- the folder ----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return save_tiny_run(tmp_path / "run", tiny_model(tiny_config()), tokenizer)


def test_an_export_is_a_folder_that_auto_classes_load(
    run: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "new" / "hf"
    report = export_checkpoint(str(run), str(out))
    assert report.native_class == "OlmoeForCausalLM"
    assert report.max_logit_difference <= TOLERANCE
    assert report.rounding_difference == 0.0
    assert report.n_params == tiny_config().n_params
    assert report.path == str(out)
    assert sorted(os.listdir(out)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eot_id
    auto = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    ids = auto(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT).tolist()
    assert auto.decode(ids) == TEXT
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_step_folder_exports_like_its_run(run: Path, tmp_path: Path) -> None:
    (step,) = (run / "checkpoints").glob("step_*")
    export_checkpoint(str(run), str(tmp_path / "a"))
    export_checkpoint(str(step), str(tmp_path / "b"))
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bfloat16_in_shards_holds_the_rounded_weights(
    run: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    out = tmp_path / "hf"
    report = export_checkpoint(str(run), str(out), dtype="bfloat16", max_shard_bytes=20_000)
    assert report.max_logit_difference <= TOLERANCE
    assert 0 < report.rounding_difference < 0.1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 1
    assert [f.name for f in files] == sorted(set(index["weight_map"].values()))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    model = tiny_model(tiny_config())
    expected = dict(native_weights(model.cfg, model.state_dict()))
    assert set(index["weight_map"]) == set(expected)
    total = 0
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as opened:
            stored = opened.get_tensor(name)
        assert torch.equal(stored, expected[name].bfloat16())
        total += stored.nbytes
    assert index["metadata"]["total_size"] == total
    assert load_native(str(out), "auto").dtype == torch.bfloat16


def test_exported_files_are_as_readable_as_the_umask_allows(run: Path, tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        export_checkpoint(str(run), str(tmp_path / "hf"))
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "hf").iterdir()}
    assert modes == {0o644}


def test_the_tokenizer_is_found_beside_the_run_or_its_data_or_named(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run = save_tiny_run(tmp_path / "run", tiny_model(tiny_config()), None)
    with pytest.raises(InputError, match=r"no tokenizer.json in .*--tokenizer"):
        export_checkpoint(str(run), str(tmp_path / "hf"))
    tokenizer.save(tmp_path / "elsewhere")
    export_checkpoint(str(run), str(tmp_path / "hf"), tokenizer=str(tmp_path / "elsewhere"))
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(run: Path, tmp_path: Path) -> None:
    other = "words that no other text has: zebra, quagga, okapi; walrus, narwhal, dugong. " * 2
    train_bpe(iter([TEXT * 4, other]), 321).save(tmp_path / "large")
    with pytest.raises(InputError, match=r"321 ids.*vocab_size = 320"):
        export_checkpoint(str(run), str(tmp_path / "hf"), tokenizer=str(tmp_path / "large"))


# --- refusals leave nothing ----------------------------------------------------------------------


def test_an_existing_folder_is_not_touched(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(InputError, match="no empty folder"):
        export_checkpoint(str(run), str(out))
    assert os.listdir(out) == ["precious"]
    with pytest.raises(InputError, match="no empty folder"):
        export_checkpoint(str(run), str(out / "precious"))
    (out / "precious").unlink()
    export_checkpoint(str(run), str(out))  # an empty one is as good as none


def test_a_wrong_export_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = names.NAMES["OlmoeForCausalLM"]
    gate, up = (f"layers.{{i}}.feed_forward.{w}.weight" for w in ("w_gate", "w_up"))
    swapped = {**table, gate: table[up], up: table[gate]}
    monkeypatch.setitem(names.NAMES, "OlmoeForCausalLM", swapped)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match="the logits differ by"):
        export_checkpoint(str(run), str(tmp_path / "hf"))
    assert sorted(os.listdir(tmp_path)) == before


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny_model(tiny_config())
    with torch.no_grad():
        model.norm.weight[0] = torch.nan  # pyright: ignore[reportOptionalSubscript]
    run = save_tiny_run(tmp_path / "run", model, tokenizer)
    with pytest.raises(InputError, match="nan"):
        export_checkpoint(str(run), str(tmp_path / "hf"))
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_a_failure_while_writing_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(str(run), str(tmp_path / "hf"))
    assert os.listdir(tmp_path) == ["run"]


def test_bad_arguments_are_refused_before_anything_is_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="float32 and bfloat16"):
        export_checkpoint(str(run), str(tmp_path / "hf"), dtype="float16")  # pyright: ignore
    with pytest.raises(InputError, match="nothing"):
        export_checkpoint(str(tmp_path / "none"), str(tmp_path / "hf"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r'pip install "openlm-lite\[hf\]"'):
        export_checkpoint(str(run), str(tmp_path / "hf"))
    assert os.listdir(tmp_path) == ["run"]
