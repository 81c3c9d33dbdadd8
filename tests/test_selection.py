"""What an epoch holds is a function of keys, weights and position: nothing is short, nothing moves."""

import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.loading import selection
from pipeline.loading.order import Batching, Order
from pipeline.loading.selection import Draws
from pipeline.shards import index
from pipeline.shards.index import Split

SMALL, LARGE = 700, 9000  # samples: shuffled as a whole, and in windows


def made_up(counts, labels=3, size=30_000, between=3072, seed=0):
    """A split of shards that were never written; image sizes vary by half."""
    counts, rng = np.asarray(counts, np.int64), np.random.default_rng(seed)
    n = int(counts.sum())
    sizes = rng.integers(size // 2, size * 3 // 2, n)
    shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    ends = np.cumsum(sizes + between)
    starts = ends - sizes - between
    offset = starts - np.concatenate([starts, [0]])[np.cumsum(counts) - counts][shard] + 1024
    label = rng.integers(0, labels, n).astype(np.int32) if labels else np.full(n, -1, np.int32)
    side, bytes_ = np.full(n, 8, np.int32), np.zeros(n, np.int8)
    shards = [f"train-{i:06d}.tar" for i in range(len(counts))]
    digests, empty = ["ab" * 32] * len(counts), [0] * len(counts)
    return Split("data", "train", shards, digests, empty, counts, shard, offset, sizes, label,
                  side, side, bytes_, bytes_.astype(np.uint32), _rows=[("index/000000.parquet", 0, n)])  # fmt: skip


def of_epoch(order, e):
    """(rows, window starts, window ends, augmentation epochs) of a whole epoch."""
    positions = np.arange(e * order.n, (e + 1) * order.n)
    return *order.samples(positions), order.epochs(positions)


@pytest.fixture(scope="module")
def train(digits):
    return index.load(digits).split("train")


def test_a_taken_split_names_and_reads_the_same_samples(train):
    rows = np.arange(3, len(train), 7)
    taken = train.take(rows)
    assert (len(taken), taken.counts.sum(), len(taken.shards)) == (len(rows), len(rows), len(train.shards))
    assert np.array_equal(taken.label, train.label[rows])
    assert np.array_equal(taken.shard, np.repeat(np.arange(len(taken.shards)), taken.counts))
    assert taken.keys.to_pylist() == [train.keys[row].as_py() for row in rows]
    assert taken.source.to_pylist() == [train.source[row].as_py() for row in rows]
    twice = taken.take(np.arange(1, len(taken), 2))
    assert np.array_equal(twice.offset, train.offset[rows[1::2]])
    assert twice.keys.to_pylist() == taken.keys.to_pylist()[1::2]
    reads(twice)


def reads(split):
    """Every tenth sample is what its checksum says."""
    for row in range(0, len(split), 10):
        begin = int(split.offset[row])
        data = storage.read_range(split.path(split.shards[split.shard[row]]), begin, begin + int(split.size[row]))
        assert zlib.crc32(data) == split.crc32[row]


def test_a_shard_of_which_nothing_was_taken_is_left_empty():
    taken = made_up([40, 30, 50]).take(np.arange(75, 110))
    assert taken.counts.tolist() == [0, 0, 35]
    assert sorted(Order(taken.counts, 1, joined=taken.joined).epoch(0)) == list(range(35))


@pytest.mark.parametrize("rows", [[2, 1], [1, 1], [-1, 3], [0, 90]])
def test_rows_that_do_not_rise_inside_the_split_are_refused(rows):
    with pytest.raises(ValueError, match="must rise"):
        made_up([90]).take(rows)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=5).filter(sum),
    st.sampled_from([500, 30_000, 400_000]),
    st.floats(0.002, 1),
    st.integers(0, 9),
)
def test_windows_never_waste_more_than_three_times_what_they_want_or_32_kib_a_sample(counts, size, fraction, seed):
    split = made_up(counts, size=size)
    rows = np.flatnonzero(np.random.default_rng(seed).random(len(split)) < fraction)
    taken = split.take(rows if len(rows) else np.arange(1))
    order = Order(taken.counts, seed, joined=taken.joined)
    drawn, starts, ends, _ = of_epoch(order, 1)
    assert np.array_equal(np.sort(drawn), np.arange(len(taken)))
    assert (ends - starts <= 16).all()
    assert (taken.shard[starts] == taken.shard[ends - 1]).all()
    span = taken.offset[ends - 1] + taken.size[ends - 1] - taken.offset[starts]
    wanted = np.concatenate([[0], np.cumsum(taken.size)])
    assert (span <= 4 * (wanted[ends] - wanted[starts]) + (ends - starts - 1) * 32 * 1024).all()


def test_a_hundredth_of_the_photos_is_read_photo_by_photo_and_half_of_them_by_the_window():
    split = made_up([2000] * 20, size=100_000)
    bytes_read = {}
    for every in (100, 2):
        taken = split.take(np.arange(0, len(split), every))
        _, starts, ends, _ = of_epoch(Order(taken.counts, 0, joined=taken.joined), 0)
        starts, first = np.unique(starts, return_index=True)
        ends = ends[first]
        spans = taken.offset[ends - 1] + taken.size[ends - 1] - taken.offset[starts]
        bytes_read[every] = spans.sum() / taken.size.sum()
        assert len(taken) / len(starts) == pytest.approx(1 if every == 100 else 16, rel=0.1)
    assert bytes_read[100] == 1
    assert bytes_read[2] < 2.1


@pytest.mark.parametrize("counts", [[40, 0, 300], [3000, 2500, 7000, 1, 0, 4000]])
def test_a_whole_split_keeps_its_order_however_much_lies_between_its_images(counts):
    split = made_up(counts, size=500, between=200_000)  # masks beside the images, say
    for e in (0, 3):
        positions = np.arange(e * len(split), (e + 1) * len(split))
        joined = Order(split.counts, 5, joined=split.joined).samples(positions)
        assert np.array_equal(joined, Order(split.counts, 5).samples(positions))


@settings(max_examples=25, deadline=None)
@given(fractions=st.tuples(st.floats(0.02, 1), st.floats(0.02, 1)), seed=st.integers(0, 2**63))
def test_a_smaller_subset_lies_in_a_larger_one(train, fractions, seed):
    small, large = (selection.subset(train, fraction, seed) for fraction in sorted(fractions))
    assert set(small.keys.to_pylist()) <= set(large.keys.to_pylist())
    assert len(large) == pytest.approx(max(fractions) * len(train), abs=5 * len(train) ** 0.5 / 2)


def test_subsets_and_folds_hold_the_same_samples_when_others_are_added(train):
    before = train.take(np.arange(0, len(train), 2))
    there = set(before.keys.to_pylist())
    for chosen in (lambda s: selection.subset(s, 0.3), lambda s: selection.fold(s, 5, 2)[1]):
        assert set(chosen(before).keys.to_pylist()) == there & set(chosen(train).keys.to_pylist())


def test_other_seeds_choose_other_subsets(train):
    one, other = (set(selection.subset(train, 0.5, seed).keys.to_pylist()) for seed in (1, 2))
    assert len(one & other) < 0.6 * len(one)


@pytest.mark.parametrize("k", [2, 3, 10])
def test_folds_hold_out_every_sample_once(train, k):
    folds, held_out = [selection.fold(train, k, i) for i in range(k)], []
    for fitted, held in folds:
        assert np.array_equal(np.sort(np.concatenate([fitted.picked, held.picked])), np.arange(len(train)))
        assert len(held) == pytest.approx(len(train) / k, rel=0.25)
        held_out += held.keys.to_pylist()
    assert sorted(held_out) == sorted(train.keys.to_pylist())


def test_classes_keep_their_labels(train):
    some = selection.classes(train, [3, 8])
    assert set(some.label.tolist()) == {3, 8}
    assert len(some) == np.isin(train.label, [3, 8]).sum()


weights = st.lists(st.floats(0, 50), min_size=1, max_size=300).filter(any)


@settings(max_examples=100, deadline=None)
@given(weights, st.integers(1, 4), st.integers(1, 2000), st.integers(0, 2**63), st.integers(0, 10**6))
def test_every_row_and_every_stratum_is_drawn_as_expected_to_within_one(weights, strata, length, seed, epoch):
    weights, strata = np.array(weights), np.arange(len(weights)) * 7 % strata
    times = Draws(weights, strata, length, seed).times(epoch)
    assert times.sum() == length
    expected = weights / weights.sum() * length
    slack = 1e-5  # of the unit that expectations are counted in
    assert (times >= np.floor(expected - slack)).all()
    assert (times <= np.ceil(expected + slack)).all()
    assert (abs(np.bincount(strata, times) - np.bincount(strata, expected)) < 1 + slack).all()


@pytest.mark.parametrize("unit", [5e-324, 1e308])
def test_weights_count_in_proportion_however_small_or_large(unit):
    draws = Draws(np.array([0, unit, 0, unit, unit]), np.zeros(5), 6, seed=0)
    assert draws.times(0).tolist() == [0, 2, 0, 2, 2]


def test_equal_weights_draw_each_sample_once():
    split = made_up([SMALL])
    assert (selection.draws(split, np.full(SMALL, 0.3), seed=1).times(9) == 1).all()


def test_over_epochs_every_row_is_drawn_as_often_as_expected():
    draws = Draws(np.repeat([0.1, 1.9], 500), np.zeros(1000, int), 1000, seed=4)
    total = sum(draws.times(e) for e in range(20))
    assert total[:500].min() >= 1, "a sample that is expected twice was never drawn"
    assert abs(total - np.repeat([2, 38], 500)).max() <= 2


def test_an_epoch_does_not_draw_every_tenth_file_of_the_source():
    rows = np.flatnonzero(Draws(np.ones(2000), np.zeros(2000), 200, seed=4).times(0))
    assert len(set((rows % 10).tolist())) == 10


@pytest.mark.parametrize("counts", [[SMALL], [LARGE, 3000]])
def test_balanced_classes_are_drawn_alike_in_every_epoch(counts):
    split = made_up(counts, labels=7)
    rare = split.take(np.flatnonzero((split.label > 1) | (np.arange(len(split)) % 30 == 0)))
    order = Order(rare.counts, 2, draws=selection.draws(rare, selection.class_balanced(rare), 2))
    for e in range(3):
        drawn = np.bincount(rare.label[order.epoch(e)], minlength=7)
        assert drawn.max() - drawn.min() <= 1


def test_a_class_weighs_what_it_was_given_and_the_others_one():
    split = made_up([600])
    weights = selection.weighted(split, {1: 3, 2: 0})
    assert set(zip(split.label.tolist(), weights.tolist(), strict=True)) == {(0, 1), (1, 3), (2, 0)}
    assert selection.weighted(split, weights) is weights


def grown(*sizes):
    """A split of which each generation brought so many samples."""
    split, edges = made_up([sum(sizes)]), np.cumsum([0, *sizes])
    rows = [(f"index/{i:06d}.parquet", 0, int(end - start)) for i, (start, end) in enumerate(itertools.pairwise(edges))]
    return replace(split, _rows=rows)


@pytest.mark.parametrize(("sizes", "generations"), [((900, 100), 1), ((500, 300, 100), 2), ((10, 5000), 1)])
def test_the_newest_generations_make_up_their_share_of_every_epoch(sizes, generations):
    split = grown(*sizes)
    new = split.generation >= len(sizes) - generations
    assert new.sum() == sum(sizes[len(sizes) - generations :])
    chosen = selection.choose(split, selection.Selection(recent=0.5, recent_generations=generations), 3)
    for epoch in range(5):
        times = chosen.draws.times(epoch)
        assert abs(times[new].sum() - len(split) / 2) <= 1 + len(np.unique(split.label))
    both = selection.choose(split, selection.Selection(recent=0.5, recent_generations=generations, balance=True), 3)
    drawn = both.draws.times(0)
    assert abs(drawn[new].sum() - len(split) / 2) < 0.05 * len(split) + 4
    picked = split.take(np.arange(1, len(split), 2))
    assert np.array_equal(picked.generation, split.generation[1::2])


@pytest.mark.parametrize("sizes", [(1000,), (1000, 0), (0, 700)])
def test_without_two_kinds_each_sample_is_drawn_once(sizes):
    assert selection.choose(grown(*sizes), selection.Selection(recent=0.5), 3).draws is None


def heavy(n, seed=0):
    """Weights of which some are nothing and some are much."""
    return np.random.default_rng(seed).pareto(1.5, n) * (np.arange(n) % 5 > 0)


@pytest.mark.parametrize(
    ("n", "length"), [(SMALL, SMALL), (SMALL, 50), (40, LARGE), (LARGE, LARGE), (LARGE, 3 * LARGE)]
)
def test_an_epoch_holds_each_row_as_often_as_was_drawn_and_seen_anew_each_time(n, length):
    split = made_up([n // 3, 0, n - n // 3])
    draws = selection.draws(split, heavy(n), 3, length)
    order = Order(split.counts, 3, joined=split.joined, draws=draws)
    for e in (0, 2):
        rows, starts, ends, epochs = of_epoch(order, e)
        assert np.array_equal(np.bincount(rows, minlength=n), draws.times(e))
        assert len(set(zip(rows.tolist(), epochs.tolist(), strict=True))) == length, "a repeat would look the same"
        assert (epochs % 2**32 == e).all()
        assert ((starts <= rows) & (rows < ends)).all()
        assert (split.shard[starts] == split.shard[ends - 1]).all()


def repeating(n):
    """(rows of an epoch of n draws in order, how often it holds each): every 20th or so is drawn about seven times."""
    draws = Draws(np.where(np.arange(n) % 20, 1.0, 9.0), np.zeros(n), n, seed=1)
    return Order([n // 2, n // 2], 1, draws=draws).epoch(1), draws.times(1)


def test_repeats_of_a_row_lie_evenly_over_a_small_epoch():
    rows, times = repeating(400)
    assert times.max() >= 6
    for row in np.flatnonzero(times >= 6):
        assert np.diff(np.flatnonzero(rows == row)).min() > 400 / times[row] * 0.6


def test_repeats_of_a_row_share_a_batch_of_a_large_epoch_less_often_than_by_chance():
    def shared(rows):
        return sum(256 - len(np.unique(batch)) for batch in rows[: len(rows) // 256 * 256].reshape(-1, 256))

    rows, _ = repeating(60_000)
    assert shared(rows) < 0.8 * shared(np.random.default_rng(0).permutation(rows))
    assert not (rows[1:] == rows[:-1]).any()


def test_neighbours_in_a_batch_change_from_epoch_to_epoch():
    draws = Draws(np.repeat([1.0, 3.0], 100), np.zeros(200), 200, seed=1)
    order = Order([200], 1, draws=draws)
    assert len({tuple(sorted(order.epoch(e)[:5])) for e in range(20)}) == 20


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([30, SMALL, LARGE]), st.sampled_from([37, SMALL, LARGE + 11]), st.integers(1, 30), st.data())
def test_a_chain_of_stops_and_world_sizes_draws_the_batches_of_an_unbroken_run(n, length, batch_per, data):
    split, v = made_up([n // 2, n - n // 2]), 16
    batch = batch_per * v

    def restarted():  # processes remember nothing
        return Order(split.counts, 5, joined=split.joined, draws=selection.draws(split, heavy(n), 5, length))

    first = step = data.draw(st.integers(0, 2 * length // batch + 1))
    unbroken = restarted()
    for _ in range(3):
        world = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
        batching, stop = Batching(batch, v, world), step + data.draw(st.integers(1, 3))
        ranks = [restarted() for _ in range(min(world, 2))]
        for s in range(step, stop):
            drawn = np.empty((4, batch), np.int64)
            for j, order in ((j, ranks[r % len(ranks)]) for r in range(world) for j in batching.own(r)):
                positions = batching.positions(s, j)
                drawn[:, positions - s * batch] = [*order.samples(positions), order.epochs(positions)]
            whole = np.arange(s * batch, (s + 1) * batch)
            assert np.array_equal(drawn, [*unbroken.samples(whole), unbroken.epochs(whole)])
        step = stop
    assert step > first


def test_draws_of_a_seed_never_change_between_releases():
    why = "the draws have changed: runs resumed with this code would repeat and drop samples"
    draws = Draws(np.array([0.5, 1, 2, 0, 4.5]), np.array([1, 0, 1, 0, 1]), 8, seed=42)
    assert [draws.times(e).tolist() for e in range(3)] == [[1, 1, 2, 0, 4], [0, 1, 2, 0, 5], [1, 1, 2, 0, 4]], why
    order = Order([2, 3], 42, draws=draws)
    assert order.epoch(1).tolist() == [2, 1, 4, 4, 2, 4, 4, 4], why
    large = Draws(np.arange(12_000) % 9 / 4, np.arange(12_000) % 5, 12_000, seed=7)
    order = Order([6000, 6000], 7, joined=lambda a, b: (a < b) & (b < a + 4), draws=large)
    assert zlib.crc32(np.stack(of_epoch(order, 2)).astype("<i8").tobytes()) == 3532418047, why


def test_a_mixture_reads_from_all_its_roots_in_their_shares(train, photos):
    others = index.load(photos).split("train")
    mixed, draws = selection.mixture([(train, 1), (others, 3)], seed=2, length=1000)
    assert (len(mixed), mixed.root, mixed.name) == (len(train) + len(others), "", "train")
    order = Order(mixed.counts, 2, joined=mixed.joined, draws=draws)
    for e in range(3):
        assert (order.epoch(e) >= len(train)).sum() == 750
    assert mixed.keys.to_pylist() == train.keys.to_pylist() + others.keys.to_pylist()
    assert mixed.source.to_pylist()[-1] == others.source.to_pylist()[-1]
    assert mixed.digests == train.digests + others.digests
    reads(mixed)


def test_a_mixture_of_parts_of_splits_is_like_any_split(train, photos):
    held_out = selection.fold(index.load(photos).split("train"), 3, 0)[1]
    mixed, _ = selection.mixture([(train, 1), (held_out, 1)], seed=0)
    again, _ = selection.mixture([(mixed.take(np.arange(1, len(mixed), 3)), 1), (held_out, 1)], seed=0)
    assert again.keys.to_pylist() == mixed.keys.to_pylist()[1::3] + held_out.keys.to_pylist()
    assert sorted(Order(again.counts, 1, joined=again.joined).epoch(0)) == list(range(len(again)))
    reads(again)


def test_the_parts_of_a_mixture_can_be_balanced_inside(train):
    rare = train.take(np.flatnonzero((train.label > 0) | (np.arange(len(train)) % 9 == 0)))
    parts = [(rare, 2.0), (selection.classes(train, [0, 1]), 1.0)]
    mixed, draws = selection.mixture(parts, 1, 900, [selection.class_balanced(rare), None])
    times, first = draws.times(4), np.arange(len(mixed)) < len(rare)
    assert np.bincount(mixed.label[first], times[first]).tolist() == [60] * 10
    assert times[~first].sum() == 300


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda s: selection.subset(s, 0), "fraction 0"),
        (lambda s: selection.subset(s, 1.5), "fraction 1.5"),
        (lambda s: selection.subset(s, 1e-12), "use a larger one"),
        (lambda s: selection.fold(s, 1, 0), "at least 2 folds"),
        (lambda s: selection.fold(s, 5, 5), "fold 5 of 5"),
        (lambda s: selection.fold(s.take([0]), 2, 0), "use fewer folds"),
        (lambda s: selection.classes(s, [4, 77]), "class 77"),
        (lambda s: selection.weighted(s, {77: 2}), "class 77"),
        (lambda s: selection.weighted(s, {4: -1}), "none below 0"),
        (lambda s: selection.weighted(s, np.ones(3)), "one a sample"),
        (lambda s: selection.weighted(s, np.zeros(len(s))), "at least above"),
        (lambda s: selection.weighted(s, np.full(len(s), np.inf)), "all finite"),
        (lambda s: selection.class_balanced(made_up([9], labels=0)), "without a class"),
        (lambda s: selection.draws(s, np.ones(len(s)), 0, 0), "an epoch of 0"),
        (lambda s: selection.mixture([], 0), "at least one dataset"),
        (lambda s: selection.mixture([(s, 1), (s, 0)], 0), "share of 0"),
        (lambda s: Order([5], 0, draws=Draws(np.ones(4), np.zeros(4), 4, 0)), "4 rows, the split holds 5"),
    ],
)
def test_what_cannot_be_chosen_is_refused_with_what_can(train, wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong(train)
