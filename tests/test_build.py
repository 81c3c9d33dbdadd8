import fcntl
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import lease, storage
from pipeline.shards import image, index, tar
from pipeline.shards.build import build, describe
from pipeline.shards.plan import Recipe, key
from pipeline.sources.digits import digit_images

RECIPE = Recipe(samples_per_shard=40, size=24)
BAD = {"0/empty.png": b"", "1/text.jpg": b"not a picture at all", "2/zip.png": b"PK\x03\x04" + bytes(50)}


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 300 good images, PNG grey and JPEG colour, in ten classes, and four bad ones."""
    root = tmp_path_factory.mktemp("photos")
    pictures, labels = digit_images()
    for i in range(300):
        folder = root / str(labels[i])
        folder.mkdir(exist_ok=True)
        grey = Image.fromarray(pictures[i, :, :, 0])
        grey.save(folder / f"{i}.png") if i % 3 else grey.convert("RGB").resize((40, 32)).save(folder / f"{i}.jpg")
    for name, content in BAD.items():
        (root / name).write_bytes(content)
    (root / "3/cut.png").write_bytes((root / "3/13.png").read_bytes()[:-60])
    return f"folder:{root}"


@pytest.fixture(scope="session")
def built(photos, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("built") / "out")
    return out, build(photos, out, RECIPE, workers=0)


def content(root):
    """{path: SHA-256} of every file, hidden ones and those in flight too."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, root)] = hashlib.sha256(file.read()).hexdigest()
    return found


def test_the_result_counts_what_was_made_and_what_was_not(built):
    out, result = built
    assert (result["samples"], result["rejected"], result["done"]) == (300, 4, False)
    assert result["rejects"] == {"empty": 1, "not_an_image": 2, "truncated": 1}
    data = index.load(out)
    assert {r["source"]: r["reason"] for r in data.rejects().to_pylist()} == {
        "0/empty.png": "empty",
        "1/text.jpg": "not_an_image",
        "2/zip.png": "not_an_image",
        "3/cut.png": "truncated",
    }
    assert data.info["format"] == "jpg"
    assert data.info["image_size"] is None
    assert data.info["channels"] == {"1": 200, "3": 100}
    assert sum(split["samples"] for split in data.info["splits"].values()) == 300
    assert set(os.listdir(out)) == {"dataset.json", "index", *(shard["name"] for shard in data.info["shards"])}


def test_the_index_agrees_with_the_shards(built):
    out, _ = built
    data = index.load(out)
    recorded = {shard["name"]: shard for shard in data.info["shards"]}
    rows = pq.read_table(os.path.join(out, "index/000000.parquet")).to_pylist()
    scanned = [(name, sample) for name in sorted(recorded) for sample in tar.scan(os.path.join(out, name))]
    assert len(rows) == len(scanned)
    for row, (name, sample) in zip(rows, scanned, strict=True):
        assert (row["shard"], row["key"], row["offset"], row["size"]) == (name, sample.key, sample.offset, sample.size)
        assert row["label"] == sample.label == int(row["source"].split("/")[0])
        assert row["key"] == key(row["source"])
        columns = ("source", "source_bytes", "width", "height", "channels", "crc32")
        assert sample.facts == {column: row[column] for column in columns}
        assert (row["format"], row["beside"]) == (sample.extension, None)
        pixels = image.decode(tar.read_sample(os.path.join(out, name), row["offset"], row["size"]))
        assert pixels.shape == (row["height"], row["width"], row["channels"])
    for name, shard in recorded.items():
        assert shard["sha256"] == content(out)[name]
        assert shard["bytes"] == os.path.getsize(os.path.join(out, name))


def test_mean_and_std_are_those_of_the_training_images(tmp_path):
    out = str(tmp_path / "out")
    build("digits:", out, Recipe(samples_per_shard=500), workers=0)
    data = index.load(out)
    train = data.split("train")
    pictures = digit_images()[0][[int(name) for name in train.source.to_pylist()]] / 255
    assert data.info["mean"] == pytest.approx([pictures.mean()], abs=1e-7)
    assert data.info["std"] == pytest.approx([pictures.std()], abs=1e-7)
    raw = tar.read_sample(os.path.join(out, train.shards[train.shard[7]]), int(train.offset[7]), int(train.size[7]))
    assert np.array_equal(image.decode(raw), digit_images()[0][int(train.source[7].as_py())])


@pytest.mark.parametrize("workers", [1, 2])
def test_every_file_is_the_same_whatever_the_number_of_workers(photos, built, ray_local, tmp_path, workers):
    seen = []
    result = build(photos, str(tmp_path / "out"), RECIPE, workers, lambda *counts: seen.append(counts))
    assert content(tmp_path / "out") == content(built[0])
    assert result | {"seconds": 0} == built[1] | {"seconds": 0}
    shards = len([name for name in os.listdir(built[0]) if name.endswith(".tar")])
    assert [counts[:2] for counts in seen] == [(i, shards) for i in range(shards + 1)]
    assert seen[-1][2:] == (300, 4)
    layouts = {
        shard["name"]: index.load(built[0]).layout(shard["name"]) for shard in index.load(built[0]).info["shards"]
    }
    for name, layout in layouts.items():
        read = tar.read_shard(os.path.join(built[0], name))
        assert layout == [{x: place[:2] for x, place in members.items()} for _, members in read]


def test_another_seed_gives_other_shards_of_the_same_samples(photos, built, tmp_path):
    out = str(tmp_path / "out")
    build(photos, out, Recipe(samples_per_shard=40, size=24, seed=1), workers=0)
    ours, theirs = content(out), content(built[0])
    assert ours["train-000000.tar"] != theirs["train-000000.tar"]
    one, two = (index.load(root).split("train").keys.to_pylist() for root in (out, built[0]))
    assert sorted(one) == sorted(two)
    assert one != two


# A build that stops for good before shard 4: after one is done, or in the middle of one.
STOPPING = """
import sys, time
from pipeline.shards import build, image, plan
source, out, where = sys.argv[1:]
encode, calls = image.encode, []
def stop(*arguments):
    calls.append(1)
    if len(calls) > 130:
        print("stopped", flush=True)
        time.sleep(600)
    return encode(*arguments)
def report(done, *_):
    if done == 3:
        print("stopped", flush=True)
        time.sleep(600)
if where == "within":
    image.encode = stop
build.build(source, out, plan.Recipe(samples_per_shard=40, size=24), 0, report if where == "between" else None)
"""


@pytest.mark.parametrize("where", ["between", "within"])
def test_a_killed_build_run_again_ends_as_one_never_disturbed(photos, built, tmp_path, where):
    out = str(tmp_path / "out")
    command = [sys.executable, "-c", STOPPING, photos, out, where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "stopped\n"
        process.send_signal(signal.SIGKILL)
    with pytest.raises(ValueError, match="not finished"):
        index.load(out)
    assert any(name.endswith(".part") for name in os.listdir(out)) == (where == "within")
    before = {name: os.stat(os.path.join(out, name)).st_mtime_ns for name in os.listdir(out) if name.endswith(".tar")}
    assert len(before) == 3
    result = build(photos, out, RECIPE, workers=0)
    assert result["skipped"] == 3
    assert content(out) == content(built[0])
    assert before == {name: os.stat(os.path.join(out, name)).st_mtime_ns for name in before}


def test_a_build_killed_while_it_clears_up_is_cleared_up(photos, built, tmp_path):
    out = tmp_path / "out"
    build(photos, str(out), RECIPE, workers=0)
    (out / ".build").mkdir()
    (out / ".build/job.json").write_text('{"generation": 0}')
    (out / ".lease").write_text("{}")
    assert build(photos, str(out), RECIPE, workers=0)["done"]
    assert content(out) == content(built[0])


def test_what_a_killed_builders_task_still_wrote_at_the_rerun_is_not_left(photos, built, tmp_path):
    out = str(tmp_path / "out")
    os.mkdir(out)
    with open(storage.partial(os.path.join(out, "train-000003.tar")), "wb") as orphan:
        fcntl.flock(orphan, fcntl.LOCK_EX)
        build(photos, out, RECIPE, 0, lambda *_: orphan.close())  # dies while the rerun works
    assert content(out) == content(built[0])


def test_a_shard_that_lost_bytes_is_made_again(photos, built, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", STOPPING, photos, str(out), "between"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.kill()
    torn = next(path for path in sorted(out.iterdir()) if path.name.endswith(".tar"))
    torn.write_bytes(torn.read_bytes()[:-512])
    assert build(photos, str(out), RECIPE, workers=0)["skipped"] == 2
    assert content(out) == content(built[0])


def test_a_finished_build_run_again_does_no_work(photos, tmp_path):
    out = tmp_path / "out"
    first = build(photos, str(out), RECIPE, workers=0)
    before = {path: os.stat(path).st_mtime_ns for path in [out, *out.rglob("*")]}
    again = build(photos, str(out), RECIPE, workers=0)
    assert again["done"]
    assert {k: again[k] for k in ("samples", "rejects", "shards")} == {
        k: first[k] for k in ("samples", "rejects", "shards")
    }
    assert before == {path: os.stat(path).st_mtime_ns for path in [out, *out.rglob("*")]}


def test_a_changed_recipe_or_source_on_the_same_out_is_refused_with_the_difference(photos, built, tmp_path):
    with pytest.raises(ValueError, match=r"size: 24 there, 16 asked for.*another OUT"):
        build(photos, built[0], Recipe(samples_per_shard=40, size=16), workers=0)
    with pytest.raises(ValueError, match=r"source: folder there, digits asked for"):
        build("digits:", built[0], RECIPE, workers=0)
    out = str(tmp_path / "out")
    with subprocess.Popen([sys.executable, "-c", STOPPING, photos, out, "between"], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
    with pytest.raises(ValueError, match=r"unfinished build made otherwise \(seed: 0 there, 5 asked for"):
        build(photos, out, Recipe(samples_per_shard=40, size=24, seed=5), workers=0)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/photo.jpg").touch()
    with pytest.raises(ValueError, match=r"no dataset \(photo\.jpg\)"):
        build(photos, str(tmp_path / "holiday"), RECIPE, workers=0)
    assert os.listdir(tmp_path / "holiday") == ["photo.jpg"]


def test_a_second_builder_is_told_who_is_at_work(photos, tmp_path):
    with lease.claim(str(tmp_path / "out/.lease"), "somebody"), pytest.raises(lease.Held, match="somebody"):
        build(photos, str(tmp_path / "out"), RECIPE, workers=0)


def test_no_usable_image_at_all_is_an_error_with_the_reasons(tmp_path):
    for name, raw in BAD.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(raw)
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"not_an_image 2, empty 1.*empty\.png"):
        build(str(tmp_path / "in"), out, RECIPE, workers=0)
    Image.new("L", (9, 9)).save(tmp_path / "in/0/mended.png")
    assert build(str(tmp_path / "in"), out, RECIPE, workers=0)["samples"] == 1


def test_files_that_cannot_be_read_are_rejected_without_a_path_of_this_machine(photos, tmp_path):
    source = tmp_path / "in/a"
    source.mkdir(parents=True)
    (source / "lost.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("L", (9, 9)).save(source / "good.png")
    result = build(str(tmp_path / "in"), str(tmp_path / "out"), Recipe(val_fraction=0), workers=0)
    assert result["rejects"] == {"unreadable": 1}
    assert str(tmp_path) not in index.load(str(tmp_path / "out")).rejects()["detail"].to_pylist()[0]


def test_without_labels_there_are_no_classes_and_no_cls(photos, tmp_path):
    out = str(tmp_path / "out")
    build(photos, out, Recipe(labels="none"), workers=0)
    data = index.load(out)
    assert data.classes == ()
    assert set(data.split("train").label.tolist()) == {-1}
    with tarfile.open(os.path.join(out, "train-000000.tar")) as archive:
        assert {name.partition(".")[2] for name in archive.getnames()} == {"jpg", "json"}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_storage_surfaces_as_itself(photos, ray_local, tmp_path, workers):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").mkdir()  # a folder where a shard must go
    with pytest.raises(OSError, match=r"train-000000\.tar"):
        build(photos, str(out), RECIPE, workers)


def test_describe_tells_what_would_be_done_and_writes_nothing(photos, built, tmp_path):
    out = str(tmp_path / "out")
    told = describe(photos, out, RECIPE)
    assert (told["samples"], told["format"], told["done"]) == (304, "jpg", False)
    assert told["splits"].keys() == {"train", "val"}
    assert not os.path.exists(out)
    assert describe(photos, built[0], RECIPE)["done"]


def expected(out):
    """{key: (label, image file)} of the training samples, by our own index, and the shards they lie in."""
    train = index.load(out).split("train")
    found = {}
    for i, name in enumerate(train.keys.to_pylist()):
        raw = tar.read_sample(os.path.join(out, train.shards[train.shard[i]]), int(train.offset[i]), int(train.size[i]))
        found[name] = (int(train.label[i]), raw)
    return found, [os.path.join(out, shard) for shard in train.shards]


def test_webdataset_and_tarfile_read_the_same_samples_in_the_same_order(built):
    import webdataset

    ours, shards = expected(built[0])
    read = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == list(ours)
    for sample in read:
        assert (int(sample["cls"]), sample["jpg"]) == ours[sample["__key__"]]
        assert json.loads(sample["json"])["source"].split("/")[0] == sample["cls"].decode()
    members = {}
    for shard in shards:
        with tarfile.open(shard) as archive:
            members |= {member.name: archive.extractfile(member).read() for member in archive}
    assert {name: (int(members[f"{name}.cls"]), members[f"{name}.jpg"]) for name in ours} == ours
    assert len(members) == 3 * len(ours)


def test_ray_data_reads_the_same_images_and_labels(ray_local, tmp_path):
    build("digits:", str(tmp_path), Recipe(samples_per_shard=600), workers=0)
    ours, shards = expected(str(tmp_path))
    rows = ray_local.data.read_webdataset(shards).take_all()
    assert len(rows) == len(ours)
    for row in rows:
        label, raw = ours[row["__key__"]]
        assert row["cls"] == label
        assert np.array_equal(np.asarray(row["png"]), np.asarray(Image.open(io.BytesIO(raw))))


def test_source_and_dataset_on_s3(photos, built, s3, ray_local):
    root, source = s3.fresh(), photos.removeprefix("folder:")
    for file in storage.list_files(source):
        storage.write(storage.join(root, "in", file.path), storage.read(storage.join(source, file.path)))
    result = build(storage.join(root, "in"), storage.join(root, "out"), RECIPE, workers=2)
    assert result["samples"] == 300
    out = storage.join(root, "out")
    there = {
        f.path: hashlib.sha256(storage.read(storage.join(out, f.path))).hexdigest() for f in storage.list_files(out)
    }
    local = content(built[0])
    remembers = "index/000000-sources.parquet"  # and with it what the listing called the state of each file
    assert there.pop(remembers) != local.pop(remembers)
    assert there == local
    start = time.perf_counter()
    assert build(storage.join(root, "in"), out, RECIPE, workers=0)["done"]
    assert time.perf_counter() - start < 5
    assert len(index.load(out).split("val")) > 0
