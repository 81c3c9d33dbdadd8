import hashlib
import io
import itertools
import json
import os
import sqlite3
import tarfile
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import storage
from pipeline.shards import index, sidecars, tar


def sample(i: int, form: str = "jpg", label: int | None = None, **beside: bytes):
    """(extension of the image, key, members): contents are any bytes, as no sidecar looks into them."""
    key = hashlib.blake2b(b"%d" % i, digest_size=10).hexdigest()
    members = {form: bytes([i]) * (i * 311 % 2000 + 1), "json": b"{%s}" % (b" " * (i * 97 % 600))}
    return form, key, members | ({} if label is None else {"cls": b"%d" % label}) | beside


def labelled(start: int, end: int):
    return [sample(i, label=i % 11) for i in range(start, end)]


PLAIN = [
    {"train-000000.tar": labelled(0, 30), "train-000001.tar": labelled(30, 55), "val-000000.tar": labelled(55, 60)}
]
GROWN = [*PLAIN, {"train-000002.tar": labelled(60, 64), "val-000001.tar": [sample(64, label=3)]}]
MIXED = [{"train-000000.tar": [sample(i, "png" if i % 3 else "jpg", label=i) for i in range(12)]}]
UNLABELLED = [{"train-000000.tar": [sample(i, "png") for i in range(12)]}]
CARRIED = [
    {
        "train-000000.tar": [
            sample(i, label=1, txt=b"a caption", **{"seg.png": bytes(i * 100), "a note": b"!"}) for i in range(9)
        ]
    }
]
ALL = {"plain": PLAIN, "grown": GROWN, "mixed": MIXED, "unlabelled": UNLABELLED, "carried": CARRIED}


def dataset(root, generations) -> index.Dataset:
    """A finished dataset of generations {shard: samples}, but for its images and for dataset.json itself."""
    info = {"version": index.VERSION, "classes": [], "splits": {}, "generations": [], "shards": []}
    for number, shards in enumerate(generations):
        rows = []
        for name, samples in shards.items():
            split = name.partition("-")[0]
            written = tar.write_shard(storage.join(str(root), name), [(key, members) for _, key, members in samples])
            facts = {"bytes": written.bytes, "sha256": written.sha256, "samples": len(samples)}
            info["shards"].append({"name": name, "split": split, "generation": number} | facts)
            info["splits"][split] = {}
            for (form, key, members), where in zip(samples, written.offsets, strict=True):
                rest = {x: len(data) for x, data in members.items() if x not in (form, "json", "cls")}
                row = {"key": key, "split": split, "shard": name, "format": form, "json_size": len(members["json"])}
                row |= {"offset": where[form][0], "size": where[form][1], "generation": number}
                row |= {"label": int(members["cls"]) if "cls" in members else None}
                rows.append(row | {"beside": json.dumps(rest) if rest else None})
        file = f"index/{number:06d}.parquet"
        info["generations"].append({"generation": number, "index": file})
        with storage.writer(storage.join(str(root), file)) as opened:
            pq.write_table(pa.Table.from_pylist(rows, schema=index.SCHEMA), opened)
    return index.Dataset(str(root), info, ())


def members_of(root: str, shard: str) -> list[tuple[str, list[tarfile.TarInfo]]]:
    """What Python's tarfile finds: (key, members) of each sample; and, under "", a stand-in for where they end."""
    with tarfile.open(fileobj=io.BytesIO(storage.read(storage.join(root, shard)))) as archive:
        groups = itertools.groupby(archive.getmembers(), lambda member: member.name.partition(".")[0])
        return [(key, list(members)) for key, members in groups]


def contents(root: str, files: list[str]) -> dict[str, bytes]:
    return {name: storage.read(storage.join(root, name)) for name in files}


@pytest.mark.parametrize("case", ALL)
def test_sidecars_of_a_shard_say_where_tarfile_finds_its_members(case, tmp_path):
    root = str(tmp_path)
    data = dataset(root, ALL[case])
    sidecars.write(root, data, ["dali", "energon"])
    with sqlite3.connect(tmp_path / ".nv-meta/index.sqlite") as database:
        samples = database.execute("SELECT * FROM samples ORDER BY rowid").fetchall()
        parts = database.execute("SELECT * FROM sample_parts ORDER BY rowid").fetchall()
    database.close()
    for number, shard in enumerate(s["name"] for s in data.info["shards"]):
        found = members_of(root, shard)
        last = found[-1][1][-1]
        bounds = [members[0].offset for _, members in found] + [last.offset_data + -(-last.size // 512) * 512]
        itar = (tmp_path / f"{shard}.idx").read_bytes()
        assert [int.from_bytes(itar[i : i + 8], "little") for i in range(0, len(itar), 8)] == bounds
        assert [row for row in samples if row[0] == number] == [
            (number, key, i, bounds[i], bounds[i + 1] - bounds[i]) for i, (key, _) in enumerate(found)
        ]
        assert [row for row in parts if row[0] == number] == [
            (number, i, m.name.partition(".")[2], m.offset_data, m.size)
            for i, (_, members) in enumerate(found)
            for m in members
        ]
        lines = (tmp_path / "dali" / shard.replace(".tar", ".idx")).read_text().splitlines()
        assert lines[0] == f"v1.2 {len(found)}"
        assert lines[1:] == [
            " ".join(
                f"{m.name.partition('.')[2]} {m.offset_data} {m.size} {m.name}" for m in members if " " not in m.name
            )
            for _, members in found
        ]


def test_counts_are_those_of_the_shards(tmp_path):
    root = str(tmp_path)
    data = dataset(root, GROWN)
    sidecars.write(root, data, ["wids", "timm", "open_clip", "energon"])
    counts = {shard["name"]: len(members_of(root, shard["name"])) for shard in data.info["shards"]}
    assert json.loads((tmp_path / "sizes.json").read_text()) == counts
    assert json.loads((tmp_path / ".nv-meta/.info.json").read_text())["shard_counts"] == counts
    splits = {
        "train": ["train-000000.tar", "train-000001.tar", "train-000002.tar"],
        "val": ["val-000000.tar", "val-000001.tar"],
    }
    assert yaml.safe_load((tmp_path / ".nv-meta/split.yaml").read_text()) == {"split_parts": splits}
    timm = json.loads((tmp_path / "_info.json").read_text())["splits"]
    for split, shards in splits.items():
        wids = json.loads((tmp_path / f"wids-{split}.json").read_text())
        assert [(s["url"], s["nsamples"]) for s in wids["shardlist"]] == [(shard, counts[shard]) for shard in shards]
        assert all(os.path.getsize(tmp_path / s["url"]) == s["filesize"] for s in wids["shardlist"])
        assert timm[split]["filenames"] == shards
        assert timm[split]["shard_lengths"] == [counts[shard] for shard in shards]
        assert timm[split]["num_samples"] == sum(timm[split]["shard_lengths"])


def test_they_are_the_same_bytes_wherever_and_however_often_they_are_written(place, tmp_path_factory):
    here = str(tmp_path_factory.mktemp("here"))
    expected = contents(here, sidecars.write(here, dataset(here, GROWN), sidecars.KINDS))
    data = dataset(place, GROWN)
    for _ in range(2):
        assert contents(place, sidecars.write(place, data, reversed(sidecars.KINDS))) == expected


def test_no_shard_is_read(tmp_path):
    data = dataset(tmp_path, CARRIED)
    expected = contents(str(tmp_path), sidecars.write(str(tmp_path), data, sidecars.KINDS))
    for shard in data.info["shards"]:
        (tmp_path / shard["name"]).unlink()
    assert contents(str(tmp_path), sidecars.write(str(tmp_path), data, sidecars.KINDS)) == expected


@pytest.mark.parametrize("kinds", [(), *((kind,) for kind in sidecars.KINDS), ("dali", "energon"), sidecars.KINDS])
def test_names_are_those_of_the_files_that_appear(kinds, tmp_path):
    data = dataset(tmp_path, GROWN)
    before = {file.path for file in storage.list_files(str(tmp_path))}
    written = sidecars.write(str(tmp_path), data, kinds)
    assert {file.path for file in storage.list_files(str(tmp_path))} - before == set(written)
    assert written == sidecars.names(data.info, kinds) == sorted(set(written))
    assert all(map(sidecars.is_sidecar, written))
    assert bool(kinds) == bool(written)


def test_sidecars_stand_if_they_are_those_asked_for_and_no_others(place):
    data = dataset(place, GROWN)
    assert sidecars.stand(place, data.info, [])
    written = sidecars.write(place, data, sidecars.KINDS)
    assert sidecars.stand(place, data.info, sidecars.KINDS)
    assert not sidecars.stand(place, data.info, ["wids"])
    storage.delete(storage.join(place, written[-1]))
    assert not sidecars.stand(place, data.info, sidecars.KINDS)


def test_bringing_removes_those_of_other_kinds_and_of_shards_that_are_gone(place):
    sidecars.bring(place, dataset(place, GROWN), sidecars.KINDS)
    stays = {"train-000000.tar", "README.idx", "dali/mine.txt", ".nv-meta/cooker.py", "wids-mine.JSON", "labels.json"}
    for name in stays - {"train-000000.tar"}:
        storage.write(storage.join(place, name), b"somebody's")
    data = dataset(place, PLAIN)
    for kinds in (sidecars.KINDS, ["energon", "timm"], []):
        assert sidecars.bring(place, data, kinds) == sidecars.names(data.info, kinds)
        assert sidecars.stand(place, data.info, kinds)
        there = {file.path for file in storage.list_files(place)}
        assert {path for path in there if sidecars.is_sidecar(path)} == set(sidecars.names(data.info, kinds))
        assert stays <= there


@pytest.mark.parametrize(
    ("generations", "kind", "fields"),
    [
        (PLAIN, "ImageClassificationSample", {"image": "jpg", "label": "cls"}),
        (MIXED, "ImageClassificationSample", {"image": "jpg,png", "label": "cls"}),
        (CARRIED, "ImageClassificationSample", {"image": "jpg", "label": "cls"}),  # not the mask's png
        (UNLABELLED, "ImageSample", {"image": "png"}),
    ],
)
def test_energon_is_told_which_members_are_image_and_label(generations, kind, fields, tmp_path):
    sidecars.write(str(tmp_path), dataset(tmp_path, generations), ["energon"])
    assert yaml.safe_load((tmp_path / ".nv-meta/dataset.yaml").read_text()) == {
        "sample_type": {"__module__": "megatron.energon", "__class__": kind},
        "field_map": fields,
    }


def test_a_split_called_no_is_not_false(tmp_path):
    sidecars.write(str(tmp_path), dataset(tmp_path, [{"no-000000.tar": labelled(0, 2)}]), ["energon"])
    assert list(yaml.safe_load((tmp_path / ".nv-meta/split.yaml").read_text())["split_parts"]) == ["no"]


def test_the_index_uuid_is_that_of_the_shards_content(tmp_path):
    seen = []
    for i, generations in enumerate((PLAIN, PLAIN, [{name: samples[::-1] for name, samples in PLAIN[0].items()}])):
        root = tmp_path / str(i)
        sidecars.write(str(root), dataset(root, generations), ["energon"])
        seen.append((root / ".nv-meta/index.uuid").read_text())
    assert seen[0] == seen[1] != seen[2]


def test_a_kind_nobody_reads_is_refused(tmp_path):
    data = dataset(tmp_path, PLAIN)
    with pytest.raises(ValueError, match="sidecar 'tfrecord': one of wids, energon, dali, timm, open_clip"):
        sidecars.write(str(tmp_path), data, ["wids", "tfrecord"])
    assert not (tmp_path / "wids-train.json").exists()


def test_an_index_that_contradicts_itself_is_refused(tmp_path):
    data = dataset(tmp_path, PLAIN)
    path = tmp_path / "index/000000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[3]["json_size"] += 512
    pq.write_table(pa.Table.from_pylist(rows, schema=index.SCHEMA), path)
    with pytest.raises(ValueError, match=r"contradicts itself about train-000000\.tar"):
        sidecars.write(str(tmp_path), data, ["dali"])


@pytest.mark.parametrize("blocked", ["dali", "val-000001.tar.idx", ".nv-meta/index.sqlite"])
def test_energon_sees_no_dataset_when_a_file_could_not_be_written(blocked, tmp_path):
    data = dataset(tmp_path, GROWN)
    if blocked == "dali":
        (tmp_path / blocked).touch()  # a file where a folder should be
    else:
        (tmp_path / blocked).mkdir(parents=True)
    with pytest.raises(OSError, match=blocked):
        sidecars.write(str(tmp_path), data, sidecars.KINDS)
    assert not (tmp_path / ".nv-meta/.info.json").exists()


def test_a_kill_leaves_no_temporary_file(tmp_path, monkeypatch):
    scratch, seen = tmp_path / "scratch", []
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    class Watched(index.Dataset):
        def layout(self, shard):
            seen.append(os.listdir(scratch))
            return super().layout(shard)

    data = dataset(tmp_path / "data", GROWN)
    sidecars.write(data.root, Watched(data.root, data.info, ()), ["energon"])
    assert seen == [[]] * len(data.info["shards"])
    assert os.listdir(scratch) == []
