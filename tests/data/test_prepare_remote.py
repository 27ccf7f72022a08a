"""From an S3 server to an S3 server: the bytes of the local run, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from openlm_lite import retries, storage
from openlm_lite.data import gather
from openlm_lite.data.plan import PrepareConfig
from openlm_lite.data.prepare import prepare
from openlm_lite.errors import InputError
from openlm_lite.retries import Retry
from tests.data.prepare_corpus import files_of, make_texts, train_small_tokenizer, write_lines
from tests.s3_faults import ERRORS, Faults, s3_with_faults

pytest.importorskip("moto")
pytest.importorskip("s3fs")

TEXTS = make_texts(300)
Config = Callable[..., PrepareConfig]


@pytest.fixture(scope="module")
def server() -> Iterator[Faults]:
    with s3_with_faults() as faults:
        yield faults


@pytest.fixture
def s3(server: Faults, monkeypatch: pytest.MonkeyPatch) -> Faults:
    """The server without faults so far, and retries without the waiting."""
    server.clear()
    quick = Retry(total_seconds=60.0, first_wait=0.001, longest_wait=0.01, idle_seconds=30.0)
    monkeypatch.setattr(retries, "RETRY", quick)
    return server


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A corpus in every kind of file, in tmp_path/in and on the server."""
    folder = tmp_path / "in"
    write_lines(folder / "a.jsonl", TEXTS[:100])
    text = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[100:200])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "c.txt").write_text(TEXTS[200])
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[201:]}), folder / "d.parquet")
    base = f"s3://bucket/{tmp_path.name}"
    for path in folder.iterdir():
        storage.put_file(str(path), f"{base}/in/{path.name}")
    monkeypatch.setattr("openlm_lite.data.plan._MIN_PIECE_BYTES", 6000)
    tokenizer = train_small_tokenizer(tmp_path / "tokenizer")

    def make(**changes: object) -> PrepareConfig:
        cfg = PrepareConfig(
            inputs=(f"{base}/in",),
            out=f"{base}/out",
            tokenizer=tokenizer,
            block_tokens=256,
            blocks_per_shard=8,
            val_fraction=0.2,
            dedup=True,
            workers=1,
            scratch=str(tmp_path / "scratch"),
        )
        return dataclasses.replace(cfg, **changes)  # pyright: ignore[reportArgumentType]

    return make


def fetched(url: str, into: Path) -> dict[str, bytes]:
    """All files under a URL."""
    return {
        name.removeprefix(url + "/"): storage.read_bytes(name) for name in storage.list_files(url)
    }


def local_bytes(config: Config, tmp_path: Path) -> dict[str, bytes]:
    """What the local run makes, with the sources named as the remote run names them."""
    cfg = config(inputs=(str(tmp_path / "in"),), out=str(tmp_path / "local"), scratch=None)
    prepare(cfg)
    remote_name = config().inputs[0].encode()
    return {
        name: content.replace(cfg.inputs[0].encode(), remote_name)
        for name, content in files_of(tmp_path / "local").items()
    }


def test_from_s3_to_s3_through_faults_gives_the_bytes_of_the_local_run(
    s3: Faults, config: Config, tmp_path: Path
) -> None:
    s3.next(*ERRORS, "truncate", "reset midway", times=6, name="/in/")
    report = prepare(config())
    assert s3.faulted == 6
    assert fetched(config().out, tmp_path) == local_bytes(config, tmp_path)
    assert report.splits["train"].path == f"{config().out}/train"
    assert list((tmp_path / "scratch").iterdir()) == []
    assert prepare(config()).already_done
    with pytest.raises(InputError, match="other inputs or with other settings"):
        prepare(config(seed=1))


def test_a_killed_remote_run_goes_on_and_its_dataset_json_comes_last(
    s3: Faults, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sent, left = storage.put_file, [], [5]

    class Killed(BaseException):
        pass

    def put_or_die(local: str, url: str) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        real(local, url)
        sent.append(url.removeprefix(config().out + "/"))

    monkeypatch.setattr(storage, "put_file", put_or_die)
    rounds = 0
    while True:
        try:
            prepare(config())
            break
        except Killed:
            rounds += 1
            left[0] = 9 + rounds
            assert "train/dataset.json" not in sent
    assert rounds >= 2
    assert sent[-1] == "train/dataset.json"
    shards = [name for name in sent if name.endswith(".tar")]
    assert len(shards) == len(set(shards))  # none is made and sent twice
    assert fetched(config().out, tmp_path) == local_bytes(config, tmp_path)


def test_a_place_that_takes_no_files_is_found_before_the_work(
    s3: Faults, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gather, "gather_cells", lambda *_: pytest.fail("worked"))
    with pytest.raises(InputError, match="no-such-bucket"):
        prepare(config(out="s3://no-such-bucket/x"))
    assert not list((tmp_path / "scratch").glob("*"))


def test_bad_input_leaves_nothing_here_and_the_place_can_be_used_again(
    s3: Faults, config: Config, tmp_path: Path
) -> None:
    good = storage.read_bytes(f"{config().inputs[0]}/a.jsonl")
    for content, works in ((good + b"{\n", False), (good, True)):
        (tmp_path / "x").write_bytes(content)
        storage.put_file(str(tmp_path / "x"), f"{config().inputs[0]}/a.jsonl")
        if works:
            assert prepare(config()).n_kept == 300
        else:
            with pytest.raises(InputError, match=r"s3://.*a\.jsonl: byte \d+: not a JSON value"):
                prepare(config())
        assert not list((tmp_path / "scratch").glob("*"))


def test_a_remote_folder_with_other_files_is_not_touched(
    s3: Faults, config: Config, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    storage.put_file(str(tmp_path / "thesis.tex"), f"{config().out}/thesis.tex")
    with pytest.raises(InputError, match=r"not empty \(it holds thesis\.tex\)"):
        prepare(config())
    with pytest.raises(InputError, match="the out folder lies in the input folder"):
        prepare(config(out=f"{config().inputs[0]}/out"))
