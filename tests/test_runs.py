"""`openlm runs`: every run is shown as far as its files go, in the state that they tell of."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openlm_lite import history, runs
from openlm_lite.cli import main
from openlm_lite.recorded import read_run
from openlm_lite.run_folder import take_lock
from tests.recorded_run import CONFIG, step_record, write_run
from tests.run_faults import fault
from tests.train_server import ROOT, TrainServer

LAUNCHED = {"event": "launched"}
START = {"event": "start", "step": 0}
KILLED = "killed, or its machine went down; the same command resumes"


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in runs.table(str(folder))["runs"]}


def row_of(folder: Path) -> dict[str, Any]:
    return runs.row_of(read_run(folder, all_records=False), folder)


# --- states --------------------------------------------------------------------------------------


def test_a_run_is_running_while_its_lock_is_held_and_the_look_does_not_take_it(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "a", events=({**START},))
    with take_lock(folder, "run.dir"):
        assert row_of(folder)["state"] == "running"
        assert row_of(folder)["state"] == "running"  # looked at twice, at once or not
    assert row_of(folder)["state"] == "stopped"
    take_lock(folder, "run.dir").close()


def test_a_run_can_start_while_somebody_looks_at_its_lock(tmp_path: Path) -> None:
    import fcntl

    folder = write_run(tmp_path / "a")
    with (folder / "lock").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.05, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        take_lock(folder, "run.dir").close()


@pytest.mark.parametrize(
    ("events", "state", "why"),
    [
        ([START], "stopped", KILLED),
        ([START, {"event": "saved", "step": 4}], "stopped", KILLED),
        ([START, {"event": "done", "step": 12}], "done", ""),
        ([START, {"event": "stopped", "step": 3}], "stopped", "on request; the same command"),
        ([START, {"event": "failed", "error": "RunError: disk full"}], "failed", "disk full"),
        ([START, {"event": "failed", "error": "x"}, START], "stopped", KILLED),
        ([START, {"event": "failed", "error": "x"}, START, {"event": "done"}], "done", ""),
        ([START, {"event": "failed"}], "failed", "no reason was written down"),
        ([START, {"event": "stopped"}, LAUNCHED, {"event": "failed", "error": "x"}], "failed", "x"),
        ([START, {"event": "failed", "error": "x"}, LAUNCHED], "stopped", KILLED),
        ([LAUNCHED, START, {"event": "done"}, LAUNCHED], "stopped", KILLED),
        ([LAUNCHED, START, {"event": "done"}, LAUNCHED, START, {"event": "done"}], "done", ""),
        ([], "stopped", KILLED),  # of a version that wrote no events
    ],
)
def test_the_last_start_decides_on_the_state(
    tmp_path: Path, events: list[dict[str, Any]], state: str, why: str
) -> None:
    row = row_of(write_run(tmp_path / "a", events=tuple(events)))
    assert row["state"] == state and why in row["why"], row


def test_a_run_without_events_is_done_with_a_checkpoint_of_its_last_step(tmp_path: Path) -> None:
    assert row_of(write_run(tmp_path / "a", 12, checkpoint=12))["state"] == "done"
    row = row_of(write_run(tmp_path / "b", 12, checkpoint=8))
    assert (row["state"], row["checkpoint_step"], row["why"]) == ("stopped", 8, KILLED)


def test_stopped_json_says_stopped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "stopped.json").write_text("{}")
    assert row_of(folder)["why"] == "on request; the same command resumes"


def test_real_runs_are_shown_as_running_killed_failed_and_done(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    seen = set()

    def train(name: str, *words: str, **more: Any) -> None:
        train_server.train(str(toy_recipe), f"run.dir={tmp_path}/{name}", *words, **more)

    thread = threading.Thread(target=train, args=("ran", "total_steps=40"))
    thread.start()
    while thread.is_alive():
        if (tmp_path / "ran" / "metrics.jsonl").is_file():
            seen.add(row_of(tmp_path / "ran")["state"])
        time.sleep(0.01)
    thread.join()
    train("killed", kill=(0, 30))
    train("failed", "optim.lr=1e30")
    train("asked", signals=[(0.0, 0, "SIGTERM")])
    train("killed at its load", signals=[(0.0, 0, "SIGTERM")])
    train("killed at its load", faults=[fault("SIGKILL", 0, "load")])
    rows = rows_of(tmp_path)
    assert "running" in seen
    assert {name: row["state"] for name, row in rows.items()} == {
        "ran": "done",
        "killed": "stopped",
        "failed": "failed",
        "asked": "stopped",
        "killed at its load": "stopped",
    }
    assert rows["ran"]["checkpoint_step"] == rows["ran"]["step"] == 40
    assert rows["killed"]["why"] == rows["killed at its load"]["why"] == KILLED
    assert rows["asked"]["why"].startswith("on request")
    assert "NonFiniteError" in rows["failed"]["why"]
    events = [e["event"] for e in read_run(tmp_path / "ran", all_records=False).events]
    assert events[:2] == ["launched", "start"] and events[-1] == "done"
    assert events.count("saved") >= 9
    resumed = read_run(tmp_path / "killed at its load", all_records=False).events
    times = [event["time"] for event in resumed]
    assert times == sorted(times) and 0 <= time.time() - times[0] < 3600


def test_events_are_only_added_to_while_metrics_are_cut_back(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    words = [str(toy_recipe), f"run.dir={tmp_path}/r", "checkpoint.every_steps=5"]
    train_server.train(*words, faults=[fault("SIGKILL", 0, "step", 9)])
    events, metrics = tmp_path / "r" / "events.jsonl", tmp_path / "r" / "metrics.jsonl"
    before, trained = events.read_bytes(), metrics.read_bytes()
    assert trained.count(b"train/loss") == 8
    train_server.train(*words)
    assert events.read_bytes().startswith(before)
    assert not metrics.read_bytes().startswith(trained)  # the eighth step is trained again
    assert metrics.read_bytes().count(b"train/loss") == 12
    found = [json.loads(line)["event"] for line in events.read_bytes().splitlines()]
    assert [e for e in found if e in history.BEGINNINGS] == ["launched", "start"] * 2
    assert found[-2:] == ["saved", "done"]


def test_an_error_of_another_rank_is_in_its_own_log_on_the_console_and_in_the_events(
    train_server: TrainServer, toy_recipe: Path, tmp_path: Path
) -> None:
    said, run = tmp_path / "said.txt", tmp_path / "r"
    words = [str(toy_recipe), f"run.dir={run}"]
    train_server.train(*words, world=2, log=said, faults=[fault("error", 1, "step", 3)])
    message = "ended by ValueError: broken on purpose"
    assert message in (run / "log-rank1.txt").read_text() and message in said.read_text()
    assert message not in (run / "log.txt").read_text()
    failed = [e for e in read_run(run, all_records=False).events if e["event"] == "failed"]
    assert (failed[0]["rank"], failed[0]["error"]) == (1, "ValueError: broken on purpose")
    row = row_of(run)
    assert (row["state"], row["why"]) == ("failed", "ValueError: broken on purpose")


# --- damaged, half-written, foreign --------------------------------------------------------------


def test_a_last_line_that_a_kill_cut_off_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", 3)
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "tok')
    row = row_of(folder)
    assert row["step"] == 3
    assert row["notes"] == ["metrics.jsonl ends in the middle of a line, which is left out"]


def test_of_a_long_file_only_the_end_is_read_and_it_is_enough(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", 3000, config=CONFIG.replace("12", "4000"))
    row = row_of(folder)
    assert (row["step"], row["tokens"], row["notes"]) == (3000, 768_000, [])
    assert len(read_run(folder, all_records=False).records) < 1000


def test_a_run_that_validated_much_since_its_last_step_still_shows_it(tmp_path: Path) -> None:
    records = [step_record(i, **{"perf/tokens_per_second": 10.0 * i}) for i in range(1, 3001)]
    text = {"step": 3000, "tokens": 768_000, "sample/text": "x" * 2000}
    folder = write_run(tmp_path / "a", records=[*records[:-1], *[text] * 500, records[-1], text])
    assert (folder / "metrics.jsonl").stat().st_size > 1_800_000
    with (folder / "metrics.jsonl").open("a") as f:
        f.writelines(json.dumps(text) + "\n" for _ in range(100))
        f.write("no record\n")
    row = row_of(folder)
    assert (row["step"], row["loss"]) == (3000, records[-1]["train/loss"])
    assert row["tokens_per_second"] == 29905  # the median of the last 20 steps
    assert row["notes"] == ["metrics.jsonl: 1 line is no record, and left out"]


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (None, "config.yaml is missing"),
        ("a: [", "config.yaml cannot be read: "),
        ("- 1", "config.yaml holds a list, not a run's settings"),
        ("model: {}", "config.yaml: its sizes are not known ("),
        (CONFIG.replace("total_steps: 12", ""), "its sizes are not known (no 'total_tokens')"),
        (CONFIG.replace("total_steps: 12", "total_steps: many"), "its sizes are not known ("),
        (CONFIG.replace("d_ff: 64", "d_ff: 64, n_experts: 8"), "model.n_experts: of another ver"),
    ],
)
def test_a_config_that_is_not_understood_costs_only_what_it_says(
    tmp_path: Path, config: str | None, note: str
) -> None:
    row = row_of(write_run(tmp_path / "a", 3, config=config))
    assert row["step"] == 3 and row["loss"] is not None and row["state"] == "stopped"
    assert len(row["notes"]) == 1 and note in row["notes"][0]


def test_a_checkpoint_of_a_newer_version_is_named_and_the_one_before_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", 9, checkpoint=4)
    newer = folder / "checkpoints" / "step_00000008"
    newer.mkdir()
    text = (folder / "checkpoints" / "step_00000004" / "COMMIT.json").read_text()
    (newer / "COMMIT.json").write_text(sealed(text.replace('sion": 1', 'sion": 2')))
    (folder / "checkpoints" / "step_00000009").mkdir()
    row = row_of(folder)
    assert row["checkpoint_step"] == 4
    assert [note.split(":")[0] for note in row["notes"]] == ["step_00000009", "step_00000008"]
    assert "COMMIT.json is missing" in row["notes"][0] and "update openlm_lite" in row["notes"][1]


def sealed(text: str) -> str:
    """COMMIT.json with the checksum of what it says now."""
    from openlm_lite.commit import _sealed

    body = json.loads(text)
    body.pop("crc32")
    return _sealed(body)


def test_an_empty_folder_and_one_with_a_lock_alone_are_shown_as_such(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "lock").touch()
    rows = rows_of(tmp_path)
    assert rows["empty"]["state"] == "empty"
    assert rows["begun"]["state"] == "stopped"
    assert rows["begun"]["why"] == "ended before its first step"


def test_checkpoints_data_and_hidden_folders_are_no_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "ladder" / "one" / "a", checkpoint=4)
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "manifest.jsonl").touch()
    write_run(tmp_path / ".hidden" / "b")
    elsewhere = tmp_path / "elsewhere"  # a checkpoint.dir: locked, but nobody's run.dir
    (elsewhere / "step_00000004").mkdir(parents=True)
    (elsewhere / "lock").touch()
    assert list(rows_of(tmp_path)) == ["ladder/one/a"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["step", "tokens", "train/loss", "perf/tokens_per_second", "event", "time", "path", "error"]
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.dictionaries(KEYS, JSON).map(json.dumps) | st.text(max_size=20), max_size=5),
    events=st.lists(st.dictionaries(KEYS, JSON).map(json.dumps), max_size=4),
    config=st.binary(max_size=60) | st.dictionaries(st.text(), JSON).map(repr).map(str.encode),
)
def test_no_content_of_the_files_breaks_the_table(
    tmp_path: Path, lines: list[str], events: list[str], config: bytes
) -> None:
    folder = tmp_path / "a"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines), errors="replace")
    (folder / "events.jsonl").write_text("\n".join(events), errors="replace")
    (folder / "config.yaml").write_bytes(config)
    found = runs.table(str(tmp_path))
    json.dumps(found)
    text = runs.text_of(found)
    assert text.isprintable() or set(filter(lambda c: not c.isprintable(), text)) == {"\n"}


# --- the command ---------------------------------------------------------------------------------


def test_the_table_has_a_line_per_run_and_what_is_to_be_said_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", 12, events=(START, {"event": "done"}), checkpoint=12)
    write_run(tmp_path / "b", 3, events=(START,))
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "run",
        "state",
        "step",
        "loss",
        "tokens/s",
        "left",
        "checkpoint",
        "changed",
    ]
    assert re.match(r"a +done +12/12 +6.7041 +1.00k +step 12 +\d+ s ago$", lines[1])
    assert re.match(r"b +stopped +3/12 +7.6387 +1.00k +\d+ s ago$", lines[2])
    assert lines[3] == f"  {KILLED}"


def test_json_has_the_same_as_one_object(tmp_path: Path, capsys: Any) -> None:
    write_run(tmp_path / "a", 3)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert (row["run"], row["step"], row["total_steps"]) == ("a", 3, 12)


def test_a_folder_without_runs_says_so_and_an_absent_one_is_bad_input(
    tmp_path: Path, capsys: Any
) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no runs\n"
    assert main(["runs", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.endswith("x: no such folder; give one that holds run folders\n")
    assert main(["runs", str(tmp_path), "--watch", "--every", "0"]) == 2


def test_what_a_terminal_would_obey_and_secrets_do_not_reach_it(tmp_path: Path) -> None:
    error = "no \x1b[2Jaccess\nto s3://user:hunter2@host/x"
    write_run(tmp_path / "a\x1b[31m", events=(START, {"event": "failed", "error": error}))
    text = runs.text_of(runs.table(str(tmp_path)))
    assert "\x1b" not in text and "hunter2" not in text and "access to s3://***@host/x" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        if self.getvalue().count("Ctrl-C ends") == 2:
            raise KeyboardInterrupt


def test_watch_draws_the_table_anew_in_one_place(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 3)
    out = Terminal()
    with pytest.raises(KeyboardInterrupt):
        runs.watch(str(tmp_path), 0.01, False, out)
    assert out.getvalue().count("\x1b[H\x1b[2J") == 2
    assert "\x1b[33mstopped\x1b[0m" in out.getvalue()


def test_runs_and_plot_need_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 3)
    code = (
        "import sys; from openlm_lite.cli import main; import openlm_lite.plots\n"
        f"code = main(['runs', {str(tmp_path)!r}]); sys.exit(code or 9 * ('torch' in sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_an_event_after_a_line_that_was_cut_off_has_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "sta')
    history.note(tmp_path, "failed", error="password=hunter2")
    run = read_run(tmp_path, all_records=False)
    assert [e["event"] for e in run.events] == ["failed"]
    assert "hunter2" not in (tmp_path / "events.jsonl").read_text()
    assert "events.jsonl: 1 line is no record, and left out" in run.notes


def test_a_history_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history.note(tmp_path / "gone", "start")
    assert "events.jsonl: not written" in caplog.text


def test_the_rest_of_the_records_are_left_as_they_are(tmp_path: Path) -> None:
    records = [step_record(1), {"step": 1, "tokens": 256, "val/toy/loss": float("nan")}]
    run = read_run(write_run(tmp_path / "a", records=records), all_records=True)
    assert len(run.records) == 2 and len(run.trained) == 1
