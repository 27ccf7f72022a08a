"""OpenLM's descriptions of an architecture, in every spelling, as our fields."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from openlm_lite.hf import openlm_fields
from openlm_lite.hf.openlm_fields import CHOICES, DEFAULTS, OPENLM_KEYS, SIZES, model_fields
from openlm_lite.model.config import ModelConfig

# Model JSONs of OpenLM: hidden_dim, n_layers, n_heads, seq_len, vocab_size; and their parameters
# with its defaults, and with DCLM's options (gain-only LayerNorm, qk-norm).
OPENLM_SIZES = {
    "open_lm_test_tiny": (16, 2, 2, 16, 16, 27_296, 27_280),
    "open_lm_11m": (96, 12, 12, 2048, 50432, 11_014_848, 11_014_752),
    "open_lm_11m_v2": (96, 8, 4, 2048, 50432, 10_570_944, 10_570_848),
    "open_lm_25m": (192, 12, 12, 2048, 50432, 24_683_904, 24_683_712),
    "open_lm_41m": (288, 12, 12, 2048, 50432, 41_007_168, 41_006_880),
    "open_lm_79m_v2": (512, 8, 4, 2048, 50432, 78_922_752, 78_922_240),
    "open_lm_87m": (488, 12, 12, 2048, 50432, 87_474_000, 87_473_320),
    "open_lm_154m_v2": (576, 24, 8, 2048, 50432, 153_705_600, 153_705_024),
    "open_lm_160m": (768, 12, 12, 2048, 50432, 162_436_608, 162_435_840),
    "open_lm_410m": (1024, 24, 16, 2048, 50432, 411_666_432, 411_665_408),
    "open_lm_411m_v2": (1024, 24, 8, 2048, 50432, 411_666_432, 411_665_408),
    "open_lm_830m": (1536, 24, 16, 2048, 50432, 834_554_880, 834_553_344),
    "open_lm_1b": (2048, 24, 16, 2048, 50432, 1_439_895_552, 1_439_893_504),
    "m1b_tiktoken": (2048, 24, 16, 2048, 50304, 1_439_371_264, 1_439_369_216),
    "open_lm_3b": (2560, 32, 32, 2048, 50432, 2_796_098_560, 2_796_096_000),
    "open_lm_7b": (4096, 32, 32, 2048, 50432, 6_889_676_800, 6_889_672_704),
}
DCLM = {"model_norm": "gain_only_lp_layer_norm", "qk_norm": True, "ffn_type": "swiglu_torch"}


def sizes(name: str = "open_lm_1b") -> dict[str, Any]:
    dim, layers, heads, seq_len, vocab, *_ = OPENLM_SIZES[name]
    return {
        "hidden_dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "seq_len": seq_len,
        "vocab_size": vocab,
        "post_embed_norm": False,
        "weight_tying": False,
    }


# --- numbers -------------------------------------------------------------------------------------


def test_every_reference_variant_has_the_parameters_stated_there(shared_data: Path) -> None:
    found = 0
    for path in sorted((shared_data / "openlm").glob("*/config.json")):
        facts = json.loads(path.read_text())
        if "open_lm_config" not in facts:
            continue
        cfg = ModelConfig(**model_fields(facts["open_lm_config"]))
        assert cfg.n_params == facts["n_params"], path
        assert (cfg.d_ff, cfg.norm_eps) == (facts["ffn_hidden"], facts["norm_eps"])
        found += 1
    assert found == 11


@pytest.mark.parametrize("name", OPENLM_SIZES)
def test_a_file_of_sizes_alone_is_openlms_default_and_takes_dclms_options(name: str) -> None:
    *_, default, dclm = OPENLM_SIZES[name]
    assert ModelConfig(**model_fields(sizes(name))).n_params == default
    assert ModelConfig(**model_fields(sizes(name) | DCLM)).n_params == dclm


def test_llama2_7b_and_the_first_1b() -> None:
    llama = sizes("open_lm_7b") | {"vocab_size": 32000, "seq_len": 4096, "model_norm": "rms_norm"}
    llama |= {"ffn_type": "swiglu", "positional_embedding_type": "llama_rotary"}
    cfg = ModelConfig(**model_fields(llama))
    assert cfg.n_params == 6_738_415_616
    assert (cfg.norm, cfg.rope_style, cfg.max_seq_len) == ("rms_norm", "interleaved", 4096)
    old = sizes() | {"positional_embedding_type": "head_rotary", "qk_norm": False}
    cfg = ModelConfig(**model_fields(old))
    assert (cfg.positions, cfg.n_params) == ("none", 1_439_895_552)


def test_heads_that_do_not_divide_the_width_are_rounded_down() -> None:
    fields = model_fields(sizes("open_lm_87m"))
    assert (fields["head_dim"], fields["n_heads"] * fields["head_dim"]) == (40, 480)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norm", "gain", "bias"),
    [
        ("default_layer_norm", "layer_norm", True, True),
        ("lp_layer_norm", "layer_norm", True, True),
        ("gain_only_lp_layer_norm", "layer_norm", True, False),
        ("gain_only_layer_norm", "layer_norm", True, False),
        ("no_wb_layer_norm", "layer_norm", False, False),
        ("rms_norm", "rms_norm", True, False),
    ],
)
def test_every_norm_of_openlm(name: str, norm: str, gain: bool, bias: bool) -> None:
    fields = model_fields(sizes() | {"model_norm": name})
    assert (fields["norm"], fields["norm_gain"], fields["norm_bias"]) == (norm, gain, bias)


@pytest.mark.parametrize(
    ("name", "activation", "mlp_bias", "d_ff"),
    [
        ("swiglu", "swiglu", False, 5632),
        ("swiglu_torch", "swiglu", False, 5632),
        ("gelu", "gelu", False, 8192),
        ("gemma_geglu", "geglu", True, 5632),
    ],
)
def test_every_feed_forward_network_of_openlm(
    name: str, activation: str, mlp_bias: bool, d_ff: int
) -> None:
    fields = model_fields(sizes() | {"ffn_type": name})
    assert fields["activation"] == activation
    assert (fields["mlp_bias"], fields["d_ff"]) == (mlp_bias, d_ff)


@pytest.mark.parametrize(
    ("name", "positions", "style"),
    [
        ("rotary", "rope", "half"),
        ("llama_rotary", "rope", "interleaved"),
        ("head_rotary", "none", "half"),
        ("none", "none", "half"),
    ],
)
def test_every_position_of_openlm(name: str, positions: str, style: str) -> None:
    fields = model_fields(sizes() | {"positional_embedding_type": name})
    assert (fields["positions"], fields["rope_style"]) == (positions, style)


def test_the_switches() -> None:
    given = sizes() | {"post_embed_norm": True, "weight_tying": True, "norm_eps": 1e-6}
    fields = model_fields(given | {"qk_norm": True})
    assert fields["embedding_norm"] is fields["tie_embeddings"] is True
    assert (fields["norm_eps"], fields["qk_norm"]) == (1e-6, "full")
    assert model_fields(given)["qk_norm"] == "none"


# --- spellings -----------------------------------------------------------------------------------

MODEL_JSON = sizes() | DCLM | {"positional_embedding_type": "rotary"}
LAYOUT_A = {
    "model_type": "openlm",
    "architectures": ["OpenLMForCausalLM"],
    "torch_dtype": "float32",
    **sizes(),
    "dim": 2048,
    "norm_type": "gain_only_lp_layer_norm",
    "apply_qk_norm": True,
    "ffn_type": "swiglu_torch",
    "positional_embedding_type": "rotary",
    "norm_eps": 1e-5,
    "attn_name": "auto",
}
del LAYOUT_A["hidden_dim"]
LAYOUT_B = {
    "model_type": "openlm",
    "params": None,
    "params_args_dict": {
        **{k: v for k, v in LAYOUT_A.items() if k not in ("model_type", "architectures")},
        "model": "open_lm_1b_swiglutorch",
        "model_norm": "gain_only_lp_layer_norm",
        "qk_norm": True,
        "attn_activation": None,
        "attn_seq_scalar": None,
        "moe_freq": 0,
        "moe_num_experts": None,
    },
}


def test_the_three_spellings_and_files_with_both_are_one_architecture() -> None:
    fields = model_fields(MODEL_JSON)
    assert set(fields) == {f.name for f in dataclasses.fields(ModelConfig)}
    assert ModelConfig(**fields).n_params == 1_439_893_504
    for other in (LAYOUT_A, LAYOUT_B, LAYOUT_A | LAYOUT_B, MODEL_JSON | LAYOUT_A):
        assert model_fields(other) == fields


def test_null_is_absent() -> None:
    given = LAYOUT_B["params_args_dict"] | {"model_norm": None, "qk_norm": None}
    assert model_fields({"params_args_dict": given}) == model_fields(MODEL_JSON)
    bare = sizes() | {"model_norm": None, "norm_eps": None, "params_args_dict": None}
    assert model_fields(bare) == model_fields(sizes())


def test_our_own_fields_are_returned_as_they_are() -> None:
    cfg = ModelConfig(
        **model_fields(MODEL_JSON) | {"n_kv_heads": 4, "positions": "alibi", "clip_qkv": 8.0}
    )
    ours = dataclasses.asdict(cfg)
    assert model_fields(ours | {"model_type": "openlm", "dtype": "float32"}) == ours
    few = {name: ours[name] for name in SIZES}
    assert model_fields(few) == few | DEFAULTS


def test_the_tables_are_those_of_model_config() -> None:
    hints = typing.get_type_hints(ModelConfig)
    fields = dataclasses.fields(ModelConfig)
    required = [f.name for f in fields if f.default is dataclasses.MISSING]
    assert tuple(required) == SIZES
    assert {f.name: f.default for f in fields if f.name not in SIZES} == DEFAULTS
    literals = {k: v for k, v in hints.items() if typing.get_origin(v) is typing.Literal}
    assert {k: typing.get_args(v) for k, v in literals.items()} == CHOICES
    assert not OPENLM_KEYS & {f.name for f in fields}


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"model_norm": "batch_norm"},
            r"model_norm = 'batch_norm'.*default_layer_norm, .*rms_norm",
        ),
        ({"ffn_type": "moe"}, r"ffn_type = 'moe'.*swiglu, swiglu_torch, gelu, gemma_geglu"),
        ({"positional_embedding_type": "alibi"}, r"= 'alibi'.*rotary, llama_rotary, head_rotary"),
        ({"qk_norm": "per_head"}, r"qk_norm = 'per_head'.*True, False"),
        ({"weight_tying": 1}, r"weight_tying = 1.*True, False"),
        ({"ffn_type": ["gelu"]}, r"ffn_type = \['gelu'\]"),
        ({"moe_freq": 2}, r"moe_freq = 2: a mixture of experts.*allowed is 0"),
        ({"attn_name": "custom_attn"}, r"attn_name = 'custom_attn'.*auto, torch_attn"),
        ({"attn_activation": "relu"}, r"attn_activation = 'relu'.*allowed is null"),
        ({"rotary_old": True}, r"rotary_old = True.*head_rotary"),
        ({"model": "mamba_1b"}, r"model = 'mamba_1b': this is Mamba"),
        ({"n_heads": 2.0}, r"n_heads = 2.0, must be a positive integer"),
        ({"n_layers": 0}, r"n_layers = 0, must be a positive integer"),
        ({"norm_eps": -1}, r"norm_eps = -1, must be a positive number"),
        ({"hidden_dim": None}, r"dim or hidden_dim: absent"),
        ({"dim": 1024}, r"dim = 1024 and hidden_dim = 2048 contradict each other"),
        ({"apply_qk_norm": True, "qk_norm": False}, r"apply_qk_norm = True and qk_norm = False"),
        (
            {"params_args_dict": {"n_heads": 8}},
            r"n_heads = 16 and params_args_dict\.n_heads = 8 contradict",
        ),
        (
            {"params_args_dict": {"moe_freq": 1}},
            r"params_args_dict\.moe_freq = 1: a mixture of experts",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_by_field_and_value(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model_fields(sizes() | given)


def test_mamba_and_unknown_values_in_our_own_names_are_refused() -> None:
    mamba = {"d_model": 768, "n_layer": 24, "vocab_size": 50432, "seq_len": 2048}
    with pytest.raises(ValueError, match=r"n_layer = 24: this is Mamba"):
        model_fields(mamba)
    ours = model_fields(MODEL_JSON)
    with pytest.raises(ValueError, match=r"activation = 'relu', must be one of: swiglu, geglu"):
        model_fields(ours | {"activation": "relu"})
    with pytest.raises(ValueError, match=r"d_ff: absent"):
        model_fields({k: v for k, v in ours.items() if k != "d_ff"})


def test_names_of_two_spellings_that_mean_the_same_agree() -> None:
    both = LAYOUT_A | {"params_args_dict": {"ffn_type": "swiglu"}}
    both["params_args_dict"]["model_norm"] = "gain_only_layer_norm"
    assert model_fields(both) == model_fields(LAYOUT_A)


def test_the_file_needs_the_standard_library_alone() -> None:
    tree = ast.parse(inspect.getsource(openlm_fields))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        assert all(name.partition(".")[0] in sys.stdlib_module_names for name in names)
