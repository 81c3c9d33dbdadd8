"""A source that grows, changes and shrinks: generations, refusals, pruning, duplicates; and what holds meanwhile."""

import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_build import content

from pipeline import storage
from pipeline.shards import index, tar
from pipeline.shards.build import TooManyRejects, build, describe
from pipeline.shards.plan import Recipe, key

RECIPE = Recipe(samples_per_shard=20, val_fraction=0.2)


def paint(root, *names, seed=0):
    """Images of noise, each of its own name and seed; a name's class is its folder."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng([seed, *name.encode()])
        Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)


def names(*classes, start=0, end=30):
    return [f"{c}/{i:03d}.png" for c in classes for i in range(start, end)]


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "in"
    paint(root, *names("b", "d"))
    return root


def samples(out):
    """{source: (split, class name, pixels)} of everything a dataset holds, read from its shards."""
    data, found = index.load(str(out)), {}
    for name in data.info["splits"]:
        split = data.split(name)
        for i, source in enumerate(split.source.to_pylist()):
            path = os.path.join(out, split.shards[split.shard[i]])
            raw = tar.read_sample(path, int(split.offset[i]), int(split.size[i]))
            found[source] = (name, data.classes[split.label[i]], raw)
    return found


def test_what_a_source_got_since_is_a_generation_of_its_own(source, tmp_path):
    out = tmp_path / "out"
    build(str(source), str(out), RECIPE, workers=0)
    before, shards = samples(out), content(out)
    paint(source, *names("a", "b", start=30, end=40))
    told = describe(str(source), str(out), RECIPE)
    assert (told["samples"], told["done"]) == (20, False)
    result = build(str(source), str(out), RECIPE, workers=0)
    assert (result["added"], result["generations"], result["samples"]) == (20, 2, 80)
    data = index.load(str(out))
    assert data.classes == ("b", "d", "a")  # a label never changes
    after = samples(out)
    assert after.keys() == {*names("b", "d"), *names("a", "b", start=30, end=40)}
    assert {name: after[name] for name in before} == before
    assert all(after[name][1] == name[0] for name in after)
    kept = {name: digest for name, digest in content(out).items() if name in shards}
    del kept["dataset.json"], shards["dataset.json"]
    assert kept == shards  # nothing that stood was touched
    assert build(str(source), str(out), RECIPE, workers=0)["done"]


def test_the_holdout_stays_when_the_source_grows(source, tmp_path):
    paint(source, *names("b", "d", start=30, end=60))
    build(str(source), str(tmp_path / "whole"), RECIPE, workers=0)
    for name in names("b", "d", start=30, end=60):
        (source / name).rename(tmp_path / name.replace("/", "-"))
    build(str(source), str(tmp_path / "grown"), RECIPE, workers=0)
    for name in names("b", "d", start=30, end=60):
        (tmp_path / name.replace("/", "-")).rename(source / name)
    build(str(source), str(tmp_path / "grown"), RECIPE, workers=0)
    assert samples(tmp_path / "grown") == samples(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_chain_of_listings_gives_the_same_bytes(source, tmp_path, ray_local, workers):
    for out, how_many in (("one", 0), ("two", workers)):
        for name in names("a", "b", start=30, end=40):
            (source / name).unlink(missing_ok=True)
        build(str(source), str(tmp_path / out), RECIPE, workers=how_many)
        paint(source, *names("a", "b", start=30, end=40))
        for name in names("a", "b", start=30, end=40):
            os.utime(source / name, ns=(10**18, 10**18))
        build(str(source), str(tmp_path / out), RECIPE, workers=how_many)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("change", ["size", "content"])
def test_an_item_that_changed_under_its_name_is_refused_with_the_way_out(source, tmp_path, change):
    out = str(tmp_path / "out")
    build(str(source), out, RECIPE, workers=0)
    before, (old, other) = content(out), (source / "b/003.png", source / "b/004.png")
    data = old.read_bytes()
    old.write_bytes(other.read_bytes() if change == "size" else data[:-20] + b"x" + data[-19:])
    os.utime(old, ns=(1, 1))
    message = r"'b/003\.png': (size \d+ -> \d+|the same size, other content).*--prune replaces"
    if change == "size" and len(other.read_bytes()) == len(data):
        old.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=message):
        build(str(source), out, RECIPE, workers=0)
    assert content(out) == before
    assert not describe(str(source), out, RECIPE)["done"]


def test_a_file_that_was_only_touched_has_not_changed(source, tmp_path):
    out = str(tmp_path / "out")
    build(str(source), out, RECIPE, workers=0)
    before = content(out)
    os.utime(source / "b/003.png", ns=(1, 1))
    result = build(str(source), out, RECIPE, workers=0)
    assert (result["added"], result["pruned"]) == (0, 0)
    assert content(out) == before


def test_what_vanished_is_told_and_stays_until_it_is_pruned(source, tmp_path):
    out = tmp_path / "out"
    build(str(source), str(out), RECIPE, workers=0)
    whole, secret = samples(out), (source / "b/003.png").read_bytes()
    (source / "b/003.png").unlink()
    result = build(str(source), str(out), RECIPE, workers=0)
    assert (result["vanished"], result["done"]) == (["b/003.png"], True)
    assert samples(out) == whole
    result = build(str(source), str(out), RECIPE, workers=0, pruning=True)
    assert (result["vanished"], result["pruned"], result["samples"]) == ([], 1, 59)
    left = samples(out)
    assert left == {name: sample for name, sample in whole.items() if name != "b/003.png"}
    for folder, _, files in os.walk(out):
        for name in files:
            data = open(os.path.join(folder, name), "rb").read()  # noqa: SIM115
            assert b"b/003.png" not in data
            assert key("b/003.png").encode() not in data
            assert secret[60:120] not in data
            assert whole["b/003.png"][2][-60:] not in data
    assert build(str(source), str(out), RECIPE, workers=0)["done"]
    assert describe(str(source), str(out), RECIPE)["vanished"] == []


def test_pruning_leaves_what_a_fresh_dataset_of_the_rest_would_hold(source, tmp_path):
    out, recipe = tmp_path / "out", replace(RECIPE, format="png")  # lossless: pixel sums are of what is stored
    build(str(source), str(out), recipe, workers=0)
    paint(source, *names("a", start=0, end=25))
    build(str(source), str(out), recipe, workers=0)
    shutil.rmtree(source / "d")
    (source / "a/001.png").unlink()
    build(str(source), str(out), recipe, workers=0, pruning=True)
    build(str(source), str(tmp_path / "fresh"), recipe, workers=0)
    assert {name: raw for name, (_, _, raw) in samples(out).items()} == {
        name: raw for name, (_, _, raw) in samples(tmp_path / "fresh").items()
    }
    ours, fresh = (index.load(str(root)).info for root in (out, tmp_path / "fresh"))
    for fact in ("samples", "channels", "bytes", "histograms", "image_size", "mean", "std"):
        assert ours[fact] == fresh[fact], fact
    assert ours["classes"] == ["b", "d", "a"]
    assert sum(ours["splits"]["train"]["classes"]) == ours["splits"]["train"]["samples"]
    data = index.load(str(out))
    for shard in data.info["shards"]:
        assert [s.key for s in tar.scan(str(out / shard["name"]))] == data.shard_rows(shard["name"], ["key"])[
            "key"
        ].to_pylist()


def test_pruned_bytes_are_gone_though_what_was_to_be_added_fails(source, tmp_path):
    out = tmp_path / "out"
    build(str(source), str(out), RECIPE, workers=0)
    pruned = samples(out)["b/003.png"][2]
    (source / "b/003.png").unlink()
    (source / "b/bad.png").write_bytes(b"not an image")
    with pytest.raises(TooManyRejects):
        build(str(source), str(out), RECIPE, workers=0, max_rejects=0, pruning=True)
    assert len(samples(out)) == 59
    assert not [path for path in out.rglob("*") if path.is_file() and pruned[-60:] in path.read_bytes()]


def test_a_changed_item_is_replaced_by_pruning(source, tmp_path):
    out = tmp_path / "out"
    build(str(source), str(out), RECIPE, workers=0)
    before = samples(out)
    Image.new("RGB", (9, 9), "red").save(source / "b/003.png")
    result = build(str(source), str(out), RECIPE, workers=0, pruning=True)
    assert (result["samples"], result["pruned"], result["added"]) == (60, 1, 1)
    after = samples(out)
    assert after.keys() == before.keys()
    assert after["b/003.png"][:2] == before["b/003.png"][:2]
    assert after["b/003.png"][2] != before["b/003.png"][2]


def test_of_items_with_the_same_bytes_the_one_with_the_smallest_key_is_kept(source, tmp_path):
    copies = ["b/copy.png", "d/copy.png", "b/003.png"]
    for name in copies[:2]:
        shutil.copy(source / "b/003.png", source / name)
    recipe = Recipe(samples_per_shard=20, dedup="exact")
    result = build(str(source), str(tmp_path / "out"), recipe, workers=0, max_rejects=0)
    assert result["rejects"] == {"duplicate": 2}
    kept = min(copies, key=key)
    assert {name for name in samples(tmp_path / "out") if name in copies} == {kept}
    rejected = index.load(str(tmp_path / "out")).rejects().to_pylist()
    assert {row["source"] for row in rejected} == {*copies} - {kept}
    assert build(str(source), str(tmp_path / "out"), recipe, workers=0)["done"]


def test_an_earlier_generation_keeps_its_sample_whatever_the_keys(source, tmp_path):
    recipe, out = Recipe(samples_per_shard=20, dedup="exact"), tmp_path / "out"
    build(str(source), str(out), recipe, workers=0)
    smaller = next(f"b/x{i}.png" for i in range(100) if key(f"b/x{i}.png") < key("b/003.png"))
    shutil.copy(source / "b/003.png", source / smaller)
    paint(source, "b/new.png")
    result = build(str(source), str(out), recipe, workers=0)
    assert (result["added"], result["rejects"]) == (1, {"duplicate": 1})
    assert "b/003.png" in samples(out)


def test_near_duplicates_are_found_across_encodings(tmp_path):
    random = np.random.default_rng(0)
    for i in range(12):
        small = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC)
        (tmp_path / "in/a").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / f"in/a/{i}.png")
        if i < 4:
            picture.resize((80, 80)).save(tmp_path / f"in/a/{i}.jpg", quality=80)
    (tmp_path / "in/a/broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    source = str(tmp_path / "in")
    plain = build(source, str(tmp_path / "plain"), Recipe(dedup="exact"), workers=0)
    assert "duplicate" not in plain["rejects"]
    result = build(source, str(tmp_path / "out"), Recipe(dedup="near"), workers=0)
    assert result["rejects"].pop("duplicate") == 4
    assert sum(result["rejects"].values()) == 1  # the broken one has a reason of its own


def test_too_many_rejects_fail_the_build_and_finished_shards_serve_the_rerun(source, tmp_path):
    for i in range(12):
        (source / f"b/bad{i}.png").write_bytes(b"not an image")
    out = str(tmp_path / "out")
    with pytest.raises(TooManyRejects, match=r"11 items cannot be used \(not_an_image 11\) and --max-rejects is 10"):
        build(str(source), out, Recipe(samples_per_shard=1, val_fraction=0), workers=0)
    with pytest.raises(ValueError, match="not finished"):
        index.load(out)
    result = build(str(source), out, Recipe(samples_per_shard=1, val_fraction=0), workers=0, max_rejects=12)
    assert result["rejects"] == {"not_an_image": 12}
    assert result["skipped"] > 11


def test_a_killed_build_ends_with_what_it_began_with_and_the_growth_follows(source, tmp_path):
    out = tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(done, *_):
        if done == 2:
            raise Stop

    build(str(source), str(tmp_path / "whole"), RECIPE, workers=0)
    with pytest.raises(Stop):
        build(str(source), str(out), RECIPE, workers=0, progress=stop)
    paint(source, *names("a", end=5))
    build(str(source), str(tmp_path / "whole"), RECIPE, workers=0)
    result = build(str(source), str(out), RECIPE, workers=0)
    assert (result["skipped"], result["generations"]) == (2, 2)
    assert content(out) == content(tmp_path / "whole")


def test_growth_on_s3(source, tmp_path, s3):
    root = s3.fresh()
    there, out = storage.join(root, "in"), storage.join(root, "out")

    def upload():
        for file in storage.list_files(str(source)):
            if not storage.exists(storage.join(there, file.path)):
                storage.write(storage.join(there, file.path), storage.read(str(source / file.path)))

    upload()
    build(there, out, RECIPE, workers=0)
    paint(source, *names("a", end=5))
    upload()
    storage.delete(storage.join(there, "b/003.png"))
    result = build(there, out, RECIPE, workers=0, pruning=True)
    assert (result["added"], result["pruned"], result["samples"]) == (5, 1, 64)
    start = time.monotonic()
    assert build(there, out, RECIPE, workers=0)["done"]
    assert time.monotonic() - start < 5
    assert index.load(out).split("train").counts.sum() + index.load(out).split("val").counts.sum() == 64
