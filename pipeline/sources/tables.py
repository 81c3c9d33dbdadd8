"""`table:PATH`: images that a table names or holds. PATH is a .parquet, .csv or .jsonl file, or a folder of one kind.

    table:PATH?image=photo&label=species&split=fold&name=id       columns that are not called as one would guess

The image column holds paths (relative to the table's folder, absolute, or s3://), or the images themselves: bytes, or
Hugging Face's {bytes, path}. Labels are whole numbers, called as the Parquet schema of Hugging Face says or else "0",
"1", ..., or texts: the classes are then these, sorted. No label, or one below 0, is none. The split is in the column
`split`, or else in the file's name, train-00000-of-00005.parquet (`split=` for neither).

An item is named by its path, or FILE/00000012 by its row: a row keeps its name while files are added, which the paths
in {bytes, path} do not promise (often they are empty, or the same in two files). `name=` says which column is unique.
Rows without a path or bytes are items too, and cannot be read: they show among the rejects.
"""

import errno
import posixpath
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.sources import listing, table_columns, table_files
from pipeline.sources.folder import read_file
from pipeline.sources.listing import LOCAL_READERS, READERS, SPLITS, Item, Listing, ahead
from pipeline.sources.table_columns import Columns

_GROUPS_AHEAD = 2  # row groups decoded at once


def list_items(path: str, labels: str) -> Listing:
    """Every row of every table. Images are not read, and of Parquet no other column than those needed.

    ValueError: no tables, damaged ones, no column that fits, an image that is named twice, an http:// address.
    """
    path, asked = table_columns.parse(path)
    root, tables = _root(path), _find(path)
    columns = table_columns.choose(storage.join(root, tables[0].path), asked, labels)
    needed = (None if columns.stored else columns.image, columns.label, columns.split, columns.name)
    wanted = [column for column in dict.fromkeys(needed) if column]
    read = lambda i: table_files.read(storage.join(root, tables[i].path), wanted)  # noqa: E731
    threads = READERS if storage.is_remote(root) else LOCAL_READERS
    parts = list(ahead(read, [0] * len(tables), threads))
    counts = [sum(groups) for _, groups in parts]
    if not sum(counts):
        raise ValueError(f"the tables in {path} have no rows")
    made = _stored(root, tables, parts, columns) if columns.stored else _named(root, tables, parts, columns)
    made["split"] = pa.chunked_array(
        [_splits(file.path, part, columns, count)
         for file, (part, _), count in zip(tables, parts, counts, strict=True)], pa.string())  # fmt: skip
    if not columns.label:
        return Listing.of(made, (), "jpg")
    found = [_column(part, columns.label) for part, _ in parts]
    numbers, classes = table_columns.labelled(found, columns, storage.join(root, tables[0].path))
    return Listing.of(made | {"label": numbers}, classes, "jpg")


def _root(path: str) -> str:
    """The folder that names are relative to; path: without the columns asked for."""
    if not path.endswith(table_files.KINDS):
        return path
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def _find(path: str) -> list[storage.File]:
    """The tables at `path`, relative to its root."""
    if path.endswith(table_files.KINDS):
        try:
            return [listing.file_at(path)]
        except FileNotFoundError:
            raise ValueError(f"no table at {path}") from None
    try:
        files = [f for f in storage.list_files(path) if not f.path.startswith(".") and "/." not in f.path]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no folder at {path}, and no table: {', '.join(table_files.KINDS)}") from None
    tables = {kind: [file for file in files if file.path.endswith(kind)] for kind in table_files.KINDS}
    kinds = [kind for kind in tables if tables[kind]]
    if len(kinds) != 1:
        have = f"tables of several kinds ({', '.join(kinds)}): name one file" if kinds else "no tables"
        raise ValueError(f"{path} holds {have} (looked for {', '.join(table_files.KINDS)})")
    return tables[kinds[0]]


def _column(part: pa.Table, name: str) -> pa.ChunkedArray:
    """A column, or `a.b`, the field b of the struct a."""
    if name in part.column_names:
        return part[name]
    outer, _, field = name.partition(".")
    return pc.struct_field(part[outer], field.split("."))


def _splits(file: str, part: pa.Table, columns: Columns, rows: int) -> pa.Array:
    if columns.split:
        texts = _column(part, columns.split).cast(pa.string()).to_pylist()
        return pa.array([SPLITS.get(text, text) if text else None for text in texts], pa.string())
    return pa.repeat(pa.scalar(listing.split_of(file), pa.string()), rows)


def _stored(root: str, tables: list[storage.File], parts: list, columns: Columns) -> dict:
    """ITEMS' columns for tables that hold the images; `block` counts their row groups."""
    names, tags, groups = [], [], []
    for file, (part, of_file) in zip(tables, parts, strict=True):
        rows = sum(of_file)
        names.append(_column(part, columns.name).cast(pa.string()).combine_chunks() if columns.name else
                     pa.array([f"{file.path}/{row:08d}" for row in range(rows)], pa.string()))  # fmt: skip
        tags.append(pa.repeat(pa.scalar(file.tag), rows))
        groups += of_file
    names = pa.chunked_array(names, pa.string())
    _require_unique(names, columns.name, root)
    counts = [sum(of_file) for _, of_file in parts]
    return {
        "name": names,
        "size": np.zeros(len(names), np.int64),
        "tag": pa.chunked_array(tags, pa.string()),
        "file": listing.files_column([file.path for file in tables], counts),
        "offset": np.concatenate([np.arange(count) for count in counts]),
        "block": np.repeat(np.arange(len(groups), dtype=np.int32), groups),
    }


def _named(root: str, tables: list[storage.File], parts: list, columns: Columns) -> dict:
    """ITEMS' columns for tables of paths; size and tag are known of files below `root`, which is listed for them."""
    names, files, offsets, local = [], [], [], root.rstrip("/") + "/"
    for file, (part, _) in zip(tables, parts, strict=True):
        folder = file.path.rpartition("/")[0]
        for row, path in enumerate(_column(part, columns.image).cast(pa.string()).to_pylist()):
            names.append(_place(path, folder, local) if path else f"{file.path}/{row:08d}")
            files.append(None if path else file.path)
            offsets.append(None if path else row)
    below = any(offset is None and not _elsewhere(name) for name, offset in zip(names, offsets, strict=True))
    known = {file.path: file for file in storage.list_files(root)} if below else {}
    nothing = storage.File("", 0, "")
    column = pa.chunked_array([pa.array(names, pa.string())])
    _require_unique(column, columns.image, root)
    return {
        "name": column,
        "size": [known.get(name, nothing).size for name in names],
        "tag": [known.get(name, nothing).tag for name in names],
        "file": pa.array(files, pa.string()).dictionary_encode(),
        "offset": offsets,
    }


def _place(path: str, folder: str, root: str) -> str:
    """A path of a table in `folder` (below the root), as an item's name: relative to the root if it lies below it."""
    if path.startswith(("http://", "https://")):
        raise ValueError(f"{path} is on the web: download the images first (img2dataset does), then name the files")
    path = path.removeprefix("file://")
    if path.startswith(root):
        path, folder = path[len(root) :], ""
    if _elsewhere(path):
        storage.is_remote(path)  # refuses a store there is no client for
        return path
    path = f"{folder}/{path}" if folder else path
    return posixpath.normpath(path) if "./" in path or "//" in path else path


def _elsewhere(name: str) -> bool:
    return name.startswith("/") or "://" in name


def _require_unique(names: pa.ChunkedArray, column: str | None, root: str) -> None:
    if names.null_count:
        raise ValueError(f"column {column} of the tables in {root} is empty in {names.null_count} rows, but names them")
    if pc.count_distinct(names).as_py() < len(names):
        counted = names.value_counts()
        twice = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")[0].as_py()
        raise ValueError(f"{twice!r} stands in column {column} of the tables in {root} more than once: an image is one "
                         "sample with one label, so leave one row of each")  # fmt: skip


# ---- reading


def read_items(path: str, items: pa.Table) -> Iterator[Item]:
    """Each row's image, or why it cannot be read: no file, nothing in the row, a path that leads out of the folder.

    Each row group is gone through once, and of it the rows wanted are kept: those of all items, in the worst order.
    """
    path, asked = table_columns.parse(path)
    root = _root(path)
    names, files, rows = (items[c].to_pylist() for c in ("name", "file", "offset"))
    if items["block"].null_count < len(items):
        column = table_columns.choose(storage.join(root, files[0]), asked, "none").image
        return ((raw, {}) for raw in _read_stored(root, column, files, rows))

    def read(i: int) -> Item:
        return (_nothing(names[i]) if files[i] else _read_file(root, names[i])), {}

    remote = storage.is_remote(root) or any("://" in name for name in names)
    return ahead(read, items["size"].to_pylist(), READERS if remote else LOCAL_READERS)


def _nothing(name: str) -> OSError:
    return FileNotFoundError(errno.ENOENT, "the row holds neither a path nor an image", name)


def _read_file(root: str, name: str) -> bytes | OSError:
    if name.startswith("/"):
        root, name = "/", name[1:]
    elif "://" in name:
        scheme, _, inside = name.partition("://")
        bucket, _, name = inside.partition("/")
        root = f"{scheme}://{bucket}"
    try:
        return read_file(root, name)
    except ValueError as error:  # "..", a NUL, no bucket: whoever wrote the table, it is one row's fault
        return OSError(errno.EINVAL, f"no path to read: {error}", name)


def _read_stored(root: str, column: str, files: list[str], rows: list[int]) -> Iterator[bytes | OSError]:
    groups = _groups(root, column, files, rows)

    def read(i: int) -> list[tuple[int, bytes | OSError]]:
        file, group, _, wanted = groups[i]
        where = storage.join(root, file)
        found = table_files.values(where, column, group, [row for row, _ in wanted])
        return [(position, _image(where, value)) for (_, position), value in zip(wanted, found, strict=True)]

    ready: dict[int, bytes | OSError] = {}
    following = 0
    for found in ahead(read, [size for _, _, size, _ in groups], _GROUPS_AHEAD):
        ready.update(found)
        while following in ready:
            yield ready.pop(following)
            following += 1


def _groups(root: str, column: str, files: list[str], rows: list[int]) -> list[tuple[str, int, int, list]]:
    """(file, row group, bytes to keep of it, [(row in the group, position)] rising) of the row groups that are needed,
    in the order of the first position each is needed for."""
    footers = {file: table_files.row_groups(storage.join(root, file), column) for file in dict.fromkeys(files)}
    needed: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for position, (file, row) in enumerate(zip(files, rows, strict=True)):
        starts = footers[file][0]
        group = int(np.searchsorted(starts, row, "right")) - 1
        needed.setdefault((file, group), []).append((row - starts[group], position))
    groups = []
    for (file, group), wanted in needed.items():
        starts, sizes = footers[file]
        share = len(wanted) / (starts[group + 1] - starts[group])
        groups.append((file, group, int(sizes[group] * share), sorted(wanted)))
    return groups


def _image(path: str, value: bytes | dict | None) -> bytes | OSError:
    """What a row holds; of {bytes, path} without bytes, the file at that path."""
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            return _read_file(path.rpartition("/")[0], value["path"])
        value = value["bytes"]
    return _nothing(path) if value is None else value
