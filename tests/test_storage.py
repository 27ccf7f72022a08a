"""Only local paths, only harmless names, and no file that looks whole before it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from openlm_lite import storage
from openlm_lite.errors import InputError


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipe:cat x", "would run a shell"),
        ("pipe:aws s3 cp s3://b/x -", "would run a shell"),
        ("s3://bucket/x", "s3:// is not read yet"),
        ("HF://datasets/x", "hf:// is not read yet"),
        ("magic://x", "unknown scheme 'magic'"),
        ("", "empty path"),
    ],
)
def test_anything_but_a_local_path_is_refused(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        storage.local_path(path)


def test_plain_and_file_paths_are_local() -> None:
    assert storage.local_path("a/b c") == "a/b c"
    assert storage.local_path("file:///a/b") == "/a/b"


@pytest.mark.parametrize("name", ["../a", "/a", "a b", "a;b", "$(a)", "a/../b", "", "a\nb"])
def test_names_out_of_files_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(InputError, match="refused"):
        storage.safe_join("folder", name)
    assert storage.safe_join("folder", "sub/shard-0.tar") == "folder/sub/shard-0.tar"


def test_files_are_listed_sorted_and_marks_are_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden", "_SUCCESS", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [str(tmp_path / n) for n in ("a.txt", "b.txt", "sub/c.txt")]
    assert storage.list_files(str(tmp_path)) == names
    assert storage.list_files(str(tmp_path / "*.txt")) == names[:2]
    assert storage.list_files(str(tmp_path / "**/*.txt")) == names
    assert storage.list_files(names[1]) == [names[1]]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert storage.list_files(str(tmp_path / "a[1].txt")) == [str(tmp_path / "a[1].txt")]


@pytest.mark.parametrize("name", ["nothing", "nothing*.txt"])
def test_what_is_not_there_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no "):
        storage.list_files(str(tmp_path / name))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    storage.write_bytes(str(path), b"old")
    with pytest.raises(RuntimeError), storage.atomic_write(str(path)) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
