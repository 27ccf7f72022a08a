"""Weights out of files that others wrote: whole and exact, or refused with one message."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from openlm_lite.errors import InputError
from openlm_lite.hf.torch_file import read_torch_file
from openlm_lite.hf.weights import Weights, open_weights

TENSORS = {
    "layers.0.wq.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "norm.weight": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
    "scale": torch.tensor(3.0, dtype=torch.float16),
    "none": torch.empty(0, 4),
}


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def check(weights: Weights, expected: dict[str, Tensor] = TENSORS) -> None:
    assert weights.keys() == expected.keys()
    assert {n: tuple(t.shape) for n, t in expected.items()} == dict(weights.shapes)
    for name, tensor in expected.items():
        assert same(weights[name], tensor), name


def refused(path: Path | str, *parts: str) -> None:
    """Opening, or reading all, ends in one InputError that names the file and says `parts`."""
    with pytest.raises(InputError) as caught:
        dict(open_weights(str(path)))
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def put(folder: Path, parts: dict[str, dict[str, Tensor]], kind: str = "safetensors") -> Path:
    """Shards with an index, as transformers writes them."""
    folder.mkdir(exist_ok=True)
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    for file, tensors in parts.items():
        if kind == "safetensors":
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    (folder / f"{stem}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder / f"{stem}.index.json"


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_and_its_file_give_the_tensors_as_stored(tmp_path: Path, name: str) -> None:
    if name.endswith(".bin"):
        torch.save(TENSORS, tmp_path / name)
    else:
        save_file(TENSORS, tmp_path / name, metadata={"format": "pt"})
    check(open_weights(str(tmp_path)))
    check(open_weights(str(tmp_path / name)))
    check(open_weights(f"file://{tmp_path / name}"))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_as_one(tmp_path: Path, kind: str) -> None:
    names = list(TENSORS)
    parts = {
        f"part-1.{kind}": {n: TENSORS[n] for n in names[:2]},
        f"part-2.{kind}": {n: TENSORS[n] for n in names[2:]},
    }
    index = put(tmp_path, parts, kind)
    check(open_weights(str(tmp_path)))
    check(open_weights(str(index)))


def test_a_tensor_that_the_index_forgets_is_not_lost(tmp_path: Path) -> None:
    index = put(tmp_path, {"a.safetensors": TENSORS})
    content = json.loads(index.read_text())
    del content["weight_map"]["scale"]
    index.write_text(json.dumps(content))
    check(open_weights(str(tmp_path)))


def test_safetensors_come_before_torch_files(tmp_path: Path) -> None:
    torch.save({"other": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    save_file(TENSORS, tmp_path / "model.safetensors")
    check(open_weights(str(tmp_path)))


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "blob")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blob")
    check(open_weights(str(tmp_path / "snapshot")))


ONE_BYTE = (torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int64, torch.uint16, torch.complex64, *ONE_BYTE], ids=str
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_every_dtype_is_kept(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    path = tmp_path / f"x.{suffix}"
    torch.save({"x": tensor}, path) if suffix == "pt" else save_file({"x": tensor}, path)
    found = open_weights(str(path))["x"]
    assert found.dtype == dtype and found.shape == (2, 3) and bytes_of(found) == bytes_of(tensor)


def test_a_tensor_belongs_to_who_asked_and_is_read_anew_each_time(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    torch.save(TENSORS, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        weights = open_weights(str(tmp_path / name))
        weights["scale"].zero_()
        check(weights)


def test_the_mapping_reads_nothing_before_it_is_asked() -> None:
    asked = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return torch.ones(2)

    weights = Weights("here", {"a": (2,), "b": (3,)}, read)
    assert (len(weights), list(weights), "a" in weights, "c" in weights) == (2, ["a", "b"], True, 0)
    assert weights.get("c") is None and asked == []
    assert same(weights["a"], torch.ones(2))
    with pytest.raises(InputError, match=r"here: tensor b is \[2\] instead of \[3\]"):
        weights["b"]
    with pytest.raises(KeyError):
        weights["c"]


# --- torch.save ----------------------------------------------------------------------------------


def test_openlm_checkpoints_give_their_state_dict(shared_data: Path) -> None:
    folder = shared_data / "openlm" / "native_ckpt_tiny"
    weights = open_weights(str(folder / "epoch_1.pt"))
    assert weights.shapes["tok_embeddings.weight"] == (16, 16)
    assert len(weights) == len(set(weights)) > 10
    reference = torch.load(folder / "epoch_1.pt", weights_only=True)["state_dict"]
    check(weights, dict(reference))


def test_openlm_optimizer_and_stats_files_load_and_hold_no_weights(shared_data: Path) -> None:
    folder = shared_data / "openlm" / "native_ckpt_tiny"
    groups = read_torch_file(str(folder / "optimizer_1.pt"))["optimizer"]["param_groups"]
    assert all(isinstance(group["lr"], np.float64) for group in groups)
    assert read_torch_file(str(folder / "stats_1.pt"))["epoch"] == 1
    refused(folder / "optimizer_1.pt", "holds no weights (found: epoch, name, optimizer")
    refused(folder / "stats_1.pt", "holds no weights (found: epoch, name, is_final_checkpoint")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_state_dict_beside_other_things_is_found(tmp_path: Path, key: str) -> None:
    beside = {
        "epoch": 1,
        "name": "x",
        "loss": np.float64(2.5),
        "steps": np.int64(3),
        "rng": torch.ones(2),
    }
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": np.float32(1)}]}
    torch.save({key: OrderedDict(TENSORS), "optimizer": optimizer, **beside}, tmp_path / "e.pt")
    check(open_weights(str(tmp_path / "e.pt")))


def test_numbers_of_numpy_1_load(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "lr": np.float64(0.1)}, tmp_path / "new.pt")
    repack(
        tmp_path / "new.pt",
        tmp_path / "old.pt",
        lambda content: content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"),
    )
    assert b"cnumpy.core.multiarray\nscalar\n" in (tmp_path / "old.pt").read_bytes()
    check(open_weights(str(tmp_path / "old.pt")))
    assert read_torch_file(str(tmp_path / "old.pt"))["lr"] == 0.1


def repack(
    source: Path,
    target: Path,
    change: Callable[[bytes], bytes] = lambda content: content,
    compression: int = zipfile.ZIP_STORED,
    **more: bytes,
) -> None:
    """The zip file again, with changed records, or more of them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(old.read(info)))
        for name, content in more.items():
            new.writestr(f"a/{name}.pkl", content)


@pytest.mark.parametrize(
    "spelling",
    [
        "module.{0}",
        "_orig_mod.{0}",
        "module._orig_mod.{0}",
        "_orig_mod.module.{0}",
        "module.module.{0}",
        "_fsdp_wrapped_module.{0}",
    ],
)
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, spelling: str) -> None:
    torch.save({spelling.format(n): t for n, t in TENSORS.items()}, tmp_path / "a.pt")
    check(open_weights(str(tmp_path / "a.pt")))


def test_prefixes_are_taken_off_wherever_they_stand_and_only_whole_ones(tmp_path: Path) -> None:
    stored = [
        "layers.0._orig_mod.w",
        "module.layers.1._checkpoint_wrapped_module.w",
        "_fsdp_wrapped_module.layers.2._fsdp_wrapped_module._checkpoint_wrapped_module.w",
        "my_module.w",
        "module",
    ]
    torch.save({name: torch.ones(1) for name in stored}, tmp_path / "a.pt")
    found = list(open_weights(str(tmp_path / "a.pt")))
    assert found == ["layers.0.w", "layers.1.w", "layers.2.w", "my_module.w", "module"]


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "module.w": torch.ones(1)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "w and module.w are both w")


def test_parts_views_and_parameters_are_copied_whole_and_alone(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"rows": whole[1:3], "columns": whole[:, ::2], "t": whole.T, "tied": whole}
    torch.save({**tensors, "p": torch.nn.Parameter(torch.ones(3))}, tmp_path / "a.pt")
    weights = open_weights(str(tmp_path / "a.pt"))
    check(weights, {**tensors, "p": torch.ones(3)})
    for tensor in weights.values():
        assert tensor.is_contiguous() and not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


UNUSABLE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "is sparse"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "is sparse"),
    "meta": (lambda: torch.empty(3, device="meta"), "is without data"),
    "expanded": (lambda: torch.ones(1).expand(10**6, 10**6), "made of fewer numbers"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_tensors_that_cannot_be_weights_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, message = UNUSABLE[kind]
    torch.save({"fine": torch.ones(2), "odd": make()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "tensor odd", message)
    assert same(open_weights(str(tmp_path / "a.pt"))["fine"], torch.ones(2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no weights (found: nothing)"),
        ({"epoch": 1, "args": {"lr": 1.0}}, "holds no weights (found: epoch, args)"),
        ({"state_dict": {}, "step": 3}, "holds no weights (found: state_dict, step)"),
        ({"w": torch.ones(1), "step": 3}, "step is a int, not a tensor"),
        ({"state_dict": {"w": torch.ones(1), "extra": [1]}}, "extra is a list, not a tensor"),
        ({"w": torch.ones(1), 7: torch.ones(1)}, "has the key 7"),
        (
            {"model": {"w": torch.ones(1)}, "state_dict": {"w": torch.ones(1)}},
            "several state dicts",
        ),
        ([torch.ones(1)], "holds a list, not a state dict"),
        (torch.ones(1), "holds a Tensor, not a state dict"),
        (None, "holds a NoneType, not a state dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_without_a_clear_state_dict_is_refused(
    tmp_path: Path, content: Any, message: str
) -> None:
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", message)


# --- hostile files -------------------------------------------------------------------------------


class Bomb:
    """Unpickling this makes a folder: proof that code was run."""

    def __init__(self, target: Path, call: Callable[..., Any] = os.mkdir) -> None:
        self.target = target
        self.call = call

    def __reduce__(self) -> Any:
        return self.call, (str(self.target),)


class Model(torch.nn.Module):
    pass


@pytest.mark.parametrize("place", ["alone", "beside", "inside"])
def test_a_bomb_is_refused_by_what_it_asks_for_and_does_not_go_off(
    tmp_path: Path, place: str
) -> None:
    bomb = Bomb(tmp_path / "boom")
    content = {
        "alone": bomb,
        "beside": {"state_dict": TENSORS, "evaluation_metrics": [bomb]},
        "inside": {"state_dict": {**TENSORS, "w": bomb}},
    }[place]
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "refused: it asks for posix.mkdir, which no file of weights needs")
    assert not (tmp_path / "boom").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "boom").exists()  # the bomb is a real one


@pytest.mark.parametrize(
    ("content", "asked_for"),
    [
        (Bomb(Path("echo"), os.system), "posix.system"),
        (Bomb(Path("1"), eval), "eval"),
        (Bomb(Path("x"), torch.load), "torch.serialization.load"),
        (Bomb(Path("x"), shutil.rmtree), "shutil.rmtree"),
        ({"w": np.ones(3)}, "numpy._core.multiarray._reconstruct"),
        (Model(), "test_weights.Model"),
        (Path("x"), "pathlib.PosixPath"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_but_tensors_and_numbers_is_let_through(
    tmp_path: Path, content: Any, asked_for: str
) -> None:
    torch.save({"w": torch.ones(1), "x": content}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "refused: it asks for", asked_for)


def test_what_another_library_allowed_before_is_allowed_again_afterwards(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.pt")
    before = torch.serialization.get_safe_globals()
    check(open_weights(str(tmp_path / "a.pt")))
    assert Counter(map(str, torch.serialization.get_safe_globals())) == Counter(map(str, before))


def test_files_older_than_zip_are_refused_without_being_unpickled(tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "boom"), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with tarfile.open(tmp_path / "c.pt", "w") as tar:
        tar.add(tmp_path / "b.pt", "pickle")
    (tmp_path / "d.pt").write_bytes(b"anything")
    for name in "abcd":
        refused(tmp_path / f"{name}.pt", "is no zip file, as torch.save writes since torch 1.6")
    assert not (tmp_path / "boom").exists()


def test_torchscript_and_compressed_zip_files_are_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.pt")
    repack(tmp_path / "a.pt", tmp_path / "squeezed.pt", compression=zipfile.ZIP_DEFLATED)
    repack(tmp_path / "a.pt", tmp_path / "script.pt", constants=b"")
    refused(tmp_path / "squeezed.pt", "is compressed")
    refused(tmp_path / "script.pt", "is a TorchScript program")


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/a.safetensors", "x/../../a.bin", "a b"])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, file: str) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    index = put(tmp_path / "in", {})
    index.write_text(json.dumps({"weight_map": {"scale": file}}))
    refused(index, f"the name {file!r} is refused")


# --- what is not there, not whole, or not clear --------------------------------------------------


def test_nothing_there_is_said_with_what_is_allowed(tmp_path: Path) -> None:
    refused(tmp_path / "x.safetensors", "nothing is there; allowed are a folder with model.safe")
    refused(tmp_path / "x", "nothing is there")
    refused("s3://bucket/model.safetensors", "has to lie on a local disk")
    with pytest.raises(InputError, match="empty path"):
        open_weights("")


def test_a_folder_without_weights_lists_what_is_there(tmp_path: Path) -> None:
    refused(tmp_path, "holds no weights (found: nothing); allowed are")
    for name in ("config.json", "model-00001-of-00002.safetensors", *(f"z{i}" for i in range(9))):
        (tmp_path / name).touch()
    refused(tmp_path, "found: config.json, model-00001-of-00002.safetensors, z0, z1", ", …)")


def test_a_file_with_and_without_index_is_not_guessed_about(tmp_path: Path) -> None:
    put(tmp_path, {"a.safetensors": TENSORS})
    save_file(TENSORS, tmp_path / "model.safetensors")
    refused(tmp_path, "holds both model.safetensors and model.safetensors.index.json")


@pytest.mark.parametrize("name", ["weights.npz", "model.gguf", "config.json", "noending"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"content")
    refused(tmp_path / name, "a file of unknown kind; allowed are")


ALL_KINDS = ["a.safetensors", "a.pt", "a.bin", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", ALL_KINDS)
def test_empty_files_pointers_folders_and_dead_links_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    refused(path, "is empty")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n")
    refused(path, "is a git-lfs pointer", "git lfs pull")
    path.write_bytes(b"\x00garbage" * 100)
    refused(path)
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    refused(path, "is a link to a file that is not there")
    path.unlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").mkdir()
    refused(tmp_path / "folder", "is no file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").chmod(0)
    refused(tmp_path / "a.safetensors", "cannot be read: Permission denied")


def test_index_and_shards_that_disagree_are_refused(tmp_path: Path) -> None:
    index = put(tmp_path, {"a.safetensors": TENSORS, "b.safetensors": {"b": torch.ones(1)}})
    (tmp_path / "b.safetensors").unlink()
    refused(tmp_path, str(index), "names the file b.safetensors, which is not there")
    save_file({"scale": torch.ones(1)}, tmp_path / "b.safetensors")
    refused(index, "says that b is in b.safetensors, but it is not")
    save_file({"scale": torch.ones(1), "b": torch.ones(1)}, tmp_path / "b.safetensors")
    refused(index, "tensor scale is in", "a.safetensors and in", "b.safetensors; keep one of them")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "x.bin", "a": "y.bin"}}',
        "[" * 100_000,
        "\udcff",
    ],
    ids=lambda value: value[:30],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    refused(path)


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return len(text).to_bytes(8, "little") + text.encode() + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1234567", "is truncated"),
        ((10**12).to_bytes(8, "little") + b"{}", "does not begin with the length of a header"),
        ((50).to_bytes(8, "little") + b"{}", "is truncated: 10 bytes, its header alone has 50"),
        (safetensors_bytes("[]"), "has a damaged header"),
        (safetensors_bytes("[" * 100_000), "has a damaged header"),
        (safetensors_bytes({}), "holds no tensor"),
        (safetensors_bytes({"__metadata__": {"format": "pt"}}), "holds no tensor"),
        (safetensors_bytes({"a": 1}), "has a damaged header"),
        (safetensors_bytes({"a": {"dtype": "F32"}}), "has a damaged header"),
        (safetensors_bytes({"a": entry()}, b"123"), "is truncated: 3 bytes of tensors instead of"),
        (safetensors_bytes({"a": entry()}, b"12345"), "has 1 bytes more than its header says"),
        (safetensors_bytes({"a": entry(dtype="F4")}, b"1234"), "tensor a is 'F4'; allowed are F64"),
        (safetensors_bytes({"a": entry(dtype=[])}, b"1234"), "has a damaged header"),
        (safetensors_bytes({"a": entry(shape=[2])}, b"1234"), "a has 4 bytes for F32 [2]"),
        (safetensors_bytes({"a": entry(shape=[-1])}, b"1234"), "the shape [-1]"),
        (safetensors_bytes({"a": entry(shape=[True])}, b"1234"), "the shape [True]"),
        (safetensors_bytes({"a": entry(shape=1)}, b"1234"), "has a damaged header"),
        (safetensors_bytes({"a": entry(offsets=[4, 8])}, b"12345678"), "begins at 4, not 0"),
        (safetensors_bytes({"a": entry(), "b": entry()}, b"1234"), "b begins at 0, not 4"),
        (safetensors_bytes('{"a": {}, "a": {}}'), "'a' stands there twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_safetensors_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path / "a.safetensors", message)


def test_a_file_that_shrinks_after_opening_is_refused_by_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    weights = open_weights(str(path))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"tensor layers\.0\.wq\.weight has \d+ bytes instead"):
        dict(weights)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.safetensors: tensor scale cannot be read: No such"):
        weights["scale"]


# --- damage at any place -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_file(TENSORS, folder / "a.safetensors", metadata={"format": "pt"})
    torch.save({"state_dict": TENSORS, "lr": np.float64(1)}, folder / "a.pt")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": TENSORS}, folder / "nosum.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    return folder


def read_damaged(path: Path, content: bytes) -> dict[str, Tensor] | None:
    """All tensors, or None where an InputError names the file; any other error goes through."""
    target = path.with_name(f"damaged-{path.name}")
    target.write_bytes(content)
    try:
        return dict(open_weights(str(target)))
    except InputError as error:
        assert str(target) in str(error)
        return None


@settings(max_examples=100, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["a.safetensors", "a.pt"]))
def test_a_truncated_file_is_always_refused(whole: Path, share: float, name: str) -> None:
    content = (whole / name).read_bytes()
    assert read_damaged(whole / name, content[: int(share * len(content))]) is None


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0), bits=st.integers(1, 255))
def test_a_changed_byte_anywhere_in_a_torch_file_is_seen_or_harmless(
    whole: Path, position: int, bits: int
) -> None:
    content = bytearray((whole / "a.pt").read_bytes())
    content[position % len(content)] ^= bits
    found = read_damaged(whole / "a.pt", bytes(content))
    assert found is None or found.keys() == TENSORS.keys()
    assert found is None or all(same(found[n], t) for n, t in TENSORS.items())


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0), bits=st.integers(1, 255))
def test_a_changed_byte_in_a_torch_file_without_checksums_raises_nothing_else(
    whole: Path, position: int, bits: int
) -> None:
    content = bytearray((whole / "nosum.pt").read_bytes())
    content[position % len(content)] ^= bits
    read_damaged(whole / "nosum.pt", bytes(content))


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0), bits=st.integers(1, 255))
def test_a_changed_byte_in_a_safetensors_header_never_loses_or_moves_a_tensor(
    whole: Path, position: int, bits: int
) -> None:
    """It may make another name or another dtype of the same size: nothing in the file tells."""
    content = bytearray((whole / "a.safetensors").read_bytes())
    n_header = 8 + int.from_bytes(content[:8], "little")
    content[position % n_header] ^= bits
    found = read_damaged(whole / "a.safetensors", bytes(content))
    if found is None:
        return
    assert len(found) == len(TENSORS) and len(found.keys() & TENSORS.keys()) >= len(TENSORS) - 1
    stored = {bytes_of(t) for t in TENSORS.values()}
    for name, tensor in found.items():
        assert bytes_of(tensor) in stored
        # (an empty tensor may get another empty shape)
        if name in TENSORS and tensor.numel() and tensor.dtype == TENSORS[name].dtype:
            assert torch.equal(tensor, TENSORS[name])


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.integers(0, 3), min_size=1, max_size=4), st.data())
def test_what_the_library_writes_is_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, int], data: st.DataObject
) -> None:
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64])
    tensors = {
        name: torch.arange(2 * n).reshape(2, n).to(data.draw(dtypes))
        for name, n in sizes.items()
        if name != "__metadata__"
    }
    path = tmp_path_factory.mktemp("x") / "a.safetensors"
    save_file(tensors, path)
    check(open_weights(str(path)), tensors)


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from openlm_lite.hf.weights import open_weights

def status(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) * 1024

torch.ones(10).to(torch.bfloat16).float()
before = peak = status("RssAnon")
weights = open_weights(sys.argv[1])
total = 0.0
for name in weights:
    tensor = weights[name]
    wide = tensor.float()
    total += wide.sum().item()
    peak = max(peak, status("RssAnon"))
    del tensor, wide
assert total == 10 * 10_000_000, total
print(peak - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["safetensors", pytest.param("pt", marks=pytest.mark.slow)])
def test_reading_needs_the_memory_of_one_tensor(tmp_path: Path, kind: str) -> None:
    """A file of 200 MB, tensors of 20 MB in bf16: one and its fp32 copy.

    Memory of its own is counted. Pages of a mapped .pt come besides: as many as the system likes.
    """
    tensors = {f"w{i}": torch.ones(10_000_000, dtype=torch.bfloat16) for i in range(10)}
    path = tmp_path / f"a.{kind}"
    torch.save(tensors, path) if kind == "pt" else save_file(tensors, path)
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100e6, f"{int(done.stdout):,} bytes"
