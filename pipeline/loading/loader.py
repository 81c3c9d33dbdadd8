"""Tar shards -> batches, exactly as `order` says: plan a step, fetch its windows, verify, decode, augment.

    Loader(split, augment, seed, batching, rank, position)   endless training steps from `position` on
    fixed_batches(split, augment, size, rank, world)         evaluation: each sample once, in index order

Threads, not processes: the codecs release the GIL, and nothing is left behind by a kill. The state is one number, the
position; a loader made at any position costs the same, because every sample is found by index.
"""

import warnings
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline import storage
from pipeline.loading.augment import Augment, decode, fit, random_resized_crop, vary
from pipeline.loading.order import LANES, Batching, Order
from pipeline.shards.index import Split


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


@dataclass(frozen=True)
class Step:
    """One step's share of this rank: `micro_batches` in the order of their numbers `own`."""

    number: int
    own: range
    micro_batches: list[Batch]


@dataclass
class Reader:
    """Samples of a split as pixels. `quarantined` collects (shard, key, reason) of those that could not be read."""

    split: Split
    augment: Augment
    quarantine_limit: int = 100
    quarantined: dict[int, tuple[str, str, str]] = field(default_factory=dict)

    def stored(self, row: int) -> np.ndarray:
        """The image of a row as it is stored: uint8 (h, w, c). Raises ValueError if it is damaged."""
        data = self.fetch(row, row + 1)
        if zlib.crc32(data) != self.split.crc32[row]:
            raise ValueError(f"{self.split.shards[self.split.shard[row]]} is damaged at {self.split.keys[row]}")
        return decode(data, int(self.split.channels[row]))

    def fetch(self, start: int, end: int) -> bytes:
        """The bytes from row `start` to row `end` - 1, which lie in one shard: one ranged read."""
        split = self.split
        path = storage.join(split.root, split.shards[split.shard[start]])
        last = end - 1
        return storage.read_range(path, int(split.offset[start]), int(split.offset[last] + split.size[last]))

    def pixels(self, row: int, data: bytes, crc32: int, crop_key: tuple | None) -> np.ndarray | None:
        """The image of `row` from its bytes; None if it is bad, even fetched afresh."""
        side, channels = self.augment.image_size, self.augment.channels
        try:
            if zlib.crc32(data) != crc32:
                data = self.fetch(row, row + 1)
                if zlib.crc32(data) != crc32:
                    raise ValueError("its bytes do not match the checksum in the index")
            image = decode(data, channels)
            return fit(image, side) if crop_key is None else random_resized_crop(image, side, *crop_key)
        except ValueError as reason:
            self._quarantine(row, str(reason))
            return None

    def batch(
        self, rows: np.ndarray, starts: np.ndarray, windows, seed: int = 0, epochs: np.ndarray | None = None
    ) -> Batch:
        """Rows as a Batch. `windows`: for each row the bytes (or a Future of them) of a window that begins at row
        `starts`; epochs None: no augmenting. Raises ValueError when not one sample of it can be read.
        """
        side, channels, split = self.augment.image_size, self.augment.channels, self.split
        images = np.empty((len(rows), side, side, channels), np.uint8)
        weights = np.ones(len(rows), np.float32)
        cropping = epochs is not None and self.augment.crop == "resized"
        # As lists: indexing numpy arrays number by number would cost as much as decoding a small image.
        begins, ends = (
            split.offset[rows] - split.offset[starts],
            split.offset[rows] - split.offset[starts] + split.size[rows],
        )
        columns = (rows.tolist(), begins.tolist(), ends.tolist(), split.crc32[rows].tolist(), windows)
        for i, (row, begin, end, crc32, window) in enumerate(zip(*columns, strict=True)):
            window = window.result() if isinstance(window, Future) else window
            image = self.pixels(row, window[begin:end], crc32, (seed, int(epochs[i]), row) if cropping else None)
            if image is None:
                weights[i] = 0
            else:
                images[i] = image
        rows = self._stand_in(rows, images, weights)
        if epochs is not None:
            images = vary(images, self.augment, seed, epochs, rows)
        labels = torch.from_numpy(self.split.label[rows].astype(np.int64))
        return Batch(torch.from_numpy(images), labels, torch.from_numpy(weights), rows)

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
                f"{len(self.quarantined)} samples of {self.split.root} could not be read, the last {self._name(row)}: "
                f"the shards are damaged; shard them again"
            )

    def _name(self, row: int) -> str:
        return ", ".join(self.quarantined[row])


class Loader:
    """Endless steps of a split from `position` (samples seen, a multiple of the batch) on, for one rank.

    `augment` must have its image_size and channels resolved. `threads` decode; `ahead` steps are prepared in advance.
    """

    def __init__(
        self,
        split: Split,
        augment: Augment,
        seed: int,
        batching: Batching,
        rank: int = 0,
        position: int = 0,
        threads: int = 2,
        ahead: int = 6,
    ):
        if position % batching.batch:
            raise ValueError(f"position {position} is not a multiple of the batch {batching.batch}: steps begin there")
        self.split, self.seed, self.batching, self.rank = split, seed, batching, rank
        self.threads, self.ahead, self.step = threads, ahead, position // batching.batch
        self.order, self.reader = Order(split.counts, seed), Reader(split, augment)
        lanes = len(batching.own(rank)) * LANES // batching.micro_batches
        self._windows: OrderedDict[tuple[int, int], Future] = OrderedDict()
        self._most = 2 * lanes * self.order.open_windows + batching.batch  # twice those open, so none open is dropped

    def __iter__(self) -> Iterator[Step]:
        fetchers, decoders = ThreadPoolExecutor(max(4, self.threads)), ThreadPoolExecutor(self.threads)
        pending, own = deque(), self.batching.own(self.rank)
        try:
            while True:
                while len(pending) < self.ahead:
                    number = self.step + len(pending)
                    pending.append([self._prepare(number, j, fetchers, decoders) for j in own])
                step = Step(self.step, own, [future.result() for future in pending.popleft()])
                self.step += 1
                yield step
        finally:
            for pool in (decoders, fetchers):
                pool.shutdown(wait=False, cancel_futures=True)
            self._windows.clear()  # some were cancelled, and would fail whoever iterates again

    def _prepare(self, number: int, micro_batch: int, fetchers, decoders) -> Future:
        positions = self.batching.positions(number, micro_batch)
        rows, starts, ends = self.order.samples(positions)
        windows = []
        for window in zip(starts.tolist(), ends.tolist(), strict=True):
            future = self._windows.get(window)
            if future is None:
                future = self._windows[window] = fetchers.submit(self.reader.fetch, *window)
            self._windows.move_to_end(window)
            windows.append(future)
        while len(self._windows) > self._most:
            self._windows.popitem(last=False)
        return decoders.submit(self.reader.batch, rows, starts, windows, self.seed, positions // self.order.n)


def fixed_batches(
    split: Split, augment: Augment, size: int, rank: int = 0, world: int = 1, threads: int = 2
) -> Iterator[Batch]:
    """Evaluation batches: rows in index order cut into batches of `size`, batch k for rank k % world.

    The cut does not depend on the world size, and the last batch is filled up with weight-0 copies of its last row, so
    every computation has the same shape at every world size and each sample counts once. An unreadable sample is an
    error here: a score over fewer samples than it claims would be a lie.
    """
    reader = Reader(split, augment, quarantine_limit=0)
    starts = range(rank * size, len(split), world * size)

    def load(start: int) -> Batch:
        rows = np.arange(start, min(start + size, len(split)))
        starts, windows = np.empty_like(rows), []
        for shard in np.unique(split.shard[rows]):
            of_shard = rows[split.shard[rows] == shard]
            starts[of_shard - rows[0]] = of_shard[0]
            windows += [reader.fetch(int(of_shard[0]), int(of_shard[-1]) + 1)] * len(of_shard)
        missing = size - len(rows)
        rows, starts = (np.pad(numbers, (0, missing), mode="edge") for numbers in (rows, starts))
        batch = reader.batch(rows, starts, windows + windows[-1:] * missing)
        batch.weights[size - missing :] = 0
        return batch

    pool, pending = ThreadPoolExecutor(threads), deque()
    try:
        for start in starts:
            pending.append(pool.submit(load, start))
            if len(pending) > threads + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
