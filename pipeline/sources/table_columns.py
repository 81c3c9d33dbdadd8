"""Which column of a table is what, and the labels it holds."""

import difflib
import json
import urllib.parse
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.sources import listing, table_files

GUESSES = {
    "image": ("image", "img", "jpg", "jpeg", "png", "image_bytes", "bytes", "image_path", "img_path", "path",
              "file_path", "filepath", "file_name", "filename", "file", "uri", "url", "image_url"),
    "label": ("label", "labels", "class", "cls", "target", "category", "label_name", "class_name"),
    "split": ("split",),
    "name": (),
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Which column is what, None where there is none; stored: whether `image` holds bytes rather than paths; classes:
    names of number labels, as Hugging Face's schema has them."""

    image: str
    stored: bool
    label: str | None
    split: str | None
    name: str | None
    classes: tuple[str, ...]


def parse(path: str) -> tuple[str, dict[str, str]]:
    """PATH?image=COL&... in its parts; a "?" with no "=" behind it is part of a name. ValueError: no such key."""
    base, mark, query = path.rpartition("?")
    if not mark or "=" not in query:
        return path, {}
    wanted = {}
    for pair in query.split("&"):
        key, _, column = pair.partition("=")
        if key not in GUESSES or key in wanted:
            near = difflib.get_close_matches(key, GUESSES, n=1, cutoff=0)[0]
            hint = "it is given twice" if key in wanted else f"did you mean {near}=?"
            raise ValueError(f"{key}= in {path}: {hint} There are {', '.join(f'{k}=COLUMN' for k in GUESSES)}")
        wanted[key] = urllib.parse.unquote(column)
    return base, wanted


def choose(path: str, asked: dict[str, str], labels: str) -> Columns:
    """The columns of the table at `path`: those asked for, or those whose names say what they are. ValueError."""
    schema = table_files.schema(path)
    fields = {field.name: field.type for field in schema}
    for key, column in asked.items():
        inside = column.partition(".")[0] in fields and key != "image"
        if column not in fields and not inside and (column or key != "split"):
            near = difflib.get_close_matches(column, fields, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}={column}: {path} has no such column, only {', '.join(fields)}.{hint}")
    found = {key: asked.get(key) or (_guess(key, fields) if key not in asked else None) for key in GUESSES}
    if found["image"] is None or (kind := _kind(fields[found["image"]])) is None:
        what = "no column of paths or image bytes" if found["image"] is None else f"{found['image']} holds neither"
        raise ValueError(f"{path}: {what}: its columns are {', '.join(fields)}; say which with ?image=COLUMN")
    if found["label"] is None and labels == "auto":
        raise ValueError(f"{path} has no label column among {', '.join(fields)}: say which with ?label=COLUMN, or pass "
                         "--labels none to do without classes")  # fmt: skip
    if found["name"] and kind == "paths":
        raise ValueError(f"name={found['name']}: an item of {path} is named by its path in {found['image']}")
    label = found["label"] if labels == "auto" else None
    return Columns(
        found["image"], kind == "bytes", label, found["split"], found["name"], _declared_classes(schema, label)
    )


def _guess(key: str, fields: dict[str, pa.DataType]) -> str | None:
    spelled = {name.lower(): name for name in reversed(fields)}
    names = [spelled[guess] for guess in GUESSES[key] if guess in spelled]
    if key != "image":
        return names[0] if names else None
    holders = [name for name in fields if _kind(fields[name]) == "bytes"]
    return next((name for name in names if _kind(fields[name])), holders[0] if len(holders) == 1 else None)


def _kind(type_: pa.DataType) -> str | None:
    """Whether such a column holds "paths" or "bytes", if either."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_struct(type_):
        type_ = type_.field("bytes").type if type_.get_field_index("bytes") >= 0 else type_
    elif pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "paths"
    return "bytes" if pa.types.is_binary(type_) or pa.types.is_large_binary(type_) else None


def _declared_classes(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """The names of Hugging Face's ClassLabel, which it keeps in the Parquet schema."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        return tuple(feature["names"]) if feature["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError):
        return ()


def labelled(parts: list[pa.ChunkedArray], columns: Columns, path: str) -> tuple[pa.ChunkedArray, tuple[str, ...]]:
    """(labels as int32, null where there is none; class names)."""
    where = f"column {columns.label} of {path}"
    try:
        types = {part.type for part in parts if not pa.types.is_null(part.type)}
        text = any(_kind(type_) == "paths" for type_ in types)
        column = pa.chunked_array([c for p in parts for c in p.cast(pa.string() if text else pa.int64()).chunks])
    except pa.ArrowException as error:
        raise ValueError(f"{where} holds {', '.join(map(str, types))}, not whole numbers or texts: {error}") from None
    if text:
        column = pc.if_else(pc.equal(column, ""), None, column)
        # All that a CSV file holds is text; pandas writes 3.0 where a column has gaps.
        if path.endswith(".csv") and pc.all(pc.match_substring_regex(column, r"^-?\d{1,9}(\.0*)?$")).as_py():
            column, text = column.cast(pa.float64()).cast(pa.int64()), False
    if not text:
        column = pc.if_else(pc.less(column, 0), None, column)
    if column.null_count == len(column):
        raise ValueError(f"{where} holds no label at all: pass --labels none to do without classes")
    if text:
        classes = tuple(sorted(column.unique().drop_null().to_pylist()))
        return pc.index_in(column, value_set=pa.array(classes)), classes
    classes = listing.numbered_classes(pc.max(column).as_py(), columns.classes, f"the schema of {path}")
    return column.cast(pa.int32()), classes
