"""Sinks beside metrics.jsonl: what arrives, and that no server and no disk is waited for."""

from __future__ import annotations

import errno
import http.server
import importlib
import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite import config, telemetry, wandb_process, wandb_sink
from openlm_lite.config import ConfigError
from openlm_lite.errors import InputError
from openlm_lite.telemetry import Feeder, Telemetry, TelemetryConfig, TensorBoardSink
from openlm_lite.wandb_sink import WandbConfig, WandbProcess, WandbSink
from tests.train_server import alive

KEY = "0123456789" * 4
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="no wandb")


def records(first: int, last: int) -> list[dict[str, Any]]:
    return [{"step": s, "tokens": 10 * s, "train/loss": 1 / s} for s in range(first, last + 1)]


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def telemetry_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("telemetry")}


def wandb_of(sinks: Telemetry) -> WandbSink:
    sink = sinks._feeders[0].sink
    assert isinstance(sink, WandbSink)
    return sink


def wait_until_passed_on(sinks: Telemetry) -> None:
    wait_until(lambda: all(f.queue.empty() or not f.is_alive() for f in sinks._feeders))


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home without keys; after the test no thread and no child process is left."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(telemetry.logger, "propagate", True)
    handlers = {n: signal.getsignal(n) for n in signal.valid_signals()}
    hooks = sys.excepthook, sys.exit
    environment = set(os.environ)
    threads = telemetry_threads()
    children = set(wandb_process.descendants(os.getpid()))
    yield
    wait_until(lambda: not telemetry_threads() - threads)  # what was killed takes its time to go
    wait_until(lambda: set(filter(alive, wandb_process.descendants(os.getpid()))) <= children)
    assert {n: signal.getsignal(n) for n in signal.valid_signals()} == handlers
    assert (sys.excepthook, sys.exit) == hooks
    assert "WANDB_SERVICE" not in set(os.environ) - environment


class Server(http.server.ThreadingHTTPServer):
    """As much of a W&B server as a run needs. `mode`: ok; 500 to everything; or no answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = "ok"
        self.given_up = threading.Event()
        self.lines: dict[str, dict[int, Any]] = {}  # of each file, by number
        self.opened: list[dict[str, Any]] = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def history(self) -> list[dict[str, Any]]:
        lines = self.lines.get("wandb-history.jsonl", {})
        return [lines[n] for n in sorted(lines)]

    def bucket(self) -> dict[str, Any] | None:
        """What the server knows of the run, asked for by one that resumes."""
        if not self.history:
            return None
        last = {"_step": self.history[-1]["_step"], "_runtime": 1.0}
        tail = json.dumps([json.dumps(last)])
        return {
            "id": "cnVu",
            "name": self.opened[0]["name"],
            "displayName": "n",
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(last),
            "config": "{}",
            "wandbConfig": json.dumps({"t": 1}),
            "tags": [],
        }

    def stop(self) -> None:
        self.given_up.set()
        self.shutdown()
        self.server_close()
        self.thread.join()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.server.mode == "hang":
            self.server.given_up.wait()
            self.close_connection = True
            return
        reply, code = b"{}", 500
        if self.server.mode == "ok":
            reply, code = json.dumps(self.answer(json.loads(body or b"{}"))).encode(), 200
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_PUT = do_POST

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "e", "name": "me"}
        project = {"id": "p", "name": "p", "entity": entity}
        variables = asked.get("variables", {})
        if "files" in asked or "complete" in asked:
            for name, chunk in (asked.get("files") or {}).items():
                lines = self.server.lines.setdefault(name, {})
                for i, line in enumerate(chunk["content"], chunk["offset"]):
                    lines[i] = json.loads(line)
            return {"exitcode": None, "limits": {}}
        match asked.get("operationName"):
            case "RunResumeStatus":
                return {"data": {"model": project | {"bucket": self.server.bucket()}}}
            case "UpsertBucket":
                self.server.opened.append(variables)
                run = {"id": "cnVu", "name": variables["name"], "displayName": "n", "config": "{}"}
                run |= {"project": project, "historyLineCount": len(self.server.history)}
                return {"data": {"upsertBucket": {"bucket": run, "inserted": True}}}
            case operation:
                return {"data": None, "errors": [{"message": f"unknown {operation}"}]}

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    server.stop()


def start(folder: Path, resume_step: int = -1, **wandb: Any) -> Telemetry:
    cfg = TelemetryConfig(wandb=WandbConfig(project="p", **wandb))
    return Telemetry(cfg, folder, "a-run", {"optim": {"lr": 0.1}}, resume_step)


def scan(folder: Path) -> Iterator[Any]:
    """The messages in a run's `.wandb` file: a log of 32 KiB blocks, as LevelDB's.

    7 bytes W&B's header, then fragments: crc u32, length u16, kind u8 (1 whole, 2 first, 3
    middle, 4 last).
    """
    message = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    (path,) = folder.glob("*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert at + 7 + length <= len(data), "cut off"
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield message.FromString(whole)
            whole = b""


def kept(folder: Path) -> list[dict[str, Any]]:
    """The records that a run's `.wandb` file holds."""
    rows = [m.history.item for m in scan(folder) if m.HasField("history")]
    return [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in row} for row in rows]


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


def offline_folders(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


# --- configuration


def decode(text: dict[str, Any]) -> TelemetryConfig:
    def tree(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: tree(v) for k, v in node.items()}
        return config.Value(node, "recipe.yaml")

    return config.decode(TelemetryConfig, tree(text))


def test_nothing_is_the_default_and_starts_nothing(tmp_path: Path) -> None:
    cfg = decode({})
    telemetry.check(cfg)
    sinks = Telemetry(cfg, tmp_path, "r", {}, -1)
    sinks.record(records(1, 1)[0])
    sinks.close()
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_sets_every_field() -> None:
    cfg = decode({"wandb": {"project": "p", "tags": ["a", "b"], "mode": "offline"}})
    assert cfg.wandb == WandbConfig(project="p", tags=("a", "b"), mode="offline")


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"group": "g"}, "log.wandb.group has no effect without log.wandb.project"),
        ({"project": " "}, "log.wandb.project = ' '"),
        ({"project": "p", "init_timeout_seconds": 0}, "init_timeout_seconds = 0.0"),
        ({"project": "p", "mode": "ofline"}, "did you mean offline"),
        ({"project": "p", "tag": ["a"]}, "did you mean wandb.tags"),
    ],
)
def test_bad_settings_are_named(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        decode({"wandb": given_})


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_an_absent_package_is_one_error_with_the_install_line(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sink, "find_spec", lambda name: None)
    cfg = TelemetryConfig(
        wandb=WandbConfig(project="p" if package == "wandb" else None),
        tensorboard=package == "tensorboard",
    )
    with pytest.raises(InputError, match=rf'pip install "openlm-lite\[{package}\]"'):
        telemetry.check(cfg)


def test_a_folder_of_that_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("no_such_package") is not None
    assert not wandb_sink.is_installed("no_such_package")


@needs_wandb
def test_no_key_is_one_error_that_says_what_to_do() -> None:
    online = TelemetryConfig(wandb=WandbConfig(project="p"))
    with pytest.raises(InputError, match=r"no API key.*`wandb login`.*WANDB_API_KEY.*mode=offline"):
        telemetry.check(online)
    telemetry.check(TelemetryConfig(wandb=WandbConfig(project="p", mode="offline")))


@needs_wandb
@pytest.mark.slow
def test_a_key_that_cannot_be_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(InputError, match="API key must have"):
        telemetry.check(TelemetryConfig(wandb=WandbConfig(project="p")))


@needs_wandb
@pytest.mark.slow
def test_a_key_is_found_without_asking_the_server(server: Server) -> None:
    server.mode = "hang"
    started = time.monotonic()
    telemetry.check(TelemetryConfig(wandb=WandbConfig(project="p")))
    assert time.monotonic() - started < 28  # who asks it waits for 30


# --- the queue


class Toy:
    """A sink that does what a test wants."""

    name = "toy"

    def __init__(self, write: Callable[[dict[str, Any]], object]) -> None:
        self.write_ = write
        self.seen: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.killed = threading.Event()

    def open(self, closing: threading.Event) -> None:
        self.calls.append("open")

    def write(self, record: dict[str, Any]) -> None:
        self.write_(record)
        self.seen.append(record)

    def close(self) -> None:
        self.calls.append("close")

    def release(self) -> None:
        self.calls.append("release")

    def kill(self) -> None:
        self.killed.set()


def feeding(*toys: Toy) -> Telemetry:
    sinks = Telemetry(TelemetryConfig(), Path(), "r", {}, -1)
    sinks._feeders = [Feeder(toy) for toy in toys]
    for feeder in sinks._feeders:
        feeder.start()
    return sinks


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 30))
def test_each_sink_gets_all_records_in_order_until_its_own_error(
    values: list[int], fails_at: int
) -> None:
    def fail(record: dict[str, Any]) -> None:
        if record["step"] == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    whole, failing = Toy(lambda _: None), Toy(fail)
    sinks = feeding(whole, failing)
    given_records = [{"step": i, "x": x} for i, x in enumerate(values)]
    for record in given_records:
        sinks.record(record)
    sinks.close()
    assert whole.seen == given_records and whole.calls == ["open", "close", "release"]
    assert failing.seen == given_records[:fails_at]
    assert failing.calls[-1] == "release"


def test_an_error_turns_a_sink_off_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fail(record: dict[str, Any]) -> None:
        raise RuntimeError("broken")

    toy = Toy(fail)
    sinks = feeding(toy)
    for record in records(1, 100):
        sinks.record(record)
    sinks.close()
    assert [r.getMessage() for r in caplog.records] == [
        "toy: turned off: broken (metrics.jsonl has all records)"
    ]


def test_a_full_queue_drops_and_counts_and_never_waits(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "QUEUE_RECORDS", 10)
    go_on, arrived = threading.Event(), threading.Event()

    def wait(record: dict[str, Any]) -> None:
        arrived.set()
        go_on.wait()

    toy = Toy(wait)
    sinks = feeding(toy)
    sinks.record({"step": 0})
    arrived.wait()
    for record in records(1, 110):
        sinks.record(record)
    assert sinks.dropped == 100
    go_on.set()
    sinks.close()
    assert [r["step"] for r in toy.seen] == list(range(11))
    assert [r.getMessage() for r in caplog.records] == [
        "toy: too slow, some records are left out (metrics.jsonl has all)",
        "toy: 100 records were left out",
    ]


def test_a_sink_that_hangs_is_left_after_the_time_of_close(
    caplog: pytest.LogCaptureFixture,
) -> None:
    toy = Toy(lambda _: toy.killed.wait())
    sinks = feeding(toy)
    sinks.record({"step": 1})
    started = time.monotonic()
    sinks.close(0.2)
    assert 0.2 <= time.monotonic() - started < 5
    assert [r.getMessage() for r in caplog.records] == [
        "toy: not finished in time, and left so (metrics.jsonl has all records)"
    ]


def test_signals_are_for_the_main_thread() -> None:
    masks: list[set[signal.Signals | int]] = []
    toy = Toy(lambda _: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    sinks = feeding(toy)
    sinks.record({"step": 1})
    sinks.close()
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} <= masks[0]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & masks[0]


# --- TensorBoard


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) by tag."""
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    cfg = TelemetryConfig(tensorboard=True)
    telemetry.check(cfg)
    for first, resume_step in ((1, -1), (4, 3)):
        sinks = Telemetry(cfg, tmp_path, "r", {}, resume_step)
        for record in records(first, first + 5):
            sinks.record(record | {"train/loss": float(first)})
        sinks.record({"step": first + 5, "tokens": 0, "val/toy/loss": 2.0})
        sinks.close()
    shown = read_tensorboard(tmp_path / "tensorboard")
    assert shown["train/loss"] == [(s, 1.0) for s in (1, 2, 3)] + [(s, 4.0) for s in range(4, 10)]
    assert shown["val/toy/loss"] == [(9, 2.0)]


def test_tensorboard_forgets_the_steps_that_a_run_went_back_over(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    sinks = Telemetry(TelemetryConfig(tensorboard=True), tmp_path, "r", {}, -1)
    for record in [*records(1, 6), *records(4, 5)]:
        sinks.record(record)
    sinks.close()
    shown = read_tensorboard(tmp_path / "tensorboard")
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4, 5]


def test_a_full_disk_turns_tensorboard_off_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    real = Path.open

    def open_full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "tfevents" in path.name:
            return real(Path("/dev/full"), "wb", *args, **kwargs)
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    sinks = Telemetry(TelemetryConfig(tensorboard=True), tmp_path, "r", {}, -1)
    for record in records(1, 50):
        sinks.record(record)
    sinks.close()
    (warning,) = [r.getMessage() for r in caplog.records]
    assert warning.startswith("tensorboard: turned off: [Errno 28]")


def test_a_folder_that_cannot_be_made_turns_tensorboard_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    sinks = Telemetry(TelemetryConfig(tensorboard=True), tmp_path, "r", {}, -1)
    sinks.close()
    assert "tensorboard: turned off" in caplog.text
    assert TensorBoardSink(tmp_path, -1).kill() is None


# --- Weights & Biases


@needs_wandb
def test_an_offline_run_holds_the_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sinks = start(tmp_path, mode="offline", name="n", group="g", tags=("t",))
    for record in records(1, 50):
        sinks.record(record)
    wait_until_passed_on(sinks)
    assert "wandb" not in sys.modules or importlib.util.find_spec("wandb") is None
    sinks.close(30)
    (folder,) = offline_folders(tmp_path)
    assert without_clock(kept(folder)) == records(1, 50)
    assert folder.name.endswith((tmp_path / "wandb_id").read_text().strip())
    (run,) = [m.run for m in scan(folder) if m.HasField("run")]
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("p", "n", "g", ["t"])
    sent = {i.key: json.loads(i.value_json) for i in run.config.update}
    assert sent["optim"] == {"lr": 0.1}
    assert not caplog.records


@needs_wandb
@pytest.mark.slow
@pytest.mark.fault
def test_a_resumed_run_goes_on_under_its_id_online(tmp_path: Path, server: Server) -> None:
    for first, resume_step in ((1, -1), (4, 3)):
        sinks = start(tmp_path, resume_step)
        for record in records(first, first + 5):
            sinks.record(record)
        wait_until_passed_on(sinks)
        sinks.close(30)
    assert without_clock(server.history) == [*records(1, 6), *records(4, 9)]
    assert [row["_step"] for row in server.history] == list(range(12))
    assert {o["name"] for o in server.opened} == {(tmp_path / "wandb_id").read_text().strip()}


@needs_wandb
@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("fault", ["refused", "hang", "500"])
def test_a_server_that_is_not_there_at_the_start_leaves_a_folder_to_sync(
    fault: str,
    tmp_path: Path,
    server: Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = os.environ["WANDB_BASE_URL"]
    server.mode = fault
    if fault == "refused":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    sinks = start(tmp_path, init_timeout_seconds=3)
    for record in records(1, 1000):
        sinks.record(record)
    assert time.monotonic() - started < 2.5  # whoever waits for the server waits for 3
    wait_until_passed_on(sinks)
    sinks.close(30)
    (warning,) = [r.getMessage() for r in caplog.records]
    (folder,) = offline_folders(tmp_path)
    command = warning.split("kept for: ")[1].split()
    assert command[:3] == ["wandb", "sync", "--id"] and command[4:] == [str(folder)]
    assert without_clock(kept(folder)) == records(1, 1000)

    server.mode = "ok"  # later, by hand
    monkeypatch.setenv("WANDB_BASE_URL", url)
    done = subprocess.run(  # wandb writes logs where it is called
        [sys.executable, "-m", *command], capture_output=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert without_clock(server.history) == records(1, 1000)


@needs_wandb
@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("fault", ["hang", "500"])
def test_a_server_that_goes_away_in_the_middle_delays_neither_steps_nor_the_end(
    fault: str, tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = start(tmp_path)
    for record in records(1, 10):
        sinks.record(record)
    wait_until_passed_on(sinks)
    server.mode = fault
    started = time.monotonic()
    for record in records(11, 1000):
        sinks.record(record)
    assert time.monotonic() - started < 2.5
    wait_until_passed_on(sinks)
    started = time.monotonic()
    sinks.close(90)  # it ends by itself, in the usual 5 on a quiet machine
    assert time.monotonic() - started < 60
    (warning,) = [r.getMessage() for r in caplog.records]
    (folder,) = (tmp_path / "wandb").glob("run-*")
    assert warning.startswith("wandb: turned off: ") and f"wandb sync {folder}" in warning
    assert without_clock(kept(folder)) == records(1, 1000)


@needs_wandb
@pytest.mark.slow
@pytest.mark.fault
def test_a_run_that_ends_before_a_hanging_server_answers_still_leaves_a_folder(
    tmp_path: Path, server: Server
) -> None:
    server.mode = "hang"
    sinks = start(tmp_path)
    for record in records(1, 10):
        sinks.record(record)
    started = time.monotonic()
    sinks.close(90)  # the usual 5 are enough on a quiet machine
    assert time.monotonic() - started < 60
    (folder,) = offline_folders(tmp_path)
    assert without_clock(kept(folder)) == records(1, 10)


@needs_wandb
@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("victim", ["process", "service"])
def test_a_killed_wandb_turns_itself_off_with_one_warning(
    victim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = start(tmp_path, mode="offline")
    sinks.record(records(1, 1)[0])
    wait_until(lambda: offline_folders(tmp_path))
    wait_until_passed_on(sinks)
    process = wandb_of(sinks).process
    assert process is not None
    (service, *_) = wandb_process.descendants(process.popen.pid)
    os.kill(process.popen.pid if victim == "process" else service, signal.SIGKILL)
    for record in records(2, 200):
        sinks.record(record)
    sinks.close()
    assert len(caplog.records) == 1, caplog.text
    assert caplog.records[0].getMessage().startswith("wandb: ")
    wait_until(lambda: not alive(service))


@needs_wandb
@pytest.mark.slow
@pytest.mark.fault
def test_a_stopped_wandb_delays_the_end_by_the_time_of_close_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = start(tmp_path, mode="offline")
    wait_until(lambda: offline_folders(tmp_path))
    process = wandb_of(sinks).process
    assert process is not None
    os.kill(process.popen.pid, signal.SIGSTOP)
    for record in records(1, 2000):
        sinks.record(record)
    started = time.monotonic()
    sinks.close(0.5)
    assert time.monotonic() - started < 30 < wandb_sink.ANSWER_SECONDS
    assert "not finished in time" in caplog.text


TRAINING = """
import sys, time
from pathlib import Path
from openlm_lite.telemetry import Telemetry, TelemetryConfig
from openlm_lite.wandb_sink import WandbConfig
cfg = TelemetryConfig(wandb=WandbConfig(project="p", mode=sys.argv[2]))
sinks = Telemetry(cfg, Path(sys.argv[1]), "r", {}, -1)
for step in range(1, 21):
    sinks.record({"step": step, "tokens": step})
while not sinks._feeders[0].queue.empty():
    time.sleep(0.05)
print(sinks._feeders[0].sink.process.popen.pid, flush=True)
time.sleep(600)
"""


@needs_wandb
@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("fault", ["none", "hang"])
def test_nothing_is_left_of_wandb_after_a_killed_run(
    fault: str, tmp_path: Path, server: Server
) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path), "online" if fault == "hang" else "offline"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    child = int(run.stdout.readline())
    left = [child, *wandb_process.descendants(child)]
    assert len(left) > 1
    # a terminal and a scheduler signal groups of processes: these are of none of the run's
    assert os.getpgid(run.pid) not in {os.getpgid(pid) for pid in left}
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGINT)
    server.mode = fault
    time.sleep(1)
    try:
        assert all(map(alive, left))
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
    wait_until(lambda: not any(map(alive, left)), 30)


@needs_wandb
@pytest.mark.slow
def test_a_terminal_is_never_asked(tmp_path: Path) -> None:
    """Without a key, on a terminal, wandb offers a menu and waits; its process has none."""
    master, slave = os.openpty()
    code = "from openlm_lite.wandb_sink import *; check_wandb(WandbConfig(project='p'))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdin=slave,
            stdout=slave,
            stderr=subprocess.PIPE,
            start_new_session=True,
            timeout=60,
        )
        os.set_blocking(master, False)
        with pytest.raises(BlockingIOError):
            os.read(master, 1)
    finally:
        os.close(master)
        os.close(slave)
    assert b"InputError" in done.stderr and b"no API key" in done.stderr


@needs_wandb
def test_an_answer_that_is_an_error_is_told_from_none() -> None:
    process = WandbProcess()
    try:
        with pytest.raises(wandb_sink.AnswerError, match="TypeError"):
            process.ask({"open": {"nonsense": 1}}, 60)
        with pytest.raises(TimeoutError):
            process.ask({"login": True}, 0)
    finally:
        process.release()
