import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import sources, storage


def put(place, name, table, **how):
    file = io.BytesIO()
    pq.write_table(table, file, **how)
    storage.write(f"{place}/{name}", file.getvalue())


def hugging_face(images, labels, names=("cat", "dog", "eel"), paths=None):
    """As `datasets` writes it: image as {bytes, path}, label as int64, the class names in the schema's metadata."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    paths = paths or [None] * len(images)
    rows = [{"bytes": image, "path": path} for image, path in zip(images, paths, strict=True)]
    image = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"image": image, "label": pa.array(labels, pa.int64())})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def rows(listing, *names):
    return list(zip(*(listing.items[name].to_pylist() for name in names), strict=True))


def read(uri, items):
    return [raw for raw, beside in sources.read_items(uri, items) if beside == {}]


def test_hugging_faces_parquet_is_read_with_its_class_names(place):
    images = [b"%d" % i * 9 for i in range(7)]
    put(place, "data/train-00000-of-00002.parquet", hugging_face(images[:4], [0, 2, None, 1]), row_group_size=3)
    put(place, "data/train-00001-of-00002.parquet", hugging_face(images[4:5], [1]))
    put(place, "data/validation-00000-of-00001.parquet", hugging_face(images[5:], [-1, 0]))
    uri = f"table:{place}"
    listing = sources.list_items(uri)
    assert listing.classes == ("cat", "dog", "eel")
    assert rows(listing, "name", "label", "split", "block", "offset")[2:6] == [
        ("data/train-00000-of-00002.parquet/00000002", None, "train", 0, 2),
        ("data/train-00000-of-00002.parquet/00000003", 1, "train", 1, 3),
        ("data/train-00001-of-00002.parquet/00000000", 1, "train", 2, 0),
        ("data/validation-00000-of-00001.parquet/00000000", None, "val", 3, 0),
    ]
    order = [6, 0, 3, 5, 1, 4, 2]
    assert read(uri, listing.items.take(order)) == [images[i] for i in order]
    assert read(uri, listing.items.take([3, 3, 0])) == [images[3], images[3], images[0]]
    assert read(uri, listing.items.slice(0, 0)) == []
    one = sources.list_items(f"{uri}/data/train-00001-of-00002.parquet")
    assert rows(one, "name") == [("train-00001-of-00002.parquet/00000000",)]
    assert sources.list_items(uri, "none").items["label"].null_count == 7


def test_paths_in_csv_jsonl_and_parquet_lead_to_files(place):
    for name in ("images/a.jpg", "images/b.jpg", "sub/c.jpg"):
        storage.write(f"{place}/{name}", name.encode())
    table = pa.table({"file_name": ["images/b.jpg", "./images//a.jpg", f"{place}/sub/c.jpg"],
                      "label": ["dog", "cat", None], "split": ["train", "validation", "test"]})  # fmt: skip
    lines = [json.dumps({"more": {"x": [1]}, **row}) for row in table.to_pylist()]
    quoted = 'label,file_name,split,note\ndog,images/b.jpg,train,"a, b"\ncat,./images//a.jpg,validation,\n'
    storage.write(f"{place}/t.csv", f"{quoted},{place}/sub/c.jpg,test,x\n".encode())
    storage.write(f"{place}/t.jsonl", "\n".join(lines).encode())
    put(place, "t.parquet", table)
    for kind in ("csv", "jsonl", "parquet"):
        uri = f"table:{place}/t.{kind}"
        listing = sources.list_items(uri)
        assert listing.classes == ("cat", "dog")
        assert rows(listing, "name", "label", "split", "size") == [
            ("images/a.jpg", 0, "val", 12),
            ("images/b.jpg", 1, "train", 12),
            ("sub/c.jpg", None, "test", 9),
        ]
        assert read(uri, listing.items.take([1, 2, 0])) == [b"images/b.jpg", b"sub/c.jpg", b"images/a.jpg"]
        assert all(listing.items["tag"].to_pylist())
        assert listing.items["block"].null_count == 3


def test_a_local_table_may_name_objects_in_a_store(tmp_path, s3):
    where = s3.fresh()
    storage.write(f"{where}/x/a.jpg", b"in the store")
    (tmp_path / "b.jpg").write_bytes(b"here")
    (tmp_path / "t.csv").write_text(f"uri\n{where}/x/a.jpg\nfile://{tmp_path}/b.jpg\n")
    uri = f"table:{tmp_path}/t.csv"
    items = sources.list_items(uri, "none").items
    assert items["name"].to_pylist() == ["b.jpg", f"{where}/x/a.jpg"]
    assert read(uri, items) == [b"here", b"in the store"]


def test_paths_are_relative_to_the_folder_of_their_table(tmp_path):
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.jpg").write_bytes(part.encode())
        (tmp_path / part / "metadata.csv").write_text("file_name,label\na.jpg,7\n")
    listing = sources.list_items(f"table:{tmp_path}")
    assert rows(listing, "name", "label") == [("one/a.jpg", 7), ("two/a.jpg", 7)]
    assert listing.classes == tuple("01234567")
    assert read(f"table:{tmp_path}", listing.items) == [b"one", b"two"]


def test_a_row_that_leads_nowhere_is_answered_by_an_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "dir").mkdir()
    names = ["a.jpg", "gone.jpg", "../secret.jpg", "/etc/../etc/hostname", "a.jpg/x", "dir", "nul\0.jpg", "n" * 300,
             "s3:///x", None, ""]  # fmt: skip
    put(tmp_path, "t.parquet", pa.table({"path": names}))
    uri = f"table:{tmp_path}/t.parquet"
    items = sources.list_items(uri, "none").items
    found = dict(zip(items["name"].to_pylist(), read(uri, items), strict=True))
    assert found.pop("a.jpg") == b"a"
    assert len(found) == 10
    assert all(isinstance(raw, OSError) and raw.strerror for raw in found.values())
    assert found["t.parquet/00000009"].strerror == "the row holds neither a path nor an image"


def test_stored_rows_without_bytes_fall_back_to_their_path_or_say_so(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"file")
    put(tmp_path, "t.parquet", hugging_face([b"held", None, None], [0, 0, 0], paths=["x.jpg", "a.jpg", None]))
    uri = f"table:{tmp_path}"
    held, file, nothing = read(uri, sources.list_items(uri).items)
    assert (held, file) == (b"held", b"file")
    assert isinstance(nothing, FileNotFoundError)


def test_columns_are_asked_for_by_name(tmp_path):
    table = pa.table({"photo of": [b"0", b"1"], "thumb": [b"a", b"b"], "kind": [1, 0], "fold": ["x", "y"],
                      "meta": [{"id": "q"}, {"id": "p"}]})  # fmt: skip
    put(tmp_path, "t.parquet", table)
    uri = f"table:{tmp_path}?image=photo%20of&label=kind&split=fold&name=meta.id"
    listing = sources.list_items(uri)
    assert rows(listing, "name", "label", "split") == [("p", 0, "y"), ("q", 1, "x")]
    assert read(uri, listing.items) == [b"1", b"0"]
    for query, message in [
        ("imag=thumb", r"imag= in .*did you mean image=\?"),
        ("image=thumb&image=thumb", "given twice"),
        ("image=tumb&label=kind", "image=tumb: .* no such column.* Did you mean thumb"),
        ("label=kind", "no column of paths or image bytes"),
        ("image=kind&label=kind", "kind holds neither"),
        ("image=thumb", "no label column .*--labels none"),
        ("image=thumb&label=thumb", "column thumb of .* holds binary"),
        ("image=thumb&label=kind&name=nil", "name=nil"),
    ]:
        with pytest.raises(ValueError, match=message):
            sources.list_items(f"table:{tmp_path}?{query}")
    put(tmp_path / "one", "t.parquet", table.select(["thumb", "kind"]))
    assert sources.list_items(f"table:{tmp_path}/one?label=kind").items["size"].to_pylist() == [0, 0]


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        (pa.array([1, 0, None], pa.int8()), [1, 0, None], "01"),
        (pa.array([1.0, 0.0, None]), [1, 0, None], "01"),
        (pa.array([True, False, True]), [1, 0, 1], "01"),
        (pa.array(["10", "9", ""]), [0, 1, None], ["10", "9"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1], "ab"),
        (pa.array(["b", None, "b"], pa.large_string()), [0, None, 0], "b"),
    ],
)
def test_labels_are_numbers_or_names(tmp_path, values, labels, classes):
    put(tmp_path, "t.parquet", pa.table({"image": [b"1", b"2", b"3"], "label": values}))
    listing = sources.list_items(f"table:{tmp_path}/t.parquet")
    assert listing.items["label"].to_pylist() == labels
    assert listing.classes == tuple(classes)


def test_numbers_in_csv_are_labels(tmp_path):
    (tmp_path / "t.csv").write_text("path,label\na,3.0\nb,\nc,0\n")
    listing = sources.list_items(f"table:{tmp_path}/t.csv")
    assert listing.items["label"].to_pylist() == [3, None, 0]
    (tmp_path / "t.csv").write_text("path,label\na,3\nb,NA\nc,0\n")
    assert sources.list_items(f"table:{tmp_path}/t.csv").classes == ("0", "3", "NA")


def test_tables_that_cannot_be_used_are_named(tmp_path):
    put(tmp_path, "t.parquet", hugging_face([b"1", b"2"], [0, 5]))
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-30])
    texts = {"twice.csv": "path,label\nx/a.jpg,1\nb.jpg,1\n./x/a.jpg,2\n", "web.csv": "url,label\nhttps://h/a.jpg,1\n",
             "gap.csv": "path,label\na\n", "none.csv": "path,label\na,\n", "hf.csv": "path,label\nhf://a/b,1\n",
             "empty.csv": "", "rows.csv": "path,label\n", "bad.jsonl": '{"path": 1\n',
             "latin.csv": "path,label\n\xe9,1\n"}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    for name, message in {
        "t.parquet": "names 3 classes, but labels go up to 5",
        "bad.parquet": r"bad\.parquet cannot be read",
        "twice.csv": "'x/a.jpg' stands in column path .* more than once",
        "web.csv": "https://h/a.jpg is on the web: download",
        "gap.csv": r"gap\.csv cannot be read",
        "none.csv": "no label at all",
        "hf.csv": "unknown scheme hf://",
        "empty.csv": r"empty\.csv cannot be read",
        "rows.csv": "no rows",
        "bad.jsonl": r"bad\.jsonl cannot be read",
        "latin.csv": r"latin\.csv cannot be read",
        "gone.csv": "no table at",
        "gone": "no folder at",
        "": r"several kinds \(.parquet, .csv, .jsonl\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            sources.list_items(f"table:{tmp_path}/{name}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no tables"):
        sources.list_items(f"table:{tmp_path}/empty")
    put(tmp_path / "two", "a.parquet", pa.table({"image": [b"1"], "label": [1]}))
    put(tmp_path / "two", "b.parquet", pa.table({"image": [b"1"], "lable": [1]}))
    with pytest.raises(ValueError, match=r"b\.parquet has no column 'label'"):
        sources.list_items(f"table:{tmp_path}/two")


@pytest.fixture
def peak():
    """Calls a function and returns (what it returns, bytes that pyarrow held meanwhile, at most)."""
    usual, kept = pa.default_memory_pool(), []

    def measured(call):
        kept.append(pa.proxy_memory_pool(usual))  # pyarrow does not keep it alive
        pa.set_memory_pool(kept[-1])
        try:
            return call(), kept[-1].max_memory()
        finally:
            pa.set_memory_pool(usual)

    return measured


def test_listing_reads_no_image_and_reading_holds_no_row_group(tmp_path, peak):
    noise = np.random.default_rng(0).integers(0, 256, (512, 100_000), dtype=np.uint8)  # 51 MB in one row group
    images = [row.tobytes() for row in noise]
    small = {"use_dictionary": False, "compression": "none", "write_batch_size": 16}  # pages of 1.6 MB
    put(tmp_path, "t.parquet", hugging_face(images, [0] * 512), **small)
    uri, path = f"table:{tmp_path}", tmp_path / "t.parquet"
    whole = path.read_bytes()
    first, last = whole.index(images[0]), whole.index(images[-1])
    path.write_bytes(whole[:first] + bytes(last - first) + whole[last:])  # its pages are lost, the rest is not
    items = sources.list_items(uri).items
    assert len(items) == 512
    path.write_bytes(whole)
    group, held = peak(lambda: pq.read_table(path, columns=["image"]).num_rows)
    assert group == 512
    assert held > 50_000_000
    found, held = peak(lambda: read(uri, items.take([500, 3])))
    assert found == [images[500], images[3]]
    assert 1_000_000 < held < 25_000_000
