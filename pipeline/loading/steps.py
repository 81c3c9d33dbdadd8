"""Tar shards -> batches, exactly as `order` says: plan a step, fetch its windows, verify, decode, augment.

    Steps(split, augment, seed, batching, rank, position)   endless training steps from `position` on
    fixed_batches(split, augment, size, rank, world)         evaluation: each sample once, in index order

Threads, not processes: the codecs release the GIL, and nothing is left behind by a kill. The state is one number, the
position; a start at any position costs the same, because every sample is found by index.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.loading.augment import Augment
from pipeline.loading.cache import Cache
from pipeline.loading.order import LANES, Batching
from pipeline.loading.reader import Batch, Buffers, Reader
from pipeline.loading.selection import Chosen, Draws
from pipeline.shards.index import Split

__all__ = ["Batch", "Reader", "Step", "Steps", "fixed_batches"]
_FETCHERS, _LOCAL_FETCHERS = 32, 4  # reads under way at once: a store is far away


@dataclass(frozen=True)
class Step:
    """One step's share of this rank: `micro_batches` in the order of their numbers `own`."""

    number: int
    own: range
    micro_batches: list[Batch]


class _Windows:
    """Bytes of windows, fetched once and dropped when the last of their samples was drawn."""

    def __init__(self, most: int):
        self.most = most  # a start inside an epoch leaves windows that are never used up
        self._held: OrderedDict[tuple[int, int], list] = OrderedDict()  # [Future, samples still to be drawn]

    def get(self, windows: list[tuple[int, int]], fetch) -> list[Future]:
        found = []
        for window in windows:
            held = self._held.get(window)
            if held is None:
                held = self._held[window] = [fetch(window), window[1] - window[0]]
            held[1] -= 1
            found.append(held[0])
            if held[1] == 0:
                del self._held[window]
            else:
                self._held.move_to_end(window)
        while len(self._held) > self.most:
            self._held.popitem(last=False)
        return found

    def clear(self) -> None:
        self._held.clear()


class Steps:
    """Endless steps of a split from `position` (samples seen, a multiple of the batch) on, for one rank.

    `augment` must have its image_size and channels resolved. `threads` decode; `ahead` steps are prepared in advance
    (None: enough to keep the threads busy); cache: for shards in a store; pinned: as `Buffers` has it; draws: how often
    epochs hold each row, None: once.
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
        ahead: int | None = None,
        cache: Cache | None = None,
        pinned: bool = False,
        draws: Draws | None = None,
    ):
        if position % batching.batch:
            raise ValueError(f"position {position} is not a multiple of the batch {batching.batch}: steps begin there")
        self.split, self.seed, self.batching, self.rank = split, seed, batching, rank
        self.threads, self.step = threads, position // batching.batch
        self.ahead = ahead or 1 + -(-(threads + 1) // len(batching.own(rank)))
        self.order = Chosen(split, draws, None).order(seed)
        self.reader = Reader(split, augment, buffers=Buffers(pinned), cache=cache)
        lanes = len(batching.own(rank)) * LANES // batching.micro_batches
        self._windows = _Windows(lanes * self.order.open_windows * 3 // 2 + batching.batch)
        self._seconds = {"planning": 0.0, "waiting": 0.0, "consumer": 0.0, "fetch": 0.0, "decode": 0.0}

    def __iter__(self) -> Iterator[Step]:
        remote = any(storage.is_remote(self.split.path(shard)) for shard in self.split.shards)
        fetchers = ThreadPoolExecutor(_FETCHERS if remote else _LOCAL_FETCHERS)
        decoders = ThreadPoolExecutor(self.threads)
        self.reader.closed = closed = threading.Event()
        pending, own, clock = deque(), self.batching.own(self.rank), time.perf_counter
        spent = self._seconds
        try:
            while True:
                begin = clock()
                while len(pending) < self.ahead:
                    number = self.step + len(pending)
                    pending.append([self._prepare(number, j, fetchers, decoders) for j in own])
                planned = clock()
                made = [future.result() for future in pending.popleft()]
                ready = clock()
                spent["planning"] += planned - begin
                spent["waiting"] += ready - planned
                for _, fetched, decoded in made:
                    spent["fetch"] += fetched
                    spent["decode"] += decoded
                step = Step(self.step, own, [batch for batch, *_ in made])
                del made
                self.step += 1
                yield step
                del step  # its buffers are free as soon as the caller has no more use for them
                spent["consumer"] += clock() - ready
        finally:
            closed.set()
            for pool in (decoders, fetchers):
                pool.shutdown(wait=False, cancel_futures=True)
            self._windows.clear()  # some were cancelled, and would fail whoever iterates again

    @property
    def position(self) -> int:
        """Samples seen: all there is to save, and what goes on from here is made with."""
        return self.step * self.batching.batch

    def report(self) -> dict:
        """Where time went so far, in seconds: `waiting` (the consumer waited for a batch), `consumer` (it was busy),
        `planning` (it drew the order), and summed over the threads `fetch` (decoders waited for bytes) and `decode`;
        `set_aside`: bad samples; of a cache its `hits` and `misses` in bytes, and `errors`."""
        cache = self.reader.cache
        counted = {"hits": cache.hits, "misses": cache.misses, "errors": cache.errors} if cache else {}
        return self._seconds | {"set_aside": len(self.reader.quarantined)} | counted

    def _prepare(self, number: int, micro_batch: int, fetchers, decoders) -> Future:
        positions = self.batching.positions(number, micro_batch)
        rows, starts, ends = self.order.samples(positions)
        windows = [None] * len(rows)
        if not self.reader.kept.has(rows).all():
            places = list(zip(starts.tolist(), ends.tolist(), strict=True))
            windows = self._windows.get(places, lambda window: fetchers.submit(self.reader.fetch, *window))
        # One side for all of a step, whose samples may be of two epochs.
        side = self.reader.augment.side(number * self.batching.batch // self.order.n)
        return decoders.submit(self._make, rows, starts, windows, self.order.epochs(positions), side)

    def _make(self, rows, starts, windows, epochs, side) -> tuple[Batch, float, float]:
        begin = time.perf_counter()
        batch, waited = self.reader.batch(rows, starts, windows, self.seed, epochs, side)
        return batch, waited, time.perf_counter() - begin - waited


def fixed_batches(
    split: Split,
    augment: Augment,
    size: int,
    rank: int = 0,
    world: int = 1,
    threads: int = 2,
    cache: Cache | None = None,
) -> Iterator[Batch]:
    """Evaluation batches: rows in index order cut into batches of `size`, batch k for rank k % world.

    The cut does not depend on the world size, and the last batch is filled up with weight-0 copies of its last row, so
    every computation has the same shape at every world size and each sample counts once. An unreadable sample is an
    error here: a score over fewer samples than it claims would be a lie.
    """
    reader = Reader(split, augment, quarantine_limit=0, cache=cache)
    starts = range(rank * size, len(split), world * size)

    def load(start: int) -> Batch:
        rows = np.arange(start, min(start + size, len(split)))
        starts, windows = np.empty_like(rows), []
        for piece in np.split(rows, 1 + np.flatnonzero(~split.joined(rows[:-1], rows[1:]))):
            starts[piece - rows[0]] = piece[0]
            windows += [reader.fetch(int(piece[0]), int(piece[-1]) + 1)] * len(piece)
        missing = size - len(rows)
        rows, starts = (np.pad(numbers, (0, missing), mode="edge") for numbers in (rows, starts))
        batch, _ = reader.batch(rows, starts, windows + windows[-1:] * missing)
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
        reader.closed.set()
        pool.shutdown(wait=False, cancel_futures=True)
