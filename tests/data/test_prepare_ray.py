"""On Ray the same functions make the same bytes, and the same errors."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from openlm_lite.data import prepare_ray
from openlm_lite.data.plan import PrepareConfig
from openlm_lite.data.prepare import prepare
from openlm_lite.errors import InputError
from tests.data.prepare_corpus import files_of, make_texts, train_small_tokenizer, write_lines

pytestmark = [
    pytest.mark.slow,  # starting a cluster takes 10 s
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers on this machine."""
    ray = pytest.importorskip("ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own modules
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "warning"}
        ray.init(address="local", num_cpus=2, **quiet)
    yield
    ray.shutdown()


@pytest.fixture
def cfg(tmp_path: Path) -> PrepareConfig:
    texts = make_texts(12_000)
    write_lines(tmp_path / "in" / "a.jsonl", texts)
    write_lines(tmp_path / "in" / "b.jsonl", texts[:6000])
    return PrepareConfig(
        inputs=(str(tmp_path / "in"),),
        out=str(tmp_path / "ray"),
        tokenizer=train_small_tokenizer(tmp_path / "tokenizer"),
        block_tokens=4096,
        blocks_per_shard=8,
        val_fraction=0.1,
        dedup=True,
        weight=(f"{tmp_path / 'in'}=1.5",),
        executor="ray",
    )


def test_two_ray_workers_make_the_bytes_of_the_local_run(
    cluster: None, cfg: PrepareConfig, tmp_path: Path
) -> None:
    on_ray = prepare(cfg)
    local = prepare(
        dataclasses.replace(cfg, executor="local", workers=1, out=str(tmp_path / "local"))
    )
    assert files_of(cfg.out) == files_of(tmp_path / "local")
    assert on_ray.dropped == local.dropped == {"duplicate": 6000}
    assert on_ray.splits["train"].n_shards > 3
    # so either may finish or repeat the work of the other
    assert prepare(dataclasses.replace(cfg, executor="local")).already_done


def test_bad_input_on_a_ray_worker_is_the_same_one_error(
    cluster: None, cfg: PrepareConfig, tmp_path: Path
) -> None:
    with open(tmp_path / "in" / "b.jsonl", "a") as file:
        file.write("{broken\n")
    with pytest.raises(InputError, match=r"b\.jsonl:6001: not a JSON value") as caught:
        prepare(cfg)
    assert "Traceback" not in str(caught.value)
    assert not Path(cfg.out).exists()


def test_only_some_tasks_wait_at_a_time(cluster: None, tmp_path: Path) -> None:
    handed_out = []

    class Jobs(list[int]):
        def __iter__(self) -> Iterator[int]:
            for job in super().__iter__():
                handed_out.append(job)
                yield job

    found = []
    for job, result in prepare_ray.each_done(divmod, Jobs(range(40)), (7,), 2):
        found.append((job, result))
        assert len(handed_out) <= len(found) + 4
    assert sorted(found) == [(i, divmod(i, 7)) for i in range(40)]


def test_without_ray_the_error_says_what_to_install(
    cfg: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "openlm-lite\[ray\]"'):
        prepare(cfg)
    assert not Path(cfg.out).exists()


def test_a_cluster_that_does_not_answer_is_one_error(cfg: PrepareConfig) -> None:
    ray = pytest.importorskip("ray")
    ray.shutdown()
    with pytest.raises(InputError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 "):
        prepare(dataclasses.replace(cfg, ray_address="127.0.0.1:1"))
    assert not Path(cfg.out).exists()
