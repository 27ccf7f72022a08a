"""Checkpoints at a URL: whole or not there, whatever the store, the network or a kill does.

Faults of the network and the store are played on a real S3 server behind a proxy; kills at every
request and long random histories on a store in memory, which is quick.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openlm_lite import commit as commit_module
from openlm_lite import object_store, remote
from openlm_lite import remote_checkpoints as rc
from openlm_lite.checkpoint_place import LocalPlace, RemotePlace, place_of
from openlm_lite.commit import COMMIT_NAME, DamagedError, encode_commit
from openlm_lite.errors import InputError, RunError
from openlm_lite.retries import RefusedError, RemoteError
from tests.s3_faults import ALWAYS, CUTS, ERRORS, Faults
from tests.store_faults import (
    ROOT,
    Killed,
    Memory,
    Rules,
    commit_of,
    contents,
    fetched,
    hurry,
    objects,
    save,
    use_memory,
)
from tests.store_faults import memory as memory
from tests.store_faults import s3 as s3
from tests.store_faults import server as server

pytest.importorskip("moto")
pytest.importorskip("s3fs")

CHECKOUT = Path(__file__).parents[1]


def test_what_is_saved_is_listed_and_fetched_with_the_same_bytes(s3: Rules, tmp_path: Path) -> None:
    assert rc.committed_steps(ROOT) == []
    for step in (2, 10, 100_000_000):
        save(step, tmp_path / f"{step}")
    assert rc.committed_steps(ROOT) == [100_000_000, 10, 2]
    url = rc.step_url(ROOT, 10)
    assert fetched(url, tmp_path / "cache") == contents(10)
    commit = rc.commit_at(url)
    assert (commit.path, commit.step, commit.facts) == (url, 10, {"manifest_sha256": "x"})
    rc.check_stored_sizes(commit)
    assert not list((tmp_path / "cache").glob(".tmp-*"))
    rc.delete(url)
    assert rc.committed_steps(ROOT) == [100_000_000, 2]
    assert not [name for name in objects() if name.startswith("step_00000010/")]


def test_a_checkpoint_of_a_newer_version_is_refused_by_its_url(
    memory: Memory, tmp_path: Path
) -> None:
    url = save(1, tmp_path / "new")
    body = json.loads(rc.read_commit_text(url))
    del body["crc32"]
    newer = commit_module._sealed(body | {"format_version": 99})
    object_store.put(f"{url}/{COMMIT_NAME}", newer.encode())
    with pytest.raises(InputError, match=rf"^{url}/COMMIT.json: format_version 99; .*update"):
        rc.commit_at(url)


@pytest.mark.slow
def test_a_big_file_goes_up_in_parts_and_arrives_whole(s3: Rules, tmp_path: Path) -> None:
    url = save(1, tmp_path / "new", n_bytes=130 << 20)
    assert sum("partNumber" in line for line in s3.seen) >= 3
    assert fetched(url, tmp_path / "cache") == contents(1, 130 << 20)


PASSING = [
    (name, kind) for kind in [*ERRORS, "reset", "hang", "flip"] for name in ("__0_0.distcp",)
]
PASSING += [("__0_0.distcp", "short"), (COMMIT_NAME, "503"), (COMMIT_NAME, "hang")]
PASSING += [("__0_0.distcp", "lost"), (COMMIT_NAME, "lost"), (COMMIT_NAME, "flip")]


@pytest.mark.parametrize(("name", "kind"), PASSING)
def test_a_save_gets_through_faults_with_the_same_bytes(
    name: str, kind: str, s3: Rules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "hang":
        hurry(monkeypatch, idle=0.5)
    s3.on("PUT", name, kind, times=2)
    s3.checks_bytes = kind != "short"
    url = save(1, tmp_path / "new")
    assert s3.hits >= 1
    assert rc.committed_steps(ROOT) == [1]
    assert fetched(url, tmp_path / "cache") == contents(1)


@pytest.mark.parametrize("kind", ["short", "flip"])
def test_a_store_that_keeps_another_commit_than_was_written_is_one_error(
    kind: str, s3: Rules, tmp_path: Path
) -> None:
    save(1, tmp_path / "new")
    s3.checks_bytes = False
    s3.on("PUT", COMMIT_NAME, kind)
    with pytest.raises((RunError, InputError), match=COMMIT_NAME):
        save(2, tmp_path / "new")
    assert rc.committed_steps(ROOT) == [1]
    save_again(2, tmp_path)
    assert rc.committed_steps(ROOT) == [2, 1]


@pytest.mark.parametrize("kind", [*ERRORS, "reset"])
def test_an_outage_without_end_is_one_error_and_commits_nothing(
    kind: str, s3: Rules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1, tmp_path / "new")
    hurry(monkeypatch, total=0.3)
    for name in ("__1_0.distcp", COMMIT_NAME):
        s3.on("PUT", name, kind, times=ALWAYS)
        with pytest.raises(RemoteError, match=rf"step_00000002/{name}: given up after"):
            save(2, tmp_path / "new")
        assert rc.committed_steps(ROOT) == [1]


@pytest.mark.parametrize(("kind", "says"), [("403", "not allowed"), ("501", "cannot do that")])
def test_a_refusal_is_one_error_at_once(
    kind: str, says: str, s3: Rules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, total=600.0)
    s3.on("PUT", "", kind, times=ALWAYS)
    began = time.monotonic()
    with pytest.raises(RefusedError, match=says):
        save(1, tmp_path / "new")
    assert time.monotonic() - began < 5
    assert all(s3.seen.count(line) == 1 for line in s3.seen)


def test_the_lost_answer_of_the_commit_is_no_failure_and_no_second_commit(
    s3: Rules, tmp_path: Path
) -> None:
    s3.on("PUT", COMMIT_NAME, "lost")
    url = save(1, tmp_path / "new")
    assert s3.hits == 1 and rc.commit_at(url).step == 1
    rc.publish_commit(encode_commit(commit_of(1, contents(1))), url)  # the same once more


def test_a_commit_that_is_there_is_never_overwritten(s3: Rules, tmp_path: Path) -> None:
    url = save(1, tmp_path / "new")
    before = objects()
    other = replace(commit_of(1, contents(1)), world_size=7)
    with pytest.raises(RunError, match="committed by somebody else in the meantime"):
        rc.publish_commit(encode_commit(other), url)
    assert objects() == before


def test_a_bit_that_flips_on_the_way_up_to_a_careless_store_is_found_when_it_is_read(
    s3: Rules, tmp_path: Path
) -> None:
    save(1, tmp_path / "new")
    s3.checks_bytes = False
    s3.on("PUT", "__0_0", "flip")
    url = save(2, tmp_path / "new")
    with pytest.raises(DamagedError, match=r"__0_0\.distcp"):
        fetched(url, tmp_path / "cache")
    rc.put_aside(url, "damaged")
    assert rc.committed_steps(ROOT) == [1]
    assert fetched(rc.step_url(ROOT, 1), tmp_path / "cache") == contents(1)


# --- fetching -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("__0_0.distcp", kind) for kind in (*ERRORS, *CUTS, "flip")]
    + [(COMMIT_NAME, kind) for kind in ("503", "truncate")],
)
def test_a_checkpoint_arrives_whole_after_faults(
    name: str,
    kind: str,
    s3: Rules,
    server: Faults,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = save(1, tmp_path / "new")
    if "hang" in kind:
        hurry(monkeypatch, idle=0.5)
    server.next(kind, times=2, name=name)
    assert fetched(url, tmp_path / "cache") == contents(1)


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "deleted"])
@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", COMMIT_NAME])
def test_every_damage_in_the_store_is_found_put_aside_and_nothing_is_lost(
    name: str, damage: str, memory: Memory, tmp_path: Path
) -> None:
    save(1, tmp_path / "new")
    url = save(2, tmp_path / "new")
    data = bytearray(remote.read_bytes(f"{url}/{name}"))
    data[len(data) // 2] ^= 1
    if damage == "deleted":
        object_store.delete([f"{url}/{name}"])
    else:
        end = {"flipped": len(data), "cut": -1, "emptied": 0}[damage]
        object_store.put(f"{url}/{name}", bytes(data[:end]))
    before = objects(url)
    with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
        fetched(url, tmp_path / "cache")
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [".lock-step_00000002"]
    rc.put_aside(url, "damaged")
    assert rc.committed_steps(ROOT) == [1]
    rc.remove_leftovers(ROOT)
    after = objects(url)
    if COMMIT_NAME in before:
        before[rc.BAD_COMMIT_NAME] = before.pop(COMMIT_NAME)
        assert after == before
    save_again(2, tmp_path)
    assert rc.committed_steps(ROOT) == [2, 1]
    assert fetched(url, tmp_path / "cache") == contents(2)
    if rc.BAD_COMMIT_NAME in before:
        assert objects(f"{ROOT}/bad-step_00000002") == before


def save_again(step: int, tmp_path: Path) -> None:
    rc.make_free(rc.step_url(ROOT, step))
    save(step, tmp_path / "new")


def test_one_process_of_a_node_fetches_and_the_others_wait(s3: Rules, tmp_path: Path) -> None:
    url = save(1, tmp_path / "new")
    s3.seen.clear()
    with ThreadPoolExecutor(4) as pool:  # a flock belongs to who opened the file, threads too
        found = list(pool.map(lambda _: fetched(url, tmp_path / "cache", "word"), range(4)))
    assert found == [contents(1)] * 4
    for name in contents(1):
        assert s3.seen.count(f"GET /bucket/runs/a/step_00000001/{name}") == 1, name


def test_a_copy_on_this_disk_is_read_again_only_while_it_is_whole(
    s3: Rules, tmp_path: Path
) -> None:
    url = save(1, tmp_path / "new")
    cache = tmp_path / "cache"
    fetched(url, cache)
    s3.seen.clear()
    assert fetched(url, cache) == contents(1)
    assert not [line for line in s3.seen if "distcp" in line]
    path = cache / "step_00000001" / "__0_0.distcp"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert fetched(url, cache) == contents(1)
    (cache / "step_00000001" / COMMIT_NAME).unlink()
    assert fetched(url, cache) == contents(1)


def test_a_kill_in_a_fetch_leaves_nothing_that_looks_whole(memory: Memory, tmp_path: Path) -> None:
    url = save(1, tmp_path / "new")
    start, n_calls = memory.calls, 0
    fetched(url, tmp_path / "count")
    n_calls = memory.calls - start
    assert n_calls > len(contents(1))
    for k in range(n_calls):
        memory.calls, memory.kill_at = 0, k
        with pytest.raises(Killed):
            fetched(url, tmp_path / "cache")
        assert not (tmp_path / "cache" / "step_00000001").exists()
    memory.kill_at = None
    assert fetched(url, tmp_path / "cache") == contents(1)


def test_a_full_disk_is_one_error_that_says_where(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = save(1, tmp_path / "new")
    monkeypatch.setattr(rc.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(RunError, match=r"cache.*: the disk is too full to fetch s3://bucket"):
        fetched(url, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock-step_00000001"]


# --- kills ----------------------------------------------------------------------------------------


def at_every_request(memory: Memory, begin: Callable[[], None], act: Callable[[], Any]) -> Iterator:
    """`act` killed at its 1st, 2nd, … request, and at last not at all; yields after each."""
    for k in range(1000):
        memory.objects.clear()
        begin()
        memory.calls, memory.kill_at = 0, k
        try:
            act()
            done = True
        except Killed:
            done = False
        memory.kill_at = None
        yield done
        if done:
            return
    raise AssertionError("it never ends")


def test_a_save_killed_at_any_request_leaves_the_earlier_ones_and_no_half(
    memory: Memory, tmp_path: Path
) -> None:
    n_kills = 0
    for done in at_every_request(
        memory, lambda: save(1, tmp_path / "new") and None, lambda: save(2, tmp_path / "new")
    ):
        n_kills += 1
        steps = rc.committed_steps(ROOT)
        assert steps in ([1], [2, 1]) and (not done or steps == [2, 1])
        rc.remove_leftovers(ROOT)
        kept = {name.split("/")[0] for name in objects()}
        assert kept == {f"step_{step:08d}" for step in steps} | {"newest.txt"}
        for step in steps:
            assert fetched(rc.step_url(ROOT, step), tmp_path / "cache") == contents(step)
        if 2 not in steps:
            save_again(2, tmp_path)
            assert rc.committed_steps(ROOT) == [2, 1]
    assert n_kills > len(contents(2))


def test_a_deletion_killed_at_any_request_leaves_a_whole_checkpoint_or_none(
    memory: Memory, tmp_path: Path
) -> None:
    def begin() -> None:
        save(1, tmp_path / "new")
        save(2, tmp_path / "new")

    for _ in at_every_request(memory, begin, lambda: rc.delete(rc.step_url(ROOT, 1))):
        steps = rc.committed_steps(ROOT)
        assert steps in ([2, 1], [2])
        rc.remove_leftovers(ROOT)
        for step in steps:
            assert fetched(rc.step_url(ROOT, step), tmp_path / "cache") == contents(step)
        assert {name.split("/")[0] for name in objects()} == {
            *(f"step_{step:08d}" for step in steps),
            "newest.txt",
        }


def test_putting_aside_and_making_room_killed_at_any_request_lose_nothing(
    memory: Memory, tmp_path: Path
) -> None:
    url = rc.step_url(ROOT, 2)

    def act() -> None:
        rc.put_aside(url, "damaged")
        rc.make_free(url)

    for _ in at_every_request(memory, lambda: save(2, tmp_path / "new") and None, act):
        everything = objects()
        for name, data in contents(2).items():  # each is where it was, or in the other folder
            assert data in (
                everything.get(f"step_00000002/{name}"),
                everything.get(f"bad-step_00000002/{name}"),
            )
        rc.remove_leftovers(ROOT)
        if rc.committed_steps(ROOT):
            rc.put_aside(url, "damaged")
        rc.make_free(url)
        for name, data in contents(2).items():
            assert objects()[f"bad-step_00000002/{name}"] == data
        assert objects(url) == {}
        assert f"bad-step_00000002/{rc.BAD_COMMIT_NAME}" in objects()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["save", "save", "damage", "delete", "start"]),
        st.one_of(st.none(), st.integers(0, 20)),
    ),
    max_size=10,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=OPERATIONS)
def test_after_any_history_of_kills_every_commit_is_whole(
    history: list[tuple[str, int | None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A kill may come at any request of any operation; a start follows each."""
    folder = tmp_path_factory.mktemp("history")
    with pytest.MonkeyPatch.context() as patch:
        memory = use_memory(patch)
        step = 0
        damaged: set[int] = set()
        for what, kill_at in history:
            memory.calls, memory.kill_at = 0, kill_at
            with suppress(Killed):
                if what == "save":
                    step += 1
                    save_again(step, folder)
                elif what == "delete" and step:
                    rc.delete(rc.step_url(ROOT, max(1, step - 2)))
                elif what == "damage":
                    for found in rc.committed_steps(ROOT)[:1]:
                        name = f"{rc.step_url(ROOT, found)[5:]}/__0_0.distcp"
                        memory.objects[name] = (b"x", 0.0)
                        damaged.add(found)
                else:
                    rc.remove_leftovers(ROOT)
            memory.kill_at = None
            start(folder, damaged)
            step = max([0, *rc.committed_steps(ROOT)])


def start(folder: Path, damaged: set[int]) -> None:
    rc.remove_leftovers(ROOT)
    for step in rc.committed_steps(ROOT):
        url = rc.step_url(ROOT, step)
        try:
            found = fetched(url, folder / "cache")
        except DamagedError as problem:
            assert step in damaged
            rc.put_aside(url, problem)
        else:
            assert found == contents(step)
    folders = {name.split("/")[0] for name in objects()} - {"newest.txt"}
    whole = {f"step_{step:08d}" for step in rc.committed_steps(ROOT)}
    assert all(name in whole or object_store.read(f"{ROOT}/{name}/{rc.BAD_COMMIT_NAME}")
               for name in folders)  # fmt: skip


SAVER = """
import sys
from pathlib import Path
from tests.store_faults import save
print("ready", flush=True)
sys.stdin.readline()
for step in range(1, 1000):
    save(step, Path(sys.argv[1]), n_bytes=400_000)
    print(step, flush=True)
"""


@pytest.mark.fault
@pytest.mark.parametrize(
    "after", [0.3, *(pytest.param(0.1 * n, marks=pytest.mark.slow) for n in range(20))]
)
def test_a_process_killed_while_it_saves_leaves_whole_checkpoints_only(
    after: float, s3: Rules, tmp_path: Path
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SAVER, str(tmp_path / "new")],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.stdin.write(b"go\n")
    child.stdin.flush()
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    told = child.stdout.read().split()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    steps = rc.committed_steps(ROOT)
    assert len(told) <= len(steps) <= len(told) + 1
    rc.remove_leftovers(ROOT)
    assert len({name.split("/")[0] for name in objects()} - {"newest.txt"}) == len(steps)
    for step in steps[:3]:
        found = fetched(rc.step_url(ROOT, step), tmp_path / "cache")
        assert found == contents(step, 400_000)


def test_unfinished_uploads_of_this_run_are_removed_and_no_others(
    s3: Rules, tmp_path: Path
) -> None:
    save(1, tmp_path / "new")
    keys = ["runs/a/step_00000002/__0_0.distcp", "runs/ab/step_00000002/__0_0.distcp"]
    fs = remote._filesystem("s3")
    for key in keys:
        fs.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    rc.remove_leftovers(ROOT)
    left = fs.call_s3("list_multipart_uploads", Bucket="bucket")["Uploads"]
    assert [upload["Key"] for upload in left] == [keys[1]]
    object_store.abort_uploads("s3://bucket/runs/ab")
    assert rc.committed_steps(ROOT) == [1]


# --- listings that are late -----------------------------------------------------------------------


def test_a_late_listing_hides_no_new_commit_and_shows_no_deleted_one(
    s3: Rules, tmp_path: Path
) -> None:
    save(1, tmp_path / "new")
    s3.listings = {}
    assert rc.committed_steps(ROOT) == [1]  # from here on, this is what listings show
    save(2, tmp_path / "new")
    assert rc.committed_steps(ROOT) == [2, 1]
    rc.delete(rc.step_url(ROOT, 1))
    assert rc.committed_steps(ROOT) == [2]
    s3.listings = None
    assert {name.split("/")[0] for name in objects()} == {"step_00000002", "newest.txt"}


def test_a_late_listing_makes_no_commit_a_leftover(s3: Rules, tmp_path: Path) -> None:
    url = rc.step_url(ROOT, 1)
    folder = tmp_path / "new"
    folder.mkdir()
    for name, data in contents(1).items():
        (folder / name).write_bytes(data)
    rc.upload(str(folder), contents(1), url)
    s3.listings = {}
    object_store.folder(ROOT)
    object_store.files(url)  # both without COMMIT.json
    rc.publish_commit(encode_commit(commit_of(1, contents(1))), url)
    rc.remove_leftovers(ROOT)
    assert fetched(url, tmp_path / "cache") == contents(1)


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://bucket/", "hf://a/b", "https://x/y", "s3://b/*"]
)
def test_a_url_that_cannot_hold_checkpoints_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="BUCKET/FOLDER"):
        place_of(url)


def test_no_message_holds_a_secret(
    s3: Rules, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, total=0.2)
    said = []
    with caplog.at_level(logging.INFO):
        for kind in ("503", "403", "reset"):
            s3.on("PUT", "", kind, times=ALWAYS)
            with pytest.raises((RunError, InputError)) as caught:
                save(1, tmp_path / "new")
            said.append(str(caught.value))
    assert "canary" not in caplog.text + "".join(said)


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_both_kinds_of_place_do_the_same(kind: str, memory: Memory, tmp_path: Path) -> None:
    root = str(tmp_path / "local") if kind == "local" else ROOT
    place = place_of(root, str(tmp_path / "staging"))
    assert isinstance(place, LocalPlace if kind == "local" else RemotePlace)
    os.makedirs(place.staging, exist_ok=True)
    for step in (1, 2, 3):
        place.prepare()
        path = place.path_of(step)
        assert not place.is_committed(path)
        place.make_room(path)
        temporary = os.path.join(place.staging, f".tmp-step_{step:08d}")
        os.mkdir(temporary)
        for name, data in contents(step).items():
            (Path(temporary) / name).write_bytes(data)
        place.share(temporary, list(contents(step)), path)
        place.commit(replace(commit_of(step, contents(step)), path=temporary), path)
        assert place.is_committed(path)
    assert place.steps() == [place.path_of(step) for step in (3, 2, 1)]
    commit = place.commit_of(place.path_of(2))
    assert commit.step == 2
    place.check_sizes(commit)
    place.put_aside(place.path_of(3), "damaged")
    place.delete(place.path_of(1))
    place.prepare()
    place.start()
    assert place.steps() == [place.path_of(2)]
    found = place.bring(place.path_of(2), 0, 1, "word")
    assert {n: (Path(found.path) / n).read_bytes() for n in found.files} == contents(2)
    with pytest.raises(DamagedError):
        place.bring(place.path_of(1), 0, 1, "word")
