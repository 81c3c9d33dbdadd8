"""What a step holds is a function of its position: not of ranks, threads, restarts, nor of damage beside it."""

import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import wait_for

from pipeline import storage
from pipeline.loading.augment import Augment, decode, fit
from pipeline.loading.kept import Kept
from pipeline.loading.order import Batching, Order
from pipeline.loading.selection import draws
from pipeline.loading.steps import Reader, Steps, fixed_batches
from pipeline.shards import index, tar
from pipeline.shards.build import build
from pipeline.shards.plan import Recipe

SIDE = 32
AUGMENTS = {
    "plain": Augment(SIDE, 1),
    "pad and flip": Augment(SIDE, 1, crop="pad", flip=True),
    "resized": Augment(SIDE, 1, crop="resized", flip=True),
    "recoloured": Augment(SIDE, 1, crop="pad", flip=True, policy="rand", jitter=0.3, erase=0.4),
}


def same(one, other):
    return all(
        np.array_equal(np.asarray(getattr(one, name)), np.asarray(getattr(other, name)))
        for name in ("images", "labels", "weights", "rows")
    )


def steps_of(split, augment, batching, first, last, threads=1, seed=3, ahead=6, readers=None):
    """{(step, micro-batch): Batch} of steps [first, last), all ranks."""
    found = {}
    for rank in range(batching.world):
        loader = Steps(split, augment, seed, batching, rank, first * batching.batch, threads, ahead)
        if readers is not None:
            readers.append(loader.reader)
        steps = iter(loader)
        for number in range(first, last):
            step = next(steps)
            assert (step.number, list(step.own)) == (number, list(range(rank, batching.micro_batches, batching.world)))
            found |= {(number, j): batch for j, batch in zip(step.own, step.micro_batches, strict=True)}
        steps.close()
    return found


@pytest.fixture(scope="module")
def train(digits):
    return index.load(digits).split("train")


@pytest.fixture(scope="module")
def unbroken(train):
    """Eight steps of 256 from the middle of epoch 0 into epoch 1, at one rank and thread, for each augmentation."""
    return {name: steps_of(train, a, Batching(256, 4), 3, 11) for name, a in AUGMENTS.items()}


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_micro_batches_are_the_same_at_every_world_size_and_number_of_threads(train, unbroken, augment, world, threads):
    found = steps_of(train, AUGMENTS[augment], Batching(256, 4, world), 3, 11, threads)
    assert found.keys() == unbroken[augment].keys()
    assert all(same(found[at], unbroken[augment][at]) for at in found)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 10), st.sampled_from([1, 2, 4]), st.sampled_from(list(AUGMENTS)), st.integers(1, 9))
def test_a_loader_made_at_any_step_goes_on_as_one_never_stopped(train, unbroken, start, world, augment, ahead):
    found = steps_of(train, AUGMENTS[augment], Batching(256, 4, world), start, 11, ahead=ahead)
    assert all(same(batch, unbroken[augment][at]) for at, batch in found.items())


def test_a_loader_iterated_again_goes_on_where_it_stopped(train, unbroken):
    loader = Steps(train, AUGMENTS["resized"], 3, Batching(256, 4), 0, 3 * 256, 3)
    for number in range(3, 11):
        steps = iter(loader)
        step = next(steps)
        steps.close()
        assert step.number == number
        assert all(same(b, unbroken["resized"][number, j]) for j, b in zip(step.own, step.micro_batches, strict=True))


def test_an_epoch_draws_each_sample_once_with_its_own_pixels_and_label(train):
    batching, augment = Batching(128, 2), AUGMENTS["plain"]
    found = steps_of(train, augment, batching, 0, batching.steps(len(train)))
    drawn = np.empty(batching.batch * batching.steps(len(train)), np.int64)
    for (step, j), batch in found.items():
        drawn[batching.positions(step, j)] = batch.rows
    assert np.array_equal(np.sort(drawn[: len(train)]), np.arange(len(train)))
    assert np.array_equal(drawn[: len(train)], Order(train.counts, 3).epoch(0))
    for batch in list(found.values())[:4]:
        assert batch.weights.tolist() == [1.0] * len(batch.rows)
        assert batch.labels.tolist() == train.label[batch.rows].tolist()
        for image, row in zip(batch.images.numpy(), batch.rows, strict=True):
            path = os.path.join(train.root, train.shards[train.shard[row]])
            raw = tar.read_sample(path, int(train.offset[row]), int(train.size[row]))
            assert np.array_equal(image, decode(raw, 1))


def test_the_crop_of_a_sample_does_not_depend_on_who_shares_its_batch(train):
    def crops(batch):
        found = steps_of(train, AUGMENTS["resized"], Batching(batch, 1), 0, 1600 // batch)
        return {row: image for b in found.values() for row, image in zip(b.rows, b.images.numpy(), strict=True)}

    small, large = crops(32), crops(400)
    assert small.keys() == large.keys()
    assert all(np.array_equal(small[row], large[row]) for row in small)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_sample_looks_otherwise_each_time_it_is_drawn(train, weighted):
    """In another epoch, and again in the same one where some are drawn several times."""
    split = train.take(np.arange(0, len(train), 20))
    chosen = draws(split, np.where(np.arange(len(split)) % 9, 1.0, 8.0), 3) if weighted else None
    steps, looks = iter(Steps(split, AUGMENTS["resized"], 3, Batching(16), draws=chosen)), {}
    for _ in range(4 * len(split) // 16):
        (batch,) = next(steps).micro_batches
        for row, image in zip(batch.rows.tolist(), batch.images.numpy(), strict=True):
            looks.setdefault(row, []).append(image.tobytes())
    steps.close()
    assert max(map(len, looks.values())) >= (10 if weighted else 4)
    assert all(len(set(seen)) == len(seen) for seen in looks.values())


def test_seeds_draw_and_vary_otherwise(train):
    one, two = (steps_of(train, AUGMENTS["resized"], Batching(64), 0, 1, seed=s)[0, 0] for s in (0, 1))
    assert not np.array_equal(one.rows, two.rows)


def test_a_position_inside_a_step_is_refused(train):
    with pytest.raises(ValueError, match="position 100 is not a multiple of the batch 64"):
        Steps(train, AUGMENTS["plain"], 0, Batching(64), position=100)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_the_shapes_nothing_is_repeated_dropped_or_otherwise_drawn(train, data):
    """Few samples, uneven and empty shards, batches larger than the dataset; stops, other worlds and threads."""
    rows = data.draw(st.lists(st.integers(0, len(train) - 1), min_size=1, max_size=150, unique=True), "rows")
    split, augment = train.take(np.sort(rows)), AUGMENTS["resized"]
    micro_batches = data.draw(st.sampled_from([1, 2, 4, 8, 16]), "micro-batches")
    batch = micro_batches * data.draw(st.integers(1, 12), "samples of each")
    last = -(-2 * len(split) // batch) + 1
    whole = steps_of(split, augment, Batching(batch, micro_batches), 0, last)
    drawn = np.empty(last * batch, np.int64)
    for (step, j), one in whole.items():
        drawn[Batching(batch, micro_batches).positions(step, j)] = one.rows
    for epoch in range(2):
        assert np.sort(drawn[epoch * len(split) : (epoch + 1) * len(split)]).tolist() == list(range(len(split)))
    first = 0
    while first < last:
        world = data.draw(st.sampled_from([w for w in (1, 2, 4, 8, 16) if micro_batches % w == 0]), "world")
        stop = data.draw(st.integers(first + 1, last), "stop")
        threads = data.draw(st.integers(1, 8), "threads")
        part = steps_of(split, augment, Batching(batch, micro_batches, world), first, stop, threads)
        assert all(same(whole[at], found) for at, found in part.items())
        assert len(part) == (stop - first) * micro_batches
        first = stop


def test_what_an_image_looks_like_changes_with_options_epoch_and_seed(photos):
    split = index.load(photos).split("train")
    plain = Augment(48, 3, crop="resized")
    looks = {}
    for name, options in {
        "plain": {}, "trivial": {"policy": "trivial"}, "rand": {"policy": "rand"}, "jitter": {"jitter": 0.4},
        "hue": {"hue": 0.3}, "erase": {"erase": 1.0}, "more of rand": {"policy": "rand", "policy_ops": 4},
        "stronger rand": {"policy": "rand", "policy_magnitude": 30},
    }.items():  # fmt: skip
        found = steps_of(split, replace(plain, **options), Batching(32, 2), 0, 2)
        again = steps_of(split, replace(plain, **options), Batching(32, 2, 2), 0, 2, 3)
        assert all(same(found[at], again[at]) for at in found)
        looks[name] = np.concatenate([found[at].images.numpy() for at in sorted(found)])
    names = list(looks)
    assert not any(np.array_equal(looks[a], looks[b]) for i, a in enumerate(names) for b in names[:i])
    assert (looks["erase"] != looks["plain"]).any(axis=(1, 2, 3)).mean() > 0.9


# ---- damage


@pytest.fixture
def copied(digits, tmp_path):
    """A copy of the digits of one's own, to damage."""
    shutil.copytree(digits, tmp_path / "copy")
    return index.load(str(tmp_path / "copy")).split("train")


def damage(split, rows):
    for row in rows:
        with open(os.path.join(split.root, split.shards[split.shard[row]]), "r+b") as file:
            file.seek(int(split.offset[row] + split.size[row] // 2))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0x55]))


@pytest.mark.filterwarnings("ignore:sample set aside")
@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("count", [1, 20])
def test_bad_samples_alone_lose_their_weight_and_a_neighbour_stands_in(copied, unbroken, augment, world, count):
    bad = {int(row) for at in unbroken[augment] for row in unbroken[augment][at].rows[:2]}
    bad = sorted(bad)[:: len(bad) // count][:count]
    damage(copied, bad)
    readers = []
    found = steps_of(copied, AUGMENTS[augment], Batching(256, 4, world), 3, 11, 3, readers=readers)
    met = set()
    for at, batch in found.items():
        good = unbroken[augment][at]
        lost = np.isin(good.rows, bad)
        met |= set(good.rows[lost].tolist())
        assert batch.weights.tolist() == (~lost).astype(float).tolist()
        for name in ("images", "labels", "rows"):
            kept, expected = (np.asarray(getattr(b, name))[~lost] for b in (batch, good))
            assert np.array_equal(kept, expected)
        assert np.isin(batch.rows[lost], good.rows[~lost]).all()
        assert batch.labels.tolist() == copied.label[batch.rows].tolist()
    assert met == set(bad)
    named = {row: entry for reader in readers for row, entry in reader.quarantined.items()}
    assert met <= named.keys() <= set(bad)
    for row, (shard, key, reason) in named.items():
        assert shard == copied.shards[copied.shard[row]]
        assert key == copied.keys[row].as_py()
        assert "checksum" in reason


def test_a_bad_sample_is_told_by_name_once(copied):
    damage(copied, [5])
    epochs = Batching(128).steps(2 * len(copied))
    with pytest.warns(UserWarning, match="sample set aside") as told:
        steps_of(copied, AUGMENTS["plain"], Batching(128), 0, epochs)
    assert len(told) == 1
    assert copied.keys[5].as_py() in str(told[0].message)
    assert copied.shards[copied.shard[5]] in str(told[0].message)


@pytest.mark.filterwarnings("ignore:sample set aside")
def test_more_bad_samples_than_the_limit_are_an_error(copied):
    damage(copied, range(130))
    with pytest.raises(ValueError, match=r"101 samples of .*copy could not be read.*train-00000.*shard them again"):
        steps_of(copied, AUGMENTS["plain"], Batching(128), 0, 13)


@pytest.mark.filterwarnings("ignore:sample set aside")
def test_a_micro_batch_without_one_good_sample_is_an_error_that_names_one(copied):
    first = steps_of(copied, AUGMENTS["plain"], Batching(4), 0, 1)[0, 0].rows
    damage(copied, first)
    with pytest.raises(ValueError, match=r"no sample of a whole batch can be read.*train-00000"):
        steps_of(copied, AUGMENTS["plain"], Batching(4), 0, 1)


def test_a_read_that_failed_once_is_repeated(copied):
    """The window in memory was bad, the file is not: nothing is lost."""
    reader = Reader(copied, AUGMENTS["plain"])
    window = bytearray(reader.fetch(0, 16))
    window[: int(copied.size[0])] = bytes(int(copied.size[0]))
    batch, _ = reader.batch(np.arange(16), np.zeros(16, np.int64), [bytes(window)] * 16)
    assert batch.weights.tolist() == [1.0] * 16
    assert not reader.quarantined


@pytest.mark.timeout(60)
@pytest.mark.parametrize("lost", ["truncated", "missing", "empty"])
def test_a_shard_that_is_gone_or_cut_is_an_error_that_names_it(copied, lost):
    before = set(threading.enumerate())
    path = os.path.join(copied.root, copied.shards[2])
    if lost == "missing":
        os.unlink(path)
    else:
        os.truncate(path, 5000 if lost == "truncated" else 0)
    with pytest.raises(OSError, match=copied.shards[2]):
        steps_of(copied, AUGMENTS["plain"], Batching(128, 2, 2), 0, 13)
    with pytest.raises(OSError, match=copied.shards[2]):
        list(fixed_batches(copied, AUGMENTS["plain"], 100))
    wait_for(lambda: set(threading.enumerate()) <= before, 20, "end of the threads")


def test_an_evaluation_over_a_bad_sample_is_an_error_that_names_it(copied):
    damage(copied, [3])
    key = copied.keys[3].as_py()
    with pytest.raises(ValueError, match=key), pytest.warns(UserWarning, match=key):
        list(fixed_batches(copied, AUGMENTS["plain"], 100))


@pytest.mark.timeout(60)
def test_a_crash_in_a_thread_reaches_the_consumer_and_names_the_sample(train, monkeypatch):
    rows = Order(train.counts, 3).samples(np.arange(64))[0]
    bad = tar.read_sample(
        os.path.join(train.root, train.shards[train.shard[rows[7]]]),
        int(train.offset[rows[7]]),
        int(train.size[rows[7]]),
    )

    def crashing(data, *more):
        if bytes(data) == bad:
            raise ZeroDivisionError("a bug")
        return decode(data, *more)

    monkeypatch.setattr("pipeline.loading.augment.decode", crashing)
    with pytest.raises(ZeroDivisionError) as crash:
        steps_of(train, AUGMENTS["plain"], Batching(64), 0, 2)
    assert any(train.keys[int(rows[7])].as_py() in note for note in crash.value.__notes__)


# ---- evaluation


def test_evaluation_sees_the_side_and_the_share_of_the_centre_that_it_is_asked_for(train, photos):
    for split, channels in ((train, 1), (index.load(photos).split("train"), 3)):
        augment = Augment(16, channels, eval_size=24, eval_share=0.75, exact_decode=True)
        reader, rows = Reader(split, augment), np.arange(4)
        windows = [reader.fetch(row, row + 1) for row in range(4)]
        expected = np.stack([fit(decode(window, channels), 24, 32) for window in windows])
        again = [reader.batch(rows, rows, windows)[0] for _ in range(2)]  # digits are kept as pixels by then
        for batch in (next(fixed_batches(split, augment, 4)), *again):
            assert np.array_equal(batch.images.numpy(), expected)
        training, _ = reader.batch(rows, rows, windows, 0, np.zeros(4, np.int64))
        assert training.images.shape == (4, 16, 16, channels)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [7, 256, 5000])
def test_evaluation_counts_each_sample_once_in_batches_that_do_not_depend_on_the_world(train, world, size):
    cut = [
        batch
        for rank in range(world)
        for batch in fixed_batches(train, AUGMENTS["plain"], size, rank, world, threads=rank + 1)
    ]
    cut.sort(key=lambda batch: batch.rows[0])
    kept = np.concatenate([batch.rows[batch.weights.numpy() > 0] for batch in cut])
    assert np.array_equal(kept, np.arange(len(train)))
    assert all(batch.images.shape == (size, SIDE, SIDE, 1) for batch in cut)
    *full, last = cut
    assert all(batch.weights.min() == 1 for batch in full)
    assert last.weights.tolist() == [1.0] * (len(train) - size * len(full)) + [0.0] * (size * len(cut) - len(train))
    assert np.concatenate([batch.labels for batch in cut])[: len(train)].tolist() == train.label.tolist()


def test_evaluation_does_not_augment(train):
    one, two = (next(iter(fixed_batches(train, AUGMENTS[name], 50))) for name in ("plain", "resized"))
    assert same(one, two)


# ---- other data


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_images_of_many_sizes_and_both_kinds_of_colour_go_into_one_batch(photos, channels, crop):
    split = index.load(photos).split("train")
    assert len(set(zip(split.width.tolist(), split.height.tolist(), strict=True))) > 10
    assert set(split.channels.tolist()) == {1, 3}
    augment = Augment(24, channels, crop=crop, flip=crop != "none", exact_decode=crop == "none")
    found = steps_of(split, augment, Batching(32, 2), 0, 4)
    again = steps_of(split, augment, Batching(32, 2, 2), 0, 4, 3)
    assert all(same(found[at], again[at]) for at in found)
    for batch in found.values():
        assert batch.images.shape == (16, 24, 24, channels)
        if crop == "none":
            for image, row in zip(batch.images.numpy(), batch.rows, strict=True):
                path = os.path.join(split.root, split.shards[split.shard[row]])
                raw = tar.read_sample(path, int(split.offset[row]), int(split.size[row]))
                assert np.array_equal(image, fit(decode(raw, channels), 24))


def test_a_split_smaller_than_a_batch_comes_round_within_it(photos):
    split = index.load(photos).split("val")
    n = len(split)
    batch = steps_of(split, Augment(16, 3), Batching(4 * n), 0, 1)[0, 0]
    assert np.bincount(batch.rows, minlength=n).tolist() == [4] * n


def test_from_s3_as_from_disk(digits, train, unbroken, s3):
    root = s3.fresh()
    for file in storage.list_files(digits):
        storage.write(storage.join(root, file.path), storage.read(os.path.join(digits, file.path)))
    split = index.load(root).split("train")
    found = steps_of(split, AUGMENTS["resized"], Batching(256, 4, 2), 3, 11, 3)
    assert all(same(found[at], unbroken["resized"][at]) for at in found)
    for one, two in zip(*(fixed_batches(s, AUGMENTS["plain"], 600) for s in (split, train)), strict=True):
        assert same(one, two)


def test_all_images_of_a_step_have_the_side_of_its_first_sample_s_epoch(train):
    augment = Augment(32, 1, crop="resized", start_size=16, ramp_to=2)
    found = steps_of(train, augment, Batching(256, 2), 0, 14)
    sides = [found[step, 0].images.shape[1] for step in range(14)]
    assert sides == [augment.side(step * 256 // len(train)) for step in range(14)]
    assert set(sides) == {16, 24, 32}
    assert all(found[step, 1].images.shape[1] == side for step, side in enumerate(sides))


# ---- memory


def test_a_small_dataset_is_read_in_its_first_epoch_alone(train, monkeypatch):
    for name in ("plain", "resized"):
        loader = Steps(train, AUGMENTS[name], 3, Batching(256, 4))
        steps = iter(loader)
        first = [next(steps) for _ in range(7)]  # more than one epoch
        assert first[-1].number * 256 < len(train) < (first[-1].number + 1) * 256
        pending = [next(steps) for _ in range(loader.ahead)]  # planned while some rows were missing still
        with monkeypatch.context() as without:
            without.setattr(storage, "read_range", None)
            kept = {}
            for _ in range(8):
                step = next(steps)
                kept |= {(step.number, j): batch for j, batch in zip(step.own, step.micro_batches, strict=True)}
        steps.close()
        assert pending
        fresh = steps_of(train, AUGMENTS[name], Batching(256, 4), min(kept)[0], max(kept)[0] + 1)
        assert all(same(kept[at], fresh[at]) for at in fresh)


@pytest.mark.parametrize("keeps", [True, False])
def test_jpegs_much_larger_than_needed_look_alike_to_whoever_comes_later(tmp_path, photos, monkeypatch, keeps):
    """An image kept from an epoch that cropped it tightly must not differ from one first seen by a later epoch."""
    source = os.path.join(os.path.dirname(photos), "in")
    build(f"folder:{source}", str(tmp_path / "out"), Recipe(size=40, fit="crop", format="jpg"), workers=0)
    split = index.load(str(tmp_path / "out")).split("train")
    kept = Kept(split, 3, (1 << 20) if keeps else 0)
    assert kept.keeps == keeps
    monkeypatch.setattr("pipeline.loading.reader.Kept", lambda *_: Kept(split, 3, (1 << 20) if keeps else 0))
    augment, batching = Augment(10, 3, crop="resized"), Batching(16, 2)
    last = 6 * len(split) // 16
    whole = steps_of(split, augment, batching, 0, last)
    for first in range(1, last, 5):
        later = steps_of(split, augment, batching, first, min(first + 3, last))
        assert all(same(whole[at], found) for at, found in later.items())


def test_what_is_too_large_or_of_many_sizes_is_not_kept(train, photos):
    assert Kept(train, 1)._pixels.nbytes == len(train) * 32 * 32
    assert Kept(train, 1, limit=len(train) * 32 * 32 - 1)._pixels is None
    assert Kept(index.load(photos).split("train"), 3)._pixels is None


def test_memory_of_batches_is_used_again_once_they_are_let_go_and_not_before(train, monkeypatch):
    steps = iter(Steps(train, AUGMENTS["resized"], 3, Batching(64), ahead=2))
    held = [next(steps).micro_batches[0].images for _ in range(12)]
    assert len({images.data_ptr() for images in held}) == 12
    copies = [images.clone() for images in held]
    met = set()
    for _ in range(12):
        met.add(next(steps).micro_batches[0].images.data_ptr())
    assert all(torch.equal(images, copy) for images, copy in zip(held, copies, strict=True))
    assert len(met) <= 4
    one = held[0][5]  # a view keeps its batch
    del held
    for _ in range(12):
        next(steps)
    assert torch.equal(one, copies[0][5])
    steps.close()


def test_windows_are_let_go_with_their_last_sample(train, monkeypatch):
    monkeypatch.setattr(Kept, "put", lambda *_: None)
    loader = Steps(train, AUGMENTS["plain"], 3, Batching(64), ahead=1)
    steps = iter(loader)
    while loader.position + 64 < len(train):
        next(steps)
    assert len(loader._windows._held) <= 64
    steps.close()


# ---- threads


@pytest.mark.timeout(60)
def test_closing_leaves_no_threads(train):
    before = set(threading.enumerate())
    steps = iter(Steps(train, AUGMENTS["resized"], 0, Batching(512, 4), threads=3))
    next(steps)
    assert set(threading.enumerate()) - before
    steps.close()
    batches = fixed_batches(train, AUGMENTS["plain"], 64, threads=3)
    next(batches)
    batches.close()
    iter(Steps(train, AUGMENTS["plain"], 0, Batching(512))).close()
    wait_for(lambda: set(threading.enumerate()) <= before, 20, "end of the threads")
