"""`slurm/train.sbatch` and `slurm/prepare.sbatch` on a real Slurm: two `slurmd`s on this host."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.cli import main
from openlm_lite.data.prepare import PrepareConfig, prepare
from openlm_lite.run_files import STOPPED as STOPPED_NAME
from tests.data.prepare_corpus import (
    files_of,
    make_texts,
    train_small_tokenizer,
    write_lines,
)
from tests.scaling.test_ladder import small_ladder
from tests.slurm_cluster import (
    PREPARE,
    TRAIN,
    Cluster,
    losses,
    skip_without_slurm,
    wait_until,
)
from tests.train_server import ROOT, TrainServer

ONE_NODE = ("--nodes=1",)
# Steps that are slow enough for something to happen in the middle of a run.
SLOWER = ("eval.every_steps=0", "global_batch_tokens=2048")
SAME_AT_ANY_LENGTH = ("schedule.name=constant", "schedule.cooldown_steps=0", "schedule.end_lr=0")


@pytest.mark.parametrize("script", [TRAIN, PREPARE], ids=lambda path: path.name)
def test_the_scripts_are_valid_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_file_that_train_sbatch_looks_for_is_the_one_that_the_trainer_leaves() -> None:
    assert f'"$run_dir/{STOPPED_NAME}"' in TRAIN.read_text()


@pytest.fixture(scope="module")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    skip_without_slurm()
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster whole and without jobs, before and after."""
    running_cluster.wait_for_nodes()
    yield running_cluster
    for node in ("n1", "n2"):
        running_cluster.revive_node(node)
    running_cluster.run("scancel", "--user=root", check=False)


def saved_step(run: Path) -> int:
    return int(Path(resolve_checkpoint(str(run))).name.removeprefix("step_"))


def stopped_steps(out: Path) -> list[int]:
    """The steps after which the job stopped on request, by what it said."""
    return [int(n) for n in re.findall(r"stopped on request after step (\d+)", out.read_text())]


def assert_same_losses(run: Path, other: Path) -> None:
    assert losses(run) == pytest.approx(losses(other), rel=1e-6)


@pytest.mark.slow
@pytest.mark.slurm
def test_two_nodes_have_the_losses_of_one_process(
    cluster: Cluster, train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    assert train_server.train(str(toy_recipe), f"run.dir={tmp_path / 'one'}")["codes"] == [0]
    run, out = tmp_path / "two", tmp_path / "out.txt"
    job = cluster.submit(out, str(toy_recipe), f"run.dir={run}", "--allow-change", "optim.lr")
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert cluster.field(job, "Restarts") == "0"
    assert "2 x cpu" in out.read_text()
    assert len(losses(run)) == 12
    assert_same_losses(run, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.slurm
def test_a_signal_saves_requeues_and_resumes_with_the_same_losses(
    cluster: Cluster, train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [str(toy_recipe), "total_steps=120", "checkpoint.every_steps=1000", *SLOWER]
    job = cluster.submit(out, *words, f"run.dir={run}")
    cluster.wait_for_steps(job, run, 10)
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert cluster.field(job, "Restarts") == "1"

    (stopped,) = stopped_steps(out)
    assert 10 <= stopped < 120
    assert f"requeueing job {job}" in out.read_text() and f"resuming {run}" in out.read_text()
    reference = tmp_path / "reference"
    assert train_server.train(*words, f"run.dir={reference}", world=2)["codes"] == [0, 0]
    assert len(losses(run)) == 120
    assert_same_losses(run, reference)


@pytest.mark.slow
@pytest.mark.slurm
def test_over_time_limits_and_a_scancel_a_run_has_the_losses_of_one_without(
    cluster: Cluster, train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    """The signal is Slurm's own here, as the limit comes near. When it does is for Slurm to say, so
    the run is endless until the last line."""
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [str(toy_recipe), "checkpoint.every_steps=100000", *SLOWER, *SAME_AT_ANY_LENGTH]
    job = cluster.submit(out, *words, f"run.dir={run}", "total_steps=100000")
    for restarts in ("1", "2"):
        cluster.wait_for_steps(job, run, len(losses(run)) + 10)
        # 20 minutes become what is left when the warning is due, so that nobody waits for it.
        elapsed = cluster.run("squeue", "--noheader", f"--job={job}", "--format=%M")
        limit = int(elapsed.split(":")[0]) + 3
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
        wait_until("the job is requeued", lambda n=restarts: cluster.field(job, "Restarts") == n)
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    first, second = stopped_steps(out)
    assert 10 <= first < second == saved_step(run)
    cluster.wait_for_steps(job, run, second + 5)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job) == "CANCELLED"
    cluster.wait_for_nodes()
    assert cluster.field(job, "Restarts") == "2" and out.read_text().count("requeueing") == 2

    end = f"total_steps={len(losses(run)) + 10}"
    job = cluster.submit(out, *words, f"run.dir={run}", end, "--allow-change", "total_steps")
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert not (run / STOPPED_NAME).exists()
    reference = tmp_path / "reference"
    assert train_server.train(*words, f"run.dir={reference}", end, world=2)["codes"] == [0, 0]
    assert_same_losses(run, reference)


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.parametrize("receiver", ["the shell of the job", "torchrun"])
def test_a_signal_before_there_is_a_rank_costs_nothing(
    cluster: Cluster, toy_recipe: Path, tmp_path: Path, receiver: str
) -> None:
    """The first while the recipe is read, when no step of the job exists; the other in imports."""
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [str(toy_recipe), "total_steps=100000", "checkpoint.every_steps=100000"]
    job = cluster.submit(out, *words, f"run.dir={run}")
    if receiver == "torchrun":
        cluster.wait_for_process("/torchrun", f"SLURM_JOB_ID={job}")
        cluster.run("scancel", "--signal=USR1", job)
    else:
        cluster.wait_for_process("openlm_lite.cli", f"SLURM_JOB_ID={job}")
        cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_until("the job is requeued", lambda: cluster.field(job, "Restarts") == "1")
    (stopped,) = stopped_steps(out)
    assert 1 <= stopped < 50
    assert saved_step(run) == stopped
    cluster.wait_for_steps(job, run, stopped + 5)
    assert f"resuming {run}" in out.read_text()


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_of_a_dead_node_resumes_on_another_one(
    cluster: Cluster, train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [str(toy_recipe), "total_steps=60", "checkpoint.every_steps=10", *SLOWER]
    job = cluster.submit(out, *words, f"run.dir={run}", options=ONE_NODE)
    cluster.wait_for_steps(job, run, 25)
    dead = cluster.field(job, "BatchHost")
    cluster.kill_node(dead)
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert cluster.field(job, "Restarts") == "1"
    assert cluster.field(job, "BatchHost") != dead
    assert f"resuming {run}" in out.read_text()
    reference = tmp_path / "reference"
    assert train_server.train(*words, f"run.dir={reference}")["codes"] == [0]
    assert len(losses(run)) == 60
    assert_same_losses(run, reference)


@pytest.mark.slow
@pytest.mark.slurm
def test_an_elastic_job_goes_on_without_a_dead_node_and_is_whole_after_a_requeue(
    cluster: Cluster, train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    """Two nodes, one after the death of the other, then two again; the batches stay the same."""
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [str(toy_recipe), "total_steps=140", "checkpoint.every_steps=10", *SLOWER]
    options = ("--nodes=2", "--no-kill")
    job = cluster.submit(out, *words, f"run.dir={run}", options=options, env={"NNODES": "1:2"})
    cluster.wait_for_steps(job, run, 25)
    cluster.kill_node("n2")
    wait_until("the job goes on alone", lambda: "1 x cpu" in out.read_text())
    assert cluster.field(job, "JobState") == "RUNNING"
    assert cluster.field(job, "Restarts") == "0"
    cluster.revive_node("n2")
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert cluster.field(job, "Restarts") == "1"
    assert re.findall(r"(\d) x cpu", out.read_text()) == ["2", "1", "2"]
    assert len(stopped_steps(out)) == 1
    reference = tmp_path / "reference"
    assert train_server.train(*words, f"run.dir={reference}")["codes"] == [0]
    assert len(losses(run)) == 140
    assert_same_losses(run, reference)


@pytest.mark.slow
@pytest.mark.slurm
def test_an_elastic_job_whose_first_node_dies_resumes_from_the_queue(
    cluster: Cluster, train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    """The job's shell and the store where the torchruns meet are there: nothing can go on."""
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [str(toy_recipe), "total_steps=60", "checkpoint.every_steps=10", *SLOWER]
    options = ("--nodes=2", "--no-kill")
    job = cluster.submit(out, *words, f"run.dir={run}", options=options, env={"NNODES": "1:2"})
    cluster.wait_for_steps(job, run, 25)
    assert cluster.field(job, "BatchHost") == "n1"
    cluster.kill_node("n1")
    wait_until(
        "the dead node is known", lambda: "down" in cluster.run("sinfo", "-hn", "n1", "-o%T")
    )
    cluster.revive_node("n1")
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert cluster.field(job, "Restarts") == "1"
    assert re.findall(r"(\d) x cpu", out.read_text()) == ["2", "2"]
    reference = tmp_path / "reference"
    assert train_server.train(*words, f"run.dir={reference}", world=2)["codes"] == [0, 0]
    assert len(losses(run)) == 60
    assert_same_losses(run, reference)


@pytest.mark.slow
@pytest.mark.slurm
def test_an_elastic_job_that_is_cancelled_ends_and_is_not_requeued(
    cluster: Cluster, toy_recipe: Path, tmp_path: Path
) -> None:
    """Its other nodes do not take the end for the death of the first one."""
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [str(toy_recipe), "total_steps=100000", "checkpoint.every_steps=100000", *SLOWER]
    options = ("--nodes=2", "--no-kill")
    job = cluster.submit(out, *words, f"run.dir={run}", options=options, env={"NNODES": "1:2"})
    cluster.wait_for_steps(job, run, 5)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job) == "CANCELLED"
    cluster.wait_for_nodes()
    assert cluster.field(job, "Restarts") == "0" and cluster.field(job, "JobState") == "CANCELLED"


@pytest.mark.slow
@pytest.mark.slurm
def test_a_failure_is_not_requeued(cluster: Cluster, toy_recipe: Path, tmp_path: Path) -> None:
    """Not even one of a run that was stopped before, and says so to this day."""
    run, out = tmp_path / "run", tmp_path / "out.txt"
    run.mkdir()
    (run / "config.yaml").write_text("no: recipe\n")  # the start fails before it is a start
    (run / "metrics.jsonl").write_text("{}\n")
    (run / STOPPED_NAME).write_text('{"step": 3, "tokens": 768}\n')
    job = cluster.submit(out, str(toy_recipe), f"run.dir={run}")
    assert cluster.wait_for_end(job) == "FAILED"
    assert (run / STOPPED_NAME).exists()
    assert cluster.field(job, "Restarts") == "0" and "requeueing" not in out.read_text()


@pytest.mark.slow
@pytest.mark.slurm
def test_a_loss_that_is_not_finite_is_not_requeued(
    cluster: Cluster, toy_recipe: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [str(toy_recipe), f"run.dir={run}", "optim.lr=1e30", "schedule.warmup_steps=0"]
    job = cluster.submit(out, *words)
    assert cluster.wait_for_end(job) == "FAILED"
    assert cluster.field(job, "Restarts") == "0" and "requeueing" not in out.read_text()


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.parametrize(
    ("word", "env", "message"),
    [
        ("optim.lerning_rate=1", {}, "openlm: "),
        (
            "run.seed=1",
            {"NPROC": "3"},
            "train.sbatch: the sequences of global_batch_tokens do not ",
        ),
    ],
)
def test_a_wrong_recipe_fails_before_any_rank_starts(
    cluster: Cluster,
    toy_recipe: Path,
    tmp_path: Path,
    word: str,
    env: dict[str, str],
    message: str,
) -> None:
    out = tmp_path / "out.txt"
    job = cluster.submit(out, str(toy_recipe), word, f"run.dir={tmp_path / 'run'}", env=env)
    assert cluster.wait_for_end(job) == "FAILED"
    assert cluster.field(job, "ExitCode") == "2:0"
    assert out.read_text().startswith(message) and out.read_text().count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.slurm
def test_a_second_job_on_a_run_folder_is_refused_and_the_first_goes_on(
    cluster: Cluster, toy_recipe: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [str(toy_recipe), f"run.dir={run}", "total_steps=100000", "checkpoint.every_steps=1000"]
    first = cluster.submit(tmp_path / "first.txt", *words, options=ONE_NODE)
    cluster.wait_for_steps(first, run, 5)
    second = cluster.submit(out, *words, options=ONE_NODE)
    assert cluster.wait_for_end(second) == "FAILED"
    assert "is in use by another run" in out.read_text()
    assert cluster.field(second, "Restarts") == "0"
    assert cluster.field(first, "JobState") == "RUNNING"
    cluster.wait_for_steps(first, run, len(losses(run)) + 5)


def write_sources(folder: Path) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """The list of two sources, one of them of two inputs."""
    inputs = {
        "web": (str(folder / "web" / "*.jsonl"), str(folder / "more.jsonl")),
        "code": (str(folder / "code"),),
    }
    texts = make_texts(200_000)
    for i, name in enumerate(("web/a.jsonl", "web/b.jsonl", "more.jsonl", "code/c.jsonl")):
        write_lines(folder / name, texts[i::4])
    path = folder / "sources.txt"
    lines = "".join(f"{name}\t{' '.join(words)}\n" for name, words in inputs.items())
    path.write_text(f"# two sources\n\n{lines}")
    return path, inputs


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.parametrize(
    ("killed", "how"),
    [
        (0, ("scancel", "--batch", "--signal=USR1")),  # what Slurm does before the time limit
        (1, ("scancel", "--batch", "--signal=USR1")),
        (1, ("scontrol", "requeue")),  # kills it
    ],
)
def test_an_array_prepares_a_dataset_per_source_over_a_requeue_of_one_task(
    cluster: Cluster, tmp_path: Path, killed: int, how: tuple[str, ...]
) -> None:
    """One of the two tasks has the number of the whole array; the other task is left alone."""
    sources, inputs = write_sources(tmp_path)
    tokenizer = train_small_tokenizer(tmp_path / "tokenizer")
    options = ("--tokenizer", tokenizer, "--block-tokens", "256", "--val-fraction", "0.05")
    array = cluster.submit(
        tmp_path / "out-%a.txt",
        str(sources),
        f"{tmp_path}/out",
        *options,
        script=PREPARE,
        options=("--array=0-1",),
    )
    name = list(inputs)[killed]
    task = f"{array}_{killed}"
    wait_until("it has begun", (tmp_path / "out" / name / ".prepare" / "plan.json").exists)
    cluster.run(*how, task)
    for one in (f"{array}_0", f"{array}_1"):
        assert cluster.wait_for_end(one) == "COMPLETED"
    assert cluster.field(task, "Restarts") == "1"
    assert cluster.field(f"{array}_{1 - killed}", "Restarts") == "0"

    for source, words in inputs.items():
        cfg = PrepareConfig(
            inputs=words,
            out=str(tmp_path / "direct" / source),
            tokenizer=tokenizer,
            block_tokens=256,
            val_fraction=0.05,
            workers=1,
        )
        prepare(cfg)
        assert files_of(tmp_path / "out" / source) == files_of(tmp_path / "direct" / source)


@pytest.mark.slow
@pytest.mark.slurm
def test_a_ladder_trains_as_an_array_and_a_task_that_is_told_to_stop_goes_on(
    cluster: Cluster, toy_recipe: Path, tmp_path: Path
) -> None:
    folder, plan = tmp_path / "ladder", small_ladder(tmp_path, toy_recipe)
    assert main(["fit", "--plan", str(plan), "--out", str(folder)]) == 0
    runs = json.loads((folder / "ladder.json").read_text())["runs"]
    array = cluster.submit(
        tmp_path / "out-%a.txt",
        script=folder / "array.sbatch",
        options=("--nodes=1",),
        env={"PYTHONPATH": str(ROOT)},
    )
    task = (f"SLURM_ARRAY_JOB_ID={array}", "SLURM_ARRAY_TASK_ID=0")
    cluster.wait_for_process("torchrun", *task)
    # of a task scancel may say "try again later" although the signal has arrived, and repeat it
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_0", check=False)
    for number, run in enumerate(runs):
        if run["is_target"]:
            continue
        assert cluster.wait_for_end(f"{array}_{number}") == "COMPLETED"
        assert (folder / f"{run['name']}.done").exists()
        assert len(losses(folder / run["folder"])) == run["steps"]
    stops = len(stopped_steps(tmp_path / "out-0.txt"))
    assert stops == int(cluster.field(f"{array}_0", "Restarts")) >= 1
    assert not (folder / "target.done").exists()


@pytest.mark.parametrize(
    ("text", "task", "words", "message"),
    [
        ("web a\ncode b\n", "2", (), "has sources 0 to 1, and this task's number is 2"),
        ("web a\n", None, (), "this task's number is none; sbatch --array=0-0"),
        ("web a\n# x\nweb b\n", "0", (), "more than one source is named web"),
        ("../web a\n", "0", (), "../web: a name is letters, digits"),
        ("web\n", "0", (), "web: has no input"),
        ("web a\n", "0", ("--train-tokenizer", "300"), "train one first"),
        ("web a\n", "0", ("--out=x",), "OUT is the second word"),
    ],
)
def test_a_wrong_list_of_sources_is_one_error(
    tmp_path: Path, text: str, task: str | None, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "sources.txt").write_text(text)
    done = subprocess.run(
        [shutil.which("bash") or "bash", str(PREPARE), "sources.txt", "out", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"} | ({} if task is None else {"SLURM_ARRAY_TASK_ID": task}),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("prepare.sbatch: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
