"""The bundled transformers classes compute what our model and OpenLM compute, in every way that
transformers runs them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache

from openlm_lite.hf import OpenLMConfig, OpenLMForCausalLM, OpenLMModel
from openlm_lite.hf.openlm_fields import model_fields
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer
from tests.model.test_openlm_parity import VARIANTS

TOLERANCE = 1e-5
BACKENDS = ["sdpa", "eager"]
POSITIONS = ["rope", "alibi", "learned", "none"]
TINY = ModelConfig(
    vocab_size=97,
    d_model=24,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    d_ff=40,
    max_seq_len=40,
    norm="layer_norm",
    qk_norm="full",
)

# --- our names, and theirs -----------------------------------------------------------------------

_RENAMED = {
    "position_embedding.": "model.position_embeddings.",
    "embedding_norm.": "model.post_embed_norm.",
    "embedding.": "model.tok_embeddings.",
    "layers.": "model.layers.",
    "norm.": "model.norm.",
    "output.": "model.output.",
}


def bundled_state(cfg: ModelConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by the names of the bundled class, q, k, v and gate, up in one matrix."""
    down, up = "w_down", "w_up"
    table = {"wo": "out_proj"}
    if cfg.activation == "swiglu":
        table |= {down: "w3"}
    elif cfg.is_gated:
        table |= {"w_gate": "gate_proj", up: "up_proj", down: "down_proj"}
    else:
        table |= {up: "0", down: "2"}
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        start = next(old for old in _RENAMED if name.startswith(old))
        words = (_RENAMED[start] + name.removeprefix(start)).split(".")
        if words[-2] in ("wk", "wv") or (words[-2] == "w_up" and cfg.activation == "swiglu"):
            continue
        fused = {"wq": ("in_proj", ["wq", "wk", "wv"]), "w_gate": ("w12", ["w_gate", "w_up"])}
        if words[-2] == "wq" or (words[-2] == "w_gate" and cfg.activation == "swiglu"):
            new, parts = fused[words[-2]]
            tensor = torch.cat([ours[name.replace(words[-2], part)] for part in parts])
            words[-2] = new
        words[-2] = table.get(words[-2], words[-2])
        theirs[".".join(words)] = tensor
    if cfg.tie_embeddings:
        theirs["model.output.weight"] = theirs["model.tok_embeddings.weight"]
    return theirs


def our_model(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """Random weights; gains and biases too, so that a missing one shows."""
    model = Transformer(cfg)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return model.eval()


def bundled(model: Transformer, backend: str = "sdpa") -> OpenLMForCausalLM:
    fields = dataclasses.asdict(model.cfg)
    theirs = OpenLMForCausalLM(OpenLMConfig(**fields, attn_implementation=backend))
    theirs.load_state_dict(bundled_state(model.cfg, model.state_dict()))
    theirs.generation_config.eos_token_id = None
    return theirs.eval()


def tiny(backend: str = "sdpa", **changes: Any) -> OpenLMForCausalLM:
    return bundled(our_model(dataclasses.replace(TINY, **changes)), backend)


def tokens(vocab_size: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@st.composite
def architectures(draw: st.DrawFn) -> ModelConfig:
    norm = draw(st.sampled_from(["layer_norm", "rms_norm"]))
    n_kv_heads = draw(st.integers(1, 3))
    head_dim, rotary_pct = draw(st.sampled_from([(4, 1.0), (6, 1.0), (8, 0.25), (10, 0.4)]))
    return ModelConfig(
        vocab_size=draw(st.integers(5, 40)),
        d_model=draw(st.integers(16, 28)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=draw(st.integers(16, 40)),
        max_seq_len=16,
        block=draw(
            st.sampled_from(
                ["sequential", "sequential_post_norm", "parallel", "parallel_shared_norm"]
            )
        ),
        norm=norm,
        norm_gain=draw(st.booleans()),
        norm_bias=norm == "layer_norm" and draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
        qk_norm=draw(st.sampled_from(["none", "full", "per_head"])),
        embedding_norm=draw(st.booleans()),
        activation=draw(st.sampled_from(["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"])),
        mlp_bias=draw(st.booleans()),
        attn_bias=draw(st.sampled_from(["none", "qkv", "all"])),
        clip_qkv=draw(st.sampled_from([None, 0.5])),
        positions=draw(st.sampled_from(POSITIONS)),
        rope_theta=draw(st.sampled_from([10_000.0, 500.0])),
        rotary_pct=rotary_pct,
        rope_style=draw(st.sampled_from(["half", "interleaved"])),
        rope_freq_dtype=draw(st.sampled_from(["fp32", "bf16"])),
        alibi_bias_max=draw(st.sampled_from([8.0, 4.0])),
        tie_embeddings=draw(st.booleans()),
    )


# --- the same numbers as ours --------------------------------------------------------------------


# Always the same examples, and widths from 16: a norm over three features, which are near zero now
# and then, enlarges fp32 rounding to 5e-5.
@settings(max_examples=80, deadline=None, derandomize=True)
@given(cfg=architectures(), seed=st.integers(0, 1000))
def test_every_architecture_has_our_logits(cfg: ModelConfig, seed: int) -> None:
    ours = our_model(cfg, seed)
    ids = tokens(cfg.vocab_size, 2, 11, seed=seed)
    with torch.no_grad():
        expected = ours(ids)
        for backend in BACKENDS:
            theirs = bundled(ours, backend)
            assert theirs.num_parameters() == cfg.n_params
            assert not list(theirs.buffers())
            logits = theirs(ids).logits
            assert logits.dtype == torch.float32
            assert distance(logits, expected) <= TOLERANCE


def test_bfloat16_weights_are_turned_by_fp32_angles() -> None:
    cfg = dataclasses.replace(TINY, max_seq_len=4096)
    model = bundled(our_model(cfg))
    ids = tokens(cfg.vocab_size, 1, 3000)
    tables: list[Tensor] = []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: tables.extend((args[0], *args[1])))
    with torch.no_grad():
        exact = model(ids, logits_to_keep=200).logits
        tables.clear()
        near = model.bfloat16()(ids, logits_to_keep=200).logits
    x, cos, sin = tables
    assert x.dtype == torch.bfloat16 and near.dtype == cos.dtype == torch.float32
    frequencies = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.arange(3000, dtype=torch.float64)[:, None] * frequencies
    assert distance(cos[0, :, :4].double(), angles.cos()) < 1e-3
    assert distance(sin[0, :, 4:].double(), angles.sin()) < 1e-3
    assert distance(near, exact) < 0.1


# --- the same numbers as OpenLM's ----------------------------------------------------------------


def load_variant(folder: Path, backend: str) -> OpenLMForCausalLM:
    """OpenLM's tensors under their own names, behind `model.` only."""
    config = json.loads((folder / "config.json").read_text())["open_lm_config"]
    model = OpenLMForCausalLM(OpenLMConfig(**config, attn_implementation=backend))
    state = {f"model.{k}": v for k, v in load_file(folder / "state_dict.safetensors").items()}
    state = {k: v for k, v in state.items() if "inv_freq" not in k and "_ff_w" not in k}
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_logits(shared_data: Path, variant: str, backend: str) -> None:
    folder = shared_data / "openlm" / variant
    io = load_file(folder / "io.safetensors")
    with torch.no_grad():
        logits = load_variant(folder, backend)(io["inputs"]).logits
    assert distance(logits, io["logits"]) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["dclm", "rms_norm_qk"])
def test_reference_logits_of_a_left_padded_batch(
    shared_data: Path, variant: str, backend: str
) -> None:
    folder = shared_data / "openlm" / variant
    inputs = load_file(folder / "io.safetensors")["inputs"]
    masked = load_file(folder / "masked_last16.safetensors")
    with torch.no_grad():
        model = load_variant(folder, backend)
        logits = model(inputs, attention_mask=masked["attention_mask"], logits_to_keep=16).logits
    assert distance(logits, masked["logits"]) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_folder_that_openlm_wrote_loads_as_it_is(shared_data: Path, backend: str) -> None:
    folder = shared_data / "openlm" / "hf_dclm_tiny"
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=backend, output_loading_info=True
    )
    assert isinstance(model, OpenLMForCausalLM)
    assert not any(info.values()), info
    io = load_file(folder / "reference_io.safetensors")
    with torch.no_grad():
        out = model(io["inputs"], labels=io["inputs"])
        greedy = model.generate(io["greedy_prompt"], max_new_tokens=24, do_sample=False)
    assert distance(out.logits, io["logits"]) <= TOLERANCE
    assert out.loss.item() == pytest.approx(io["hf_loss_labels_eq_inputs"].item(), abs=TOLERANCE)
    assert torch.equal(greedy, io["greedy_24"])


def test_gelu_weights_load_under_either_of_openlms_names_or_both(
    shared_data: Path, tmp_path: Path
) -> None:
    variant = shared_data / "openlm" / "dclm_gelu"
    config = json.loads((variant / "config.json").read_text())["open_lm_config"]
    tensors = {f"model.{k}": v for k, v in load_file(variant / "state_dict.safetensors").items()}
    io = load_file(variant / "io.safetensors")
    for left_out in ("_ff_w", "feed_forward.", "nothing"):
        folder = tmp_path / left_out.strip("._")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "openlm"}))
        kept = {k: v for k, v in tensors.items() if left_out not in k}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        model, info = OpenLMForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), (left_out, info)
        model.save_pretrained(folder / "again")
        again = OpenLMForCausalLM.from_pretrained(folder / "again")
        base = AutoModel.from_pretrained(folder)
        with torch.no_grad():
            assert distance(model(io["inputs"]).logits, io["logits"]) <= TOLERANCE
            assert distance(again(io["inputs"]).logits, io["logits"]) <= TOLERANCE
            states = base(io["inputs"]).last_hidden_state
            assert distance(states @ tensors["model.output.weight"].t(), io["logits"]) <= TOLERANCE


# --- caches, padding, generation -----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_cache_changes_nothing(positions: str, backend: str) -> None:
    model = tiny(backend, positions=positions)
    ids = tokens(97, 2, 14)
    with torch.no_grad():
        full = model(ids, use_cache=False)
        assert full.past_key_values is None
        static = StaticCache(config=model.config, max_cache_len=20)
        for cache in (None, static):
            parts = []
            for piece in ids.split([5, 1, 4, 1, 3], dim=1):
                out = model(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            assert distance(torch.cat(parts, 1), full.logits) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_generation_is_the_same_with_any_cache_and_for_a_left_padded_batch(
    positions: str, backend: str
) -> None:
    model = tiny(backend, positions=positions)
    short, long = tokens(97, 1, 4, seed=2), tokens(97, 1, 9, seed=3)
    padded = torch.cat([F.pad(short, (5, 0), value=7), long])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    greedy = {"max_new_tokens": 12, "do_sample": False}
    alone = [model.generate(ids, use_cache=False, **greedy)[0, -12:] for ids in (short, long)]
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        batch = model.generate(padded, attention_mask=mask, **greedy, **options)
        assert torch.equal(batch[:, -12:], torch.stack(alone)), options
        assert torch.equal(model.generate(long, **greedy, **options)[0, -12:], alone[1])
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
        assert logits.isfinite().all()
        assert distance(logits[0, 5:], model(short).logits[0]) <= TOLERANCE
        right = model(padded.flip(1), attention_mask=mask.flip(1)).logits
        assert distance(right[0, :4], model(short.flip(1)).logits[0]) <= TOLERANCE


def test_sampling_and_beams_run_with_cache_as_without() -> None:
    model = tiny()
    prompt = tokens(97, 2, 5)
    sampling = {"do_sample": True, "top_p": 0.8, "temperature": 0.8, "repetition_penalty": 1.1}
    for options in (sampling, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}):
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            out = model.generate(prompt, max_new_tokens=10, use_cache=use_cache, **options)
            runs.append(out)
        assert runs[0].shape == (2, 15)
        assert torch.equal(*runs), options


def test_embeddings_may_be_given_in_place_of_tokens() -> None:
    model = tiny(positions="learned", embedding_norm=True)
    ids = tokens(97, 2, 6)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    continued = model.generate(ids, **options)[:, 6:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), continued)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**wrong)


def test_a_mask_of_four_dimensions_is_taken_as_it_is() -> None:
    ids = tokens(97, 1, 6)
    blocks = torch.tensor([0, 0, 0, 1, 1, 1])
    seen = (blocks[:, None] == blocks) & torch.ones(6, 6, dtype=torch.bool).tril()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    for backend in BACKENDS:
        model = tiny(backend)
        with torch.no_grad():
            packed = model(ids, attention_mask=seen[None, None], position_ids=positions).logits
            apart = torch.cat([model(part).logits for part in ids.split(3, dim=1)], dim=1)
        assert distance(packed, apart) <= TOLERANCE


def test_the_backend_can_be_changed_on_a_loaded_model() -> None:
    model, ids = tiny("sdpa"), tokens(97, 2, 7)
    with torch.no_grad():
        before = model(ids).logits
        model.set_attn_implementation("eager")
        out = model(ids, output_attentions=True)
    assert len(out.attentions) == 2
    assert distance(out.logits, before) <= TOLERANCE


# --- what a forward pass gives -------------------------------------------------------------------


def test_hidden_states_attentions_and_tuples() -> None:
    ids = tokens(97, 2, 7)
    model = tiny("eager")
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_attentions=True)
        base = model.model(ids)
        as_tuple = model(ids, return_dict=False, use_cache=False)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(out.hidden_states[-1], base.last_hidden_state)
    assert base.hidden_states is base.attentions is None
    for weights in out.attentions:
        assert weights.shape == (2, 6, 7, 7)
        assert distance(weights.sum(-1), torch.ones(2, 6, 7)) < 1e-6
        assert weights.triu(diagonal=1).abs().max() == 0
    assert len(as_tuple) == 1 and torch.equal(as_tuple[0], out.logits)
    with pytest.raises(ValueError, match=r"'sdpa' keeps no attentions.*'eager'"):
        tiny("sdpa")(ids, output_attentions=True)


def test_only_the_logits_that_are_asked_for() -> None:
    model, ids = tiny(), tokens(97, 2, 7)
    with torch.no_grad():
        full = model(ids).logits
        assert distance(model(ids, logits_to_keep=2).logits, full[:, -2:]) <= TOLERANCE
        chosen = torch.tensor([0, 3])
        assert distance(model(ids, logits_to_keep=chosen).logits, full[:, chosen]) <= TOLERANCE


def test_labels_give_the_mean_cross_entropy_of_the_next_token() -> None:
    model, ids = tiny(), tokens(97, 2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_gives_the_same_gradients(backend: str) -> None:
    ids = tokens(97, 2, 9)
    gradients = []
    for checkpointing, n_runs in ((False, 2), (True, 4)):
        model = tiny(backend, tie_embeddings=True).train()
        if checkpointing:  # transformers 5.23 renamed it
            old = getattr(model, "gradient_checkpointing_enable", None)
            getattr(model, "activation_checkpointing_enable", old)()
        runs: list[None] = []
        for layer in model.model.layers:
            layer.attention.register_forward_hook(lambda *_, runs=runs: runs.append(None))
        model(ids, labels=ids).loss.backward()
        assert len(runs) == n_runs
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, tied: bool) -> None:
    model = tiny(tie_embeddings=tied, attn_bias="all", activation="geglu", mlp_bias=True)
    ids = tokens(97, 2, 9)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    stored = load_file(tmp_path / "one" / "model.safetensors")
    assert ("model.output.weight" in stored) == (not tied)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    written = json.loads((tmp_path / "one" / "config.json").read_text())
    cfg = ModelConfig(**model_fields(written))
    assert {k: written[k] for k in dataclasses.asdict(cfg)} == dataclasses.asdict(cfg)
    assert cfg.n_params == model.num_parameters()
    for folder in ("one", "many"):
        again, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, output_loading_info=True
        )
        assert not any(info.values()), info
        with torch.no_grad():
            assert torch.equal(again(ids).logits, expected)
        weight = again.get_output_embeddings().weight
        assert (weight is again.get_input_embeddings().weight) == tied
        base, info = AutoModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert isinstance(base, OpenLMModel) and not any(info.values()), info
        with torch.no_grad():
            assert torch.equal(base(ids).last_hidden_state @ weight.t(), expected)


def test_a_tied_file_may_hold_the_head_in_place_of_the_table(tmp_path: Path) -> None:
    model = tiny(tie_embeddings=True)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.output.weight"] = stored.pop("model.tok_embeddings.weight")
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = tokens(97, 1, 9)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_stored_precision_is_kept_and_another_one_may_be_asked_for(tmp_path: Path) -> None:
    tiny().bfloat16().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_grows(tied: bool) -> None:
    model, ids = tiny(tie_embeddings=tied), tokens(97, 1, 9)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(101, mean_resizing=False)
        after = model(torch.cat([ids, torch.tensor([[100]])], dim=1)).logits
    assert model.config.vocab_size == 101 and after.shape == (1, 10, 101)
    assert distance(after[:, :9, :97], before) <= TOLERANCE
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (head is table) == tied and head.shape == (101, 24)


def test_a_fresh_model_is_initialised_and_one_with_a_missing_weight_says_so(tmp_path: Path) -> None:
    config = AutoConfig.for_model("openlm", **dataclasses.asdict(TINY))
    model = AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert p.eq(1).all()
        else:
            assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.2), name
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.0.attention.in_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = OpenLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.0.attention.in_proj.weight"}
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="needs accelerate")
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map(tmp_path: Path, device_map: str) -> None:
    model, ids = tiny(), tokens(97, 1, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    with torch.no_grad():
        logits = again(ids.to(again.device)).logits.cpu()
    assert distance(logits, model(ids).logits) <= TOLERANCE


# --- the config ----------------------------------------------------------------------------------


def test_transformers_names_and_ours_are_the_same_attributes() -> None:
    config = OpenLMConfig(**dataclasses.asdict(TINY))
    shared = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
    shared |= {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 40}
    for name, value in shared.items():
        assert getattr(config, name) == value
    config.tie_word_embeddings = True
    assert config.tie_embeddings is True
    ours = dataclasses.asdict(TINY) | {"tie_embeddings": True}
    assert model_fields(config.to_dict()) == ours
    assert OpenLMConfig(**config.to_dict()).to_dict() == config.to_dict()
    renamed = {k: v for k, v in ours.items() if k != "d_model"} | {"hidden_size": 24}
    assert OpenLMConfig(**renamed).d_model == 24
    with pytest.raises(ValueError, match=r"d_model = 24 and hidden_size = 25 contradict"):
        OpenLMConfig(**ours, hidden_size=25)


def test_openlms_weight_tying_decides_whatever_transformers_default_says() -> None:
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 4, "seq_len": 8, "vocab_size": 16}
    for ties in (False, True):
        config = OpenLMConfig(**sizes, weight_tying=ties, tie_word_embeddings=not ties)
        assert config.tie_word_embeddings is config.tie_embeddings is ties
        assert not {"dim", "seq_len", "weight_tying"} & set(config.to_dict())


# --- refusals ------------------------------------------------------------------------------------


def test_a_padding_mask_that_does_not_cover_the_cache_is_refused() -> None:
    model, ids = tiny(), tokens(97, 1, 6)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"covers 6 positions, must cover all 12"):
        model(ids, past_key_values=cache, attention_mask=torch.ones(1, 6))


def test_more_positions_than_were_learned_are_refused() -> None:
    model = tiny(positions="learned")
    with pytest.raises(ValueError, match=r"position 40 is beyond the last learned one, 39"):
        model(tokens(97, 1, 41))


def test_alibi_wants_a_backend_and_a_mask_that_can_hold_it() -> None:
    model, ids = tiny(positions="alibi"), tokens(97, 1, 6)
    with pytest.raises(ValueError, match=r"4 dimensions: with ALiBi"):
        model(ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"'flash_attention_2' cannot add ALiBi.*'sdpa' or 'eager'"
    ):
        model(ids)


def test_what_neither_openlm_nor_we_have_is_refused(tmp_path: Path) -> None:
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 4, "seq_len": 8, "vocab_size": 16}
    given = sizes | {"model_type": "openlm", "moe_freq": 2}
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=r"moe_freq = 2: a mixture of experts"):
        AutoModelForCausalLM.from_pretrained(os.fspath(tmp_path))
