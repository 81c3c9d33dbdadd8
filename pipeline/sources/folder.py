"""`folder:PATH`: image files in class folders, local or s3://.

    PATH/cat/a.jpg                the class is the first folder, any depth below it
    PATH/train/cat/a.jpg          train, val (or validation) and test directly below PATH are splits

Hidden files and files that are no images by name are passed over. A name that is not UTF-8 is listed with its odd
bytes spelled out (`\\xff`), since columns hold text.
"""

import errno
import os
import re
from collections.abc import Iterator

import pyarrow as pa

from pipeline import storage
from pipeline.sources.listing import READERS, SPLITS, Item, Listing, ahead

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "bmp", "gif", "tif", "tiff", "webp", "ppm", "pgm", "pbm"})
_OF_ONE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
_SOON = 16  # files the kernel is told of before they are read
_SPELLED = re.compile(rb"\\x([89a-f][0-9a-f])")


def list_items(path: str, labels: str) -> Listing:
    """The image files below `path`. ValueError: no such folder, no image in it, or no class folders."""
    try:
        files = [file for file in storage.list_files(path) if _is_image(file.path)]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no folder at {path}") from None
    if not files:
        raise ValueError(f"no image files in {path} (looked for {', '.join(sorted(EXTENSIONS))})")
    parts = [file.path.split("/") for file in files]
    split_folders = _has_splits(path, parts, labels)
    columns = {
        "name": [_spell(file.path) for file in files],
        "split": [SPLITS[part[0]] if split_folders else None for part in parts],
        "size": [file.size for file in files],
        "tag": [file.tag for file in files],
        "label": [None] * len(files),
    }
    if labels == "none":
        return Listing.of(columns, (), "jpg")
    level = 1 if split_folders else 0  # the folder that names the class
    stray = next((file.path for file, part in zip(files, parts, strict=True) if len(part) < level + 2), None)
    if stray is not None:
        raise ValueError(f"{stray} in {path} lies in no class folder: give each class a folder of its own, "
                         "or pass --labels none to do without classes")  # fmt: skip
    classes = sorted({_spell(part[level]) for part in parts})
    number = {name: label for label, name in enumerate(classes)}
    columns["label"] = [number[_spell(part[level])] for part in parts]
    return Listing.of(columns, classes, "jpg")


def _has_splits(path: str, parts: list[list[str]], labels: str) -> bool:
    """Splits are meant when every image lies below a folder so named, and `train` is among them."""
    tops = {part[0] if len(part) > 1 else "" for part in parts}
    if "train" not in tops:
        return False
    others = sorted(tops - set(SPLITS))
    if others and labels == "auto" and len(tops & set(SPLITS)) > 1:
        strays = ", ".join(other or "images at its top" for other in others[:3])
        raise ValueError(f"{path} holds split folders beside others ({strays}): move those away, or into a split")
    return not others


def read_items(path: str, items: pa.Table) -> Iterator[Item]:
    """Each file's bytes, or why this one cannot be read (gone, forbidden). StorageError: the store fails."""
    names, sizes = items["name"].to_pylist(), items["size"].to_pylist()
    if storage.is_remote(path):
        yield from ((raw, {}) for raw in ahead(lambda i: read_file(path, names[i]), sizes, READERS))
        return
    for i, name in enumerate(names):  # the kernel reads ahead: handing files over between threads costs as much as them
        for soon in names[i + _SOON : i + _SOON + 1] if i else names[:_SOON]:
            storage.will_read(f"{path}/{soon}")
        yield read_file(path, name), {}


def read_file(path: str, name: str) -> bytes | OSError:
    """The file `name` below `path`; an error of this one file is returned, one of the whole store is raised."""
    try:
        return _read(path, name)
    except OSError as error:
        # Remote, EACCES means wrong credentials: no item can be read, and rejecting them all would hide it.
        if error.errno not in ((errno.ENOENT,) if storage.is_remote(path) else _OF_ONE_FILE):
            raise
        return error


def _read(path: str, name: str) -> bytes:
    try:
        return storage.read(storage.join(path, name))
    except FileNotFoundError:
        odd = _SPELLED.sub(lambda match: bytes([int(match[1], 16)]), os.fsencode(name))
        if odd == os.fsencode(name):
            raise
        return storage.read(storage.join(path, os.fsdecode(odd)))


def _is_image(path: str) -> bool:
    name = path.rpartition("/")[2]
    hidden = path.startswith(".") or "/." in path
    return not hidden and "." in name and name.rpartition(".")[2].lower() in EXTENSIONS


def _spell(path: str) -> str:
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")
