"""Does a dataset still hold what was committed? Everything is read again and compared with its checksums.

    dataset.json -> index files (page checksums, counts) -> shards (SHA-256; if that differs, which samples) -> sidecars

`repair` makes damaged shards again from their source, byte for byte, or says why it cannot, and leaves the rest alone.
"""

import contextlib
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import lease, sources, storage
from pipeline.shards import changes, index, prune, shard, sidecars
from pipeline.shards.image import ImageRecipe
from pipeline.shards.plan import Recipe
from pipeline.shards.shard import WORK, Job

_THREADS = 8  # hashing releases the GIL, and a store is far away
_NAMED = 5  # damaged samples of a shard named in its problem


@dataclass(frozen=True)
class Problem:
    """file: relative to the dataset; kind: missing, truncated, damaged, unknown (a file that is none of the dataset's);
    detail: a sentence for a person."""

    file: str
    kind: str
    detail: str


def verify(root: str, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Every difference between the dataset at `root` and what was committed, sorted by file.

    progress(shards done, shards in all). ValueError: there is no dataset, or dataset.json is damaged.
    """
    dataset = index.load(root)
    files = {file.path: file.size for file in storage.list_files(root)}
    problems = [problem for g in dataset.info["generations"] for problem in _of_generation(root, g, files)]
    readable = not problems
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda entry: _of_shard(dataset, entry, files, readable), dataset.info["shards"])
        for done, problem in enumerate(found, 1):
            problems += [problem] if problem else []
            if progress:
                progress(done, len(dataset.info["shards"]))
    if readable:
        problems += _of_sidecars(dataset, files)
    problems += [Problem(name, "unknown", "a shard or index file that dataset.json does not name")
                 for name in prune.strangers(files, dataset.info)]  # fmt: skip
    return sorted(problems, key=lambda problem: problem.file)


def _of_generation(root: str, generation: dict, files: dict[str, int]) -> Iterator[Problem]:
    for kind, schema in index.FILES.items():
        name = generation[kind]
        if name not in files:
            yield Problem(name, "missing", f"the {kind} of generation {generation['generation']}")
            continue
        try:
            data = pa.BufferReader(storage.read(storage.join(root, name)))
            table = pq.read_table(data, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            yield Problem(name, "damaged", str(error).splitlines()[0])
            continue
        if table.schema.names != schema.names:
            yield Problem(name, "damaged", f"its columns are {', '.join(table.schema.names)}")
        elif kind == "index" and len(table) != generation["samples"]:
            yield Problem(name, "damaged", f"{len(table)} rows, dataset.json says {generation['samples']}")


def _of_shard(dataset: index.Dataset, entry: dict, files: dict[str, int], readable: bool) -> Problem | None:
    name = entry["name"]
    if name not in files:
        return Problem(name, "missing", f"{entry['samples']} samples of {entry['split']}")
    data = storage.read(storage.join(dataset.root, name))
    if hashlib.sha256(data).hexdigest() == entry["sha256"]:
        return None
    kind = "truncated" if len(data) < entry["bytes"] else "damaged"
    if not readable:
        return Problem(name, kind, f"{len(data)} bytes, not those that were committed")
    rows = dataset.shard_rows(name, ["key", "offset", "size", "crc32"]).to_pylist()
    bad = [r["key"] for r in rows if zlib.crc32(data[r["offset"] : r["offset"] + r["size"]]) != r["crc32"]]
    if not bad:
        return Problem(name, kind, f"every image of its {len(rows)} is whole, something beside them is not")
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return Problem(name, kind, f"{len(bad)} of {len(rows)} images are damaged: {', '.join(bad[:_NAMED])}{more}")


def _of_sidecars(dataset: index.Dataset, files: dict[str, int]) -> Iterator[Problem]:
    """Sidecars are functions of the dataset: they are made again aside, and compared."""
    kinds = [kind for kind in sidecars.KINDS if any(n in files for n in sidecars.names(dataset.info, [kind]))]
    with tempfile.TemporaryDirectory(prefix="millstream-verify-") as folder:
        for name in sidecars.write(folder, dataset, kinds) if kinds else ():
            if name not in files:
                yield Problem(name, "missing", "a sidecar; the same `millstream shard` writes it again")
            elif storage.read(storage.join(dataset.root, name)) != storage.read(os.path.join(folder, name)):
                yield Problem(name, "damaged", "a sidecar that is not what the shards ask for")


def repair(root: str, source_uri: str, problems: list[Problem]) -> list[Problem]:
    """Makes damaged and missing shards again from their source, sidecars too, and removes unknown files; returns what
    could not be repaired, the detail saying why. lease.Held: somebody is building there."""
    dataset, left = index.load(root), []
    with lease.claim(storage.join(root, ".lease"), "millstream verify"):
        entries = {entry["name"]: entry for entry in dataset.info["shards"]}
        broken = [problem for problem in problems if problem.file in entries]
        if broken:
            recipe = Recipe(**dataset.info["recipe"])
            listing = sources.list_items(source_uri, recipe.labels)
            items = changes.relabelled(listing, dataset.classes).items
            form = recipe.image(listing.format)
            for problem in broken:
                why = _remake(dataset, entries[problem.file], source_uri, items, form)
                left += [Problem(problem.file, problem.kind, why)] if why else []
        left += [problem for problem in problems if problem.file in _index_files(dataset.info)]
        storage.delete_tree(storage.join(root, WORK))
        prune.clear(root, dataset.info)
        if any(sidecars.is_sidecar(problem.file) for problem in problems):
            there = {file.path for file in storage.list_files(root)} | {problem.file for problem in problems}
            kinds = [kind for kind in sidecars.KINDS if there & set(sidecars.names(dataset.info, [kind]))]
            sidecars.write(root, dataset, kinds)
    return left


def _index_files(info: dict) -> set[str]:
    return {generation[kind] for generation in info["generations"] for kind in index.FILES}


def _remake(dataset: index.Dataset, entry: dict, uri: str, items: pa.Table, form: ImageRecipe) -> str | None:
    """Why the shard could not be made again, None if it was."""
    with contextlib.suppress(ValueError):
        wanted = dataset.shard_rows(entry["name"], ["source"])["source"]
        at = pc.index_in(wanted, value_set=items["name"].combine_chunks())
        if at.null_count:
            missing = wanted.filter(pc.is_null(at)).to_pylist()
            return f"{len(missing)} of its items are no longer in {uri}: {', '.join(missing[:_NAMED])}"
        aside = storage.join(dataset.root, WORK, "repair")
        job = Job(uri, aside, form, bool(dataset.classes), entry["generation"], entry["sha256"])
        shard.write(job, entry["name"].removesuffix(".tar"), entry["split"], items.take(at.combine_chunks()))
        data = storage.read(storage.join(aside, entry["name"]))
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            return f"its items in {uri} are not what they were: made again, it is another shard"
        storage.write(storage.join(dataset.root, entry["name"]), data)
        return None
    return "the index, which says what it held, is damaged too"
