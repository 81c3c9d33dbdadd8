import json
import os
import shutil

import pyarrow.parquet as pq
import pytest
from test_build import content
from test_growth import names, paint

from jobs.__main__ import main
from pipeline import storage
from pipeline.shards import index, sidecars
from pipeline.shards.build import build
from pipeline.shards.plan import Recipe
from pipeline.shards.verify import repair, verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(source, dataset of two generations with every sidecar)."""
    root = tmp_path_factory.mktemp("whole")
    for classes in ("bd", "a"):
        paint(root / "in", *names(*classes))
        build(str(root / "in"), str(root / "out"), Recipe(samples_per_shard=20), workers=0, beside=sidecars.KINDS)
    return root / "in", root / "out"


@pytest.fixture
def dataset(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "out")
    return tmp_path / "out"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def spoil_image(root):
    flip(
        root / "train-000001.tar",
        int(index.load(str(root)).shard_rows("train-000001.tar", ["offset"])["offset"][3].as_py()) + 40,
    )


def cut(path):
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])


DAMAGE = {
    "a flipped bit of an image": (spoil_image, "train-000001.tar", "damaged", "1 of 18 images are damaged: "),
    "a flipped bit beside the images": (lambda r: flip(r / "val-000000.tar", 3), "val-000000.tar", "damaged", "beside"),
    "a cut shard": (lambda r: cut(r / "train-000003.tar"), "train-000003.tar", "truncated", "images"),
    "a lost shard": (lambda r: (r / "train-000000.tar").unlink(), "train-000000.tar", "missing", "19 samples of train"),
    "a flipped bit of the index": (
        lambda r: flip(r / "index/000000.parquet", 700), "index/000000.parquet", "damaged", ""),
    "a lost index": (
        lambda r: (r / "index/000001-rejects.parquet").unlink(), "index/000001-rejects.parquet", "missing", "of gen"),
    "a lost sidecar": (lambda r: (r / "wids-train.json").unlink(), "wids-train.json", "missing", "sidecar"),
    "a flipped bit of a sidecar": (lambda r: flip(r / "sizes.json", 9), "sizes.json", "damaged", ""),
    "a stranger": (lambda r: shutil.copy(r / "val-000000.tar", r / "val-000077.tar"), "val-000077.tar", "unknown", ""),
}  # fmt: skip


def test_a_sound_dataset_has_no_problems(whole):
    seen = []
    assert verify(str(whole[1]), lambda *counts: seen.append(counts)) == []
    shards = len(index.load(str(whole[1])).info["shards"])
    assert seen == [(i, shards) for i in range(1, shards + 1)]


@pytest.mark.parametrize("what", DAMAGE)
def test_each_damage_is_named_alone_and_repaired_alone_where_it_can_be(whole, dataset, what):
    damage, file, kind, detail = DAMAGE[what]
    damage(dataset)
    (problem,) = verify(str(dataset))
    assert (problem.file, problem.kind) == (file, kind)
    assert detail in problem.detail
    before = content(dataset)
    left = repair(str(dataset), str(whole[0]), [problem])
    if file.startswith("index/"):
        assert [p.file for p in left] == [file]
        assert content(dataset) == before
    else:
        assert left == []
        assert content(dataset) == content(whole[1])


def test_no_flipped_bit_of_a_shard_or_an_index_goes_unseen(whole, dataset):
    for name in ("train-000000.tar", "index/000000.parquet", "index/000000-sources.parquet"):
        path = dataset / name
        data = path.read_bytes()
        for at in range(4, len(data), max(1, len(data) // 40)):
            flip(path, at)
            damaged = path.read_bytes()
            if name.endswith(".parquet") and same_table(path, whole[1] / name):
                pass  # a byte of the file that says nothing: padding, or a statistic
            else:
                assert [p.file for p in verify(str(dataset))] == [name], (name, at)
            assert damaged != data
            path.write_bytes(data)


def same_table(one, other):
    try:
        return pq.read_table(one).equals(pq.read_table(other))
    except (OSError, ValueError):
        return False


def test_a_shard_whose_source_is_gone_or_changed_is_left_and_the_reason_said(whole, dataset, tmp_path):
    shutil.copytree(whole[0], tmp_path / "in")
    lost = index.load(str(dataset)).shard_rows("train-000001.tar", ["source"])["source"][0].as_py()
    cut(dataset / "train-000001.tar")
    cut(dataset / "train-000002.tar")
    changed = index.load(str(dataset)).shard_rows("train-000002.tar", ["source"])["source"][0].as_py()
    (tmp_path / "in" / lost).unlink()
    shutil.copy(tmp_path / "in" / names("a")[0], tmp_path / "in" / changed)
    before = content(dataset)
    left = repair(str(dataset), str(tmp_path / "in"), verify(str(dataset)))
    assert [p.file for p in left] == ["train-000001.tar", "train-000002.tar"]
    assert f"no longer in {tmp_path / 'in'}: {lost}" in left[0].detail
    assert "not what they were" in left[1].detail
    assert content(dataset) == before


def test_the_verb_says_what_is_wrong_and_its_exit_code_too(whole, dataset, capsys):
    assert main(["verify", str(dataset), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    cut(dataset / "train-000001.tar")
    assert main(["verify", str(dataset), "--json"]) == 1
    out, err = capsys.readouterr()
    assert [p["file"] for p in json.loads(out)["problems"]] == ["train-000001.tar"]
    assert "truncated: train-000001.tar" in err
    assert main(["verify", str(dataset), "--repair", str(whole[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repaired"] == 1
    assert main(["verify", str(dataset / "index")]) == 2
    assert "not a dataset" in capsys.readouterr().err


def test_a_dataset_on_s3_is_verified_and_repaired(whole, s3):
    root = s3.fresh()
    for file in storage.list_files(str(whole[1])):
        storage.write(storage.join(root, file.path), storage.read(os.path.join(whole[1], file.path)))
    assert verify(root) == []
    shard = storage.join(root, "train-000001.tar")
    data = storage.read(shard)
    storage.write(shard, data[:2000] + b"xxxx" + data[2004:])
    problems = verify(root)
    assert [p.file for p in problems] == ["train-000001.tar"]
    assert repair(root, str(whole[0]), problems) == []
    assert storage.read(shard) == data
    assert verify(root) == []
