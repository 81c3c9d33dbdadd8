import gzip
import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pipeline import sources, storage

# In the devkit's order, which is not that of the ids; the last is an inner node of WordNet, no class.
SYNSETS = [(1, "n02119789", "kit fox, Vulpes macrotis"), (2, "n02012849", "crane"), (3, "n03126707", "crane"),
           (4, "n01440764", "tench, Tinca tinca"), (5, "n00002684", "object, physical object")]  # fmt: skip
CLASSES = ("n01440764 tench", "n02012849 crane", "n02119789 kit fox", "n03126707 crane")
TRUTH = [3, 1, 4, 2, 1]  # ILSVRC2012_ID of val image 1, 2, ...
VAL_LABELS = [3, 2, 0, 1, 2]  # positions of these in CLASSES
TRAIN = [f"{wordnet}/{wordnet}_{i}.JPEG" for _, wordnet, _ in SYNSETS[:4] for i in (10, 7)]
VAL = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 6)]


def picture(name):
    file, seed = io.BytesIO(), list(name.encode())
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def packed(members, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=tarfile.GNU_FORMAT) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return file.getvalue()


def meta():
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros((len(SYNSETS), 1), [(name, object) for name in [*fields, "num_train_images"]])
    for row, (number, wordnet, words) in zip(synsets[:, 0], SYNSETS, strict=True):
        inner = wordnet == "n00002684"
        values = [number, wordnet, words, "a gloss", 2 * inner, [1, 2] if inner else [], int(inner), 1300 * (not inner)]
        for field, value in zip(synsets.dtype.names, values, strict=True):
            row[field] = np.array(value, np.float64) if not isinstance(value, str) else value
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    return file.getvalue()


def devkit(lines=None):
    truth = "".join(f"{line}\n" for line in lines or TRUTH).encode()
    root = "ILSVRC2012_devkit_t12"
    return packed(
        [(f"{root}/readme.txt", b"hi"), (f"{root}/data/meta.mat", meta()),
         (f"{root}/data/ILSVRC2012_validation_ground_truth.txt", truth)], "w:gz")  # fmt: skip


def train_tar():
    inner = {}
    for name in TRAIN:
        inner.setdefault(name.partition("/")[0], []).append((name.partition("/")[2], picture(name)))
    return packed([(f"{wordnet}.tar", packed(members)) for wordnet, members in inner.items()])


def put_tars(place, **files):
    given = {"ILSVRC2012_img_train.tar": train_tar(),
             "ILSVRC2012_img_val.tar": packed([(name, picture(name)) for name in reversed(VAL)]),
             "ILSVRC2012_devkit_t12.tar.gz": devkit(), **files}  # fmt: skip
    for name, data in given.items():
        if data is not None:
            storage.write(f"{place}/{name}", data)
    return f"imagenet:{place}"


def put_tree(place):
    root = f"{place}/ILSVRC/Data/CLS-LOC"
    for name in TRAIN:
        storage.write(f"{root}/train/{name}", picture(name))
    for name in VAL:
        storage.write(f"{root}/val/{name}", picture(name))
    storage.write(f"{root}/test/ILSVRC2012_test_00000001.JPEG", picture("test"))
    storage.write(f"{place}/ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml", b"<annotation/>")
    mapping = "".join(f"{wordnet} {words}\n" for _, wordnet, words in sorted(SYNSETS[:4], key=lambda s: s[1]))
    storage.write(f"{place}/LOC_synset_mapping.txt", mapping.encode())
    wordnet = {number: wordnet for number, wordnet, _ in SYNSETS}
    solution = [f"{name[:-5]},{wordnet[n]} 1 2 3 4 {wordnet[n]} 5 6 7 8 " for name, n in zip(VAL, TRUTH, strict=True)]
    storage.write(
        f"{place}/LOC_val_solution.csv", "\r\n".join(["ImageId,PredictionString", *solution[::-1], ""]).encode()
    )
    return f"imagenet:{place}"


def check(listing, uri):
    assert listing.classes == CLASSES
    names = listing.items["name"].to_pylist()
    assert names == sorted([*(f"train/{name}" for name in TRAIN), *(f"val/{name}" for name in VAL)])
    labels, splits = listing.items["label"].to_pylist(), listing.items["split"].to_pylist()
    assert [(n, s) for n, s in zip(names, splits, strict=True) if not n.startswith(f"{s}/")] == []
    assert labels[-5:] == VAL_LABELS
    assert [CLASSES[label][:9] for label in labels[:-5]] == [name.split("/")[1] for name in names[:-5]]
    wanted = listing.items.take([9, 0, 12, 4, 3])
    read = list(sources.read_items(uri, wanted))
    assert read == [(picture(name.partition("/")[2]), {}) for name in wanted["name"].to_pylist()]
    assert wanted["size"].to_pylist() == [len(raw) for raw, _ in read]


def test_the_tars_of_tars_are_read_where_they_lie(place):
    uri = put_tars(place)
    listing = sources.list_items(uri)
    check(listing, uri)
    assert set(listing.items["file"].to_pylist()) == {"ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"}


def test_kaggles_tree_gives_the_same_names_and_labels_as_the_tars(place):
    uri = put_tree(place)
    check(sources.list_items(uri), uri)


@pytest.mark.parametrize("inside", ["ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_any_folder_of_kaggles_tree_may_be_named(tmp_path, monkeypatch, inside):
    put_tree(str(tmp_path))
    check(sources.list_items(f"imagenet:{tmp_path}/{inside}"), f"imagenet:{tmp_path}/{inside}")
    monkeypatch.chdir(tmp_path)
    check(sources.list_items(f"imagenet:{inside}"), f"imagenet:{inside}")


def test_the_devkit_may_be_unpacked_and_kaggles_csv_may_stand_in_for_it(tmp_path):
    uri = put_tars(tmp_path, **{"ILSVRC2012_devkit_t12.tar.gz": None})
    with tarfile.open(fileobj=io.BytesIO(devkit())) as kit:
        kit.extractall(tmp_path, filter="data")
    check(sources.list_items(uri), uri)
    other = put_tars(tmp_path / "other", **{"ILSVRC2012_devkit_t12.tar.gz": None})
    put_tree(str(tmp_path / "kaggle"))
    for name in ("LOC_val_solution.csv", "LOC_synset_mapping.txt"):
        (tmp_path / "kaggle" / name).rename(tmp_path / "other" / name)
    check(sources.list_items(other), other)


def test_one_split_alone_and_classes_without_names(tmp_path):
    only = put_tars(tmp_path, **{"ILSVRC2012_img_val.tar": None, "ILSVRC2012_devkit_t12.tar.gz": None})
    listing = sources.list_items(only)
    assert listing.classes == tuple(name[:9] for name in CLASSES)
    assert listing.items["split"].to_pylist() == ["train"] * 8
    val = put_tars(tmp_path / "val", **{"ILSVRC2012_img_train.tar": None})
    assert sources.list_items(val).items["label"].to_pylist() == VAL_LABELS
    bare = put_tars(tmp_path / "bare", **{"ILSVRC2012_devkit_t12.tar.gz": None})
    assert len(sources.list_items(bare, "none").items) == 13
    assert sources.list_items(bare, "none").classes == ()


def test_val_may_lie_in_class_folders(tmp_path):
    for name in TRAIN[:4]:
        storage.write(f"{tmp_path}/train/{name}", picture(name))
        storage.write(f"{tmp_path}/val/{name}", picture(name))
    listing = sources.list_items(f"imagenet:{tmp_path}")
    assert listing.items["label"].to_pylist() == [0, 0, 1, 1] * 2
    storage.write(f"{tmp_path}/val/{VAL[0]}", b"")
    with pytest.raises(ValueError, match="images of val lie in one folder"):
        sources.list_items(f"imagenet:{tmp_path}")


def test_a_file_of_the_tree_that_is_gone_is_answered_by_its_error(tmp_path):
    uri = put_tree(str(tmp_path))
    items = sources.list_items(uri).items
    (tmp_path / "ILSVRC/Data/CLS-LOC" / items["name"][0].as_py()).unlink()
    (lost, _), (raw, _) = sources.read_items(uri, items.slice(0, 2))
    assert isinstance(lost, FileNotFoundError)
    assert raw[:2] == b"\xff\xd8"


def test_what_is_missing_or_damaged_is_named(tmp_path):
    whole = train_tar()
    for number, (files, message) in enumerate([
        ({"ILSVRC2012_devkit_t12.tar.gz": None}, "no ground truth of the validation images .*devkit_t12.tar.gz"),
        ({"ILSVRC2012_devkit_t12.tar.gz": devkit(TRUTH[:4])}, "1 images have no ground truth .*val_00000005.JPEG"),
        ({"ILSVRC2012_devkit_t12.tar.gz": devkit([*TRUTH, 1])}, "holds 5 images, the ground truth is of 6"),
        ({"ILSVRC2012_devkit_t12.tar.gz": devkit([*TRUTH[:4], 9])}, "no ILSVRC2012_ID of .*meta.mat"),
        ({"ILSVRC2012_devkit_t12.tar.gz": devkit()[:-40]}, "devkit_t12.tar.gz is damaged"),
        ({"ILSVRC2012_devkit_t12.tar.gz": gzip.compress(packed([("x", b"")]))}, "holds no ILSVRC2012_validation_gr"),
        ({"meta.mat": b"MATLAB 5.0 not"}, "is no devkit's meta.mat"),
        ({"LOC_val_solution.csv": b"a,b\n1,2\n"}, "ImageId and PredictionString are needed"),
        ({"ILSVRC2012_img_train.tar": whole[: len(whole) // 2]}, "img_train.tar is damaged at byte"),
        ({"ILSVRC2012_img_train.tar": whole[:512] + b"x" + whole[513:]}, "img_train.tar holds no tar at byte 512"),
        ({"ILSVRC2012_img_train.tar": packed([("n01440764/a.JPEG", b"1")])}, "holds n01440764/a.JPEG: a tar a class"),
        ({"ILSVRC2012_img_val.tar": packed([("readme", b"1")])}, "img_val.tar holds no images"),
    ]):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sources.list_items(put_tars(tmp_path / str(number), **files))
    with pytest.raises(ValueError, match="no ImageNet in"):
        sources.list_items(f"imagenet:{tmp_path}/gone")


def test_class_folders_of_another_dataset_are_sent_elsewhere(tmp_path):
    storage.write(f"{tmp_path}/train/cat/a.JPEG", b"1")
    with pytest.raises(ValueError, match=r"train/cat/a\.JPEG is no WordNet id .*; folder:"):
        sources.list_items(f"imagenet:{tmp_path}")
    storage.write(f"{tmp_path}/train/a.JPEG", b"1")
    with pytest.raises(ValueError, match=r"train/a\.JPEG lies in no class folder"):
        sources.list_items(f"imagenet:{tmp_path}")
