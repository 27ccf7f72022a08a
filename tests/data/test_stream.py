"""The batches: the same at any world size, from any point, each row once per epoch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openlm_lite.data.dataset import Dataset, check_fits_model, open_dataset
from openlm_lite.data.stream import IGNORE_INDEX, Batch, TokenStream, train_batches, val_batches
from openlm_lite.errors import InputError

SHARED = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def dataset(make_dataset: Callable[..., Path]) -> Dataset:
    return open_dataset(str(make_dataset()))


def take(
    stream: TokenStream,
    count: int,
    *,
    first: int = 0,
    batch: int = 4,
    rank: int = 0,
    world: int = 1,
) -> list[Batch]:
    """The first `count` batches of a rank, without the thread."""
    batches = train_batches(
        stream, first_sample=first, global_batch=batch, rank=rank, world_size=world, prefetch=0
    )
    return list(itertools.islice(batches, count))


def test_a_row_is_the_block_s_ids_and_targets_are_shifted_by_one(dataset: Dataset) -> None:
    stream = TokenStream(dataset, seq_len=16, seed=1, shuffle_shards=2)
    batch = take(stream, 1, batch=8)[0]
    assert batch.tokens_BT.shape == batch.targets_BT.shape == (8, 16)
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
    assert batch.tokens_BT.is_contiguous()
    assert batch.targets_BT.is_contiguous()
    blocks_before = [0, 3, 7]
    for i in range(8):
        _, shard, block, row = stream.locate(i)
        start = (blocks_before[shard] + block) * 64 + row * 16  # the fixture's ids count upwards
        assert batch.tokens_BT[i].tolist() == list(range(start, start + 16))
        assert batch.targets_BT[i].tolist() == list(range(start + 1, start + 17))


def test_one_epoch_trains_on_every_target_exactly_once(dataset: Dataset) -> None:
    for seq_len in (1, 2, 4, 16, 64):
        stream = TokenStream(dataset, seq_len, seed=3, shuffle_shards=2)
        assert stream.rows_per_epoch == dataset.n_rows(seq_len) == 9 * 64 // seq_len
        rows = stream.rows(np.arange(2 * stream.rows_per_epoch, 3 * stream.rows_per_epoch))
        assert sorted(rows[:, 1:].reshape(-1).tolist()) == list(range(1, 9 * 64 + 1))


@settings(SHARED, max_examples=12)  # each reads up to eight streams
@given(
    world=st.integers(1, 7),
    extra=st.integers(0, 9),
    first=st.integers(0, 200),
    seed=st.integers(0, 50),
    window=st.integers(1, 4),
)
def test_the_global_batches_are_the_same_at_any_world_size(
    dataset: Dataset, world: int, extra: int, first: int, seed: int, window: int
) -> None:
    stream = TokenStream(dataset, 16, seed, window)
    size = world + extra
    alone = take(stream, 3, first=first, batch=size)
    ranks = [take(stream, 3, first=first, batch=size, rank=r, world=world) for r in range(world)]
    for step, whole in enumerate(alone):
        assert whole.first_index == first + step * size
        joined = torch.empty_like(whole.tokens_BT)
        for rank, batches in enumerate(ranks):
            assert batches[step].first_index == whole.first_index
            joined[rank::world] = batches[step].tokens_BT
        assert torch.equal(joined, whole.tokens_BT)


@SHARED
@given(stop=st.integers(1, 60), before=st.integers(1, 6), after=st.integers(1, 6))
def test_resume_with_another_batch_size_goes_on_with_the_next_sample(
    dataset: Dataset, stop: int, before: int, after: int
) -> None:
    stream = TokenStream(dataset, 16, seed=0, shuffle_shards=2)
    stop -= stop % before
    first = [b.tokens_BT for b in take(stream, stop // before, batch=before)]
    again = TokenStream(dataset, 16, seed=0, shuffle_shards=2)
    rest = [b.tokens_BT for b in take(again, 5, first=stop, batch=after)]
    total = stop + 5 * after
    uninterrupted = torch.from_numpy(stream.rows(np.arange(total))[:, :-1])
    assert torch.equal(torch.cat(first + rest), uninterrupted)


def test_the_epoch_is_known_for_every_sample(dataset: Dataset) -> None:
    stream = TokenStream(dataset, 16, seed=0, shuffle_shards=2)
    assert [stream.locate(i)[0] for i in (0, 35, 36, 72)] == [0, 0, 1, 2]
    assert stream.locate(36)[0] == 1


def test_the_thread_gives_the_same_batches_as_none(dataset: Dataset) -> None:
    stream = TokenStream(dataset, 16, seed=0, shuffle_shards=2)
    threaded = train_batches(
        stream, first_sample=0, global_batch=4, rank=1, world_size=2, prefetch=3
    )
    expected = take(stream, 40, batch=4, rank=1, world=2)
    for batch, other in zip(itertools.islice(threaded, 40), expected, strict=True):
        assert torch.equal(batch.tokens_BT, other.tokens_BT)
        assert batch.first_index == other.first_index
    close(threaded)


def close(batches: Iterator[Batch]) -> None:
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]  (it is a generator)


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "openlm-prefetch"]


def test_closing_the_generator_ends_its_thread(dataset: Dataset) -> None:
    stream = TokenStream(dataset, 16, seed=0, shuffle_shards=2)
    batches = train_batches(
        stream, first_sample=0, global_batch=4, rank=0, world_size=1, prefetch=2
    )
    assert not prefetch_threads()
    next(batches)
    assert len(prefetch_threads()) == 1
    close(batches)
    assert not prefetch_threads()


def test_an_error_in_the_thread_is_raised_in_the_consumer(
    make_dataset: Callable[..., Path],
) -> None:
    folder = make_dataset()
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    stream = TokenStream(open_dataset(str(folder)), 16, seed=0, shuffle_shards=3)
    batches = train_batches(
        stream, first_sample=0, global_batch=4, rank=0, world_size=1, prefetch=2
    )
    with pytest.raises(InputError, match=r"shard-000001\.tar.*crc32"):
        list(itertools.islice(batches, 20))
    assert not prefetch_threads()


def test_a_sequence_length_that_does_not_divide_the_block_is_refused(dataset: Dataset) -> None:
    for seq_len in (0, 3, 128):
        with pytest.raises(InputError, match="1, 2, 4, 8, 16, 32, 64"):
            TokenStream(dataset, seq_len, seed=0, shuffle_shards=1)


@pytest.mark.parametrize(("rank", "world", "size"), [(0, 5, 4), (2, 2, 4), (-1, 1, 4), (0, 1, 0)])
def test_a_rank_without_rows_is_refused(dataset: Dataset, rank: int, world: int, size: int) -> None:
    stream = TokenStream(dataset, 16, seed=0, shuffle_shards=1)
    with pytest.raises(InputError, match="world size"):
        take(stream, 1, batch=size, rank=rank, world=world)


def test_many_more_shards_than_may_be_open_still_read(make_dataset: Callable[..., Path]) -> None:
    dataset = open_dataset(str(make_dataset(blocks_per_shard=[1] * 80, block_tokens=8)))
    stream = TokenStream(dataset, 8, seed=0, shuffle_shards=4)
    rows = stream.rows(np.arange(160))
    assert sorted(rows[:80, 0].tolist()) == list(range(0, 640, 8))


@SHARED
@given(
    world=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    max_tokens=st.one_of(st.none(), st.integers(1, 800)),
)
def test_validation_sees_the_first_rows_once_and_every_rank_as_many_batches(
    dataset: Dataset, world: int, batch_size: int, max_tokens: int | None
) -> None:
    per_rank = [
        list(
            val_batches(
                dataset,
                seq_len=16,
                batch_size=batch_size,
                max_tokens=max_tokens,
                rank=rank,
                world_size=world,
            )
        )
        for rank in range(world)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    n_rows = 36 if max_tokens is None else min(36, max(1, max_tokens // 16))
    rows = []
    for rank, batches in enumerate(per_rank):
        for batch in batches:
            assert batch.tokens_BT.shape == (batch_size, 16)
            assert batch.tokens_BT.dtype == torch.int64
            real = batch.targets_BT[:, 0] != IGNORE_INDEX
            assert (batch.targets_BT[~real] == IGNORE_INDEX).all()
            assert torch.equal(batch.targets_BT[real], batch.tokens_BT[real] + 1)
            rows += batch.tokens_BT[real][:, 0].tolist()
            if real[0]:
                assert int(batch.tokens_BT[0, 0]) == 16 * (batch.first_index + rank)
    assert sorted(rows) == list(range(0, n_rows * 16, 16))


def test_data_with_more_ids_than_the_model_is_refused(dataset: Dataset) -> None:
    check_fits_model(dataset, 50_000)
    with pytest.raises(InputError, match=r"model\.vocab_size: 49999"):
        check_fits_model(dataset, 49_999)
