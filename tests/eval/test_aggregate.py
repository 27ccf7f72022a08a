"""Means of scores as DCLM takes them, and the table of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openlm_lite.errors import InputError
from openlm_lite.eval.aggregate import aggregate, read_scores
from openlm_lite.eval.table import make_table, published, table_lines, table_plain
from openlm_lite.eval.tasks import all_tasks


@pytest.fixture(scope="module")
def card(shared_data: Path) -> Path:
    return shared_data / "dclm" / "dclm1b_card_scores.json"


@pytest.mark.parametrize(
    ("version", "core", "extended"), [("v1", 42.33, 25.06), ("v2", 40.54, 23.28)]
)
def test_the_card_of_dclm_1b_gives_its_core_and_extended(
    card: Path, version: Any, core: float, extended: float
) -> None:
    found = aggregate(read_scores(str(card)), version)
    assert found.core is not None and found.extended is not None
    assert (round(found.core, 2), round(found.extended, 2)) == (core, extended)
    expected = json.loads(card.read_text())["expected"][version]
    assert found.core == pytest.approx(100 * expected["low_variance_datasets_centered"], abs=1e-9)
    assert found.extended == pytest.approx(100 * expected["aggregated_centered_results"], abs=1e-9)
    assert found.core_uncentered == pytest.approx(100 * expected["low_variance_datasets"])
    assert found.extended_uncentered == pytest.approx(100 * expected["aggregated_results"])
    categories = expected["aggregated_task_categories_centered"]
    assert found.categories == pytest.approx({n: 100 * value for n, value in categories.items()})
    assert found.missing == [] and found.unknown == []


def test_what_is_missing_is_named_and_not_averaged_away() -> None:
    scores = {task.label: 0.5 for task in all_tasks()} | {"humaneval": 0.1}
    del scores["squad"], scores["bbq"]
    found = aggregate(scores)
    assert found.core is None and found.extended is None
    assert found.missing == ["squad", "bbq"] and found.missing_of_core == ["squad"]
    assert found.categories["safety"] is None and found.categories["reading comprehension"] is None
    assert found.categories["world knowledge"] is not None
    assert found.unknown == ["humaneval"]


def test_guessing_is_centered_at_zero_and_all_right_at_100() -> None:
    for version in ("v1", "v2"):
        guessed = aggregate({task.label: task.baseline(version) for task in all_tasks()}, version)
        assert guessed.core == pytest.approx(0) and guessed.extended == pytest.approx(0)
        right = aggregate({task.label: 1.0 for task in all_tasks()}, version)
        assert right.core == pytest.approx(100) and right.extended == pytest.approx(100)


def test_the_two_tables_of_baselines_differ_in_dclms_twelve_tasks() -> None:
    assert {t.label for t in all_tasks() if t.baseline_v1 != t.baseline_v2} == {
        "siqa",
        "commonsense_qa",
        "bigbench_novel_concepts",
        "bigbench_language_identification",
        "bigbench_conceptual_combinations",
        "bigbench_elementary_math_qa",
        "agi_eval_lsat_ar",
        "agi_eval_lsat_rc",
        "agi_eval_lsat_lr",
        "bigbench_logical_deduction",
        "logi_qa",
        "bigbench_understanding_fables",
    }


@pytest.mark.parametrize(
    "document",
    [
        {"copa": 0.5, "squad": None},
        {"eval_metrics": {"icl": {"copa": 0.5, "squad": float("nan")}}},
        {"tasks": {"copa": {"accuracy": 0.5}, "squad": {"accuracy": None}}},
    ],
)
def test_scores_are_read_in_their_three_forms(document: Any, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(document))
    assert read_scores(str(path)) == {"copa": 0.5}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[1]", "holds no scores; it must be"),
        ("{}", "holds no scores"),
        ('{"copa": 79.0}', r"the score of copa is 79.0; an accuracy is from 0 to 1 \(divide"),
        ('{"copa": true}', "the score of copa is True"),
        ('{"copa": "0.5"}', "the score of copa is '0.5'"),
    ],
)
def test_a_file_that_holds_no_scores_is_told(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        read_scores(str(path))


def test_the_table_has_runs_first_and_published_models_behind(tmp_path: Path) -> None:
    result = {
        "model": {"path": "/runs/mine/checkpoints/step_00000100", "average": {"name": "ema"}},
        "tasks": {"copa": {"accuracy": 0.61}, "squad": {"accuracy": None}},
    }
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text(json.dumps(result))
    table = make_table([str(tmp_path)])
    assert table.entries[0].name == "mine/step_00000100 (ema)"
    plain = table_plain(table)
    assert plain["models"][0]["core"] is None
    lines = table_lines(table)
    assert lines[0].split()[:4] == ["model", "protocol", "CORE", "v1"]
    assert " 61.0" in lines[1] and lines[2].split()[:4] == ["DCLM-1B-v0", "dclm", "42.3", "25.1"]
    with pytest.raises(InputError, match=r"--table .*none: no such file or folder; give what"):
        make_table([str(tmp_path / "none")])


def test_the_published_models_are_those_of_the_cards() -> None:
    """Means over the nine tasks, as OLMo's cards print them."""
    nine = ["arc_challenge", "arc_easy", "boolq", "copa", "hellaswag", "openbook_qa"]
    nine += ["piqa", "sciq", "winogrande"]
    means = {
        entry.name: round(100 * sum(entry.accuracies[name] for name in nine) / 9, 1)
        for entry in published()
        if entry.protocol == "olmo"
    }
    assert means == {
        "OLMo-1B": 62.4,
        "Pythia-1B": 56.4,
        "TinyLlama-1.1B": 61.5,
        "StableLM-2-1.6B": 68.4,
        "OLMo-7B": 71.6,
        "Llama-7B": 68.7,
        "Llama-2-7B": 68.4,
        "Falcon-7B": 72.1,
        "MPT-7B": 71.5,
    }
    stated = {e.name: e.means("v1") for e in published() if e.protocol == "dclm"}
    assert stated["SmolLM-1.7B"] == (36.3, 21.2) and stated["OLMo-1B"] == (29.7, 16.1)
