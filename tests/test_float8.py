"""float8 rounds what it says; without hardware, library or fitting sizes it is told."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from openlm_lite import dist, parallel
from openlm_lite.errors import InputError
from openlm_lite.float8 import Float8, check_float8, to_float8
from openlm_lite.layout import LayoutConfig, build_layout
from openlm_lite.model.transformer import Transformer
from tests.tiny_run import tiny_config, tiny_model


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_float8_without_hardware_is_one_error() -> None:
    for device in ("auto", "cpu"):
        with pytest.raises(InputError, match=r"needs a GPU, this run is on a CPU; set parallel"):
            check_float8("tensorwise", device)
    check_float8("none", "cpu")


@pytest.mark.parametrize(
    ("recipe", "capability", "needs"),
    [
        ("tensorwise", (8, 0), "8.9 (H100, H200, B200, L40S); a card has 8.0; set parallel.float8"),
        ("rowwise", (8, 9), "9.0 (H100, H200, B200); a card has 8.9; set parallel.float8=none"),
    ],
)
def test_float8_on_an_old_gpu_is_one_error(
    monkeypatch: pytest.MonkeyPatch, recipe: Float8, capability: tuple[int, int], needs: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    with pytest.raises(InputError) as caught:
        check_float8(recipe, "auto")
    assert f"parallel.float8 = {recipe} needs compute capability {needs}" in str(caught.value)


def test_float8_without_its_library_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torchao")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(
        InputError, match=r'pip install "openlm-lite\[float8\]", or set parallel.fl'
    ):
        to_float8(torch.nn.ModuleList(), "rowwise")


@pytest.mark.filterwarnings("default")  # of torchao, at its import
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_rounds_the_products_of_the_blocks_alone(recipe: str) -> None:
    """Emulated: the kernels' numbers, without them."""
    pytest.importorskip("torchao")
    cfg = tiny_config(d_model=32, d_ff=40)
    model, plain = tiny_model(cfg), tiny_model(cfg)
    names = [name for name, _ in model.named_parameters()]
    left = to_float8(model.layers, recipe, emulate=True)  # pyright: ignore[reportArgumentType]
    assert left == [f"{i}.feed_forward.{w}" for i in (0, 1) for w in ("w_gate", "w_up", "w_down")]
    assert [name for name, _ in model.named_parameters()] == names
    tokens = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(0))
    found = []
    for one in (model, plain):
        sums = one(tokens[:, :-1], tokens[:, 1:])
        sums.total.backward()
        found.append((sums.ce, one.layers[0].attention.wq.weight.grad))
    (ce, grad), (expected_ce, expected) = found
    assert ce != expected_ce and ce == pytest.approx(expected_ce.item(), rel=0.01)
    assert not torch.equal(grad, expected)  # e5m2 has two bits behind the point
    assert torch.cosine_similarity(grad.flatten(), expected.flatten(), dim=0) > 0.9


@pytest.mark.filterwarnings("default")  # of torchao, at its import
def test_float8_looks_at_this_ranks_pieces_and_says_what_stays_in_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torchao")
    said: list[str] = []
    monkeypatch.setattr(parallel.logger, "info", lambda text, *args: said.append(text % args))
    emulated = functools.partial(to_float8, emulate=True)
    monkeypatch.setattr(parallel, "to_float8", emulated)
    cfg = parallel.ParallelConfig(float8="rowwise", activation_checkpointing="full")
    monkeypatch.setattr(parallel, "shard", lambda model, layout, cfg: None)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        for tp in (1, 2):
            layout_cfg = LayoutConfig(tp=tp)
            layout = build_layout(layout_cfg, dist.World(0, 2, 0, torch.device("cpu")))
            parallel.parallelize(Transformer(tiny_config(qk_norm="none")), layout, cfg)
    finally:
        dist.close()
    assert said == [
        "parallel.float8: attention.wk, attention.wv, feed_forward.w_gate, feed_forward.w_up, "
        "feed_forward.w_down of each block stay in bf16: 16 does not divide their sizes on a rank"
    ]
