"""OpenLM's models: every reference variant, both HF layouts, its trainer's checkpoints."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openlm_lite.errors import InputError
from openlm_lite.eval.generate import generate
from openlm_lite.hf.export import export_checkpoint
from openlm_lite.hf.importer import import_model
from openlm_lite.hf.source import build_model, open_source, read_model
from tests.model.test_openlm_parity import VARIANTS
from tests.openlm_reference import facts

pytestmark = pytest.mark.zoo
TOLERANCE = 1e-5


@pytest.fixture
def openlm(shared_data: Path) -> Path:
    return shared_data / "openlm"


def openlm_json(folder: Path, to: Path) -> str:
    """The architecture in OpenLM's own fields."""
    to.write_text(json.dumps(facts(folder)["open_lm_config"]))
    return str(to)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["safetensors", "pt", "prefixed pt"])
def test_every_variant_is_imported_and_leaves_with_openlms_logits(
    variant: str, form: str, openlm: Path, tmp_path: Path
) -> None:
    folder = openlm / variant
    model = openlm_json(folder, tmp_path / "model.json")
    weights = folder / "state_dict.safetensors"
    if form != "safetensors":
        state = load_file(weights)
        if form == "prefixed pt":
            state = {f"module._orig_mod.{name}": weight for name, weight in state.items()}
        weights = tmp_path / "epoch_3.pt"
        torch.save({"epoch": 3, "name": "x", "state_dict": state, "step": 7}, weights)
    report = import_model(str(weights), str(tmp_path / "checkpoint"), model=model)
    assert report.notes == []
    io = load_file(folder / "io.safetensors")
    source = open_source(str(tmp_path / "checkpoint"))
    with torch.no_grad():
        logits = build_model(source.cfg, source.weights)(io["inputs"])
    assert (logits - io["logits"]).abs().max() <= TOLERANCE
    if form == "safetensors":
        for how in ("auto", "bundled"):
            out = tmp_path / how
            done = export_checkpoint(
                str(tmp_path / "checkpoint"), str(out), how=how, tokenizer="none"
            )
            assert done.max_logit_difference <= TOLERANCE
            assert done.native == (how == "auto" and not variant.endswith(("gelu", "head_rotary")))


@pytest.mark.parametrize("layout", ["A", "B"])
def test_a_hugging_face_folder_of_openlm_gives_its_logits_and_its_text(
    layout: str, openlm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(openlm / "hf_dclm_tiny", folder)
    if layout == "B":
        config = json.loads((folder / "config.json").read_text())
        own = {"architectures", "model_type", "torch_dtype", "transformers_version"}
        args = {key: config.pop(key) for key in set(config) - own}
        args["qk_norm"], args["model_norm"] = args.pop("apply_qk_norm"), args.pop("norm_type")
        config |= {"params": None, "params_args_dict": args}
        (folder / "config.json").write_text(json.dumps(config))
    report = import_model(str(folder), str(tmp_path / "checkpoint"))
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= TOLERANCE
    reference = load_file(folder / "reference_io.safetensors")
    model = read_model(str(tmp_path / "checkpoint"))
    with torch.no_grad():
        assert (model(reference["inputs"]) - reference["logits"]).abs().max() <= TOLERANCE
    prompt, whole = (reference[k].flatten().tolist() for k in ("greedy_prompt", "greedy_24"))
    assert prompt + generate(model, [prompt], max_new_tokens=24)[0] == whole


def test_the_trainers_checkpoint_needs_only_its_sizes(openlm: Path, tmp_path: Path) -> None:
    """The options stand in the params.txt beside it."""
    checkpoint = openlm / "native_ckpt_tiny" / "epoch_1.pt"
    report = import_model(str(checkpoint), str(tmp_path / "out"), model="open_lm_test_tiny")
    assert report.notes == []
    theirs = torch.load(checkpoint, weights_only=True)["state_dict"]
    ours = open_source(str(tmp_path / "out")).weights
    assert torch.equal(ours["embedding.weight"], theirs["tok_embeddings.weight"])
    v = theirs["layers.1.attention.in_proj.weight"].chunk(3)[2]
    assert torch.equal(ours["layers.1.attention.wv.weight"], v)


def test_options_that_nothing_states_are_said_to_be_assumed(openlm: Path, tmp_path: Path) -> None:
    shutil.copy(openlm / "native_ckpt_tiny" / "epoch_1.pt", tmp_path / "epoch_1.pt")
    sizes = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 16, "vocab_size": 16}
    sizes |= {"post_embed_norm": False, "weight_tying": False}
    (tmp_path / "m.json").write_text(json.dumps(sizes))
    found = import_model(
        str(tmp_path / "epoch_1.pt"), str(tmp_path / "out"), model=str(tmp_path / "m.json")
    )
    assert "does not say model_norm, qk_norm, ffn_type, positional_embedding_type" in found.notes[0]


# --- refusals ------------------------------------------------------------------------------------


class _Hostile:
    def __reduce__(self) -> Any:
        return (print, ("this must never be printed",))


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_runs_nothing(
    openlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = openlm_json(openlm / "dclm", tmp_path / "model.json")
    torch.save({"state_dict": {"x": torch.ones(2)}, "extra": _Hostile()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(_Hostile()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match=name):
            import_model(str(tmp_path / name), str(tmp_path / "out"), model=model)
    assert "never" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_dim": 32}, r"tensor \S+ is \[\d+.*the architecture says"),
        ({"n_layers": 3}, "are missing: .*layers.2"),
        ({"n_layers": 1}, "do not belong to it: .*layers.1"),
        ({"qk_norm": False}, "do not belong to it: .*q_norm|k_norm"),
        ({"model_norm": "default_layer_norm"}, "are missing: .*bias"),
        ({"weight_tying": True}, "ties output.weight to tok_embeddings.weight, but they differ"),
        ({"ffn_type": "moe"}, "ffn_type"),
        ({"model_norm": "batch_norm"}, "norm"),
    ],
)
def test_weights_that_are_not_the_architectures_are_refused_by_name(
    change: dict[str, Any], message: str, openlm: Path, tmp_path: Path
) -> None:
    config = {**facts(openlm / "dclm")["open_lm_config"], **change}
    (tmp_path / "model.json").write_text(json.dumps(config))
    weights = str(openlm / "dclm" / "state_dict.safetensors")
    with pytest.raises(InputError, match=message):
        import_model(weights, str(tmp_path / "out"), model=str(tmp_path / "model.json"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json"]


def test_bare_weights_need_an_architecture_and_folders_refuse_one(
    openlm: Path, tmp_path: Path
) -> None:
    weights = str(openlm / "dclm" / "state_dict.safetensors")
    with pytest.raises(InputError, match="nothing beside these weights says what they are"):
        import_model(weights, str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"has a config.json.*leave dclm_1b out"):
        import_model(str(openlm / "hf_dclm_tiny"), str(tmp_path / "out"), model="dclm_1b")
    save_file({"what.weight": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"1 do not belong to it: what.weight"):
        import_model(str(tmp_path / "x.safetensors"), str(tmp_path / "out"), model="gpt2")


def test_an_existing_folder_is_not_touched(openlm: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(InputError, match="is no empty folder"):
        import_model(str(openlm / "hf_dclm_tiny"), str(tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
