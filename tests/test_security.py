"""Whole runs: no secret of the environment or of a URL is written anywhere, and nothing is written
that anybody may change.

What is a credential: test_redact.py. Hostile content: test_hostile_files.py,
test_hostile_models.py. Names that become paths: test_paths.py. What the source may not hold:
test_source_constructions.py.
"""

from __future__ import annotations

import http.server
import json
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from openlm_lite import cli, config, log, remote
from openlm_lite.run import load_run
from tests.train_server import TrainServer

SECRETS = {
    "HF_TOKEN": "hf_canary",
    "AWS_ACCESS_KEY_ID": "AKIA-canary",
    "AWS_SECRET_ACCESS_KEY": "ab/canary+cd=",
    "AWS_SESSION_TOKEN": "canary session",
    "WANDB_API_KEY": "0123canary4567",
    "DB_PASSWORD": "canary\nsecond canary line",
}


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield


def check_files(folder: Path, at_least: int = 0) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= at_least
    assert [str(path) for path in files if b"canary" in path.read_bytes()] == []


class Gossip(http.server.BaseHTTPRequestHandler):
    """Sends on to a presigned URL, and there repeats everything that it was told."""

    def do_GET(self) -> None:
        if "Signature" not in self.path and not self.path.startswith("/bucket"):
            self.send_response(302)
            self.send_header("Location", f"{self.path}?X-Amz-Signature=canary&X-Amz-Date=1")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        told = f"{self.path} {dict(self.headers)} {SECRETS}".replace("&", "&amp;")
        body = f"<Error><Code>AccessDenied</Code><Message>{told}</Message></Error>".encode()
        self.send_response(403, "Forbidden for canary?sig=canary")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def gossip() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gossip) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


# --- secrets -------------------------------------------------------------------------------------


@pytest.fixture
def verb(
    environment: None,
    gossip: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """verb(code, word, …): runs it, compares the exit code; what it said, without any secret."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gossip}")
    monkeypatch.setattr(remote, "_filesystems", {})  # those of other tests have other servers

    def run(code: int, *words: str) -> str:
        assert cli.main(words) == code, words
        said = "".join(capfd.readouterr())
        assert "canary" not in said
        return said

    return run


def test_a_run_that_ends_well_writes_no_secret(
    verb: Callable[..., str], toy_recipe: Path, tmp_path: Path
) -> None:
    verb(0, "train", str(toy_recipe), f"run.dir={tmp_path / 'run'}", "total_steps=8")
    verb(0, "inspect", str(tmp_path / "run"))
    check_files(tmp_path, at_least=10)


@pytest.mark.slow
def test_ranks_write_no_secret(environment: None, toy_recipe: Path, tmp_path: Path) -> None:
    words = [str(toy_recipe), "total_steps=8", f"run.dir={tmp_path / 'run'}"]
    with TrainServer() as server:  # started in this environment
        run = partial(server.train, *words, world=2, log=tmp_path / "said")
        assert cli.BAD_INPUT in run("data.train='https://me:canary@h/x'")["codes"]
        assert run()["codes"] == [0, 0]
    check_files(tmp_path, at_least=10)


CANNOT_START = {
    "data.train='https://me:canary@127.0.0.1:9/x'": "https://***@127.0.0.1:9/x",
    "data.train='https://h/x?X-Amz-Signature=canary'": "the parameter X-Amz-Signature",
    "data.val.x='s3://AKIA:can/canary@bucket/x'": "a login",
    "data.cache_dir=/tmp/0123canary4567/x": "variable WANDB_API_KEY",
    "model.init_from='https://me:canary@h/x'": "a login",
    "run.dir='s3://me:canary@bucket/x'": "a login",
    "optim.password=canary": "optim.password: no such field",
    "data.seq_len='https://me:canary@h/x'": "expected a whole number, got",
    "data.train=s3://bucket/x": "s3://bucket/x",
    "data.train=http://127.0.0.1:PORT/x": "/x/dataset.json: not allowed",
    "data.train=/nothing/there": "no such dataset folder",
    "recipe?password=canary": "no such field",
}


@pytest.mark.parametrize("word", CANNOT_START)
def test_a_run_that_cannot_start_tells_and_writes_no_secret(
    word: str, verb: Callable[..., str], gossip: int, toy_recipe: Path, tmp_path: Path
) -> None:
    words = [str(toy_recipe), f"run.dir={tmp_path / 'run'}", word.replace("PORT", str(gossip))]
    assert CANNOT_START[word] in verb(cli.BAD_INPUT, "train", *words)
    check_files(tmp_path)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_words_that_no_verb_knows_are_told_without_secrets(
    environment: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "x.yaml", "--password=canary", SECRETS["HF_TOKEN"]])
    said = "".join(capfd.readouterr())
    assert "unrecognized arguments: --password=***" in said and "canary" not in said


@pytest.mark.parametrize("how", ["unexpected", "run"])
def test_a_run_that_fails_on_the_way_tells_and_writes_no_secret(
    how: str,
    verb: Callable[..., str],
    toy_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from openlm_lite import train
    from openlm_lite.errors import RunError

    told = f"GET https://me:canary@h/x?sig=canary {os.environ['HF_TOKEN']} {dict(os.environ)!r}"

    def fail(*_: Any, **__: Any) -> Any:
        log.logger.warning("before: %s", told)
        raise (RunError if how == "run" else ValueError)(told)

    monkeypatch.setattr(train, "forward_backward", fail)
    said = verb(cli.FAILED, "train", str(toy_recipe), f"run.dir={tmp_path / 'run'}")
    assert "GET https://***@h/x?sig=***" in said
    assert ("Traceback" in said) == (how == "unexpected")
    kept = (tmp_path / "run" / "log.txt").read_text()
    assert "before: GET https://***@h/x" in kept and "ended by" in kept
    check_files(tmp_path, at_least=3)


def write_text(path: Path) -> None:
    """JSON lines of words that pairs can be found in; lines 4 and 5 are bad, and tell secrets."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(80)]
    rows: list[dict[str, Any]] = [{"text": " ".join(rng.choices(words, k=60))} for _ in range(200)]
    rows[3:5] = [{"hf_canary": "x"}, {"text": 5, "url": "https://me:canary@h/x"}]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_prepare_tells_and_writes_no_secret(
    verb: Callable[..., str], gossip: int, tmp_path: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_text(source / "a.jsonl")
    write_text(source / "b.jsonl")
    more = ["--train-tokenizer", "280", "--block-tokens", "64", "--workers", "2"]
    skipped = ["--on-bad-document", "skip", "--val-fraction", "0.1"]
    verb(0, "prepare", str(source), "--out", f"{out}/good", *more, *skipped)
    for number, words in enumerate(
        (
            [str(source)],  # the bad document
            [f"http://127.0.0.1:{gossip}/x.jsonl"],
            ["https://me:canary@h/x.jsonl"],
            ["https://h/x.jsonl?X-Goog-Signature=canary"],
            [str(source), "--text-field", SECRETS["HF_TOKEN"]],
            [str(source), "--decontaminate", "https://canary@h/x"],
            [str(source), "--eot", SECRETS["WANDB_API_KEY"]],
            [str(source), "--out", "s3://me:canary@bucket/x"],
            [str(source), "--out", "https://h/x?sig=canary"],
        )
    ):
        said = verb(cli.BAD_INPUT, "prepare", "--out", f"{out}/{number}", *words, *more)
        assert said.count("openlm: ") == 1
    report = (out / "good" / "report.json").read_text()
    assert "bad_field" in report and "it has ['***']" in report
    check_files(out, at_least=6)


def test_a_config_is_read_back_as_it_was_meant(toy_recipe: Path, tmp_path: Path) -> None:
    """Nothing in it is masked: what would have to be is refused before."""
    words = [f"run.dir={tmp_path}/a?b=c@d", "data.val.x=s3://bucket/key=1/x@y"]
    cfg = load_run(str(toy_recipe), words)
    path = tmp_path / "config.yaml"
    path.write_text(config.dump_yaml(cfg))
    assert load_run(str(path)) == cfg


# --- file modes ----------------------------------------------------------------------------------


def writable_by_anybody(folder: Path) -> list[str]:
    paths = [folder, *folder.rglob("*")]
    return [str(p) for p in paths if not p.is_symlink() and p.stat().st_mode & stat.S_IWOTH]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (0o000, 0o002),
        pytest.param(0o022, 0o022, marks=SLOW),
        pytest.param(0o077, 0o077, marks=SLOW),
    ],
)
def test_nothing_that_is_written_may_be_changed_by_anybody(
    before: int, after: int, toy_recipe: Path, tmp_path: Path
) -> None:
    """Whatever the umask, which is never widened."""
    root = tmp_path / "made"
    run = root / "inner" / "run"
    root.mkdir(mode=0o755)
    write_text(tmp_path / "a.jsonl")
    prepare = f"prepare {tmp_path}/a.jsonl --out {root}/data --scratch {root}/scratch --workers 2 "
    verbs = [
        prepare + "--train-tokenizer 280 --block-tokens 64 --on-bad-document skip",
        f"train {toy_recipe} run.dir={run} total_steps=8",
        f"config {toy_recipe} --schedule {root}/schedule.csv",
        f"export {run} {root}/hf",
        f"import {root}/hf {root}/imported",
        f"plot {run}",
    ]
    old = os.umask(before)
    try:
        for words in map(str.split, verbs):
            if words[0] in ("export", "import"):
                pytest.importorskip("transformers")
            if words[0] == "plot":
                pytest.importorskip("matplotlib")
            assert cli.main(words) == 0, words
            os.umask(mask := os.umask(0))
            assert mask == after
    finally:
        os.umask(old)
        assert writable_by_anybody(root) == []
    if before == 0o077:
        assert [p for p in root.rglob("*") if p.stat().st_mode & 0o077] == []
    assert len(list(root.rglob("*"))) > 25
