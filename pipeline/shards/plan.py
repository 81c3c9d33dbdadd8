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

_SHUFFLE = draw.text_bits("shard order")
_KEY_BYTES = 10  # 20 hex characters: at 14 million samples two keys meet with a chance of 1 in 10 billion


@dataclass(frozen=True)
class Recipe:
    """How samples are made of a source."""

    size: int | None = None
    """Short side in px at most; smaller images are never enlarged. None: as they are."""
    quality: int = 90
    """JPEG quality, 1 to 100."""
    format: str = "auto"
    """jpg, png (lossless), or auto: jpg for files, png for sources of raw pixels."""
    samples_per_shard: int = 1000
    """Samples in a shard, at most; shards of a split are as good as equal."""
    val_fraction: float = 0.1
    """Share of train held out as val, by hash of the key, where the source names no val of its own."""
    seed: int = 0
    """Decides which samples share a shard."""
    labels: str = "auto"
    """auto: classes as the source has them. none: no classes, any folder of images (a GAN needs none)."""

    def __post_init__(self):
        """ValueError, naming the field, for a value that cannot be."""
        if self.format not in ("auto", "jpg", "png"):
            raise ValueError(f"format {self.format!r}: auto, jpg or png")
        self.image("jpg")
        if not 1 <= self.samples_per_shard <= 1_000_000:
            raise ValueError(f"samples_per_shard {self.samples_per_shard}: 1 to 1000000")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction {self.val_fraction}: at least 0 (no validation split) and below 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: a whole number from 0 below 2**63")
        if self.labels not in ("auto", "none"):
            raise ValueError(f"labels {self.labels!r}: auto (classes as the source has them) or none")

    def image(self, source_format: str) -> ImageRecipe:
        return ImageRecipe(self.size, self.quality, source_format if self.format == "auto" else self.format)


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


def plan(listing: Listing, recipe: Recipe) -> list[ShardPlan]:
    """The shards to write, sorted by split and name; every row of the listing is in exactly one.

    Each split is shuffled as a whole, so that every shard is a mix of all classes even for readers that only shuffle
    inside a shard, and cut into the fewest shards of at most `samples_per_shard`, equal to within one sample.
    """
    items = listing.items
    bits = key_bits(items["name"])
    plans = []
    for name, rows in split.assign(items["split"], bits, recipe.val_fraction).items():
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name):
            raise ValueError(f"split name {name!r}: a lower-case letter, then lower-case letters, digits or _")
        rows = rows[np.argsort(draw.bits(_SHUFFLE, recipe.seed, bits[rows]), kind="stable")]
        shards = -(-len(rows) // recipe.samples_per_shard)
        plans += [ShardPlan(f"{name}-{i:06d}", name, part) for i, part in enumerate(np.array_split(rows, shards))]
    return plans


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
