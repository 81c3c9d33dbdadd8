"""Taking samples out of a dataset so that their bytes are gone for every reader.

Shards that held one are written anew, under new names, without it; so is the index of their generation. dataset.json
then names the new files, and the old ones are deleted. Killed in between, either the old dataset stands with some
strangers beside it, or the new one does: `clear` removes what dataset.json does not name.
"""

import re
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.shards import image, index, tar
from pipeline.shards.commit import Summary, file_names, index_file, write_info, write_table

_OURS = re.compile(r"[a-z][a-z0-9_]*-\d{6,}\.tar|index/\d{6,}[^/]*\.parquet")


def prune(root: str, dataset: index.Dataset, names: set[str], still_ours: Callable[[], None]) -> dict:
    """Rewrites what holds one of these source names; returns the new dataset.json. ValueError: nothing would be left.

    still_ours: called before each commit of a file; raises if the lease was lost."""
    info, gone = dataset.info, pa.array(sorted(names), pa.string())
    numbers, shards, generations = dict(info["next_shard"]), [], []
    seen = Summary(len(dataset.classes))
    for generation in info["generations"]:
        tables = {
            kind: index.read_columns(root, generation[kind], schema.names) for kind, schema in index.FILES.items()
        }
        left = {kind: _without(table, _NAMED[kind], gone) for kind, table in tables.items()}
        held = []
        for entry in (s for s in info["shards"] if s["generation"] == generation["generation"]):
            before, after = (
                table.filter(pc.equal(table["shard"], entry["name"])) for table in (tables["index"], left["index"])
            )
            if 0 < len(after) < len(before):
                still_ours()
                name = f"{entry['split']}-{numbers[entry['split']]:06d}.tar"
                numbers[entry["split"]] += 1
                entry, after = _rewritten(root, entry, after, name)
            if len(after):
                held.append((entry, after))
        held.sort(key=lambda pair: pair[0]["name"])
        shards += [entry for entry, _ in held]
        pieces = [rows for _, rows in held]
        seen.add_rejects(left["rejects"])
        if any(len(left[kind]) < len(tables[kind]) for kind in index.FILES):
            still_ours()
            generation = _new_index(root, generation, pieces, left, seen)
        else:
            for rows in pieces:
                seen.add_rows(rows)
        generations.append(generation)
    if not shards:
        raise ValueError(f"pruning would leave nothing of {root}: delete it instead")
    still_ours()
    made = write_info(root, seen, info, generations, shards, info["recipe"], dataset.classes)
    clear(root, made)
    return made


_NAMED = {"index": "source", "rejects": "source", "sources": "name"}  # the column that holds the source's name


def _without(table: pa.Table, column: str, names: pa.Array) -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table[column], value_set=names)))


def _new_index(root: str, generation: dict, pieces: list[pa.Table], left: dict[str, pa.Table], seen: Summary) -> dict:
    revision = generation.get("revision", 0) + 1
    files = file_names(generation["generation"], revision)
    with index_file(root, files["index"], pieces, seen):
        write_table(root, files["rejects"], left["rejects"])
        write_table(root, files["sources"], left["sources"])
    return generation | files | {"samples": sum(map(len, pieces)), "revision": revision}


def _rewritten(root: str, entry: dict, left: pa.Table, name: str) -> tuple[dict, pa.Table]:
    """(entry, rows) of the shard `name`, which holds the samples `left` of another, byte for byte.

    Its pixels are summed anew, as they are stored."""
    wanted = dict(zip(left["key"].to_pylist(), left["format"].to_pylist(), strict=True))
    pixels: dict[str, list] = {}

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for key, members in tar.read_shard(storage.join(root, entry["name"])):
            if key in wanted:
                contents = {extension: data for extension, (_, _, data) in members.items()}
                values = image.decode(contents[wanted[key]])
                image.add_sums(pixels, values.shape[2], image.pixel_sums(values))
                yield key, contents

    written = tar.write_shard(storage.join(root, name), samples())
    offsets = [members[form][0] for members, form in zip(written.offsets, wanted.values(), strict=True)]
    for column, values in (("offset", offsets), ("shard", [name] * len(left))):
        at = left.column_names.index(column)
        left = left.set_column(at, index.SCHEMA.field(column), pa.array(values, index.SCHEMA.field(column).type))
    more = {"name": name, "samples": len(left), "bytes": written.bytes, "sha256": written.sha256, "pixels": pixels}
    return entry | more, left


def strangers(files: Iterable[str], info: dict) -> list[str]:
    """Shards and index files among `files` that dataset.json does not name."""
    named = {shard["name"] for shard in info["shards"]}
    named |= {generation[kind] for generation in info["generations"] for kind in index.FILES}
    return [path for path in files if path not in named and _OURS.fullmatch(path)]


def clear(root: str, info: dict) -> None:
    """Removes strangers: what a prune replaced, or one that was killed left."""
    for path in strangers([file.path for file in storage.list_files(root)], info):
        storage.delete(storage.join(root, path))
