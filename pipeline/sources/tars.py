"""`tars:PATH`: webdataset tars, local or s3://. PATH is a folder of them, one .tar, or `x-{000000..000009}.tar`.

A sample is what shares a name up to the first dot of its last segment (https://github.com/webdataset/webdataset):

    a/0001.jpg  a/0001.cls  a/0001.txt      key a/0001; the image .jpg, the label .cls, .txt carried along

The image is the member whose whole extension is an image's (`jpg` before `seg.png`). The label is the number in .cls,
else a whole number `label` or `cls` in .json; below 0 means none. Classes are named by `dataset.json`, where the folder
is a dataset of ours (then only the shards it names are read), or by `classes.txt`, one a line; else "0", "1", ...
train-, val-, validation- and test- before a tar's name, or folders so called, are splits.

An item is named TAR/KEY. A sample without an image is an item too, and cannot be read: it shows among the rejects.
"""

import errno
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
from braceexpand import UnbalancedBracesError, braceexpand

from pipeline import storage
from pipeline.sources import archive, listing
from pipeline.sources.listing import LOCAL_READERS, READERS, Item, Listing, ahead

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm")  # the first there is
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$")
_SLACK = 256 << 10  # bytes between members that are fetched along with them rather than asked around


class Index(NamedTuple):
    """Columns of ITEMS for the samples of one tar; `keys` without the tar's name, -1 where there is no label."""

    keys: list[str]
    labels: list[int]
    sizes: list[int]
    offsets: list[int | None]
    members: list[str]


def list_items(path: str, labels: str) -> Listing:
    """Every sample of every tar, by one pass over the tars' headers (and .cls, or .json where there is none).

    ValueError: no tars, a damaged or compressed one (named), a member that is there twice, no image or no label at all.
    """
    root, tars = _find(path)
    threads = READERS if storage.is_remote(root) else LOCAL_READERS
    columns, highest = {name: [] for name in ("name", "label", "split", "size", "tag", "offset", "members")}, -1
    counts, images, types = [], 0, {field.name: field.type for field in listing.ITEMS} | {"label": pa.int64()}
    for file, index in zip(tars, ahead(lambda i: _index(root, tars[i], labels), [0] * len(tars), threads), strict=True):
        counts.append(len(index.keys))
        images += len(index.keys) - index.offsets.count(None)
        highest = max([highest, *index.labels])
        lists = {
            "name": [f"{file.path}/{key}" for key in index.keys],
            "label": [label if label >= 0 else None for label in index.labels],
            "split": [listing.split_of(file.path)] * len(index.keys),
            "size": index.sizes,
            "tag": [file.tag] * len(index.keys),
            "offset": index.offsets,
            "members": index.members,
        }
        for name, values in lists.items():
            columns[name].append(pa.array(values, types[name]))  # a Python list takes ten times more
    if not images:
        raise ValueError(f"no images in the tars of {path} (looked for {', '.join(IMAGES)})")
    if labels == "auto" and highest < 0:
        raise ValueError(f"no labels in the tars of {path}: give samples a .cls that holds a number, or a number "
                         "`label` in their .json, or pass --labels none to do without classes")  # fmt: skip
    classes = () if labels == "none" else listing.numbered_classes(highest, *_class_names(root))
    joined = {name: pa.chunked_array(chunks, types[name]) for name, chunks in columns.items()}
    joined["label"] = joined["label"].cast(pa.int32())  # only now: a number that is no label may be of any size
    joined["file"] = listing.files_column([file.path for file in tars], counts)
    return Listing.of(joined, classes, "jpg")


def _find(path: str) -> tuple[str, list[storage.File]]:
    """(the root that names are relative to, its tars)."""
    if _COMPRESSED.search(path):
        raise ValueError(f"{path} is compressed: only plain .tar files are read by offset, so decompress it first")
    root = _root(path)
    if root == path:
        return root, _in_folder(root)
    try:
        names = list(dict.fromkeys(braceexpand(path[len(root) :].lstrip("/") if root != "." else path)))
    except UnbalancedBracesError as error:
        raise ValueError(f"{path}: {error}") from None
    files = ahead(lambda i: _file(root, names[i]), [0] * len(names), READERS)
    return root, [file._replace(path=name) for name, file in zip(names, files, strict=True)]


def _root(path: str) -> str:
    if "{" not in path and not path.endswith(".tar"):
        return path
    return path.partition("{")[0].rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def _file(root: str, name: str) -> storage.File:
    try:
        return listing.file_at(storage.join(root, name))
    except FileNotFoundError:
        raise ValueError(f"no tar at {storage.join(root, name)}") from None


def _in_folder(root: str) -> list[storage.File]:
    try:
        files = {f.path: f for f in storage.list_files(root) if not f.path.startswith(".") and "/." not in f.path}
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no folder at {root}") from None
    ours = _dataset(root) if "dataset.json" in files else None
    if ours:
        names = [shard["name"] for shard in ours["shards"]]
        if missing := [name for name in names if name not in files]:
            raise ValueError(f"{root}/dataset.json names {missing[0]}, which is not there")
        return [files[name] for name in names]
    if squeezed := [name for name in files if _COMPRESSED.search(name)]:
        raise ValueError(f"{storage.join(root, squeezed[0])} is compressed: only plain .tar files are read by offset, "
                         "so decompress it first")  # fmt: skip
    if not (tars := [file for name, file in files.items() if name.endswith(".tar")]):
        raise ValueError(f"no .tar files in {root}")
    return tars


def _dataset(root: str) -> dict | None:
    """What dataset.json holds, if it is one of ours."""
    try:
        info = json.loads(storage.read(storage.join(root, "dataset.json")))
        return info if {"classes", "shards", "generations"} <= info.keys() else None
    except (ValueError, AttributeError):
        return None


def _class_names(root: str) -> tuple[list[str], str]:
    """(names by label, the file that holds them); no names if none does."""
    for file, read in (("dataset.json", lambda _: (_dataset(root) or {}).get("classes", [])),
                       ("classes.txt", listing.text_lines)):  # fmt: skip
        where = storage.join(root, file)
        if storage.exists(where) and (names := read(where)):
            return names, where
    return [], root


def _index(root: str, file: storage.File, labels: str) -> Index:
    path, wanted = storage.join(root, file.path), (lambda name: name.endswith((".cls", ".json")))
    if not file.size:
        raise ValueError(f"{path} is empty: not even the end of a tar is there")
    samples: dict[str, dict[str, archive.Member]] = {}
    for member in archive.scan(path, 0, file.size, wanted if labels == "auto" else None):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or "/__" in f"/{member.name}":  # hidden, without an extension, or webdataset's own
            continue
        members = samples.setdefault(folder + slash + stem, {})
        if members.setdefault(extension.lower(), member) is not member:
            raise ValueError(f"{path} holds {member.name} twice: a sample's members have names of their own")
    return Index(*map(list, zip(*(_row(*sample) for sample in samples.items()), strict=True))) if samples else _NONE


_NONE = Index([], [], [], [], [])


def _row(key: str, members: dict[str, archive.Member]) -> tuple[str, int, int, int | None, str]:
    label, image = _label(members), _image(members)
    beside = {x: [m.offset, m.size] for x, m in members.items() if x not in (image, "cls")}
    size, offset = (members[image].size, members[image].offset) if image else (0, None)
    return key, label, size, offset, json.dumps(beside, separators=(",", ":"))


def _image(members: dict) -> str | None:
    """The extension of the image: a whole one first, else the only one that ends so."""
    for extension in IMAGES:
        if extension in members:
            return extension
    named = [extension for extension in members if extension.rpartition(".")[2] in IMAGES]
    return named[0] if len(named) == 1 else None


def _label(members: dict[str, archive.Member]) -> int:
    try:
        if "cls" in members:
            return int(members["cls"].data or b"-1")
        if "json" in members and members["json"].data:
            facts = json.loads(members["json"].data)
            found = facts.get("label", facts.get("cls")) if isinstance(facts, dict) else None
            return found if type(found) is int else -1
    except ValueError:  # a caption, a class name: no number
        pass
    return -1


def read_items(path: str, items: pa.Table) -> Iterator[Item]:
    """The image's bytes and what lies beside it, mostly by one ranged read; FileNotFoundError for one without image."""
    root = _root(path)
    names, files, offsets, sizes = (items[c].to_pylist() for c in ("name", "file", "offset", "size"))
    members = [json.loads(text) for text in items["members"].to_pylist()]

    def read(i: int) -> Item:
        if offsets[i] is None:
            what = f"no image among its members ({', '.join(sorted(members[i])) or 'cls'})"
            return FileNotFoundError(errno.ENOENT, what, names[i]), {}
        spans = {"": [offsets[i], sizes[i]], **members[i]}
        data = _spans(storage.join(root, files[i]), spans)
        return data.pop(""), data

    totals = [size + sum(span[1] for span in beside.values()) for size, beside in zip(sizes, members, strict=True)]
    return ahead(read, totals, READERS if storage.is_remote(root) else LOCAL_READERS)


def _spans(path: str, spans: dict[str, list[int]]) -> dict[str, bytes]:
    """{name: bytes} of {name: [offset, size]}: together where they lie together, as they do in a tar for webdataset."""
    start, end = min(a for a, _ in spans.values()), max(a + size for a, size in spans.values())
    if end - start > sum(size for _, size in spans.values()) + _SLACK:
        return {name: storage.read_range(path, a, a + size) for name, (a, size) in spans.items()}
    whole = storage.read_range(path, start, end)
    return {name: whole[a - start : a - start + size] for name, (a, size) in spans.items()}
