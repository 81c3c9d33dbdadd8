import re
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
