"""The order is a permutation, depends on its arguments alone, and never changes silently."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_lite.data import order
from openlm_lite.errors import InputError


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**9))
def test_permute_is_a_permutation_of_every_range(n: int, seed: int, epoch: int) -> None:
    keys = order.philox_keys(seed, order.ROWS, 8, epoch=epoch)
    assert sorted(order.permute(np.arange(n), n, keys).tolist()) == list(range(n))


def test_permute_of_huge_ranges_has_no_collision_and_stays_inside() -> None:
    keys = order.philox_keys(3, order.ROWS, 8)
    n = 2**62 + 12345
    images = order.permute(np.arange(n - 10_000, n), n, keys)
    assert len(np.unique(images)) == 10_000
    assert images.min() >= 0
    assert images.max() < n


def test_permutations_of_a_small_range_are_close_to_uniform() -> None:
    """Over many keys each index must reach each place about equally often."""
    n, trials = 5, 4000
    counts = np.zeros((n, n))
    for seed in range(trials):
        keys = order.philox_keys(seed, order.SHARDS, 8)
        counts[np.arange(n), order.permute(np.arange(n), n, keys)] += 1
    # standard deviation of one cell is about 0.0063; allow five of them
    assert np.abs(counts / trials - 1 / n).max() < 0.032


def test_a_shuffled_range_keeps_no_trace_of_its_order() -> None:
    n = 20_000
    images = order.permute(np.arange(n), n, order.philox_keys(1, order.ROWS, 8))
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.03
    steps = np.diff(images)
    assert (np.abs(steps) == 1).mean() < 0.001
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    window=st.integers(1, 14),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 5),
)
def test_each_epoch_visits_every_row_exactly_once(
    rows: list[int], window: int, seed: int, epoch: int
) -> None:
    row_order = order.RowOrder(np.array(rows), seed=seed, shuffle_shards=window)
    n = row_order.rows_per_epoch
    places = row_order.locate(np.arange(epoch * n, (epoch + 1) * n))
    assert set(places.epoch.tolist()) == {epoch}
    seen = sorted(zip(places.shard.tolist(), places.row.tolist(), strict=True))
    assert seen == [(s, r) for s, count in enumerate(rows) for r in range(count)]


def test_a_window_holds_only_its_own_shards() -> None:
    row_order = order.RowOrder(np.full(12, 10), seed=5, shuffle_shards=3)
    shards = row_order.locate(np.arange(120)).shard.reshape(4, 30)
    groups = [set(window.tolist()) for window in shards]
    assert [len(g) for g in groups] == [3, 3, 3, 3]
    assert set().union(*groups) == set(range(12))


def test_epochs_and_seeds_have_different_orders() -> None:
    def rows_of(seed: int, epoch: int) -> list[int]:
        places = order.RowOrder(np.array([500, 500]), seed=seed, shuffle_shards=2).locate(
            np.arange(1000 * epoch, 1000 * epoch + 1000)
        )
        return (places.shard * 500 + places.row).tolist()

    assert rows_of(0, 0) != rows_of(0, 1)
    assert rows_of(0, 0) != rows_of(1, 0)
    assert rows_of(7, 3) == rows_of(7, 3)


def test_asking_for_samples_in_any_grouping_gives_the_same_places() -> None:
    row_order = order.RowOrder(np.array([7, 3, 9, 4]), seed=2, shuffle_shards=2)
    together = row_order.locate(np.arange(100))
    for i in reversed(range(100)):
        alone = row_order.locate(np.array([i]))
        assert (alone.epoch[0], alone.shard[0], alone.row[0]) == (
            together.epoch[i],
            together.shard[i],
            together.row[i],
        )


def test_a_seek_far_into_a_huge_dataset_needs_no_walk() -> None:
    rows = np.full(100_000, 256 * 32)
    row_order = order.RowOrder(rows, seed=0, shuffle_shards=16)
    places = row_order.locate(np.array([2_500_000_000, 10**15]))
    assert places.epoch.tolist() == [2_500_000_000 // rows.sum(), 10**15 // rows.sum()]
    assert (places.row < 8192).all()


def test_golden_order_version_1() -> None:
    """Frozen: a change here reorders everybody's data and needs a new ORDER_VERSION."""
    assert order.ORDER_VERSION == 2
    assert order.philox_keys(0, order.SHARDS, 2).tolist() == [
        15003734204198539638,
        13859618513508960101,
    ]
    row_order = order.RowOrder(np.array([5, 8, 3, 6, 7]), seed=124, shuffle_shards=2)
    places = row_order.locate(np.arange(29 * 3, 29 * 3 + 16))
    assert places.shard.tolist() == [3, 4, 3, 4, 4, 3, 4, 3, 3, 4, 4, 3, 4, 1, 1, 1]
    assert places.row.tolist() == [0, 2, 1, 6, 4, 4, 5, 3, 2, 1, 3, 5, 0, 7, 5, 1]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match=r"data\.seed"):
        order.RowOrder(np.array([1]), seed=seed, shuffle_shards=1)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(InputError, match="shuffle_shards"):
        order.RowOrder(np.array([1]), seed=0, shuffle_shards=0)


# --- lanes ---------------------------------------------------------------------------------------

LANES = st.lists(st.integers(1, 12), min_size=1, max_size=14).flatmap(
    lambda rows: st.tuples(st.just(rows), st.integers(1, len(rows)))
)


@given(LANES, st.integers(0, 9), st.integers(1, 20), st.integers(0, 5))
def test_each_row_comes_once_per_epoch_in_any_number_of_lanes(
    rows_and_lanes: tuple[list[int], int], seed: int, window: int, epoch: int
) -> None:
    rows, lanes = rows_and_lanes
    found = order.RowOrder(np.array(rows), seed=seed, shuffle_shards=window, lanes=lanes)
    n = found.rows_per_epoch
    places = found.locate(np.arange(epoch * n, (epoch + 1) * n))
    seen = sorted(zip(places.shard.tolist(), places.row.tolist(), strict=True))
    assert seen == [(s, r) for s, count in enumerate(rows) for r in range(count)]
    assert (places.epoch == epoch).all()


@settings(max_examples=30, deadline=None)
@given(LANES, st.integers(0, 9), st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_a_sample_is_found_alone_as_among_others(
    rows_and_lanes: tuple[list[int], int], seed: int, samples: list[int]
) -> None:
    rows, lanes = rows_and_lanes
    found = order.RowOrder(np.array(rows), seed=seed, shuffle_shards=4, lanes=lanes)
    together = found.locate(np.arange(401))
    for sample in samples:
        alone = found.locate(np.array([sample]))
        assert [c[0] for c in alone] == [c[sample] for c in together]


def test_a_rank_reads_the_shards_of_its_lanes_alone() -> None:
    found = order.RowOrder(np.full(32, 10), seed=1, shuffle_shards=8, lanes=8)
    for world, mine in ((2, 4), (4, 2), (8, 1), (16, 1)):
        for rank in range(world):
            places = found.locate(np.arange(rank, 3 * 320, world))
            assert len({int(s) % 8 for s in places.shard}) == mine  # equal shards go round


def test_golden_vector_of_lanes() -> None:
    """Frozen, as the one above."""
    rows = np.array([5, 8, 3, 6, 7, 2])
    found = order.RowOrder(rows, seed=124, shuffle_shards=4, lanes=2)
    places = found.locate(np.array([0, 1, 2, 3, 30, 31, 32, 100]))
    assert [c.tolist() for c in places] == [
        [0, 0, 0, 0, 0, 1, 1, 3],
        [1, 3, 2, 5, 0, 4, 2, 2],
        [2, 4, 0, 0, 0, 1, 0, 1],
    ]


def test_what_comes_next_is_known_ahead() -> None:
    found = order.RowOrder(np.full(12, 10), seed=3, shuffle_shards=4, lanes=2)
    ahead = found.shards_ahead(np.arange(0, 8))
    coming = found.locate(np.arange(0, 80)).shard
    assert len(ahead) == 8 and set(coming.tolist()) == set(ahead)
    assert set(found.locate(np.arange(0, 40)).shard.tolist()) == set(ahead[:4])
    last = found.shards_ahead(np.arange(110, 120))  # the next epoch's first shards follow
    assert set(found.locate(np.arange(120, 160)).shard.tolist()) <= set(last)


@pytest.mark.parametrize(
    ("n_shards", "window", "lanes"),
    [(1, 16, 1), (15, 16, 1), (16, 16, 2), (200, 16, 16), (99, 3, 2)],
)
def test_lanes_are_chosen_by_the_number_of_shards(n_shards: int, window: int, lanes: int) -> None:
    assert order.auto_lanes(n_shards, window) == lanes


@pytest.mark.parametrize("lanes", [0, 4])
def test_more_lanes_than_shards_are_refused(lanes: int) -> None:
    with pytest.raises(InputError, match=r"data\.lanes: .* 1 to 3"):
        order.RowOrder(np.array([1, 2, 3]), seed=0, shuffle_shards=1, lanes=lanes)
