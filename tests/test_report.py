"""`openlm report` and `openlm plot`: what they show of a run, and what no run can make them do."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_lite import curves, history
from openlm_lite.cli import main
from openlm_lite.curves import Axis, Curve
from openlm_lite.recorded import read_run
from openlm_lite.report import facts
from openlm_lite.report.page import _panels, page, write_report
from openlm_lite.report.scores import scores_of
from tests.recorded_run import CONFIG, step_record, write_run

START = {"event": "start", "step": 0, "world_size": 2, "device": "cpu", "host": "node7"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.text += " "
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def full_run(folder: Path, **changes: Any) -> Path:
    """A run with everything that a page shows."""
    records = [
        step_record(
            i,
            **{"data/web/tokens": 180 * i, "data/web/epoch": 0.1, "train/web/loss": 3.0},
            **{"data/code/tokens": 76 * i, "data/code/epoch": 0.2, "train/code/loss": 2.0},
        )
        for i in range(1, 13)
    ]
    records.insert(6, {"step": 6, "tokens": 1536, "val/toy/loss": 4.25})
    records.insert(7, {"step": 6, "tokens": 1536, "sample/prompt": "def ", "sample/text": "f(x):"})
    records.insert(
        8,
        {"step": 7, "tokens": 1536, "guard/event": "left out", "guard/reason": "loss nan"},
    )
    events = (
        START,
        {"event": "saved", "step": 4, "path": "c/step_00000004", "seconds": 1.5},
        {**START, "step": 4, "resumed": True},
        {"event": "save failed", "step": 8, "problem": "disk full"},
        {"event": "done", "step": 12},
    )
    write_run(folder, records=records, events=events, checkpoint=12, **changes)
    ancestor = {"path": "runs/trunk", "kind": "run", "facts": {"step": 100, "tokens": 25600}}
    (folder / "init_from.json").write_text(json.dumps(ancestor))
    (folder / "eval-core.json").write_text(
        json.dumps({"step": 12, "core": 0.31, "tasks": {"arc_easy": {"accuracy": 0.5}}})
    )
    return folder


# --- what a page says ----------------------------------------------------------------------------


def test_a_page_shows_summary_diff_lineage_data_samples_scores_system_and_events(
    tmp_path: Path,
) -> None:
    a = full_run(tmp_path / "a")
    b = full_run(tmp_path / "b", config=CONFIG.replace("5.0e-3", "1.0e-3"))
    text = Elements(page([read_run(p, all_records=True) for p in (a, b)])).text
    for words in (
        "12 of 12",
        "optim.lr 0.005 0.001",
        "Starts from runs/trunk (step 100, 25.60k tokens)",
        "web 2.16k",
        "70.3 %",
        "def f(x):",
        "arc_easy 0.5000 (step 12)",
        "core 0.3100 (step 12)",
        "host node7",
        "started on 2 x cpu, node7",
        "resumed on 2 x cpu, node7",
        "save failed: disk full",
        "left out: loss nan",
        "saved: c/step_00000004 in 1.5 s",
    ):
        assert words in " ".join(text.split()), words
    assert "data.seq_len" not in text.split("What differs")[1].split("Data and lineage")[0]


def test_the_curves_of_a_page_are_those_of_the_records(tmp_path: Path) -> None:
    run = read_run(full_run(tmp_path / "a"), all_records=True)
    data = data_of(page([run]))
    (found,) = data["runs"]
    steps, values = found["series"]["train/loss"]["raw"]
    assert steps == [1] * 12
    expected = [float(f"{r['train/loss']:.5g}") for r in run.trained]
    assert values == expected
    assert found["axis"]["step"][-1] == 12 and found["axis"]["tokens"][-1] == 12 * 256
    assert found["axis"]["seconds"][-1] == pytest.approx(12 * 0.256)
    assert [p["title"] for p in data["panels"]][:4] == [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
    ]
    assert data["panels"][0]["keys"] == ["train/loss", "val/toy/loss"]
    assert [m["kind"] for m in found["marks"]] == ["restart", "guard"]


def test_events_stand_in_the_order_in_which_they_happened(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "a")
    rows, n_left_out = facts.events(read_run(folder, all_records=True))
    assert [row[1] for row in rows] == ["0", "4", "4", "7", "8", "12"] and n_left_out == 0
    for event in ("launched", "launched", "start"):  # the first one was killed before its start
        history.note(folder, event)
    rows, _ = facts.events(read_run(folder, all_records=True))
    assert [row[2] for row in rows[6:]] == ["launched", "started on ? x ?, ?"]


def test_a_damaged_run_is_on_the_page_as_far_as_it_goes(tmp_path: Path, capsys: Any) -> None:
    a = write_run(tmp_path / "a", 3, config=None)
    with (a / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "to')
    (a / "init_from.json").write_text("[")
    (a / "eval-x.json").write_text("{")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "r.html"
    assert main(["report", str(a), str(tmp_path / "empty"), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    notes = ["config.yaml is missing", "metrics.jsonl ends in the middle of a line"]
    for note in notes:
        assert said.err.count(f"openlm: {a}: {note}") == 1
    text = " ".join(Elements(out.read_text()).text.split())
    for words in (*notes, "init_from.json cannot be read", "eval-x.json cannot be read", "empty"):
        assert words in text, words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such folder; give the folder of a run (its run.dir)"),
        (["a", "--out", "x.pdf"], "--out x.pdf: must end with .html"),
        (["a", "--out", "gone/x.html"], "--out gone/x.html: there is no folder gone"),
        (["a"] * 61, "61 runs: a page holds up to 60; name fewer"),
    ],
)
def test_bad_words_are_one_error_and_write_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", 3)
    assert main(["report", *words]) == 2
    assert capsys.readouterr().err == f"openlm: {message}\n"
    assert not list(tmp_path.rglob("*.html"))


# --- what no run can do --------------------------------------------------------------------------


def test_no_name_config_metric_or_text_of_a_run_becomes_a_part_of_the_page(tmp_path: Path) -> None:
    clean = full_run(tmp_path / "clean")
    name = HOSTILE.replace("/", "\u2215")
    folder = full_run(tmp_path / name, config=CONFIG + f"note: {json.dumps(HOSTILE)}\n")
    history.note(folder, HOSTILE, step=3, path=HOSTILE)
    hostile = {
        "step": 13,
        "tokens": 13 * 256,
        "train/loss": 1.0,
        f"val/{HOSTILE}/loss": 2.0,
        f"data/{HOSTILE}/epoch": 1.0,
        "guard/event": HOSTILE,
        "guard/reason": HOSTILE,
        "sample/text": HOSTILE,
        HOSTILE: 1.0,
    }
    with (folder / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(hostile) + "\n")
    (folder / "eval.json").write_text(json.dumps({"tasks": {HOSTILE: 0.5}}))
    (folder / "init_from.json").write_text(json.dumps({"path": HOSTILE, "kind": HOSTILE}))
    made = page([read_run(folder, all_records=True)], title=HOSTILE)
    elements = Elements(made).found
    tags = [tag for tag, _ in elements]
    assert tags.count("script") == 2 and "img" not in tags and "iframe" not in tags
    assert not [a for _, a in elements if any(n.startswith("on") for n in a)]
    plain = {tag for tag, _ in Elements(page([read_run(clean, all_records=True)])).found}
    assert set(tags) <= plain | {"p", "li", "ul"}
    assert data_of(made)["runs"][0]["series"][HOSTILE]["raw"] == [[13], [1]]


def test_a_page_asks_for_nothing_and_allows_only_its_own_script_and_style(tmp_path: Path) -> None:
    made = page([read_run(full_run(tmp_path / "a"), all_records=True)])
    elements = Elements(made).found
    for _, attributes in elements:
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name) in (None, "data:,")
        assert "style" not in attributes  # the policy would not let it act
    assert "url(" not in made.replace("url(#", "")
    (policy,) = [
        a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_no_credential_of_a_run_is_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-of-the-environment")
    config = CONFIG + (
        "log: {wandb: {api_key: hunter2-in-yaml}}\n"
        "other: 's3://user:hunter2-in-url@host/x canary-of-the-environment'\n"
    )
    folder = full_run(tmp_path / "a", config=config)
    history.note(folder, "failed", error="Authorization: Bearer hunter2-in-header")
    made = page([read_run(folder, all_records=True)])
    assert "hunter2" not in made and "canary" not in made and "***" in made


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["tokens", "train/loss", "train/lr", "perf/mfu", "guard/event", "sample/text", "data/a/epoch"]
) | st.text(max_size=6)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("fuzz") / "a")


@settings(max_examples=15)
@given(
    records=st.lists(st.tuples(st.integers(0, 99), st.dictionaries(KEYS, JSON)), max_size=4),
    scores=JSON,
    origin=JSON,
)
def test_no_content_of_the_files_breaks_a_page(
    fuzzed: Path, records: list[tuple[int, dict[str, Any]]], scores: Any, origin: Any
) -> None:
    lines = [json.dumps({**record, "step": step}) for step, record in records]
    (fuzzed / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (fuzzed / "eval.json").write_text(json.dumps({"tasks": scores}))
    (fuzzed / "init_from.json").write_text(json.dumps(origin))
    made = page([read_run(fuzzed, all_records=True)])
    data_of(made)
    made.encode()


# --- size and thinning ---------------------------------------------------------------------------


@given(
    values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=300),
    n=st.integers(4, 60),
)
def test_thinning_keeps_both_ends_and_every_extreme_in_order(values: list[float], n: int) -> None:
    curve = Curve(list(range(len(values))), values)
    thin = curves.thin(curve, n)
    assert len(thin.step) <= max(n, 4) or len(values) <= n
    assert thin.step == sorted(set(thin.step))
    assert [values[s] for s in thin.step] == thin.value
    assert {thin.step[0], thin.step[-1]} == {0, len(values) - 1}
    assert min(thin.value) == min(values) and max(thin.value) == max(values)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=50), st.integers(1, 30))
def test_smoothing_is_the_mean_weighted_by_age(values: list[float], window: int) -> None:
    keep = 1 - 1 / window
    for i, found in enumerate(curves.smooth(values, window)):
        weights = [keep ** (i - j) for j in range(i + 1)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert found == pytest.approx(expected, abs=1e-9)


def test_an_axis_counts_the_time_of_steps_and_places_what_lies_between() -> None:
    axis = Axis(step=[1, 2, 4], tokens=[100.0, 200.0, 600.0], seconds=[1.0, 2.0, 6.0])
    assert curves.at(axis, [0, 1, 2, 3, 4, 9], "tokens", 2.0) == [0, 100, 200, 400, 600, 600]
    assert curves.at(axis, [0, 3], "flops", 2.0) == [0, 800]
    assert curves.at(axis, [1, 3], "time", 2.0) == [1, 4]
    assert curves.at(axis, [3], "step", 2.0) == [3]
    branch = Axis(step=[101, 102], tokens=[10_100.0, 10_200.0], seconds=[0.0, 1.0])
    assert curves.at(branch, [101], "tokens", 1.0) == [10_100]


def test_runs_of_one_name_are_told_apart_by_their_folders() -> None:
    paths = [Path("/x/a/run"), Path("/x/b/run"), Path("/y/other")]
    assert curves.labels(paths) == ["a/run", "b/run", "b/other"] or curves.labels(paths) == [
        "a/run",
        "b/run",
        "y/other",
    ]


@pytest.mark.slow
def test_a_page_about_100k_steps_is_under_2_mb_and_keeps_a_spike_of_one_step(
    tmp_path: Path,
) -> None:
    records = [
        step_record(i, **{f"gpu/{k}": 0.1 * (i % 97) for k in ("temperature", "clock")})
        for i in range(1, 100_001)
    ]
    records[54_321]["train/loss"] = 99.5
    folder = write_run(tmp_path / "a", records=records, config=CONFIG.replace("12", "100000"))
    made = page([read_run(folder, all_records=True)])
    assert len(made.encode()) < 2_000_000
    steps, values = data_of(made)["runs"][0]["series"]["train/loss"]["raw"]
    assert sum(steps[: values.index(99.5) + 1]) == 54_322


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"tasks": {"a": {"accuracy": 0.5}, "b": 0.25}}, {"a": 0.5, "b": 0.25}),
        ({"results": {"a": {"acc,none": 0.5, "acc_stderr,none": 0.1}}}, {"a": 0.5}),
        ({"tasks": [{"task": "a", "score": 0.5}]}, {"a": 0.5}),
        ({"core": 0.3, "extended": None, "categories": {"x": 0.1}}, {"core": 0.3}),
        ({"a": 0.5, "step": 3, "seconds": 12.5}, {"a": 0.5}),
        ([1, 2], {}),
        (
            {
                "model": {"step": 7, "n_params": 9},
                "core": 31.5,
                "extended": None,
                "baselines": "v2",
                "aggregates": {"v1": {"core": 3.0}},
                "tasks": {"a": {"accuracy": 0.5, "n": 3}, "b": {"accuracy": None}},
                "lm_eval": {"tasks": {"c": {"acc": 0.25, "acc_stderr": 0.1, "version": 1.0}}},
                "texts": {"wiki": {"loss": 3.5, "bits_per_byte": 1.1}},
                "seconds": 0.5,
            },
            {"core": 0.315, "a": 0.5, "lm-eval/c/acc": 0.25, "texts/wiki": 3.5},
        ),
        ({"tasks": {"a": {"accuracy": float("nan")}}}, {}),
        (
            {"eval_metrics": {"icl": {"a": 0.5, "b": None}, "downstream_perplexity": 0.7}},
            {"a": 0.5},
        ),
        ({"input": {"eval_metrics": {"icl": {"a": 0.5}}}, "low_variance": 0.3}, {"a": 0.5}),
    ],
)
def test_scores_are_found_in_the_forms_that_results_have(
    tmp_path: Path, content: Any, expected: dict[str, float]
) -> None:
    (tmp_path / "result.json").write_text(json.dumps(content))
    scores, notes = scores_of(tmp_path)
    assert {task: score.value for task, score in scores.items()} == expected and not notes


def test_a_score_of_a_file_is_shown_unless_the_run_has_one_of_a_later_step(tmp_path: Path) -> None:
    records = [step_record(i) for i in range(1, 13)]
    for step, value in ((4, 0.1), (8, 0.2)):
        names = ("early/accuracy", "late/accuracy", "somewhere/accuracy", "alone/accuracy")
        scores = {f"eval/{name}": value for name in (*names, "lm-eval/piqa/acc")}
        records.insert(step, {"step": step, "tokens": 256 * step, **scores})
    folder = write_run(tmp_path / "a", records=records)
    for step, task in ((6, "early"), (8, "late")):
        result = {"step": step, "tasks": {task: {"accuracy": 0.5}}}
        result["lm_eval"] = {"tasks": {"piqa": {"acc": 0.6}}}
        (folder / f"eval-{task}.json").write_text(json.dumps(result))
    (folder / "eval.json").write_text(json.dumps({"somewhere": 0.5}))
    rows, notes = facts.evaluations([read_run(folder, all_records=True)])
    assert not notes and rows == [
        ["alone", "0.2000 (step 8)"],
        ["early", "0.2000 (step 8)"],
        ["late", "0.5000 (step 8)"],
        ["lm-eval/piqa/acc", "0.6000 (step 8)"],
        ["somewhere", "0.5000 (eval.json)"],
    ]


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", ["flops", "time"])
def test_plot_draws_runs_over_each_axis(tmp_path: Path, x: str, capsys: Any) -> None:
    matplotlib: Any = pytest.importorskip("matplotlib")
    a, b = write_run(tmp_path / "a", 60), write_run(tmp_path / "$b_1", 5)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "p.svg"
    words = ["plot", str(a), str(b), str(tmp_path / "empty"), "--x", x, "--smooth", "3"]
    assert main([*words, "--out", str(out)]) == 0
    picture = out.read_text()
    names = {"tokens": "tokens", "flops": "FLOPs", "time": "training time (hours)", "step": "step"}
    assert f"<!-- {names[x]} -->" in picture and "<!-- gradient norm -->" in picture
    assert "<!-- $b_1 train -->" in picture
    assert matplotlib.rcParams["text.parse_math"]  # the powers of a fit's axes are mathematics
    assert "empty: no metrics.jsonl with a training step yet" in capsys.readouterr().err


def test_plot_refuses_what_it_cannot_draw_and_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    a = write_run(tmp_path / "a", 3, config=None)
    for words, message in (
        ([str(a), "--x", "flops"], "its FLOPs are not known; use --x tokens, step or time"),
        ([str(a), "--smooth", "0"], "--smooth 0: must be at least 1"),
        ([str(a), "--out", "x.gif"], "x.gif: the picture can be .png or .svg"),
        ([str(a), "--schedule", "--x", "step"], "--x and --smooth: not with --schedule"),
        ([str(write_run(tmp_path / "b", 0))], "no metrics.jsonl with a training step yet"),
    ):
        assert main(["plot", *words]) == 2
        assert message in capsys.readouterr().err
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.svg")]


def test_write_report_lies_in_the_first_run_unless_it_is_told(tmp_path: Path) -> None:
    a = full_run(tmp_path / "a")
    assert write_report([str(a)]) == str(a / "report.html")


def test_norms_of_many_layers_are_one_panel_with_the_first_and_the_last() -> None:
    keys = ["train/grad_norm", "perf/seconds/clip", "perf/seconds/optimizer"]
    keys += [f"{kind}/layers.{i}" for i in range(80) for kind in ("grad_norm", "param_norm")]
    panels = {panel["title"]: panel["keys"] for panel in _panels(keys)}
    assert panels["Seconds of each phase"] == ["perf/seconds/clip", "perf/seconds/optimizer"]
    assert panels["Gradient norm"] == ["train/grad_norm"]
    for kind, title in (("grad_norm", "Gradient"), ("param_norm", "Weight")):
        drawn = panels[f"{title} norm by layer"]
        assert len(drawn) == len(set(drawn)) == 12
        assert drawn[0] == f"{kind}/layers.0" and drawn[-1] == f"{kind}/layers.79"
