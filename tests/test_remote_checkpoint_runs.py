"""Real ranks that save to and resume from an S3 server, and are killed at it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openlm_lite import object_store, remote_checkpoints
from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.commit import check_contents, read_commit
from openlm_lite.errors import InputError
from tests.s3_faults import s3_with_faults
from tests.test_checkpoint_faults import Ranks

pytest.importorskip("moto")
pytest.importorskip("s3fs")
pytestmark = pytest.mark.fault

ROOT = "s3://bucket/runs"
WHOLE = f"{ROOT}/whole"
STRIDE = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ranks(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with pytest.MonkeyPatch.context() as patch, s3_with_faults():
        patch.setenv("XDG_CACHE_HOME", str(cache))
        client = Ranks(tmp_path_factory.mktemp("ranks"))
        yield client
        client.close()


@pytest.fixture(scope="module")
def whole_run(ranks: Ranks) -> list[dict[str, Any]]:
    """What the ranks of an uninterrupted run returned: saves at steps 2, 3, 5; ends at 6."""
    return ranks.results("train", WHOLE)  # pyright: ignore


def steps_of(url: str) -> list[int]:
    return remote_checkpoints.committed_steps(url)


def test_a_run_saves_to_a_url_and_keeps_the_newest_two(
    whole_run: list[dict[str, Any]], cache: Path
) -> None:
    assert steps_of(WHOLE) == [5, 3]
    folders, files = object_store.folder(WHOLE)
    assert (folders, files) == (["step_00000003", "step_00000005"], ["newest.txt"])
    staging = cache / "openlm_lite" / "checkpoints" / "bucket" / "runs" / "whole"
    assert not list(staging.iterdir())


@pytest.mark.parametrize(
    "world_size", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))]
)
def test_any_number_of_ranks_resumes_from_a_url(
    world_size: int, ranks: Ranks, whole_run: list[dict[str, Any]], tmp_path: Path
) -> None:
    local = shutil.copytree(resolve_checkpoint(WHOLE), tmp_path / "all" / "step_00000005")
    there = ranks.results("weights", WHOLE, world_size)  # pyright: ignore
    here = ranks.results("weights", local.parent, world_size)
    assert there == here and there[0]["state"]["step"] == 5


def test_what_a_url_means_for_the_commands_that_read(whole_run: list[dict[str, Any]]) -> None:
    for url in (WHOLE, f"{WHOLE}/", f"{WHOLE}/step_00000005", f"{WHOLE}/step_00000003/"):
        commit = read_commit(resolve_checkpoint(url))
        check_contents(commit)
        assert commit.step == (3 if "00003" in url else 5)
    for url in (f"{ROOT}/nothing", f"{WHOLE}/step_00000004"):
        with pytest.raises(InputError, match="no whole checkpoint"):
            resolve_checkpoint(url)


def test_a_checkpoint_damaged_in_the_store_is_put_aside_and_the_one_before_is_used(
    ranks: Ranks, whole_run: list[dict[str, Any]]
) -> None:
    url = f"{ROOT}/damaged"
    for name in object_store.files(WHOLE):
        object_store.copy(name, url + name.removeprefix(WHOLE))
    place = f"{url}/step_00000005/__1_0.distcp"
    data = bytearray(object_store.read(place) or b"")
    data[len(data) // 2] ^= 1
    object_store.put(place, bytes(data))
    (first, second) = ranks.results("train", url)  # pyright: ignore
    assert first["started_at"] == second["started_at"] == 3
    assert [r["fingerprint"] for r in (first, second)] == [r["fingerprint"] for r in whole_run]
    assert steps_of(url) == [5, 3]
    assert object_store.read(f"{url}/bad-step_00000005/__1_0.distcp") == bytes(data)


@pytest.mark.slow
def test_a_rank_killed_at_any_event_resumes_bit_equal_from_a_url(
    ranks: Ranks, whole_run: list[dict[str, Any]]
) -> None:
    points = [(rank, k) for rank in (0, 1) for k in range(len(whole_run[rank]["events"]))]
    failures = []
    for rank, k in points[STRIDE // 2 :: STRIDE]:
        url = f"{ROOT}/kill-{rank}-{k}"
        killed = ranks.run("train", url, kill=(rank, k))  # pyright: ignore
        again = ranks.run("train", url)  # pyright: ignore
        told = f"rank {rank}, event {k}"
        if killed["codes"][rank] not in (-9, 0) or any(again["codes"]):  # 0: fewer events this time
            failures.append(f"{told}: {killed} then {again}")
        elif [r["fingerprint"] for r in again["results"]] != [r["fingerprint"] for r in whole_run]:
            failures.append(f"{told}: other weights")
        elif not {5, 3} <= set(steps_of(url)) <= {5, 3, 2}:
            failures.append(f"{told}: left in the store: {steps_of(url)}")
        folders, _ = object_store.folder(url)
        if len(folders) != len(steps_of(url)):
            failures.append(f"{told}: leftovers: {folders}")
        object_store.delete(object_store.files(url))
    assert not failures, "\n".join(failures)
