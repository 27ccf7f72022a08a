"""Runs that branch off another: to the bit what the trunk would do, and never a harm to it."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openlm_lite.checkpoint import metadata_of, resolve_checkpoint
from openlm_lite.cli import main
from openlm_lite.commit import read_commit, step_folders
from openlm_lite.errors import InputError
from openlm_lite.hf.weights import checkpoint_weights
from openlm_lite.inherit import InitFrom, _with_step
from openlm_lite.lineage import ancestors, tokens_before
from openlm_lite.log import human, read_metrics
from openlm_lite.run import load_run
from openlm_lite.safe_dcp import read_tensors
from tests.train_server import TrainServer

# A cosine over 12 steps that the trunk leaves at step 8
TRUNK = ["schedule.name=cosine", "schedule.cooldown_steps=0", "schedule.length_steps=12"]
TRUNK += ["total_steps=8", "checkpoint.every_steps=4", "eval.every_steps=4"]
BATCH = 256  # tokens


def measured(run: Path, after: int = 0) -> list[dict[str, Any]]:
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["step"] > after]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def rates(run: Path) -> dict[int, float]:
    return {r["step"]: r["train/lr"] for r in measured(run) if "train/lr" in r}


def weights_of(run: Path) -> dict[str, Tensor]:
    return dict(checkpoint_weights(resolve_checkpoint(str(run))))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def adam_steps(step_folder: str) -> set[float]:
    """The step counts in the optimizer's state of a checkpoint."""
    metadata = metadata_of(read_commit(step_folder))
    names = [
        n for n in metadata.state_dict_metadata if n.startswith("optim.") and n[-5:] == ".step"
    ]
    tensors = {name: torch.zeros(()) for name in names}
    read_tensors(step_folder, metadata, tensors, alone=True)
    assert tensors
    return {t.item() for t in tensors.values()}


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below, with its time of change and its content."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


@pytest.fixture(scope="module")
def trunk(
    train_server: TrainServer, toy_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("trunk") / "trunk"
    assert train_server.train(str(toy_recipe), f"run.dir={run}", *TRUNK)["codes"] == [0]
    return run


@pytest.fixture
def branch(toy_recipe: Path, trunk: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The words of a branch off the trunk's step 4, in tmp_path/NAME."""

    def words(*more: str, name: str = "branch", start: str = f"{trunk}@4") -> list[str]:
        own = [str(toy_recipe), f"run.dir={tmp_path / name}", f"model.init_from={start}", *TRUNK]
        return [*own, *more]

    return words


WHOLE = ["model.init_from.optimizer=true", "model.init_from.data=continue"]


@pytest.mark.parametrize(
    ("optimizer", "world"),
    [
        ("adamw", 1),
        ("muon", 2),
        pytest.param("adamw", 2, marks=pytest.mark.slow),
        pytest.param("muon", 1, marks=pytest.mark.slow),
    ],
)
def test_a_branch_with_the_trunks_own_schedule_trains_what_the_trunk_trained_to_the_bit(
    train_server: TrainServer,
    toy_recipe: Path,
    trunk: Path,
    branch: Callable[..., list[str]],
    tmp_path: Path,
    world: int,
    optimizer: str,
) -> None:
    own = [f"optim.name={optimizer}"]
    if world > 1 or optimizer != "adamw":
        trunk = tmp_path / "trunk"
        words = [str(toy_recipe), f"run.dir={trunk}", *TRUNK, *own]
        assert set(train_server.train(*words, world=world)["codes"]) == {0}
    words = branch(*WHOLE, *own, start=f"{trunk}@4")
    assert set(train_server.train(*words, world=world)["codes"]) == {0}
    assert measured(tmp_path / "branch", after=4) == measured(trunk, after=4)
    assert len(measured(trunk, after=4)) == 4 + 1
    (before,) = [r for r in measured(tmp_path / "branch") if r["step"] <= 4]
    assert before in measured(trunk)  # the validation at step 4
    assert equal(weights_of(tmp_path / "branch"), weights_of(trunk))


def test_several_cooldowns_from_one_trunk_leave_it_as_it_was(
    train_server: TrainServer, trunk: Path, branch: Callable[..., list[str]], tmp_path: Path
) -> None:
    before = state_of(trunk)
    cooldown = [*WHOLE, "schedule.name=cosine_cooldown"]
    starts = {"a": f"{trunk}@4", "b": str(trunk), "c": f"{trunk}/checkpoints/step_00000004"}
    ends = {"a": (7, 3), "b": (10, 2), "c": (8, 2)}
    for name, start in starts.items():
        total, steps = ends[name]
        more = [*cooldown, f"total_steps={total}", f"schedule.cooldown_tokens={steps * BATCH}"]
        words = [*branch(*more, name=name, start=start), "schedule.cooldown_steps=0"]
        assert train_server.train(*words)["codes"] == [0]
    assert state_of(trunk) == before
    lr = {name: rates(tmp_path / name) for name in starts}
    assert list(lr["a"]) == [5, 6, 7] and list(lr["b"]) == [9, 10] and list(lr["c"]) == [5, 6, 7, 8]
    on_trunk = rates(trunk)
    assert lr["a"][5] == on_trunk[5]  # where a cooldown begins it is still the trunk's rate
    assert lr["c"][5] == on_trunk[5] and lr["c"][6] == on_trunk[6]
    assert lr["a"][7] == pytest.approx(1e-4 + (on_trunk[5] - 1e-4) / 3)
    losses = {n: [r["train/loss"] for r in measured(tmp_path / n) if "train/loss" in r] for n in lr}
    assert losses["a"][0] == losses["c"][0]  # one start, one batch


def test_a_branch_on_other_data_keeps_the_optimizer_and_counts_its_own_steps(
    train_server: TrainServer, trunk: Path, branch: Callable[..., list[str]], tmp_path: Path
) -> None:
    data = load_run(branch()[0]).data.train
    mix = f"{{a: {{path: {data}, weight: 1}}, b: {{path: {data}, weight: 2}}}}"
    more = ["model.init_from.optimizer=true", "data.seed=5", "run.seed=7", "data.train=null"]
    more += [f"data.sources={mix}", "total_steps=3", "schedule.length_steps=null"]
    assert train_server.train(*branch(*more))["codes"] == [0]
    run = tmp_path / "branch"
    assert list(rates(run)) == [1, 2, 3]
    assert [r["tokens"] for r in measured(run) if "train/lr" in r] == [256, 512, 768]
    (last,) = step_folders(str(run / "checkpoints"))
    assert adam_steps(last) == {4 + 3}
    assert adam_steps(f"{trunk}/checkpoints/step_00000008") == {8}


def test_a_fresh_optimizer_may_go_on_in_the_data(
    train_server: TrainServer, trunk: Path, branch: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert train_server.train(*branch("model.init_from.data=continue"))["codes"] == [0]
    run = tmp_path / "branch"
    sums = [
        {r["step"]: r["data/checksum"] for r in measured(folder, 4) if "data/checksum" in r}
        for folder in (run, trunk)
    ]
    assert sums[0] == sums[1] and list(sums[0]) == [5, 6, 7, 8]
    assert adam_steps(resolve_checkpoint(str(run))) == {4}
    assert not equal(weights_of(run), weights_of(trunk))


def test_a_killed_branch_resumes_without_its_trunk(
    train_server: TrainServer, trunk: Path, branch: Callable[..., list[str]], tmp_path: Path
) -> None:
    shutil.copytree(trunk, tmp_path / "trunk")
    words = branch(*WHOLE, "checkpoint.every_steps=2", start=f"{tmp_path / 'trunk'}@4")
    whole = train_server.train(*words, f"run.dir={tmp_path / 'whole'}")
    killed = train_server.train(*words, kill=(0, whole["events"][0] * 3 // 4))
    assert killed["codes"] == [-signal.SIGKILL]
    shutil.rmtree(tmp_path / "trunk")
    assert train_server.train(*words)["codes"] == [0]
    assert measured(tmp_path / "branch") == measured(tmp_path / "whole")
    assert equal(weights_of(tmp_path / "branch"), weights_of(trunk))


def test_the_lineage_is_recorded_printed_and_inspected(
    train_server: TrainServer,
    trunk: Path,
    branch: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train_server.train(*branch(*WHOLE, "total_steps=6", name="child"))["codes"] == [0]
    start = str(tmp_path / "child")
    more = ["total_steps=3", "schedule.length_steps=null"]
    assert train_server.train(*branch(*more, name="grandchild", start=start))["codes"] == [0]
    run = tmp_path / "grandchild"
    record = json.loads((run / "init_from.json").read_text())
    parent, root = f"{start}/checkpoints/step_00000006", f"{trunk}/checkpoints/step_00000004"
    assert record["lineage"] == [
        {"path": parent, "kind": "checkpoint", "step": 6, "tokens": 6 * BATCH},
        {"path": root, "kind": "checkpoint", "step": 4, "tokens": 4 * BATCH},
    ]
    assert record["tokens_before"] == 6 * BATCH  # the child's count has the trunk's in it
    assert (record["optimizer"], record["data"]) == (False, "restart")
    assert read_commit(resolve_checkpoint(str(run))).facts["init_from"] == record
    log = (run / "log.txt").read_text()
    assert f"lineage: {parent} (step 6, {human(1536)} tokens) <- {root} (step 4, " in log
    for path in (run, Path(resolve_checkpoint(str(run)))):
        assert main(["inspect", str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["lineage"] == record["lineage"]
        assert found["tokens_seen"] == (6 + 3) * BATCH


def test_a_chain_with_a_foreign_root_says_that_its_tokens_are_unknown() -> None:
    record = {
        "path": "runs/a/checkpoints/step_00000002",
        "kind": "checkpoint",
        "facts": {
            "step": 2,
            "tokens": 512,
            "init_from": {
                "path": "imported",
                "kind": "checkpoint",
                "facts": {"step": 0, "tokens": 0, "source": {"path": "hub", "hf_class": "Qwen3"}},
            },
        },
    }
    assert [one["path"] for one in ancestors(record)] == [record["path"], "imported", "hub"]
    assert tokens_before(record) is None
    assert ancestors(None) == [] and tokens_before(None) == 0


def test_a_chain_that_starts_at_a_soup_names_its_parts() -> None:
    parts = [
        {"path": f"runs/{name}", "kind": "checkpoint", "weight": 0.5, "step": 9, "tokens": 900}
        for name in "ab"
    ]
    soup = {"path": "soup", "kind": "checkpoint", "facts": {"step": 0, "tokens": 0, "soup": parts}}
    assert [one["path"] for one in ancestors(soup)] == ["soup", "runs/a", "runs/b"]
    assert [one["tokens"] for one in ancestors(soup)] == [None, 900, 900]
    assert tokens_before(soup) is None


def test_a_trunk_that_stopped_early_is_done_and_can_be_prolonged_on_the_same_curve(
    train_server: TrainServer, toy_recipe: Path, trunk: Path, tmp_path: Path
) -> None:
    words = [str(toy_recipe), f"run.dir={tmp_path / 'run'}", *TRUNK]
    log = tmp_path / "log.txt"
    assert train_server.train(*words, "total_steps=6")["codes"] == [0]
    assert train_server.train(*words, log=log)["codes"] == [2]
    assert "--allow-change total_steps" in log.read_text()
    assert train_server.train(*words, "--allow-change", "total_steps")["codes"] == [0]
    steps = [[r for r in measured(run) if "train/loss" in r] for run in (tmp_path / "run", trunk)]
    assert steps[0] == steps[1]
    assert equal(weights_of(tmp_path / "run"), weights_of(trunk))


@pytest.mark.parametrize(
    ("world", "more", "message"),
    [
        (2, [*WHOLE, "data.seed=1"], "data.seed: 0 there, 1 now"),
        (1, [*WHOLE, "global_batch_tokens=512"], "global_batch_tokens: 256 there, 512 now"),
        (1, [*WHOLE, "total_steps=4"], "the parent stands at step 4, the run ends at step 4"),
        (1, [*WHOLE, "optim.name=muon"], "optim.name: adamw there, muon now; use the parent's"),
        (1, [*WHOLE, "model.d_ff=96"], "d_ff: 64 there, 96 here (feed_forward)"),
        (
            1,
            ["model.init_from.optimizer=true", "model.init_from.norms=false"],
            "not all of the weights",
        ),
        (
            1,
            ["model.init_from.data=continue", "guard.spike_sigmas=6", "guard.on_spike=rewind"],
            "take the optimizer, too, or use guard.on_spike=skip",
        ),
    ],
)
def test_what_a_branch_cannot_go_on_with_is_one_error_and_writes_nothing(
    train_server: TrainServer,
    branch: Callable[..., list[str]],
    tmp_path: Path,
    world: int,
    more: list[str],
    message: str,
) -> None:
    log = tmp_path / "log.txt"
    assert train_server.train(*branch(*more), world=world, log=log)["codes"] == [2] * world
    text = log.read_text()
    assert text.count(message) == 1 and "Traceback" not in text
    assert not (tmp_path / "branch").exists()


def test_weights_alone_have_no_optimizer_and_no_place_in_the_data(
    train_server: TrainServer,
    trunk: Path,
    branch: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    folder, imported = tmp_path / "hf", tmp_path / "imported"
    assert main(["export", str(trunk), str(folder), "--json"]) == 0
    assert main(["import", str(folder), str(imported), "--no-compare", "--json"]) == 0
    wanted = {folder: "holds weights alone", imported: "was not written by a run"}
    for switch, (source, message) in zip(WHOLE, wanted.items(), strict=True):
        log = tmp_path / f"{source.name}.txt"
        assert train_server.train(*branch(switch, start=str(source)), log=log)["codes"] == [2]
        assert message in log.read_text()


def test_all_that_is_wrong_with_a_branch_is_told_at_once(
    train_server: TrainServer, branch: Callable[..., list[str]], tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    words = branch(*WHOLE, "data.seed=1", "data.shuffle_shards=3", "total_steps=2")
    assert train_server.train(*words, "schedule.warmup_steps=1", log=log)["codes"] == [2]
    text = log.read_text()
    assert all(part in text for part in ("data.seed", "data.shuffle_shards", "ends at step 2"))
    assert "model.init_from.data=restart" in text


def test_a_step_of_a_run_is_named_with_an_at_sign(trunk: Path, tmp_path: Path) -> None:
    assert _with_step(f"{trunk}@8") == f"{trunk}/checkpoints/step_00000008"
    assert _with_step(str(trunk)) == str(trunk)
    odd = tmp_path / "run@12"
    odd.mkdir()
    assert _with_step(str(odd)) == str(odd)  # a folder of that name
    with pytest.raises(InputError, match=r"no checkpoint of step 5 in .*; steps there: 4, 8"):
        _with_step(f"{trunk}@5")


def test_there_is_nothing_to_take_without_a_parent() -> None:
    for more in ({"optimizer": True}, {"data": "continue"}):
        with pytest.raises(InputError, match=r"without model\.init_from\.path"):
            InitFrom(**more)  # type: ignore[arg-type]
