"""Every layout of the ranks trains the same model; what does not fit is told before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite import dist, parallel
from openlm_lite.cli import main
from openlm_lite.context_parallel import positions_of
from openlm_lite.errors import InputError
from openlm_lite.layout import Layout, LayoutConfig, Sizes
from openlm_lite.model.kernels import Choice, Name
from openlm_lite.run import load_run
from openlm_lite.step import attention_of
from tests.run_faults import fault
from tests.test_train import final_weights, losses, measured, same_weights
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
BF16 = "parallel.precision=bf16"
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
    sizes = load_run(str(toy_recipe), words).parallel.sizes(world)
    said = (tmp_path / "r" / "log.txt").read_text()
    assert f"devices  {world} x cpu, {sizes.describe()}, fp32" in said
    assert f"attention by {'sdpa (in pieces of rows' if sizes.cp > 1 else 'blocks (auto)'}" in said
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


@pytest.mark.slow
def test_weights_kept_over_some_neighbours_do_not_change_a_bit(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    """Nor averages, validations and checkpoints in between, which find weights so kept."""
    words = ["total_steps=4", "schedule.cooldown_steps=1", "micro_batch_size=2"]
    words += [
        "eval.every_steps=1",
        "checkpoint.every_steps=1",
        "averages={e: {kind: ema, decay: 0.9}}",
    ]
    for name, kept in (("true", "true"), ("number", "2")):
        reshard = f"parallel.reshard_after_forward={kept}"
        train(train_server, toy_recipe, tmp_path / name, *words, reshard, world=4)
    assert measured(tmp_path / "number") == measured(tmp_path / "true")
    assert same_weights(tmp_path / "number", tmp_path / "true")


@pytest.mark.parametrize("kept", [True, False, 2])
def test_fsdp_hears_what_is_kept_after_the_forward_pass_of_each_block(
    monkeypatch: pytest.MonkeyPatch, kept: bool | int
) -> None:
    """The last block's weights stay: the backward pass asks for them at once."""
    heard: list[bool | int] = []

    def fully_shard(module: object, *, reshard_after_forward: bool | int = True, **_: object):
        heard.append(reshard_after_forward)

    monkeypatch.setattr(parallel, "fully_shard", fully_shard)
    layout = Layout(Sizes(1, 4), 0, blocks=None, tables=None, tp=None, cp=None)  # pyright: ignore[reportArgumentType]
    cfg = parallel.ParallelConfig(reshard_after_forward=kept)
    parallel.shard(tiny_model(tiny_config(n_layers=3)), layout, cfg)
    assert [(type(n), n) for n in heard] == [(type(n), n) for n in (kept, kept, False, True)]


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
        (["parallel.prefetch_blocks=-1"], "prefetch_blocks = -1, must not be negative"),
        ([CP, "kernels.attention=blocks"], "(parallel.cp = 2) has a kernel of its own; set kernel"),
        (
            [TP, "eval.tasks.suite=core"],
            "eval.tasks: with parallel.tp = 2 and parallel.cp = 1 several ranks share a row",
        ),
        (
            [CP, "eval.samples.prompts=[a]"],
            "eval.samples: with parallel.tp = 1 and parallel.cp = 2 several ranks share a row",
        ),
        (["parallel.reshard_after_forward=1"], "must be true, false or a number of ranks from 2"),
        ([TP, "parallel.reshard_after_forward=2"], "set it to true or false, or parallel.tp = 1"),
        (["parallel.float8=rowwise"], "float8 = rowwise needs precision = bf16"),
        (
            [BF16, "parallel.float8=rowwise", "data.seq_len=30", "global_batch_tokens=240"],
            "take multiples of 16 tokens from each of parallel.cp = 1 ranks; the nearest is 32",
        ),
        (
            [BF16, CP, "parallel.float8=tensorwise", "data.seq_len=48", "global_batch_tokens=480"],
            "take multiples of 16 tokens from each of parallel.cp = 2 ranks; the nearest is 64",
        ),
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


def test_config_for_so_many_gpus_says_whether_layout_and_batch_fit_them(
    toy_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["config", str(toy_recipe), "micro_batch_size=2"]
    assert main([*words, "--gpus", "4"]) == 0
    assert "# gpus: 4" in capsys.readouterr().out
    assert main([*words, "--gpus", "3"]) == 2
    assert "8 sequences, which 3 ranks x micro_batch_size = 2 do not" in capsys.readouterr().err
    assert main([*words, "parallel.reshard_after_forward=3", "--gpus", "4"]) == 2
    assert "must be less than the 4 shards" in capsys.readouterr().err


def test_a_mesh_that_does_not_fit_writes_nothing(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    words = [str(toy_recipe), f"run.dir={tmp_path / 'r'}", "parallel.dp_replicate=3"]
    assert train_server.train(*words, world=2, log=log)["codes"] == [2, 2]
    assert log.read_text().startswith("openlm: parallel: dp_replicate 3 x cp 1 x tp 1 = 3 does not")
    assert log.read_text().count("\n") == 1 and not (tmp_path / "r").exists()


def test_logits_of_a_part_of_a_row_are_one_error() -> None:
    model = tiny_model(tiny_config())
    layout = Layout(Sizes(tp=2), 0, blocks=None, tables=None, tp=None, cp=None)  # pyright: ignore[reportArgumentType]
    parallel.take_part_of_rows(model, layout)
    with pytest.raises(InputError, match=r"tp = 2, parallel.cp = 1: each rank has a part of a row"):
        model(torch.zeros(1, 8, dtype=torch.long))


def test_a_kernel_that_one_rank_cannot_run_ends_all_ranks_with_its_error(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    words = [str(toy_recipe), f"run.dir={tmp_path / 'r'}"]
    refused = [fault("refuse", 1, "attention")]
    assert train_server.train(*words, world=2, log=log, faults=refused)["codes"] == [2, 2]
    assert log.read_text() == "openlm: rank 1: attention: not on this rank\n"
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([("sdpa_cudnn", "auto")] * 2, ("sdpa_cudnn", "auto")),
        (
            [("sdpa_cudnn", "auto"), ("sdpa", "auto; sdpa_cudnn: does not run here")],
            ("sdpa", "auto; sdpa_cudnn: does not run here, on rank 1"),
        ),
    ],
)
def test_all_ranks_pass_over_the_kernel_that_one_of_them_passed_over(
    toy_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    choices: list[tuple[Name, str]],
    expected: tuple[str, str],
) -> None:
    gathered = [Choice(*choice) for choice in choices]
    monkeypatch.setattr(dist, "on_all_ranks", lambda action: gathered)
    assert attention_of(load_run(str(toy_recipe)), torch.device("cpu")) == expected
