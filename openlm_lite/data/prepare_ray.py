"""The stages of `openlm prepare` on a Ray cluster: the same functions, the same files.

Ray places the tasks and repeats those of a lost node; that is harmless, for every stage writes its
files under a temporary name and renames them. All nodes must see the inputs and the scratch folder
under the same paths (a shared file system), and have this package installed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from openlm_lite.errors import InputError, RunError

Job = TypeVar("Job")
Result = TypeVar("Result")

# In a worker process: which shared arguments it has (a tokenizer takes a second to unpack).
_shared: tuple[str, tuple[Any, ...]] = ("", ())
_SECONDS_TO_ANSWER = 20.0
_TASKS_PER_WORKER = 2  # in flight: one runs, one waits


@contextmanager
def cluster(address: str | None, workers: int) -> Iterator[None]:
    """Be connected to Ray: as the caller already is, else to `address`, else to RAY_ADDRESS.

    Where none is named, a cluster of `workers` CPUs (0: all cores) is started here for as long as
    it takes. Raises InputError where Ray is absent or does not answer.
    """
    try:
        import ray
    except ImportError:
        raise InputError(
            '--executor ray: Ray is not installed: pip install "openlm-lite[ray]"'
        ) from None
    if ray.is_initialized():
        yield
        return
    named = address or os.environ.get("RAY_ADDRESS", "")
    try:
        _knock(named)
        _connect(ray, address, workers)
    except OSError as e:  # a ConnectionError too
        raise InputError(
            f"--executor ray: no Ray cluster answers at {named or 'this machine'} ({e}); start one "
            "(`ray start --head`), or leave out --ray-address and RAY_ADDRESS"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def each_done(
    function: Callable[..., Result], jobs: Sequence[Job], shared: tuple[Any, ...], workers: int
) -> Iterator[tuple[Job, Result]]:
    """(job, function(job, *shared)) as the jobs get done, up to `workers` at a time (0: all CPUs).

    The first error ends the rest, and is raised as it was in the worker.
    """
    import ray

    workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    remote: Any = ray.remote(num_cpus=1)
    task = remote(_work)
    # in a list Ray hands on the reference, not the value: the worker fetches it once, not per task
    reference = [ray.put(shared)]
    waiting = iter(jobs)
    running: dict[Any, Job] = {}
    try:
        while True:
            while len(running) < workers * _TASKS_PER_WORKER:
                job = next(waiting, None)
                if job is None:
                    break
                running[task.remote(function, job, reference)] = job
            if not running:
                return
            for done in ray.wait(list(running))[0]:
                yield running.pop(done), _result(ray, done)
    finally:
        for left in running:
            ray.cancel(left)


def _knock(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would wait for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()


def _connect(ray: Any, address: str | None, workers: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a tool of ours tells nobody
    quiet = {"log_to_driver": False, "include_dashboard": False, "logging_level": "warning"}
    # not Ray's own default, which joins what it finds here: another user's, or one that has ended
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        ray.init(address=address, num_cpus=workers or None, **quiet)
    except ValueError:  # num_cpus is only for a cluster that is started here
        ray.init(address=address, log_to_driver=False, logging_level="warning")


def _work(function: Callable[..., Any], job: Any, reference: list[Any]) -> Any:
    """In a worker: run the job with the shared arguments, which are kept for the next one."""
    import ray

    global _shared
    key = reference[0].hex()
    if key != _shared[0]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker
        _shared = (key, ray.get(reference[0]))
    return function(job, *_shared[1])


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, InputError | RunError):
            raise e.cause from None
        if isinstance(e.cause, OSError):
            raise e.cause from e
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as e:
        raise RuntimeError(
            f"a Ray worker was killed again and again ({e}); give it more memory, then run the "
            "same command again: it goes on where it was"
        ) from e
