"""The same promises on a CUDA device: bf16 training, compile, exact resume, NCCL."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openlm_lite import dist
from openlm_lite import train as train_module
from openlm_lite.bench import Stepper, synthetic_batches
from openlm_lite.context_parallel import _attend_causal
from openlm_lite.errors import InputError
from openlm_lite.guard import NonFiniteError
from openlm_lite.log import read_metrics
from openlm_lite.metrics import peak_flops
from openlm_lite.model import attention
from openlm_lite.model.attention import FlexMask
from openlm_lite.model.kernels import KERNELS, KernelConfig, Name, choose_attention
from openlm_lite.model.loss import LossSums, linear_cross_entropy
from openlm_lite.optim.brake import Brake
from openlm_lite.optim.build import clip_gradients
from openlm_lite.readback import Readback
from openlm_lite.run import load_run
from openlm_lite.sensors import read_gpus
from openlm_lite.step import agree_on, forward_backward
from tests.model.test_document_mask import gradients, random_documents
from tests.model.test_transformer import TINY, build
from tests.run_faults import BATCH_FAULTS
from tests.test_train import final_weights, losses, same_weights
from tests.train_server import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def train(recipe: Path, run: Path, *words: str, processes: int = 1) -> None:
    command = [sys.executable, str(ROOT / "train.py")]
    if processes > 1:
        command = ["torchrun", "--standalone", f"--nproc-per-node={processes}", command[1]]
    words = (str(recipe), f"run.dir={run}", "parallel.precision=bf16", *words)
    subprocess.run(command + list(words), check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("words", [[], ["parallel.compile=true"]])
def test_bf16_on_a_gpu_follows_the_golden_losses(
    toy_recipe: Path, tmp_path: Path, words: list[str]
) -> None:
    train(toy_recipe, tmp_path / "r", *words)
    golden = (Path(__file__).parent / "golden" / "toy_losses.txt").read_text().split()
    assert losses(tmp_path / "r") == pytest.approx([float(x) for x in golden], rel=0.02)
    assert all(w.dtype == torch.float32 for w in final_weights(tmp_path / "r").values())


def test_a_resumed_run_is_bit_identical_when_deterministic(
    toy_recipe: Path, tmp_path: Path
) -> None:
    words = ["run.deterministic=true", "checkpoint.keep_last=10"]
    train(toy_recipe, tmp_path / "whole", *words)
    train(toy_recipe, tmp_path / "parts", *words)
    for name in ("step_00000008", "step_00000012"):  # as if it had been killed after step 4
        folder = tmp_path / "parts" / "checkpoints" / name
        folder.rename(tmp_path / name)
    train(toy_recipe, tmp_path / "parts", *words)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


@pytest.mark.filterwarnings("default")  # torch.compile warns about its own inner workings
@pytest.mark.parametrize("positions", ["rope", "alibi", "learned", "none"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_equals_the_whole_mask(
    monkeypatch: pytest.MonkeyPatch,
    positions: str,
    dtype: torch.dtype,
    tolerance: float,
    compiled: bool,
) -> None:
    cfg = dataclasses.replace(TINY, head_dim=48, max_seq_len=512, positions=positions)
    tokens = torch.randint(50, (3, 301), generator=torch.Generator().manual_seed(0)).cuda()
    doc_ids = random_documents(3, 300, 0.02).cuda()
    assert isinstance(attention.document_mask(cfg, doc_ids, dtype), FlexMask)
    found = []
    for flex in (True, False):
        monkeypatch.setattr(attention, "uses_flex", lambda cfg, device, flex=flex: flex)
        model = build(cfg).to("cuda", dtype)
        if compiled and flex:
            for block in model.layers:
                block.compile()
        sums = model(tokens[:, :-1], tokens[:, 1:], doc_ids_BT=doc_ids)
        assert isinstance(sums, LossSums)
        sums.total.backward()
        found.append((sums.ce.float() / sums.n_targets, gradients(model)))
    (loss, grads), (expected_loss, expected) = found
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    for name, grad in grads.items():
        difference = (grad.float() - expected[name].float()).norm()
        assert difference <= tolerance * expected[name].float().norm(), name


@pytest.mark.parametrize("words", [[], ["parallel.compile=true"]])
def test_document_masking_trains_alike_with_flex_attention_and_with_a_mask(
    toy_recipe: Path, tmp_path: Path, words: list[str]
) -> None:
    words = ["data.document_masking=true", "model.head_dim=16", *words]
    train(toy_recipe, tmp_path / "flex", *words)
    train(toy_recipe, tmp_path / "cpu", "run.device=cpu", *words[:2])
    assert losses(tmp_path / "flex") == pytest.approx(losses(tmp_path / "cpu"), rel=0.02)


NAMES = [name for name in KERNELS if name != "blocks"]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_every_kernel_that_can_be_chosen_here_computes_attention(
    name: Name, head_dim: int, kv_heads: int
) -> None:
    model = dataclasses.replace(TINY, n_heads=8, n_kv_heads=kv_heads, head_dim=head_dim)
    device = torch.device("cuda")
    try:
        choose_attention(KernelConfig(name), model, device, torch.bfloat16)
    except InputError as e:
        assert name not in ("sdpa", "sdpa_flash", "flex"), e  # these are torch's own, everywhere
        pytest.skip(str(e))
    generator = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.randn(2, n, 300, head_dim, generator=generator, device=device)
        for n in (8, kv_heads, kv_heads)
    ]
    found = []
    for kernel, dtype in ((KERNELS[name], torch.bfloat16), (KERNELS["sdpa"], torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        y = kernel(*leaves)
        y.float().square().sum().backward()
        found.append([y.detach(), *(t.grad for t in leaves if t.grad is not None)])
    for ours, expected in zip(*found, strict=True):
        assert (ours.float() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["sdpa", "sdpa_flash", "flex"])
def test_a_run_by_every_kernel_follows_the_golden_losses(
    toy_recipe: Path, tmp_path: Path, name: str
) -> None:
    words = ["model.head_dim=16", f"kernels.attention={name}"]
    train(toy_recipe, tmp_path / "gpu", *words)
    train(toy_recipe, tmp_path / "cpu", "run.device=cpu", words[0])
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=0.02)


def test_a_step_waits_for_nothing_that_the_device_does(toy_recipe: Path) -> None:
    """PyTorch raises where a call would make the host wait."""
    cfg = load_run(str(toy_recipe), ["parallel.precision=bf16", "run.device=cuda"])
    world = dist.init("cuda")
    try:
        stepper = Stepper(cfg, world)
        batches = synthetic_batches(cfg, stepper.layout)
        brake = Brake(stepper.optimizer, world.device)
        for _ in range(3):  # libraries initialise themselves
            stepper.step(next(batches))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                batch = next(batches)
                sizes = stepper.layout.sizes
                n_targets = agree_on(batch, sizes, False).n_targets
                found = forward_backward(stepper.model, batch, 2, cfg.loss, world, sizes, n_targets)
                numbers = torch.cat((clip_gradients(stepper.model, 1.0).reshape(1), found))
                brake.look(numbers[:2])
                for optimizer in stepper.optimizer:
                    optimizer.step()
                stepper.model.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        values = Readback(numbers).numbers()
        assert values == numbers.tolist()
    finally:
        dist.close()


def test_a_non_finite_loss_that_is_heard_of_late_never_reaches_the_weights(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = BATCH_FAULTS["nan loss"](6)(train_module.forward_backward)
    monkeypatch.setattr(train_module, "forward_backward", faulty)
    words = [f"run.dir={tmp_path / 'r'}", "parallel.precision=bf16", "checkpoint.every_steps=1"]
    with pytest.raises(NonFiniteError, match="step 6"):
        train_module.train(load_run(str(toy_recipe), words))
    dist.close()
    assert all(w.isfinite().all() for w in final_weights(tmp_path / "r").values())


def test_mfu_and_memory_are_in_every_record_of_a_known_device(
    toy_recipe: Path, tmp_path: Path
) -> None:
    train(toy_recipe, tmp_path / "r")
    known = peak_flops(torch.device("cuda")) is not None
    for record in read_metrics(tmp_path / "r" / "metrics.jsonl"):
        if "train/loss" in record:
            assert ("perf/mfu" in record) == known
            assert record["perf/peak_memory_gib"] > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_follow_one(toy_recipe: Path, tmp_path: Path) -> None:
    train(toy_recipe, tmp_path / "1")
    train(toy_recipe, tmp_path / "2", processes=2)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-3)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs the float8 products of an H100",
)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_follows_bf16(toy_recipe: Path, tmp_path: Path, recipe: str) -> None:
    words = ["total_steps=40", "parallel.compile=true"]
    train(toy_recipe, tmp_path / "bf16", *words)
    train(toy_recipe, tmp_path / "float8", *words, f"parallel.float8={recipe}")
    ours, theirs = losses(tmp_path / "float8"), losses(tmp_path / "bf16")
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.03)


def test_recomputation_on_a_gpu_has_the_losses_of_keeping_everything(
    toy_recipe: Path, tmp_path: Path
) -> None:
    words = ["run.deterministic=true", "model.head_dim=16"]
    train(toy_recipe, tmp_path / "none", *words)
    for how in ("selective", "full"):
        train(toy_recipe, tmp_path / how, *words, f"parallel.activation_checkpointing={how}")
        assert losses(tmp_path / how) == pytest.approx(losses(tmp_path / "none"), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_queries_of_a_part_of_a_row_see_what_the_mask_says(dtype: torch.dtype) -> None:
    """The kernels that context parallelism takes, against plain attention in fp64."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = {"device": "cuda", "generator": generator}
    q = torch.randn(2, 4, 64, 64, **shape)
    k, v = (torch.randn(2, 2, 256, 64, **shape) for _ in range(2))
    ours = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    out = _attend_causal(*ours)
    out.float().square().sum().backward()

    exact = [t.double().requires_grad_() for t in (q, k, v)]
    keys, values = (t.repeat_interleave(2, dim=1) for t in exact[1:])
    scores = exact[0] @ keys.transpose(2, 3) / 8
    hidden = torch.ones(64, 256, dtype=torch.bool, device="cuda").triu(diagonal=193)
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    expected.square().sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for a, b in ((out, expected), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "words",
    [
        ["parallel.tp=2"],
        ["parallel.cp=2"],
        ["parallel.dp_replicate=2"],
        ["parallel.tp=2", "parallel.compile=true", "parallel.activation_checkpointing=selective"],
        ["parallel.cp=2", "parallel.compile=true"],
    ],
)
def test_layouts_of_two_gpus_follow_one(toy_recipe: Path, tmp_path: Path, words: list[str]) -> None:
    train(toy_recipe, tmp_path / "1", "model.head_dim=16")
    train(toy_recipe, tmp_path / "2", "model.head_dim=16", *words, processes=2)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
@pytest.mark.parametrize("name", ["dp_replicate", "tp", "cp"])
def test_layouts_of_four_gpus_follow_one(toy_recipe: Path, tmp_path: Path, name: str) -> None:
    words = ["model.head_dim=16", "micro_batch_size=2"]
    train(toy_recipe, tmp_path / "1", *words)
    train(toy_recipe, tmp_path / "4", *words, f"parallel.{name}=2", processes=4)
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=0.02)


def test_norms_phases_and_sensors_change_no_loss_of_a_gpu(toy_recipe: Path, tmp_path: Path) -> None:
    deterministic = ("run.deterministic=true", "log.every_steps=1")
    train(toy_recipe, tmp_path / "plain", *deterministic)
    train(toy_recipe, tmp_path / "r", *deterministic, "log.norms_every=1")
    assert losses(tmp_path / "r") == losses(tmp_path / "plain")
    records = [r for r in read_metrics(tmp_path / "r" / "metrics.jsonl") if "train/loss" in r]
    for record in records:
        squares = sum(v**2 for k, v in record.items() if k.startswith("grad_norm/"))
        assert squares**0.5 == pytest.approx(record["train/grad_norm"], rel=1e-4)
    last = records[-1]
    assert all(last[f"perf/seconds/{p}"] > 0 for p in ("forward_backward", "clip", "optimizer"))


def test_the_sensors_of_a_gpu_tell_sane_figures() -> None:
    pytest.importorskip("pynvml")
    found = read_gpus(range(1))
    assert 10 < found["gpu/temperature_c"] < 110
    assert 100 < found["gpu/sm_clock_mhz"] < 5000


@pytest.mark.parametrize("vocab", [96, 1_000, 8_192, 50_432, 131_072])
def test_the_loss_and_its_gradients_are_those_of_fp64(vocab: int) -> None:
    """Each size of row has a softmax kernel of its own, which writes over the logits here."""
    generator = torch.Generator("cuda").manual_seed(0)
    h = torch.randn(96, 64, device="cuda", generator=generator)
    w = torch.randn(vocab, 64, device="cuda", generator=generator)
    y = torch.randint(vocab, (96,), device="cuda", generator=generator)
    ours = [t.clone().requires_grad_() for t in (h, w)]
    sums = linear_cross_entropy(*ours, y, chunk_tokens=40)
    sums.total.backward()

    exact = [t.double().requires_grad_() for t in (h, w)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), y, reduction="sum")
    expected.backward()
    torch.testing.assert_close(sums.total.double(), expected, rtol=1e-5, atol=1e-4)
    for t, e in zip(ours, exact, strict=True):
        assert t.grad is not None and e.grad is not None
        torch.testing.assert_close(t.grad.double(), e.grad, rtol=1e-3, atol=1e-3)
