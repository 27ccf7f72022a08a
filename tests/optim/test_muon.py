"""Muon: its formula, what Newton-Schulz makes, and runs that do not depend on the ranks."""

from __future__ import annotations

import functools
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.hf.weights import checkpoint_weights
from openlm_lite.log import read_metrics
from openlm_lite.optim.muon import Muon, orthogonalize
from tests.run_faults import fault
from tests.train_server import TrainServer


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(optimizer: torch.optim.Optimizer, parameter: Tensor, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8), (1, 6)])
def test_three_steps_are_those_of_the_formula(shape: tuple[int, int]) -> None:
    lr, mu, decay = 0.02, 0.9, 0.3
    parameter = torch.nn.Parameter(drawn(0, *shape))
    weights, gradients = parameter.detach().double(), [drawn(i, *shape) for i in (1, 2, 3)]
    groups = [{"params": [parameter], "weight_decay": decay}]
    stepped(Muon(groups, lr=lr, momentum=mu, dtype=torch.float32), parameter, gradients)

    momentum = torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients:
        momentum = mu * momentum + gradient
        u, s, vt = torch.linalg.svd(gradient + mu * momentum, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        scale = 0.2 * math.sqrt(max(shape))
        weights = (1 - lr * decay) * weights - lr * scale * (u * s) @ vt
    torch.testing.assert_close(parameter.detach().double(), weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_the_steps_are_those_of_torchs_own_muon(shape: tuple[int, int]) -> None:
    """Whole matrices in bf16 have torch's step itself; the step for shards has its bits."""
    gradients = [drawn(i, *shape) for i in range(1, 5)]

    def trained(kind: Callable[[torch.nn.Parameter], torch.optim.Optimizer]) -> Tensor:
        parameter = torch.nn.Parameter(drawn(0, *shape))
        stepped(kind(parameter), parameter, gradients)
        return parameter.detach()

    def ours(p: torch.nn.Parameter, dtype: torch.dtype = torch.bfloat16) -> Muon:
        return Muon([{"params": [p], "weight_decay": 0.1}], lr=0.02, dtype=dtype)

    def as_for_shards(p: torch.nn.Parameter) -> Muon:
        optimizer = ours(p)
        assert optimizer.is_torchs
        optimizer.is_torchs = False
        return optimizer

    expected = trained(
        lambda p: torch.optim.Muon([p], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    )
    assert torch.equal(trained(ours), expected)
    assert torch.equal(trained(as_for_shards), expected)
    assert not ours(torch.nn.Parameter(drawn(0, *shape)), torch.float32).is_torchs


@given(n=st.integers(1, 40), m=st.integers(1, 40), size=st.floats(1e-3, 1e3), seed=st.integers(0))
def test_newton_schulz_makes_singular_values_near_1(n: int, m: int, size: float, seed: int) -> None:
    u, _, vt = torch.linalg.svd(drawn(seed % 2**32, n, m), full_matrices=False)
    spread = torch.linspace(0.02, 1.0, min(n, m))
    found = orthogonalize(size * (u * spread) @ vt)
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() <= values.max() < 1.25
    # and the directions are those of the matrix
    turned = u.t() @ found @ vt.t()
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-3


def test_a_gradient_of_zeros_and_a_rate_of_zero_leave_the_weights() -> None:
    parameter = torch.nn.Parameter(drawn(0, 4, 6))
    optimizer = Muon([{"params": [parameter]}], lr=0.1)
    stepped(optimizer, parameter, [torch.zeros(4, 6)])
    assert torch.equal(parameter, drawn(0, 4, 6))
    optimizer.param_groups[0]["lr"] = 0.0
    stepped(optimizer, parameter, [drawn(1, 4, 6)])
    assert torch.equal(parameter, drawn(0, 4, 6))
    assert optimizer.state[parameter]["momentum_buffer"].abs().max() > 0


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="Muon takes matrices"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(3))]}], lr=0.1)


# wk and wv have 6 rows, which four ranks hold as 2, 2, 2, 0; d_ff = 66 as 17, 17, 17, 15
MUON = ("optim.name=muon", "model.n_kv_heads=1", "model.head_dim=6", "model.d_ff=66")
MUON += ("micro_batch_size=2", "optim.decay=all")


def measured(run: Path) -> list[dict[str, Any]]:
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def losses(run: Path) -> list[float]:
    return [r["train/loss"] for r in measured(run) if "train/loss" in r]


def weights_of(run: Path) -> dict[str, Tensor]:
    return dict(checkpoint_weights(resolve_checkpoint(str(run))))


@pytest.fixture(scope="module")
def run_on(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """Ranks -> the uninterrupted run on so many."""
    root = tmp_path_factory.mktemp("muon")

    @functools.cache
    def run(world: int) -> Path:
        words = (str(toy_recipe), f"run.dir={root / str(world)}", *MUON)
        assert set(train_server.train(*words, world=world)["codes"]) == {0}
        return root / str(world)

    return run


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_two_and_four_ranks_train_the_same_model(
    run_on: Callable[[int], Path], world: int
) -> None:
    whole, one = losses(run_on(1)), weights_of(run_on(1))
    assert whole[-1] < whole[0] - 0.5
    assert losses(run_on(world)) == pytest.approx(whole, rel=1e-5)
    for name, weight in weights_of(run_on(world)).items():
        torch.testing.assert_close(weight, one[name], rtol=1e-3, atol=1e-4)


def test_a_killed_run_resumes_to_the_bit(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, run_on: Callable[[int], Path]
) -> None:
    words = (str(toy_recipe), f"run.dir={tmp_path / 'r'}", *MUON)
    done = train_server.train(*words, world=2, kill=(1, 70))
    assert done["codes"][1] == -signal.SIGKILL
    assert 4 <= len(losses(tmp_path / "r")) < 12
    assert train_server.train(*words, world=2)["codes"] == [0, 0]
    assert measured(tmp_path / "r") == measured(run_on(2))
    ours, expected = weights_of(tmp_path / "r"), weights_of(run_on(2))
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("worlds", [(2, 1), pytest.param((2, 1, 4), marks=pytest.mark.slow)])
def test_a_run_goes_on_from_two_ranks_to_one_to_four(
    train_server: TrainServer,
    toy_recipe: Path,
    tmp_path: Path,
    run_on: Callable[[int], Path],
    worlds: tuple[int, ...],
) -> None:
    words = (str(toy_recipe), f"run.dir={tmp_path / 'r'}", *MUON)
    for world in worlds[:-1]:
        stop = [fault("SIGTERM", 0, "step", 4)]
        assert train_server.train(*words, world=world, faults=stop)["codes"] == [75] * world
    assert train_server.train(*words, world=worlds[-1])["codes"] == [0] * worlds[-1]
    assert losses(tmp_path / "r") == pytest.approx(losses(run_on(1)), rel=1e-5)


def test_another_optimizers_checkpoint_is_refused_in_words(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    words = (str(toy_recipe), f"run.dir={tmp_path / 'r'}", *MUON)
    log = tmp_path / "log.txt"
    stop = [fault("SIGTERM", 0, "step", 1)]
    assert train_server.train(*words, faults=stop)["codes"] == [75]
    other = (*words, "optim.name=adamw", "--allow-change", "optim.name")
    assert train_server.train(*other, log=log)["codes"] == [2]
    assert "this is a checkpoint of another optimizer" in log.read_text()
