"""A Hugging Face folder whose weights are not those of its class is refused by their names."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from openlm_lite.cli import main
from openlm_lite.errors import InputError
from openlm_lite.hf.compare import load_hf
from openlm_lite.hf.export import export_checkpoint
from openlm_lite.hf.weights import open_weights
from tests.tiny_run import save_tiny_run, tiny_config, tiny_model, tiny_tokenizer

FORMS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"norm": "rms_norm", "qk_norm": "none"},
    "OlmoeForCausalLM": {},  # transformers merges what the files have as experts
    "OpenLMForCausalLM": {"rope_freq_dtype": "bf16"},
}
SOME_WEIGHT = {
    "LlamaForCausalLM": "model.layers.1.self_attn.q_proj.weight",
    "OlmoeForCausalLM": "model.layers.1.self_attn.q_norm.weight",
    "OpenLMForCausalLM": "model.layers.1.ffn_norm.weight",
}


def folder_of(hf_class: str, tmp_path: Path, **changes: Any) -> Path:
    cfg = tiny_config(**FORMS[hf_class], **changes)
    run = save_tiny_run(tmp_path / "run", tiny_model(cfg), tiny_tokenizer())
    assert export_checkpoint(str(run), str(tmp_path / "hf")).hf_class == hf_class
    return tmp_path / "hf"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder: Path, *parts: str) -> None:
    """In both ways of loading, with one line that says `parts`."""
    for weights in (None, open_weights(str(folder))):
        with pytest.raises(InputError) as caught:
            load_hf(str(folder), torch.float32, weights=weights)
        for part in (str(folder), *parts):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hf_class", FORMS)
def test_a_folder_without_some_weight_is_refused_by_its_name(
    hf_class: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, name = folder_of(hf_class, tmp_path), SOME_WEIGHT[hf_class]
    edit(folder, lambda tensors: tensors.pop(name))
    capfd.readouterr()
    refused(folder, f"not those of {hf_class}", f"{name} is not there")
    assert "REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("hf_class", FORMS)
def test_a_weight_of_another_shape_is_refused_with_both(hf_class: str, tmp_path: Path) -> None:
    folder, name = folder_of(hf_class, tmp_path), SOME_WEIGHT[hf_class]
    shapes = []

    def cut(tensors: dict[str, Tensor]) -> None:
        shapes.append(list(tensors[name].shape))
        tensors[name] = tensors[name][:-1].clone()
        shapes.append(list(tensors[name].shape))

    edit(folder, cut)
    refused(folder, f"{name} is {shapes[1]} there, {shapes[0]} by its config.json")


def test_all_that_is_wrong_is_said_at_once_and_a_long_list_is_cut(tmp_path: Path) -> None:
    folder = folder_of("LlamaForCausalLM", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, "lm_head.weight is not there, model.layers.2.", " and 11 more; get the folder")


@pytest.mark.parametrize("hf_class", ["LlamaForCausalLM", "OpenLMForCausalLM"])
def test_a_tied_head_may_be_absent_and_no_other(hf_class: str, tmp_path: Path) -> None:
    folder = folder_of(hf_class, tmp_path, tie_embeddings=True)
    for weights in (None, open_weights(str(folder))):
        model = load_hf(str(folder), torch.float32, weights=weights)
        tied = model.get_output_embeddings().weight
        assert tied is model.get_input_embeddings().weight
    assert not any("head" in name or "output" in name for name in open_weights(str(folder)))


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_buffers_of_old_files_are_no_weights_and_others_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of("LlamaForCausalLM", tmp_path)
    edit(folder, lambda tensors: tensors.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }))  # fmt: skip
    caplog.clear()
    load_hf(str(folder), torch.float32)
    assert warnings_in(caplog) == []
    edit(folder, lambda tensors: tensors.update({"model.extra.weight": torch.ones(4)}))
    load_hf(str(folder), torch.float32)
    text = f"{folder}: LlamaForCausalLM has no place for model.extra.weight"
    assert warnings_in(caplog) == [text]


def test_the_verbs_refuse_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("LlamaForCausalLM", tmp_path)
    edit(folder, lambda tensors: tensors.pop("model.norm.weight"))
    for words in (
        ["generate", str(folder), "A small", "--max-new-tokens", "2"],
        ["import", str(folder), str(tmp_path / "checkpoint")],
        ["export", str(folder), str(tmp_path / "again")],
    ):
        capsys.readouterr()
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("openlm: ") and said.count("\n") == 1
        assert "model.norm.weight" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]
