"""A pass over the whole source before anything is planned: what each item holds, to find those that repeat others.

Its result is an input of the plan, and is kept in OUT/.build until the generation is committed, then in its sources
file, where later generations find it.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import sources, storage
from pipeline.shards import image
from pipeline.shards.duplicates import content_hash, duplicates, perceptual_hash
from pipeline.shards.index import REJECTS
from pipeline.shards.plan import ShardPlan, key_bits
from pipeline.shards.shard import UNREAD, Outcome

_CHUNK = 2000  # items of a task
_FOUND = pa.schema({"hash": pa.binary(16), "near": pa.uint64()})


@dataclass(frozen=True)
class Job:
    """near: the perceptual hash is wanted too, which takes a decode; digest: of the items, so that a cached part of
    another listing does not count."""

    uri: str
    folder: str
    near: bool
    digest: str


def digest(items: pa.Table) -> str:
    """Of what was listed, tags too: a fingerprint is of content, which they stand for."""
    seen = hashlib.blake2b(digest_size=16)
    for name, size, tag in zip(*(items[c].to_pylist() for c in ("name", "size", "tag")), strict=True):
        seen.update(f"{name}\0{size}\0{tag}\n".encode())
    return seen.hexdigest()


def chunks(count: int) -> list[ShardPlan]:
    starts = range(0, count, _CHUNK)
    return [ShardPlan(f"{start:09d}", "", np.arange(start, min(start + _CHUNK, count))) for start in starts]


def write(job: Job, name: str, _split: str, items: pa.Table) -> Outcome:
    """Fingerprints one chunk, unless that was done."""
    if _cached(job, name) is not None:
        return Outcome(0, 0, stood=True)
    hashes, near = [], []
    for raw, _ in sources.read_items(job.uri, items):
        readable = not isinstance(raw, OSError)
        hashes.append(content_hash(raw) if readable else UNREAD)
        near.append(_looks(raw) if readable and job.near else None)
    table = pa.table({"hash": hashes, "near": near}, schema=_FOUND)
    with storage.writer(_path(job, name)) as file:
        pq.write_table(table.replace_schema_metadata({"digest": job.digest, "near": str(job.near)}), file)
    return Outcome(0, 0)


def _looks(raw: bytes | np.ndarray) -> int | None:
    try:
        return perceptual_hash(raw if isinstance(raw, np.ndarray) else image.decode(raw))
    except image.Reject:  # the shard it is planned into says why
        return None


def read(job: Job, plans: list[ShardPlan]) -> tuple[np.ndarray, pa.Array]:
    """(content hashes, void16 (n,), zeros where nothing could be read; perceptual hashes, uint64 with nulls)."""
    table = pa.concat_tables([_FOUND.empty_table(), *(_cached(job, each.name) for each in plans)])
    hashes = np.frombuffer(b"".join(table["hash"].to_pylist()), "V16").copy()
    return hashes, table["near"].combine_chunks()


def _path(job: Job, name: str) -> str:
    return storage.join(job.folder, f"fingerprints-{name}.parquet")


def _cached(job: Job, name: str) -> pa.Table | None:
    try:
        table = pq.read_table(pa.BufferReader(storage.read(_path(job, name))))
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    wanted = {b"digest": job.digest.encode(), b"near": str(job.near).encode()}
    return table.replace_schema_metadata(None) if (table.schema.metadata or {}).items() >= wanted.items() else None


def unrepeated(
    items: pa.Table, hashes: np.ndarray, near: pa.Array | None, earlier: pa.Table
) -> tuple[np.ndarray, pa.Table]:
    """(bool (items,), which to keep; REJECTS of the others). hashes, near: see `read`; earlier: SOURCES.

    What could not be read or decoded repeats nothing: its own reject is to say why.
    """
    known = np.array([value or UNREAD for value in earlier["hash"].to_pylist()], "V16")
    every = np.concatenate([known, hashes])
    usable = every != np.zeros(1, "V16")
    looks = None
    if near is not None:
        joined = pa.chunked_array([*earlier["near"].chunks, near])
        usable &= joined.is_valid().to_numpy()
        looks = joined.fill_null(0).to_numpy()[usable]
    keys = np.concatenate([key_bits(earlier["name"]), key_bits(items["name"])])[usable]
    before = np.arange(len(every)) < len(known)
    repeated = np.zeros(len(every), bool)
    repeated[usable] = duplicates(keys, every[usable].view("<u8").reshape(-1, 2), looks, before[usable])
    wanted = ~repeated[len(known) :]
    names = items["name"].filter(pa.array(~wanted))
    detail = "its content is that of another item" if near is None else "it looks like another item"
    columns = {"source": names, "reason": pa.repeat("duplicate", len(names)), "detail": pa.repeat(detail, len(names))}
    return wanted, pa.table({"split": pa.nulls(len(names), pa.string()), **columns}).select(REJECTS.names).cast(REJECTS)
