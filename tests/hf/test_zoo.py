"""Every family, into a checkpoint of ours and out again: the same logits, the same config, the same
text. `pytest -m zoo` prints the table of docs/architectures.md at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openlm_lite.eval.generate import generate
from openlm_lite.hf.compare import load_hf, our_logits, probe_tokens
from openlm_lite.hf.export import export_checkpoint
from openlm_lite.hf.families import BY_CLASS
from openlm_lite.hf.importer import import_model
from openlm_lite.hf.native import best_fit
from openlm_lite.hf.source import build_model, open_source
from openlm_lite.model.config import ModelConfig
from tests.hf import zoo
from tests.tiny_run import save_tiny_run, tiny_model

pytestmark = pytest.mark.zoo
TOLERANCE = 1e-5
# the same examples always: rounding of fp32 comes close to the tolerance where weights are centred
SETTINGS = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("hf_class", BY_CLASS)
@SETTINGS
@given(data=st.data(), seed=st.integers(0, 1000))
def test_a_model_of_theirs_computes_the_same_here(
    hf_class: str, data: st.DataObject, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cfg = data.draw(zoo.members(BY_CLASS[hf_class]))
    theirs = zoo.their_model(zoo.write_and_read(hf_class, cfg), seed)
    assert type(theirs).__name__ == hf_class
    tmp = tmp_path_factory.mktemp("in")
    folder = zoo.hub_folder(tmp / "hub", theirs)
    report = import_model(str(folder), str(tmp / "checkpoint"))
    source = open_source(str(tmp / "checkpoint"))
    assert source.cfg == cfg
    ours = our_logits(source.cfg, source.weights)
    with torch.no_grad():
        difference = (theirs(probe_tokens(cfg.vocab_size, cfg.max_seq_len)).logits - ours).abs()
    zoo.note(hf_class, "in", difference.max().item())
    assert ours.abs().max() > 0.1
    assert difference.max() <= TOLERANCE
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= TOLERANCE


@pytest.mark.parametrize("hf_class", BY_CLASS)
@SETTINGS
@given(data=st.data(), seed=st.integers(0, 1000))
def test_a_model_of_ours_computes_the_same_there_and_comes_back(
    hf_class: str, data: st.DataObject, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cfg = data.draw(zoo.members(BY_CLASS[hf_class]))
    tmp = tmp_path_factory.mktemp("out")
    run = save_tiny_run(tmp / "run", tiny_model(cfg, seed), None)
    report = export_checkpoint(str(run), str(tmp / "hf"), hf_class=hf_class, tokenizer="none")
    zoo.note(hf_class, "out", report.max_logit_difference)
    assert report.max_logit_difference <= TOLERANCE
    back = open_source(str(tmp / "hf"))
    assert back.cfg == cfg
    original = open_source(str(run))
    for name, weight in original.weights.items():
        assert torch.equal(back.weights[name], weight), name


ROUND_TRIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "DCLM": ("OlmoeForCausalLM", {"norm": "layer_norm", "qk_norm": "full"}),
    "DCLM, tied": (
        "OlmoeForCausalLM",
        {"norm": "layer_norm", "qk_norm": "full", "tie_embeddings": True},
    ),
    "DCLM, interleaved": (
        "OlmoeForCausalLM",
        {"norm": "layer_norm", "qk_norm": "full", "rope_style": "interleaved"},
    ),
    "gain-only LayerNorm": ("StableLmForCausalLM", {"norm": "layer_norm"}),
    "non-parametric, per head": (
        "Qwen3ForCausalLM",
        {"norm": "layer_norm", "norm_gain": False, "qk_norm": "per_head"},
    ),
    "Llama 2 of OpenLM": ("LlamaForCausalLM", {"rope_style": "interleaved"}),
    "GELU without biases": (
        "GPTNeoXForCausalLM",
        {"norm": "layer_norm", "activation": "gelu", "n_kv_heads": 4, "rotary_pct": 0.5},
    ),
    "parallel, one norm": (
        "GPTNeoXForCausalLM",
        {
            "norm": "layer_norm",
            "norm_bias": True,
            "block": "parallel_shared_norm",
            "activation": "gelu",
            "n_kv_heads": 4,
            "rotary_pct": 0.5,
        },
    ),
}
TINY: dict[str, Any] = dict(
    vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
    max_seq_len=40,
)  # fmt: skip


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_what_a_class_holds_in_another_form_comes_back_as_it_was(case: str, tmp_path: Path) -> None:
    hf_class, changes = ROUND_TRIPS[case]
    cfg = ModelConfig(**{**TINY, **changes})
    run = save_tiny_run(tmp_path / "run", tiny_model(cfg, 3), None)
    out = export_checkpoint(str(run), str(tmp_path / "hf"), tokenizer="none")
    assert (out.hf_class, out.native) == (hf_class, True)
    assert out.rewritten
    zoo.note(f"{hf_class} ({case})", "out", out.max_logit_difference)
    assert out.max_logit_difference <= TOLERANCE
    back = import_model(str(tmp_path / "hf"), str(tmp_path / "back"))
    assert back.max_logit_difference is not None and back.max_logit_difference <= TOLERANCE
    zoo.note(f"{hf_class} ({case})", "in", back.max_logit_difference)
    assert back.notes == []
    returned = open_source(str(tmp_path / "back"))
    assert returned.cfg == cfg
    original = open_source(str(run))
    ours = our_logits(cfg, original.weights)
    assert (our_logits(cfg, returned.weights) - ours).abs().max() <= TOLERANCE
    again = export_checkpoint(str(tmp_path / "back"), str(tmp_path / "hf2"), tokenizer="none")
    assert again.hf_class == hf_class


def test_weights_changed_after_the_export_are_read_as_they_are(tmp_path: Path) -> None:
    """Fine-tuned elsewhere, they are not centred: LayerNorm would compute another model."""
    cfg = ModelConfig(**TINY, norm="layer_norm", qk_norm="full")
    run = save_tiny_run(tmp_path / "run", tiny_model(cfg, 3), None)
    export_checkpoint(str(run), str(tmp_path / "hf"), tokenizer="none")
    model = load_hf(str(tmp_path / "hf"), torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[3] += 0.1
    model.save_pretrained(tmp_path / "tuned")
    report = import_model(str(tmp_path / "tuned"), str(tmp_path / "back"))
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= TOLERANCE
    assert "wo.weight does not have mean zero" in report.notes[0]
    assert open_source(str(tmp_path / "back")).cfg.norm == "rms_norm"


@pytest.mark.parametrize("hf_class", BY_CLASS)
def test_text_is_the_same_here_and_there_with_and_without_cache(
    hf_class: str, tmp_path: Path
) -> None:
    cfg = _member(hf_class)
    run = save_tiny_run(tmp_path / "run", tiny_model(cfg, 5), None)
    export_checkpoint(str(run), str(tmp_path / "hf"), hf_class=hf_class, tokenizer="none")
    source = open_source(str(run))
    model = build_model(source.cfg, source.weights)
    prompt = [5, 17, 200, 3]
    cached = generate(model, [prompt], max_new_tokens=12)[0]
    tokens = list(prompt)
    for _ in range(12):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    assert tokens[4:] == cached
    theirs = load_hf(str(tmp_path / "hf"), torch.float32)
    for use_cache in (True, False):
        text = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, 4, dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
        )
        assert text[0, 4:].tolist() == cached


def _member(hf_class: str) -> ModelConfig:
    """The first example of the family that hypothesis' own order gives."""
    found: list[ModelConfig] = []

    @settings(max_examples=1, database=None, derandomize=True, deadline=None)
    @given(zoo.members(BY_CLASS[hf_class]))
    def draw(cfg: ModelConfig) -> None:
        found.append(cfg)

    draw()
    return found[0]


# --- configs as people publish them --------------------------------------------------------------

SIZES = {
    "llama": dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                  num_attention_heads=4),
    "gpt_neox": dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                     num_attention_heads=2),
    "falcon": dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mpt": dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4),
    "bloom": dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
}  # fmt: skip
SPARSE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_theta": 5e5, "num_key_value_heads": 2, "rope_scaling": None}),
    ("llama", {"rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}),
    ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    (
        "mistral",
        {"sliding_window": 4096, "max_position_embeddings": 4096, "num_attention_heads": 8},
    ),
    ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": False, "sliding_window": 131072}),
    ("qwen3", {"num_key_value_heads": 2}),
    ("olmo", {}),
    ("olmo2", {}),
    ("stablelm", {"num_key_value_heads": 4}),
    ("stablelm", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    ("gpt_neox", {}),
    ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 20000}),
    ("falcon", {}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"multi_query": False, "parallel_attn": False}),
    ("mpt", {}),
    ("mpt", {"attn_config": {"clip_qkv": 0.2}}),
    ("bloom", {}),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 40, "activation_function": "gelu"}),
]


@pytest.mark.parametrize(("kind", "keys"), SPARSE)
def test_a_config_that_leaves_out_what_is_default_means_what_transformers_takes_it_for(
    kind: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    config = {"model_type": kind, **SIZES.get(kind, SIZES["llama"]), **keys}
    theirs = zoo.their_model(config, 1)
    zoo.hub_folder(tmp_path / "hub", theirs)
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    source = open_source(str(tmp_path / "hub"))
    ours = our_logits(source.cfg, source.weights)
    with torch.no_grad():
        logits = theirs(probe_tokens(source.cfg.vocab_size, source.cfg.max_seq_len)).logits
    assert (ours - logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "llama"])
def test_files_without_the_first_part_of_the_names_are_read(kind: str, tmp_path: Path) -> None:
    """GPT-2's and BLOOM's files on the hub are of the model without its head."""
    theirs = zoo.their_model({"model_type": kind, **SIZES[kind], "tie_word_embeddings": True}, 1)
    zoo.hub_folder(tmp_path / "hub", theirs)
    zoo.hub_folder(tmp_path / "base", theirs.base_model)
    whole, base = open_source(str(tmp_path / "hub")), open_source(str(tmp_path / "base"))
    for name, weight in whole.weights.items():
        assert torch.equal(base.weights[name], weight)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type = 'llama3'"),
    ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"num_key_value_heads": 3}, "n_kv_heads = 3"),
    ("llama", {"hidden_size": "32"}, "hidden_size = '32'"),
    ("mistral", {"sliding_window": 16}, "sliding_window = 16"),
    ("mistral", {}, "sliding_window = 4096"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("olmoe", {}, "num_experts = 64"),
    ("stablelm", {"qk_layernorm": True, "num_key_value_heads": 4}, "qk_layernorm = True"),
    ("falcon", {"alibi": True}, "alibi = True"),
    ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi = False"),
    ("mpt", {"logit_scale": 0.5}, "logit_scale = 0.5"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm = True"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx = True"),
    ("mamba", {}, "model_type = 'mamba' is not known here"),
]


@pytest.mark.parametrize(("kind", "keys", "message"), REFUSED)
def test_what_a_config_says_and_we_do_not_compute_is_refused_by_its_key(
    kind: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from openlm_lite.errors import InputError

    config = {"model_type": kind, **SIZES.get(kind, SIZES["llama"]), **keys}
    if kind == "mistral":
        config["max_position_embeddings"] = 32768
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        import_model(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_imported_model_goes_back_to_its_own_class(tmp_path: Path) -> None:
    """Llama and Mistral hold the same architecture."""
    sizes = {**SIZES["llama"], "num_key_value_heads": 2}
    keys = {"model_type": "mistral", **sizes, "sliding_window": None}
    zoo.hub_folder(tmp_path / "hub", zoo.their_model(keys, 1))
    import_model(str(tmp_path / "hub"), str(tmp_path / "checkpoint"))
    cfg = open_source(str(tmp_path / "checkpoint")).cfg
    assert best_fit(cfg).family.hf_class == "LlamaForCausalLM"
    report = export_checkpoint(str(tmp_path / "checkpoint"), str(tmp_path / "hf"), tokenizer="none")
    assert report.hf_class == "MistralForCausalLM"
