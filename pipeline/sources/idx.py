"""`idx:PATH`: a folder of MNIST-format files (http://yann.lecun.com/exdb/mnist), gzipped or not.

train-images-idx3-ubyte and train-labels-idx1-ubyte make the split train, t10k-... the split test; the dot form
(train-images.idx3-ubyte) is read too. Classes are called "0", "1", ... unless `classes.txt` beside them says
otherwise, one name a line.
"""

import gzip
import zlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.sources.listing import Item, Listing

SPLITS = {"train": "train", "t10k": "test"}  # file prefix -> split


def list_items(path: str, labels: str) -> Listing:
    """Items `train/00000042`. ValueError: no such files, or one that is not what its header says."""
    columns, found = {key: [] for key in ("name", "label", "split", "size", "tag")}, _find(path)
    for split in sorted({split for split, _ in found}):
        if (split, "images") not in found:
            raise ValueError(f"{path} has labels of the split {split!r} but no images")
        images, file = _array(path, found[split, "images"], 3), found[split, "images"]
        columns["name"] += [f"{split}/{i:08d}" for i in range(len(images))]
        columns["split"] += [split] * len(images)
        columns["size"] += [images[0].size if len(images) else 0] * len(images)
        columns["tag"] += [file.tag] * len(images)
        columns["label"] += [None] * len(images) if labels == "none" else _labels(path, found, split, len(images))
    if not columns["name"]:
        raise ValueError(f"the IDX files in {path} hold no images")
    classes = () if labels == "none" else _classes(path, max(columns["label"]) + 1)
    return Listing.of(columns, classes, "png")


def read_items(path: str, items: pa.Table) -> Iterator[Item]:
    """Pixels, uint8 (h, w, 1)."""
    found = _find(path)
    for name in items["name"].to_pylist():
        split, _, number = name.partition("/")
        yield _array(path, found[split, "images"], 3)[int(number), :, :, None], {}


def _find(path: str) -> dict[tuple[str, str], storage.File]:
    """{(split, "images" or "labels"): file}."""
    wanted = {
        f"{prefix}-{kind}{mark}idx{dims}-ubyte{end}": (split, kind)
        for prefix, split in SPLITS.items()
        for kind, dims in (("images", 3), ("labels", 1))
        for mark in "-."
        for end in ("", ".gz")
    }
    try:
        found = {wanted[file.path]: file for file in storage.list_files(path) if file.path in wanted}
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no folder at {path}") from None
    if not any(kind == "images" for _, kind in found):
        raise ValueError(f"no MNIST-format files in {path}: train-images-idx3-ubyte or t10k-images-idx3-ubyte, or .gz")
    return found


@lru_cache(maxsize=8)  # read_items is asked for a thousand at a time, and one file holds them all
def _array(path: str, file: storage.File, dims: int) -> np.ndarray:
    where = storage.join(path, file.path)
    data = storage.read(where)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{where} is a damaged gzip file: {error}") from None
    if len(data) < 4 + 4 * dims or data[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(f"{where} is no IDX file of bytes in {dims} dimensions: it begins with {data[:4].hex(' ')}")
    shape = np.frombuffer(data, ">u4", dims, 4).astype(np.int64)
    size = len(data) - 4 - 4 * dims
    if size != int(shape.prod()):
        raise ValueError(f"{where} holds {size} bytes, its header says {' x '.join(map(str, shape))}: truncated?")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _labels(path: str, found: dict, split: str, images: int) -> list[int]:
    if (split, "labels") not in found:
        raise ValueError(f"{path} has images of the split {split!r} but no labels; --labels none does without")
    labels = _array(path, found[split, "labels"], 1)
    if len(labels) != images:
        raise ValueError(f"{path}: {images} images and {len(labels)} labels of the split {split!r}")
    return labels.tolist()


def _classes(path: str, labels: int) -> list[str]:
    names = storage.join(path, "classes.txt")
    if not storage.exists(names):
        return [str(label) for label in range(labels)]
    classes = storage.read(names).decode("utf-8").splitlines()
    if len(classes) < labels or len(set(classes)) != len(classes):
        raise ValueError(f"{names} has {len(classes)} lines: one name a line, each once, for labels 0 to {labels - 1}")
    return classes
