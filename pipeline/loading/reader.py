"""Rows of a split -> a batch of pixels: fetched, verified, decoded and augmented; what is bad is set aside by name.

One call makes one batch in one thread. Where most of the time goes, the codecs release the GIL; what is left to Python
is done once a batch, in numpy, where it can be.
"""

import threading
import time
import warnings
import weakref
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from pipeline import storage
from pipeline.loading import augment as aug
from pipeline.loading.augment import Augment
from pipeline.loading.cache import Cache
from pipeline.loading.fetching import read_patiently
from pipeline.loading.kept import Kept
from pipeline.shards.index import Split

_ROOM = 16 << 20  # bytes of one thread's decoded image; larger ones get memory of their own
_mine = threading.local()


@dataclass(frozen=True)
class Batch:
    """Samples that are computed together, a micro-batch of a step or a batch of an evaluation.

    images: uint8 (n, side, side, channels); labels: int64 (n,), -1 without classes; weights: float32 (n,), 0 where a
    neighbour stands in for a sample that went bad or fills up the last batch; rows: int64 (n,), samples of the split.
    """

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    rows: np.ndarray


class Buffers:
    """Memory for the images of batches, filled again once nobody holds the batch: what a caller keeps, stays.

    pinned: page-locked, so that a GPU copies from it without waiting. A copy that is still under way does not count as
    holding: keep the batch until it has finished.
    """

    def __init__(self, pinned: bool = False):
        self.pinned = pinned
        self._free: dict[tuple, list[torch.Tensor]] = {}

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 of this shape, holding anything."""
        free = self._free.setdefault(shape, [])
        try:
            kept = free.pop()
        except IndexError:
            kept = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pinned)
        lent = kept.numpy()
        weakref.finalize(lent, free.append, kept).atexit = False
        return lent


@dataclass
class Reader:
    """Samples of a split as pixels. `quarantined` collects {row: (shard, key, reason)} of those that could not be read;
    more than `quarantine_limit` are an error. `augment` must have its image_size and channels resolved."""

    split: Split
    augment: Augment
    quarantine_limit: int = 100
    buffers: Buffers = field(default_factory=Buffers)
    cache: Cache | None = None
    quarantined: dict[int, tuple[str, str, str]] = field(default_factory=dict)
    closed: threading.Event = field(default_factory=threading.Event)  # ends the waiting for a store that is gone

    def __post_init__(self):
        self.kept = Kept(self.split, self.augment.channels)

    def stored(self, row: int) -> np.ndarray:
        """The image of a row as it is stored: uint8 (h, w, c). Raises ValueError if it is damaged."""
        data = self.fetch(row, row + 1)
        if zlib.crc32(data) != self.split.crc32[row]:
            raise ValueError(f"{self.split.shards[self.split.shard[row]]} is damaged at {self.split.keys[row]}")
        return aug.decode(data, int(self.split.channels[row]))

    def fetch(self, start: int, end: int) -> bytes:
        """The bytes from row `start` to row `end` - 1, which lie in one shard: one ranged read."""
        path, begin, stop, shard = self._where(start, end)
        if not storage.is_remote(path):
            return storage.read_range(path, begin, stop)
        patiently = partial(read_patiently, stop=self.closed)
        if self.cache:
            where = self.split.digests[shard], self.split.shard_bytes[shard]
            return self.cache.read_range(path, begin, stop, *where, patiently)
        return patiently(path, begin, stop)

    def _where(self, start: int, end: int) -> tuple[str, int, int, int]:
        """(path, first byte, byte after the last, shard) of rows `start` to `end` - 1."""
        split, shard = self.split, int(self.split.shard[start])
        stop = int(split.offset[end - 1] + split.size[end - 1])
        return split.path(split.shards[shard]), int(split.offset[start]), stop, shard

    def batch(
        self,
        rows: np.ndarray,
        starts: np.ndarray,
        windows: Sequence[bytes | Future],
        seed: int = 0,
        epochs: np.ndarray | None = None,
        side: int = 0,
    ) -> tuple[Batch, float]:
        """(rows as a Batch, seconds it waited for bytes).

        windows: for each row the bytes (or a Future of them) of a window that begins at row `starts`, anything if the
        row is kept; epochs: int64 (n,), `Order.epochs`, None: no augmenting; side: of the images, 0: as `augment` has
        it. ValueError when not one sample of the batch can be read, or more than the limit cannot.
        """
        augment, split = self.augment, self.split
        evaluating = epochs is None
        side = side or (evaluating and augment.eval_size) or augment.image_size
        short = round(side / augment.eval_share) if evaluating else side
        images = self.buffers.take((len(rows), side, side, augment.channels))
        weights = np.ones(len(rows), np.float32)
        boxes, mirrored = [None] * len(rows), [False] * len(rows)
        cropping = epochs is not None and augment.crop == "resized"
        if cropping:
            boxes = aug.crop_boxes(split.height[rows], split.width[rows], seed, epochs, rows).tolist()
            if augment.flip:
                mirrored = aug.flips(seed, epochs, rows).tolist()
        missing, waited = np.arange(len(rows)), 0.0
        if (known := self.kept.has(rows)).any():
            missing = np.flatnonzero(~known)
            self._place_kept(images, rows, np.flatnonzero(known), boxes, mirrored, short)
        # As lists: indexing numpy arrays number by number would cost as much as decoding a small image.
        begins = split.offset[rows] - split.offset[starts]
        ends = (begins + split.size[rows]).tolist()
        room = _room()
        columns = rows.tolist(), begins.tolist(), ends, split.crc32[rows].tolist(), boxes, mirrored
        for i in missing.tolist():
            row, begin, end, crc32, box, flip = (column[i] for column in columns)
            window = windows[i]
            if isinstance(window, Future):
                if not window.done():
                    waited -= time.perf_counter()
                    window.result()
                    waited += time.perf_counter()
                window = window.result()
            data = memoryview(window)[begin:end]
            try:
                if zlib.crc32(data) != crc32:
                    data = self._again(row, crc32)
                self._place(images[i], row, data, room, box, flip, short)
            except ValueError as reason:
                self._quarantine(row, str(reason))
                weights[i] = 0
            except Exception as error:
                error.add_note(f"at sample {split.keys[row]} of {split.path(split.shards[split.shard[row]])}")
                raise
        rows = self._stand_in(rows, images, weights)
        if epochs is not None and not cropping:
            images = aug.vary(images, augment, seed, epochs, rows)
        if epochs is not None:
            images = aug.recolour(images, augment, seed, epochs, rows)
        labels = torch.from_numpy(split.label[rows].astype(np.int64))
        return Batch(torch.from_numpy(images), labels, torch.from_numpy(weights), rows), waited

    def _place(
        self, out: np.ndarray, row: int, data, room: np.ndarray, box: list[int] | None, mirrored: bool, short: int
    ) -> None:
        """Decodes into `out`, uint8 (side, side, c): the area `box`, or the centre, the short side at `short` px."""
        shrink, side = 1, len(out) if box else short
        # What is kept is kept whole: shrunk by one epoch's crop, it would not do for the next one's.
        if data[:2] == aug.JPEG and not (self.augment.exact_decode or self.kept.keeps):
            shrink = aug.shrinkable(*(box[2:] if box else aug.jpeg_size(data)), side)
        image = aug.decode(data, out.shape[2], shrink, room)
        self.kept.put(row, image)
        if box and shrink > 1:
            box = [number // shrink for number in box]
        _draw(out, image, box, mirrored, short)

    def _place_kept(
        self, images: np.ndarray, rows: np.ndarray, at: np.ndarray, boxes: list, mirrored: list, short: int
    ) -> None:
        if boxes[at[0]] is None and images.shape[1:3] == self.kept.size == (short, short):
            images[at] = self.kept.get(rows[at])
            return
        for i in at.tolist():
            _draw(images[i], self.kept.get(rows[i]), boxes[i], mirrored[i], short)

    def _again(self, row: int, crc32: int) -> bytes:
        """A sample that did not match its checksum, fetched afresh. ValueError: nor does it now."""
        if self.cache:
            _, begin, stop, shard = self._where(row, row + 1)
            self.cache.forget(begin, stop, self.split.digests[shard])
        data = self.fetch(row, row + 1)
        if zlib.crc32(data) != crc32:
            raise ValueError("its bytes do not match the checksum in the index")
        return data

    def _stand_in(self, rows: np.ndarray, images: np.ndarray, weights: np.ndarray) -> np.ndarray:
        bad = np.flatnonzero(weights == 0)
        if not len(bad):
            return rows
        good = np.flatnonzero(weights)
        if not len(good):
            raise ValueError(f"no sample of a whole batch can be read; the first: {self._name(int(rows[0]))}")
        neighbour = good[np.searchsorted(good, bad) % len(good)]
        images[bad], rows = images[neighbour], rows.copy()
        rows[bad] = rows[neighbour]
        return rows

    def _quarantine(self, row: int, reason: str) -> None:
        shard = self.split.shards[self.split.shard[row]]
        if row not in self.quarantined:
            self.quarantined[row] = (shard, str(self.split.keys[row]), reason)
            warnings.warn(f"sample set aside: {self._name(row)}", stacklevel=2)
        if len(self.quarantined) > self.quarantine_limit:
            raise ValueError(
                f"{len(self.quarantined)} samples of {self.split.root or 'the mixture'} could not be read, the last "
                f"{self._name(row)}: the shards are damaged; shard them again"
            )

    def _name(self, row: int) -> str:
        return ", ".join(self.quarantined[row])


def _room() -> np.ndarray:
    if not hasattr(_mine, "room"):
        _mine.room = np.empty(_ROOM, np.uint8)
    return _mine.room


def _draw(out: np.ndarray, image: np.ndarray, box: list[int] | None, mirrored: bool, short: int) -> None:
    if box:
        aug.crop_into(image, box, mirrored, out)
    else:
        out[:] = aug.fit(image, len(out), short)
