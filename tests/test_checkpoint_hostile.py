"""Checkpoints that somebody changed on purpose: every checksum fits, and nothing may be run."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from openlm_lite import safe_dcp
from openlm_lite.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from openlm_lite.errors import InputError
from openlm_lite.hf.weights import checkpoint_weights
from openlm_lite.safe_dcp import decode_metadata


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    return model, torch.optim.AdamW(model.parameters())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint of step 3, alone in `run`."""
    model, optimizer = build()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    cfg, state = CheckpointConfig(), TrainState(3, 30, 6)
    root = str(tmp_path / "run")
    return Path(save_checkpoint(root, model, optimizer, state, documents={}, facts={}, cfg=cfg))


class Bomb:
    """Unpickling this makes a folder: proof that code was run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def reseal(path: Path, change: Any = None) -> None:
    """Make COMMIT.json fit the files that lie there now."""
    body = json.loads((path / "COMMIT.json").read_text())
    del body["crc32"]
    for name in body["files"]:
        content = (path / name).read_bytes()
        body["files"][name] = [len(content), zlib.crc32(content)]
    if change is not None:
        change(body)
    sealed = {"crc32": zlib.crc32(json.dumps(body).encode()), **body}
    (path / "COMMIT.json").write_text(json.dumps(sealed, indent=2) + "\n")


def refuse_everywhere(path: Path, message: str) -> None:
    """Both ways of reading refuse, and the model is as it was."""
    assert latest_checkpoint(str(path.parent)) is not None  # the checksums fit
    model, optimizer = build(seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(InputError, match=message):
        load_checkpoint(str(path), model, optimizer)
    with pytest.raises(InputError, match=message):
        dict(checkpoint_weights(str(path)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not optimizer.state


def metadata_of(path: Path) -> Metadata:
    return pickle.loads((path / ".metadata").read_bytes())


def test_a_bomb_in_the_metadata_is_refused_and_does_not_go_off(tmp_path: Path, path: Path) -> None:
    metadata = metadata_of(path)
    for bomb in (Bomb(tmp_path / "boom"), {"inside": [Bomb(tmp_path / "boom")]}):
        metadata.planner_data = bomb
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        reseal(path)
        refuse_everywhere(path, r"\.metadata: refused: it asks for posix\.mkdir")
        assert not (tmp_path / "boom").exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert (tmp_path / "boom").exists()  # the bomb is a real one


@pytest.mark.parametrize(
    "asked", ["os.system", "builtins.eval", "torch.load", "torch.Tensor", "torch.hub.load"]
)
def test_no_other_name_is_let_through(tmp_path: Path, path: Path, asked: str) -> None:
    module, name = asked.rsplit(".", 1)
    (path / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    reseal(path)
    refuse_everywhere(path, f"it asks for {asked}")


def test_an_item_of_pickled_bytes_is_refused_and_does_not_go_off(
    tmp_path: Path, path: Path
) -> None:
    metadata = metadata_of(path)
    data = path / "__0_0.distcp"
    bomb = io.BytesIO()
    torch.save(Bomb(tmp_path / "boom"), bomb)
    where = _StorageInfo(data.name, data.stat().st_size, len(bomb.getvalue()))
    data.write_bytes(data.read_bytes() + bomb.getvalue())
    metadata.state_dict_metadata["model.extra"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("model.extra")] = where
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path)
    refuse_everywhere(path, r"item 'model\.extra' is pickled bytes; only tensors are allowed")
    assert not (tmp_path / "boom").exists()


def test_a_bomb_in_the_place_of_a_tensor_does_not_go_off(tmp_path: Path, path: Path) -> None:
    metadata = metadata_of(path)
    data = path / "__0_0.distcp"
    bomb = io.BytesIO()
    torch.save(Bomb(tmp_path / "boom"), bomb)
    where = _StorageInfo(data.name, data.stat().st_size, len(bomb.getvalue()))
    data.write_bytes(data.read_bytes() + bomb.getvalue())
    index = next(i for i in metadata.storage_data if i.fqn == "model.0.weight")
    metadata.storage_data[index] = where
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path)
    with pytest.raises(InputError, match="Weights only load failed"):
        dict(checkpoint_weights(str(path)))
    with pytest.raises(CheckpointError, match="Weights only load failed"):
        load_checkpoint(str(path), build()[0], None)
    assert not (tmp_path / "boom").exists()


def test_tensors_cannot_lie_in_files_outside_the_checkpoint(tmp_path: Path, path: Path) -> None:
    metadata = metadata_of(path)
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path)
    refuse_everywhere(path, r"lies in '\.\./\.\./secret', which is not a file of this checkpoint")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 10_000))
def test_damaged_metadata_raises_nothing_but_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, position: int
) -> None:
    good = pickle.dumps(Metadata({}, storage_data={}))
    content = good[: position % len(good)] + junk + good[position % len(good) + len(junk) :]
    try:
        decode_metadata(content, "here", [])
    except InputError as error:
        assert str(error).startswith("here: ")


BOMBS = {  # each has the unpickler make room for about a billion places, 16 GB
    "LONG_BINPUT": b"r\xff\xff\xff\x3f",
    "PUT": b"p900000000\n",
    "PUT, zeros": b"p" + 40 * b"0" + b"900000000\n",
    "PUT, underscores": b"p900_000_000\n",
    "PUT, a zero byte": b"p 900000000\0 \n",
}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.frozensets(st.text())
        | st.just(Metadata)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@given(value=PLAIN, protocol=st.integers(0, 5), data=st.data())
def test_no_place_in_a_pickle_makes_room_for_a_billion_others(
    bomb: bytes, value: object, protocol: int, data: st.DataObject
) -> None:
    """At the boundary of any two instructions of any pickle."""
    content = pickle.dumps(value, protocol)
    safe_dcp._check_sizes(content)
    places = [at for _, _, at in pickletools.genops(content) if at is not None]
    at = data.draw(st.sampled_from(places))
    with pytest.raises(InputError, match=r"it names place \d{9,10} of a memo of at most \d+$"):
        safe_dcp._check_sizes(content[:at] + bomb + content[at:])


def test_metadata_that_ask_for_more_memory_than_they_have_bytes_are_refused() -> None:
    with pytest.raises(InputError, match=r"^here: refused: it names place 70000 .*; do not load"):
        decode_metadata(b"\x80\x04]p70000\n.", "here", [])
    for announced in (b"\x96" + (70_000).to_bytes(8, "little"), b"\x8b\xff\xff\xff\xff", b"X0000"):
        with pytest.raises(InputError, match=r"^here: refused: it announces \d+ bytes more than"):
            decode_metadata(b"\x80\x04]" + announced + b".", "here", [])


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_put_aside(
    tmp_path: Path, path: Path
) -> None:
    reseal(path, lambda body: body.update(format_version=2))
    with pytest.raises(InputError, match=r"format_version 2; .* update openlm_lite"):
        latest_checkpoint(str(path.parent))
    assert os.listdir(path.parent) == ["step_00000003"]


def test_file_names_in_a_commit_cannot_leave_the_folder(tmp_path: Path, path: Path) -> None:
    reseal(path, lambda body: body["files"].update({"../../etc/passwd": [1, 1]}))
    with pytest.raises(InputError, match="not a plain file name"):
        dict(checkpoint_weights(str(path)))
