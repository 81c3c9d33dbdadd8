"""What other readers want beside finished shards, so that each opens them as they are.

    ROOT/wids-train.json ...                wids: the shards of a split, for access by position
    ROOT/.nv-meta/, train-000000.tar.idx    Megatron Energon: what `energon prepare` would write
    ROOT/dali/train-000000.idx ...          NVIDIA DALI: `index_paths` for its webdataset reader, as wds2idx writes them
    ROOT/_info.json                         timm: the shards of each split and their counts
    ROOT/sizes.json                         open_clip: samples in each shard

Each is a function of dataset.json and the index, to the last byte (index.sqlite: with the same SQLite): no shard is
read, writing them again changes nothing, and one that was lost can be made again.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import sqlite3
import tempfile
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from pipeline import storage
from pipeline.shards import index
from pipeline.shards.tar import BLOCK

KINDS = ("wids", "energon", "dali", "timm", "open_clip")
ENERGON = "7.4.1"  # whose formats these are
_SQLITE, _UUID, _DATASET, _SPLIT, _INFO = _META = [
    f".nv-meta/{name}" for name in ("index.sqlite", "index.uuid", "dataset.yaml", "split.yaml", ".info.json")
]
_OURS = re.compile(r"wids-[a-z][a-z0-9_]*\.json|[a-z][a-z0-9_]*-\d{6,}\.tar\.idx|dali/[a-z][a-z0-9_]*-\d{6,}\.idx")
_THREADS = 8  # to wait for many small files at once, on disk or in a store
_AHEAD = 64  # files in memory that wait for one


def names(info: dict, kinds: Iterable[str]) -> list[str]:
    """The files that `write` makes for a dataset, sorted, relative to its root. info: what dataset.json holds.

    ValueError: a kind that is none of KINDS.
    """
    shards = [shard["name"] for shard in info["shards"]]
    files = {
        "wids": map(_wids_name, info["splits"]),
        "energon": itertools.chain(_META, map(_itar_name, shards)),
        "dali": map(_dali_name, shards),
        "timm": ["_info.json"],
        "open_clip": ["sizes.json"],
    }
    kinds = set(kinds)
    if unknown := kinds - files.keys():
        raise ValueError(f"sidecar {min(unknown)!r}: one of {', '.join(KINDS)}")
    return sorted(name for kind in kinds for name in files[kind])


def is_sidecar(path: str) -> bool:
    """Whether `write` would give a file this name, relative to the root, for some dataset."""
    return path in ("_info.json", "sizes.json", *_META) or bool(_OURS.fullmatch(path))


def stand(root: str, info: dict, kinds: Iterable[str]) -> bool:
    """Whether the sidecars of `kinds`, and no others, lie at `root`; what is in them is not looked at."""
    return _present(root) == set(names(info, kinds))


def bring(root: str, dataset: index.Dataset, kinds: Iterable[str]) -> list[str]:
    """`write`, and removes the sidecars of other kinds and of shards that are gone."""
    written = write(root, dataset, kinds)
    for path in sorted(_present(root) - set(written)):
        storage.delete(storage.join(root, path))
    return written


def _present(root: str) -> set[str]:
    return {file.path for file in storage.list_files(root) if is_sidecar(file.path)}


def write(root: str, dataset: index.Dataset, kinds: Iterable[str]) -> list[str]:
    """Writes the sidecars of `kinds` at `root` (local or s3://), each whole or not at all; returns their `names`.

    ValueError: an unknown kind, or an index that contradicts itself.
    """
    kinds, info = set(kinds), dataset.info
    written = names(info, kinds)
    splits = {name: [shard for shard in info["shards"] if shard["split"] == name] for name in info["splits"]}
    if "wids" in kinds:
        for name, shards in splits.items():
            _write_json(root, _wids_name(name), _wids(name, shards))
    if "timm" in kinds:
        _write_json(root, "_info.json", {"splits": {name: _timm(name, shards) for name, shards in splits.items()}})
    if "open_clip" in kinds:
        _write_json(root, "sizes.json", {shard["name"]: shard["samples"] for shard in info["shards"]})
    if {"energon", "dali"} & kinds:
        with contextlib.closing(_written_shards(root, dataset, kinds)) as shards:
            if "energon" in kinds:
                _energon(root, splits, info["shards"], shards)
            else:
                deque(shards, maxlen=0)
    return written


def _write_json(root: str, name: str, content: dict) -> None:
    storage.write(storage.join(root, name), json.dumps(content, indent=1).encode() + b"\n")


# ---- one shard at a time


@dataclass(frozen=True)
class _Shard:
    """keys, formats (jpg or png) and members ({extension: (offset, size)}) of its samples; bounds: offset of each
    sample's first header, and where the last sample ends, int64 (samples + 1,)."""

    name: str
    keys: list[str]
    formats: list[str]
    members: list[dict[str, tuple[int, int]]]
    bounds: np.ndarray


def _written_shards(root: str, dataset: index.Dataset, kinds: set[str]) -> Iterator[_Shard]:
    """Every shard, as dataset.json lists them, with its own sidecars written or about to be; all are at the end."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for shard in _shards(dataset):
            files = []
            if "energon" in kinds:
                files.append((_itar_name(shard.name), shard.bounds.astype("<u8").tobytes()))
            if "dali" in kinds:
                files.append((_dali_name(shard.name), _dali(shard).encode()))
            waiting += [pool.submit(storage.write, storage.join(root, name), data) for name, data in files]
            while len(waiting) > _AHEAD:
                waiting.popleft().result()
            yield shard
        for future in waiting:
            future.result()


def _shards(dataset: index.Dataset) -> Iterator[_Shard]:
    for shard in dataset.info["shards"]:
        columns = dataset.shard_rows(shard["name"], ["key", "format", "offset"]).columns
        keys, formats, offsets = (column.to_pylist() for column in columns)
        members = dataset.layout(shard["name"])
        if [sample[form][0] for sample, form in zip(members, formats, strict=True)] != offsets:
            raise ValueError(f"the index of {dataset.root} contradicts itself about {shard['name']}: build it again")
        starts = [min(sample.values())[0] - BLOCK for sample in members]
        offset, size = max(members[-1].values())
        yield _Shard(shard["name"], keys, formats, members, np.array([*starts, offset + size + -size % BLOCK]))


# ---- wids, timm, DALI


def _wids_name(split: str) -> str:
    return f"wids-{split}.json"


def _wids(split: str, shards: list[dict]) -> dict:
    """What wids calls a shard index; its URLs are relative to where it lies."""
    files = [{"url": s["name"], "nsamples": s["samples"], "filesize": s["bytes"]} for s in shards]
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": split, "shardlist": files}


def _timm(split: str, shards: list[dict]) -> dict:
    """What timm's ReaderWds wants to know of a split."""
    files, counts = [shard["name"] for shard in shards], [shard["samples"] for shard in shards]
    return {"name": split, "filenames": files, "shard_lengths": counts, "num_samples": sum(counts)}


def _dali_name(shard: str) -> str:
    """In a folder of its own, lest it be taken for Energon's."""
    return f"dali/{shard.removesuffix('.tar')}.idx"


def _dali(shard: _Shard) -> str:
    """Index v1.2: a line a sample, `extension offset size name` for each member. One with a space in its name is left
    out: fields end there."""
    lines = [f"v1.2 {len(shard.keys)}"]
    for key, members in zip(shard.keys, shard.members, strict=True):
        fields = (f"{x} {offset} {size} {key}.{x}" for x, (offset, size) in members.items() if " " not in x)
        lines.append(" ".join(fields))
    return "\n".join(lines) + "\n"


# ---- Energon


def _itar_name(shard: str) -> str:
    """Holds the `bounds` of _Shard as little-endian uint64."""
    return f"{shard}.idx"


def _energon(root: str, splits: dict[str, list[dict]], listed: list[dict], shards: Iterator[_Shard]) -> None:
    """The folder .nv-meta; .info.json, by which Energon knows a dataset, is written last."""
    formats, common = set(), None
    with _database() as (database, file):
        for number, shard in enumerate(shards):
            _insert(database, number, shard)
            formats.update(shard.formats)
            for members in shard.members:
                common = members.keys() if common is None else common & members.keys()
        database.commit()
        database.executescript(_INDEXES)
        with storage.writer(storage.join(root, _SQLITE)) as out:
            shutil.copyfileobj(file, out, 1 << 20)
    fields = {"image": ",".join(sorted(formats))} | ({"label": "cls"} if "cls" in common else {})
    sample = "ImageClassificationSample" if "cls" in common else "ImageSample"
    dataset = ["sample_type:", "  __module__: megatron.energon", f"  __class__: {sample}", "field_map:"]
    dataset += [f"  {field}: {extension}" for field, extension in fields.items()]
    parts = ["split_parts:"]
    for name, of_split in splits.items():
        parts += [f'  "{name}":', *(f"  - {shard['name']}" for shard in of_split)]  # quoted: YAML's no is false
    digest = index.digest([[shard["name"], shard["sha256"]] for shard in listed])
    info = {"energon_version": ENERGON, "shard_counts": {shard["name"]: shard["samples"] for shard in listed}}
    storage.write(storage.join(root, _UUID), str(uuid.uuid5(uuid.NAMESPACE_URL, digest)).encode())
    storage.write(storage.join(root, _DATASET), ("\n".join(dataset) + "\n").encode())
    storage.write(storage.join(root, _SPLIT), ("\n".join(parts) + "\n").encode())
    _write_json(root, _INFO, info)


_TABLES = """
PRAGMA page_size = 4096;
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA cache_size = -262144;
CREATE TABLE samples (
    tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
    byte_offset INTEGER, byte_size INTEGER
);
CREATE TABLE sample_parts (
    tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER, content_byte_size INTEGER
);
"""
_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full
    ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


@contextlib.contextmanager
def _database() -> Iterator[tuple[sqlite3.Connection, BinaryIO]]:
    """An empty index.sqlite, and the file that it is written to, which has no name any more: SQLite wants a local one,
    and killed we leave nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "index.sqlite")
        database = sqlite3.connect(path, isolation_level=None)
        file = open(path, "rb")  # noqa: SIM115
    with contextlib.closing(database), file:
        database.executescript(_TABLES)
        database.execute("BEGIN")
        yield database, file


def _insert(database: sqlite3.Connection, number: int, shard: _Shard) -> None:
    places = enumerate(zip(shard.keys, shard.bounds[:-1].tolist(), np.diff(shard.bounds).tolist(), strict=True))
    database.executemany(
        "INSERT INTO samples VALUES (?, ?, ?, ?, ?)",
        ((number, key, i, start, size) for i, (key, start, size) in places),
    )
    database.executemany(
        "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
        ((number, i, x, *place) for i, members in enumerate(shard.members) for x, place in members.items()),
    )
