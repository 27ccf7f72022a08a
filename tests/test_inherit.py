"""Starting from another model: which weights come from where, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from openlm_lite import config
from openlm_lite.cli import main
from openlm_lite.errors import InputError
from openlm_lite.hf.source import Source
from openlm_lite.hf.weights import Weights
from openlm_lite.inherit import InitFrom, describe, inherit, source_names
from openlm_lite.model.config import ModelConfig
from openlm_lite.model.init import init_weights
from openlm_lite.model.transformer import Transformer
from openlm_lite.run import load_run
from tests.tiny_run import tiny_config, tiny_model

COMPONENTS = ("embeddings", "attention", "feed_forward", "norms", "final_norm", "head")


def source_of(model: Transformer, **wrong: Tensor) -> Source:
    """`model` as a source, some tensors not what was announced."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    weights = Weights("runs/there", shapes, (tensors | wrong).__getitem__)
    return Source("runs/there", "checkpoint", model.cfg, weights, {"step": 7}, notes=("a note",))


def fresh(cfg: ModelConfig) -> dict[str, Tensor]:
    model = Transformer(cfg)
    init_weights(model, seed=1)
    return dict(model.state_dict())


def inherited(cfg: ModelConfig, source: Source, **changes: Any) -> dict[str, Tensor]:
    """The weights of a model of seed 1 after `inherit`."""
    model = Transformer(cfg)
    init_weights(model, seed=1)
    inherit(model, InitFrom(path="runs/there", **changes), source)
    return dict(model.state_dict())


def layer(weights: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    start = f"layers.{i}."
    return {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def outside_blocks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: w for name, w in weights.items() if not name.startswith("layers.")}


EVERYTHING = tiny_config(
    n_layers=4, positions="learned", embedding_norm=True, norm_bias=True, mlp_bias=True,
    attn_bias="all",
)  # fmt: skip


# --------------------------------------------------------------------------------------------
# What is taken


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_first_k_layers_are_the_sources_and_nothing_else_changes(k: int) -> None:
    there = tiny_model(tiny_config(n_layers=4), seed=5)
    here = replace(there.cfg, n_layers=k)
    found = inherited(here, source_of(there), layers=(f"0-{k - 1}",), final_norm=False)
    theirs, untouched = there.state_dict(), fresh(here)
    for i in range(k):
        assert equal(layer(found, i), layer(theirs, i))
    for name in ("embedding.weight", "output.weight"):
        assert torch.equal(found[name], theirs[name])
    assert torch.equal(found["norm.weight"], untouched["norm.weight"])
    assert not torch.equal(found["norm.weight"], theirs["norm.weight"])


def test_without_a_map_all_weights_are_the_sources() -> None:
    there = tiny_model(EVERYTHING, seed=5)
    assert equal(inherited(EVERYTHING, source_of(there)), there.state_dict())


@st.composite
def layer_maps(draw: st.DrawFn) -> tuple[tuple[int | str, ...], list[int | None]]:
    """A map as a user writes it, and the source's layer (of four) for each layer."""
    words: list[int | str] = []
    expected: list[int | None] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["number", "range", "new"]))
        if kind == "new":
            words.append("new")
            expected.append(None)
        elif kind == "number":
            words.append(draw(st.integers(0, 3)))
            expected.append(words[-1])  # pyright: ignore[reportArgumentType]
        else:
            first = draw(st.integers(0, 3))
            last = draw(st.integers(first, 3))
            words.append(f"{first}-{last}")
            expected += range(first, last + 1)
    return tuple(words), expected


@settings(max_examples=30, deadline=None)
@given(layer_maps())
def test_every_map_puts_the_layers_where_it_says(
    drawn: tuple[tuple[int | str, ...], list[int | None]],
) -> None:
    words, expected = drawn
    there = tiny_model(tiny_config(n_layers=4, d_model=8, d_ff=8, vocab_size=16), seed=5)
    here = replace(there.cfg, n_layers=len(expected))
    found, untouched = inherited(here, source_of(there), layers=words), fresh(here)
    for i, of in enumerate(expected):
        origin = layer(untouched, i) if of is None else layer(there.state_dict(), of)
        assert equal(layer(found, i), origin)


def test_depth_up_scaling_repeats_the_middle_layers() -> None:
    there = tiny_model(tiny_config(n_layers=4), seed=5)
    source, reads = source_of(there), []
    shapes = source.weights.shapes
    counted = Weights("", shapes, lambda name: (reads.append(name), source.weights[name])[1])
    here = replace(there.cfg, n_layers=6)
    found = inherited(here, replace(source, weights=counted), layers=("0-2", "1-3"))
    for i, of in enumerate((0, 1, 2, 1, 2, 3)):
        assert equal(layer(found, i), layer(there.state_dict(), of))
    assert len(reads) == len(set(reads)) == len(source.weights)  # once, however often used


def test_growth_is_the_same_call_with_a_larger_k() -> None:
    there = tiny_model(tiny_config(n_layers=4), seed=5)
    two = inherited(replace(there.cfg, n_layers=2), source_of(there), layers=("0-1",))
    three = inherited(replace(there.cfg, n_layers=3), source_of(there), layers=("0-2",))
    for i in range(2):
        assert equal(layer(two, i), layer(three, i))
    assert equal(layer(three, 2), layer(there.state_dict(), 2))


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_that_is_off_stays_fresh_and_alone_is_all_that_is_taken(component: str) -> None:
    there = tiny_model(EVERYTHING, seed=5)
    theirs, untouched = there.state_dict(), fresh(EVERYTHING)
    belongs = {
        "embeddings": r"embedding|position_embedding",
        "attention": r"layers\.\d\.attention\.",
        "feed_forward": r"layers\.\d\.feed_forward\.",
        "norms": r"layers\.\d\.(attention|ffn)_norm\.",
        "final_norm": r"norm\.",
        "head": r"output\.",
    }
    without = inherited(EVERYTHING, source_of(there), **{component: False})
    alone = inherited(EVERYTHING, source_of(there), **{c: c == component for c in COMPONENTS})
    for name in theirs:
        is_in = re.match(belongs[component], name) is not None
        assert torch.equal(without[name], untouched[name] if is_in else theirs[name])
        assert torch.equal(alone[name], theirs[name] if is_in else untouched[name])


def test_weights_become_fp32_and_wrapped_blocks_are_found() -> None:
    there = tiny_model(tiny_config(), seed=5)
    source = source_of(there.bfloat16())
    here = Transformer(there.cfg)
    init_weights(here, seed=1)
    for i, block in enumerate(here.layers):
        here.layers[i] = checkpoint_wrapper(block)
    here.layers[1] = nn.ModuleDict({"_orig_mod": here.layers[1]})  # the names of torch.compile's
    inherit(here, InitFrom(path="x"), source)
    for name, parameter in here.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, there.get_parameter(name).float())


def test_a_tied_source_fills_both_tables() -> None:
    there = tiny_model(tiny_config(tie_embeddings=True), seed=5)
    here = replace(there.cfg, tie_embeddings=False)
    found = inherited(here, source_of(there))
    assert torch.equal(found["embedding.weight"], there.embedding.weight)
    assert torch.equal(found["output.weight"], there.embedding.weight)


@pytest.mark.parametrize(
    ("dropped", "taken"), [("head", "embedding.weight"), ("embeddings", "output.weight")]
)
def test_a_tied_model_takes_one_table_of_an_untied_source(dropped: str, taken: str) -> None:
    there = tiny_model(tiny_config(), seed=5)
    here = replace(there.cfg, tie_embeddings=True)
    found = inherited(here, source_of(there), **{dropped: False})
    assert torch.equal(found["embedding.weight"], there.get_parameter(taken))
    with pytest.raises(InputError, match=r"tie_embeddings: .* take one of"):
        inherited(here, source_of(there))


def test_a_tied_table_is_taken_with_the_head_alone() -> None:
    """Inheritune's GPT-2: the head comes along, the table of positions does not."""
    there = tiny_model(tiny_config(tie_embeddings=True, positions="learned"), seed=5)
    found = inherited(there.cfg, source_of(there), embeddings=False)
    assert torch.equal(found["embedding.weight"], there.embedding.weight)
    assert torch.equal(
        found["position_embedding.weight"], fresh(there.cfg)["position_embedding.weight"]
    )


def test_the_record_says_what_was_taken() -> None:
    there = tiny_model(tiny_config(n_layers=4), seed=5)
    here = Transformer(replace(there.cfg, n_layers=3, rope_theta=5e5, max_seq_len=256))
    init = InitFrom(path="x", layers=("2-3", "new"), final_norm=False)
    record = inherit(here, init, source_of(there))
    n_layer = sum(p.numel() for p in here.layers[0].parameters())
    assert json.loads(json.dumps(record)) == record == {
        "path": "runs/there",
        "kind": "checkpoint",
        "facts": {"step": 7},
        "optimizer": False,
        "data": "restart",
        "notes": ["a note"],
        "layers": [2, 3, "new"],
        "components": [c for c in COMPONENTS if c != "final_norm"],
        "differences": {"rope_theta": [1e4, 5e5], "max_seq_len": [64, 256]},
        "n_params_taken": here.cfg.n_params - n_layer - here.cfg.d_model,
        "n_params_fresh": n_layer + here.cfg.d_model,
        "lineage": [{"path": "runs/there", "kind": "checkpoint", "step": 7, "tokens": None}],
        "tokens_before": None,
    }  # fmt: skip
    lines = list(describe(record, init))
    assert "weights from runs/there (checkpoint): embeddings, attention" in lines[0]
    assert "layers 2-3, new; " in lines[0]
    assert lines[1:] == [
        "lineage: runs/there (checkpoint); an unknown number of tokens seen before",
        "optimizer state fresh; step and place in the data: begins anew",
        "a note",
        "model.rope_theta differs from the source's: 10000.0 there, 500000.0 here",
        "model.max_seq_len differs from the source's: 64 there, 256 here",
    ]


# --------------------------------------------------------------------------------------------
# What is refused


def test_all_fields_that_differ_are_named_at_once_and_nothing_is_touched() -> None:
    there = tiny_model(tiny_config(), seed=5)
    here = Transformer(
        replace(there.cfg, d_ff=64, norm="rms_norm", vocab_size=400, rope_style="interleaved")
    )
    init_weights(here, seed=1)
    with pytest.raises(InputError) as caught:
        inherit(here, InitFrom(path="x"), source_of(there))
    assert str(caught.value).splitlines() == [
        "model.init_from: runs/there (checkpoint) does not fit the model here:",
        "  vocab_size: 320 there, 400 here (embeddings, head)",
        "  d_ff: 48 there, 64 here (feed_forward)",
        "  norm: layer_norm there, rms_norm here (attention, norms, final_norm)",
        "  rope_style: half there, interleaved here (attention)",
        "change the model's fields, or take less (model.init_from.NAME=false)",
    ]
    assert equal(here.state_dict(), fresh(here.cfg))


# field -> (changes there, changes here, components that may still be taken)
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "d_model": ({}, {"d_model": 16}, set()),
    "vocab_size": ({}, {"vocab_size": 400}, {"attention", "feed_forward", "norms", "final_norm"}),
    "n_heads": ({}, {"n_heads": 2}, {*COMPONENTS} - {"attention"}),
    "n_kv_heads": ({}, {"n_kv_heads": 4}, {*COMPONENTS} - {"attention"}),
    "head_dim": ({}, {"head_dim": 16}, {*COMPONENTS} - {"attention"}),
    "d_ff": ({}, {"d_ff": 64}, {*COMPONENTS} - {"feed_forward"}),
    "block": ({}, {"block": "parallel"}, {"embeddings", "final_norm", "head"}),
    "norm_gain": ({}, {"norm_gain": False}, {"embeddings", "feed_forward", "head"}),
    "norm_bias": ({}, {"norm_bias": True}, {"embeddings", "feed_forward", "head"}),
    "norm_eps": ({}, {"norm_eps": 1e-6}, {"embeddings", "feed_forward", "head"}),
    "qk_norm": ({}, {"qk_norm": "per_head"}, {*COMPONENTS} - {"attention"}),
    "embedding_norm": ({}, {"embedding_norm": True}, {*COMPONENTS} - {"embeddings"}),
    "activation": ({}, {"activation": "geglu"}, {*COMPONENTS} - {"feed_forward"}),
    "mlp_bias": ({}, {"mlp_bias": True}, {*COMPONENTS} - {"feed_forward"}),
    "attn_bias": ({}, {"attn_bias": "qkv"}, {*COMPONENTS} - {"attention"}),
    "clip_qkv": ({}, {"clip_qkv": 8.0}, {*COMPONENTS} - {"attention"}),
    "positions": ({}, {"positions": "learned"}, {*COMPONENTS} - {"attention", "embeddings"}),
    "rotary_pct": ({}, {"rotary_pct": 0.5}, {*COMPONENTS} - {"attention"}),
    "rope_style": ({}, {"rope_style": "interleaved"}, {*COMPONENTS} - {"attention"}),
    "rope_freq_dtype": ({}, {"rope_freq_dtype": "bf16"}, {*COMPONENTS} - {"attention"}),
    "alibi_bias_max": (
        {"positions": "alibi"},
        {"alibi_bias_max": 16.0},
        {*COMPONENTS} - {"attention"},
    ),
    "norm": ({}, {"norm": "rms_norm"}, {"embeddings", "feed_forward", "head"}),
    "max_seq_len": (
        {"positions": "learned"},
        {"max_seq_len": 128},
        {*COMPONENTS} - {"embeddings"},
    ),
}


@pytest.mark.parametrize("field", DIFFERENCES)
def test_a_field_matters_to_the_components_whose_weights_it_decides(field: str) -> None:
    changes_there, changes_here, unaffected = DIFFERENCES[field]
    there = tiny_model(tiny_config(**changes_there), seed=5)
    here = replace(there.cfg, **changes_here)
    for component in COMPONENTS:
        only = {c: c == component for c in COMPONENTS}
        if component in unaffected:
            inherited(here, source_of(there), **only)
        else:
            with pytest.raises(InputError, match=rf"\n  {field}: .* \({component}\)\n"):
                inherited(here, source_of(there), **only)


def test_every_architecture_field_is_compared_or_allowed_to_differ() -> None:
    names = {f.name for f in ModelConfig.__dataclass_fields__.values()}
    elsewhere = {"n_layers", "tie_embeddings", "rope_theta"}  # by the map, by its own rule, logged
    assert DIFFERENCES.keys() | elsewhere == names


def test_fewer_layers_there_need_a_map_and_a_map_needs_its_layers() -> None:
    there = source_of(tiny_model(tiny_config(n_layers=2), seed=5))
    here = tiny_config(n_layers=3)
    with pytest.raises(InputError, match=r"n_layers: 2 there, 3 here; say in model\.init_from\."):
        inherited(here, there)
    with pytest.raises(InputError, match="layers: 2, 7 not there: it has layers 0 to 1"):
        inherited(here, there, layers=(0, 2, 7))
    only = {c: c in ("embeddings", "head") for c in COMPONENTS}
    inherited(here, there, **only)  # no block is taken: no map is needed


def test_a_source_that_lacks_what_its_architecture_has_is_refused() -> None:
    there = tiny_model(tiny_config(), seed=5)
    source = source_of(there)
    shapes = dict(source.weights.shapes) | {"norm.weight": (7,)}
    del shapes["layers.1.attention.wq.weight"]
    source = replace(source, weights=Weights("", shapes, source.weights.__getitem__))
    with pytest.raises(InputError) as caught:
        source_names(InitFrom(path="x"), there.cfg, source)
    assert "  layers.1.attention.wq.weight: absent there, expected (32, 32)\n" in str(caught.value)
    assert "  norm.weight: (7,) there, expected (32,)\n" in str(caught.value)


def test_whole_numbers_are_no_weights() -> None:
    there = tiny_model(tiny_config(), seed=5)
    bad = {"norm.weight": torch.ones(32, dtype=torch.int64)}
    with pytest.raises(InputError, match=r"runs/there: tensor norm\.weight holds torch\.int64"):
        inherited(there.cfg, source_of(there, **bad))


# --------------------------------------------------------------------------------------------
# In a recipe


def init_of(recipe: Path, *words: str) -> InitFrom:
    return load_run(str(recipe), words).model.init_from


def test_a_bare_path_and_further_words_come_in_any_order(toy_recipe: Path) -> None:
    expected = InitFrom(path="runs/a", layers=(0, "new"))
    path, layers = "model.init_from=runs/a", "model.init_from.layers=[0, new]"
    assert init_of(toy_recipe) == InitFrom()
    assert init_of(toy_recipe, path) == InitFrom(path="runs/a")
    assert init_of(toy_recipe, path, layers) == expected
    assert init_of(toy_recipe, layers, path) == expected
    assert init_of(toy_recipe, layers, "model.init_from.path=runs/a") == expected
    assert init_of(toy_recipe, path, layers, "model.init_from=null") == InitFrom()


def test_a_recipe_gives_a_path_or_a_mapping_and_words_change_it(
    toy_recipe: Path, tmp_path: Path
) -> None:
    text = toy_recipe.read_text()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text.replace("qk_norm:", "init_from: runs/a, qk_norm:"))
    assert init_of(recipe) == InitFrom(path="runs/a")
    assert init_of(recipe, "model.init_from.head=false") == InitFrom(path="runs/a", head=False)
    mapping = "init_from: {path: runs/a, layers: [0-1]}, qk_norm:"
    recipe.write_text(text.replace("qk_norm:", mapping))
    assert init_of(recipe) == InitFrom(path="runs/a", layers=("0-1",))
    assert init_of(recipe, "model.init_from=runs/b").path == "runs/b"
    assert init_of(recipe, "model.init_from=runs/b").layers == ("0-1",)
    assert init_of(recipe, "model.init_from=null") == InitFrom()


def test_a_recipe_of_a_source_alone_takes_its_architecture_from_the_command_line(
    toy_recipe: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    text = re.sub(r"model: \{.*?\}", "model: {init_from: a}", toy_recipe.read_text(), flags=re.S)
    recipe.write_text(text)
    assert load_run(str(recipe), ["model.base=quickstart"]).model.init_from.path == "a"


@pytest.mark.parametrize(
    "word",
    ["model.init_from=a", "model.init_from.layers=[0-0, new]", "model.init_from.norms=false"],
)
def test_the_resolved_config_repeats_the_run(toy_recipe: Path, tmp_path: Path, word: str) -> None:
    cfg = load_run(str(toy_recipe), ["model.init_from.path=b", word])
    (tmp_path / "config.yaml").write_text(config.dump_yaml(cfg))
    assert load_run(str(tmp_path / "config.yaml")) == cfg


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["=3"], "model.init_from: 3 is not a mapping; it has the fields path, model, layers"),
        ([".layer=[0-1]"], "no such field; did you mean model.init_from.layers?"),
        ([".attn=false"], "no such field; did you mean model.init_from.attention?"),
        ([".layers=[0-1]"], "model.init_from.layers is given without model.init_from.path"),
        ([".path=a", ".layers=[0]"], "init_from.layers names 1 layers, but n_layers = 2"),
        ([".path=a", ".layers=[0-999999]"], "names 1000000 layers, but n_layers = 2"),
        ([".path=a", ".layers=[0, last]"], "'last' is no layer; give numbers from 0, ranges such"),
        ([".path=a", ".layers=[1-0]"], "'1-0' is no layer"),
        ([".path=a", ".layers=[0, -1]"], "-1 is no layer"),
        ([".path=a", ".layers=[0, 1.5]"], "or null, got [0, 1.5]"),
        ([".path=a", ".layers=0-1"], "or null, got '0-1'"),
        ([".path=a", *(f".{c}=false" for c in COMPONENTS)], "model.init_from takes nothing"),
        (
            [".path=a", ".layers=[0-1]", ".attention=false", ".feed_forward=false", ".norms=false"],
            "model.init_from.layers is given, but nothing of a layer is taken",
        ),
    ],
)
def test_mistakes_are_named_before_the_source_is_opened(
    toy_recipe: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", str(toy_recipe), *(f"model.init_from{word}" for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_an_architecture_has_no_source(
    toy_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "model.base=quickstart"]) == 0
    assert "init_from" not in capsys.readouterr().out
    cfg = load_run(str(toy_recipe), ["model.init_from=a"])
    assert type(cfg.model.architecture) is ModelConfig
    assert config.to_plain(cfg.model) == {
        **config.to_plain(cfg.model.architecture),
        "init_from": config.to_plain(InitFrom(path="a")),
    }
