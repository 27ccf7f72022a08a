"""OpenLM's and DCLM's shards are read as they are: every id, or one error that names the place."""

from __future__ import annotations

import gc
import gzip
import io
import json
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite import storage
from openlm_lite.data import decode_ids
from openlm_lite.data.cache import Cache
from openlm_lite.data.convert import convert_shards
from openlm_lite.data.dataset import check_fits_model, open_dataset
from openlm_lite.data.decode_ids import BadRowError
from openlm_lite.data.manifest import TokenizerInfo
from openlm_lite.data.openlm_shards import OpenLMOptions, load_openlm
from openlm_lite.data.stream import single_stream, val_batches
from openlm_lite.data.tar_index import index_tar
from openlm_lite.data.verify import verify_dataset
from openlm_lite.errors import InputError

ROW_IDS = 33
ENDINGS = ("json.gz", "json", "txt")


def rows_of(count: int, seed: int = 0, below: int = 50_257, length: int = ROW_IDS) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, (count, length))


def text_of(row: Sequence[int]) -> bytes:
    return json.dumps(list(map(int, row))).encode()


def write_tar(
    path: Path,
    texts: Sequence[bytes],
    ending: str = "json.gz",
    tar_format: int = tarfile.PAX_FORMAT,
    mtime: float = 1_700_000_000.25,  # a fraction, as webdataset's writer has it: a pax header each
) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, text in enumerate(texts):
            content = gzip.compress(text, mtime=0) if ending.endswith(".gz") else text
            member = tarfile.TarInfo(f"{number:032x}.{ending}")
            member.size, member.mtime = len(content), mtime  # pyright: ignore
            tar.addfile(member, io.BytesIO(content))


def write_manifest(folder: Path, lines: Sequence[dict[str, object]], end: str = "\n") -> None:
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(x) for x in lines) + end)


def make_shards(folder: Path, shards: Sequence[np.ndarray], **how: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate(shards):
        write_tar(folder / f"shard_{number:08d}.tar", [text_of(row) for row in rows], **how)
    write_manifest(
        folder,
        [{"shard": f"shard_{n:08d}", "num_sequences": len(rows)} for n, rows in enumerate(shards)],
    )
    return folder


def read_all(folder: Path, options: OpenLMOptions | None = None) -> np.ndarray:
    dataset = load_openlm(str(folder), options)
    return np.concatenate([dataset.blocks(s) for s in range(len(dataset.manifest.shards))])


# --- what is read---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_shards_of_every_kind_give_their_ids_in_order(
    tmp_path: Path, ending: str, tar_format: int
) -> None:
    shards = [rows_of(20, 1), rows_of(37, 2)]
    folder = make_shards(tmp_path / "data", shards, ending=ending, tar_format=tar_format)
    dataset = load_openlm(str(folder))
    assert (dataset.block_tokens, dataset.n_blocks) == (ROW_IDS - 1, 57)
    assert dataset.blocks(1).dtype == np.uint16
    assert np.array_equal(read_all(folder), np.concatenate(shards))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("ending", ["json.gz", "json"])
def test_webdataset_decodes_the_same_ids(tmp_path: Path, ending: str) -> None:
    webdataset: Any = pytest.importorskip("webdataset")
    path = tmp_path / "shard.tar"
    with webdataset.TarWriter(str(path)) as writer:  # its writer, too
        for number, row in enumerate(rows_of(40)):
            writer.write({"__key__": f"{number:08x}", ending: list(map(int, row))})
    write_manifest(tmp_path, [{"shard": "shard", "num_sequences": 40}])
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    gc.collect()
    theirs = np.array([sample[ending] for sample in samples])
    assert np.array_equal(read_all(tmp_path), theirs)


@pytest.mark.parametrize("field", ["num_sequences", "num_chunks"])
@pytest.mark.parametrize("end", ["\n", "", "\n\n"])
def test_old_and_new_manifests_with_and_without_a_final_newline(
    tmp_path: Path, field: str, end: str
) -> None:
    folder = make_shards(tmp_path / "data", [rows_of(3, 1), rows_of(4, 2)])
    lines = [{"shard": "shard_00000000", field: 3}, {"shard": "shard_00000001", field: 4}]
    write_manifest(folder, lines, end)
    assert read_all(folder).shape == (7, ROW_IDS)


def test_any_sequence_length_that_divides_a_row_trains_on_them(tmp_path: Path) -> None:
    shards = [rows_of(5, 1), rows_of(6, 2)]
    dataset = load_openlm(str(make_shards(tmp_path / "data", shards)))
    stream = single_stream(dataset, seq_len=8, seed=0, shuffle_shards=2)
    seen, _ = stream.read(stream.places(np.arange(dataset.n_rows(8))))
    flat = np.concatenate(shards)
    expected = np.concatenate([flat[:, s : s + 9] for s in range(0, 32, 8)])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, expected.tolist()))
    known = OpenLMOptions(tokenizer=TokenizerInfo("neox", "f" * 64, 50_432, 0))
    dataset = load_openlm(str(tmp_path / "data"), known)
    batches = val_batches(dataset, seq_len=32, batch_size=2, max_tokens=None, rank=0, world_size=1)
    assert np.array_equal(next(iter(batches)).targets_BT.numpy(), shards[0][:2, 1:])


def test_shards_that_are_wanted_are_decoded_meanwhile_and_their_errors_kept_for_the_reader(
    tmp_path: Path,
) -> None:
    folder = make_shards(tmp_path / "data", [rows_of(5, seed) for seed in range(4)])
    (folder / "shard_00000002.tar").write_bytes(b"x" * 2048)
    dataset = load_openlm(str(folder))
    dataset.want([3, 2, 1])
    deadline = time.monotonic() + 30
    while not {1, 3} <= dataset._open.keys() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert dataset._open.keys() == {1, 3}
    with pytest.raises(InputError, match=r"shard_00000002\.tar: damaged"):
        dataset.blocks(2)
    assert np.array_equal(dataset.blocks(0), rows_of(5, 0))


def test_ids_beyond_the_models_vocabulary_are_found_at_first_use(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "data", [rows_of(3, below=300), rows_of(3, below=300) + 50])
    dataset = open_dataset(str(folder))
    check_fits_model(dataset, 300)
    dataset.blocks(0)
    with pytest.raises(InputError, match=r"shard_00000001\.tar: token id 3.* of 300 ids"):
        dataset.blocks(1)


def test_the_dtype_follows_the_vocabulary_or_the_largest_id(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "data", [rows_of(3, below=300), rows_of(3, below=300) + 65_400])
    dataset = load_openlm(str(folder))
    assert dataset.info.dtype == "uint32"
    assert [dataset.blocks(n).dtype for n in (0, 1)] == [np.uint16, np.uint32]
    assert dataset.info.tokenizer.fingerprint is None
    known = OpenLMOptions(tokenizer=TokenizerInfo("neox", "f" * 64, 65_536, 0))
    dataset = load_openlm(str(folder), known)
    assert dataset.info.dtype == "uint16"
    with pytest.raises(InputError, match=r"shard_00000001\.tar: member 0.*outside the vocab.*neox"):
        dataset.blocks(1)


def test_one_or_four_threads_and_either_inflater_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zlib

    rows = rows_of(100)
    folder = make_shards(tmp_path / "data", [rows])
    for threads in (1, 4):
        assert np.array_equal(read_all(folder, OpenLMOptions(threads=threads)), rows)
    monkeypatch.setattr(decode_ids, "inflate_module", lambda: zlib)
    assert np.array_equal(read_all(folder), rows)


# --- the text of a row----------------------------------------------------------------------------

ids_lists = st.lists(
    st.one_of(st.integers(0, 9), st.integers(0, 10**5), st.integers(0, 2**32 - 1)),
    min_size=1,
    max_size=40,
)
commas = st.sampled_from([",", ", ", " , ", ",\n", ",  ", "\t,"])


@given(
    rows=st.lists(ids_lists, min_size=1, max_size=20), comma=commas, end=st.sampled_from(["", "\n"])
)
def test_every_list_of_ids_comes_back_whatever_its_spaces(
    rows: list[list[int]], comma: str, end: str
) -> None:
    """Rows cut to one length; the plain forms go the fast way, others at least the slow one."""
    length = min(map(len, rows))
    rows = [row[:length] for row in rows]
    texts = [("[" + comma.join(map(str, row)) + "]" + end).encode() for row in rows]
    fast = decode_ids.decode_rows(texts, length, None)
    if comma in (",", ", ") and max(map(max, rows)) < 10**8:
        assert fast is not None
    if fast is not None:
        assert fast.tolist() == rows
    assert [decode_ids.decode_row_slowly(text, None).tolist() for text in texts] == rows


@given(
    text=st.one_of(
        st.binary(max_size=40),
        st.text(alphabet="[]0123456789, -.e\n\"'", max_size=40).map(str.encode),
        st.lists(st.integers(-5, 10**9), max_size=8).map(lambda row: json.dumps(row).encode()),
    ),
    length=st.integers(1, 8),
)
def test_the_fast_way_takes_nothing_that_the_slow_way_reads_otherwise(
    text: bytes, length: int
) -> None:
    fast = decode_ids.decode_rows([text], length, None)
    if fast is None:
        return
    # JSON alone forbids zeros in front
    plain = json.loads("[" + ",".join(str(int(x)) for x in text.strip()[1:-1].split(b",")) + "]")
    assert fast[0].tolist() == plain


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"[1, 2, -3]", "item 2 is -3"),
        (b"[1, 2.0, 3]", r"item 1 is 2\.0, not an integer"),
        (b"[1, true, 3]", "item 1 is true, not an integer"),
        (b"[1, null, 3]", "item 1 is null"),
        (b'[1, "<|endoftext|>", 3]', "eot_id"),
        (b'[1, "two", 3]', 'item 1 is "two"'),
        (b"[1, [2], 3]", "not an integer"),
        (b"[1, 2, 4294967296]", "item 2 is 4294967296; ids are from 0 to"),
        (b'{"text": "hello"}', "not a list of ids but dict"),
        (b"[1, 2, 3", "not a list of ids"),
        (b"1, 2, 3", "not a list of ids"),
        (b"[1 2, 3]", "not a list of ids"),
        (b"[1,, 3]", "not a list of ids"),
        (b"\xff\xfe", "not a list of ids"),
        (b"", "not a list of ids"),
    ],
)
def test_a_row_that_is_not_ids_is_one_error_with_member_and_item(
    tmp_path: Path, text: bytes, problem: str
) -> None:
    texts = [b"[5, 6, 7]"] * 20
    texts[17] = text
    write_tar(tmp_path / "a.tar", texts)
    write_manifest(tmp_path, [{"shard": "a", "num_sequences": 20}])
    with pytest.raises(
        InputError, match=rf"a\.tar: member 17, '0+11\.json\.gz', byte \d+: .*{problem}"
    ):
        read_all(tmp_path)


def test_endoftext_as_a_text_is_read_as_the_given_id(tmp_path: Path) -> None:
    texts = [b'[1, "<|endoftext|>", 3]', b"[1, '<|endoftext|>', 3]", b"(4, 5, 6)"]
    write_tar(tmp_path / "a.tar", texts, ending="txt")
    write_manifest(tmp_path, [{"shard": "a", "num_sequences": 3}])
    assert read_all(tmp_path, OpenLMOptions(eot_id=0)).tolist() == [[1, 0, 3], [1, 0, 3], [4, 5, 6]]
    with pytest.raises(InputError, match="eot_id"):
        read_all(tmp_path)


def test_short_rows_are_an_error_unless_there_is_a_pad_id(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [b"[1, 2, 3]"] * 17 + [b"[4, 5]", b"[]", b"[6, 7, 8]"])
    write_manifest(tmp_path, [{"shard": "a", "num_sequences": 20}])
    with pytest.raises(InputError, match=r"a\.tar: member 17.*2 ids.*have 3; give pad_id"):
        read_all(tmp_path)
    padded = read_all(tmp_path, OpenLMOptions(pad_id=9))
    assert padded[16:].tolist() == [[1, 2, 3], [4, 5, 9], [9, 9, 9], [6, 7, 8]]


def test_rows_that_are_longer_than_the_first_are_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [b"[1, 2, 3]", b"[1, 2, 3, 4]", b"[1, 2]"])
    write_manifest(tmp_path, [{"shard": "a", "num_sequences": 3}])
    with pytest.raises(InputError, match=r"member 1.*4 ids, where the rows of this data have 3"):
        read_all(tmp_path, OpenLMOptions(pad_id=0))
    assert read_all(tmp_path, OpenLMOptions(pad_id=0, row_ids=4)).shape == (3, 4)


def test_a_decompression_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    bomb = b"[1, 2, 3" + b" " * (8 << 20) + b"]"
    write_tar(tmp_path / "a.tar", [b"[1, 2, 3]", bomb])
    write_manifest(tmp_path, [{"shard": "a", "num_sequences": 2}])
    with pytest.raises(InputError, match=r"member 1.*more than \d+ bytes of text"):
        read_all(tmp_path)


# --- damage---------------------------------------------------------------------------------------


def headers_of(data: bytes) -> list[int]:
    """The offsets of the headers of files (not of pax records)."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [member.offset_data - 512 for member in tar.getmembers()]


def flip(at: int, bit: int = 1) -> Callable[[bytearray, int], object]:
    return lambda data, header: data.__setitem__(header + at, data[header + at] ^ bit)


def cut(at: int) -> Callable[[bytearray, int], object]:
    return lambda data, header: data.__delitem__(slice(header + at, None))


DAMAGE: dict[str, Callable[[bytearray, int], object]] = {
    "cut at a header": cut(0),
    "cut inside a header": cut(100),
    "cut inside a member": cut(530),
    "cut end of archive": lambda b, h: b.__delitem__(
        slice(len(b.rstrip(b"\0")) // 512 * 512 + 1024, None)
    ),
    "empty file": lambda b, h: b.clear(),
    "bytes appended": lambda b, h: b.extend(b"x" * 512),
    "name bit": flip(1),
    "size bit": flip(134),
    "size bit, much larger": flip(126),
    "type bit": flip(156),
    "checksum bit": flip(150),
    "header zeroed": lambda b, h: b.__setitem__(slice(h, h + 512), bytes(512)),
    "header overwritten": lambda b, h: b.__setitem__(slice(h, h + 512), b"x" * 512),
    "payload bit": flip(512 + 30, 16),
    "gzip trailer bit": lambda b, h: flip(512 + int(b[h + 124 : h + 135], 8) - 6)(b, h),
    "end of archive bit": lambda b, h: b.__setitem__(len(b) - 3, 1),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_kind_of_damage_is_one_error_with_shard_and_offset(
    tmp_path: Path, kind: str, tar_format: int
) -> None:
    folder = make_shards(tmp_path / "data", [rows_of(3), rows_of(30)], tar_format=tar_format)
    path = folder / "shard_00000001.tar"
    data = bytearray(path.read_bytes())
    DAMAGE[kind](data, headers_of(bytes(data))[20])
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"shard_00000001\.tar.*byte \d+"):
        read_all(folder)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_json_gz_shard_is_an_error_or_harmless(
    where: float, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flips"
    rows = rows_of(20)
    if not folder.exists():
        make_shards(folder, [rows])
        (folder / "whole").write_bytes((folder / "shard_00000000.tar").read_bytes())
    data = bytearray((folder / "whole").read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    (folder / "shard_00000000.tar").write_bytes(data)
    try:
        found = read_all(folder)
    except InputError as e:
        assert "shard_00000000.tar" in str(e)
    else:
        assert np.array_equal(found, rows)


def test_a_crc32_in_the_manifest_is_checked_and_covers_plain_text(tmp_path: Path) -> None:
    import zlib

    folder = make_shards(tmp_path / "data", [rows_of(3)], ending="json")
    path = folder / "shard_00000000.tar"
    data = path.read_bytes()
    line = {"shard": "shard_00000000", "num_sequences": 3, "crc32": zlib.crc32(data)}
    write_manifest(folder, [line])
    assert read_all(folder).shape == (3, ROW_IDS)
    header = headers_of(data)[1]
    digit = data.index(b"1", header + 512)
    path.write_bytes(data[:digit] + b"2" + data[digit + 1 :])
    with pytest.raises(InputError, match=r"shard_00000000\.tar: damaged at byte 0: crc32"):
        read_all(folder)


def test_counts_that_disagree_with_the_tar_and_missing_shards_are_named(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "data", [rows_of(3), rows_of(4)])
    lines = [{"shard": "shard_00000000", "num_sequences": n} for n in (3, 5)]
    lines[1]["shard"] = "shard_00000001"
    write_manifest(folder, lines)
    with pytest.raises(InputError, match=r"00000001\.tar: holds 4 sequences.*says 5"):
        read_all(folder)
    (folder / "shard_00000001.tar").unlink()
    with pytest.raises(InputError, match=r"shard_00000001\.tar.*missing"):
        open_dataset(str(folder))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"num_sequences": 3}, "'shard' is missing"),
        ({"shard": "shard_00000000"}, "'num_sequences' is missing"),
        ({"shard": "shard_00000000", "num_sequences": 0}, ">= 1"),
        ({"shard": "shard_00000000", "num_sequences": "3"}, "expected int"),
        ({"shard": "../shard_00000000", "num_sequences": 3}, "refused"),
        ({"shard": "pipe:echo", "num_sequences": 3}, "refused"),
    ],
)
def test_a_bad_manifest_line_is_named(
    tmp_path: Path, line: dict[str, object], problem: str
) -> None:
    folder = make_shards(tmp_path / "data", [rows_of(3)])
    write_manifest(folder, [line])
    with pytest.raises(InputError, match=problem):
        load_openlm(str(folder))


@pytest.mark.parametrize("name", ["0000000000.npy", "0.pickle", "0.json.bz2", "json", "0.jsonl"])
def test_members_that_are_no_lists_of_ids_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 5
        tar.addfile(member, io.BytesIO(b"[1,2]"))
    write_manifest(tmp_path, [{"shard": "a", "num_sequences": 1}])
    with pytest.raises(InputError, match=rf"member 0, '{name}'.*ends in none of \.json\.gz"):
        read_all(tmp_path)


def test_folders_long_names_and_prefixes_in_a_tar_are_understood(tmp_path: Path) -> None:
    for number, tar_format in enumerate(
        (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    ):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=tar_format) as tar:
            folder = tarfile.TarInfo("./" + "d" * (60 if number == 2 else 160))
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            member = tarfile.TarInfo("d" * 60 + "/" + "ä" * 20 + "n" * 40 + ".json")
            member.size = 5
            tar.addfile(member, io.BytesIO(b"[1,2]"))
            second = tarfile.TarInfo("second.json")
            second.size = 5
            tar.addfile(folder)
            tar.addfile(second, io.BytesIO(b"[3,4]"))
            names = [found.name for found in tar.getmembers() if found.isfile()]
        content = (tmp_path / f"{number}.tar").read_bytes()
        assert index_tar("", content).names == names
    write_manifest(tmp_path, [{"shard": str(n), "num_sequences": 2} for n in range(3)])
    assert read_all(tmp_path).tolist() == [[1, 2], [3, 4]] * 3


def test_a_link_in_a_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("0.json")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    write_manifest(tmp_path, [{"shard": "a", "num_sequences": 1}])
    with pytest.raises(InputError, match=r"a\.tar: damaged at byte 0: a member of type"):
        read_all(tmp_path)


def test_a_slow_row_error_is_not_a_bare_exception() -> None:
    with pytest.raises(BadRowError):
        decode_ids.decode_row_slowly(b"[" * 100_000, None)
    with pytest.raises(BadRowError):
        decode_ids.decode_row_slowly(b"[" + b"9" * 10_000 + b"]", None)


# --- from an object store ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_remote_openlm_shards_come_through_the_cache_and_convert_to_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from tests.s3_faults import s3_with_faults

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = [rows_of(5, seed) for seed in range(3)]
    folder = make_shards(tmp_path / "data", shards)
    with s3_with_faults():
        url = "s3://bucket/openlm"
        for path in folder.iterdir():
            storage.put_file(str(path), f"{url}/{path.name}")
        dataset = open_dataset(url, Cache(str(tmp_path / "shards")))
        dataset.want([2, 1, 0])
        for number, rows in enumerate(shards):
            assert np.array_equal(dataset.blocks(number), rows)
        assert verify_dataset(url).n_shards == 3
        convert_shards(url, str(tmp_path / "out"), workers=1)
        there = "s3://bucket/converted"
        how = {"scratch": str(tmp_path / "scratch"), "workers": 1}
        assert not convert_shards(url, there, **how).already_done
        made = {u.rsplit("/", 1)[1]: storage.read_bytes(u) for u in storage.list_files(there)}
        assert made == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert convert_shards(url, there, **how).already_done
        assert not any((tmp_path / "scratch").iterdir())
        with pytest.raises(InputError, match=f"{there}: holds a dataset that was made from other"):
            convert_shards(url, there, block_tokens=8, **how)
        with pytest.raises(InputError, match=r"bucket/nothing/manifest\.jsonl"):
            open_dataset("s3://bucket/nothing")
    converted = open_dataset(str(tmp_path / "out"))
    assert np.array_equal(converted.blocks(2), shards[2])
