"""One shard: a plan's items -> the tar and its record.

The record is written after the tar and is what says that the tar stands: it holds the shard's rows of the index, its
rejects, pixel sums and checksum, and the job it was made for. Records lie in OUT/.build until the index is written.
"""

import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import sources, storage
from pipeline.shards import image, index, tar
from pipeline.shards.plan import key

WORK = ".build"  # the job and the records of an unfinished build


@dataclass(frozen=True)
class Job:
    """What every task knows. digest: of recipe and source; a record of another job does not count."""

    uri: str
    out: str
    image: image.ImageRecipe
    digest: str


def write(job: Job, name: str, split: str, items: pa.Table) -> tuple[int, int]:
    """Makes one shard and its record; returns (samples, rejects). The tar is left out if no sample is."""
    shard = _Streaming(job, split, f"{name}.tar")
    samples = shard.samples(items)
    first = next(samples, None)
    if first is None:
        written = tar.Written(0, "", [])
    else:
        written = tar.write_shard(storage.join(job.out, shard.file), itertools.chain([first], samples))
    columns = shard.columns
    columns["offset"], columns["size"] = ([o[job.image.format][i] for o in written.offsets] for i in (0, 1))
    count = len(written.offsets)
    columns |= {"split": [split] * count, "shard": [shard.file] * count, "generation": [0] * count}
    facts = {"job": job.digest, "name": shard.file, "split": split, "bytes": written.bytes, "sha256": written.sha256,
             "rejects": shard.rejects, "pixels": shard.pixels}  # fmt: skip
    table = pa.table({c: columns[c] for c in index.SCHEMA.names}, schema=index.SCHEMA)
    with storage.writer(_record_path(job, name)) as file:
        pq.write_table(table.replace_schema_metadata({"record": json.dumps(facts)}), file)
    return count, len(shard.rejects)


class _Streaming:
    """Gathers the rows, rejects and pixel sums of one shard while its samples stream into the tar."""

    def __init__(self, job: Job, split: str, file: str):
        self.job, self.split, self.file = job, split, file
        names = ("key", "label", "width", "height", "channels", "crc32", "source", "source_bytes")
        self.columns = {name: [] for name in names}
        self.rejects: list[dict] = []
        self.pixels: dict[int, list] = {}  # channels: [count, sums, squared sums]

    def samples(self, items: pa.Table) -> Iterator[tuple[str, dict[str, bytes]]]:
        names, labels, sizes = (items[c].to_pylist() for c in ("name", "label", "size"))
        raws = sources.read_items(self.job.uri, [n for n, s in zip(names, sizes, strict=True) if s <= image.MAX_BYTES])
        for name, label, size in zip(names, labels, sizes, strict=True):
            try:
                if size > image.MAX_BYTES:  # known from the listing: it was not even read
                    raise image.Reject("too_large", f"{size} bytes, the limit is {image.MAX_BYTES}")
                raw = next(raws)
                if isinstance(raw, OSError):
                    raise image.Reject("unreadable", raw.strerror or type(raw).__name__)
                made = image.encode(raw, self.job.image)
            except image.Reject as no:
                self.rejects.append({"source": name, "split": self.split, "reason": no.reason, "detail": no.detail})
                continue
            yield key(name), self._members(name, label, raw, made)

    def _members(self, name: str, label: int | None, raw, made: image.Encoded) -> dict[str, bytes]:
        facts = {"source": name, "source_bytes": getattr(raw, "nbytes", None) or len(raw), "width": made.width,
                 "height": made.height, "channels": made.channels, "crc32": zlib.crc32(made.data)}  # fmt: skip
        for column, value in (("key", key(name)), ("label", label), *facts.items()):
            self.columns[column].append(value)
        total = self.pixels.setdefault(made.channels, [0, [0] * made.channels, [0] * made.channels])
        total[0] += made.width * made.height
        for c in range(made.channels):
            total[1][c] += made.sums[c]
            total[2][c] += made.squares[c]
        members = {self.job.image.format: made.data, "json": json.dumps(facts).encode()}
        return members if label is None else members | {"cls": b"%d" % label}


def _record_path(job: Job, name: str) -> str:
    return storage.join(job.out, WORK, f"{name}.parquet")


def read_record(job: Job, name: str) -> index.ShardRecord:
    """The record of the shard `name` (train-000000). FileNotFoundError: it is not done."""
    rows = pq.read_table(pa.BufferReader(storage.read(_record_path(job, name))))
    facts = json.loads(rows.schema.metadata[b"record"])
    assert facts["job"] == job.digest, f"record {name} belongs to another job"
    rejects = pa.Table.from_pylist(facts["rejects"], schema=index.REJECTS)
    pixels = {int(channels): sums for channels, sums in facts["pixels"].items()}
    named = (facts["name"], facts["split"], facts["bytes"], facts["sha256"])
    return index.ShardRecord(*named, rows.replace_schema_metadata(None), rejects, pixels)


def standing(job: Job) -> dict[str, tuple[int, int]]:
    """{name: (samples, rejects)} of the shards whose record is there and whose tar has the size it says."""
    files = {file.path: file.size for file in storage.list_files(job.out)}
    done = {}
    for path in files:
        folder, _, name = path.rpartition("/")
        if folder == WORK and name.endswith(".parquet"):
            record = read_record(job, name.removesuffix(".parquet"))
            if not record.bytes or files.get(record.name) == record.bytes:
                done[name.removesuffix(".parquet")] = (len(record.rows), len(record.rejects))
    return done
