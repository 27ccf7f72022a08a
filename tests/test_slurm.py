"""`slurm/train.sbatch` on a real Slurm: two nodes (`slurmd`s) on this host, started for the tests.

Needs Debian's slurm-wlm and munge (`apt-get install --no-install-recommends slurm-wlm munge`).
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.log import read_metrics
from tests.train_server import ROOT, TrainServer

SCRIPT = ROOT / "slurm" / "train.sbatch"
NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "srun")
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
LONG_ENOUGH = 240.0
"""seconds that anything here may take; two starts of torchrun on two slow cores, with room"""


def test_the_script_is_valid_bash() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_line_that_the_script_counts_is_the_one_that_the_trainer_writes() -> None:
    counted = re.search(r"grep -hs '([^']+)'", SCRIPT.read_text())
    assert counted is not None
    assert counted[1] in (ROOT / "openlm_lite" / "train.py").read_text()


def wait_until(what: str, true: Callable[[], object], seconds: float = LONG_ENOUGH) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    """A Slurm of two nodes with one CPU each; everything in `folder`, all ports on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        # Of the environment only what these jobs need: a test run may itself be a Slurm job.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.environment = kept | {
            "SLURM_CONF": str(self.conf),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", "n1", "n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        self.conf.write_text(self._conf())
        files = {
            name: self.folder / f"munge.{name}" for name in ("key", "pid", "log", "seed", "socket")
        }
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={files['key']}",
            f"--socket={files['socket']}",
            f"--pid-file={files['pid']}",
            f"--log-file={files['log']}",
            f"--seed-file={files['seed']}",
        )
        wait_until("munged answers", files["socket"].exists, 30)
        self._daemon("slurmctld", "-D", "-f", str(self.conf))
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, "-f", str(self.conf))
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        wait_until("both nodes are idle", lambda: self.run(*idle, check=False) == "2", 60)

    def stop(self) -> None:
        """Ends the daemons of this cluster, newest first, and with them their jobs."""
        self.run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}", check=False)
        time.sleep(1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        if check:
            assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, output: Path, *words: str, options: tuple[str, ...] = ()) -> str:
        """Queue the script on both nodes; returns the job's number."""
        return self.run(
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--time=10",
            f"--chdir={ROOT}",
            f"--output={output}",
            *options,
            str(SCRIPT),
            *words,
        )

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`, such as JobState or Restarts."""
        found = re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def wait_for_end(self, job: str) -> str:
        """The state in which the job ended."""
        wait_until("the job ends", lambda: self.field(job, "JobState") not in UNFINISHED)
        return self.field(job, "JobState")

    def wait_for_steps(self, job: str, run: Path, steps: int) -> None:
        def there() -> bool:
            state = self.field(job, "JobState")
            return len(losses(run)) >= steps or state not in UNFINISHED

        wait_until(f"step {steps}", there)
        assert len(losses(run)) >= steps, f"the job ended: {self.field(job, 'JobState')}"

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}{len(self.daemons)}.out").open("wb") as out:
            self.daemons.append(
                subprocess.Popen(
                    command, stdout=out, stderr=out, cwd=self.folder, env=self.environment
                )
            )

    def _conf(self) -> str:
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1 "
            "RealMemory=1000 State=UNKNOWN"
            for node in NODES
        )
        # cred_expire is also how long Slurm waits before it starts a requeued job again.
        return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd.%n.log
ReturnToService=2
KillWait=5
JobRequeue=1
SlurmdParameters=config_overrides
CommunicationParameters=NoAddrCache,NoCtldInAddrAny,NoInAddrAny
{nodes}
PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        pytest.skip(f"no Slurm here: {', '.join(absent)} not found (packages slurm-wlm, munge)")
    if os.getuid() != 0:
        pytest.skip("a Slurm of one's own, started without systemd, needs root")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def losses(run: Path) -> list[float]:
    if not (run / "metrics.jsonl").exists():
        return []
    records = read_metrics(run / "metrics.jsonl")
    return [r["train/loss"] for r in records if "train/loss" in r]


def saved_step(run: Path) -> int:
    return int(Path(resolve_checkpoint(str(run))).name.removeprefix("step_"))


@pytest.mark.slow
def test_two_nodes_have_the_losses_of_one_process(
    cluster: Cluster, train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    assert train_server.train(str(toy_recipe), f"run.dir={tmp_path / 'one'}")["codes"] == [0]
    job = cluster.submit(tmp_path / "out.txt", str(toy_recipe), f"run.dir={tmp_path / 'two'}")
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert "2 x cpu" in (tmp_path / "out.txt").read_text()
    assert len(losses(tmp_path / "two")) == 12
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


@pytest.mark.slow
def test_a_signal_saves_requeues_and_resumes_with_the_same_losses(
    cluster: Cluster, train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [
        str(toy_recipe),
        "total_steps=100",
        "checkpoint.every_steps=100",
        "eval.every_steps=0",
        "global_batch_tokens=2048",  # slower steps: the signal is to come in the middle
    ]
    job = cluster.submit(out, *words, f"run.dir={run}")
    cluster.wait_for_steps(job, run, 10)
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert cluster.field(job, "Restarts") == "1"

    text = out.read_text()
    stopped = re.search(r"stopped on request after step (\d+)", text)
    assert stopped is not None and 10 <= int(stopped[1]) < 100
    assert f"requeueing job {job}" in text and f"resuming {run}" in text
    reference = tmp_path / "reference"
    done = train_server.train(*words, f"run.dir={reference}", world=2)
    assert done["codes"] == [0, 0]
    assert len(losses(run)) == 100
    assert losses(run) == pytest.approx(losses(reference), rel=1e-6)


@pytest.mark.slow
def test_the_time_limit_requeues_and_scancel_ends(
    cluster: Cluster, toy_recipe: Path, tmp_path: Path
) -> None:
    """The signal is Slurm's own here, as the limit comes near."""
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [str(toy_recipe), "total_steps=1000000", "checkpoint.every_steps=1000000"]
    job = cluster.submit(out, *words, "eval.every_steps=0", f"run.dir={run}")
    cluster.wait_for_steps(job, run, 20)
    # 10 minutes become what is left when the warning is due, so that nobody waits for it.
    elapsed = int(cluster.run("squeue", "--noheader", f"--job={job}", "--format=%M").split(":")[0])
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={elapsed + 3}")
    wait_until("the job is requeued", lambda: cluster.field(job, "Restarts") == "1")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    first = saved_step(run)
    assert f"stopped on request after step {first}" in out.read_text()
    cluster.wait_for_steps(job, run, first + 20)
    assert f"resuming {run}" in out.read_text()

    cluster.run("scancel", job)
    assert cluster.wait_for_end(job) == "CANCELLED"
    assert cluster.field(job, "Restarts") == "1"
    assert out.read_text().count("requeueing job") == 1


@pytest.mark.slow
def test_a_failure_is_not_requeued(cluster: Cluster, toy_recipe: Path, tmp_path: Path) -> None:
    """Not even one of a run that was stopped before, whose log says so."""
    run, out = tmp_path / "run", tmp_path / "out.txt"
    run.mkdir()
    (run / "log.txt").write_text("10:00:00 stopped on request after step 3; …\n")
    words = [str(toy_recipe), f"run.dir={run}", "optim.lr=1e30", "schedule.warmup_steps=0"]
    job = cluster.submit(out, *words)
    assert cluster.wait_for_end(job) == "FAILED"
    assert "NonFiniteError: step " in out.read_text()
    assert cluster.field(job, "Restarts") == "0" and "requeueing" not in out.read_text()


@pytest.mark.slow
def test_a_wrong_recipe_fails_before_any_rank_starts(
    cluster: Cluster, toy_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.txt"
    job = cluster.submit(out, str(toy_recipe), "optim.lerning_rate=1")
    assert cluster.wait_for_end(job) == "FAILED"
    assert cluster.field(job, "ExitCode") == "2:0"
    assert out.read_text().startswith("openlm: ") and out.read_text().count("\n") == 1
