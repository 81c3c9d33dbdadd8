"""A dataset as it was before it grew: the same samples in the same places; what was pruned or rebuilt is refused."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from test_growth import RECIPE, names, paint

from pipeline import storage
from pipeline.shards import index, pinned
from pipeline.shards.build import build


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "in"
    paint(root, *names("b", "d"))
    return root


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_a_dataset_that_grew_can_be_had_as_it_was(source, place):
    out = storage.join(place, "out")
    build(str(source), out, RECIPE, workers=0)
    first = index.load(out)
    before = {name: first.split(name) for name in first.info["splits"]}
    assert pinned.at(first, pinned.generations(first)) is first
    paint(source, *names("a", "b", start=30, end=40))
    build(str(source), out, RECIPE, workers=0)
    grown = index.load(out)
    assert pinned.generations(grown)[:1] == pinned.generations(first)
    assert len(set(pinned.generations(grown))) == 2
    again = pinned.at(grown, pinned.generations(first))
    assert again.info["samples"] == first.info["samples"] < grown.info["samples"]
    assert again.info["shards"] == first.info["shards"]
    assert pinned.generations(again) == pinned.generations(first)
    assert again.rows().equals(first.rows())
    for name, split in before.items():
        now = again.split(name)
        assert now.keys.equals(split.keys)
        assert now.shards == split.shards
        assert all(np.array_equal(getattr(now, c), getattr(split, c)) for c in ("shard", "offset", "label", "crc32"))
        assert [again.classes[label] for label in now.label] == [first.classes[label] for label in split.label]


def test_a_split_that_came_later_is_not_in_what_was_before(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    paint(root, *(f"train/{name}" for name in names("b", "d", end=5)))
    build(str(root), str(out), RECIPE, workers=0)
    first = index.load(str(out))
    paint(root, *(f"test/{name}" for name in names("b", "d", end=5)))
    build(str(root), str(out), RECIPE, workers=0)
    assert "test" in index.load(str(out)).info["splits"]
    assert "test" not in pinned.at(index.load(str(out)), pinned.generations(first)).info["splits"]


def test_what_was_pruned_or_built_anew_is_refused_with_the_generation(source, tmp_path):
    out = tmp_path / "out"
    build(str(source), str(out), RECIPE, workers=0)
    paint(source, *names("b", start=30, end=40))
    build(str(source), str(out), RECIPE, workers=0)
    before = pinned.generations(index.load(str(out)))
    (source / "b" / "030.png").unlink()
    build(str(source), str(out), RECIPE, workers=0, pruning=True)
    with pytest.raises(ValueError, match=r"out is not the dataset that was: its generation 1 is another now.*--out"):
        pinned.at(index.load(str(out)), before)
    assert pinned.generations(pinned.at(index.load(str(out)), before[:1])) == before[:1]
    with pytest.raises(ValueError, match="its generation 2 is not there"):
        pinned.at(index.load(str(out)), [*pinned.generations(index.load(str(out))), "f" * 64])
    shutil.rmtree(out)
    build(str(source), str(out), replace(RECIPE, seed=4), workers=0)
    with pytest.raises(ValueError, match="its generation 0 is another now"):
        pinned.at(index.load(str(out)), before)
