"""`imagenet:PATH`: ImageNet's ILSVRC2012 as its users hold it, local or s3://, each split in either form.

    ILSVRC2012_img_train.tar            a tar of one tar a class, read where it lies, never unpacked
    ILSVRC2012_img_val.tar              with the devkit (ILSVRC2012_devkit_t12.tar.gz, or unpacked) or Kaggle's CSV
    ILSVRC/Data/CLS-LOC/train, val      Kaggle's tree, with LOC_val_solution.csv; PATH may be any folder of that path.
                                        Class folders below val are read, too. test has no labels and is left out.

Labels are those of torchvision, timm and Keras: classes in the order of their WordNet ids, of which both splits
together hold 1000. They are called `n01440764 tench`, the id and the first of the names that LOC_synset_mapping.txt or
the devkit has (two classes are called crane, two maillot), or by the id alone where neither file is there.

An item is named train/n01440764/n01440764_10026.JPEG or val/ILSVRC2012_val_00000001.JPEG in either form.
"""

import os
import re
from collections.abc import Iterator

import pyarrow as pa

from pipeline import storage
from pipeline.sources import archive, groundtruth, listing
from pipeline.sources.folder import EXTENSIONS, read_file
from pipeline.sources.listing import LOCAL_READERS, READERS, Item, Listing, ahead

TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
_TREE = ("ILSVRC", "Data", "CLS-LOC")
_WORDNET = re.compile(r"n\d{8}")
_COLUMNS = ("name", "split", "size", "tag", "file", "offset")


def list_items(path: str, labels: str) -> Listing:
    """All labelled images. In the column `file`: the tar, or the folder of the tree that holds train and val.

    The tars' headers are read anew each time: 1.3 million take half a minute of a core, and a disk as many seeks.
    ValueError: no such files, a damaged tar, a validation image without ground truth, counts that differ.
    """
    columns, wordnet = {name: [] for name in _COLUMNS}, []
    found = {split: _tar_items(path, split) for split in TARS}
    base, files = _tree(path) if None in found.values() else ("", {})
    for split, of_split in found.items():
        for name, values in (of_split or _tree_items(path, base, split, files[split])).items():
            columns[name] += values
    if not columns["name"]:
        raise ValueError(f"no ImageNet in {path}: neither {' nor '.join(TARS.values())} nor {'/'.join(_TREE)}")
    classes: list[str] = []
    if labels == "auto":
        places = _places(path, base)
        wordnet = _wordnet_ids(columns, places)
        ids, names = sorted(set(wordnet)), groundtruth.names(places)
        number = {each: label for label, each in enumerate(ids)}
        columns["label"] = [number[each] for each in wordnet]
        classes = [f"{each} {names[each].partition(',')[0]}" if each in names else each for each in ids]
    columns["file"] = pa.array(columns["file"]).dictionary_encode()
    return Listing.of(columns, classes, "jpg")


def _wordnet_ids(columns: dict[str, list], places: list[str]) -> list[str]:
    """The class of each image: the folder it lies in, or what the ground truth says."""
    flat = {name for name in columns["name"] if name.count("/") == 1}
    truth = groundtruth.validation(places) if flat else {}
    stems = [name.rpartition("/")[2].partition(".")[0] for name in columns["name"]]
    if unknown := [
        name for name, stem in zip(columns["name"], stems, strict=True) if name in flat and stem not in truth
    ]:
        raise ValueError(f"{len(unknown)} images have no ground truth in {places[0]}, {unknown[0]} first: it is of "
                         f"{len(truth)} images")  # fmt: skip
    if TARS["val"] in columns["file"] and len(flat) != len(truth):
        raise ValueError(f"{TARS['val']} in {places[0]} holds {len(flat)} images, the ground truth is of {len(truth)}")
    return [truth[stem] if name in flat else name.split("/")[1]
            for name, stem in zip(columns["name"], stems, strict=True)]  # fmt: skip


# ---- tars


def _tar_items(path: str, split: str) -> dict[str, list] | None:
    """Columns of one split's tar, or None if it is not there."""
    where = storage.join(path, TARS[split])
    try:
        file = listing.file_at(where)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if split == "train":
        found = _train_members(where, file.size)
    else:
        found = [(f"val/{m.name.rpartition('/')[2]}", m) for m in archive.scan(where, 0, file.size) if _image(m.name)]
    if not found:
        raise ValueError(f"{where} holds no images")
    return {
        "name": [name for name, _ in found],
        "split": [split] * len(found),
        "size": [member.size for _, member in found],
        "tag": [file.tag] * len(found),
        "file": [TARS[split]] * len(found),
        "offset": [member.offset for _, member in found],
    }


def _train_members(where: str, size: int) -> list[tuple[str, archive.Member]]:
    inner = list(archive.scan(where, 0, size, window=archive.BLOCK))  # a header every 138 MB: no use in more
    if odd := [member.name for member in inner if not _WORDNET.fullmatch(_stem(member.name))]:
        raise ValueError(f"{where} holds {odd[0]}: a tar a class is expected there, named like n01440764.tar")

    def of_class(i: int) -> list[tuple[str, archive.Member]]:
        folder, start = f"train/{_stem(inner[i].name)}", inner[i].offset
        images = [m for m in archive.scan(where, start, start + inner[i].size) if _image(m.name)]
        return [(f"{folder}/{member.name.rpartition('/')[2]}", member) for member in images]

    threads = READERS if storage.is_remote(where) else LOCAL_READERS
    return [found for part in ahead(of_class, [0] * len(inner), threads) for found in part]


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".tar")


def _image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return not base.startswith(".") and base.rpartition(".")[2].lower() in EXTENSIONS


# ---- Kaggle's tree


def _tree(path: str) -> tuple[str, dict[str, list[storage.File]]]:
    """(where below `path` train and val lie: ILSVRC/Data/CLS-LOC or its end, "" for `path` itself; their images)."""
    for base in ("/".join(_TREE[i:]) for i in range(len(_TREE) + 1)):
        found = {split: _images(path, base, split) for split in TARS}
        if any(found.values()):
            break
    return base, found


def _images(path: str, base: str, split: str) -> list[storage.File]:
    try:
        files = storage.list_files(storage.join(path, *filter(None, [base, split])))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [file for file in files if _image(file.path)]


def _tree_items(path: str, base: str, split: str, files: list[storage.File]) -> dict[str, list]:
    depths = {file.path.count("/") for file in files}
    if split == "train" and depths - {1}:
        stray = next(file.path for file in files if file.path.count("/") != 1)
        raise ValueError(f"{path}: train/{stray} lies in no class folder directly below train")
    if depths - {0, 1} or len(depths) > 1:
        raise ValueError(f"{path}: the images of val lie in one folder, or all of them in class folders")
    if odd := [f.path for f in files if "/" in f.path and not _WORDNET.fullmatch(f.path.partition("/")[0])]:
        raise ValueError(f"{path}: the folder of {split}/{odd[0]} is no WordNet id like n01440764; "
                         f"folder:{path} takes class folders of any name")  # fmt: skip
    return {
        "name": [f"{split}/{file.path}" for file in files],
        "split": [split] * len(files),
        "size": [file.size for file in files],
        "tag": [file.tag for file in files],
        "file": [base] * len(files),
        "offset": [None] * len(files),
    }


def _places(path: str, base: str) -> list[str]:
    """Folders where the ground truth may lie: PATH, those below it and, where PATH is inside Kaggle's tree, above."""
    places = [path, *(storage.join(path, below) for below in groundtruth.UNPACKED)]
    above = path if storage.is_remote(path) else os.path.abspath(path)
    for name in reversed(_TREE[: len(_TREE) - len(base.split("/")) if base else len(_TREE)]):
        if storage.name(above) != name:
            break
        above = above.rstrip("/").rpartition("/")[0]
        places.append(above)
    return places


def read_items(path: str, items: pa.Table) -> Iterator[Item]:
    """Each image's bytes; of the tree, why one file cannot be read. StorageError: the store fails, a tar was cut."""
    names, files, offsets, sizes = (items[c].to_pylist() for c in ("name", "file", "offset", "size"))

    def read(i: int) -> Item:
        if offsets[i] is None:
            return read_file(storage.join(path, files[i]) if files[i] else path, names[i]), {}
        return storage.read_range(storage.join(path, files[i]), offsets[i], offsets[i] + sizes[i]), {}

    return ahead(read, sizes, READERS if storage.is_remote(path) else LOCAL_READERS)
