"""`openlm average`: equal to plain arithmetic, streamed, recorded; mistakes are told together."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openlm_lite.average.soup import average_models, mean_weights
from openlm_lite.checkpoint import resolve_checkpoint
from openlm_lite.cli import main
from openlm_lite.commit import read_commit
from openlm_lite.config import to_plain
from openlm_lite.errors import InputError
from openlm_lite.hf.compare import our_logits
from openlm_lite.hf.source import Source, open_source, read_model
from openlm_lite.hf.weights import Weights, checkpoint_weights
from openlm_lite.weights_io import save_weights
from tests.tiny_run import save_tiny_run, tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a, b, c: three runs of one architecture and tokenizer; wide: of another width."""
    root, tokenizer = tmp_path_factory.mktemp("soup"), tiny_tokenizer()
    for seed, name in enumerate("abc"):
        save_tiny_run(root / name, tiny_model(tiny_config(), seed), tokenizer)
    save_tiny_run(root / "wide", tiny_model(tiny_config(d_ff=64, norm="rms_norm")), tokenizer)
    return root


def weights_of(path: Path) -> dict[str, Tensor]:
    return dict(checkpoint_weights(resolve_checkpoint(str(path))))


def tensors_at(folder: Path, tensors: dict[str, Tensor], **facts: Any) -> str:
    """A checkpoint of weights alone, of the tiny architecture."""
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    documents = {"model.json": json.dumps(to_plain(tiny_config()))}
    weights = Weights("here", shapes, tensors.__getitem__)
    save_weights(str(folder), weights, documents=documents, facts=facts)
    return str(folder)


# --- what comes out ------------------------------------------------------------------------------


def test_a_soup_is_plain_arithmetic_and_its_record_says_what_is_in_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "soup"
    words = ["average", str(out), f"{runs}/b=0.8", f"{runs}/a=0.2", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    a, b, found = weights_of(runs / "a"), weights_of(runs / "b"), weights_of(out)
    assert found.keys() == a.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, torch.add(b[name] * 0.8, a[name], alpha=0.2))
    parts = read_commit(str(out)).facts["soup"]
    assert [(part["weight"], part["step"], part["tokens"]) for part in parts] == [
        (0.8, 7, 7),
        (0.2, 7, 7),
    ]
    assert [part["path"] for part in parts] == [
        str(runs / name / "checkpoints" / "step_00000007") for name in "ba"
    ]
    assert all(len(part["commit_sha256"]) == 64 for part in parts)
    assert report["path"] == str(out) and not report["normalised"] and report["tokenizer"]
    assert [part["weight"] for part in report["sources"]] == [0.8, 0.2]


@given(weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
@settings(max_examples=4)
def test_any_weights_are_divided_by_their_sum_on_request(
    runs: Path, tmp_path_factory: pytest.TempPathFactory, weights: list[float]
) -> None:
    out = tmp_path_factory.mktemp("any") / "out"
    words = [f"{runs}/{name}={weight}" for name, weight in zip("abc", weights, strict=True)]
    report = average_models(str(out), words, normalise=True)
    assert sum(part["weight"] for part in report.sources) == pytest.approx(1)
    models = [weights_of(runs / name) for name in "abc"]
    for name, tensor in weights_of(out).items():
        pairs = zip(models, weights, strict=True)
        expected = sum(model[name].double() * weight for model, weight in pairs) / sum(weights)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


def test_without_weights_all_weigh_the_same(runs: Path, tmp_path: Path) -> None:
    report = average_models(str(tmp_path / "out"), [f"{runs}/{name}" for name in "abc"])
    assert [part["weight"] for part in report.sources] == [1 / 3] * 3
    models = [weights_of(runs / name) for name in "abc"]
    for name, tensor in weights_of(tmp_path / "out").items():
        expected = torch.stack([model[name] for model in models]).double().mean(0).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)


def test_all_that_takes_a_checkpoint_takes_a_soup(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    out, hf = tmp_path / "soup", tmp_path / "hf"
    average_models(str(out), [f"{runs}/a", f"{runs}/b"])
    assert main(["export", str(out), str(hf), "--json"]) == 0
    assert "commit_sha256" in (hf / "README.md").read_text()
    assert str(runs) not in (hf / "README.md").read_text()
    assert main(["generate", str(out), "A small", "--max-new-tokens", "3"]) == 0
    assert main(["inspect", str(out), "--verify"]) == 0
    capsys.readouterr()
    # And a soup of soups, one of them as an exported folder. That one is centred, the other is
    # not: the sum, too, is the same up to what a LayerNorm takes off.
    again = tmp_path / "again"
    average_models(str(again), [f"{hf}=0.5", f"{runs}/c=0.5"])
    half, c = weights_of(out), weights_of(runs / "c")
    expected = our_logits(tiny_config(), {n: 0.5 * half[n] + 0.5 * c[n] for n in half})
    found = our_logits(tiny_config(), weights_of(again))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert read_model(str(again)).cfg == tiny_config()


def test_bf16_sources_are_summed_in_fp32(runs: Path, tmp_path: Path) -> None:
    a, b = weights_of(runs / "a"), weights_of(runs / "b")
    cfg = tiny_config()
    shapes = {n: tuple(t.shape) for n, t in a.items()}
    sources = [
        Source(name, "weights", cfg, Weights(name, shapes, lambda n, t=t: t[n].bfloat16()), {})
        for name, t in (("a", a), ("b", b))
    ]
    mean = mean_weights("here", sources, [0.3, 0.7])
    for name in shapes:
        expected = a[name].bfloat16().float() * 0.3 + b[name].bfloat16().float() * 0.7
        torch.testing.assert_close(mean[name], expected, rtol=1e-6, atol=1e-7)


def test_an_average_of_four_models_has_two_tensors_in_memory() -> None:
    """At each question there is the sum so far, and nothing of what was given before."""
    given: list[weakref.ref[Tensor]] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in given) + 1)
        tensor = torch.full((4,), float(len(given)))
        given.append(weakref.ref(tensor))
        return tensor

    names = [f"w{i}" for i in range(5)]
    weights = Weights("here", dict.fromkeys(names, (4,)), read)
    sources = [Source(str(i), "weights", tiny_config(), weights, {}) for i in range(4)]
    mean = mean_weights("here", sources, [0.25] * 4)
    found = [float(mean[name][0]) for name in names]
    assert found == [1.5, 5.5, 9.5, 13.5, 17.5]
    assert most == 2 and len(given) == 20


# --- the checkpoints of one run ------------------------------------------------------------------


@pytest.fixture
def trunk(runs: Path, tmp_path: Path) -> Path:
    """A run with checkpoints of five steps, each filled with its step."""
    root = tmp_path / "trunk"
    shapes = {name: tuple(t.shape) for name, t in weights_of(runs / "a").items()}
    for step in (2, 4, 6, 9, 10):
        folder = root / "checkpoints" / f"step_{step:08d}"
        values = {name: torch.full(shape, float(step)) for name, shape in shapes.items()}
        # weights alone have step 0: written under another name, then said to be of `step`
        tensors_at(root / "w", values)
        _move_to_step(root / "w", folder, step)
    return root


def _move_to_step(written: Path, folder: Path, step: int) -> None:
    from openlm_lite.commit import Commit, TrainState, encode_commit

    commit = read_commit(str(written))
    state = TrainState(step, step, step)
    (written / "COMMIT.json").write_text(
        encode_commit(Commit(str(folder), state, 1, commit.facts, commit.files))
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(written, folder)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--last", "2"], [9, 10]),
        (["--last", "5"], [2, 4, 6, 9, 10]),
        (["--last", "3", "--every", "2"], [4, 6, 10]),
    ],
)
def test_the_last_checkpoints_of_a_run_have_their_plain_mean(
    trunk: Path,
    tmp_path: Path,
    words: list[str],
    steps: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i, run in enumerate((trunk, trunk / "checkpoints")):
        out = tmp_path / str(i)
        assert main(["average", str(out), str(run), *words, "--json"]) == 0
        assert [part["step"] for part in json.loads(capsys.readouterr().out)["sources"]] == steps
        for tensor in weights_of(out).values():
            torch.testing.assert_close(tensor, torch.full_like(tensor, sum(steps) / len(steps)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--last", "6"], "wants 6 checkpoints, but 5 fit; there are those of the steps: 2, 4, 6"),
        (["--last", "3", "--every", "3"], "wants 3 checkpoints, but 2 fit"),
        (["--last", "1"], "--last 1: must be at least 2"),
        (["--last", "2", "--every", "0"], "--every 0: must be at least 1"),
        (["--last", "2", "--normalise"], "--last takes one run, without weights"),
        (["--every", "2"], "--every goes with --last"),
    ],
)
def test_last_says_what_it_cannot_have(
    trunk: Path,
    tmp_path: Path,
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["average", str(tmp_path / "out"), str(trunk), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- bad input -----------------------------------------------------------------------------------


def _copy(runs: Path) -> str:
    shutil.copytree(runs / "a", runs / "copy", dirs_exist_ok=True)
    return f"{runs}/copy"


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a sum that is not 1": (
        lambda r: [f"{r}/a=0.8", f"{r}/b=0.3"],
        "the weights sum to 1.1, not to 1; correct them, or divide them by their sum with "
        "--normalise",
    ),
    "a weight that is NaN, and one of 0": (
        lambda r: [f"{r}/a=nan", f"{r}/b=0"],
        "a=nan: a weight must be a number other than 0; ",
    ),
    "some without weights": (
        lambda r: [f"{r}/a=0.5", f"{r}/b"],
        "b, but for others; write SOURCE=WEIGHT for all of them, or for none",
    ),
    "a weight that is no number": (
        lambda r: [f"{r}/a=half", f"{r}/b=0.5"],
        "'half' is no number; give SOURCE or SOURCE=WEIGHT",
    ),
    "one source": (lambda r: [f"{r}/a"], "an average needs two sources or more"),
    "the same one twice": (
        lambda r: [f"{r}/a=0.5", f"{r}/a/checkpoints=0.5"],
        "stands twice; name it once, with the sum of the weights",
    ),
    "a copy": (lambda r: [f"{r}/a", _copy(r)], "is a copy of "),
    "nothing there": (lambda r: [f"{r}/a", f"{r}/nope"], "nope: found nothing"),
    "a file of weights": (
        lambda r: [f"{r}/a", f"{r}/a/tokenizer.json"],
        "make a checkpoint of it first: openlm import",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_and_nothing_is_written(
    runs: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, said = BAD[case]
    assert main(["average", str(tmp_path / "out"), *words(runs)]) == 2
    text = capsys.readouterr().err
    assert said in text and "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_all_differences_of_architectures_come_in_one_message(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        average_models(str(tmp_path / "out"), [f"{runs}/a", f"{runs}/b", f"{runs}/wide"])
    text = str(caught.value)
    assert "d_ff: 64, but 48 in " in text and "norm: rms_norm, but layer_norm in " in text
    assert "layers.0.feed_forward.w_up.weight: [64, 32], but [48, 32] in " in text
    assert text.count("\n") == 1 + 2 + 6 - 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_and_leave_nothing(
    runs: Path, tmp_path: Path, value: float
) -> None:
    tensors = weights_of(runs / "a")
    tensors["layers.1.attention.wo.weight"][3, 5] = value
    bad = tensors_at(tmp_path / "bad", tensors)
    with pytest.raises(InputError, match=r"bad: tensor layers\.1\.attention\.wo\.weight has 1 val"):
        average_models(str(tmp_path / "out"), [f"{runs}/b", bad])
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_what_is_there_is_neither_overwritten_nor_written_into(runs: Path, tmp_path: Path) -> None:
    sources = [f"{runs}/a", f"{runs}/b"]
    with pytest.raises(InputError, match="exists and is no empty folder"):
        average_models(str(runs), sources)  # with both sources in it
    step = resolve_checkpoint(str(runs / "a"))
    with pytest.raises(InputError, match="lies in the source"):
        average_models(f"{step}/soup", sources)
    with pytest.raises(InputError, match="give a local folder"):
        average_models("s3://bucket/soup", sources)
    assert sorted(p.name for p in Path(step).iterdir()) == sorted(
        [*read_commit(step).files, "COMMIT.json"]
    )


def test_a_path_with_an_equals_sign_is_a_path_where_something_is_there(
    runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "a", tmp_path / "lr=0.5")
    out = tmp_path / "out"
    report = average_models(str(out), [f"{tmp_path}/lr=0.5", f"{runs}/b"])
    assert [part["weight"] for part in report.sources] == [0.5, 0.5]
    shutil.rmtree(out)
    report = average_models(str(out), [f"{tmp_path}/lr=0.5=0.75", f"{runs}/b=0.25"])
    assert [part["weight"] for part in report.sources] == [0.75, 0.25]


def test_another_tokenizer_is_told(runs: Path, tmp_path: Path) -> None:
    from openlm_lite.data.tokenizer import train_bpe

    other = train_bpe(iter(["quite another text, of other words, for other ids " * 9]), 280)
    save_tiny_run(tmp_path / "other", tiny_model(tiny_config(), 5), other)
    report = average_models(str(tmp_path / "out"), [f"{runs}/a", str(tmp_path / "other")])
    assert len(report.notes) == 1 and "another tokenizer" in report.notes[0]
    ours, found = (runs / "a" / "tokenizer.json", tmp_path / "out" / "tokenizer.json")
    assert ours.read_text() == found.read_text()
    assert open_source(str(tmp_path / "out")).facts["notes"] == report.notes
