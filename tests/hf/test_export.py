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
from safetensors import safe_open

from openlm_lite.data.tokenizer import Tokenizer, train_bpe
from openlm_lite.errors import InputError
from openlm_lite.hf import export, layouts, rewrite
from openlm_lite.hf.compare import load_hf
from openlm_lite.hf.export import (
    config_of,
    export_checkpoint,
    native_form,
    weights_in,
)
from openlm_lite.hf.native import best_fit
from openlm_lite.hf.source import open_source
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


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


# --- which class ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_class_is_the_one_of_the_table_and_computes_the_same_logits(
    case: str, tmp_path: Path
) -> None:
    native_class, norms = CASES[case]
    cfg = tiny_config(**norms)
    run = save_tiny_run(tmp_path / "run", tiny_model(cfg), None)
    report = export_checkpoint(str(run), str(tmp_path / "hf"), tokenizer="none")
    assert (report.hf_class, report.native, report.why_bundled) == (native_class, True, "")
    assert report.max_logit_difference <= TOLERANCE
    native = load_hf(str(tmp_path / "hf"), torch.float32)
    assert type(native).__name__ == native_class


@pytest.mark.parametrize("qk_norm", ["none", "per_head"])
def test_head_dim_is_free_where_the_class_has_it(qk_norm: str, tmp_path: Path) -> None:
    cfg = tiny_config(norm="rms_norm", qk_norm=qk_norm, head_dim=16)
    run = save_tiny_run(tmp_path / "run", tiny_model(cfg), None)
    report = export_checkpoint(str(run), str(tmp_path / "hf"), tokenizer="none", how="native")
    assert report.max_logit_difference <= TOLERANCE


@pytest.mark.parametrize("qk_norm", ["full", "per_head"])
def test_without_centring_the_export_would_be_refused(
    qk_norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_tiny_run(tmp_path / "run", tiny_model(tiny_config(qk_norm=qk_norm)), None)
    monkeypatch.setattr(rewrite, "_mean", lambda _cfg, _name, weight: torch.zeros_like(weight))
    with pytest.raises(InputError, match="the logits differ by"):
        export_checkpoint(str(run), str(tmp_path / "hf"), tokenizer="none")


def test_the_old_rotary_keys_say_the_same_as_the_new_ones() -> None:
    for native_class, norms in CASES.values():
        cfg = tiny_config(rope_theta=5e5, **norms)
        config = config_of(native_form(cfg), cfg, 0, "float32")
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
        if native_class == "StableLmForCausalLM":
            assert config["partial_rotary_factor"] == 1.0
            assert config["rope_parameters"]["partial_rotary_factor"] == 1.0


BUNDLED: dict[str, dict[str, Any]] = {
    "PaLM": {
        "block": "parallel",
        "qk_norm": "none",
        "n_kv_heads": 1,
        "tie_embeddings": True,
    },
    "head rotary": {"positions": "none", "qk_norm": "none", "norm_bias": True},
    "bf16 frequencies": {"rope_freq_dtype": "bf16"},
    "GELU with qk-norm": {"activation": "gelu"},
    "GeGLU with biases": {
        "activation": "geglu",
        "mlp_bias": True,
        "norm_bias": True,
        "qk_norm": "none",
    },
    "embedding norm behind learned positions": {"embedding_norm": True, "positions": "learned"},
}


@pytest.mark.parametrize("case", BUNDLED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_no_class_holds_goes_with_its_own_code(
    case: str, dtype: Any, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    cfg = tiny_config(**BUNDLED[case])
    run = save_tiny_run(tmp_path / "run", tiny_model(cfg), tokenizer)
    report = export_checkpoint(str(run), str(tmp_path / "hf"), dtype=dtype)
    assert (report.hf_class, report.native) == ("OpenLMForCausalLM", False)
    assert report.max_logit_difference <= TOLERANCE
    field = report.why_bundled.partition(" = ")[0]
    assert field.removeprefix("model.") in BUNDLED[case]
    back = open_source(str(tmp_path / "hf"))
    assert back.cfg == cfg
    original = open_source(str(run)).weights
    for name, weight in back.weights.items():
        expected = original[name].bfloat16().float() if dtype == "bfloat16" else original[name]
        assert torch.equal(weight, expected), name


def test_bundled_on_request_keeps_the_weights_as_trained(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run = save_tiny_run(tmp_path / "run", tiny_model(tiny_config()), tokenizer)
    report = export_checkpoint(str(run), str(tmp_path / "hf"), how="bundled")
    assert (report.hf_class, report.rewritten, report.why_bundled) == ("OpenLMForCausalLM", [], "")
    names = set(os.listdir(tmp_path / "hf"))
    assert {"modeling_openlm.py", "openlm_fields.py", "README.md", "tokenizer.json"} <= names


# --- what cannot be exported ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"norm_bias": True, "qk_norm": "none", "positions": "none"}, "model.positions"),
        ({"norm_bias": True, "qk_norm": "per_head"}, "model.qk_norm"),
        ({"norm_bias": True, "head_dim": 16, "qk_norm": "none"}, "model.head_dim"),
        ({"rope_freq_dtype": "bf16"}, "model.rope_freq_dtype"),
        ({"block": "parallel", "qk_norm": "none"}, "model.block"),
    ],
)
def test_an_architecture_without_native_class_is_refused_by_the_field(
    changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputError, match=rf"{field} = .*does not hold this architecture exactly"):
        native_form(tiny_config(**changes))


def test_a_named_class_must_hold_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^model.norm = layer_norm.*GPT2LMHeadModel|qk_norm"):
        native_form(tiny_config(), "GPT2LMHeadModel")
    with pytest.raises(InputError, match=r"no class Gpt2: known are .*GPT2LMHeadModel"):
        native_form(tiny_config(), "Gpt2")


def test_non_parametric_layer_norm_with_another_eps_goes_to_the_class_that_has_eps() -> None:
    cfg = tiny_config(qk_norm="none", norm_gain=False)
    assert best_fit(cfg).family.hf_class == "OlmoForCausalLM"
    assert best_fit(replace(cfg, norm_eps=1e-6)).family.hf_class == "StableLmForCausalLM"


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
    assert report.hf_class == "OlmoeForCausalLM"
    assert report.max_logit_difference <= TOLERANCE
    assert report.rounding_difference == 0.0
    assert report.n_params == tiny_config().n_params
    assert report.path == str(out)
    assert sorted(os.listdir(out)) == [
        "README.md",
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
        if name != "README.md":  # its title is the folder's name
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
    source = open_source(str(run))
    expected = weights_in(native_form(source.cfg), source.weights)
    assert set(index["weight_map"]) == set(expected)
    total = 0
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as opened:
            stored = opened.get_tensor(name)
        assert torch.equal(stored, expected[name].bfloat16())
        total += stored.nbytes
    assert index["metadata"]["total_size"] == total
    assert load_hf(str(out), "auto").dtype == torch.bfloat16


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
    swapped = {"w_gate": "w_up", "w_up": "w_gate"}
    modules = [
        m._replace(
            ours=tuple(
                n.replace(
                    n.rpartition(".")[2], swapped.get(n.rpartition(".")[2], n.rpartition(".")[2])
                )
                for n in m.ours
            )
        )
        for m in layouts.MODULES["OlmoeForCausalLM"]
    ]
    monkeypatch.setitem(layouts.MODULES, "OlmoeForCausalLM", modules)
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

    monkeypatch.setattr(export, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(str(run), str(tmp_path / "hf"))
    assert os.listdir(tmp_path) == ["run"]


def test_bad_arguments_are_refused_before_anything_is_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="float32 and bfloat16"):
        export_checkpoint(str(run), str(tmp_path / "hf"), dtype="float16")  # pyright: ignore
    with pytest.raises(InputError, match="found nothing"):
        export_checkpoint(str(tmp_path / "none"), str(tmp_path / "hf"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r'pip install "openlm-lite\[hf\]"'):
        export_checkpoint(str(run), str(tmp_path / "hf"))
    assert os.listdir(tmp_path) == ["run"]
