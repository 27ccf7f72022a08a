"""Checkpoints in one process: round trips, retention, hostile files, what a path may be."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from openlm_lite import checkpoint as checkpoint_module
from openlm_lite.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    read_document,
    resolve_checkpoint,
    save_checkpoint,
)
from openlm_lite.commit import read_commit
from openlm_lite.errors import InputError
from openlm_lite.hf.weights import checkpoint_weights

Trained = tuple[nn.Module, torch.optim.Optimizer]

DOCUMENTS = {"config.yaml": "optim:\n  lr: 0.1\n", "model.json": '{"d_model": 4}\n'}


def build(hidden: int = 8, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 1) -> None:
    for step in range(steps):
        data = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        model(data).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def save(root: Path, model: nn.Module, optimizer: Any, step: int, **cfg: int) -> Path:
    state = TrainState(step, 10 * step, 2 * step)
    config = CheckpointConfig(**cfg)
    path = save_checkpoint(
        str(root), model, optimizer, state, documents=DOCUMENTS, facts={"n": 1}, cfg=config
    )
    return Path(path)


def tensors_of(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [v for o in optimizers for p in model.parameters() for v in o.state[p].values()]
    return [t.detach().clone() for t in [*model.parameters(), *states]]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def trained() -> Trained:
    model, optimizer = build()
    train(model, optimizer, steps=3)
    return model, optimizer


# --------------------------------------------------------------------------------------------
# Round trips

counts = st.integers(min_value=0, max_value=2**63 - 1)


@given(counts, counts, counts)
def test_train_state_survives_json(step: int, tokens: int, next_sample: int) -> None:
    state = TrainState(step, tokens, next_sample)
    assert TrainState.from_json(state.to_json()) == state


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"step": 1, "tokens": 2}',
        '{"step": 1, "tokens": 2, "next_sample": 3, "more": 4}',
        '{"step": 1.0, "tokens": 2, "next_sample": 3}',
        '{"step": true, "tokens": 2, "next_sample": 3}',
        '{"step": -1, "tokens": 2, "next_sample": 3}',
    ],
)
def test_a_train_state_that_is_not_exactly_one_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        TrainState.from_json(text)


def test_a_loaded_checkpoint_continues_bit_equal(tmp_path: Path, trained: Trained) -> None:
    model, optimizer = trained
    path = save(tmp_path, model, optimizer, 3)
    train(model, optimizer, steps=2)

    fresh, fresh_optimizer = build(seed=1)
    found = latest_checkpoint(str(tmp_path))
    assert found is not None and found.path == str(path) and found.facts == {"n": 1}
    assert load_checkpoint(found, fresh, fresh_optimizer) == TrainState(3, 30, 6) == found.state
    train(fresh, fresh_optimizer, steps=2)
    assert same(tensors_of(fresh, fresh_optimizer), tensors_of(model, optimizer))


def test_loading_the_weights_alone_leaves_the_optimizer_out(
    tmp_path: Path, trained: Trained
) -> None:
    model, optimizer = trained
    path = save(tmp_path, model, optimizer, 3)
    fresh, fresh_optimizer = build(seed=1)
    load_checkpoint(str(path), fresh, None)
    assert same(tensors_of(fresh), tensors_of(model))
    assert not fresh_optimizer.state


def test_saving_does_not_change_what_is_saved(tmp_path: Path) -> None:
    """An optimizer that has not stepped must not be stepped: Adam's count would be off by one."""
    model, optimizer = build()
    save(tmp_path, model, optimizer, 0)
    assert not optimizer.state
    fresh, fresh_optimizer = build(seed=1)
    train(fresh, fresh_optimizer)
    found = latest_checkpoint(str(tmp_path))
    assert found is not None
    load_checkpoint(found, fresh, fresh_optimizer)
    train(model, optimizer, steps=2)
    train(fresh, fresh_optimizer, steps=2)
    assert same(tensors_of(fresh, fresh_optimizer), tensors_of(model, optimizer))


def test_two_optimizers_over_one_model_are_both_restored(tmp_path: Path) -> None:
    def build_two(seed: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model, _ = build(seed=seed)
        weights = [p for p in model.parameters() if p.ndim == 2]
        biases = [p for p in model.parameters() if p.ndim == 1]
        return model, [torch.optim.SGD(weights, lr=0.1, momentum=0.9), torch.optim.AdamW(biases)]

    model, optimizers = build_two(0)
    train(model, *optimizers, steps=3)
    path = save(tmp_path, model, optimizers, 3)
    fresh, fresh_optimizers = build_two(1)
    load_checkpoint(str(path), fresh, fresh_optimizers)
    train(model, *optimizers)
    train(fresh, *fresh_optimizers)
    assert same(tensors_of(fresh), tensors_of(model))


def test_optimizer_state_keeps_its_own_dtype(tmp_path: Path) -> None:
    """fp32 moments of bf16 weights stay fp32 (torch's own loading would cast them)."""

    class Fp32Momentum(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                moment = self.state[p].setdefault("moment", torch.zeros(p.shape))
                moment.add_(p.grad.float(), alpha=0.123)

    def build_bf16(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(4, 2).bfloat16()
        return model, Fp32Momentum(model.parameters())

    model, optimizer = build_bf16(0)
    model(torch.ones(1, 4).bfloat16()).sum().backward()
    optimizer.step()
    path = save(tmp_path, model, optimizer, 1)
    fresh, fresh_optimizer = build_bf16(1)
    load_checkpoint(str(path), fresh, fresh_optimizer)
    loaded = tensors_of(fresh, fresh_optimizer)
    assert same(loaded, tensors_of(model, optimizer))
    assert [t.dtype for t in loaded] == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_names_do_not_depend_on_compilation_or_activation_checkpointing(
    tmp_path: Path, trained: Trained
) -> None:
    model, optimizer = trained
    path = save(tmp_path, model, optimizer, 3)
    fresh, _ = build(seed=1)
    inner = nn.Sequential(*(checkpoint_wrapper(layer) for layer in fresh.children()))
    wrapped: Any = torch.compile(inner)  # not run, so nothing is compiled
    wrapped_optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    load_checkpoint(str(path), wrapped, wrapped_optimizer)
    assert same(tensors_of(wrapped, wrapped_optimizer), tensors_of(model, optimizer))
    again = save(tmp_path / "wrapped", wrapped, wrapped_optimizer, 3)
    assert dict(checkpoint_weights(str(again))).keys() == dict(model.named_parameters()).keys()


def test_weights_and_documents_are_read_without_a_model(tmp_path: Path, trained: Trained) -> None:
    model, optimizer = trained
    path = str(save(tmp_path, model, optimizer, 3))
    weights = dict(checkpoint_weights(path))
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert {name: read_document(path, name) for name in DOCUMENTS} == DOCUMENTS
    with pytest.raises(InputError, match=r"no model\.yaml in it; it holds .*model\.json"):
        read_document(path, "model.yaml")


def test_nothing_in_a_checkpoint_names_the_machine(tmp_path: Path, trained: Trained) -> None:
    path = save(tmp_path, *trained, 3)
    for file in path.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


# --------------------------------------------------------------------------------------------
# The folder


def test_saving_a_committed_step_again_changes_nothing(tmp_path: Path, trained: Trained) -> None:
    model, optimizer = trained
    path = save(tmp_path, model, optimizer, 3)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()}
    train(model, optimizer)
    assert save(tmp_path, model, optimizer, 3) == path
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.iterdir()} == before
    other = TrainState(3, 999, 6)
    with pytest.raises(CheckpointError, match="another state"):
        save_checkpoint(
            str(tmp_path), model, optimizer, other, documents={}, facts={}, cfg=CheckpointConfig()
        )


def test_leftovers_are_removed_at_the_next_start_and_at_the_next_save(
    tmp_path: Path, trained: Trained
) -> None:
    leftover = tmp_path / ".tmp-step_00000002"
    leftover.mkdir(parents=True)
    (leftover / "__0_0.distcp").write_text("half")
    assert latest_checkpoint(str(tmp_path)) is None
    assert names_in(tmp_path) == []
    leftover.mkdir()
    save(tmp_path, *trained, 3)
    assert names_in(tmp_path) == ["step_00000003"]


def test_no_folder_means_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(str(tmp_path / "absent")) is None
    assert not (tmp_path / "absent").exists()


@settings(max_examples=12, deadline=None)
@given(
    keep_last=st.integers(1, 5),
    keep_every=st.integers(0, 4),
    gaps=st.lists(st.integers(1, 3), min_size=1, max_size=7),
    damaged=st.sets(st.integers(0, 6), max_size=2),
)
def test_retention_keeps_the_newest_and_every_nth(
    tmp_path_factory: pytest.TempPathFactory,
    keep_last: int,
    keep_every: int,
    gaps: list[int],
    damaged: set[int],
) -> None:
    """A damaged folder neither counts nor is deleted; the newest two good ones always stay."""
    root = tmp_path_factory.mktemp("kept")
    model, optimizer = build()
    steps = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    bad = {steps[i] for i in damaged if i < len(steps) - 1}
    for step in steps:
        path = save(root, model, optimizer, step, keep_last=len(steps) + 2)
        if step in bad:
            (path / "state.json").unlink()
    newest = steps[-1] + 1
    save(root, model, optimizer, newest, keep_last=keep_last, keep_every=keep_every)

    good = [step for step in [*steps, newest] if step not in bad]
    expected = set(good[-max(2, keep_last) :]) | bad
    if keep_every:
        expected |= {step for step in good if step % keep_every == 0}
    assert names_in(root) == [f"step_{step:08d}" for step in sorted(expected)]


def test_a_deletion_that_fails_only_warns(
    tmp_path: Path,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for step in (1, 2):
        save(tmp_path, *trained, step, keep_last=1)

    def denied(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", denied)
    assert save(tmp_path, *trained, 3, keep_last=1).is_dir()
    assert "could not delete the old checkpoint" in caplog.text


@pytest.mark.parametrize("field", ["every_steps", "keep_last", "keep_every"])
def test_senseless_settings_are_refused(field: str) -> None:
    with pytest.raises(InputError, match=rf"{field} = -1: must be at least"):
        CheckpointConfig(**{field: -1})


def test_too_little_space_for_the_first_checkpoint_is_said(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=500)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="500 bytes are free, a checkpoint wants"):
        save(tmp_path, *trained, 1)
    assert names_in(tmp_path) == []


def test_urls_and_bad_document_names_are_refused(tmp_path: Path, trained: Trained) -> None:
    model, optimizer = trained
    rest: Any = {"facts": {}, "cfg": CheckpointConfig()}
    with pytest.raises(InputError, match="checkpoints cannot be kept at such a URL"):
        save_checkpoint("hf://b/c", model, optimizer, TrainState(1, 1, 1), documents={}, **rest)
    for name in ("../x", "COMMIT.json", "state.json", ".metadata", "__0_0.distcp", ""):
        with pytest.raises(ValueError, match="document name"):
            save_checkpoint(
                str(tmp_path), model, optimizer, TrainState(1, 1, 1), documents={name: ""}, **rest
            )
    assert names_in(tmp_path) == []


def test_state_that_is_not_a_tensor_is_refused_before_anything_is_written(
    tmp_path: Path, trained: Trained
) -> None:
    model, optimizer = trained
    optimizer.state[next(model.parameters())]["note"] = "pickled?"
    with pytest.raises(TypeError, match=r"optim\.0\.weight\.note: only tensors can be saved"):
        save(tmp_path, model, optimizer, 1)
    assert names_in(tmp_path) == []


# --------------------------------------------------------------------------------------------
# Reading what does not fit


def test_a_renamed_step_folder_is_not_taken_for_another_step(
    tmp_path: Path, trained: Trained
) -> None:
    save(tmp_path, *trained, 3).rename(tmp_path / "step_00000009")
    assert latest_checkpoint(str(tmp_path)) is None
    assert names_in(tmp_path) == ["bad-step_00000009"]


def narrower() -> tuple[nn.Module, torch.optim.Optimizer]:
    return build(hidden=7)


def deeper() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*build()[0].children(), nn.Linear(2, 2))
    return model, torch.optim.AdamW(model.parameters())


def shallower() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(next(build()[0].children()))
    return model, torch.optim.AdamW(model.parameters())


def double() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build()[0].double()
    return model, torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (narrower, r"model\.0\.bias is torch\.float32 \[8\], here it is torch\.float32 \[7\]"),
        (deeper, r"has no tensor model\.3\.bias"),
        (shallower, r"has a tensor model\.2\.bias that is not needed here"),
        (double, r"model\.0\.bias is torch\.float32 \[8\], here it is torch\.float64 \[8\]"),
    ],
)
def test_another_architecture_is_refused_by_the_name_of_a_tensor(
    tmp_path: Path, trained: Trained, other: Any, message: str
) -> None:
    path = save(tmp_path, *trained, 3)
    model, optimizer = other()
    before = tensors_of(model)
    with pytest.raises(InputError, match=f"{message}.*another architecture"):
        load_checkpoint(str(path), model, optimizer)
    assert same(tensors_of(model), before) and not optimizer.state


def test_another_optimizer_is_refused_and_the_model_untouched(
    tmp_path: Path, trained: Trained
) -> None:
    path = save(tmp_path, *trained, 3)
    model, _ = build(seed=1)
    before = tensors_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(InputError, match=r"optim\.0\.bias\.exp_avg .*another optimizer"):
        load_checkpoint(str(path), model, optimizer)
    assert same(tensors_of(model), before)


# --------------------------------------------------------------------------------------------
# What a path may be


def test_a_run_a_checkpoints_folder_or_a_step_folder_resolves(
    tmp_path: Path, trained: Trained
) -> None:
    root = tmp_path / "run" / "checkpoints"
    save(root, *trained, 3)
    newest = str(save(root, *trained, 4))
    for path in (tmp_path / "run", root, f"{root}/", newest, f"{newest}/"):
        assert resolve_checkpoint(str(path)) == newest
    assert resolve_checkpoint(str(root / "step_00000003")) == str(root / "step_00000003")


def test_resolving_passes_over_a_damaged_checkpoint_without_touching_it(
    tmp_path: Path, trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    good = save(tmp_path, *trained, 3)
    bad = save(tmp_path, *trained, 4)
    (bad / "state.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert resolve_checkpoint(str(tmp_path)) == str(good)
    assert "step_00000004 is damaged (state.json has 2 bytes" in caplog.text
    assert names_in(tmp_path) == ["step_00000003", "step_00000004"]
    shutil.rmtree(good)
    with pytest.raises(InputError, match="all checkpoints are damaged: step_00000004"):
        resolve_checkpoint(str(tmp_path))


def test_other_paths_say_what_was_found_and_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "step_00000007").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "things").mkdir(parents=True)
    for name, message in {
        "absent": "found nothing",
        "file.txt": "found a file",
        "step_00000007": r"no COMMIT\.json",
        "empty": r"no step_… folder in it \(found: nothing\)",
        "run": r"checkpoints: no step_… folder in it \(found: nothing\)",
        "other": r"\(found: things\)",
        "s3://x": "is no folder in a bucket",
    }.items():
        path = name if "://" in name else str(tmp_path / name)
        with pytest.raises(InputError, match=message):
            resolve_checkpoint(path)


def test_a_commit_can_be_read_without_reading_the_data(tmp_path: Path, trained: Trained) -> None:
    path = save(tmp_path, *trained, 3)
    (path / "__0_0.distcp").unlink()
    commit = read_commit(str(path))
    assert (commit.step, commit.world_size, commit.facts) == (3, 1, {"n": 1})
