"""A real Slurm of two nodes (`slurmd`s) on this host, for the tests: started, used, broken, ended.

Needs Debian's slurm-wlm and munge (`apt-get install --no-install-recommends slurm-wlm munge`).
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from openlm_lite.log import read_metrics
from tests.train_server import ROOT, free_port

TRAIN = ROOT / "slurm" / "train.sbatch"
PREPARE = ROOT / "slurm" / "prepare.sbatch"
NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "srun")
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "NODE_FAIL")
LONG_ENOUGH = 400.0
"""seconds that anything here may take: several starts of torchrun on two slow cores, with room"""


def wait_until(what: str, true: Callable[[], object], seconds: float = LONG_ENOUGH) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def skip_without_slurm() -> None:
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        pytest.skip(f"no Slurm here: {', '.join(absent)} not found (packages slurm-wlm, munge)")
    if os.getuid() != 0:
        pytest.skip("a Slurm of one's own, started without systemd, needs root")


def losses(run: Path) -> list[float]:
    if not (run / "metrics.jsonl").exists():
        return []
    records = read_metrics(run / "metrics.jsonl")
    return [r["train/loss"] for r in records if "train/loss" in r]


class Cluster:
    """Two nodes with one CPU each; everything in `folder`, all ports on loopback."""

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
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for name in ("state", *NODES):
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
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        for node in NODES:
            self._start_slurmd(node)
        self.wait_for_nodes()

    def stop(self) -> None:
        """Ends the daemons of this cluster, newest first, and with them their jobs."""
        self.run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}", check=False)
        time.sleep(1)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def wait_for_nodes(self) -> None:
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        wait_until("both nodes are idle", lambda: self.run(*idle, check=False) == "2", 120)

    def kill_node(self, node: str) -> None:
        """SIGKILL to all processes of a node at once, as when its power fails."""
        daemon = self.daemons[node]
        pids = {daemon.pid}
        for process in self._processes(f"SLURMD_NODENAME={node}"):
            pids.add(int(process.name))
            with suppress(OSError):
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd: ["):
                    pids.add(parent)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def revive_node(self, node: str) -> None:
        """After `kill_node`, if it was called."""
        if self.daemons[node].poll() is not None:
            self._start_slurmd(node)

    def run(self, *command: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**self.environment, **(env or {})}
        )
        if check:
            assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(
        self,
        output: Path,
        *words: str,
        script: Path = TRAIN,
        options: tuple[str, ...] = ("--nodes=2",),
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Queue a script; returns the job's number."""
        common = ("--parsable", "--time=20", f"--chdir={ROOT}", f"--output={output}")
        return self.run("sbatch", *common, *options, str(script), *words, env=env)

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

    def wait_for_process(self, word: str, *variables: str) -> None:
        """Until a process with these in its environment has an argument that ends so."""

        def there() -> bool:
            for process in self._processes(*variables):
                with suppress(OSError):
                    arguments = (process / "cmdline").read_bytes().decode().split("\0")
                    if any(argument.endswith(word) for argument in arguments):
                        return True
            return False

        wait_until(f"{word} runs", there)

    def _processes(self, *variables: str) -> list[Path]:
        """Folders in /proc of this cluster's processes that have these in the environment."""
        wanted = {f"SLURM_CONF={self.conf}", *variables}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted <= set((process / "environ").read_bytes().decode().split("\0")):
                    found.append(process)
        return found

    def _start_slurmd(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, stdout=out, stderr=out, cwd=self.folder, env=self.environment
            )

    def _conf(self) -> str:
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1 "
            "RealMemory=1000 State=UNKNOWN"
            for node in NODES
        )
        # MessageTimeout: on a busy machine the 10 s after which scontrol gives up are not long.
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
SlurmdTimeout=15
MessageTimeout=60
KillWait=5
JobRequeue=1
SlurmdParameters=config_overrides
CommunicationParameters=NoAddrCache,NoCtldInAddrAny,NoInAddrAny
{nodes}
PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
"""
