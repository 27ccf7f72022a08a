"""The batches: the same at any world size, from any point, each row once per epoch."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openlm_lite.data import stream as stream_module
from openlm_lite.data.dataset import (
    BadShardError,
    Dataset,
    check_fits_model,
    load_dataset,
    open_dataset,
)
from openlm_lite.data.masks import IGNORE_INDEX
from openlm_lite.data.mixture import Mixture, Pattern
from openlm_lite.data.stream import (
    Batch,
    SourceRows,
    TokenStream,
    single_stream,
    train_batches,
    val_batches,
)
from openlm_lite.errors import InputError

SHARED = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def few_places_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as the tests read: computing 2,048 for each stream takes minutes."""
    monkeypatch.setattr(stream_module, "_PLACES_AT_ONCE", 16)


@pytest.fixture
def dataset(make_dataset: Callable[..., Path]) -> Dataset:
    return open_dataset(str(make_dataset()))


def rows_of(stream: TokenStream, indices: np.ndarray) -> np.ndarray:
    rows, counts = stream.read(stream.places(indices))
    assert counts is None  # no shard is bad
    return rows.astype(np.int64)


def per_epoch(stream: TokenStream) -> int:
    return stream.sources[0].order.rows_per_epoch


def epoch_of(stream: TokenStream, index: int) -> int:
    return int(stream.places(np.array([index])).epoch[0])


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
    stream = single_stream(dataset, seq_len=16, seed=1, shuffle_shards=2)
    batch = take(stream, 1, batch=8)[0]
    assert batch.tokens_BT.shape == batch.targets_BT.shape == (8, 16)
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
    assert batch.tokens_BT.is_contiguous()
    assert batch.targets_BT.is_contiguous()
    blocks_before = [0, 3, 7]
    for i in range(8):
        places = stream.places(np.array([i]))
        shard = int(places.shard[0])
        block, row = stream.sources[0].block_and_row(int(places.row[0]))
        start = (blocks_before[shard] + block) * 64 + row * 16  # the fixture's ids count upwards
        assert batch.tokens_BT[i].tolist() == list(range(start, start + 16))
        assert batch.targets_BT[i].tolist() == list(range(start + 1, start + 17))


def test_one_epoch_trains_on_every_target_exactly_once(dataset: Dataset) -> None:
    for seq_len in (1, 2, 4, 16, 64):
        stream = single_stream(dataset, seq_len, seed=3, shuffle_shards=2)
        assert per_epoch(stream) == dataset.n_rows(seq_len) == 9 * 64 // seq_len
        rows = rows_of(stream, np.arange(2 * per_epoch(stream), 3 * per_epoch(stream)))
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
    stream = single_stream(dataset, 16, seed, window)
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
    stream = single_stream(dataset, 16, seed=0, shuffle_shards=2)
    stop -= stop % before
    first = [b.tokens_BT for b in take(stream, stop // before, batch=before)]
    again = single_stream(dataset, 16, seed=0, shuffle_shards=2)
    rest = [b.tokens_BT for b in take(again, 5, first=stop, batch=after)]
    total = stop + 5 * after
    uninterrupted = torch.from_numpy(rows_of(stream, np.arange(total))[:, :-1])
    assert torch.equal(torch.cat(first + rest), uninterrupted)


def test_the_epoch_is_known_for_every_sample(dataset: Dataset) -> None:
    stream = single_stream(dataset, 16, seed=0, shuffle_shards=2)
    assert [epoch_of(stream, i) for i in (0, 35, 36, 72)] == [0, 0, 1, 2]
    assert stream.consumed(54) == {"train": (54, 1.5)}


def test_the_thread_gives_the_same_batches_as_none(dataset: Dataset) -> None:
    stream = single_stream(dataset, 16, seed=0, shuffle_shards=2)
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
    stream = single_stream(dataset, 16, seed=0, shuffle_shards=2)
    batches = train_batches(
        stream, first_sample=0, global_batch=4, rank=0, world_size=1, prefetch=2
    )
    assert not prefetch_threads()
    next(batches)
    assert len(prefetch_threads()) == 1
    close(batches)
    assert not prefetch_threads()


def test_at_most_so_many_batches_are_read_ahead(dataset: Dataset) -> None:
    stream = single_stream(dataset, 16, seed=0, shuffle_shards=2)
    read: list[int] = []

    def counted() -> Iterator[Batch]:
        for batch in take(stream, 100):
            read.append(batch.first_index)
            yield batch

    batches = stream_module._in_background(counted(), 3)
    for k in range(1, 20):
        next(batches)
        assert len(read) <= k + 3
    close(batches)
    assert len(read) <= 19 + 3


@pytest.mark.slow  # a process of its own imports torch
def test_a_process_may_end_in_the_middle_of_the_data(dataset: Dataset) -> None:
    script = f"""
from openlm_lite.data.dataset import open_dataset
from openlm_lite.data.stream import single_stream, train_batches
stream = single_stream(open_dataset({dataset.folder!r}), 16, seed=0, shuffle_shards=2)
size = dict(first_sample=0, global_batch=4, rank=0, world_size=1, prefetch=64)
kept = [train_batches(stream, **size) for _ in range(8)]
print([next(batches).first_index for batches in kept])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{[0] * 8}\n", "")


@given(st.lists(st.integers(0, 3), min_size=10, max_size=40))
def test_a_batch_stays_as_it_was_while_any_part_of_it_is_held(kept: list[int]) -> None:
    """Memory is used again: whatever somebody still holds must not change."""
    arrays = stream_module._Arrays()
    held: list[tuple[torch.Tensor, int]] = []
    for value, what in enumerate(kept):
        tensor = arrays.holding(np.full((4, 8), value, dtype=np.uint16))
        part = (None, tensor, tensor.chunk(2)[1], tensor[:, 1:].t())[what]
        if part is not None:
            held.append((part, value))
        del tensor, part
        assert all((part == value).all() for part, value in held)
        if value % 7 == 6:
            held = held[::2]


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    arrays = stream_module._Arrays()
    for value in range(20):
        arrays.holding(np.full((4, 8), value))
    assert len(arrays._arrays) == 1


def test_an_error_in_the_thread_is_raised_in_the_consumer(
    make_dataset: Callable[..., Path],
) -> None:
    folder = make_dataset()
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    stream = single_stream(open_dataset(str(folder)), 16, seed=0, shuffle_shards=3)
    batches = train_batches(
        stream, first_sample=0, global_batch=4, rank=0, world_size=1, prefetch=2
    )
    with pytest.raises(InputError, match=r"shard-000001\.tar.*crc32"):
        list(itertools.islice(batches, 20))
    assert not prefetch_threads()


def test_a_sequence_length_that_does_not_divide_the_block_is_refused(dataset: Dataset) -> None:
    for seq_len in (0, 3, 128):
        with pytest.raises(InputError, match="1, 2, 4, 8, 16, 32, 64"):
            single_stream(dataset, seq_len, seed=0, shuffle_shards=1)


@pytest.mark.parametrize(("rank", "world", "size"), [(0, 5, 4), (2, 2, 4), (-1, 1, 4), (0, 1, 0)])
def test_a_rank_without_rows_is_refused(dataset: Dataset, rank: int, world: int, size: int) -> None:
    stream = single_stream(dataset, 16, seed=0, shuffle_shards=1)
    with pytest.raises(InputError, match="world size"):
        take(stream, 1, batch=size, rank=rank, world=world)


def test_many_more_shards_than_may_be_open_still_read(make_dataset: Callable[..., Path]) -> None:
    dataset = open_dataset(str(make_dataset(blocks_per_shard=[1] * 80, block_tokens=8)))
    stream = single_stream(dataset, 8, seed=0, shuffle_shards=4)
    rows = rows_of(stream, np.arange(160))
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


# --- several sources, lanes, bad shards ----------------------------------------------------------


def mixed(make_dataset: Callable[..., Path], seed: int = 0, max_bad_shards: int = 0) -> TokenStream:
    """Rows of `few` hold ids below 3 blocks of 64, rows of `many` come from 9 blocks."""
    sources = {}
    for name, blocks, dtype in (("few", (1, 2), "uint16"), ("many", (3, 4, 2), "uint32")):
        folder = make_dataset(name, blocks_per_shard=blocks, dtype=dtype)
        dataset = open_dataset(str(folder))
        sources[name] = SourceRows(dataset, 16, seed=seed, shuffle_shards=2)
    pattern = Pattern([Fraction(1, 4), Fraction(3, 4)])
    return TokenStream(sources, Mixture(["few", "many"], [(0, pattern)]), max_bad_shards)


def test_each_source_is_read_epoch_by_epoch_whatever_the_others_do(
    make_dataset: Callable[..., Path],
) -> None:
    stream = mixed(make_dataset)
    places = stream.places(np.arange(16 * 6))
    rows, _ = stream.read(places)
    for s, (n_epochs, per_epoch_rows) in enumerate([(2, 12), (2, 36)]):
        mine = rows[places.source == s, 0]
        epochs = mine[: n_epochs * per_epoch_rows].reshape(n_epochs, per_epoch_rows)
        assert all(sorted(epoch) == list(range(0, per_epoch_rows * 16, 16)) for epoch in epochs)
    assert stream.consumed(96) == {"few": (24, 2.0), "many": (72, 2.0)}


def test_a_batch_says_which_source_each_row_is_from(make_dataset: Callable[..., Path]) -> None:
    stream = mixed(make_dataset)
    (batch,) = take(stream, 1, batch=8)
    assert batch.sources_B is not None
    assert batch.sources_B.tolist() == stream.places(np.arange(8)).source.tolist()
    assert batch.sources_B.sum() == 6


@settings(SHARED, max_examples=10)
@given(
    world=st.integers(1, 7),
    extra=st.integers(0, 9),
    first=st.integers(0, 200),
    counts=st.lists(st.integers(1, 6), min_size=2, max_size=4),
)
def test_the_ranks_of_a_mixture_share_each_global_batch_out_exactly(
    dataset: Dataset, world: int, extra: int, first: int, counts: list[int]
) -> None:
    rows = [SourceRows(dataset, 16, seed=s, shuffle_shards=2) for s in range(len(counts))]
    sources = dict(zip("abcd", rows, strict=False))
    pattern = Pattern([Fraction(n, sum(counts)) for n in counts])
    stream = TokenStream(sources, Mixture(list(sources), [(0, pattern)]))
    size = world + extra
    alone = take(stream, 3, first=first, batch=size)
    ranks = [take(stream, 3, first=first, batch=size, rank=r, world=world) for r in range(world)]
    for step, whole in enumerate(alone):
        parts = [batches[step] for batches in ranks]
        assert [len(p.tokens_BT) for p in parts] == [
            len(range(r, size, world)) for r in range(world)
        ]
        assert {p.first_index for p in parts} == {whole.first_index}
        assert sum(p.checksum for p in parts) == whole.checksum
        assert whole.sources_B is not None
        expected = [(s, *row) for s, row in zip(*_listed(whole), strict=True)]
        found = [(s, *row) for part in parts for s, row in zip(*_listed(part), strict=True)]
        assert sorted(found) == sorted(expected)


def _listed(batch: Batch) -> tuple[list[int], list[list[int]]]:
    assert batch.sources_B is not None
    return batch.sources_B.tolist(), batch.targets_BT.tolist()


@pytest.mark.parametrize("world", [4, 16])
def test_a_rank_of_a_mixture_opens_the_shards_of_its_lanes_and_its_neighbours(
    make_dataset: Callable[..., Path], world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_PLACES_AT_ONCE", 2048)
    sources = {}
    for name, n_shards in (("web", 64), ("code", 32)):
        dataset = load_dataset(str(make_dataset(name, [1] * n_shards, block_tokens=64)))
        sources[name] = SourceRows(dataset, 1, seed=0, shuffle_shards=8, lanes=8)
    pattern = Pattern([Fraction(613, 1000), Fraction(387, 1000)])
    stream = TokenStream(sources, Mixture(list(sources), [(0, pattern)]))
    n_samples = 96 * 64  # an epoch of both
    whole = np.arange(n_samples).reshape(-1, 128)
    for rank in range(world):
        mine = stream.share(whole, rank, world).reshape(-1)
        places = stream.places(mine)
        shards = {(int(s), int(n)) for s, n in zip(places.source, places.shard, strict=True)}
        # of eight lanes; every world_size-th sample would be of all 96 shards
        assert len(shards) <= 96 * (max(1, 8 // world) + 3) / 8


def test_a_bad_shard_ends_the_run_or_is_left_out_with_all_its_rows(
    make_dataset: Callable[..., Path],
) -> None:
    whole = mixed(make_dataset)
    indices = np.arange(100)
    places = whole.places(indices)
    expected, _ = whole.read(places)
    folder = whole.sources[1].dataset.folder
    (Path(folder) / "shard-000001.tar").write_bytes(b"short")

    def again(max_bad_shards: int) -> TokenStream:
        sources = dict(zip(whole.names, whole.sources, strict=True))
        dataset = load_dataset(folder)
        sources["many"] = SourceRows(dataset, 16, seed=0, shuffle_shards=2)
        return TokenStream(sources, whole.mixture, max_bad_shards)

    with pytest.raises(BadShardError, match=r"shard-000001\.tar"):
        again(0).read(places)
    stream = again(1)
    rows, counts = stream.read(places)
    assert counts is not None
    assert (~counts).tolist() == ((places.source == 1) & (places.shard == 1)).tolist()
    assert np.array_equal(rows[counts], expected[counts]) and not rows[~counts].any()
    tried: list[int] = []
    blocks = stream.sources[1].dataset.blocks
    stream.sources[1].dataset.blocks = lambda shard: tried.append(shard) or blocks(shard)
    stream.read(places)
    assert set(tried) == {0, 2}  # a bad shard is read, or fetched, once
    (key,) = stream.bad_shards
    assert key == ("many", 1) and "shard-000001.tar" in stream.bad_shards[key]
    for batch in take(again(1), 10, batch=8):
        kept = counts[batch.first_index : batch.first_index + 8]
        assert ((batch.targets_BT != IGNORE_INDEX).all(1)).tolist() == kept.tolist()
        assert ((batch.targets_BT == IGNORE_INDEX).all(1)).tolist() == (~kept).tolist()


def test_a_shard_that_was_left_out_before_stays_out(make_dataset: Callable[..., Path]) -> None:
    stream = mixed(make_dataset, max_bad_shards=1)
    stream.bad_shards["few", 0] = "damaged"  # as a checkpoint says; the file is whole here
    places = stream.places(np.arange(40))
    _, counts = stream.read(places)
    assert counts is not None
    assert (~counts).tolist() == ((places.source == 0) & (places.shard == 0)).tolist()


def test_a_shard_that_another_rank_reports_while_this_one_reads_it_counts_once(
    make_dataset: Callable[..., Path],
) -> None:
    stream = mixed(make_dataset, max_bad_shards=1)
    places = stream.places(np.arange(40))
    dataset = stream.sources[1].dataset
    (Path(dataset.folder) / "shard-000001.tar").write_bytes(b"short")
    blocks = dataset.blocks

    def blocks_while_told(shard: int) -> np.ndarray:
        if shard == 1:  # as `share_bad_shards` does, from the thread that trains
            stream.bad_shards["many", 1] = "another rank's message"
        return blocks(shard)

    dataset.blocks = blocks_while_told
    _, counts = stream.read(places)
    assert counts is not None
    assert (~counts).tolist() == ((places.source == 1) & (places.shard == 1)).tolist()
    assert stream.bad_shards == {("many", 1): "another rank's message"}
