"""What every source answers with: its items as columns, so that fourteen million of them fit in memory."""

import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pipeline import storage

ITEMS = pa.schema(
    {
        "name": pa.string(),  # path relative to the source's root, "/" between segments: who the sample is
        "label": pa.int32(),  # null where there are no classes, or none is known of this item
        "split": pa.string(),  # null where the source names none
        "size": pa.int64(),  # bytes, 0 if unknown
        "tag": pa.string(),  # changes when the content does: modification time, ETag
        # Where the bytes are, for sources whose items are not files of their own; all null otherwise.
        "file": pa.dictionary(pa.int32(), pa.string()),  # relative to the source's root
        "offset": pa.int64(),  # in `file`: the first byte, or the row of a table
        "block": pa.int32(),  # items of one block are read together (a row group): a shard takes whole ones' worth
        "members": pa.string(),  # JSON {extension: [offset, size]} of what lies beside the image in `file`
    }
)
Raw = bytes | np.ndarray | OSError  # an image file; pixels, uint8 (h, w, c); why this one cannot be read
Item = tuple[Raw, dict[str, bytes]]  # and what lies beside it, by extension (captions, masks)
T = TypeVar("T")
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}  # as folders and files are called
READERS, LOCAL_READERS = 16, 2  # threads: a store is far away, a disk needs one read under way while one is used
_SPLIT = re.compile(r"(?:^|/)(train|val|validation|test)(?=[-_./])")
_BUDGET = 64 << 20  # bytes read ahead of the reader, at most
_MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Listing:
    """items: ITEMS, sorted by name; classes: names by label, empty where there are none; format: the output format
    that suits this source, jpg or png."""

    items: pa.Table
    classes: tuple[str, ...]
    format: str

    @classmethod
    def of(cls, columns: dict, classes, form: str) -> "Listing":
        """columns: lists or arrow arrays by ITEMS' names, of equal length; what is missing is null."""
        count = len(columns["name"])
        filled = {f.name: columns.get(f.name, pa.nulls(count, f.type)) for f in ITEMS}
        return cls(pa.table(filled, schema=ITEMS).sort_by("name"), tuple(classes), form)


def split_of(file: str) -> str | None:
    """The split that a file's path names: `train-000000.tar`, `validation-00000-of-00005.parquet`, `test/a.tar`."""
    found = _SPLIT.search(file)
    return SPLITS[found[1]] if found else None


def numbered_classes(highest: int, names: list[str] | tuple[str, ...], where: str) -> tuple[str, ...]:
    """Class names for labels 0 to `highest` as `where` names them; "0", "1", ... if it names none. ValueError."""
    if names and len(names) <= highest:
        raise ValueError(f"{where} names {len(names)} classes, but labels go up to {highest}")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where} names the class {twice!r} twice: each label needs a name of its own")
    if highest >= _MOST_CLASSES:
        raise ValueError(f"labels go up to {highest}: classes are numbered from 0, at most {_MOST_CLASSES} of them")
    return tuple(names) or tuple(str(label) for label in range(highest + 1))


def files_column(files: list[str], counts: list[int]) -> pa.DictionaryArray:
    """ITEMS' column `file` for the items of one file after those of the other. counts: items in each."""
    codes = np.repeat(np.arange(len(files), dtype=np.int32), counts)
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(files, pa.string()))


def text_lines(path: str) -> list[str]:
    """The lines of a text file. ValueError: not UTF-8."""
    try:
        return storage.read(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def file_at(path: str) -> storage.File:
    """Size and tag of one file, the tag as `list_files` has it. FileNotFoundError: nothing there, or a folder."""
    filesystem, inside = storage.filesystem(path)
    info = filesystem.info(inside)
    if info["type"] != "file":
        raise FileNotFoundError(path)
    tag = info.get("ETag") or info.get("etag") or str(os.stat(path).st_mtime_ns)
    return storage.File(storage.name(path), info["size"], tag)


def ahead(read: Callable[[int], T], sizes: list[int], threads: int) -> Iterator[T]:
    """read(0), read(1), ... in order, several at once: what a store answers late is asked for early.

    sizes: bytes of each, which bound what is held (64 MiB besides the one that is next).
    """
    pending: deque = deque()
    held = following = 0
    pool = ThreadPoolExecutor(threads)
    try:
        while pending or following < len(sizes):
            while following < len(sizes) and len(pending) < 4 * threads:
                if pending and held + sizes[following] > _BUDGET:
                    break
                pending.append((sizes[following], pool.submit(read, following)))
                held += sizes[following]
                following += 1
            size, future = pending.popleft()
            held -= size
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
