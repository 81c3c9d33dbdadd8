"""One shard: a plan's items -> the tar and its record.

The record is written after the tar and is what says that the tar stands: it holds the shard's rows of the index, its
rejects, pixel sums and checksum, what was read of each item, and the job it was made for. Records lie in OUT/.build
until the index is written.
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import sources, storage
from pipeline.shards import image, index, tar
from pipeline.shards.commit import ShardRecord
from pipeline.shards.duplicates import content_hash
from pipeline.shards.plan import key

WORK = ".build"  # the job and the records of an unfinished build
UNREAD = bytes(16)  # stands for the hash of what could not be read


@dataclass(frozen=True)
class Job:
    """What every task knows. labelled: a sample needs a class; digest: of recipe and source; a record of another job
    does not count."""

    uri: str
    out: str
    image: image.ImageRecipe
    labelled: bool
    generation: int
    digest: str


@dataclass(frozen=True)
class Outcome:
    """Of one shard: samples, rejects, and whether it stood already."""

    samples: int
    rejects: int
    stood: bool = False


def write(job: Job, name: str, split: str, items: pa.Table) -> Outcome:
    """Makes one shard and its record, unless both stand and the tar's checksum is the record's. The tar is left out if
    no item becomes a sample."""
    if stood := _standing(job, name):
        return stood
    shard = _Streaming(job, split, f"{name}.tar")
    samples = shard.samples(items)
    first = next(samples, None)
    if first is None:
        written = tar.Written(0, "", [])
    else:
        written = tar.write_shard(storage.join(job.out, shard.file), itertools.chain([first], samples))
    columns, count = shard.columns, len(written.offsets)
    for members, form, label in zip(written.offsets, columns["format"], columns["label"], strict=True):
        rest = {extension: size for extension, (_, size) in members.items() if extension not in (form, "json")}
        if label is not None:
            del rest["cls"]
        more = {"offset": members[form][0], "size": members[form][1], "json_size": members["json"][1]}
        for column, value in (more | {"beside": json.dumps(rest) if rest else None}).items():
            columns[column].append(value)
    columns |= {"split": [split] * count, "shard": [shard.file] * count, "generation": [job.generation] * count}
    entry = {"name": shard.file, "split": split, "generation": job.generation, "samples": count,
             "bytes": written.bytes, "sha256": written.sha256, "pixels": shard.pixels}  # fmt: skip
    facts = {"job": job.digest, "entry": entry, "rejects": shard.rejects, "hashes": b"".join(shard.hashes).hex()}
    table = pa.table({c: columns[c] for c in index.SCHEMA.names}, schema=index.SCHEMA)
    with storage.writer(_record_path(job, name)) as file:
        pq.write_table(table.replace_schema_metadata({"record": json.dumps(facts)}), file)
    return Outcome(count, len(shard.rejects))


class _Streaming:
    """Gathers the rows, rejects and pixel sums of one shard while its samples stream into the tar."""

    def __init__(self, job: Job, split: str, file: str):
        self.job, self.split, self.file = job, split, file
        self.columns = {name: [] for name in index.SCHEMA.names}
        self.rejects: list[dict] = []
        self.hashes: list[bytes] = []  # of each item, 16 bytes
        self.pixels: dict[str, list] = {}  # channels: [count, sums, squared sums]

    def samples(self, items: pa.Table) -> Iterator[tuple[str, dict[str, bytes]]]:
        names, labels, sizes = (items[c].to_pylist() for c in ("name", "label", "size"))
        found = sources.read_items(self.job.uri, items.filter(pc.less_equal(items["size"], image.MAX_BYTES)))
        for name, label, size in zip(names, labels, sizes, strict=True):
            digest = UNREAD
            try:
                if size > image.MAX_BYTES:  # known from the listing: it was not even read
                    raise image.Reject("too_large", f"{size} bytes, the limit is {image.MAX_BYTES}")
                raw, beside = next(found)
                if isinstance(raw, OSError):
                    raise image.Reject("unreadable", raw.strerror or type(raw).__name__)
                digest = content_hash(raw)
                if label is None and self.job.labelled:
                    raise image.Reject("no_label", "the source gives it no class")
                made = image.encode(raw, self.job.image)
            except image.Reject as no:
                self.rejects.append({"source": name, "split": self.split, "reason": no.reason, "detail": no.detail})
                continue
            finally:
                self.hashes.append(digest)
            yield key(name), self._members(name, label, raw, made, beside)

    def _members(self, name: str, label: int | None, raw, made: image.Encoded, beside: dict) -> dict[str, bytes]:
        facts = {"source": name, "source_bytes": raw.nbytes if isinstance(raw, np.ndarray) else len(raw),
                 "width": made.width, "height": made.height, "channels": made.channels,
                 "crc32": zlib.crc32(made.data)}  # fmt: skip
        row = {"key": key(name), "label": label, "format": made.extension, "passed": made.passed}
        for column, value in (row | {"animated": made.animated} | facts).items():
            self.columns[column].append(value)
        image.add_sums(self.pixels, made.channels, made.summed)
        members = {made.extension: made.data}
        if label is not None:
            members["cls"] = b"%d" % label
        return _carried(beside, facts) | members


def _carried(beside: dict[str, bytes], facts: dict) -> dict[str, bytes]:
    """What the source holds beside the image, byte for byte, and our .json, into which its own is merged.

    What has a name of ours becomes .source.NAME, a .json that is no object too.
    """
    members = {f"source.{x}" if x in ("jpg", "png", "cls") else x: data for x, data in beside.items() if x != "json"}
    if "json" in beside:
        try:
            theirs = json.loads(beside["json"])
        except ValueError:
            theirs = None
        if isinstance(theirs, dict):
            facts = theirs | facts
        else:
            members["source.json"] = beside["json"]
    return members | {"json": json.dumps(facts).encode()}


# ---- records


def _record_path(job: Job, name: str) -> str:
    return storage.join(job.out, WORK, f"{name}.parquet")


def _standing(job: Job, name: str) -> Outcome | None:
    try:
        record, _ = read_record(job, name)
        digest = hashlib.sha256(storage.read(storage.join(job.out, record.entry["name"]))) if len(record.rows) else None
    except (FileNotFoundError, ValueError):
        return None
    if digest and digest.hexdigest() != record.entry["sha256"]:
        return None
    return Outcome(len(record.rows), len(record.rejects), stood=True)


def read_record(job: Job, name: str) -> tuple[ShardRecord, np.ndarray]:
    """The record of the shard `name` (train-000000), and the content hash of each of its items, void16 (n,).
    FileNotFoundError: it is not done. ValueError: it is damaged, or that of another job."""
    try:
        rows = pq.read_table(pa.BufferReader(storage.read(_record_path(job, name))))
    except pa.ArrowInvalid as error:
        raise ValueError(f"record {name} is damaged: {error}") from None
    facts = json.loads(rows.schema.metadata[b"record"])
    if facts["job"] != job.digest:
        raise ValueError(f"record {name} belongs to another job")
    rejects = pa.Table.from_pylist(facts["rejects"], schema=index.REJECTS)
    hashes = np.frombuffer(bytes.fromhex(facts["hashes"]), "V16")
    return ShardRecord(facts["entry"], rows.replace_schema_metadata(None), rejects), hashes
