"""Averages of a run by themselves: their formulas, their memory, their place in a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from openlm_lite.average.config import AverageConfig
from openlm_lite.average.running import Averages
from openlm_lite.average.saved import mean_of, saved_average
from openlm_lite.checkpoint import CheckpointConfig, load_checkpoint, save_checkpoint
from openlm_lite.commit import Commit, TrainState, read_commit
from openlm_lite.config import ConfigError
from openlm_lite.derived import memory_need
from openlm_lite.errors import InputError
from openlm_lite.hf.weights import checkpoint_weights
from openlm_lite.memory import parts_of
from openlm_lite.run import load_run
from tests.tiny_run import process_group

EMA = AverageConfig("ema", decay=0.9)


class Model(nn.Module):
    """One vector, which a test sets as it likes."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))

    def put(self, values: Any) -> None:
        with torch.no_grad():
            self.w.copy_(torch.as_tensor(values, dtype=torch.float32))


def value_of(averages: Averages, model: Model, name: str) -> np.ndarray:
    with averages.in_place(name):
        return model.w.detach().double().numpy().copy()


def numbers() -> st.SearchStrategy[list[list[float]]]:
    one = st.floats(-4, 4, width=32)
    return st.lists(st.lists(one, min_size=2, max_size=2), min_size=2, max_size=25)


def run(cfg: AverageConfig, weights: list[list[float]]) -> dict[int, np.ndarray]:
    """Step -> the average after it, of a run whose weights after step s are weights[s]."""
    model = Model(*weights[0])
    averages = Averages({"a": cfg}, model)
    averages.begin(0)
    found = {}
    for step, values in enumerate(weights[1:], 1):
        model.put(values)
        averages.update(step)
        assert torch.equal(model.w.detach(), torch.tensor(values))
        if averages.updated:
            found[step] = value_of(averages, model, "a")
    return found


# --- formulas ------------------------------------------------------------------------------------


@given(
    numbers(),
    st.floats(0, 0.999),
    st.one_of(st.none(), st.floats(0.1, 2)),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_ema_is_the_written_out_sum_over_all_updates(
    weights: list[list[float]], decay: float, power: float | None, every: int, start: int
) -> None:
    cfg = AverageConfig("ema", every, start, decay=decay, warmup_power=power)
    found = run(cfg, weights)
    w = np.array(weights)
    for step, value in found.items():
        updates = range(start + every, step + 1, every)
        decays = [
            decay if power is None else min(decay, 1 - (1 + s - start) ** -power) for s in updates
        ]
        # a = sum over the updates of (1 - d_i) w_i times all later decays, and the first weights
        expected = w[start] * np.prod(decays)
        for i, s in enumerate(updates):
            expected = expected + (1 - decays[i]) * np.prod(decays[i + 1 :]) * w[s]
        np.testing.assert_allclose(value, expected, atol=2e-5)
    assert set(found) == {s for s in range(1, len(w)) if s >= start + every}


@given(numbers(), st.floats(0, 64), st.integers(1, 3))
def test_poly_is_openlms_rule(weights: list[list[float]], eta: float, every: int) -> None:
    """avg (1 - (eta + 1) / (eta + t)) + w (eta + 1) / (eta + t), from the first weights on."""
    found = run(AverageConfig("poly", every, eta=eta), weights)
    average, t = np.array(weights[0]), 1
    for step, w in enumerate(weights[1:], 1):
        if step % every == 0:
            average = average * (1 - (eta + 1) / (eta + t)) + np.array(w) * (eta + 1) / (eta + t)
            t += 1
        if step in found:
            np.testing.assert_allclose(found[step], average, atol=2e-5)


@given(numbers())
def test_poly_with_eta_0_is_the_mean_of_all_weights(weights: list[list[float]]) -> None:
    for step, value in run(AverageConfig("poly", eta=0.0), weights).items():
        np.testing.assert_allclose(value, np.mean(weights[1 : step + 1], axis=0), atol=2e-5)


@given(numbers(), st.integers(2, 6), st.integers(1, 3), st.integers(0, 4))
def test_lawa_is_the_mean_of_the_latest_snapshots_at_the_interval(
    weights: list[list[float]], k: int, every: int, start: int
) -> None:
    for step, value in run(AverageConfig("lawa", every, start, snapshots=k), weights).items():
        taken = [weights[s] for s in range(start + every, step + 1, every)]
        np.testing.assert_allclose(value, np.mean(taken[-k:], axis=0), atol=2e-6)


def test_lawa_does_not_drift(  # as a running sum in fp32 would, after one large value
) -> None:
    weights = [[0.0, 0.0], [1e8, 1e8], *([[0.1, 0.2]] * 5)]
    found = run(AverageConfig("lawa", snapshots=2), weights)
    assert torch.equal(torch.tensor(found[6]).float(), torch.tensor([0.1, 0.2]))


def test_equal_weights_have_exactly_themselves_as_every_average() -> None:
    weights = [[0.1, -0.3]] * 20
    kinds = [EMA, AverageConfig("poly", eta=3.0), AverageConfig("lawa", snapshots=4)]
    for cfg in kinds:
        for value in run(cfg, weights).values():
            assert torch.equal(torch.tensor(value).float(), torch.tensor(weights[0]))


# --- in a run ------------------------------------------------------------------------------------


def test_the_weights_are_the_same_bits_after_the_average_was_in_their_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    averages = Averages({"a": EMA, "l": AverageConfig("lawa", snapshots=2)}, model)
    averages.begin(0)
    for step in (1, 2, 3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        averages.update(step)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    kept = {n: t.clone() for n, t in averages.tensors().items()}

    def unchanged() -> bool:
        now = averages.tensors()
        return all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and all(
            torch.equal(now[n], kept[n]) for n in kept
        )

    for name in averages.updated:
        with averages.in_place(name):
            assert not torch.equal(next(model.parameters()), before["0.weight"])
        assert unchanged()
        with pytest.raises(KeyError), averages.in_place(name):
            raise KeyError
        assert unchanged()


def test_an_average_that_has_not_begun_is_neither_saved_nor_validated() -> None:
    model = Model(1.0, 2.0)
    averages = Averages({"late": AverageConfig("ema", 2, 3, decay=0.5)}, model)
    assert averages.begin(0) == []
    for step, saved, ready in ((1, 0, ()), (3, 1, ()), (4, 1, ()), (5, 1, ("late",))):
        averages.update(step)
        assert (len(averages.tensors()), averages.updated) == (saved, ready)
    facts = averages.facts()["averages"]["late"]
    assert facts == {"kind": "ema", "copies": 1, "since": 3, "updates": 1, "held": 1}


def test_a_run_without_averages_says_and_saves_nothing_of_them() -> None:
    averages = Averages({}, Model(1.0))
    averages.update(1)
    assert averages.tensors() == {} and averages.facts() == {} and averages.begin(1) == []


def test_the_memory_estimate_counts_every_copy(toy_recipe: Path) -> None:
    plain = load_run(str(toy_recipe))
    two = load_run(
        str(toy_recipe),
        ["averages={a: {kind: ema, decay: 0.9}, l: {kind: lawa, snapshots: 5}}"],
    )
    one, both = (parts_of(memory_need(cfg, 1)).total for cfg in (plain, two))
    assert both - one == 6 * 4 * plain.model.n_params
    model = Model(*[0.0] * 10)
    averages = Averages(two.averages, model)
    held = sum(t.nbytes for one in averages._all.values() for slot in one.slots for t in slot)
    assert held == 6 * 4 * 10


# --- in a checkpoint -----------------------------------------------------------------------------


def saved(folder: Path, cfgs: Mapping[str, AverageConfig], steps: int) -> tuple[str, Averages]:
    """A checkpoint after `steps` steps, and the averages that are in it."""
    model = Model(0.0, 0.0)
    averages = Averages(cfgs, model)
    averages.begin(0)
    for step in range(1, steps + 1):
        model.put([float(step), step**0.5])
        averages.update(step)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with process_group():
        path = save_checkpoint(
            str(folder),
            model,
            optimizer,
            TrainState(steps, steps, steps),
            documents={},
            facts=averages.facts(),
            cfg=CheckpointConfig(),
            averages=averages.tensors(),
        )
    return path, averages


def restored(path: str, cfgs: Mapping[str, AverageConfig]) -> tuple[Averages, Model, list[str]]:
    model = Model(9.0, 9.0)
    averages = Averages(cfgs, model)
    with process_group():
        kept = averages.of_checkpoint(read_commit(path))
        step = load_checkpoint(path, model, None, kept).step
    return averages, model, averages.begin(step)


MIXED = {
    "e": EMA,
    "l": AverageConfig("lawa", 2, snapshots=3),
    "late": AverageConfig("poly", start_step=90, eta=1.0),
}


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_averages_come_back_from_a_checkpoint_and_go_on_as_they_would_have(
    tmp_path: Path, steps: int
) -> None:
    path, there = saved(tmp_path, MIXED, steps)
    here, model, news = restored(path, MIXED)
    assert news == [] and here.facts() == there.facts()
    whole = Averages(MIXED, other := Model(0.0, 0.0))
    whole.begin(0)
    for step in range(1, steps + 8):
        other.put([float(step), step**0.5])
        whole.update(step)
        if step > steps:
            model.put([float(step), step**0.5])
            here.update(step)
    assert here.facts() == whole.facts()
    ours, theirs = here.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_an_average_read_from_a_checkpoint_has_the_bits_that_it_has_in_the_run(
    tmp_path: Path,
) -> None:
    path, averages = saved(tmp_path, MIXED, 7)
    with averages.in_place("l"):
        expected = averages._model.w.detach().clone()  # pyright: ignore
    assert torch.equal(checkpoint_weights(path, "l")["w"], expected)
    assert torch.equal(checkpoint_weights(path)["w"], torch.tensor([7.0, 7**0.5]))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x", "the average 'x' is not in this checkpoint; it holds e, l"),
        ("late", "the average 'late' has had no update yet; it holds e, l"),
    ],
)
def test_an_unknown_average_lists_those_that_exist(tmp_path: Path, name: str, said: str) -> None:
    path, _ = saved(tmp_path, MIXED, 7)
    with pytest.raises(InputError, match=re.escape(said)):
        checkpoint_weights(path, name)
    path, _ = saved(tmp_path / "none", {}, 2)
    with pytest.raises(InputError, match="it holds no average of weights"):
        checkpoint_weights(path, name)


def test_a_new_average_begins_with_the_weights_there_and_others_are_given_up(
    tmp_path: Path,
) -> None:
    path, _ = saved(tmp_path, MIXED, 6)
    changed = {
        "new": EMA,
        "l": AverageConfig("lawa", 2, snapshots=4),
        "later": AverageConfig("ema", start_step=8, decay=0.5),
    }
    here, model, news = restored(path, changed)
    assert [line.split(":")[0] for line in news] == [
        "average e",
        "average late",
        "average new",
        "average l",
    ]
    assert news[0].endswith("no more in the configuration: given up")
    assert news[2] == "average new: not in the checkpoint: begins with the weights of step 6"
    assert "copies is 3 in the checkpoint, 4 in the configuration" in news[3]
    assert here.updated == () and here.facts()["averages"]["later"]["since"] is None
    model.put([16.0, 6**0.5])
    here.update(7)
    assert value_of(here, model, "new")[0] == pytest.approx(6 + 0.1 * 10)


@pytest.mark.parametrize(
    "facts",
    [
        {"averages": 3},
        {"averages": {"a": None}},
        {"averages": {"a": {"kind": "ema"}}},
        {
            "averages": {
                "a": {"kind": "lawa", "copies": 2, "since": 0, "updates": 10**12, "held": 10**12}
            }
        },
        {"averages": {"a": {"kind": "ema", "copies": 1, "since": 0, "updates": 3, "held": -1}}},
    ],
)
def test_nonsense_in_a_checkpoint_is_told_and_costs_nothing(facts: dict[str, Any]) -> None:
    commit = Commit("there", TrainState(1, 1, 1), 1, facts, {})
    with pytest.raises(InputError, match=r"there: .*use another"):
        saved_average(commit, ["model.w", "average.a.0.w"], "a")


def test_the_mean_is_a_tensor_of_its_own() -> None:
    one = torch.ones(3)
    for tensors in ([one], [one, one]):
        mean_of(tensors).zero_()
    assert one.sum() == 3


# --- what a recipe may say -----------------------------------------------------------------------


def test_all_mistakes_in_the_averages_come_at_once(toy_recipe: Path) -> None:
    words = [
        "averages={no.dots: {kind: ema, decay: 1.0}, a: {kind: ema}, p: {kind: poly, eta: -1, "
        "snapshots: 3}, l: {kind: lawa, snapshots: 1, every_steps: 0, start_step: 12}, "
        "w: {kind: ema, decay: 0.5, warmup_power: 0}}",
    ]
    with pytest.raises(ConfigError) as caught:
        load_run(str(toy_recipe), words)
    text = str(caught.value)
    for expected in (
        "averages.no.dots: names are made of letters",
        "averages.no.dots.decay = 1.0, must be in [0, 1)",
        "averages.a.decay: missing; kind ema needs it",
        "averages.p.eta = -1.0, must be at least 0",
        "averages.p.snapshots = 3: kind poly has no such field",
        "averages.l.snapshots = 1, must be at least 2",
        "averages.l.every_steps = 0, must be at least 1",
        "averages.l: start_step = 12, but the run has 12 steps: it would never begin",
        "averages.w.warmup_power = 0.0, must be above 0",
    ):
        assert expected in text
    with pytest.raises(ConfigError, match=r"averages\.a\.kind: 'emma' is none of ema"):
        load_run(str(toy_recipe), ["averages={a: {kind: emma}}"])


def test_the_recipe_in_the_documentation_loads(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "averages.md").read_text()
    (tmp_path / "recipe.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    cfg = load_run(str(tmp_path / "recipe.yaml"))
    assert {name: one.copies for name, one in cfg.averages.items()} == {
        "ema": 1,
        "poly": 1,
        "lawa": 5,
    }


def test_a_validation_source_and_an_average_may_not_share_a_metric(toy_recipe: Path) -> None:
    data = toy_recipe.parent / "data" / "val"
    words = [f"data.val={{toy: {data}, toy/a: {data}}}", "averages.a={kind: ema, decay: 0.5}"]
    with pytest.raises(ConfigError, match=r"data\.val\.toy/a: is also what an average is called"):
        load_run(str(toy_recipe), words)
