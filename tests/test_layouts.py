"""Every layout of the ranks trains the same model; what does not fit is told before it starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite.cli import main
from openlm_lite.context_parallel import positions_of
from openlm_lite.errors import InputError
from openlm_lite.float8 import check_float8, to_float8
from openlm_lite.layout import LayoutConfig, Sizes
from openlm_lite.model.transformer import Transformer
from openlm_lite.run import load_run
from tests.test_train import final_weights, losses, measured
from tests.tiny_run import tiny_config, tiny_model
from tests.train_server import TrainServer

LONG = ["total_steps=20", "checkpoint.every_steps=20", "data.prefetch_batches=0"]
# what no default recipe of the tests has, all at once
OTHER = [
    *("model.norm=layer_norm", "model.norm_bias=true", "model.qk_norm=full"),
    *("model.attn_bias=all", "model.mlp_bias=true", "model.positions=learned"),
    *("model.activation=gelu", "model.embedding_norm=true", "model.block=parallel"),
    *("model.tie_embeddings=false", "model.vocab_size=301"),
]
HSDP, TP, CP = "parallel.dp_replicate=2", "parallel.tp=2", "parallel.cp=2"
SLOW = pytest.mark.slow


def train(server: TrainServer, recipe: Path, run: Path, *words: str, world: int = 1) -> list[float]:
    log = run.with_suffix(".log")
    done = server.train(str(recipe), f"run.dir={run}", *words, world=world, log=log)
    assert set(done["codes"]) == {0}, log.read_text()
    return losses(run)


@pytest.fixture(scope="module")
def alone(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Twenty steps on one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(train_server, toy_recipe, run, *LONG)
    return run


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (2, [TP]),
        (2, [CP]),
        pytest.param(4, [HSDP], marks=SLOW),
        pytest.param(4, [TP], marks=SLOW),
        pytest.param(4, [CP], marks=SLOW),
        pytest.param(4, [TP, CP], marks=SLOW),
        pytest.param(4, [HSDP, TP, "parallel.reduce_every_micro_batch=true"], marks=SLOW),
        pytest.param(2, ["parallel.dp_replicate=-1", "parallel.dp_shard=1"], marks=SLOW),
    ],
    ids=lambda v: "+".join(w.split(".")[1] for w in v) if isinstance(v, list) else str(v),
)
def test_a_layout_has_the_losses_of_one_process_over_20_steps(
    train_server: TrainServer,
    toy_recipe: Path,
    tmp_path: Path,
    alone: Path,
    world: int,
    words: list[str],
) -> None:
    """And its validation, gradient norms and checksums of the rows that were read."""
    words = [*LONG, *words, "micro_batch_size=2"]
    train(train_server, toy_recipe, tmp_path / "r", *words, world=world)
    ours, theirs = measured(tmp_path / "r"), measured(alone)
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[TP], [CP], [TP, CP]], ids=["tp", "cp", "tp+cp"])
def test_a_layout_does_not_ask_for_an_architecture(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, words: list[str]
) -> None:
    short = ["total_steps=6", "schedule.cooldown_steps=2", *OTHER]
    masked = [] if CP in words else ["data.document_masking=true"]
    one = train(train_server, toy_recipe, tmp_path / "1", *short, *masked)
    two = train(
        train_server, toy_recipe, tmp_path / "2", *short, *masked, *words, world=2 ** len(words)
    )
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_layout_may_change_on_resume(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, alone: Path
) -> None:
    """Saved under tp = 2; resumed on one process, on dp = 2, and on tp = 2 x cp = 2."""
    saved = tmp_path / "saved"
    words = [*LONG, "checkpoint.every_steps=8", "averages={ema: {kind: ema, decay: 0.9}}"]
    train(train_server, toy_recipe, saved, *words, TP, world=2)
    expected = final_weights(saved)
    steps = saved / "checkpoints"
    for step in ("step_00000016", "step_00000020"):
        (steps / step).rename(tmp_path / step)
    for name, world, layout in (("1", 1, []), ("dp", 2, []), ("tp+cp", 4, [TP, CP])):
        run = tmp_path / name
        run.mkdir()
        for path in saved.iterdir():
            if path.name not in ("checkpoints", "lock"):
                (run / path.name).write_bytes(path.read_bytes())
        (run / "checkpoints").mkdir()
        shutil.copytree(steps / "step_00000008", run / "checkpoints" / "step_00000008")
        resumed = train(train_server, toy_recipe, run, *words, *layout, world=world)
        assert resumed == pytest.approx(losses(alone), rel=1e-5)
        averaged = [r["val/toy/ema/loss"] for r in measured(run) if "val/toy/ema/loss" in r]
        theirs = [r["val/toy/ema/loss"] for r in measured(saved) if "val/toy/ema/loss" in r]
        assert averaged == pytest.approx(theirs, rel=1e-5)
        found = final_weights(run)
        assert found.keys() == expected.keys()
        for key, weight in found.items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_muon_runs_on_copies_and_on_parts_of_rows(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    words = ["optim.name=muon", "total_steps=6", "schedule.cooldown_steps=2", "micro_batch_size=2"]
    one = train(train_server, toy_recipe, tmp_path / "1", *words)
    hsdp = train(train_server, toy_recipe, tmp_path / "hsdp", *words, HSDP, world=4)
    assert hsdp == pytest.approx(one, rel=1e-5)
    cp = train(train_server, toy_recipe, tmp_path / "cp", *words, CP, world=2)
    assert cp == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_mixture_has_the_losses_of_each_source_on_every_layout(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    data = toy_recipe.parent / "data"
    sources = f"{{a: {{path: {data}/train, weight: 0.5}}, b: {{path: {data}/val, weight: 0.5}}}}"
    words = ["data.train=null", f"data.sources={sources}", "total_steps=4"]
    words += ["schedule.cooldown_steps=1", "loss.z_loss_over=targets"]
    one = tmp_path / "1"
    train(train_server, toy_recipe, one, *words)
    train(train_server, toy_recipe, tmp_path / "4", *words, TP, CP, world=4)
    for a, b in zip(measured(tmp_path / "4"), measured(one), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert any("train/a/loss" in record for record in measured(one))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("words", [[TP], [CP]], ids=["tp", "cp"])
def test_compiled_blocks_have_the_losses_of_eager_ones(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, words: list[str]
) -> None:
    short = [
        "total_steps=4",
        "schedule.cooldown_steps=1",
        "data.val={}",
        "model.n_layers=1",
        *words,
    ]
    eager = train(train_server, toy_recipe, tmp_path / "eager", *short, world=2)
    compiled = [*short, "parallel.compile=true", "parallel.activation_checkpointing=selective"]
    ours = train(train_server, toy_recipe, tmp_path / "compiled", *compiled, world=2)
    assert ours == pytest.approx(eager, rel=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ["parallel.activation_checkpointing=selective", "parallel.prefetch_blocks=2"],
        pytest.param(["parallel.activation_checkpointing=full"], marks=SLOW),
        pytest.param(
            ["parallel.activation_checkpointing=selective", "parallel.activation_budget=1"],
            marks=SLOW,
        ),
    ],
    ids=["selective", "full", "all_products"],
)
def test_recomputation_and_prefetch_do_not_change_a_bit(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path, words: list[str]
) -> None:
    short = ["total_steps=4", "schedule.cooldown_steps=1"]
    plain = train(train_server, toy_recipe, tmp_path / "plain", *short, world=2)
    assert train(train_server, toy_recipe, tmp_path / "saving", *short, *words, world=2) == plain


def test_selective_recomputation_keeps_products_as_the_budget_says() -> None:
    """Of what autograd holds between forward and backward, by bytes."""
    from openlm_lite.recompute import recomputed

    def held(how: str, budget: float) -> int:
        model = tiny_model(tiny_config(qk_norm="none", norm="rms_norm"))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for i, block in enumerate(model.layers):
            model.layers[i] = recomputed(block, how, budget)  # pyright: ignore[reportArgumentType]
        kept: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        tokens = torch.randint(300, (2, 33))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            sums = model(tokens[:, :-1], tokens[:, 1:])
        del sums
        return sum(kept.values())

    assert held("full", 0.0) < held("none", 0.0)


# --- what does not fit ---------------------------------------------------------------------------


@given(
    replicate=st.integers(1, 4), shard=st.integers(1, 4), cp=st.integers(1, 3), tp=st.integers(1, 3)
)
def test_sizes_that_are_left_open_are_those_of_the_ranks(
    replicate: int, shard: int, cp: int, tp: int
) -> None:
    ranks = replicate * shard * cp * tp
    sizes = Sizes(replicate, shard, cp, tp)
    assert LayoutConfig(replicate, -1, cp, tp).sizes(ranks) == sizes
    assert LayoutConfig(-1, shard, cp, tp).sizes(ranks) == sizes
    assert LayoutConfig(replicate, shard, cp, tp).sizes(ranks) == sizes
    assert sizes.data_ranks * sizes.ranks_per_row == ranks == sizes.addends * tp
    with pytest.raises(InputError, match=f"but there are {ranks + 1} ranks; start {ranks}"):
        LayoutConfig(replicate, shard, cp, tp).sizes(ranks + 1)


@given(cp=st.integers(1, 8), piece=st.integers(1, 5))
def test_the_ranks_of_a_row_have_each_position_once_and_the_same_work(cp: int, piece: int) -> None:
    T = 2 * cp * piece
    parts = [positions_of(T, cp, rank) for rank in range(cp)]
    assert torch.cat(parts).sort().values.tolist() == list(range(T))
    assert len({int((part + 1).sum()) for part in parts}) == 1  # keys that its queries see


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tp=3"], "does not divide model.n_heads = 4 and model.n_kv_heads = 2 and"),
        (["parallel.tp=4"], "parallel.tp = 4 does not divide model.n_kv_heads = 2; the next sm"),
        (
            ["parallel.cp=3"],
            "data.seq_len = 32 does not divide among parallel: 2 x cp 3 x tp 1 = 6",
        ),
        ([TP, "model.positions=alibi"], "set both to 1"),
        ([CP, "data.document_masking=true"], "does not go with parallel.cp = 2: set parallel.cp"),
        ([TP, "optim.name=muon"], "set parallel.tp = 1 (dp_replicate, dp_shard and cp may be"),
        (["parallel.dp_shard=-1", "parallel.dp_replicate=-1"], "are both -1: give one of them"),
        (["parallel.dp_shard=0"], "dp_shard = 0, must be at least 1 (or -1"),
        (["parallel.tp=-1"], "tp = -1, must be at least 1"),
        (["parallel.activation_budget=2"], "activation_budget = 2.0, must be from 0 to 1"),
        (["parallel.reshard_after_forward=1"], "must be true, false or a number of ranks from 2"),
        (["parallel.float8=rowwise"], "float8 = rowwise needs precision = bf16"),
        (["parallel.activation_checkpointing=some"], "or one of none, full, selective, got 'some'"),
    ],
)
def test_a_layout_that_cannot_be_is_one_error_that_says_what_can(
    toy_recipe: Path, words: list[str], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_run(str(toy_recipe), words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("world", "words", "message"),
    [
        (3, [TP], "dp_replicate 1 x cp 1 x tp 2 = 2 does not divide the 3 ranks"),
        (4, [TP, "parallel.dp_shard=1"], "dp_shard 1 x cp 1 x tp 2 = 2, but there are 4 ranks"),
        (4, ["parallel.reshard_after_forward=4"], "must be less than the 4 shards"),
        (4, [TP, "micro_batch_size=8"], "which 2 data ranks x micro_batch_size = 8 do not divide"),
    ],
)
def test_a_layout_that_does_not_fit_the_ranks_is_told(
    toy_recipe: Path, world: int, words: list[str], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_run(str(toy_recipe), words).check_layout(world)
    assert message in str(caught.value)


def test_a_mesh_that_does_not_fit_writes_nothing(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    words = [str(toy_recipe), f"run.dir={tmp_path / 'r'}", "parallel.dp_replicate=3"]
    assert train_server.train(*words, world=2, log=log)["codes"] == [2, 2]
    assert log.read_text().startswith("openlm: parallel: dp_replicate 3 x cp 1 x tp 1 = 3 does not")
    assert log.read_text().count("\n") == 1 and not (tmp_path / "r").exists()


# --- float8 --------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_float8_without_hardware_is_one_error() -> None:
    for device in ("auto", "cpu"):
        with pytest.raises(InputError, match=r"needs a GPU, this run is on a CPU; set parallel"):
            check_float8("tensorwise", device)
    check_float8("none", "cpu")


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


# --- what it needs -------------------------------------------------------------------------------


def test_config_says_what_fits_a_gpu_and_what_to_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["config", "dclm_7b_2x", "--gpus", "8", "--json"]
    assert main([*words, "--gpu", "A100-40"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits_A100-40"] == "no" and "A100-40" not in found["fits"].split(", ")
    first = found["would_fit_with"].split("; ")[0]
    changes = first.split(": ")[0].split()
    assert main([*words[:2], *changes, *words[2:], "--gpu", "A100-40"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["fits_A100-40"] == "yes"
    assert again["memory_gib_per_gpu"] == pytest.approx(float(first.split()[-2]), abs=0.06)
    assert main([*words, "--gpu", "H1000"]) == 2
    assert "there are A100-40, A100-80, H100, H200, B200" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["parallel.tp=8"],
        ["parallel.cp=4"],
        ["parallel.activation_checkpointing=selective"],
        ["parallel.reduce_every_micro_batch=true"],
        ["micro_batch_size=1"],
    ],
)
def test_the_memory_estimate_knows_what_saves_memory(words: list[str]) -> None:
    from openlm_lite.run import memory_bytes

    plain = memory_bytes(load_run("dclm_7b_2x"), 64)
    assert memory_bytes(load_run("dclm_7b_2x", words), 64) < plain
    assert memory_bytes(load_run("dclm_7b_2x", ["parallel.dp_replicate=8"]), 64) > plain


def test_the_estimate_of_the_states_is_what_the_ranks_hold(toy_recipe: Path) -> None:
    cfg = load_run(str(toy_recipe), [TP])
    from openlm_lite.memory import parts_of
    from openlm_lite.run import memory_need

    n = sum(p.numel() for p in Transformer(cfg.model.architecture).parameters())
    assert parts_of(memory_need(cfg, 2)).states == 16 * n // 2
    hsdp = load_run(str(toy_recipe), [HSDP])
    assert parts_of(memory_need(hsdp, 4)).states == 16 * n // 2


def test_old_words_for_activation_checkpointing_still_work() -> None:
    on = load_run("dclm_1b_1x", ["parallel.activation_checkpointing=true"]).parallel
    off = load_run("dclm_1b_1x", ["parallel.activation_checkpointing=false"]).parallel
    assert (on.recomputation, off.recomputation) == ("full", "none")
