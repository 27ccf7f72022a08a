"""The shipped architectures: complete, decodable, and as large as the models they are named for."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from openlm_lite import config
from openlm_lite.cli import main
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.transformer import Transformer
from openlm_lite.run import load_model

FOLDER = config.assets("model_configs")
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"

# OpenLM's files: parameters with the defaults of its flags, the same without the input
# embedding, and with DCLM's norms (gain-only, qk-norm over all heads).
OPENLM = {
    "open_lm_test_tiny": (27_296, 27_040, 27_280),
    "open_lm_11m": (11_014_848, 6_173_376, 11_014_752),
    "open_lm_11m_v2": (10_570_944, 5_729_472, 10_570_848),
    "open_lm_25m": (24_683_904, 15_000_960, 24_683_712),
    "open_lm_41m": (41_007_168, 26_482_752, 41_006_880),
    "open_lm_79m_v2": (78_922_752, 53_101_568, 78_922_240),
    "open_lm_87m": (87_474_000, 62_863_184, 87_473_320),
    "open_lm_154m_v2": (153_705_600, 124_656_768, 153_705_024),
    "open_lm_160m": (162_436_608, 123_704_832, 162_435_840),
    "open_lm_410m": (411_666_432, 360_024_064, 411_665_408),
    "open_lm_411m_v2": (411_666_432, 360_024_064, 411_665_408),
    "open_lm_830m": (834_554_880, 757_091_328, 834_553_344),
    "open_lm_1b": (1_439_895_552, 1_336_610_816, 1_439_893_504),
    "open_lm_1b_old": (1_439_895_552, 1_336_610_816, 1_439_893_504),
    "m1b_tiktoken": (1_439_371_264, 1_336_348_672, 1_439_369_216),
    "open_lm_3b": (2_796_098_560, 2_666_992_640, 2_796_096_000),
    "open_lm_7b": (6_889_676_800, 6_683_107_328, 6_889_672_704),
    "open_lm_llama2_7b": (6_738_415_616, 6_607_343_616, 6_738_677_760),
}

N_PARAMS = {
    **{name: counts[0] for name, counts in OPENLM.items()},
    "bloom_176b": 176_247_271_424,
    "dclm_1b": 1_439_893_504,
    "dclm_3b": 2_796_096_000,
    "dclm_411m": 411_665_408,
    "dclm_7b": 6_889_672_704,
    "falcon_7b": 6_921_720_704,
    "gpt2": 124_439_808,
    "gpt2_large": 774_030_080,
    "gpt2_medium": 354_823_168,
    "gpt2_xl": 1_557_611_200,
    "llama_2_7b": 6_738_415_616,
    "llama_3_8b": 8_030_261_248,
    "llama_7b": 6_738_415_616,
    "map_neo_7b": 7_793_716_224,
    "mistral_7b_v0.3": 7_248_023_552,
    "mpt_7b": 6_649_286_656,
    "olmo2_13b": 13_716_198_400,
    "olmo2_1b": 1_484_916_736,
    "olmo2_32b": 32_234_279_936,
    "olmo2_7b": 7_298_617_344,
    "olmo_1b": 1_176_764_416,
    "olmo_7b": 6_888_095_744,
    "openlm_7b": 6_889_676_800,
    "palm_8b": 8_632_143_872,
    "pythia_1b": 1_011_781_632,
    "quickstart": 2_164_416,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_7b": 7_615_616_512,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "smollm_1.7b": 1_711_376_384,
    "smollm_135m": 134_515_008,
    "smollm_360m": 361_821_120,
    "stablelm_2_1.6b": 1_644_515_328,
    "tinyllama_1.1b": 1_100_048_384,
}

# Whose sizes are in part from memory.
UNVERIFIED = {"map_neo_7b", "palm_8b"}

# model_type in transformers -> files; OpenLM's count like StableLm, its llama2_7b like Llama.
HF_TYPES = {
    "bloom": "bloom_176b",
    "falcon": "falcon_7b",
    "gpt2": "gpt2 gpt2_medium gpt2_large gpt2_xl",
    "gpt_neox": "pythia_1b",
    "llama": "llama_7b llama_2_7b llama_3_8b tinyllama_1.1b smollm_1.7b smollm_360m smollm_135m "
    "map_neo_7b open_lm_llama2_7b",
    "mistral": "mistral_7b_v0.3",
    "mpt": "mpt_7b",
    "olmo": "olmo_1b olmo_7b",
    "olmo2": "olmo2_1b olmo2_7b olmo2_13b olmo2_32b",
    "qwen2": "qwen2.5_0.5b qwen2.5_1.5b qwen2.5_7b",
    "qwen3": "qwen3_0.6b qwen3_1.7b qwen3_4b qwen3_8b",
    "stablelm": "stablelm_2_1.6b open_lm_test_tiny open_lm_160m open_lm_1b open_lm_3b open_lm_7b",
}
HF_CASES = [(kind, name) for kind, names in HF_TYPES.items() for name in names.split()]


def comment_of(name: str) -> str:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["comment"]


def hf_fields(kind: str, cfg: ModelConfig) -> dict[str, Any]:
    """What transformers' config of this kind calls our fields, as far as they make parameters."""
    common = {"vocab_size": cfg.vocab_size, "tie_word_embeddings": cfg.tie_embeddings}
    if kind == "bloom":
        return common | {
            "hidden_size": cfg.d_model,
            "n_layer": cfg.n_layers,
            "n_head": cfg.n_heads,
        }
    if kind == "gpt2":
        return common | {
            "n_embd": cfg.d_model,
            "n_layer": cfg.n_layers,
            "n_head": cfg.n_heads,
            "n_inner": cfg.d_ff,
            "n_positions": cfg.max_seq_len,
        }
    if kind == "mpt":
        return common | {
            "d_model": cfg.d_model,
            "n_layers": cfg.n_layers,
            "n_heads": cfg.n_heads,
            "expansion_ratio": cfg.d_ff // cfg.d_model,
            "no_bias": not (cfg.mlp_bias or cfg.norm_bias),
        }
    llama = common | {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "intermediate_size": cfg.d_ff,
    }
    special = {
        "falcon": {
            "ffn_hidden_size": cfg.d_ff,
            "bias": cfg.mlp_bias,
            "multi_query": cfg.n_kv_heads == 1,
            "parallel_attn": cfg.block == "parallel_shared_norm",
            "new_decoder_architecture": False,
        },
        "gpt_neox": {"attention_bias": cfg.attn_bias == "all"},
        "llama": {"attention_bias": cfg.attn_bias == "all", "mlp_bias": cfg.mlp_bias},
        "qwen3": {"head_dim": cfg.head_dim},
        "stablelm": {"use_qkv_bias": cfg.attn_bias == "qkv"},
    }
    return llama | special.get(kind, {})


def test_every_file_has_a_count_and_every_count_a_file() -> None:
    assert sorted(N_PARAMS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_file_names_every_field_in_order_and_says_what_it_is(name: str) -> None:
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    plain = json.loads(text)
    assert list(plain) == ["comment", *(f.name for f in dataclasses.fields(ModelConfig))]
    assert text == json.dumps(plain, indent=2) + "\n"
    comment = plain.pop("comment")
    assert isinstance(comment, str)
    assert len(comment) > 10
    assert config.to_plain(load_model([f"model.base={name}"])) == plain


@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_exactly_the_published_parameters(name: str) -> None:
    cfg = load_model([f"model.base={name}"])
    with torch.device("meta"):
        model = Transformer(cfg)
    assert sum(p.numel() for p in model.parameters()) == cfg.n_params == N_PARAMS[name]


@pytest.mark.parametrize("name", OPENLM)
def test_openlms_files_count_as_openlm_does(name: str) -> None:
    words = [f"model.base={name}"]
    cfg = load_model(words)
    dclm = load_model([*words, "model.norm_bias=false", "model.qk_norm=full"])
    assert (cfg.n_params, cfg.n_params_non_embedding, dclm.n_params) == OPENLM[name]
    if name == "open_lm_1b":
        assert dclm == load_model(["model.base=dclm_1b"])


@pytest.mark.parametrize(("kind", "name"), HF_CASES)
def test_transformers_own_class_has_as_many_parameters(kind: str, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    cfg = load_model([f"model.base={name}"])
    theirs = AutoConfig.for_model(kind, **hf_fields(kind, cfg))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    assert sum(p.numel() for p in model.parameters()) == N_PARAMS[name]


@pytest.mark.parametrize("name", NAMES)
def test_openlm_config_prints_the_parameters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", f"model.base={name}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_params"] == N_PARAMS[name]
    assert found["config"]["model"] == config.to_plain(load_model([f"model.base={name}"]))


def in_our_fields(preset: dict[str, Any]) -> dict[str, Any]:
    """A row of the reference table of architectures in the fields of ModelConfig."""
    positions = preset["pos"].split()[0]
    return {
        "vocab_size": preset["vocab"],
        "d_model": preset["d_model"],
        "n_layers": preset["n_layers"],
        "n_heads": preset["n_heads"],
        "n_kv_heads": preset["kv"],
        "head_dim": preset["head_dim"],
        "d_ff": preset["ffn_hidden"],
        "max_seq_len": preset["seq_len"],
        "block": {
            "sequential": "sequential",
            "parallel": "parallel",
            "parallel, two LNs": "parallel",
            "parallel, one shared LN": "parallel_shared_norm",
        }[preset["block"]],
        "norm": {"layernorm": "layer_norm", "rmsnorm": "rms_norm"}[preset["norm"]],
        "norm_gain": preset["norm_weight"],
        "norm_bias": preset["norm_bias"],
        "norm_eps": preset["eps"],
        "qk_norm": "none" if preset["qk_norm"] is None else "full",
        "embedding_norm": preset["embed_norm"],
        "activation": {"gelu(tanh)": "gelu_tanh"}.get(preset["act"], preset["act"]),
        "mlp_bias": preset["mlp_bias"],
        "attn_bias": {"none": "none", "qkv only": "qkv", "qkv+out": "all"}[preset["attn_bias"]],
        "clip_qkv": preset["clip_qkv"],
        "positions": {"head_rotary": "none"}.get(positions, positions),
        "rope_theta": preset["rope_theta"],
        "rotary_pct": preset["rotary_pct"],
        "rope_style": "half",
        "rope_freq_dtype": "fp32",
        "alibi_bias_max": 8.0,
        "tie_embeddings": preset["tied"],
    }


def test_the_reference_table_of_architectures_agrees(shared_data: Path) -> None:
    presets = json.loads((shared_data / "dclm" / "arch_presets.json").read_text())
    assert len(presets) == 22
    for key, preset in presets.items():
        cfg = load_model([f"model.base={key}"])  # found with dashes for underscores
        assert config.to_plain(cfg) == in_our_fields(preset), key
        for count in ("n_params", "n_params_analytic", "n_params_hf_meta"):
            assert preset.get(count, cfg.n_params) == cfg.n_params, key
        if "n_params_without_qk_norm" in preset:
            plain = dataclasses.replace(cfg, qk_norm="none")
            assert plain.n_params == preset["n_params_without_qk_norm"], key


def test_sizes_from_memory_are_marked() -> None:
    assert {name for name in NAMES if "unverified" in comment_of(name)} == UNVERIFIED


def test_names_that_are_easily_confused_name_each_other() -> None:
    letters = {name: re.sub(r"[^a-z0-9]", "", name) for name in NAMES}
    alike = {(a, b) for a, b in itertools.combinations(NAMES, 2) if letters[a] == letters[b]}
    assert alike == {("open_lm_7b", "openlm_7b")}
    # OpenLM's own name for its file finds Meta's
    assert load_model(["model.base=llama2_7b"]) == load_model(["model.base=llama_2_7b"])
    for a, b in [*alike, ("llama_2_7b", "open_lm_llama2_7b")]:
        assert b in comment_of(a)
        assert a in comment_of(b)


def test_architectures_md_lists_every_file_with_its_parameters() -> None:
    rows = re.findall(
        r"^\| `([\w.]+)` \| ([\d,]+) \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(name for name, _, _ in rows) == NAMES
    assert {name: int(count.replace(",", "")) for name, count, _ in rows} == N_PARAMS
    assert {name for name, _, text in rows if "unverified" in text} == UNVERIFIED
