"""What a dataset is: tar shards, one Parquet row a sample, and one JSON file written last.

    ROOT/train-000000.tar ...            the shards (`tar.py`)
    ROOT/index/000000.parquet            generation 0: one row a sample (SCHEMA), sorted by shard, then offset
    ROOT/index/000000-rejects.parquet    what could not become a sample, and why (REJECTS)
    ROOT/index/000000-sources.parquet    what the source held, and what was read of it (SOURCES), sorted by name
    ROOT/dataset.json                    counts, classes, shards with SHA-256, recipe, statistics (`commit.py`)

A folder without dataset.json is no dataset, whatever else lies in it: that is what makes a half-written one
invisible. Nothing here holds a time, a host or a path of the machine that built it. Appending adds a generation with
files of its own; readers concatenate the generations named in dataset.json, in that order. Pruning replaces files by
ones of other names (000000.1.parquet), so that a reader never meets a file that changed under its name.
"""

import hashlib
import itertools
import json
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.shards import tar

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
        "format": pa.string(),  # of the image: jpg or png, its extension in the shard
        "width": pa.int32(),
        "height": pa.int32(),
        "channels": pa.int8(),
        "crc32": pa.uint32(),  # of the image's bytes as stored
        "json_size": pa.int32(),  # bytes of the .json member
        "beside": pa.string(),  # JSON {extension: size} of what the source held beside the image; null: nothing
        "passed": pa.bool_(),  # the source's own coded data was kept
        "animated": pa.bool_(),  # the first frame of several
        "source": pa.string(),
        "source_bytes": pa.int64(),
        "generation": pa.int32(),
    }
)
SOURCES = pa.schema(
    {
        "name": pa.string(),
        "label": pa.int32(),
        "size": pa.int64(),  # as listed
        "tag": pa.uint64(),  # a hash of the listing's tag: a dataset holds no times
        "hash": pa.binary(16),  # XXH3 of what was read; null: nothing was
        "near": pa.uint64(),  # perceptual hash, where --dedup near asked for it
    }
)
REJECTS = pa.schema({"source": pa.string(), "split": pa.string(), "reason": pa.string(), "detail": pa.string()})
FILES = {"index": SCHEMA, "rejects": REJECTS, "sources": SOURCES}  # of each generation
ROW_GROUP = 1 << 17  # rows; fixed, because where a group ends is part of the file's bytes
_MEMBERS = ["label", "format", "size", "json_size", "beside"]
_NUMBERS = ["offset", "size", "label", "width", "height", "channels", "crc32"]
_WASTE, _GAP = 3, 1 << 15  # what a read goes on over: times the image before, bytes; `Split.joined`


@dataclass(frozen=True)
class Split:
    """One split's samples as columns; row i is sample i, shards in order and offsets rising inside each.

    shards: file names under root; digests: SHA-256 of each, hex; shard_bytes: size of each; counts: int64 (shards,),
    samples in each, 0 for one of which none was taken; shard: int32 (n,), positions in `shards`;
    offset, size: int64 (n,), the image's bytes in its shard; label: int32 (n,), -1 where there is none;
    width, height: int32 (n,); channels: int8 (n,); crc32: uint32 (n,) of the image's bytes.
    picked: int64 (n,), where these rows are in all that the index files hold of the split; None: they are all of it.
    A mixture of datasets has no root: its shards, and the index files, are whole paths.
    """

    root: str
    name: str
    shards: list[str]
    digests: list[str]
    shard_bytes: list[int]
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
    picked: np.ndarray | None = field(default=None, repr=False)

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

    @property
    def generations(self) -> int:
        """How many generations of the dataset are here, those without a sample of the split too."""
        return len(self._rows)

    @property
    def generation(self) -> np.ndarray:
        """With which of them each sample came, 0 the first: int64 (n,)."""
        of_all = np.repeat(np.arange(len(self._rows)), [end - first for _, first, end in self._rows])
        return of_all if self.picked is None else of_all[self.picked]

    def path(self, name: str) -> str:
        """Where a file of the split is: one of `shards`, or of the index."""
        return storage.join(self.root, name) if self.root else name

    def take(self, rows: np.ndarray) -> "Split":
        """The split of some rows only, int64 rising. Shards keep their numbers. ValueError: not rising, no such row."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows[0] < 0 or rows[-1] >= len(self) or (np.diff(rows) <= 0).any()):
            raise ValueError(f"rows of {self.name} ({len(self)} samples) must rise, each once, from 0 on: sort them")
        columns = {column: getattr(self, column)[rows] for column in ["shard", *_NUMBERS]}
        counts = np.bincount(columns["shard"], minlength=len(self.shards))
        picked = rows if self.picked is None else self.picked[rows]
        return replace(self, counts=counts, picked=picked, **columns)

    def joined(self, rows: np.ndarray, then: np.ndarray) -> np.ndarray:
        """Whether one read goes on from each of `rows` to the row `then`, int64 (n,) both: bool (n,).

        It does in one shard, forward, over what nobody asked for as long as that is at most three times the image
        before it, or 32 KiB: so a read of k images takes at most four times their bytes and k * 32 KiB. Neighbours are
        always joined, whatever lies between them.
        """
        between = self.offset[then] - self.offset[rows] - self.size[rows]
        near = between <= np.maximum(_WASTE * self.size[rows], _GAP)
        steps = then - rows if self.picked is None else self.picked[then] - self.picked[rows]
        return (near | (steps == 1)) & (self.shard[rows] == self.shard[then]) & (rows < then)

    def _text(self, column: str) -> pa.ChunkedArray:
        pieces = []
        for file, first, end in self._rows:
            folder, _, name = self.path(file).rpartition("/")
            pieces.append(read_columns(folder, name, [column])[column][first:end])
        whole = pa.chunked_array([chunk for piece in pieces for chunk in piece.chunks], type=pa.string())
        return whole if self.picked is None else whole.take(pa.array(self.picked))


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
        shards, digests, sizes, counts, rows, parts = [], [], [], [], [], []
        for generation in self.info["generations"]:
            of_generation = [s for s in self.info["shards"] if s["generation"] == generation["generation"]]
            before = sum(s["samples"] for s in of_generation if s["split"] < name)
            mine = [s for s in of_generation if s["split"] == name]
            end = before + sum(s["samples"] for s in mine)
            shards += [s["name"] for s in mine]
            digests += [s["sha256"] for s in mine]
            sizes += [s["bytes"] for s in mine]
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
        return Split(self.root, name, shards, digests, sizes, counts, shard, **joined, _rows=rows)

    @cached_property
    def _numbers(self) -> dict[str, dict[str, np.ndarray]]:
        read = {}
        for generation in self.info["generations"]:
            table = read_columns(self.root, generation["index"], _NUMBERS)
            table = table.set_column(table.column_names.index("label"), "label", table["label"].fill_null(-1))
            read[generation["index"]] = {column: table[column].to_numpy() for column in _NUMBERS}
        return read

    def rejects(self) -> pa.Table:
        """Everything that could not become a sample (REJECTS), sorted by source inside each generation."""
        return self._all("rejects", REJECTS)

    def sources(self) -> pa.Table:
        """What the source held when each generation was made (SOURCES), sorted by name inside each."""
        return self._all("sources", SOURCES)

    def rows(self, columns: list[str] | None = None) -> pa.Table:
        """The index (SCHEMA), or some columns of it: the generations one after the other."""
        return self._all("index", SCHEMA, columns)

    def shard_rows(self, shard: str, columns: list[str]) -> pa.Table:
        """Some columns of the index for the samples of one shard, in their order."""
        first, end = self._places[shard]
        key = tuple(columns)
        if key not in self._held:
            self._held[key] = self.rows(columns)
        return self._held[key][first:end]

    def layout(self, shard: str) -> list[dict[str, tuple[int, int]]]:
        """Where the members of each sample of a shard lie, {extension: (offset, size)}, without reading it."""
        columns = (column.to_pylist() for column in self.shard_rows(shard, _MEMBERS).columns)
        sizes = []
        for label, form, size, json_size, beside in zip(*columns, strict=True):
            members = {form: size, "json": json_size} | ({} if label is None else {"cls": len(str(label))})
            sizes.append(members | (json.loads(beside) if beside else {}))
        return tar.laid_out(sizes)

    @cached_property
    def _held(self) -> dict[tuple[str, ...], pa.Table]:
        return {}

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """{shard: its first row of the index and the one after its last}."""
        ends = np.cumsum([0, *(shard["samples"] for shard in self.info["shards"])]).tolist()
        return {shard["name"]: span for shard, span in zip(self.info["shards"], itertools.pairwise(ends), strict=True)}

    def _all(self, kind: str, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
        names = columns or schema.names
        return pa.concat_tables(read_columns(self.root, g[kind], names) for g in self.info["generations"])


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


def read_columns(root: str, file: str, columns: list[str]) -> pa.Table:
    filesystem, path = storage.filesystem(storage.join(root, file))
    try:
        with filesystem.open(path, "rb") as opened:
            return pq.ParquetFile(opened, pre_buffer=True).read(columns)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise ValueError(f"{storage.join(root, file)} is missing or damaged ({error}): build it again") from None


def digest(info: dict | list) -> str:
    """SHA-256 of plain JSON, the same for equal content whatever order its keys came in."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
