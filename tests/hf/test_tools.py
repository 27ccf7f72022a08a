"""Exported folders run in the tools that read Hugging Face folders."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openlm_lite.data.tokenizer import load_tokenizer
from openlm_lite.hf.compare import load_hf
from openlm_lite.hf.export import export_checkpoint
from tests.tiny_run import save_tiny_run, tiny_config, tiny_model, tiny_tokenizer

PROMPT = "A small tokenizer"
LLAMA_CPP = "OPENLM_LITE_LLAMA_CPP"
"""names the folder of a llama.cpp checkout, for its converter"""


def python(*args: str, home: Path) -> str:
    """Standard output of Python on `args`, started in `home`, offline, with nobody to ask."""
    variables = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *args],
        env=os.environ | variables | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def random_ids(vocab_size: int, n: int) -> Tensor:
    """[1, n]"""
    return torch.randint(vocab_size, (1, n), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """[n, V], fp32"""
    return model.eval()(ids).logits[0].float()


# --- transformers' pipeline ----------------------------------------------------------------------


def expected_text(folder: str) -> str:
    """The prompt and the eight tokens that are the likeliest, one after the other."""
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(PROMPT).tolist()])
    model = load_hf(folder, torch.float32)
    for _ in range(8):
        ids = torch.cat((ids, logits_of(model, ids)[-1].argmax().view(1, 1)), dim=1)
    return tokenizer.decode(ids[0])


def test_a_native_export_runs_in_the_text_generation_pipeline(tmp_path: Path) -> None:
    from transformers import pipeline

    run = save_tiny_run(tmp_path / "run", tiny_model(tiny_config()), tiny_tokenizer())
    folder = str(tmp_path / "hf")
    assert export_checkpoint(str(run), folder).native
    generate = pipeline("text-generation", model=folder, tokenizer=folder)
    (answer,) = generate(PROMPT, min_new_tokens=8, max_new_tokens=8, do_sample=False)
    assert answer["generated_text"] == expected_text(folder)


STAR = """
import json, sys
from openlm_lite.hf import *
from transformers import pipeline

generate = pipeline("text-generation", model=sys.argv[1], tokenizer=sys.argv[1])
assert type(generate.model) is OpenLMForCausalLM, type(generate.model)
print(json.dumps(generate(sys.argv[2], max_new_tokens=8, do_sample=False)))
"""


@pytest.mark.slow
def test_a_bundled_export_runs_in_the_pipeline_after_the_star_import(tmp_path: Path) -> None:
    run = save_tiny_run(tmp_path / "run", tiny_model(tiny_config()), tiny_tokenizer())
    folder = str(tmp_path / "hf")
    assert not export_checkpoint(str(run), folder, how="bundled").native
    (answer,) = json.loads(python("-c", STAR, folder, PROMPT, home=tmp_path))
    assert answer["generated_text"] == expected_text(folder)


# --- bitsandbytes --------------------------------------------------------------------------------

EIGHT_BIT: dict[str, dict[str, Any]] = {
    "OlmoeForCausalLM": {},
    "LlamaForCausalLM": {"norm": "rms_norm", "qk_norm": "none"},
    "StableLmForCausalLM": {"qk_norm": "none"},
    "OpenLMForCausalLM": {"rope_freq_dtype": "bf16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("hf_class", EIGHT_BIT)
def test_an_export_loads_in_eight_bits_and_computes_nearly_the_same(
    hf_class: str, tmp_path: Path
) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    pytest.importorskip("accelerate", reason="needs accelerate, through which transformers loads")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import openlm_lite.hf

    _ = openlm_lite.hf.OpenLMForCausalLM  # registers the class that a bundled export names
    cfg = tiny_config(d_model=128, head_dim=32, d_ff=384, **EIGHT_BIT[hf_class])
    run = save_tiny_run(tmp_path / "run", tiny_model(cfg), None)
    folder = str(tmp_path / "hf")
    assert export_checkpoint(str(run), folder, tokenizer="none").hf_class == hf_class
    quantized = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map="cpu",
        dtype=torch.float32,
    )
    layers = [m for m in quantized.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    assert len(layers) >= 4 * cfg.n_layers
    assert all(layer.weight.dtype == torch.int8 for layer in layers)
    ids = random_ids(cfg.vocab_size, cfg.max_seq_len)
    full = logits_of(load_hf(folder, torch.float32), ids)
    eight = logits_of(quantized, ids)
    correlation = torch.corrcoef(torch.stack((full.flatten(), eight.flatten())))[0, 1].item()
    agreement = (full.argmax(-1) == eight.argmax(-1)).float().mean().item()
    print(
        f"{hf_class}: correlation {correlation:.6f}, argmax {agreement:.3f}, {len(layers)} layers"
    )
    assert correlation > 0.999
    assert agreement > 0.9


# --- llama.cpp -----------------------------------------------------------------------------------

LLAMA_LOGITS = """
import json, sys
import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama

model, ids, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}  # fp16 by default: 5e-3 in the logits
llama = Llama(model, n_ctx=64, n_threads=1, logits_all=True, verbose=False, **cache)
llama.eval(ids)
np.save(out, llama.scores[: len(ids)])
"""

GGUF: dict[str, dict[str, Any]] = {
    "OlmoeForCausalLM": {},  # the DCLM kind: LayerNorm and full qk-norm, rewritten
    "LlamaForCausalLM": {"norm": "rms_norm", "qk_norm": "none", "rope_style": "interleaved"},
    "StableLmForCausalLM": {"qk_norm": "none", "norm_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": "per_head"},
}


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [50257, 50304])
@pytest.mark.parametrize("hf_class", GGUF)
def test_an_export_converts_to_gguf_and_llama_cpp_computes_the_same_logits(
    hf_class: str, vocab_size: int, tmp_path: Path, shared_data: Path
) -> None:
    checkout = os.environ.get(LLAMA_CPP)
    if not checkout:
        pytest.skip(f"needs llama.cpp's converter: set {LLAMA_CPP} to a checkout of llama.cpp")
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama_cpp (llama-cpp-python)")
    # the converter knows a tokenizer by the ids of one text, so a trained one is refused
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt2.tiktoken"))
    heads = {"n_heads": 2, "n_kv_heads": 2, "head_dim": 32}
    cfg = tiny_config(vocab_size=vocab_size, d_model=64, d_ff=256, **heads, **GGUF[hf_class])
    run = save_tiny_run(tmp_path / "run", tiny_model(cfg), tokenizer)
    folder, gguf = str(tmp_path / "hf"), str(tmp_path / "model.gguf")
    assert export_checkpoint(str(run), folder).hf_class == hf_class
    converter = os.path.join(checkout, "convert_hf_to_gguf.py")
    python(converter, folder, "--outfile", gguf, "--outtype", "f32", home=tmp_path)
    ids = random_ids(50257, 32)
    out = str(tmp_path / "logits.npy")
    python("-c", LLAMA_LOGITS, gguf, json.dumps(ids[0].tolist()), out, home=tmp_path)
    theirs = torch.from_numpy(np.load(out))
    ours = logits_of(load_hf(folder, torch.float32), ids)
    assert theirs.shape == ours.shape
    worst = (theirs - ours).abs().max().item()
    print(f"{hf_class}, {vocab_size}: {worst:.2e} of {ours.abs().max().item():.2f}")
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
    assert worst <= 1e-5
