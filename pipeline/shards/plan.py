"""Which sample goes into which shard: a pure function of the listing and the recipe. No files, no Ray."""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import draw
from pipeline.shards import split
from pipeline.shards.image import ImageRecipe
from pipeline.sources.listing import Listing

_SHUFFLE, _BLOCKS = (draw.text_bits(use) for use in ("shard order", "block order"))
_WINDOW = 8  # blocks that are mixed with each other
_KEY_BYTES = 10  # 20 hex characters: at 14 million samples two keys meet with a chance of 1 in 10 billion


@dataclass(frozen=True)
class Recipe:
    """How samples are made of a source."""

    size: int | None = None
    """Side in px at most, as --fit takes it; smaller images are never enlarged. none: as they are."""
    fit: str = "short"
    """Which side --size bounds: short, long; crop: the short one, then the centre square; none: nothing is resized."""
    quality: int = 90
    """JPEG quality, 1 to 100, of what is encoded anew. A JPEG that needs no change keeps its own coded data."""
    format: str = "auto"
    """jpg, png (lossless), keep (JPEG stays JPEG, the rest becomes png), or auto: jpg for files, png for raw pixels."""
    keep_metadata: bool = False
    """Leave EXIF, GPS and comments in files that are passed through; they are dropped otherwise."""
    samples_per_shard: int = 1000
    """Samples in a shard, at most; shards of a split are as good as equal."""
    bytes_per_shard: int = 1_000_000_000
    """Source bytes in a shard, at most."""
    shuffle: bool = True
    """Mix the whole split over its shards, so that each holds all classes. --no-shuffle: in the source's order."""
    val_fraction: float = 0.1
    """Share of train held out as val, by hash of the key, where the source names no val of its own."""
    seed: int = 0
    """Decides which samples share a shard."""
    labels: str = "auto"
    """auto: classes as the source has them. none: no classes, any folder of images (a GAN needs none)."""
    dedup: str = "none"
    """exact: of items with the same bytes one is kept. near: of images that look the same, too (perceptual hash)."""

    def __post_init__(self):
        """ValueError, naming the field, for a value that cannot be."""
        if self.format not in ("auto", "jpg", "png", "keep"):
            raise ValueError(f"format {self.format!r}: auto, jpg, png or keep")
        self.image("jpg")
        if not 1 <= self.samples_per_shard <= 1_000_000:
            raise ValueError(f"samples_per_shard {self.samples_per_shard}: 1 to 1000000")
        if self.bytes_per_shard < 1:
            raise ValueError(f"bytes_per_shard {self.bytes_per_shard}: at least 1")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction {self.val_fraction}: at least 0 (no validation split) and below 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: a whole number from 0 below 2**63")
        if self.labels not in ("auto", "none"):
            raise ValueError(f"labels {self.labels!r}: auto (classes as the source has them) or none")
        if self.dedup not in ("none", "exact", "near"):
            raise ValueError(f"dedup {self.dedup!r}: none, exact or near")

    def image(self, source_format: str) -> ImageRecipe:
        form = source_format if self.format == "auto" else self.format
        return ImageRecipe(self.size, self.fit, self.quality, form, self.keep_metadata)


@dataclass(frozen=True)
class ShardPlan:
    """name: train-000000; rows: int64, positions in the listing's items, in the order they are written."""

    name: str
    split: str
    rows: np.ndarray


def key(name: str) -> str:
    """The sample's key in shards and index: 20 hex characters of BLAKE2b of its name."""
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=_KEY_BYTES).hexdigest()


def key_bits(names: pa.ChunkedArray) -> np.ndarray:
    """The first 64 bits of each key as a number, uint64 (n,). ValueError: two names, or their keys, are the same."""
    found = np.empty(len(names), dtype=np.uint64)
    for start in range(0, len(names), 1 << 20):  # a million Python strings at a time
        part = names[start : start + (1 << 20)].to_pylist()
        digests = b"".join(hashlib.blake2b(n.encode(), digest_size=_KEY_BYTES).digest()[:8] for n in part)
        found[start : start + len(part)] = np.frombuffer(digests, dtype=">u8")
    order = np.argsort(found, kind="stable")
    same = np.flatnonzero(found[order[1:]] == found[order[:-1]])
    for a, b in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
        if key(names[a].as_py()) == key(names[b].as_py()):
            raise ValueError(f"{names[a].as_py()!r} and {names[b].as_py()!r} have the same key: rename one of them")
    return found


def plan(
    listing: Listing, recipe: Recipe, wanted: np.ndarray | None = None, numbers: dict[str, int] | None = None
) -> list[ShardPlan]:
    """The shards to write, sorted by split and name; every wanted row of the listing is in exactly one.

    wanted: bool (rows of the listing,), default all; the splits are those of the whole listing either way.
    numbers: {split: number of its first shard}, default 0.

    Each split is shuffled as a whole, so that every shard is a mix of all classes even for readers that only shuffle
    inside a shard, and cut into shards within `samples_per_shard` and `bytes_per_shard`, equal to within one sample.
    Items of blocks (row groups of a table), which are read whole, are mixed within windows of blocks drawn at random:
    `_windowed` says how far.
    """
    items, plans = listing.items, []
    bits, sizes = key_bits(items["name"]), items["size"].to_numpy()
    blocks = None if items["block"].null_count else items["block"].to_numpy()
    for name, rows in split.assign(items["split"], bits, recipe.val_fraction).items():
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name):
            raise ValueError(f"split name {name!r}: a lower-case letter, then lower-case letters, digits or _")
        rows = rows if wanted is None else rows[wanted[rows]]
        if recipe.shuffle:
            order = [draw.bits(_SHUFFLE, recipe.seed, bits[rows])]
            if blocks is not None:
                order.append(_windowed(blocks[rows], recipe))
            rows = rows[np.lexsort(order)]
        first = (numbers or {}).get(name, 0)
        parts = _cut(rows, sizes, recipe)
        plans += [ShardPlan(f"{name}-{first + i:06d}", name, part) for i, part in enumerate(parts)]
    return plans


def _windowed(blocks: np.ndarray, recipe: Recipe) -> np.ndarray:
    """The window of each row, int64 (n,): blocks are permuted and taken eight at a time, or as many as fill a shard.

    A shard then reads about a window of blocks, where rows drawn from everywhere would have it read nearly all. How
    well a sorted table comes out mixed depends on that; `inspect` measures it.
    """
    present, nth = np.unique(blocks, return_inverse=True)
    window = max(_WINDOW, -(-recipe.samples_per_shard * len(present) // max(1, len(blocks))))
    return np.argsort(draw.permutation(len(present), _BLOCKS, recipe.seed))[nth] // window


def _cut(rows: np.ndarray, sizes: np.ndarray, recipe: Recipe) -> list[np.ndarray]:
    """Rows in the fewest near-equal parts that keep both caps (a single item may exceed the one on bytes)."""
    if not len(rows):
        return []
    shards = -(-len(rows) // recipe.samples_per_shard)
    ends = np.concatenate([[0], np.cumsum(sizes[rows])])
    while True:
        counts = np.full(shards, len(rows) // shards)
        counts[: len(rows) % shards] += 1
        bounds = np.concatenate([[0], np.cumsum(counts)])
        largest = int(np.diff(ends[bounds]).max())
        if largest <= recipe.bytes_per_shard or shards == len(rows):
            return [rows[a:b] for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
        shards = min(len(rows), max(shards + 1, int(shards * largest / recipe.bytes_per_shard)))


def fingerprint(listing: Listing) -> str:
    """SHA-256 (hex) over names, labels, splits, sizes and class names: which source this was, wherever it lies.

    Tags are left out: copying a folder or touching a file changes times, not images.
    """
    items = listing.items
    lengths, text, rest = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for column in (items["name"], pc.fill_null(items["split"], "")):
        for chunk in column.chunks:
            lengths.update(pc.binary_length(chunk).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            text.update(memoryview(chunk.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    rest.update(pc.fill_null(items["label"], -1).to_numpy().astype("<i4").tobytes())
    rest.update(items["size"].to_numpy().astype("<i8").tobytes())
    rest.update("\0".join(listing.classes).encode())
    return hashlib.sha256(lengths.digest() + text.digest() + rest.digest()).hexdigest()
