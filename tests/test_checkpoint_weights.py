"""Checkpoints of weights alone: streamed in, whole or absent, and read by all that reads others.

Run as a script, this file is the server that forks processes and kills them (`serve`).
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openlm_lite import checkpoint as checkpoint_module
from openlm_lite.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    TrainState,
    load_checkpoint,
    read_document,
    resolve_checkpoint,
    save_checkpoint,
)
from openlm_lite.commit import check_contents, read_commit
from openlm_lite.errors import InputError
from openlm_lite.hf.weights import Weights, checkpoint_weights
from openlm_lite.inspection import inspect_path
from openlm_lite.safe_dcp import decode_metadata
from openlm_lite.weights_io import save_weights

DOCUMENTS = {"model.json": '{"d_model": 4}\n', "tokenizer.json": "{}", "tokenizer_config.json": "é"}


def lazy(tensors: dict[str, Tensor]) -> Weights:
    return Weights("here", {n: tuple(t.shape) for n, t in tensors.items()}, tensors.__getitem__)


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))


def save(path: Path, weights: Weights | None = None, **facts: Any) -> None:
    weights = lazy(dict(build().state_dict())) if weights is None else weights
    save_weights(str(path), weights, documents=DOCUMENTS, facts=facts)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is written -----------------------------------------------------------------------------


def test_all_that_reads_a_checkpoint_reads_one_of_weights_alone(tmp_path: Path) -> None:
    path, model = tmp_path / "imported", build()
    save(path, source="elsewhere")
    assert resolve_checkpoint(str(path)) == str(path)
    assert names_in(path) == [
        ".metadata",
        "COMMIT.json",
        "__0_0.distcp",
        "model.json",
        "state.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    expected = model.state_dict()
    found = checkpoint_weights(str(path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    other = build(seed=1)
    assert load_checkpoint(str(path), other, None) == TrainState(0, 0, 0)
    assert all(torch.equal(p, expected[name]) for name, p in other.named_parameters())
    for name, text in DOCUMENTS.items():
        assert read_document(str(path), name) == text
    facts = inspect_path(str(path), verify=True)
    assert facts["step"] == 0 and facts["source"] == "elsewhere" and facts["model"]["d_model"] == 4


def test_training_starts_from_it_with_a_fresh_optimizer(tmp_path: Path) -> None:
    save(tmp_path / "imported")
    model = build(seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert load_checkpoint(str(tmp_path / "imported"), model, optimizer).step == 0
    assert not optimizer.state


def test_it_holds_the_same_tensors_as_a_checkpoint_of_the_model(tmp_path: Path) -> None:
    """Same names, shapes, dtypes and properties: one format, whoever wrote it."""
    model = build()
    common = {"documents": DOCUMENTS, "facts": {}}
    whole = save_checkpoint(
        str(tmp_path / "run"), model, (), TrainState(0, 0, 0), cfg=CheckpointConfig(), **common
    )
    save(tmp_path / "imported")
    lists = []
    for path in (Path(whole), tmp_path / "imported"):
        content = (path / ".metadata").read_bytes()
        lists.append(decode_metadata(content, str(path), os.listdir(path)).state_dict_metadata)
    for entry in lists[0].values():
        entry.properties.requires_grad = False
    assert lists[0] == lists[1]
    assert read_commit(whole).files.keys() == read_commit(str(tmp_path / "imported")).files.keys()


def test_weights_are_written_in_fp32_each_with_its_own_numbers_only(tmp_path: Path) -> None:
    whole = torch.arange(400.0).reshape(20, 20)
    tensors = {
        "half": whole.bfloat16(),
        "wide": whole.double(),
        "part": whole[3:4],
        "turned": whole[:3, :2].T,
        "expanded": torch.ones(1).expand(5, 5),
        "parameter": nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "none": torch.empty(0, 3),
    }
    save(tmp_path / "a", lazy(tensors))
    found = checkpoint_weights(str(tmp_path / "a"))
    assert found.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.float()), name
    assert (tmp_path / "a" / "__0_0.distcp").stat().st_size < 4 * 810 + 8 * 2000
    assert torch.equal(whole, torch.arange(400.0).reshape(20, 20))  # what was given stays as it is


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=6), shapes, max_size=5))
def test_any_names_and_shapes_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, ...]]
) -> None:
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("x") / "a"
    save(path, lazy(tensors))
    found = checkpoint_weights(str(path))
    assert found.shapes == shapes
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_tensors_are_asked_for_once_each_and_one_after_the_other(tmp_path: Path) -> None:
    """At each question, all that was given before is gone."""
    given: list[weakref.ref[Tensor]] = []
    asked = []

    def read(name: str) -> Tensor:
        assert not any(reference() is not None for reference in given)
        asked.append(name)
        tensor = torch.ones(3)
        given.append(weakref.ref(tensor))
        return tensor

    names = [f"w{i}" for i in range(5)]
    save(tmp_path / "a", Weights("here", dict.fromkeys(names, (3,)), read))
    assert asked == names


def test_a_relative_path_an_empty_folder_and_missing_parents_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for path in ("here", "empty", "empty/", "deep/deeper/there/"):
        if path == "empty/":
            shutil.rmtree("empty")
            Path("empty").mkdir()
        save_weights(path, lazy({"w": torch.ones(2)}), documents={}, facts={})
        assert torch.equal(checkpoint_weights(path)["w"], torch.ones(2))
    assert names_in(tmp_path) == ["deep", "empty", "here"]


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    save(tmp_path / "a")
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for file in (tmp_path / "a").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == expected, file.name


# --- what is refused -----------------------------------------------------------------------------


def never(_: str) -> Tensor:
    raise AssertionError("nothing is read where nothing can be written")


def test_a_place_that_is_taken_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("mine")
    (tmp_path / "none").mkdir()
    (tmp_path / "link").symlink_to("none")
    (tmp_path / "dead").symlink_to("gone")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "folder", "link", "dead", "folder/"):
        with pytest.raises(InputError, match=f"{name}: exists and is no empty folder; name a new"):
            save_weights(
                str(tmp_path / name.rstrip("/")) + "/" * name.endswith("/"),
                Weights("", {"w": (1,)}, never),
                documents={},
                facts={},
            )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_path_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    weights = Weights("", {"w": (1,)}, never)
    for path, message in (
        (str(tmp_path / "step_00000007"), "is the name of a checkpoint of step 7"),
        ("s3://bucket/x", "not at a URL"),
    ):
        with pytest.raises(InputError, match=message):
            save_weights(path, weights, documents={}, facts={})
    for documents in ({"COMMIT.json": ""}, {"../x": ""}, {".x": ""}, {"__0_0.distcp": ""}):
        with pytest.raises(ValueError, match="must be a plain file name"):
            save_weights(str(tmp_path / "x"), weights, documents=documents, facts={})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_weights(str(tmp_path / "x"), weights, documents={}, facts={"a": object()})
    assert names_in(tmp_path) == []
    save(tmp_path / "step_00000000")
    assert resolve_checkpoint(str(tmp_path)) == str(tmp_path / "step_00000000")


def wrong_shape(_: str) -> Tensor:
    return torch.ones(3, 2)


def integers(_: str) -> Tensor:
    return torch.ones(2, 3, dtype=torch.int8)


def refuses(_: str) -> Tensor:
    raise InputError("x.pt: tensor w cannot be read")


def interrupted(_: str) -> Tensor:
    raise KeyboardInterrupt


def ends(_: str) -> Tensor:
    raise SystemExit(3)


def fails(_: str) -> Tensor:
    raise RuntimeError("something\nelse")


class Bare:
    """As Weights, but without its check of the shapes."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self.shapes = {"fine": (2,), "w": (2, 3)}
        self.read = read

    def __getitem__(self, name: str) -> Tensor:
        return torch.ones(2) if name == "fine" else self.read(name)


@pytest.mark.parametrize(
    ("read", "error", "message"),
    [
        (wrong_shape, InputError, r"tensor model\.w is torch\.float32 \[3, 2\]; .* be \[2, 3\]"),
        (integers, InputError, r"tensor model\.w is torch\.int8 \[2, 3\]; it must hold floating"),
        (refuses, InputError, r"^x\.pt: tensor w cannot be read$"),
        (fails, CheckpointError, "writing failed: .*RuntimeError: something"),
        (interrupted, KeyboardInterrupt, "^$"),
        (ends, SystemExit, "3"),
    ],
)
@pytest.mark.parametrize("place", ["new", "empty", "deep/deeper/new"])
def test_a_failure_on_the_way_leaves_everything_as_it_was(
    tmp_path: Path,
    read: Callable[[str], Tensor],
    error: type[BaseException],
    message: str,
    place: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(error, match=message):
        save_weights(str(tmp_path / place), Bare(read), documents=DOCUMENTS, facts={})
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "empty", tmp_path / "other"]


@pytest.mark.parametrize("name", ["mkdir", "fsync", "rename", "open"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_disk_that_fails_at_any_call_leaves_the_folder_absent_or_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException
) -> None:
    owner: Any = builtins if name == "open" else os
    original = getattr(owner, name)
    for nth in range(100):
        calls = 0

        def failing(*args: Any, nth: int = nth, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth + 1:
                raise error
            return original(*args, **kwargs)

        path = tmp_path / f"{nth}" / "a"
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                save(path)
                failed = False
            except (CheckpointError, KeyboardInterrupt):
                failed = True
        if path.exists():
            check_contents(read_commit(str(path)))
            assert names_in(path.parent) == ["a"]
        else:
            assert failed and list(tmp_path.iterdir()) == []
        shutil.rmtree(path.parent, ignore_errors=True)
        if calls <= nth:
            assert not failed and nth >= 1
            return
    raise AssertionError("it never came to an end")


def test_too_little_space_is_said_before_anything_is_read_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=4_000)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage)
    weights = Weights("", {"w": (1000, 1)}, never)
    message = r"4,000 bytes are free, a checkpoint wants 4,800; free some space, or name a folder"
    with pytest.raises(CheckpointError, match=message):
        save_weights(str(tmp_path / "a" / "b"), weights, documents={}, facts={})
    assert names_in(tmp_path) == []


# --- reading one by one --------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_refused_at_opening(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for name in ("__0_0.distcp", ".metadata", "model.json", "COMMIT.json"):
        save(path)
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{path}.*{name}"):
            checkpoint_weights(str(path))
        shutil.rmtree(path)


def test_a_checkpoint_that_goes_away_after_opening_is_refused_by_tensor(tmp_path: Path) -> None:
    save(tmp_path / "a")
    weights = checkpoint_weights(str(tmp_path / "a"))
    assert weights["0.bias"].shape == (6,)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(InputError, match=r"a: tensor 0\.bias cannot be read: .*No such file"):
        weights["0.bias"]


def test_the_optimizer_is_not_among_the_weights(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    path = save_checkpoint(
        str(tmp_path),
        model,
        optimizer,
        TrainState(1, 10, 2),
        documents={},
        facts={},
        cfg=CheckpointConfig(),
    )
    found = checkpoint_weights(path)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], t) for name, t in model.state_dict().items())


# --- leftovers -----------------------------------------------------------------------------------


def test_what_a_killed_save_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    keep = [f".tmp-a.{os.getppid()}", f".tmp-b.{dead.pid}", ".tmp-a.x", ".tmp-a", ".tmp-other"]
    for name in (*keep, f".tmp-a.{dead.pid}", f".tmp-a.{os.getpid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    save(tmp_path / "a")
    assert names_in(tmp_path) == sorted([*keep, "a"])


# --- kills ---------------------------------------------------------------------------------------

KILL_TENSORS = {f"w{i}": torch.full((3, 4), float(i)) for i in range(2)}


def kill_events(kill_at: int | None) -> list[str]:
    """Counts what changes the disk in this process, before and after, and dies at one of them."""
    names: list[str] = []

    def event(name: str) -> None:
        if len(names) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        names.append(name)

    def around(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            event(f"before {name}")
            result = original(*args, **kwargs)
            event(f"after {name}")
            return result

        setattr(owner, name, counted)

    around(torch, "save")
    around(builtins, "open")
    for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
        around(os, name)
    return names


def save_in_a_fork(folder: Path, kill_at: int | None) -> int:
    """The exit code of a process that saves to `folder`/a, killed at its event `kill_at`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            names = kill_events(kill_at)
            save(folder / "a", lazy(KILL_TENSORS))
            os.write(1, (json.dumps(names) + "\n").encode())
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def serve() -> None:
    """For each line [folder, event]: a save that is killed there. Answers with its exit code."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, kill_at = json.loads(line)
        print(save_in_a_fork(Path(folder), kill_at), flush=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[[Path, int | None], Any]]:
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )

    def ask(folder: Path, kill_at: int | None) -> Any:
        assert process.stdin is not None and process.stdout is not None
        folder.mkdir(exist_ok=True)
        process.stdin.write(json.dumps([str(folder), kill_at]) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        if kill_at is None:
            assert json.loads(process.stdout.readline()) == 0
        return answer

    yield ask
    process.communicate()  # closes its input: it ends
    assert process.returncode == 0


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_killed_at_every_event_leaves_the_folder_absent_or_whole(
    tmp_path: Path, server: Callable[[Path, int | None], Any], stride: int
) -> None:
    events = server(tmp_path / "whole", None)
    assert len(events) > 30 and {"before save", "before rename", "after rename"} <= set(events)
    renamed = events.index("after rename", len(events) - 10)
    for k in sorted({*range(0, len(events), stride), renamed - 1, renamed}):
        event = events[k]
        folder = tmp_path / str(k)
        assert server(folder, k) == -signal.SIGKILL, event
        assert (folder / "a").exists() == (k >= renamed), event
        if k < renamed:
            assert all(name.startswith(".tmp-a.") for name in names_in(folder))
            server(folder, None)  # the next try
        assert names_in(folder) == ["a"], event
        found = checkpoint_weights(str(folder / "a"))
        assert found.keys() == KILL_TENSORS.keys()
        assert all(torch.equal(found[n], t) for n, t in KILL_TENSORS.items()), event
        shutil.rmtree(folder)


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, torch
from openlm_lite.hf.weights import Weights, checkpoint_weights
from openlm_lite.weights_io import save_weights

def status(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) * 1024

def peak_of(action):
    before = peak = status("RssAnon")
    done = threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, status("RssAnon"))
    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    print(peak - before)

def save(path, n):
    def read(name):
        return torch.ones(n, dtype=torch.bfloat16)
    shapes = {f"w{i}": (n,) for i in range(10)}
    save_weights(path, Weights("here", shapes, read), documents={}, facts={})

def read(path, n):
    weights = checkpoint_weights(path)
    total = sum(weights[name].sum().item() for name in weights)
    assert total == 10 * n

for path, n in (("warm", 10), ("big", 5_000_000)):
    peak_of(lambda: save(path, n))
    peak_of(lambda: read(path, n))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_saving_and_reading_need_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """200 MB as fp32 in tensors of 20 MB: one as given or on the disk, and its copy.

    Memory of its own is counted, not the pages of mapped files.
    """
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    saving, reading = map(int, done.stdout.split()[2:])
    assert saving < 80e6, f"{saving:,} bytes"
    assert reading < 80e6, f"{reading:,} bytes"


if __name__ == "__main__":
    serve()
