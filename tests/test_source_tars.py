import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline import sources, storage
from pipeline.shards import tar
from pipeline.sources import archive


def picture(seed, form="JPEG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(file, form)
    return file.getvalue()


def packed(members, form=tarfile.USTAR_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return file.getvalue()


def put(place, **tars):
    for name, members in tars.items():
        data = packed(members) if isinstance(members, list) else members
        storage.write(f"{place}/{name.replace('__', '/').replace('_', '-')}.tar", data)
    return f"tars:{place}"


def rows(listing, *names):
    return list(zip(*(listing.items[name].to_pylist() for name in names), strict=True))


A, B, C = (picture(seed) for seed in range(3))


def test_samples_are_read_with_what_lies_beside_them(place):
    mask = picture(3, "PNG")
    uri = put(place, train_0=[("x/a.cls", b"1\n"), ("x/a.jpg", A), ("x/a.seg.png", mask), ("x/a.txt", b"a cat")],
              train_1=[("x/b.JPEG", B), ("x/b.cls", b"0"), ("c.png", C), ("c.cls", b"-1")])  # fmt: skip
    listing = sources.list_items(uri)
    assert listing.classes == ("0", "1")
    assert rows(listing, "name", "label", "split", "size") == [
        ("train-0.tar/x/a", 1, "train", len(A)),
        ("train-1.tar/c", None, "train", len(C)),
        ("train-1.tar/x/b", 0, "train", len(B)),
    ]
    back = listing.items.take([2, 0, 1])
    assert list(sources.read_items(uri, back)) == [(B, {}), (A, {"seg.png": mask, "txt": b"a cat"}), (C, {})]
    assert list(sources.read_items(uri, back.slice(0, 0))) == []


def test_shards_of_webdatasets_own_writer_are_read(tmp_path):
    with webdataset.ShardWriter(f"file:{tmp_path}/val-%06d.tar", maxcount=2, verbose=0) as out:
        for i, data in enumerate((A, B, C)):
            out.write({"__key__": f"dir/{i}", "jpg": data, "cls": i, "json": {"caption": f"of {i}"}})
    uri = f"tars:{tmp_path}"
    listing = sources.list_items(uri)
    assert rows(listing, "label", "split") == [(0, "val"), (1, "val"), (2, "val")]
    read = list(sources.read_items(uri, listing.items))
    assert [raw for raw, _ in read] == [A, B, C]
    assert json.loads(read[2][1]["json"]) == {"caption": "of 2"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_tarfile_says_whatever_the_names_and_sizes(tmp_path, form):
    long = "/".join(["d" * 60] * (3 if form == tarfile.USTAR_FORMAT else 9))
    names = ["a.jpg", f"{long}/b.jpg", "ü.txt" if form != tarfile.USTAR_FORMAT else "u.txt", "empty.cls", "z.bin"]
    data = [A, B, b"x" * 511, b"", bytes(100_000)]
    (tmp_path / "x.tar").write_bytes(b"before" + packed(list(zip(names, data, strict=True)), form))
    path, size = f"{tmp_path}/x.tar", (tmp_path / "x.tar").stat().st_size
    for window in (512, 1 << 14, 1 << 23):
        members = list(archive.scan(path, 6, size, window=window))
        assert [member.name for member in members] == names
        assert [storage.read_range(path, m.offset, m.offset + m.size) for m in members] == data
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "x.tar").read_bytes()[6:])) as theirs:
        assert [(m.name, m.offset_data + 6) for m in theirs] == [(m.name, m.offset) for m in members]


def test_links_folders_and_hidden_members_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        for name, kind in [("dir", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            out.addfile(info)
        for name in ("a.jpg", "._a.jpg", "__meta__/x.jpg", "README"):
            info = tarfile.TarInfo(name)
            info.size = len(A)
            out.addfile(info, io.BytesIO(A))
    assert rows(sources.list_items(f"tars:{tmp_path}/x.tar", "none"), "name") == [("x.tar/a",)]


def test_a_sample_without_an_image_is_listed_and_says_so(tmp_path):
    uri = put(tmp_path, x=[("a.txt", b"1"), ("a.cls", b"1"), ("b.jpg", A), ("b.cls", b"0")])
    items = sources.list_items(uri).items
    (missing, _), (raw, _) = sources.read_items(uri, items)
    assert isinstance(missing, FileNotFoundError)
    assert missing.strerror == "no image among its members (txt)"
    assert raw == A
    with pytest.raises(ValueError, match="no images in the tars"):
        sources.list_items(put(tmp_path / "none", x=[("a.txt", b"1"), ("a.cls", b"1")]))


def test_members_that_lie_apart_belong_together(tmp_path):
    images = [(f"{i}.png", bytes(200_000)) for i in range(5)]
    uri = put(tmp_path, x=[("a.jpg", A), *images, ("a.txt", b"far"), ("a.cls", b"3")])
    items = sources.list_items(uri).items
    at = items["name"].to_pylist().index("x.tar/a")
    assert items["label"][at].as_py() == 3
    assert list(sources.read_items(uri, items.slice(at, 1))) == [(A, {"txt": b"far"})]


def test_the_label_is_in_json_where_there_is_no_cls(tmp_path):
    uri = put(tmp_path, x=[("a.jpg", A), ("a.json", b'{"label": 2}'), ("b.jpg", B), ("b.json", b'{"cls": 1, "x": 0}'),
                           ("c.jpg", C), ("c.json", b'{"label": "dog"}'), ("d.jpg", C), ("d.json", b"[")])  # fmt: skip
    assert sources.list_items(uri).items["label"].to_pylist() == [2, 1, None, None]
    assert sources.list_items(uri, "none").items["label"].null_count == 4
    assert sources.list_items(uri, "none").classes == ()
    with pytest.raises(ValueError, match=r"no labels in the tars .*--labels none"):
        sources.list_items(put(tmp_path / "none", x=[("a.jpg", A), ("a.cls", b"dog")]))


def test_classes_are_named_beside_the_tars(tmp_path):
    uri = put(tmp_path, x=[("a.jpg", A), ("a.cls", b"2")])
    (tmp_path / "classes.txt").write_text("cat\ndog\nöl\n")
    assert sources.list_items(uri).classes == ("cat", "dog", "öl")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"classes\.txt names 2 classes, but labels go up to 2"):
        sources.list_items(uri)
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(ValueError, match="'cat' twice"):
        sources.list_items(uri)
    with pytest.raises(ValueError, match="at most 1000000"):
        sources.list_items(put(tmp_path / "wild", x=[("a.jpg", A), ("a.cls", b"9" * 18)]))


def test_a_dataset_of_ours_is_read_by_its_names_and_leftovers_beside_it_are_not(photos):
    listing, info = sources.list_items(f"tars:{photos}"), json.loads(storage.read(f"{photos}/dataset.json"))
    assert listing.classes == tuple(info["classes"]) == ("a", "b", "c")
    assert len(listing.items) == 90
    assert set(listing.items["split"].to_pylist()) == {"train", "val"}
    split, *_ = listing.items["split"].to_pylist()
    first = next(tar.scan(f"{photos}/{split}-000000.tar"))
    at = listing.items["name"].to_pylist().index(f"{split}-000000.tar/{first.key}")
    assert listing.items["label"][at].as_py() == first.label
    ((raw, beside),) = sources.read_items(f"tars:{photos}", listing.items.slice(at, 1))
    assert raw == tar.read_sample(f"{photos}/{split}-000000.tar", first.offset, first.size)
    assert json.loads(beside["json"]) == first.facts


def test_a_dataset_of_ours_is_its_index(tmp_path):
    uri = put(tmp_path, train_0=[("a.jpg", A), ("a.cls", b"0")], left_over=b"no tar")
    facts = {"classes": ["cat"], "generations": [], "shards": [{"name": "train-0.tar"}]}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    assert rows(sources.list_items(uri), "name") == [("train-0.tar/a",)]
    (tmp_path / "dataset.json").write_text(json.dumps(facts | {"shards": [{"name": "train-1.tar"}]}))
    with pytest.raises(ValueError, match=r"names train-1\.tar, which is not there"):
        sources.list_items(uri)


def test_one_tar_and_braces_give_the_names_that_their_folder_gives(place):
    uri = put(place, sub__test_00=[("a.jpg", A), ("a.cls", b"0")], sub__test_01=[("b.jpg", B), ("b.cls", b"0")])
    whole = sources.list_items(f"{uri}/sub")
    assert rows(whole, "name", "split") == [("test-00.tar/a", "test"), ("test-01.tar/b", "test")]
    braces = sources.list_items(f"{uri}/sub/test-{{00..01}}.tar")
    assert braces.items.equals(whole.items)
    one = f"{uri}/sub/test-01.tar"
    assert sources.list_items(one).items.to_pylist() == whole.items.slice(1).to_pylist()
    assert list(sources.read_items(one, whole.items.slice(1))) == [(B, {})]
    assert [raw for raw, _ in sources.read_items(f"{uri}/sub/test-{{00..01}}.tar", braces.items)] == [A, B]
    assert rows(sources.list_items(f"{uri}/s{{ub,ub}}/test-00.tar"), "name") == [("sub/test-00.tar/a",)]
    with pytest.raises(ValueError, match=r"no tar at .*test-02\.tar"):
        sources.list_items(f"{uri}/sub/test-{{00..02}}.tar")


def test_damaged_tars_are_named(tmp_path):
    whole = packed([("a.jpg", A), ("a.cls", b"0"), ("b.jpg", B * 9), ("b.cls", b"0")])
    wrong = bytearray(whole)
    wrong[512 + len(A) + -len(A) % 512 + 10] ^= 1  # in the second header
    for bad, message in [
        (whole[: 3 * 512 + len(A) + 4000], r"bad\.tar is damaged at byte \d+: b\.jpg has \d+ bytes, \d+ are left"),
        (whole[:700], r"bad\.tar is damaged at byte 0: a\.jpg"),
        (whole[:100], r"bad\.tar holds no tar"),
        (bytes(wrong), r"bad\.tar is damaged at byte \d+: no header, or one whose checksum is wrong"),
        (b"", r"bad\.tar is empty"),
        (A * 20, r"bad\.tar holds no tar at byte 0: it begins with ff d8"),
        (b"\x1f\x8b" + bytes(600), r"bad\.tar is compressed"),
        (packed([("a.jpg", A), ("a.jpg", B)]), r"bad\.tar holds a\.jpg twice"),
        (packed([("a" * 300 + ".jpg", A)], tarfile.PAX_FORMAT).replace(b" path=", b" path "), r"bad\.tar .*PAX"),
    ]:
        uri = put(tmp_path, good=[("a.jpg", A), ("a.cls", b"0")], bad=bad)
        with pytest.raises(ValueError, match=message):
            sources.list_items(uri)


def test_compressed_tars_and_missing_ones_are_named(tmp_path):
    with pytest.raises(ValueError, match="no folder at"):
        sources.list_items(f"tars:{tmp_path}/gone")
    with pytest.raises(ValueError, match=r"no \.tar files in"):
        sources.list_items(f"tars:{tmp_path}")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    for path in (tmp_path, tmp_path / "x.tar.gz", f"{tmp_path}/x-{{0..3}}.tgz"):
        with pytest.raises(ValueError, match=r"is compressed: only plain \.tar"):
            sources.list_items(f"tars:{path}")
