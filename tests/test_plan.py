import re
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest

from pipeline.shards import split
from pipeline.shards.plan import Recipe, fingerprint, key, key_bits, plan
from pipeline.sources.listing import Listing


def listing(count, classes=10, splits=None):
    columns = {
        "name": [f"{i % classes:02d}/{i:07d}.jpg" for i in range(count)],
        "label": [i % classes for i in range(count)],
        "split": [splits(i) if splits else None for i in range(count)],
        "size": [100 + i for i in range(count)],
        "tag": [str(i) for i in range(count)],
    }
    return Listing.of(columns, [f"{i:02d}" for i in range(classes)], "jpg")


def names(items, plans):
    return {p.name: items["name"].take(p.rows).to_pylist() for p in plans}


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 1234])
def test_every_sample_is_in_exactly_one_shard_of_near_equal_size(count):
    plans = plan(listing(count), Recipe(samples_per_shard=100))
    assert sorted(np.concatenate([p.rows for p in plans]).tolist()) == list(range(count))
    for name in {p.split for p in plans}:
        sizes = [len(p.rows) for p in plans if p.split == name]
        assert max(sizes) <= 100
        assert max(sizes) - min(sizes) <= 1
        assert [p.name for p in plans if p.split == name] == [f"{name}-{i:06d}" for i in range(len(sizes))]


def test_the_same_listing_and_seed_give_the_same_plan_and_another_seed_another_order_but_the_same_holdout():
    items = listing(2000)
    a, b, c = (names(items.items, plan(items, Recipe(seed=seed))) for seed in (3, 3, 4))
    assert a == b
    assert a != c
    assert sorted(a["val-000000"]) == sorted(c["val-000000"])


def test_every_shard_is_a_mix_of_the_classes():
    items = listing(5000)
    labels = items.items["label"].to_numpy()
    for each in plan(items, Recipe(samples_per_shard=500)):
        assert len(set(labels[each.rows])) == 10
        counts = np.bincount(labels[each.rows], minlength=10)
        assert counts.max() < 3 * counts.min()


def test_about_the_fraction_is_held_out_and_growth_moves_nobody():
    small, large = listing(5000), listing(8000)
    held = [{n for k, v in names(i.items, plan(i, Recipe())).items() if k.startswith("val") for n in v}
            for i in (small, large)]  # fmt: skip
    assert 400 < len(held[0]) < 600
    assert held[1] & set(small.items["name"].to_pylist()) == held[0]
    assert not any(p.split == "val" for p in plan(small, Recipe(val_fraction=0)))


def test_splits_of_the_source_are_kept_and_val_is_taken_from_train_alone_only_where_there_is_none():
    with_test = listing(1000, splits=lambda i: "test" if i % 4 == 0 else "train")
    sizes = {name: sum(len(p.rows) for p in plan(with_test, Recipe()) if p.split == name) for name in ("test", "val")}
    assert sizes["test"] == 250
    assert 40 < sizes["val"] < 110
    with_val = listing(1000, splits=lambda i: "val" if i % 4 == 0 else "train")
    assert sum(len(p.rows) for p in plan(with_val, Recipe()) if p.split == "val") == 250


def test_a_split_name_that_would_break_file_names_is_refused():
    with pytest.raises(ValueError, match=r"'\.\./x'"):
        plan(listing(3, splits=lambda i: "../x"), Recipe())


def test_keys_are_ascii_without_dots_and_duplicates_are_named():
    for name in ("cat/ü 1.jpg", "\udcff.png"):
        assert re.fullmatch("[0-9a-f]{20}", key(name))
    assert key_bits(pa.chunked_array([["a"], ["b"]]))[0] == int(key("a")[:16], 16)
    with pytest.raises(ValueError, match=r"'same\.jpg'"):
        key_bits(pa.chunked_array([["same.jpg", "other.jpg", "same.jpg"]]))


def test_the_fingerprint_sees_content_but_not_times_or_chunks():
    a = listing(100)
    touched = Listing(a.items.set_column(4, "tag", pa.array(["new"] * 100)), a.classes, a.format)
    chunked = Listing(pa.concat_tables([a.items[:37], a.items[37:]]), a.classes, a.format)
    assert fingerprint(a) == fingerprint(touched) == fingerprint(chunked)
    others = [listing(101), listing(100, classes=9), listing(100, splits=lambda i: "train"),
              Listing(a.items.set_column(3, "size", pa.array(range(100))), a.classes, a.format),
              Listing(a.items, a.classes[::-1], a.format)]  # fmt: skip
    assert len({fingerprint(each) for each in [a, *others]}) == 6


def test_a_recipe_checks_itself_and_names_the_value():
    wrong = {"samples_per_shard": 0, "val_fraction": 1.0, "seed": -1, "format": "gif", "quality": 0, "size": -5,
             "labels": "all"}  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} .*{value}"):
            Recipe(**{name: value})


def test_of_keys_follows_the_fraction():
    bits = key_bits(pa.chunked_array([[str(i) for i in range(20_000)]]))
    assert abs(split.of_keys(bits, 0.25).mean() - 0.25) < 0.02
    assert not split.of_keys(bits, 0).any()


def test_a_million_items_are_planned_in_seconds():
    count = 1_000_000
    columns = {"name": pa.array(np.char.add("train/", np.arange(count).astype(str))),
               "label": pa.array(np.arange(count, dtype=np.int32) % 1000), "split": pa.nulls(count, pa.string()),
               "size": pa.array(np.arange(count)), "tag": pa.array([""] * count)}  # fmt: skip
    start = time.perf_counter()
    assert len(plan(Listing.of(columns, ("x",) * 1000, "jpg"), Recipe())) == 1001
    assert time.perf_counter() - start < 10


def test_the_cap_on_source_bytes_is_kept_with_near_equal_counts():
    items = listing(3000)  # of 100 to 3099 bytes
    sizes = items.items["size"].to_numpy()
    plans = plan(items, Recipe(bytes_per_shard=200_000, val_fraction=0))
    assert sorted(np.concatenate([p.rows for p in plans]).tolist()) == list(range(3000))
    assert max(sizes[p.rows].sum() for p in plans) <= 200_000
    assert len(plans) < 1.2 * sizes.sum() / 200_000
    counts = [len(p.rows) for p in plans]
    assert max(counts) - min(counts) <= 1
    assert [len(p.rows) for p in plan(listing(5), Recipe(bytes_per_shard=1, val_fraction=0))] == [1] * 5


def test_without_shuffling_the_order_is_the_sources():
    plans = plan(listing(500), Recipe(shuffle=False, samples_per_shard=90))
    for split_name in ("train", "val"):
        rows = np.concatenate([p.rows for p in plans if p.split == split_name])
        assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize(("rows_per_block", "window"), [(10, 20), (100, 8), (1000, 8)])
def test_a_shard_reads_few_blocks_and_is_mixed_all_the_same(rows_per_block, window):
    count, classes = 40_000, 40
    names = [f"t.parquet/{i:08d}" for i in range(count)]
    columns = {"name": names, "label": [i * classes // count for i in range(count)], "size": [0] * count}
    columns |= {"offset": list(range(count)), "block": [i // rows_per_block for i in range(count)]}
    items = Listing.of(columns, [str(c) for c in range(classes)], "jpg")
    blocks, labels = items.items["block"].to_numpy(), items.items["label"].to_numpy()
    plans = [p for p in plan(items, Recipe(samples_per_shard=200)) if p.split == "train"]
    assert sum(len(p.rows) for p in plans) > 35_000
    reads = np.array([len(np.unique(blocks[p.rows])) for p in plans])
    assert reads.max() <= 3 * window  # the rest of one window, a whole one, the beginning of a third
    assert np.mean([len(np.unique(labels[p.rows])) for p in plans]) > 6
    assert np.mean([(np.diff(labels[p.rows]) == 0).mean() for p in plans]) < 0.25


# ImageNet-21k: 14 million names in 21,841 classes.
PLANNING = """
import resource, time
import numpy as np, pyarrow as pa, pyarrow.compute as pc
from pipeline.shards.plan import Recipe, plan
from pipeline.sources.listing import Listing
number = np.arange(14_197_122)
label = pa.array((number % 21_841).astype(np.int32))
name = pc.binary_join_element_wise(label.cast(pa.string()), pa.array(number).cast(pa.string()), "/")
columns = {"name": name, "label": label, "size": pa.array(np.full(len(number), 110_000))}
listing = Listing.of(columns, [str(c) for c in range(21_841)], "jpg")
start = time.perf_counter()
plans = plan(listing, Recipe())
seconds = time.perf_counter() - start
print(len(plans), sum(len(each.rows) for each in plans), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_imagenet_21k_is_planned_within_a_minute_and_4_gb():
    command = [sys.executable, "-c", PLANNING]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=280, check=True)
    shards, rows, seconds, kilobytes = map(float, done.stdout.split())
    assert rows == 14_197_122
    assert 14_198 <= shards <= 14_200
    assert seconds < 60
    assert kilobytes < 4_000_000
