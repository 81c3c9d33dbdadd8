"""What became of a source since a dataset was made of it: pure comparisons of its listing with what the index holds."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import draw
from pipeline.shards.index import SOURCES
from pipeline.sources.listing import Listing


@dataclass(frozen=True)
class Changes:
    """new: bool (items,), not in the dataset; changed: {row of the listing: what differs}; doubtful: int64, rows whose
    tag alone differs, so that only their content can tell; vanished: names the source no longer has."""

    new: np.ndarray
    changed: dict[int, str]
    doubtful: np.ndarray
    vanished: list[str]

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to add, to replace or to look at more closely."""
        return not (self.new.any() or self.changed or len(self.doubtful))


def relabelled(listing: Listing, known: tuple[str, ...]) -> Listing:
    """The listing with the labels the dataset gave its classes; classes it does not know follow, sorted.

    Labels of samples that are there never change: a class folder that sorts before others comes last all the same.
    """
    if not known or listing.classes == known:
        return listing
    more = sorted(set(listing.classes) - set(known))
    number = {name: label for label, name in enumerate((*known, *more))}
    table = np.array([number[name] for name in listing.classes], np.int32)
    labels = listing.items["label"].combine_chunks()
    moved = pa.array(table, pa.int32()).take(labels)
    at = listing.items.column_names.index("label")
    return Listing(listing.items.set_column(at, "label", moved), (*known, *more), listing.format)


def tags(items: pa.Table) -> np.ndarray:
    """A hash of each item's tag, uint64 (n,): a dataset holds no times."""
    return np.fromiter((draw.text_bits(tag or "") for tag in items["tag"].to_pylist()), np.uint64, len(items))


def compare(earlier: pa.Table, items: pa.Table) -> Changes:
    """earlier: SOURCES of all generations; items: ITEMS, labelled as the dataset is. Sizes and labels are compared, and
    tags; what only the tags deny is left as doubtful."""
    at = pc.index_in(items["name"], value_set=earlier["name"].combine_chunks()).combine_chunks()
    known = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
    old, now = earlier.take(at.drop_null()), items.take(pa.array(known))
    changed: dict[int, str] = {}
    for column, unit in (("size", " bytes"), ("label", "")):
        before, after = (table[column].fill_null(-1).to_numpy() for table in (old, now))
        for i in np.flatnonzero(before != after):
            changed.setdefault(int(known[i]), f"{column} {before[i]} -> {after[i]}{unit}")
    doubtful = known[old["tag"].to_numpy() != tags(now)]
    gone = pc.invert(pc.is_in(earlier["name"], value_set=items["name"].combine_chunks()))
    new = np.ones(len(items), bool)
    new[known] = False
    doubtful = doubtful[~np.isin(doubtful, list(changed))] if changed else doubtful
    return Changes(new, changed, doubtful, earlier["name"].filter(gone).to_pylist())


def content_changed(earlier: pa.Table, items: pa.Table, hashes: np.ndarray) -> dict[int, str]:
    """Of the items (rows of ITEMS) those whose content is not what was read when the dataset was made.

    hashes: void16 (n,), of what they hold now."""
    at = pc.index_in(items["name"], value_set=earlier["name"].combine_chunks())
    before = earlier["hash"].take(at).to_pylist()
    return {
        i: "the same size, other content" if old else "could not be read then, can be now"
        for i, (old, now) in enumerate(zip(before, hashes.tolist(), strict=True))
        if (old or bytes(16)) != now
    }


def sources_table(items: pa.Table, hashes: np.ndarray, near: np.ndarray | None) -> pa.Table:
    """SOURCES of these items. hashes: void16 (n,), zeros where nothing was read; near: uint64 (n,) or None."""
    unread = hashes == np.zeros(1, "V16")
    packed = pa.array([None if no else value for value, no in zip(hashes.tolist(), unread, strict=True)], pa.binary(16))
    columns = {name: items[name] for name in ("name", "label", "size")}
    columns |= {"tag": tags(items), "hash": packed}
    columns["near"] = pa.nulls(len(items), pa.uint64()) if near is None else pa.array(near, pa.uint64())
    return pa.table(columns, schema=SOURCES)
