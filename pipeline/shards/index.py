"""What a dataset is: tar shards, one Parquet row a sample, and one JSON file written last.

    ROOT/train-000000.tar ...            the shards (`tar.py`)
    ROOT/index/000000.parquet            generation 0: one row a sample (SCHEMA), sorted by shard, then offset
    ROOT/index/000000-rejects.parquet    what could not become a sample, and why (REJECTS)
    ROOT/dataset.json                    counts, classes, shards with SHA-256, recipe, statistics

A folder without dataset.json is no dataset, whatever else lies in it: that is what makes a half-written one
invisible. Nothing here holds a time, a host or a path of the machine that built it. Appending adds a generation with
files of its own; readers concatenate the generations named in dataset.json, in that order.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage

VERSION = 1
DATASET = "dataset.json"
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "split": pa.string(),
        "shard": pa.string(),  # file name, train-000000.tar
        "offset": pa.int64(),  # of the image's bytes inside the shard
        "size": pa.int64(),
        "label": pa.int32(),  # null where there are no classes
        "width": pa.int32(),
        "height": pa.int32(),
        "channels": pa.int8(),
        "crc32": pa.uint32(),  # of the image's bytes as stored
        "source": pa.string(),
        "source_bytes": pa.int64(),
        "generation": pa.int32(),
    }
)
REJECTS = pa.schema({"source": pa.string(), "split": pa.string(), "reason": pa.string(), "detail": pa.string()})
ROW_GROUP = 1 << 17  # rows; fixed, because where a group ends is part of the file's bytes
_NUMBERS = ["offset", "size", "label", "width", "height", "channels", "crc32"]


@dataclass(frozen=True)
class Split:
    """One split's samples as columns; row i is sample i, shards in order and offsets rising inside each.

    shards: file names under root; counts: int64 (shards,), samples in each; shard: int32 (n,), positions in `shards`;
    offset, size: int64 (n,), the image's bytes in its shard; label: int32 (n,), -1 where there is none;
    width, height: int32 (n,); channels: int8 (n,); crc32: uint32 (n,) of the image's bytes.
    """

    root: str
    name: str
    shards: list[str]
    counts: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    width: np.ndarray
    height: np.ndarray
    channels: np.ndarray
    crc32: np.ndarray
    _rows: list[tuple[str, int, int]] = field(repr=False)  # where the rows lie: (index file, first row, end row)

    def __len__(self) -> int:
        return len(self.offset)

    @cached_property
    def keys(self) -> pa.ChunkedArray:
        """Key of each sample, string (n,); read when first asked for, since training needs none."""
        return self._text("key")

    @cached_property
    def source(self) -> pa.ChunkedArray:
        """Path of each sample relative to the root of its source, string (n,); read when first asked for."""
        return self._text("source")

    def _text(self, column: str) -> pa.ChunkedArray:
        pieces = [_read_columns(self.root, file, [column])[column][first:end] for file, first, end in self._rows]
        return pa.chunked_array([chunk for piece in pieces for chunk in piece.chunks], type=pa.string())


@dataclass(frozen=True)
class Dataset:
    """A finished dataset. info: what dataset.json holds; classes: names by label, empty where there are none."""

    root: str
    info: dict
    classes: tuple[str, ...]

    def split(self, name: str) -> Split:
        """The columns of one split. ValueError: no such split."""
        if name not in self.info["splits"]:
            raise ValueError(f"no split {name!r} in {self.root}: it has {', '.join(self.info['splits'])}")
        shards, counts, rows, parts = [], [], [], []
        for generation in self.info["generations"]:
            of_generation = [s for s in self.info["shards"] if s["generation"] == generation["generation"]]
            before = sum(s["samples"] for s in of_generation if s["split"] < name)
            mine = [s for s in of_generation if s["split"] == name]
            end = before + sum(s["samples"] for s in mine)
            shards += [s["name"] for s in mine]
            counts += [s["samples"] for s in mine]
            rows.append((generation["index"], before, end))
            columns = self._numbers[generation["index"]]
            parts.append({column: columns[column][before:end] for column in _NUMBERS})
        counts = np.asarray(counts, dtype=np.int64)
        joined = {c: parts[0][c] if len(parts) == 1 else np.concatenate([p[c] for p in parts]) for c in _NUMBERS}
        if len(joined["offset"]) != counts.sum():
            raise ValueError(f"{self.root}: the index has {len(joined['offset'])} rows of split {name!r}, "
                             f"{DATASET} says {counts.sum()}: build it again")  # fmt: skip
        shard = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        return Split(self.root, name, shards, counts, shard, **joined, _rows=rows)

    @cached_property
    def _numbers(self) -> dict[str, dict[str, np.ndarray]]:
        read = {}
        for generation in self.info["generations"]:
            table = _read_columns(self.root, generation["index"], _NUMBERS)
            table = table.set_column(table.column_names.index("label"), "label", table["label"].fill_null(-1))
            read[generation["index"]] = {column: table[column].to_numpy() for column in _NUMBERS}
        return read

    def rejects(self) -> pa.Table:
        """Everything that could not become a sample (REJECTS), sorted by source inside each generation."""
        names = REJECTS.names
        return pa.concat_tables(_read_columns(self.root, g["rejects"], names) for g in self.info["generations"])


def load(root: str) -> Dataset:
    """The dataset at `root`. ValueError: no dataset there, an unfinished one, or one of another version."""
    try:
        info = json.loads(storage.read(storage.join(root, DATASET)))
    except FileNotFoundError:
        raise ValueError(_why_no_dataset(root)) from None
    except ValueError as error:
        raise ValueError(f"{storage.join(root, DATASET)} is not JSON ({error}): build the dataset again") from None
    if not isinstance(info, dict) or info.get("version") != VERSION:
        found = info.get("version") if isinstance(info, dict) else None
        raise ValueError(f"{root} is a dataset of version {found!r}; this millstream reads {VERSION}: build it again")
    return Dataset(root, info, tuple(info["classes"]))


def _why_no_dataset(root: str) -> str:
    try:
        files = storage.list_files(root)
    except FileNotFoundError:
        files = []
    if not files:
        return f"no dataset at {root}: nothing is there. `millstream shard SOURCE {root}` makes one"
    if any(file.path.endswith(".tar") for file in files):
        return (
            f"{root} holds shards but no {DATASET}: its build was not finished. Run the same `millstream shard` again"
        )
    return f"{root} is not a dataset (it has no {DATASET}). `millstream shard SOURCE OUT` makes one"


def _read_columns(root: str, file: str, columns: list[str]) -> pa.Table:
    filesystem, path = storage.filesystem(storage.join(root, file))
    try:
        with filesystem.open(path, "rb") as opened:
            return pq.ParquetFile(opened, pre_buffer=True).read(columns)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise ValueError(f"{storage.join(root, file)} is missing or damaged ({error}): build it again") from None


@dataclass(frozen=True)
class ShardRecord:
    """What building one shard found out. samples may be 0: then there is no tar and the shard is left out.

    rows: SCHEMA, by offset; rejects: REJECTS; pixels: {channels: [pixel count, sums (channels), squared sums
    (channels)]} in exact whole numbers over the stored images' values 0..255.
    """

    name: str  # file name
    split: str
    bytes: int
    sha256: str
    rows: pa.Table
    rejects: pa.Table
    pixels: dict[int, list]


def commit(root: str, records: Iterable[ShardRecord], classes, form: str, recipe: dict, source: dict) -> dict:
    """Writes the index of generation 0, then dataset.json, and returns what that holds.

    records: every shard, sorted by name; read one at a time, so that millions of rows are never all in memory.
    form: jpg or png; recipe, source: plain JSON. ValueError: not one sample among them.
    """
    seen = _Summary(len(classes))
    index, rejected = "index/000000.parquet", "index/000000-rejects.parquet"
    with storage.writer(storage.join(root, index)) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as out:
        held = [SCHEMA.empty_table()]
        for record in records:
            seen.add(record)
            held.append(record.rows)
            if sum(map(len, held)) >= ROW_GROUP:
                held = _write_groups(out, pa.concat_tables(held))
        _write_groups(out, pa.concat_tables(held), last=True)
        if not seen.shards:
            raise ValueError(seen.why_empty())
    rejects = pa.concat_tables(seen.rejects).sort_by("source")
    with storage.writer(storage.join(root, rejected)) as file:
        pq.write_table(rejects, file, compression="zstd")
    generation = {"generation": 0, "index": index, "rejects": rejected, "samples": seen.samples, "source": source}
    info = {
        "version": VERSION,
        "classes": list(classes),
        "format": form,
        "samples": seen.samples,
        "splits": {name: seen.splits[name] for name in sorted(seen.splits)},
        "image_size": list(next(iter(seen.sizes))) if len(seen.sizes) == 1 else None,  # (width, height) of every image
        "channels": {str(n): count for n, count in sorted(seen.channels.items())},
        **seen.statistics(),
        "rejected": dict(sorted(seen.reasons.items())),
        "recipe": recipe,
        "generations": [generation],
        "shards": seen.shards,
    }
    storage.write(storage.join(root, DATASET), json.dumps(info, indent=1, ensure_ascii=True).encode() + b"\n")
    return info


def _write_groups(out: pq.ParquetWriter, rows: pa.Table, last: bool = False) -> list[pa.Table]:
    end = len(rows) if last else len(rows) // ROW_GROUP * ROW_GROUP
    if end:
        out.write_table(rows[:end].combine_chunks(), row_group_size=ROW_GROUP)
    return [rows[end:]]


class _Summary:
    """Counts over the shards, in whole numbers so that the order of adding cannot show."""

    def __init__(self, classes: int):
        self.classes = classes
        self.samples = 0
        self.splits, self.shards, self.rejects = {}, [], [REJECTS.empty_table()]
        self.sizes, self.channels, self.reasons, self.pixels = set(), Counter(), Counter(), {}

    def add(self, record: ShardRecord) -> None:
        self.rejects.append(record.rejects)
        self.reasons.update(record.rejects["reason"].to_pylist())
        samples = len(record.rows)
        if not samples:
            return
        self.samples += samples
        split = self.splits.setdefault(record.split, {"samples": 0, "shards": 0, "classes": [0] * self.classes})
        split["samples"] += samples
        split["shards"] += 1
        labels = np.bincount(record.rows["label"].drop_null().to_numpy(), minlength=self.classes)
        split["classes"] = [a + int(b) for a, b in zip(split["classes"], labels, strict=True)]
        self.shards.append({"name": record.name, "split": record.split, "generation": 0, "samples": samples,
                            "bytes": record.bytes, "sha256": record.sha256})  # fmt: skip
        if len(self.sizes) < 2:  # one more than one is already "not uniform"
            shape = np.stack([record.rows["width"].to_numpy(), record.rows["height"].to_numpy()], axis=1)
            self.sizes.update((int(w), int(h)) for w, h in np.unique(shape, axis=0)[:2])
        self.channels.update(record.rows["channels"].to_pylist())
        for channels, (count, sums, squares) in record.pixels.items() if record.split == "train" else ():
            total = self.pixels.setdefault(channels, [0, [0] * channels, [0] * channels])
            total[0] += count
            total[1] = [a + b for a, b in zip(total[1], sums, strict=True)]
            total[2] = [a + b for a, b in zip(total[2], squares, strict=True)]

    def statistics(self) -> dict:
        """Mean and standard deviation of each channel of `train`, 0..1; grey among colour counts as grey RGB."""
        channels = max(self.pixels, default=0)
        wide = [(n, s * (channels // c), q * (channels // c)) for c, (n, s, q) in self.pixels.items()]
        count = sum(n for n, _, _ in wide)
        if not count:
            return {"mean": None, "std": None}
        sums = [sum(s[c] for _, s, _ in wide) for c in range(channels)]
        squares = [sum(q[c] for _, _, q in wide) for c in range(channels)]
        mean = [s / (count * 255) for s in sums]
        variance = [(q * count - s * s) / (count * 255) ** 2 for s, q in zip(sums, squares, strict=True)]
        return {"mean": [round(m, 8) for m in mean], "std": [round(v**0.5, 8) for v in variance]}

    def why_empty(self) -> str:
        top = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common(5))
        first = pa.concat_tables(self.rejects)["source"].to_pylist()[:3]
        return f"no image of the source could be used ({top}); for example {', '.join(map(repr, first))}"


def digest(info: dict) -> str:
    """SHA-256 of plain JSON, the same for equal content whatever order its keys came in."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
