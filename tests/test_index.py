import time

import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.shards import commit as commits
from pipeline.shards import index
from pipeline.shards.commit import Generation, ShardRecord


def record(name, split, count, labels=3, channels=1, side=8, rejects=(), generation=0):
    key = [f"{name}{i:09d}" for i in range(count)]
    columns = {
        "key": key, "split": [split] * count, "shard": [f"{name}.tar"] * count,
        "offset": np.arange(count) * 2048 + 1024, "size": np.arange(count) % 500 + 1,
        "label": pa.array(np.arange(count) % labels if labels else [None] * count, pa.int32()),
        "format": ["png"] * count, "width": [side] * count, "height": [side + 1] * count,
        "channels": [channels] * count, "crc32": np.arange(count) + 2**31, "json_size": [100] * count,
        "beside": pa.nulls(count, pa.string()), "passed": [False] * count, "animated": [i == 0 for i in range(count)],
        "source": [f"x/{k}.png" for k in key], "source_bytes": [9] * count, "generation": [generation] * count,
    }  # fmt: skip
    rows = pa.table({c: columns[c] for c in index.SCHEMA.names}).cast(index.SCHEMA)
    refused = [{"source": s, "split": split, "reason": r, "detail": "because"} for s, r in rejects]
    pixels = {str(channels): [count * side, [100 * count] * channels, [30_000 * count] * channels]}
    entry = {"name": f"{name}.tar", "split": split, "generation": generation, "samples": count, "bytes": 10_240}
    table = pa.Table.from_pylist(refused, schema=index.REJECTS)
    return ShardRecord(entry | {"sha256": "ab" * 32, "pixels": pixels}, rows, table)


def commit(root, records, classes=("a", "b", "c"), earlier=None):
    source = {"kind": "folder", "items": 1, "fingerprint": "f"}
    number = len(earlier["generations"]) if earlier else 0
    made = Generation(number, source, index.SOURCES.empty_table, index.REJECTS.empty_table())
    return commits.commit(str(root), earlier, records, made, {"seed": 0}, classes)


def test_what_was_committed_is_loaded(tmp_path):
    commit(
        tmp_path,
        [record("train-000000", "train", 5), record("train-000001", "train", 4), record("val-000000", "val", 2)],
    )
    data = index.load(str(tmp_path))
    assert data.classes == ("a", "b", "c")
    assert data.info["splits"]["train"] == {"samples": 9, "shards": 2, "classes": [4, 3, 2]}
    assert data.info["image_size"] == [8, 9]
    train, val = data.split("train"), data.split("val")
    assert (len(train), len(val)) == (9, 2)
    assert train.shards == ["train-000000.tar", "train-000001.tar"]
    assert train.counts.tolist() == [5, 4]
    assert train.shard.tolist() == [0] * 5 + [1] * 4
    assert train.offset[5:].tolist() == [1024, 3072, 5120, 7168]
    assert train.label.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0]
    assert val.crc32.tolist() == [2**31, 2**31 + 1]
    assert [val.keys[i].as_py() for i in range(2)] == ["val-000000000000000", "val-000000000000001"]
    assert train.source[8].as_py() == "x/train-000001000000003.png"
    types = {"shard": "i4", "offset": "i8", "size": "i8", "label": "i4", "width": "i4", "crc32": "u4", "counts": "i8"}
    assert {name: getattr(train, name).dtype.str[1:] for name in types} == types


def test_without_classes_labels_are_minus_one(tmp_path):
    commit(tmp_path, [record("train-000000", "train", 3, labels=0)], classes=())
    assert index.load(str(tmp_path)).split("train").label.tolist() == [-1] * 3


def test_statistics_count_grey_among_colour_as_grey_rgb(tmp_path):
    info = commit(tmp_path, [record("train-000000", "train", 4), record("val-000000", "val", 4, channels=3)])
    assert info["mean"] == [round(400 / 32 / 255, 8)]
    info = commit(
        tmp_path, [record("train-000000", "train", 4), record("train-000001", "train", 4, channels=3, side=4)]
    )
    assert info["mean"] == [round(800 / 48 / 255, 8)] * 3
    variance = 240_000 / 48 - (800 / 48) ** 2
    assert info["std"] == [round(variance**0.5 / 255, 8)] * 3
    assert info["channels"] == {"1": 4, "3": 4}
    assert info["image_size"] is None


def test_rejects_are_counted_and_a_shard_without_samples_is_left_out(tmp_path):
    rejects = [("b.png", "empty"), ("a.png", "corrupt"), ("c.png", "empty")]
    info = commit(tmp_path, [record("train-000000", "train", 2), record("train-000001", "train", 0, rejects=rejects)])
    assert info["rejected"] == {"corrupt": 1, "empty": 2}
    assert [shard["name"] for shard in info["shards"]] == ["train-000000.tar"]
    assert index.load(str(tmp_path)).rejects()["source"].to_pylist() == ["a.png", "b.png", "c.png"]


def test_no_sample_at_all_is_an_error_with_the_reasons_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"empty 2, corrupt 1.*'a\.png'"):
        commit(
            tmp_path,
            [record("train-000000", "train", 0, rejects=[("a.png", "empty"), ("b", "empty"), ("c", "corrupt")])],
        )
    assert storage.list_files(str(tmp_path)) == []


def test_where_record_batches_end_does_not_show_in_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "ROW_GROUP", 7)
    for folder in ("one", "two"):
        commit(tmp_path / folder, (record(f"train-{i:06d}", "train", 5) for i in range(9)))
    assert len(index.load(str(tmp_path / "one")).split("train")) == 45
    for file in storage.list_files(str(tmp_path / "one")):
        assert (tmp_path / "one" / file.path).read_bytes() == (tmp_path / "two" / file.path).read_bytes()


def test_what_is_no_dataset_is_said(tmp_path):
    for root, message in [("missing", "nothing is there"), (".", "nothing is there")]:
        with pytest.raises(ValueError, match=message):
            index.load(str(tmp_path / root))
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match="is not a dataset"):
        index.load(str(tmp_path))
    (tmp_path / "train-000000.tar").touch()
    with pytest.raises(ValueError, match=r"not finished.*millstream shard"):
        index.load(str(tmp_path))
    for content, message in [("{", "not JSON"), ("[]", "version None"), ('{"version": 99}', "version 99")]:
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            index.load(str(tmp_path))


def test_an_unknown_split_names_those_there_are(tmp_path):
    commit(tmp_path, [record("train-000000", "train", 2), record("val-000000", "val", 2)])
    with pytest.raises(ValueError, match=r"no split 'tests' in .*: it has train, val"):
        index.load(str(tmp_path)).split("tests")


def test_an_index_that_is_missing_or_damaged_is_named(tmp_path):
    commit(tmp_path, [record("train-000000", "train", 2)])
    (tmp_path / "index/000000.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"000000\.parquet is missing or damaged"):
        index.load(str(tmp_path)).split("train")
    (tmp_path / "index/000000.parquet").unlink()
    with pytest.raises(ValueError, match=r"000000\.parquet is missing or damaged"):
        index.load(str(tmp_path)).split("train")


def test_generations_are_read_one_after_the_other_and_counted_together(tmp_path):
    first = commit(tmp_path, [record("train-000000", "train", 3), record("val-000000", "val", 1)])
    more = [record("train-000001", "train", 2, generation=1, rejects=[("y", "empty")])]
    info = commit(tmp_path, more, ("a", "b", "c", "d"), first)
    data = index.load(str(tmp_path))
    train = data.split("train")
    assert train.counts.tolist() == [3, 2]
    assert train.offset.tolist() == [1024, 3072, 5120, 1024, 3072]
    assert train.keys.to_pylist()[3:] == ["train-000001000000000", "train-000001000000001"]
    assert info["splits"]["train"] == {"samples": 5, "shards": 2, "classes": [2, 2, 1, 0]}
    assert (info["samples"], info["rejected"], info["animated"]) == (6, {"empty": 1}, 3)
    assert info["next_shard"] == {"train": 2, "val": 1}
    assert info["bytes"]["source"] == 6 * 9
    assert sum(info["histograms"]["short_side"]["counts"]) == sum(info["histograms"]["aspect"]["counts"]) == 6


def test_as_many_rows_as_imagenet_load_within_a_second(tmp_path):
    commit(tmp_path, (record(f"train-{i:06d}", "train", 10_000) for i in range(128)))
    start = time.perf_counter()
    assert len(index.load(str(tmp_path)).split("train")) == 1_280_000
    assert time.perf_counter() - start < 1
