"""Real faults: ranks that are killed, disks that are full, files that are damaged.

Each case forks ranks from a server (`checkpoint_ranks.py`), so that it takes about half a second.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openlm_lite.checkpoint import latest_checkpoint
from openlm_lite.commit import check_contents, read_commit
from openlm_lite.hf.weights import checkpoint_weights

HERE = Path(__file__).parent
pytestmark = pytest.mark.fault


class Ranks:
    """The client of the fork server."""

    def __init__(self, scratch: Path) -> None:
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        }
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "checkpoint_ranks.py"), str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def run(self, scenario: str, folder: Path, world_size: int = 2, **case: Any) -> dict[str, Any]:
        assert self._server.stdin is not None and self._server.stdout is not None
        case |= {"scenario": scenario, "folder": str(folder), "world_size": world_size}
        self._server.stdin.write(json.dumps(case) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def results(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """What the ranks returned, of a case in which none may fail."""
        answer = self.run(*args, **kwargs)
        assert not any(answer["codes"]), "\n".join(e or "" for e in answer["errors"])
        return answer["results"]

    def close(self) -> None:
        self._server.communicate()  # closes its input: it ends
        assert self._server.returncode == 0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    client = Ranks(tmp_path_factory.mktemp("ranks"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def whole_run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder and the results of an uninterrupted run: saves at steps 2, 3, 5; ends at 6."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    return folder, ranks.results("train", folder)


@pytest.fixture
def saved(whole_run: tuple[Path, list[Any]], tmp_path: Path) -> Path:
    """A copy of that folder: step_00000003 and step_00000005, written by two ranks."""
    shutil.copytree(whole_run[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------
# Killed ranks


def kill_and_restart(
    ranks: Ranks,
    folder: Path,
    kill: tuple[int, int],
    whole: list[dict[str, Any]],
    background: bool = False,
) -> str | None:
    """What went wrong when the rank `kill[0]` died at its event `kill[1]`; None if nothing did."""
    killed = ranks.run("train", folder, kill=kill, background=background)
    victim, survivor = killed["codes"][kill[0]], killed["codes"][1 - kill[0]]
    if victim != -9:
        return f"the victim was not killed: {killed}"
    if survivor == -9:
        return "the survivor hung and had to be killed"
    again = ranks.run("train", folder, background=background)
    if any(again["codes"]):
        return f"the restart failed: {again['errors']}"
    for before, after in zip(whole, again["results"], strict=True):
        if before["fingerprint"] != after["fingerprint"]:
            return f"other weights or optimizer state (resumed at step {after['started_at']})"
    # A kill before the deletion of step 2 leaves it, but whole; nothing else may remain.
    if set(names_in(folder)) - {"step_00000002"} != {"step_00000003", "step_00000005"}:
        return f"left on the disk: {names_in(folder)}"
    for name in names_in(folder):
        check_contents(read_commit(str(folder / name)))
    return None


def run_matrix(
    ranks: Ranks,
    whole: list[dict[str, Any]],
    scratch: Path,
    points: slice,
    background: bool,
) -> None:
    every = [(rank, k) for rank in (0, 1) for k in range(len(whole[rank]["events"]))]
    failures = []
    for rank, k in every[points]:
        problem = kill_and_restart(ranks, scratch / f"{rank}-{k}", (rank, k), whole, background)
        if problem is not None:
            failures.append(f"rank {rank}, event {k} ({whole[rank]['events'][k]}): {problem}")
        shutil.rmtree(scratch / f"{rank}-{k}", ignore_errors=True)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    "background",
    [
        pytest.param(False, id="waiting", marks=pytest.mark.slow),
        pytest.param(True, id="background"),
    ],
)
def test_a_rank_killed_at_any_event_resumes_bit_equal(
    ranks: Ranks, whole_run: tuple[Path, list[Any]], tmp_path: Path, background: bool
) -> None:
    """Every 10th; of these, one with a save that training waits for, the next with one behind."""
    points = slice(15 if background else 5, None, 20)
    run_matrix(ranks, whole_run[1], tmp_path, points, background)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
def test_a_rank_killed_at_every_event_resumes_bit_equal(
    ranks: Ranks, whole_run: tuple[Path, list[Any]], tmp_path: Path, background: bool
) -> None:
    run_matrix(ranks, whole_run[1], tmp_path, slice(None), background)


def test_saving_in_the_background_changes_no_bit(
    ranks: Ranks, whole_run: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    behind = ranks.results("train", tmp_path / "behind", background=True)
    for one, other in zip(behind, whole_run[1], strict=True):
        assert one["fingerprint"] == other["fingerprint"]
    for name in ("step_00000003", "step_00000005"):
        for folder in (tmp_path / "behind" / name, whole_run[0] / name):
            check_contents(read_commit(str(folder)))
        texts = [
            (f / name / "COMMIT.json").read_text() for f in (tmp_path / "behind", whole_run[0])
        ]
        assert texts[0] == texts[1]  # the checksums of all tensors among it


@pytest.mark.parametrize("around", ["before rename", "after rename"])
@pytest.mark.parametrize("nth", [1, -1], ids=["first commit", "deletion of the oldest"])
def test_a_kill_around_a_rename_resumes_bit_equal(
    ranks: Ranks, whole_run: tuple[Path, list[Any]], tmp_path: Path, around: str, nth: int
) -> None:
    """The two instants that the protocol turns on, whatever the stride meets."""
    events = whole_run[1][0]["events"]
    k = [i for i, name in enumerate(events) if name == around][nth]
    assert kill_and_restart(ranks, tmp_path / "run", (0, k), whole_run[1]) is None


# --------------------------------------------------------------------------------------------
# Other numbers of ranks, other models


def test_two_ranks_to_one_and_back_gives_bit_equal_parameters(
    ranks: Ranks, saved: Path, tmp_path: Path
) -> None:
    at_two = ranks.results("weights", saved, world_size=2)[0]
    assert at_two["state"] == {"step": 5, "tokens": 500, "next_sample": 40}
    assert ranks.results("weights", saved, world_size=1)[0] == at_two
    assert ranks.results("weights", saved, world_size=1, sharded=False)[0] == at_two
    assert ranks.results("weights", saved, world_size=3)[0] == at_two

    alone = tmp_path / "alone"
    ranks.results("train", alone, world_size=1, steps=2, save_at=[2])
    at_one = ranks.results("weights", alone, world_size=1)[0]
    assert ranks.results("weights", alone, world_size=2)[0] == at_one
    assert at_one["fingerprint"] != at_two["fingerprint"]


def test_reading_weights_needs_no_ranks_and_gives_whole_tensors(saved: Path) -> None:
    weights = dict(checkpoint_weights(str(saved / "step_00000005")))
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "layers.0.weight": (6, 6),
        "layers.1.weight": (6, 6),
        "head.weight": (1, 6),
    }


def test_another_architecture_is_refused_on_every_rank_and_the_model_untouched(
    ranks: Ranks, saved: Path
) -> None:
    for result in ranks.results("load_into_other", saved):
        assert "tensor model.head.weight is torch.float32 [1, 6], here" in result["error"]
        assert "another architecture" in result["error"]
        assert result["untouched"]


# --------------------------------------------------------------------------------------------
# Full disks


@pytest.mark.parametrize("fault_rank", [0, 1])
def test_a_full_disk_on_one_rank_fails_on_all_and_leaves_the_earlier_checkpoints(
    ranks: Ranks, saved: Path, fault_rank: int
) -> None:
    for result in ranks.results("fail_to_save", saved, fault="write", fault_rank=fault_rank):
        assert f"rank {fault_rank}: OSError: [Errno 28] No space left" in result["error"]
        assert result["names"] == ["step_00000003", "step_00000005"]
        assert result["again"] == "step_00000006"


def test_a_failed_commit_fails_on_all_ranks_and_leaves_the_earlier_checkpoints(
    ranks: Ranks, saved: Path
) -> None:
    for result in ranks.results("fail_to_save", saved, fault="commit"):
        assert "Input/output error" in result["error"]
        assert result["names"] == ["step_00000003", "step_00000005"]
        assert result["again"] == "step_00000006"


@pytest.mark.parametrize("free_pages", [2, 4, 7])  # of 4 KiB; a checkpoint wants about 12
def test_a_really_full_disk_fails_on_all_ranks_and_leaves_the_earlier_checkpoints(
    ranks: Ranks, saved: Path, small_disk: Path, free_pages: int
) -> None:
    root = small_disk / "checkpoints"
    shutil.copytree(saved, root)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - free_pages * 4096))
    case = {"fault": "quota", "filler": str(filler)}
    for result in ranks.results("fail_to_save", root, **case):
        assert result["error"]
        assert result["names"] == ["step_00000003", "step_00000005"]
        assert result["again"] == "step_00000006"


def test_too_little_space_is_said_before_anything_is_written(
    ranks: Ranks, saved: Path, small_disk: Path
) -> None:
    root = small_disk / "checkpoints"
    shutil.copytree(saved, root)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 4096))
    for result in ranks.results("fail_to_save", root, fault="none", filler=str(filler)):
        assert "4,096 bytes are free, a checkpoint wants" in result["error"]
        assert "free some space" in result["error"]


# --------------------------------------------------------------------------------------------
# Damaged files

FILES = ["__0_0.distcp", "__1_0.distcp", ".metadata", "COMMIT.json", "state.json", "config.yaml"]


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
        return
    if how == "truncate":
        content = content[: len(content) // 2]
    elif how == "empty":
        content.clear()
    else:
        content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "delete"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_used(
    saved: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(saved / "step_00000005" / name, how)
    found = latest_checkpoint(str(saved))
    assert found is not None and found.step == 3
    assert names_in(saved) == ["bad-step_00000005", "step_00000003"]
    assert name in caplog.text and "bad-step_00000005" in caplog.text


def test_all_ranks_go_back_together_and_continue_bit_equal(
    ranks: Ranks, saved: Path, whole_run: tuple[Path, list[Any]]
) -> None:
    damage(saved / "step_00000005" / "__1_0.distcp", "flip")
    for before, after in zip(whole_run[1], ranks.results("train", saved), strict=True):
        assert after["started_at"] == 3
        assert after["fingerprint"] == before["fingerprint"]
    assert names_in(saved) == ["bad-step_00000005", "step_00000003", "step_00000005"]


def test_any_single_changed_byte_is_found(saved: Path) -> None:
    """Every byte of the JSON files, and 50 seeded random ones of each other file."""
    folder = saved / "step_00000005"
    assert names_in(folder) == sorted(FILES)
    dice = random.Random(0)
    for name in FILES:
        original = (folder / name).read_bytes()
        positions: list[int] = list(range(len(original)))
        if not name.endswith(".json"):
            positions = dice.sample(positions, min(50, len(original)))
        for position in positions:
            changed = bytearray(original)
            changed[position] ^= 1 << dice.randrange(8)
            (folder / name).write_bytes(changed)
            found = latest_checkpoint(str(saved))
            assert found is not None and found.step == 3, f"{name}: byte {position}"
            (saved / "bad-step_00000005").rename(folder)
        (folder / name).write_bytes(original)
    found = latest_checkpoint(str(saved))
    assert found is not None and found.step == 5
