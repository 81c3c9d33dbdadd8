"""Order is a function: every epoch a permutation, the same steps at every world size, no memory of the past."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.loading.order import LANES, Batching, Order

shard_counts = st.lists(st.integers(0, 700), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0)
divisors = st.sampled_from([1, 2, 4, 8, 16, 32, 64])


@settings(max_examples=80, deadline=None)
@given(shard_counts, st.integers(0, 2**63), st.integers(0, 5), st.integers(1, 40), st.integers(1, 9))
def test_every_epoch_is_a_permutation(counts, seed, epoch, window, open_windows):
    order = Order(counts, seed, window, open_windows)
    assert np.array_equal(np.sort(order.epoch(epoch)), np.arange(sum(counts)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 6), divisors, st.data())
def test_steps_hold_exactly_their_positions_at_every_world_size(n, batch_per, v, data):
    batching = Batching(batch_per * v, v)
    start = data.draw(st.integers(0, batching.steps(3 * n)))
    for step in range(start, start + 3):
        whole = np.arange(step * batching.batch, (step + 1) * batching.batch)
        parts = [batching.positions(step, j) for j in range(v)]
        assert all(len(part) == batch_per for part in parts)
        assert np.array_equal(np.sort(np.concatenate(parts)), whole)
        for world in (w for w in range(1, v + 1) if v % w == 0):
            at_world = Batching(batching.batch, v, world)
            owned = [j for rank in range(world) for j in at_world.own(rank)]
            assert sorted(owned) == list(range(v))


@settings(max_examples=60, deadline=None)
@given(shard_counts, divisors, st.integers(1, 5), st.data())
def test_a_chain_of_stops_and_world_sizes_repeats_and_drops_nothing(counts, v, batch_per, data):
    n, epochs = sum(counts), 2
    batch = batch_per * v
    steps = Batching(batch, v).steps(epochs * n)
    drawn, step = [], 0
    while step < steps:
        world = data.draw(st.sampled_from([w for w in range(1, v + 1) if v % w == 0]))
        stop = min(steps, step + data.draw(st.integers(1, max(1, steps // 3))))
        batching = Batching(batch, v, world)
        ranks = [Order(counts, seed=5) for _ in range(min(world, 3))]  # restarted processes remember nothing
        for s in range(step, stop):
            parts = {
                j: ranks[r % len(ranks)].samples(batching.positions(s, j))
                for r in range(world)
                for j in batching.own(r)
            }
            whole = np.empty(batch, np.int64)
            for j, (rows, _, _) in parts.items():
                whole[batching.positions(s, j) - s * batch] = rows
            drawn.append(whole)
        step = stop
    drawn = np.concatenate(drawn)
    unbroken = np.concatenate([Order(counts, seed=5).epoch(e) for e in range(-(-len(drawn) // n))])
    assert np.array_equal(drawn, unbroken[: len(drawn)])
    assert 0 <= len(drawn) - epochs * n < batch


@given(shard_counts, st.integers(0, 3), st.sampled_from([1, 8]))
@settings(max_examples=40, deadline=None)
def test_a_window_is_one_read_of_one_shard_by_one_lane(counts, epoch, open_windows):
    n, order = sum(counts), Order(counts, seed=1, window=8, open_windows=open_windows)
    positions = np.arange(epoch * n, (epoch + 1) * n)
    rows, starts, ends = order.samples(positions)
    shard = np.searchsorted(np.cumsum(counts), rows, side="right")
    for start in np.unique(starts):
        members = starts == start
        inside = np.sort(rows[members])
        assert np.array_equal(inside, np.arange(start, ends[members][0]))
        assert len(inside) <= 8
        assert len(set(shard[members])) == 1
        if n > LANES * open_windows * 8:  # else every window stays open, for all lanes
            assert len(set(positions[members] % LANES)) == 1


def test_few_windows_are_open_at_once():
    order = Order([1000] * 20, seed=3, window=16, open_windows=8)
    lane0 = np.arange(0, order.n, LANES)
    windows = order.samples(lane0)[1]
    _, first = np.unique(windows, return_index=True)
    last = len(windows) - 1 - np.unique(windows[::-1], return_index=True)[1]
    open_at = np.zeros(len(windows) + 1, int)
    np.add.at(open_at, first, 1)
    np.add.at(open_at, last + 1, -1)
    assert np.cumsum(open_at).max() <= 8


def test_a_small_split_is_shuffled_whole():
    meetings = {tuple(sorted(Order([40, 10], seed=2).epoch(e)[:5])) for e in range(20)}
    assert len(meetings) == 20, "the same samples share the first batch epoch after epoch"


def test_epochs_and_seeds_differ():
    counts = [300, 200, 500]
    assert not np.array_equal(Order(counts, 1).epoch(0), Order(counts, 1).epoch(1))
    assert not np.array_equal(Order(counts, 1).epoch(0), Order(counts, 2).epoch(0))
    assert np.array_equal(Order(counts, 1).epoch(7), Order(counts, 1).epoch(7))


def test_order_of_a_seed_never_changes_between_releases():
    why = "the order has changed: runs resumed with this code would repeat and drop samples"
    assert Order([5, 4, 3], seed=42).epoch(0).tolist() == [5, 8, 7, 6, 2, 4, 1, 9, 11, 3, 0, 10], why
    assert Order([90, 100], seed=42, window=2, open_windows=1).epoch(2)[-8:].tolist() == [
        152,
        154,
        157,
        161,
        164,
        167,
        169,
        172,
    ], why


@pytest.mark.parametrize(
    ("counts", "seed", "window", "open_windows", "first", "end", "crc32"),
    [
        ([1000] * 20, 3, 16, 8, 0, 2, 945413094),
        ([0, 977, 1, 5000, 313, 0, 4000], 7, 16, 8, 4, 6, 1774178843),
        ([40, 0, 10, 300], 2, 16, 8, 0, 3, 148324401),
        ([7, 3] * 30, 9, 2, 1, 5, 8, 51768984),
    ],
)
def test_rows_and_windows_of_a_seed_never_change(counts, seed, window, open_windows, first, end, crc32):
    order = Order(counts, seed, window, open_windows)
    drawn = order.samples(np.arange(first * order.n, end * order.n))
    assert zlib.crc32(drawn.astype("<i8").tobytes()) == crc32


def test_augmentation_is_keyed_by_the_epoch_where_each_sample_is_there_once():
    order = Order([90, 100], seed=1)
    assert np.array_equal(order.epochs(np.arange(570)), np.repeat([0, 1, 2], 190))


def test_a_shard_stays_with_its_lanes_for_the_whole_run():
    counts = [977] * 70  # 64 does not divide the total, so boundaries move a little each epoch
    order = Order(counts, seed=9)
    shard = np.repeat(np.arange(70), 977)
    first, later = (shard[order.epoch(e)] for e in (0, 9))
    lanes_of = [
        set(zip((np.arange(order.n) + e * order.n) % LANES, s, strict=True)) for e, s in ((0, first), (9, later))
    ]
    assert len(lanes_of[0] ^ lanes_of[1]) <= LANES


def test_neighbours_of_one_epoch_are_scattered_in_the_next():
    order = Order([1000] * 10, seed=4)
    place = np.empty(order.n)
    place[order.epoch(1)] = np.arange(order.n)
    travel = np.abs(np.diff(place[order.epoch(0)])).mean()
    assert travel == pytest.approx(order.n / 3, rel=0.05)  # what a full random permutation gives


@pytest.mark.parametrize(
    ("batch", "v", "w", "said"),
    [(10, 3, 1, "must divide 64"), (10, 4, 1, "use 8"), (64, 4, 3, r"\[1, 2, 4\] workers"), (0, 1, 1, "at least 1")],
)
def test_a_batching_that_does_not_divide_names_what_would(batch, v, w, said):
    with pytest.raises(ValueError, match=said):
        Batching(batch, v, w)


def test_an_empty_split_cannot_be_ordered():
    with pytest.raises(ValueError, match="no samples"):
        Order([0, 0], seed=0)


def test_samples_of_the_open_windows_are_mixed():
    order = Order([1000] * 20, seed=3)
    lane0 = order.samples(np.arange(0, order.n, LANES))[0]
    assert np.mean(np.diff(lane0) == 1) < 0.1, "a lane reads its windows in file order"
