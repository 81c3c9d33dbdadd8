"""The same shards, opened by the readers they are written for: the same keys, labels and pixels as our index says.

Readers that keep caches, threads or settings of their own run as `python test_interop.py READER ROOT SPLIT`, in a
process with a home of its own and no network. What DALI, timm and open_clip do, whose packages weigh hundreds of
megabytes or do not load beside a CPU-only torch, is written down here after their sources.
"""

import hashlib
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.shards import index, sidecars, tar
from pipeline.shards.build import build
from pipeline.shards.plan import Recipe

# Grey among colour, as in ImageNet, and colour alone: arrays of different rank are what readers stumble over
CASES = pytest.mark.parametrize(("shards", "split"), [("photos", "train"), ("colour", "val")], indirect=["shards"])


def seen(key: str, label, image) -> list:
    """[key, label, size and digest of the pixels]. image: a file's bytes, a PIL image, or uint8 (h, w[, 3])."""
    image = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return [key, int(label), f"{image.size} {hashlib.sha256(image.convert('RGB').tobytes()).hexdigest()}"]


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """A dataset of 60 colour JPEGs of 40 to 90 px in three classes."""
    root, random = tmp_path_factory.mktemp("colour"), np.random.default_rng(8)
    for i in range(60):
        folder = root / "in" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize(tuple(random.integers(40, 90, 2).tolist())).save(folder / f"{i}.jpg", quality=95)
    out = str(root / "shards")
    build(f"folder:{root / 'in'}", out, Recipe(samples_per_shard=20, val_fraction=0.5), workers=0)
    return out


@pytest.fixture(scope="module")
def shards(request, tmp_path_factory):
    """The dataset of the fixture named by the parameter, with every sidecar."""
    root = str(tmp_path_factory.mktemp("interop") / "shards")
    shutil.copytree(request.getfixturevalue(request.param), root)
    data = index.load(root)
    assert set(data.rows(["format"])["format"].to_pylist()) == {"jpg"}
    assert set(data.rows(["channels"])["channels"].to_pylist()) == ({1, 3} if request.param == "photos" else {3})
    assert all(len(data.split(split).shards) > 1 for split in ("train", "val")) or request.param == "photos"
    sidecars.write(root, data, sidecars.KINDS)
    return root


@pytest.fixture(scope="module")
def expected(shards):
    """{split: what the index says, in its order}."""
    found = {}
    for split in map(index.load(shards).split, ("train", "val")):
        paths = [os.path.join(shards, split.shards[i]) for i in split.shard]
        places = zip(paths, split.offset.tolist(), split.size.tolist(), strict=True)
        images = [tar.read_sample(*place) for place in places]
        found[split.name] = list(map(seen, split.keys.to_pylist(), split.label, images))
    return found


def files(root: str, split: str) -> list[str]:
    return [os.path.join(root, name) for name in index.load(root).split(split).shards]


@pytest.fixture
def elsewhere(tmp_path):
    """Runs a reader of this file in a process of its own and returns what it found."""

    def run(reader: str, root: str, split: str):
        folder = str(tmp_path)
        env = os.environ | dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "WIDS_CACHE"), folder)
        env |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1")
        env["PYTHONPATH"] = os.path.dirname(os.path.dirname(__file__))
        command = [sys.executable, __file__, reader, root, split]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


# ---- by their own code


@CASES
def test_webdataset(split, shards, expected):
    samples = list(webdataset.WebDataset(files(shards, split), shardshuffle=False).decode("pil"))
    assert [seen(sample["__key__"], sample["cls"], sample["jpg"]) for sample in samples] == expected[split]
    assert [sample["json"]["width"] for sample in samples] == [sample["jpg"].width for sample in samples]


@CASES
def test_ray_data(split, shards, expected, ray_local):
    """By the default decoder; its arrays cannot share a column where grey ones have one axis less, PIL's images can."""
    mixed = len(index.load(shards).info["channels"]) > 1
    data = ray_local.data.read_webdataset(files(shards, split), decoder="PIL" if mixed else True)
    rows = list(data.iter_rows())
    assert sorted(seen(row["__key__"], row["cls"], row["jpg"]) for row in rows) == sorted(expected[split])
    assert all(isinstance(row["jpg"], Image.Image if mixed else np.ndarray) for row in rows)
    assert all(row["json"]["channels"] in (1, 3) for row in rows)


@CASES
def test_hugging_face_datasets(split, shards, expected, elsewhere):
    assert elsewhere("hugging_face", shards, split) == expected[split]


def hugging_face(root: str, split: str) -> list:
    from datasets import load_dataset

    rows = load_dataset("webdataset", data_files={split: files(root, split)}, split=split, cache_dir="cache")
    return [seen(row["__key__"], row["cls"], row["jpg"]) for row in rows]


@CASES
def test_wids_finds_each_sample_by_its_position(split, shards, expected, elsewhere):
    here = os.path.exists("/tmp/_wids_cache")  # a folder that importing it makes, whatever it is told
    try:
        assert elsewhere("wids", shards, split) == expected[split][::-1]
    finally:
        if not here:
            os.rmdir("/tmp/_wids_cache")


def wids(root: str, split: str) -> list:
    from wids import ShardListDataset

    data = ShardListDataset(os.path.join(root, f"wids-{split}.json"), cache_dir="cache")
    samples = [data[i] for i in reversed(range(len(data)))]
    return [seen(sample["__key__"], sample[".cls"], sample[".jpg"]) for sample in samples]


@CASES
def test_energon_deals_each_sample_to_one_of_two_ranks(split, shards, expected, elsewhere):
    ranks = elsewhere("energon", shards, split)
    assert all(ranks)  # the second starts in the middle of a shard, which it finds by .tar.idx
    assert sorted(ranks[0] + ranks[1]) == sorted(expected[split])


def energon(root: str, split: str) -> list[list]:
    from megatron.energon import WorkerConfig, get_loader, get_val_dataset

    ranks: list[list] = [[], []]
    for rank, found in enumerate(ranks):
        worker = WorkerConfig(rank=rank, world_size=2, num_workers=0)
        for batch in get_loader(get_val_dataset(root, split_part=split, batch_size=1, worker_config=worker)):
            image = (batch.image[0] * 255).round().byte().permute(1, 2, 0).numpy()
            found.append(seen(batch.__key__[0], batch.label[0], image))
    return ranks


@CASES
def test_energon_finds_files_by_name(split, shards, expected, elsewhere):
    assert elsewhere("energon_files", shards, split) == expected[split]


def energon_files(root: str, split: str) -> list:
    from megatron.energon.cache.file_store import WebdatasetFileStore
    from megatron.energon.epathlib import EPath

    store, keys = WebdatasetFileStore(EPath(root)), index.load(root).split(split).keys.to_pylist()
    return [seen(key, store[f"{key}.cls"][0], store[f"{key}.jpg"][0]) for key in keys]


@pytest.mark.parametrize("shards", ["colour"], indirect=True)
def test_energon_would_have_written_the_same(shards, elsewhere, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for shard in index.load(shards).info["shards"]:
        shutil.copy(os.path.join(shards, shard["name"]), copy)
    elsewhere("energon_prepare", str(copy), "train")
    theirs, ours = _prepared(str(copy)), _prepared(shards)
    assert theirs == ours
    assert len(theirs) == len(os.listdir(copy)) // 2 + 4  # an .idx beside each shard; three tables, .info.json


def energon_prepare(root: str, split: str) -> None:
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    patterns = [(split, f"{split}-.*")]
    WebdatasetPreparator.prepare_dataset(root, sorted(os.listdir(root)), split_parts_patterns=patterns, workers=1)


def _prepared(root: str) -> dict:
    found = {}
    for name in [*(name for name in os.listdir(root) if name.endswith(".idx")), ".nv-meta/.info.json"]:
        with open(os.path.join(root, name), "rb") as file:
            found[name] = json.load(file) if name.endswith(".json") else file.read()
    database = sqlite3.connect(os.path.join(root, ".nv-meta/index.sqlite"))
    for table in ("samples", "sample_parts"):
        found[table] = sorted(database.execute(f"SELECT * FROM {table}"))
    found["names"] = sorted(database.execute("SELECT type, name, tbl_name FROM sqlite_master"))
    database.close()
    return found


# ---- as their sources do


@CASES
def test_dali(split, shards, expected):
    """As its webdataset loader parses index v1.2: fields end at white space, offsets are multiples of a tar block."""
    found = []
    for path in files(shards, split):
        with open(os.path.join(shards, "dali", os.path.basename(path).replace(".tar", ".idx"))) as file:
            version, count = file.readline().split()
            lines = [line.split() for line in file]
        assert (version, int(count)) == ("v1.2", len(lines))
        for words in lines:
            members = {words[i]: (int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), 4)}
            assert not [offset for offset, _ in members.values() if offset % 512]
            label, image = (tar.read_sample(path, *members[extension]) for extension in ("cls", "jpg"))
            found.append(seen(words[3].partition(".")[0], label, image))
    assert found == expected[split]


@CASES
def test_timm(split, shards, expected):
    """As ReaderWds: the split's entry of _info.json, its files below the root, of each sample jpg;png;webp and cls."""
    with open(os.path.join(shards, "_info.json")) as file:
        entry = json.load(file)["splits"][split]
    paths = [os.path.join(shards, name) for name in entry["filenames"]]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    images = [next(s[extension] for extension in ("jpg", "png", "webp") if extension in s) for s in samples]
    found = [seen(s["__key__"], s["cls"], image) for s, image in zip(samples, images, strict=True)]
    assert found == expected[split]
    assert entry["name"] == split
    assert entry["num_samples"] == sum(entry["shard_lengths"]) == len(found)
    assert len(entry["shard_lengths"]) == len(paths)


@CASES
def test_open_clip(split, shards, expected):
    """As get_dataset_size: the sum over sizes.json, which lies beside the shards, by file name."""
    paths = files(shards, split)
    with open(os.path.join(os.path.dirname(paths[0]), "sizes.json")) as file:
        sizes = json.load(file)
    assert sum(int(sizes[os.path.basename(path)]) for path in paths) == len(expected[split])


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
