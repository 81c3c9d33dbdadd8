"""Finished shards -> the index of a generation, and dataset.json, which makes them visible.

Everything dataset.json says is summed up from index rows and shard entries, those of earlier generations too, in whole
numbers: who built what in which order cannot show.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.shards.index import DATASET, REJECTS, ROW_GROUP, SCHEMA, VERSION, read_columns

SIDES = (1, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 2048, 4096, 65_536)
ASPECTS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.03, 1.1, 1.25, 1.4, 1.6, 2.0, 2.5, 4.0, 65_536.0)
_SUMMED = ["split", "label", "format", "width", "height", "channels", "size", "source_bytes", "passed", "animated"]


@dataclass(frozen=True)
class ShardRecord:
    """What building one shard found out. Without rows there is no tar, and the shard is left out.

    entry: what dataset.json holds of the shard, {name (file), split, generation, samples, bytes, sha256, pixels
    {channels: [pixel count, sums (channels), squared sums (channels)]} in whole numbers over the images' values
    0..255, of the rows that `image.pixel_sums` takes}; rows: SCHEMA, by offset; rejects: REJECTS.
    """

    entry: dict
    rows: pa.Table
    rejects: pa.Table


@dataclass(frozen=True)
class Generation:
    """What a build adds. source: plain JSON, what was built from; sources: gives SOURCES, sorted by name, once every
    record was read; rejects: REJECTS, those that no shard knows of (duplicates)."""

    number: int
    source: dict
    sources: Callable[[], pa.Table]
    rejects: pa.Table


def commit(
    root: str, earlier: dict | None, records: Iterable[ShardRecord], made: Generation, recipe: dict, classes
) -> dict:
    """Writes a generation's index, then dataset.json, and returns what that holds.

    earlier: dataset.json as it is, None for a new dataset; records: every new shard, sorted by name; read one at a
    time, so that millions of rows are never all in memory; recipe: plain JSON. ValueError: there is not one sample.
    """
    seen, names = Summary(len(classes)), file_names(made.number)
    shards, rejects, added = list(earlier["shards"]) if earlier else [], [made.rejects], 0
    for old in earlier["generations"] if earlier else ():
        seen.add_rows(read_columns(root, old["index"], _SUMMED))
        seen.add_rejects(read_columns(root, old["rejects"], REJECTS.names))

    def rows() -> Iterator[pa.Table]:
        nonlocal added
        for record in records:
            rejects.append(record.rejects)
            if len(record.rows):
                shards.append(record.entry)
                added += len(record.rows)
                yield record.rows

    with index_file(root, names["index"], rows(), seen):
        rejected = pa.concat_tables(rejects).sort_by("source")
        seen.add_rejects(rejected)
        if not shards:
            raise ValueError(_why_empty(rejected))
    write_table(root, names["rejects"], rejected)
    write_table(root, names["sources"], made.sources())
    generation = {"generation": made.number, **names, "samples": added, "source": made.source}
    generations = [*(earlier["generations"] if earlier else []), generation]
    return write_info(root, seen, earlier, generations, shards, recipe, classes)


def file_names(generation: int, revision: int = 0) -> dict[str, str]:
    """{index, rejects, sources: file of a generation}; a revision is what pruning made of it."""
    stem = f"index/{generation:06d}" + (f".{revision}" if revision else "")
    return {"index": f"{stem}.parquet", "rejects": f"{stem}-rejects.parquet", "sources": f"{stem}-sources.parquet"}


@contextlib.contextmanager
def index_file(root: str, name: str, tables: Iterable[pa.Table], seen: "Summary") -> Iterator[None]:
    """Writes tables of SCHEMA, which `seen` is shown, into an index file that appears when the `with` block ends."""
    with storage.writer(storage.join(root, name)) as file:
        with pq.ParquetWriter(file, SCHEMA, compression="zstd", write_page_checksum=True) as out:
            held = [SCHEMA.empty_table()]
            for table in tables:
                seen.add_rows(table.select(_SUMMED))
                held.append(table)
                if sum(map(len, held)) >= ROW_GROUP:
                    held = _write_groups(out, pa.concat_tables(held))
            _write_groups(out, pa.concat_tables(held), last=True)
        yield


def _write_groups(out: pq.ParquetWriter, rows: pa.Table, last: bool = False) -> list[pa.Table]:
    end = len(rows) if last else len(rows) // ROW_GROUP * ROW_GROUP
    if end:
        out.write_table(rows[:end].combine_chunks(), row_group_size=ROW_GROUP)
    return [rows[end:]]


def write_table(root: str, name: str, table: pa.Table) -> None:
    with storage.writer(storage.join(root, name)) as file:
        options = {"compression": "zstd", "row_group_size": ROW_GROUP, "write_page_checksum": True}
        pq.write_table(table.combine_chunks(), file, **options)


def write_info(
    root: str, seen: "Summary", earlier: dict | None, generations: list[dict], shards: list[dict], recipe: dict, classes
) -> dict:
    """dataset.json, the commit: before it the new files are strangers, after it they are the dataset."""
    next_shard = dict(earlier["next_shard"]) if earlier else {}  # never used twice, whatever was pruned
    for shard in shards:
        number = int(shard["name"].removesuffix(".tar").rpartition("-")[2])
        next_shard[shard["split"]] = max(next_shard.get(shard["split"], 0), number + 1)
    info = {
        "version": VERSION,
        "classes": list(classes),
        **seen.counts(shards),
        **_statistics(shards),
        "recipe": recipe,
        "next_shard": next_shard,
        "generations": generations,
        "shards": shards,
    }
    storage.write(storage.join(root, DATASET), json.dumps(info, indent=1, ensure_ascii=True).encode() + b"\n")
    return info


class Summary:
    """Counts over index rows and rejects, in whole numbers so that the order of adding cannot show."""

    def __init__(self, classes: int):
        self.classes = classes
        self.splits: dict[str, np.ndarray] = {}  # samples by label; the last counts those without
        self.sizes, self.formats, self.channels, self.reasons = set(), set(), Counter(), Counter()
        self.source_bytes = self.stored_bytes = self.passed = self.animated = 0
        self.sides, self.aspects = np.zeros(len(SIDES) - 1, np.int64), np.zeros(len(ASPECTS) - 1, np.int64)

    def add_rows(self, rows: pa.Table) -> None:
        for name in pc.unique(rows["split"]).to_pylist():
            labels = rows.filter(pc.equal(rows["split"], name))["label"].fill_null(self.classes).to_numpy()
            counts = np.bincount(labels, minlength=self.classes + 1)
            self.splits[name] = self.splits.get(name, 0) + counts
        width, height = rows["width"].to_numpy(), rows["height"].to_numpy()
        if len(self.sizes) < 2 and len(rows):  # one more than one is already "not uniform"
            shapes = np.unique(np.stack([width, height], axis=1), axis=0)
            self.sizes.update((int(w), int(h)) for w, h in shapes[:2])
        self.formats.update(pc.unique(rows["format"]).to_pylist())
        self.channels.update(rows["channels"].to_pylist())
        self.source_bytes += pc.sum(rows["source_bytes"]).as_py() or 0
        self.stored_bytes += pc.sum(rows["size"]).as_py() or 0
        self.passed += pc.sum(rows["passed"]).as_py() or 0
        self.animated += pc.sum(rows["animated"]).as_py() or 0
        self.sides += np.histogram(np.minimum(width, height), SIDES)[0]
        self.aspects += np.histogram(width / np.maximum(height, 1), ASPECTS)[0]

    def add_rejects(self, rejects: pa.Table) -> None:
        self.reasons.update(rejects["reason"].to_pylist())

    def counts(self, shards: list[dict]) -> dict:
        splits = {}
        for name in sorted(self.splits):
            mine, counts = [s for s in shards if s["split"] == name], self.splits[name]
            splits[name] = {"samples": int(counts.sum()), "shards": len(mine), "classes": counts[:-1].tolist()}
        return {
            "samples": sum(split["samples"] for split in splits.values()),
            "splits": splits,
            "format": "+".join(sorted(self.formats)),
            "image_size": list(next(iter(self.sizes))) if len(self.sizes) == 1 else None,  # (width, height) of each
            "channels": {str(n): count for n, count in sorted(self.channels.items())},
            "bytes": {"source": self.source_bytes, "stored": self.stored_bytes},
            "histograms": {
                "short_side": {"edges": list(SIDES), "counts": self.sides.tolist()},
                "aspect": {"edges": list(ASPECTS), "counts": self.aspects.tolist()},
            },
            "passed": self.passed,  # images whose own coded data was kept
            "animated": self.animated,  # images of which the first frame was taken
            "rejected": dict(sorted(self.reasons.items())),
        }


def _statistics(shards: list[dict]) -> dict:
    """Mean and standard deviation of each channel of `train`, 0..1; grey among colour counts as grey RGB."""
    pixels = [(int(c), *sums) for s in shards if s["split"] == "train" for c, sums in s["pixels"].items()]
    channels = max((c for c, *_ in pixels), default=0)
    wide = [(n, s * (channels // c), q * (channels // c)) for c, n, s, q in pixels]
    count = sum(n for n, _, _ in wide)
    if not count:
        return {"mean": None, "std": None}
    sums = [sum(s[c] for _, s, _ in wide) for c in range(channels)]
    squares = [sum(q[c] for _, _, q in wide) for c in range(channels)]
    mean = [s / (count * 255) for s in sums]
    variance = [(q * count - s * s) / (count * 255) ** 2 for s, q in zip(sums, squares, strict=True)]
    return {"mean": [round(m, 8) for m in mean], "std": [round(v**0.5, 8) for v in variance]}


def _why_empty(rejects: pa.Table) -> str:
    top = ", ".join(f"{reason} {count}" for reason, count in Counter(rejects["reason"].to_pylist()).most_common(5))
    first = rejects["source"].to_pylist()[:3]
    return f"no image of the source could be used ({top}); for example {', '.join(map(repr, first))}"
