"""Remote shards on this node's disk, in aligned blocks whatever the order they are read in: see `blocks`.

Cache(folder, limit).read_range(path, start, end, digest, size)    from disk, else from the store and kept
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import groupby

from pipeline import storage
from pipeline.loading.blocks import Blocks
from pipeline.loading.fetching import read_patiently


def default_folder() -> str:
    """$MILLSTREAM_CACHE, else $XDG_CACHE_HOME/millstream, else ~/.cache/millstream."""
    if folder := os.environ.get("MILLSTREAM_CACHE"):
        return folder
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "millstream")


def open_cache(root: str, where: str, gigabytes: float) -> "Cache | None":
    """The cache for a dataset at `root`; None if it is local, or where is "none". where: a folder, or "auto"."""
    if where == "none" or not storage.is_remote(root):
        return None
    return Cache(default_folder() if where == "auto" else where, int(gigabytes * 1e9))


class Cache:
    """Blocks of `block` bytes of shards in the local `folder`, at most about `limit` bytes; thread-safe.

    The second miss among `readahead` blocks side by side fetches the rest of them, too: few large requests cost a store
    and us half of what many small ones do, while a first batch, which takes a little of many shards, stays cheap.
    `hits`, `misses`: bytes asked for that were here, and that were not; `errors`: blocks found damaged and failures of
    the disk. A disk that is full, read-only or gone is warned of once, and reading goes on from the store.
    ValueError for a limit below one block and for a block size that is not a multiple of 64 KiB.
    """

    def __init__(self, folder: str, limit: int, block: int = 2 << 20, readahead: int = 4):
        self.folder, self.block, self.readahead, self.hits, self.misses = folder, block, readahead, 0, 0
        self._blocks = Blocks(folder, limit, block)
        self._lock, self._coming = threading.Lock(), {}  # name of a block -> Future of its bytes

    @property
    def errors(self) -> int:
        return self._blocks.errors

    def read_range(
        self,
        path: str,
        start: int,
        end: int,
        digest: str,
        size: int,
        fetch: Callable[[str, int, int], bytes] = read_patiently,
    ) -> bytes:
        """Bytes [start, end) of the shard at `path`, which has `size` bytes and the SHA-256 `digest` (hex).

        Blocks that are not here are asked of `fetch` whole, in one call for those that lie side by side; while nothing
        can be kept, just the range is. Raises what `fetch` raises, and ValueError for a range outside the shard.
        """
        if not 0 <= start <= end <= size:
            raise ValueError(f"{path}: no range [{start}, {end}) in a shard of {size} bytes")
        spans = {n: self._span(n, start, end) for n in self._numbers(start, end)}
        parts = {n: self._blocks.get(self._blocks.name(digest, n), *span) for n, span in spans.items()}
        missing = [n for n, part in parts.items() if part is None]
        missed = sum(spans[n][1] - spans[n][0] for n in missing)
        with self._lock:
            self.hits, self.misses = self.hits + end - start - missed, self.misses + missed
        if missing and self._blocks.keeps():
            for n, data in self._fetched(path, digest, size, self._ahead(missing, digest, size), fetch).items():
                if n in spans:
                    parts[n] = memoryview(data)[slice(*spans[n])]
        else:
            for run in _runs(missing):
                parts |= dict.fromkeys(run, b"")
                low, high = run[0] * self.block, (run[-1] + 1) * self.block
                parts[run[0]] = fetch(path, max(start, low), min(end, high))
        return b"".join(parts.values())  # no copy of one that is bytes

    def forget(self, start: int, end: int, digest: str) -> None:
        """Drops the blocks that hold bytes of [start, end): what failed its checksum is fetched again when wanted."""
        for n in self._numbers(start, end):
            self._blocks.drop(self._blocks.name(digest, n))

    def _numbers(self, start: int, end: int) -> range:
        return range(start // self.block, -(-end // self.block) if start < end else 0)

    def _ahead(self, missing: list[int], digest: str, size: int) -> list[int]:
        """`missing`, and what else is missing around those that have a neighbour here already."""
        wanted = set(missing)
        for group in {n // self.readahead for n in missing}:
            first = group * self.readahead
            around = range(first, min(first + self.readahead, -(-size // self.block)))
            names = {n: self._blocks.name(digest, n) for n in around if n not in wanted}
            absent = {n for n, name in names.items() if not self._blocks.has(name)}
            if len(absent) < len(names):
                with self._lock:
                    wanted |= {n for n in absent if names[n] not in self._coming}
        return sorted(wanted)

    def _span(self, n: int, start: int, end: int) -> tuple[int, int]:
        """The part of [start, end) that lies in block `n`, counted from where that begins."""
        return max(start - n * self.block, 0), min(end - n * self.block, self.block)

    def _fetched(self, path: str, digest: str, size: int, missing: list[int], fetch) -> dict[int, bytes | memoryview]:
        """The blocks `missing` whole, each fetched by the thread that comes first and kept; other threads wait for it.

        Nobody waits before its own blocks are there, so no two wait for each other.
        """
        names = {n: self._blocks.name(digest, n) for n in missing}
        with self._lock:
            others = {n: self._coming[name] for n, name in names.items() if name in self._coming}
            mine = {n: self._coming.setdefault(names[n], Future()) for n in missing if n not in others}
        try:
            for n, future in mine.items():  # one who fetched it may have finished between our look and our claim
                if (data := self._blocks.get(names[n], *self._span(n, 0, size))) is not None:
                    future.set_result(data)
            for run in _runs([n for n, future in mine.items() if not future.done()]):
                low = run[0] * self.block
                data = memoryview(fetch(path, low, min(low + len(run) * self.block, size)))
                for n in run:
                    piece = data[n * self.block - low :][: self.block]
                    self._blocks.put(names[n], piece)
                    mine[n].set_result(piece)
        except BaseException as e:
            for future in mine.values():
                if not future.done():
                    future.set_exception(e)
            raise
        finally:
            with self._lock:
                for n in mine:
                    del self._coming[names[n]]
        return {n: future.result() for n, future in (mine | others).items()}


def _runs(numbers: list[int]) -> Iterator[list[int]]:
    """Rising numbers, cut where they do not follow one another."""
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        yield [n for _, n in run]
