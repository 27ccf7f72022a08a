"""Text to shards: nothing lost, the same bytes however it is made, resumable, and strict."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from openlm_lite.data import gather, prepare_out, spill
from openlm_lite.data import prepare as prepare_module
from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.inspect import inspect_dataset, inspect_samples
from openlm_lite.data.plan import PrepareConfig
from openlm_lite.data.prepare import prepare
from openlm_lite.data.stream import single_stream
from openlm_lite.data.tokenizer import load_tokenizer
from openlm_lite.errors import InputError
from tests.data.prepare_corpus import (
    FINE,
    documents_of,
    files_of,
    make_texts,
    stream_of,
    train_small_tokenizer,
)

Config = Callable[..., PrepareConfig]


TEXTS = make_texts(300)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files of two formats; one empty document."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:140]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[140:299]).encode()))
    (folder / "c.txt").write_text(TEXTS[299])
    (folder / "d.jsonl").write_text('{"text": ""}\n')
    return folder


@pytest.fixture
def config(corpus: Path, tmp_path: Path, tokenizer_folder: str) -> Config:
    def make(**changes: object) -> PrepareConfig:
        base = PrepareConfig(
            inputs=(str(corpus),),
            out=str(tmp_path / "out"),
            tokenizer=tokenizer_folder,
            block_tokens=256,
            blocks_per_shard=8,
            workers=1,
        )
        return dataclasses.replace(base, **changes)  # pyright: ignore[reportArgumentType]

    return make


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, parts and cells even for a small corpus (in this process only)."""
    monkeypatch.setattr("openlm_lite.data.plan._MIN_PIECE_BYTES", 6000)
    monkeypatch.setattr("openlm_lite.data.parts.PART_TOKENS", 1200)
    monkeypatch.setattr("openlm_lite.data.gather._CELL_TOKENS", 1500)


def test_every_document_is_there_once_shuffled_and_ended(
    config: Config, tokenizer_folder: str, small_pieces: None
) -> None:
    report = prepare(config())
    split = report.splits["train"]
    found = documents_of(split.path, tokenizer_folder)
    assert len(found) == len(set(found))
    assert set(found) <= set(TEXTS)
    tokenizer = load_tokenizer(tokenizer_folder)
    lengths = {t: len(ids) + 1 for t, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True)}
    assert split.n_tokens + 1 + split.n_tokens_dropped == sum(lengths.values())
    assert split.n_tokens == split.n_blocks * 256
    assert 0 <= split.n_tokens_dropped < 256
    # what is missing is exactly what was dropped at the tail
    missing = sum(lengths[t] for t in set(TEXTS) - set(found))
    tail = split.n_tokens + 1 - sum(lengths[t] for t in found)
    assert missing == tail + split.n_tokens_dropped
    assert report.n_empty_documents == 1
    assert report.n_files == 4
    assert split.n_documents == 300
    places = [TEXTS.index(t) for t in found]
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.2


def test_how_the_work_is_cut_does_not_change_a_byte(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(config(out=str(tmp_path / "whole"), val_fraction=0.2))
    monkeypatch.setattr("openlm_lite.data.plan._MIN_PIECE_BYTES", 6000)
    monkeypatch.setattr("openlm_lite.data.parts.PART_TOKENS", 1200)
    monkeypatch.setattr("openlm_lite.data.gather._CELL_TOKENS", 1500)
    cut = prepare(config(out=str(tmp_path / "cut"), val_fraction=0.2))
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "cut")
    assert whole.splits["train"].n_tokens == cut.splits["train"].n_tokens


def test_the_number_of_workers_does_not_change_a_byte(
    config: Config, tmp_path: Path, small_pieces: None
) -> None:
    big = tmp_path / "big.jsonl"
    big.write_text("".join(json.dumps({"text": t}) + "\n" for t in make_texts(1_000)))
    outs = [str(tmp_path / f"out{workers}") for workers in (1, 3)]
    for out, workers in zip(outs, (1, 3), strict=True):
        prepare(config(inputs=(str(big),), out=out, workers=workers))
    assert files_of(outs[0]) == files_of(outs[1])


def test_the_seed_changes_the_order_and_nothing_else(
    config: Config, tmp_path: Path, tokenizer_folder: str
) -> None:
    found = []
    for seed in (0, 1):
        prepare(config(out=str(tmp_path / str(seed)), seed=seed, **FINE))
        found.append(documents_of(str(tmp_path / str(seed)), tokenizer_folder))
    assert found[0] != found[1]
    assert sorted(found[0]) == sorted(found[1]) == sorted(TEXTS)


def test_validation_documents_are_in_no_training_block(
    config: Config, tokenizer_folder: str
) -> None:
    report = prepare(config(val_fraction=0.2, **FINE))
    train = documents_of(report.splits["train"].path, tokenizer_folder)
    val = documents_of(report.splits["val"].path, tokenizer_folder)
    assert sorted(train + val) == sorted(TEXTS)
    assert 30 <= len(val) <= 90
    assert report.splits["val"].n_documents == len(val)


def test_a_trained_tokenizer_travels_with_the_data(config: Config) -> None:
    report = prepare(config(tokenizer=None, train_tokenizer=320))
    dataset = open_dataset(report.splits["train"].path)
    tokenizer = load_tokenizer(dataset.folder)
    assert report.tokenizer == dataset.info.tokenizer.name == "bpe-320"
    assert tokenizer.fingerprint == dataset.info.tokenizer.fingerprint
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (320, 0)
    assert ": " in tokenizer.decode(stream_of(dataset.folder)[:100].tolist())


def test_big_vocabularies_are_stored_in_four_bytes(
    config: Config, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str
) -> None:
    real = load_tokenizer(tokenizer_folder)
    wide = dataclasses.replace(real, vocab_size=70_000)
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda *_, **__: wide)
    report = prepare(config())
    assert report.dtype == "uint32"
    assert open_dataset(config().out).blocks(0).dtype == np.uint32


def test_the_reports_and_dataset_json_say_where_the_data_came_from(
    config: Config, corpus: Path
) -> None:
    prepare(config(inputs=(str(corpus / "*.jsonl"), str(corpus / "c.txt"))))
    facts = inspect_dataset(config().out)
    assert [s["n_documents"] for s in facts["sources"]] == [140, 1]
    assert facts["config"]["block_tokens"] == 256
    assert facts["n_tokens"] == facts["n_blocks"] * 256
    json.dumps(facts)
    assert not [name for name in files_of(config().out) if name.startswith(".")]


def test_a_run_killed_at_any_write_goes_on_and_ends_in_the_same_bytes(
    config: Config, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies at one os.replace after the other: at the first, and a few further every time."""
    prepare(config(out=str(tmp_path / "calm"), val_fraction=0.2))
    real, left = os.replace, [0]

    class Killed(BaseException):
        pass

    def replace_or_die(source: str, target: str) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    rounds = 0
    while True:
        left[0] = rounds  # the last step, with 9 writes, must fit in as well
        try:
            prepare(config(val_fraction=0.2))
            break
        except Killed:
            rounds += 1
            finished = [p for p in ("train", "val") if (Path(config().out) / p).exists()]
            for split in finished:
                if not (Path(config().out) / split / "dataset.json").exists():
                    with pytest.raises(InputError):
                        open_dataset(str(Path(config().out) / split))
    assert rounds > 5
    assert files_of(config().out) == files_of(tmp_path / "calm")


def test_a_killed_process_leaves_no_dataset_and_the_next_one_finishes_it(
    config: Config, tmp_path: Path
) -> None:
    big = tmp_path / "big.jsonl"
    big.write_text("".join(json.dumps({"text": t}) + "\n" for t in make_texts(10_000)))
    cfg = config(inputs=(str(big),), workers=2, block_tokens=4096)
    program = (
        "import sys, json\n"
        "from openlm_lite.data.prepare import PrepareConfig, prepare\n"
        "if __name__ == '__main__':\n"
        "    values = json.loads(sys.argv[1]); values['inputs'] = tuple(values['inputs'])\n"
        "    prepare(PrepareConfig(**values))\n"
    )
    (tmp_path / "program.py").write_text(program)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), json.dumps(dataclasses.asdict(cfg))],
        env={**os.environ, "PYTHONPATH": root},
    )
    deadline = time.monotonic() + 60
    while not list(Path(cfg.out).glob(".prepare/piece-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in Path(cfg.out).glob(".prepare/piece-*.json")}
    assert done
    with pytest.raises(InputError, match=r"not finished|no manifest"):
        open_dataset(cfg.out)
    prepare(cfg)
    prepare(dataclasses.replace(cfg, out=str(tmp_path / "calm")))
    assert files_of(cfg.out) == files_of(tmp_path / "calm")


def test_finished_pieces_and_shards_are_not_made_again(
    config: Config, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gather.write_shard_job
    calls = []

    def fail_on_the_fourth(job: gather.ShardJob, tables: object) -> object:
        calls.append(job.path)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(job, tables)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(gather, "write_shard_job", fail_on_the_fourth)
    with pytest.raises(InputError, match="no space left"):
        prepare(config())
    assert len(calls) == 4

    def never(*_: object) -> None:
        raise AssertionError("a finished piece was tokenised again")

    monkeypatch.setattr(spill, "tokenise_piece", never)
    prepare(config())
    assert len(calls) == len(set(calls)) + 1  # only the failed shard was tried twice


def test_a_finished_folder_is_left_alone(
    config: Config, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    first = prepare(config())
    before = files_of(config().out)
    monkeypatch.setattr(prepare_module, "_run", lambda *_: pytest.fail("worked again"))
    again = prepare(config(workers=2))
    assert again == first
    assert (first.already_done, again.already_done) == (False, True)
    os.utime(corpus / "a.jsonl")
    assert prepare(config()).already_done
    for change in ({"seed": 1}, {"block_tokens": 128}, {"val_fraction": 0.1}):
        with pytest.raises(InputError, match="other inputs or with other settings"):
            prepare(config(**change))
    with open(corpus / "a.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(InputError, match="other inputs or with other settings"):
        prepare(config())
    assert files_of(config().out) == before


def test_an_unfinished_run_of_other_work_is_not_mixed_with_this_one(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gather, "write_shard_job", stop)
        with pytest.raises(InputError, match="no space left"):
            prepare(config())
    before = files_of(config().out)
    with pytest.raises(InputError, match="unfinished run with other"):
        prepare(config(seed=5))
    assert files_of(config().out) == before
    prepare(config())


def test_a_second_run_on_the_same_folder_is_refused(config: Config) -> None:
    scratch = Path(config().out) / ".prepare"
    scratch.mkdir(parents=True)
    with (
        prepare_out.lock(str(scratch)),
        pytest.raises(InputError, match="another `openlm prepare`"),
    ):
        prepare(config())
    prepare(config())


def test_too_little_disk_for_the_shards_is_told_before_they_are_written(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"the shards need [\d,]+ bytes, the disk has 1,000"):
        prepare(config())
    assert not list(Path(config().out).glob("*.tar"))


BAD_SETTINGS = [
    ({"tokenizer": None}, "neither was given"),
    ({"train_tokenizer": 300}, "both were given"),
    ({"tokenizer": None, "train_tokenizer": 200}, "--train-tokenizer: 200"),
    ({"tokenizer": None, "train_tokenizer": 300, "eot": "x"}, "--eot"),
    ({"val_fraction": 1.0}, r"--val-fraction: 1\.0"),
    ({"val_fraction": -0.1}, r"--val-fraction: -0\.1"),
    ({"seed": -1}, "--seed: -1"),
    ({"workers": -1}, "--workers: -1"),
    ({"block_tokens": 0}, "--block-tokens: 0"),
    ({"blocks_per_shard": 0}, "--blocks-per-shard: 0"),
    ({"text_field": ""}, "--text-field"),
    ({"inputs": ()}, "no input was named"),
    ({"inputs": ("/nowhere",)}, "/nowhere: no such file"),
    ({"inputs": ("/nowhere/*.txt",)}, "no file matches"),
    ({"inputs": ("pipe:cat x",)}, "pipe:"),
    ({"out": "ftp://host/x"}, "ftp"),
    ({"tokenizer": "/nowhere/tokenizer.json"}, "no such file"),
    ({"eot": "<|no such token|>"}, "no such token"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SETTINGS)
def test_bad_settings_are_one_error_and_nothing_is_written(
    config: Config, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(config(**change))
    assert not Path(config().out).exists()


BAD_CORPORA: list[tuple[str, bytes, str]] = [
    ("x.jsonl", b'{"text": "a"}\n{"text"\n', r"x\.jsonl:2: not a JSON value"),
    ("x.jsonl", b'{"body": "a"}\n', r"x\.jsonl:1: no field 'text'"),
    ("x.jsonl", b'{"text": 1}\n', r"x\.jsonl:1: field 'text' is int"),
    ("x.txt", b"\xff", r"x\.txt: byte 0 \(0xff\): not UTF-8"),
    ("x.jsonl.gz", b"not gzip", r"x\.jsonl\.gz: damaged gzip"),
    ("x.jsonl.zst", b"not zstd", r"x\.jsonl\.zst: damaged zstd"),
    ("x.parquet", b"not parquet", r"x\.parquet: damaged parquet"),
    ("x.bin", b"a", r"x\.bin: unknown extension; known are .*\.jsonl"),
    ("x.jsonl", b"", "hold no documents"),
    ("x.jsonl", b'{"text": ""}\n', "hold no documents"),
    ("x.txt", b"short", r"the corpus has \d+ tokens.*--block-tokens"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_CORPORA)
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_bad_corpus_is_one_error_and_nothing_is_left(
    config: Config, tmp_path: Path, name: str, content: bytes, message: str, as_folder: bool
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare(config(inputs=(str(folder if as_folder else folder / name),)))
    assert not Path(config().out).exists()


def test_an_empty_folder_and_a_too_small_split_say_what_to_do(
    config: Config, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        prepare(config(inputs=(str(tmp_path / "empty"),)))
    with pytest.raises(InputError, match=r"the val split.*--block-tokens.*--val-fraction"):
        prepare(config(val_fraction=0.004))
    assert not Path(config().out).exists()


def test_other_files_in_a_folder_are_counted_and_the_out_folder_must_be_apart(
    config: Config, corpus: Path
) -> None:
    (corpus / "picture.png").write_bytes(b"x")
    for out in (corpus / "out", corpus.parent):
        with pytest.raises(InputError, match="out folder"):
            prepare(config(out=str(out)))
    assert prepare(config()).n_skipped_files == 1


def test_an_out_folder_with_other_files_is_not_touched(config: Config) -> None:
    out = Path(config().out)
    out.mkdir()
    (out / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match=r"not empty \(it holds thesis\.tex\)"):
        prepare(config())
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    prepare(config())


def test_ids_beyond_the_vocabulary_are_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str
) -> None:
    small = dataclasses.replace(load_tokenizer(tokenizer_folder), vocab_size=280)
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda *_, **__: small)
    with pytest.raises(InputError, match=r"gave id \d+, but says that it has 280 ids"):
        prepare(config())
    assert not Path(config().out).exists()


def test_inspect_shows_the_rows_of_a_step(config: Config) -> None:
    prepare(config())
    dataset = open_dataset(config().out)
    stream = single_stream(dataset, 64, seed=0, shuffle_shards=2)
    _, rows = inspect_samples(stream, first=12, n_samples=4)
    assert [row["sample"] for row in rows] == [12, 13, 14, 15]
    tokenizer = load_tokenizer(dataset.folder)
    first = stream.read(stream.places(np.array([12])))[0][0]
    assert rows[0]["text"] == tokenizer.decode(first[:64].tolist())
    assert rows[0]["shard"].endswith(".tar")
    json.dumps(rows)


def test_verify_lists_every_bad_shard(config: Config) -> None:
    prepare(config())
    assert inspect_dataset(config().out, verify=True)["verified"]
    for name in ("shard-000001.tar", "shard-000003.tar"):
        path = Path(config().out) / name
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
    with pytest.raises(InputError, match=r"(?s)2 of \d+ shards.*shard-000001.*shard-000003"):
        inspect_dataset(config().out, verify=True)


def test_workers_start_without_torch() -> None:
    """Its import takes a second or more, in each process of each stage."""
    program = "import sys, openlm_lite.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
