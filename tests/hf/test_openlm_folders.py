"""Folders of model_type openlm as users load them: the model card, remote code, the pipeline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import openlm_lite.hf
from openlm_lite.hf import OpenLMConfig, OpenLMForCausalLM
from openlm_lite.hf.openlm_fields import AUTO_MAP

ROOT = Path(__file__).parents[2]
CARD = ROOT / "examples" / "dclm_model_card.py"
SIZES = {"dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 128, "vocab_size": 50432}
SHARED = SIZES | {
    "norm_eps": 1e-5,
    "post_embed_norm": False,
    "weight_tying": False,
    "positional_embedding_type": "rotary",
    "ffn_type": "swiglu_torch",
    "attn_name": "auto",
}
CONFIGS = {
    "A": SHARED
    | {
        "architectures": ["OpenLMForCausalLM"],
        "norm_type": "gain_only_lp_layer_norm",
        "apply_qk_norm": True,
    },
    "B": {
        "architectures": ["OpenLMModel"],
        "params": None,
        "params_args_dict": SHARED
        | {
            "model": "open_lm_tiny",
            "model_norm": "gain_only_lp_layer_norm",
            "qk_norm": True,
            "apply_qk_norm": True,
            "attn_activation": None,
            "attn_seq_scalar": None,
            "attn_seq_scalar_alpha": None,
            "moe_freq": 0,
        },
    },
}
# EleutherAI/gpt-neox-20b's tokenizer_config.json
TOKENIZER_CONFIG = {
    "unk_token": "<|endoftext|>",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "add_prefix_space": False,
    "model_max_length": 2048,
    "tokenizer_class": "GPTNeoXTokenizer",
}
PROMPT = torch.arange(100, 112)[None]


@pytest.fixture(scope="module")
def folders(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as a folder of each of OpenLM's layouts, with OpenLM's tensors."""
    torch.manual_seed(0)
    model = OpenLMForCausalLM(OpenLMConfig(**CONFIGS["A"]))
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    for i in range(2):
        tensors[f"model.layers.{i}.attention.pos_embed.inv_freq"] = torch.ones(4)
    made = {}
    for layout, config in CONFIGS.items():
        folder = made[layout] = tmp_path_factory.mktemp(layout)
        common = {"model_type": "openlm", "torch_dtype": "float32", "transformers_version": "4.40"}
        (folder / "config.json").write_text(json.dumps(config | common))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(shared_data / "tokenizers" / "20B_tokenizer.json", folder / "tokenizer.json")
        os.chmod(folder / "tokenizer.json", 0o644)
        (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return made


def run(args: list[str], home: Path, **env: str) -> str:
    """Standard output of Python on `args`, started elsewhere, offline, with nobody to ask."""
    variables = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *args],
        env=os.environ | variables | env,
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- OpenLM's own folders ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["A", pytest.param("B", marks=pytest.mark.slow)])
def test_the_model_cards_snippet_runs_with_its_import_line_changed(
    folders: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    shown = run([str(CARD), str(folders[layout])], tmp_path, PYTHONPATH=str(ROOT))
    assert shown.startswith("Machine learning is")
    assert len(shown) > len("Machine learning is") + 50


def test_both_layouts_are_the_same_model(folders: dict[str, Path]) -> None:
    logits = []
    for folder in folders.values():
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits.append(model(PROMPT).logits)
    assert torch.equal(*logits)


def test_the_text_generation_pipeline(folders: dict[str, Path]) -> None:
    generate = pipeline("text-generation", model=str(folders["A"]))
    (text,) = generate("Machine learning is", max_new_tokens=3, do_sample=False)
    assert text["generated_text"].startswith("Machine learning is")


def test_a_folder_that_names_no_tokenizer_class_has_gpt_neoxs(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(folders["A"] / "config.json", tmp_path)
    shutil.copy(folders["A"] / "tokenizer.json", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__.startswith("GPTNeoXTokenizer")
    assert tokenizer.eos_token_id == 0
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("Machine learning is", "  two  spaces\n\n\tand café, 12345", "<|endoftext|>x"):
        assert tokenizer(text)["input_ids"] == plain.encode(text).ids
        assert AutoTokenizer.from_pretrained(folders["A"])(text)["input_ids"] == (
            plain.encode(text).ids
        )


# --- folders that carry the code -----------------------------------------------------------------

WITHOUT_THE_PACKAGE = """
import sys, json, torch

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "openlm_lite":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, out = sys.argv[1:]
trusted = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(folder, **trusted).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
prompt = torch.arange(100, 112)[None]
greedy = model.generate(prompt, max_new_tokens=8, do_sample=False)
with torch.no_grad():
    torch.save({"logits": model(prompt).logits, "greedy": greedy}, out + "/seen.pt")
base = AutoModel.from_pretrained(folder, **trusted)
assert type(base).__name__ == "OpenLMModel" and AutoConfig.from_pretrained(folder, **trusted)
model.save_pretrained(out + "/again")
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as e:
    assert "trust_remote_code" in str(e)
else:
    raise AssertionError("code ran unasked")
assert not any(name.startswith("openlm_lite") for name in sys.modules)
"""


@pytest.mark.slow
def test_a_saved_folder_loads_as_remote_code_where_this_package_is_absent(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["B"])
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    code = {"modeling_openlm.py", "openlm_fields.py"}
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert {p.name for p in folder.iterdir()} == code | files
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    run(["-P", "-c", WITHOUT_THE_PACKAGE, str(folder), str(tmp_path)], tmp_path)
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    with torch.no_grad():
        assert (seen["logits"] - model(PROMPT).logits).abs().max() <= 1e-5
    assert torch.equal(seen["greedy"], model.generate(PROMPT, max_new_tokens=8, do_sample=False))
    again = tmp_path / "again"
    assert {p.name for p in again.iterdir()} == code | files
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert load_file(again / "model.safetensors").keys() == model.state_dict().keys()

    # With the package: its own classes, and no question.
    for trust in (None, False):
        local = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        assert type(local) is OpenLMForCausalLM
        assert type(AutoModel.from_pretrained(folder, trust_remote_code=trust)) is (
            openlm_lite.hf.OpenLMModel
        )
        assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is OpenLMConfig


# --- registering ---------------------------------------------------------------------------------


def test_transformers_is_imported_on_first_use_and_its_absence_is_one_clear_error() -> None:
    code = """
import sys
import openlm_lite.hf.convert
from openlm_lite.hf import openlm_fields
assert "transformers" not in sys.modules
assert not hasattr(openlm_lite.hf, "OpenLM")
sys.modules["transformers"] = None
try:
    from openlm_lite.hf import *
except ImportError as e:
    assert str(e) == 'transformers is not installed: pip install "openlm-lite[hf]"', e
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_a_repeated_import_registers_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def register() -> None:
        raise AssertionError("registered twice")

    monkeypatch.setattr(openlm_lite.hf, "_register", register)
    names: dict[str, type] = {}
    exec("from openlm_lite.hf import *", names)
    assert names["OpenLMForCausalLM"] is OpenLMForCausalLM
    assert set(openlm_lite.hf.__all__) <= set(names)
