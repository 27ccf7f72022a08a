"""`openlm fit`: the published numbers, tables and run folders as input, trust, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openlm_lite import run
from openlm_lite.cli import BAD_INPUT, main
from openlm_lite.errors import InputError
from openlm_lite.scaling.conditions import parse_conditions
from openlm_lite.scaling.fit import FitRequest, fit, parse_point
from openlm_lite.scaling.ladder import count_params
from openlm_lite.scaling.laws import ErrorLaw, OverTraining, parameters_of
from openlm_lite.scaling.report import report
from openlm_lite.scaling.table import columns_of, loss_columns, read_rows, select

TARGET = "N=1439795200,D=921468928000"
LAW = OverTraining(1.8, 200.0, 300.0, 0.14)
ERROR_LAW = ErrorLaw(0.86, 2.2, 0.7)


@pytest.fixture(scope="module")
def testbed(shared_data: Path) -> str:
    path = shared_data / "scaling" / "testbed.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return str(path)


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["fit", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["fit", *words]) == BAD_INPUT
    return capsys.readouterr().err


def rows_of(n_sizes: int = 4, noise: float = 0.0) -> list[dict[str, Any]]:
    """A table of runs on a known law, with an error that follows its own."""
    rng = np.random.default_rng(0)
    rows = []
    for N in np.geomspace(1e6, 3e8, n_sizes).round():
        for M in (5, 20, 80):
            clean = float(LAW.loss(np.array(N), np.array(M * N)))
            loss = clean + noise * rng.standard_normal()
            error = float(ERROR_LAW.error(np.array(loss)))
            row = {"name": f"{N:.3g} at {M}", "N": N, "D": M * N, "loss_x": loss, "err_y": error}
            rows.append(row | {"data": "web"})
    return rows


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(rows_of()))
    return path


# The published numbers


def test_the_published_fit_on_redpajama_comes_out(
    testbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--where", "dataset_name=rpj", "--loss", "loss_c4_val", "--error", "err_avg_subset")
    found = as_json(capsys, testbed, *words, "--predict", TARGET, "--predict", "N=6889410560,M=20")
    expected = {"E": 1.8366, "a": 212.24, "b": 366.69, "eta": 0.13643}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=5e-5), name
    expected = {"epsilon": 0.85699, "k": 2.20649, "gamma": 0.71459}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert (len(found["fitted_on"]), len(found["error_fitted_on"])) == (5, 6)
    long, large = found["predictions"]
    assert f"{long['loss']:.4f} {long['loss_measured']:.4f}" == "2.5198 2.5021"
    assert f"{large['loss']:.4f} {large['loss_measured']:.4f}" == "2.4427 2.4250"
    off = [100 * p["loss_relative_error"] for p in (long, large)]
    assert [f"{x:.3f}" for x in off] == ["0.710", "0.732"]
    off = [100 * p["error_relative_error"] for p in (long, large)]
    assert [f"{x:.3f}" for x in off] == ["3.637", "0.046"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("c4_original", (1.508261, 141.2773, 189.5155, 0.121236)),
        ("rpj", (1.836648, 212.2361, 366.6872, 0.136425)),
        ("rw_original", (1.734462, 157.1163, 246.2067, 0.127197)),
    ],
)
def test_the_published_fits_of_the_three_corpora_come_out(
    testbed: str, data: str, expected: tuple[float, ...]
) -> None:
    request = FitRequest((testbed,), where=(f"dataset_name={data}",), loss="loss_c4_val")
    assert tuple(parameters_of(fit(request).law).values()) == pytest.approx(expected, rel=5e-6)


# of the paper's notebook: N, M -> relative errors in % of the loss, of 17 tasks and of 46
PUBLISHED_TARGETS = {
    "c4_original": {
        (1439795200, 20): (0.780, 0.736, 0.338),
        (1439795200, 80): (1.498, 9.582, 3.082),
        (6889410560, 20): (4.295, 0.137, 0.074),
    },
    "rpj": {
        (1439795200, 20): (0.110, 0.714, 0.314),
        (1439795200, 640): (0.710, 3.637, 3.436),
        (6889410560, 20): (0.732, 0.046, 2.097),
    },
    "rw_original": {
        (1439795200, 20): (0.559, 0.419, 0.252),
        (1439795200, 320): (0.005, 5.617, 4.298),
        (6889410560, 20): (1.619, 2.939, 2.759),
    },
}
# epsilon, k, gamma of 17 tasks, then of 46
PUBLISHED_ERROR_LAWS = {
    "c4_original": ((0.84974, 2.07891, 0.75612), (0.75895, 1.28852, 0.97216)),
    "rpj": ((0.85699, 2.20649, 0.71459), (0.76085, 1.32290, 0.89071)),
    "rw_original": ((0.86528, 2.21481, 0.70705), (0.76768, 1.12807, 0.82152)),
}


@pytest.mark.parametrize("data", PUBLISHED_TARGETS)
def test_all_published_predictions_and_error_laws_come_out(testbed: str, data: str) -> None:
    targets = PUBLISHED_TARGETS[data]
    columns = ("err_avg_subset", "err_avg")
    for i, (error, expected) in enumerate(zip(columns, PUBLISHED_ERROR_LAWS[data], strict=True)):
        request = FitRequest(
            (testbed,),
            where=(f"dataset_name={data}",),
            loss="loss_c4_val",
            error=error,
            predict=tuple(f"N={N},M={M}" for N, M in targets),
        )
        found = report(fit(request), request)
        assert [found[n] for n in ("epsilon", "k", "gamma")] == pytest.approx(expected, rel=1e-5)
        off = [
            (100 * p["loss_relative_error"], 100 * p["error_relative_error"])
            for p in found["predictions"]
        ]
        for (loss, error), numbers in zip(off, targets.values(), strict=True):
            assert loss == pytest.approx(numbers[0], abs=6e-4)
            assert error == pytest.approx(numbers[1 + i], abs=6e-4)


def test_every_validation_set_of_the_testbed_can_be_fitted(testbed: str) -> None:
    columns = loss_columns(read_rows([testbed])[0])
    assert len(columns) == 8
    for data in ("c4_original", "rpj", "rw_original"):
        for column in columns:
            for error in ("err_avg", "err_avg_subset"):
                request = FitRequest(
                    (testbed,), where=(f"dataset_name={data}",), loss=column, error=error
                )
                found = fit(request)
                assert len(found.loss_rows) == 5 and len(found.error_rows) == 6
                losses = found.law.loss(np.array([1e9]), np.array([2e10]))
                assert 0 < losses[0] < 10


def test_the_paper_s_set_is_what_the_documented_conditions_choose(testbed: str) -> None:
    common = FitRequest(
        (testbed,), where=("dataset_name=rpj",), loss="loss_c4_val", error="err_avg"
    )
    by_name = fit(common)
    written = fit(
        replace(
            common,
            fit_on=("M=20,N<5e8", "M=320,N<2e7"),
            error_on=("M=20,N<2e9", "M=320,N<2e7"),
        )
    )
    assert by_name.loss_set == "paper"
    for rows, others in (
        (by_name.loss_rows, written.loss_rows),
        (by_name.error_rows, written.error_rows),
    ):
        assert sorted(r.name for r in rows) == sorted(r.name for r in others)


def test_the_numbers_are_printed_for_people(
    testbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [testbed, "--where", "dataset_name=rpj", "--loss", "loss_c4_val"]
    assert main(["fit", *words, "--error", "err_avg_subset", "--predict", TARGET]) == 0
    text = capsys.readouterr().out
    for number in ("E 1.8366  a 212.24  b 366.69  eta 0.13643", "2.5198", "2.5021", "0.710 %"):
        assert number in text
    assert "3.637 %" in text


def test_chinchilla_and_isoflop_fit_the_testbed_too(
    testbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (testbed, "--where", "dataset_name=rpj", "--loss", "loss_c4_val")
    found = as_json(capsys, *words, "--law", "chinchilla", "--predict", TARGET)
    assert found["fit_set"] == "all" and len(found["fitted_on"]) == 34  # without the predicted
    assert found["predictions"][0]["loss_relative_error"] < 0.03
    flops = ("--budgets", "6e18,1e19,2e19", "--predict", "C=1e20")
    found = as_json(capsys, *words, "--law", "isoflop", *flops)
    assert [b["n_sizes"] for b in found["budgets"]] == [3, 3, 3]
    assert found["predictions"][0]["N"] > 4e8


@pytest.mark.parametrize(
    "law", ["over-training", pytest.param("chinchilla", marks=pytest.mark.slow)]
)
def test_the_ladder_of_the_documentation_predicts_what_it_says(
    capsys: pytest.CaptureFixture[str], law: str
) -> None:
    """docs/science.md: nine measured runs, and the one of ten times their compute."""
    root = Path(__file__).parents[2]
    table = root / "benchmarks" / "results" / "science_ladder_runs.json"
    found = as_json(capsys, str(table), "--law", law, "--predict", "N=1053824,D=4003840")
    (p,) = found["predictions"]
    assert len(found["fitted_on"]) == 9 and 10 <= p["times_largest_fitted"] < 10.2
    numbers = (found["rms_residual"], p["loss"], p["loss_measured"])
    cells = [f"{x:.3f}" for x in numbers] + [f"{100 * p['loss_relative_error']:.1f} %"]
    assert f"| {' | '.join(cells)} |" in (root / "docs" / "science.md").read_text()


# Input


def test_json_and_csv_give_the_same_fit(tmp_path: Path, table: Path) -> None:
    rows = json.loads(table.read_text())
    names = list(rows[0])
    lines = [",".join(names)] + [",".join(str(row[n]) for n in names) for row in rows]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    laws = [
        parameters_of(fit(FitRequest((str(tmp_path / f"table.{kind}"),), loss="loss_x")).law)
        for kind in ("json", "csv")
    ]
    assert laws[0] == laws[1] == pytest.approx(parameters_of(LAW), rel=1e-5)


def test_loss_may_be_left_out_where_there_is_one(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert as_json(capsys, str(table))["loss_column"] == "loss_x"


def test_a_run_that_is_predicted_is_not_fitted_on(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, str(table), "--predict", "N=3e8,M=80")
    assert found["predictions"][0]["measured_run"] not in found["fitted_on"]
    assert found["predictions"][0]["loss_relative_error"] < 1e-6
    found = as_json(capsys, str(table), "--predict", "N=3e8,M=80", "--fit-on", "N>0")
    assert found["predictions"][0]["is_fitted_on"]


def test_conditions_choose_rows(table: Path) -> None:
    rows, _ = read_rows([str(table)])
    counts = {
        "M=20": 4,
        "M=20,N<1e8": 3,
        "M>=20": 8,
        "M!=20": 8,
        "data=web": 12,
        "data!=web": 0,
        "name=1e+06 at 5": 1,
        "N<=1e6": 3,
    }
    for text, n in counts.items():
        conditions = parse_conditions([text], "--where")
        if n:
            assert len(select(rows, conditions, "--where")) == n, text
        else:
            with pytest.raises(InputError, match="no run matches"):
                select(rows, conditions, "--where")


def test_sets_to_fit_on_are_put_together(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--fit-on", "M=20", "--fit-on", "M=80,N<2e6", "--fit-on", "M=20,N<2e6")
    found = as_json(capsys, str(table), *words, "--error", "err_y", "--error-on", "M=5")
    assert len(found["fitted_on"]) == 5 and len(found["error_fitted_on"]) == 4
    assert found["held_out"]["n_runs"] == 7
    assert found["held_out"]["largest_relative_error"] < 1e-6


def fake_run(folder: Path, recipe: Path, steps: int, d_model: int, *words: str) -> Path:
    """The folder that a run of the toy recipe leaves, with losses on the known law."""
    n_heads = d_model // 8
    cfg = run.load_run(
        str(recipe),
        [
            f"run.dir={folder}",
            f"total_steps={steps}",
            f"model.d_model={d_model}",
            f"model.n_heads={n_heads}",
            f"model.n_kv_heads={n_heads // 2}",
            *words,
        ],
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(run.resolved_yaml(cfg))
    N, D = count_params(cfg.model.architecture), cfg.tokens_at(cfg.steps)
    loss = float(LAW.loss(np.array(float(N)), np.array(float(D))))
    records = [
        {"step": 0, "tokens": 0, "val/toy/loss": 9.0},
        {"step": steps, "tokens": D, "train/loss": loss},
        {"step": steps, "tokens": D, "val/toy/loss": loss},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_run_folders_are_fitted_and_unfinished_ones_counted(
    tmp_path: Path, toy_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    for d_model in (16, 32, 64):
        for steps in (20, 80):
            fake_run(runs / f"d{d_model}_{steps}", toy_recipe, steps, d_model)
    unfinished = fake_run(runs / "cut", toy_recipe, 40, 32)
    lines = (unfinished / "metrics.jsonl").read_text().splitlines()
    (unfinished / "metrics.jsonl").write_text(lines[0] + "\n")
    fake_run(runs / "grown", toy_recipe, 41, 32, f"model.init_from={runs}/d32_20")
    fake_run(runs / "no_val", toy_recipe, 42, 32)
    text = (runs / "no_val" / "metrics.jsonl").read_text().splitlines()[1]
    (runs / "no_val" / "metrics.jsonl").write_text(text + "\n")
    (runs / "empty").mkdir()
    (runs / "empty" / "config.yaml").write_text((unfinished / "config.yaml").read_text())

    found = as_json(capsys, str(runs), "--loss", "toy", "--where", "model.d_model<100")
    assert found["loss_column"] == "val/toy/loss"
    assert parameters_of(LAW) == pytest.approx({n: found[n] for n in ("E", "a", "b", "eta")}, 1e-3)
    reasons = {Path(run["name"]).name: run["reason"] for run in found["left_out"]}
    assert reasons["cut"] == "unfinished: step 0 of 40"
    assert "another run" in reasons["grown"] and "no validation" in reasons["no_val"]
    assert reasons["empty"] == "not begun"
    assert main(["fit", str(runs)]) == 0
    assert "4 runs left out:" in capsys.readouterr().out
    assert "no finished run" in error_of(capsys, str(unfinished))
    assert "at least 4 runs are needed" in error_of(capsys, str(runs / "d16_20"))


def test_n_counts_embeddings_and_not_the_gains_of_qk_norm() -> None:
    """As in arXiv:2403.08540: 1,439,795,200 for DCLM's 1B, which has 98,304 of them."""
    assert count_params(run.load_model(["model.base=dclm_1b"])) == 1_439_795_200


# Trust


@pytest.mark.parametrize(("n_sizes", "how"), [(2, "normal noise"), (5, "with replacement")])
def test_bootstrap_intervals_hold_the_truth_and_repeat_with_their_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], n_sizes: int, how: str
) -> None:
    path = tmp_path / "noisy.json"
    path.write_text(json.dumps(rows_of(n_sizes, noise=0.01)))
    words = (str(path), "--predict", "N=1e9,M=20", "--error", "err_y", "--bootstrap", "30")
    found = as_json(capsys, *words)
    assert how in found["bootstrap"]["method"]
    low, high = found["predictions"][0]["loss_interval"]
    assert low < found["predictions"][0]["loss"] < high
    assert low - 0.05 < float(LAW.loss(np.array(1e9), np.array(2e10))) < high + 0.05
    low, high = found["bootstrap"]["intervals"]["eta"]
    assert low < found["eta"] < high
    assert "error_interval" in found["predictions"][0]
    assert as_json(capsys, *words) == found
    assert as_json(capsys, *words, "--seed", "1")["bootstrap"] != found["bootstrap"]


def test_bootstrap_needs_more_runs_than_parameters(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (str(table), "--fit-on", "M=20,N<1e8", "--fit-on", "M=80,N<2e6")
    assert "as many runs as parameters" in as_json(capsys, *words)["notes"][0]
    assert "nothing says how far they scatter" in error_of(capsys, *words, "--bootstrap", "5")


def test_each_run_is_predicted_from_the_others(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = as_json(capsys, str(table), "--leave-out")["leave_out"]
    assert len(entries) == 12
    assert all(entry["relative_error"] < 1e-5 for entry in entries)


def test_leave_out_says_which_run_alone_determines_the_law(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (str(table), "--fit-on", "M=20", "--fit-on", "M=80,N<2e6", "--leave-out")
    entries = as_json(capsys, *words)["leave_out"]
    assert ["reason" in entry for entry in entries] == [False] * 4 + [True]
    assert "the same M" in entries[-1]["reason"]


def test_a_law_fitted_to_its_own_losses_has_no_doubts(table: Path) -> None:
    request = FitRequest((str(table),), loss="loss_x", error="err_y")
    found = report(fit(request), request)
    assert found["notes"] == [] and found["rms_residual"] < 1e-8
    assert {n: found[n] for n in ("epsilon", "k", "gamma")} == pytest.approx(
        parameters_of(ERROR_LAW), rel=1e-4
    )


# Pictures


def test_the_picture_is_drawn(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = table.with_suffix(".svg")
    words = (str(table), "--predict", "N=1e9,M=20", "--error", "err_y", "--plot", str(out))
    assert as_json(capsys, *words)["plot"] == str(out)
    assert out.stat().st_size > 5000
    assert "can be .png or .svg" in error_of(capsys, str(table), "--plot", "x.pdf")
    assert "there is no folder" in error_of(capsys, str(table), "--plot", "nowhere/x.png")


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss", "loss_z"], "--loss loss_z: no such column; did you mean loss_x?"),
        (["--error", "err_yy"], "--error err_yy: no such column; did you mean err_y?"),
        (["--where", "dta=web"], "--where dta: no such column; did you mean data?"),
        (["--where", "data=books"], "no run matches; the values are\n  data: web"),
        (["--where", "M=3"], "M: 5, 20, 80"),
        (["--where", "M"], "must be COLUMN=VALUE"),
        (["--where", "N<many"], "'many' is not a number"),
        (["--where", "M=20"], "the same M = D / N, 20"),
        (["--where", "N<2e6"], "are needed to fit it on, and there are 3"),
        (["--fit-on", "paper"], "has 0 of the 5 runs"),
        (["--error-on", "M=20"], "goes with --error"),
        (["--predict", "N=1e9"], "must be N=PARAMETERS,D=TOKENS"),
        (["--predict", "N=1e9,D=-3"], "must be N=PARAMETERS,D=TOKENS"),
        (["--predict", "N=1e9,D=nan"], "must be N=PARAMETERS,D=TOKENS"),
        (["--predict", "C=1e20"], "must be N=PARAMETERS,D=TOKENS"),
        (["--law", "isoflop", "--predict", "N=1e9,D=1e9"], "must be C=FLOPS"),
        (["--law", "isoflop", "--error", "err_y"], "--error: not with --law isoflop"),
        (["--law", "isoflop", "--budgets", "1e9,x"], "must be FLOPs"),
        (["--law", "isoflop"], "at least 2 budgets"),
        (["--budgets", "1e18"], "goes with --law isoflop"),
        (["--bootstrap", "-1"], "must be at least 1"),
        (["--out", "x"], "go with --plan"),
        (["--plan", "ladder"], "not with --plan"),
    ],
)
def test_bad_options_are_one_clear_error(
    table: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    error = error_of(capsys, str(table), *words)
    assert message in error and error.count("openlm:") == 1


@pytest.mark.parametrize(
    "bad", [None, "n/a", float("nan"), float("inf"), -1.0, 0, True, 10**400], ids=range(8)
)
def test_cells_that_are_no_numbers_are_named(
    table: Path, capsys: pytest.CaptureFixture[str], bad: Any
) -> None:
    for column in ("N", "loss_x"):
        rows = rows_of()
        rows[2][column] = bad
        table.write_text(json.dumps(rows))
        error = error_of(capsys, str(table))
        assert f"column {column}: 1 of 12 runs" in error and rows[2]["name"] in error
        assert main(["fit", str(table), "--where", f"name!={rows[2]['name']}"]) == 0
        capsys.readouterr()


def test_runs_that_are_there_twice_are_refused_with_what_they_differ_in(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = [row | {"data": data} for row in rows_of() for data in ("web", "books")]
    table.write_text(json.dumps(twice))
    assert "they differ in data (web and books); keep one" in error_of(capsys, str(table))
    assert main(["fit", str(table), "--where", "data=books"]) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.json", "[1, 2]", "a list of objects"),
        ("t.json", '{"N": 1}', "a list of objects"),
        ("t.json", "[{", "cannot be read"),
        ("t.json", "[]", "no finished run"),
        ("t.csv", "N,D,loss_x\n1,2\n", "not as many cells"),
        ("t.csv", "N,D,loss_x\n", "no finished run"),
        ("t.txt", "", "give tables"),
    ],
)
def test_files_that_are_no_tables_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    assert message in error_of(capsys, str(tmp_path / name))


def test_folders_and_names_that_hold_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "neither a run folder" in error_of(capsys, str(tmp_path))
    assert "no such file or folder" in error_of(capsys, str(tmp_path / "x.json"))
    assert "give tables or run folders" in error_of(capsys)


def test_points_are_read_in_either_form() -> None:
    assert parse_point("N=1e9,M=20") == parse_point("N=1000000000,D=2e10")


def test_columns_keep_their_order(table: Path) -> None:
    columns = columns_of(read_rows([str(table)])[0])
    assert columns[:5] == ["name", "N", "D", "loss_x", "err_y"]
