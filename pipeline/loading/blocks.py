"""A folder of checked blocks with a byte limit, shared by every process of a node that is given it.

    FOLDER/blocks/ab/abc..9-1048576-17   a block: the XXH3 of each of its 64 KiB pages, then its bytes
    FOLDER/blocks/partial/               written here, then renamed; what killed writers left is swept at the next start
    FOLDER/blocks/usage                  bytes of all blocks, counted by every process under a lock

A read checks the pages it touches, so what a power cut tore or the disk let rot is found, and nothing has to be synced.
Nothing else in FOLDER is touched.

When the limit is reached, blocks that nobody used since this process began go, those unused for longest first. What the
run uses stays, and its other blocks are not kept: an epoch is a cycle, in which the block unused for longest is the one
needed soonest, so plain LRU would throw each out just before it is read again.
"""

import contextlib
import fcntl
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator

import xxhash

from pipeline import storage
from pipeline.storage import local

_PAGE = 1 << 16
_NAME = re.compile(r"[0-9a-f]{64}-[0-9]+-[0-9]+")
_FRESH = 60.0  # seconds in which a block that is read again is not marked again
_LONG = 24 * 3600.0  # seconds after which a block may go although it was used since we began
_PAUSE = 300.0  # seconds between two looks for what could go, while nothing can


class Blocks:
    """Blocks of at most `block` bytes in the local `folder` (made with mode 0700), at most about `limit` bytes of them.

    Thread-safe. `errors` counts blocks found damaged and failures of the disk. A disk that is full, read-only or gone
    ends the writing with one warning; reading what is there goes on. ValueError for a limit below one block and for a
    block size that is not a multiple of 64 KiB.
    """

    def __init__(self, folder: str, limit: int, block: int):
        if block < _PAGE or block % _PAGE:
            raise ValueError(f"block size {block} is not a multiple of {_PAGE} bytes: use {1 << 20}")
        self._head = block // _PAGE * 8
        if limit < block + self._head:
            raise ValueError(f"a cache of {limit} bytes does not hold one block of {block}: give it more, or use none")
        self.limit, self.block, self.errors = limit, block, 0
        self._root, self._broken = os.path.join(folder, "blocks"), False
        self._began, self._full_until, self._lock = time.time(), 0.0, threading.Lock()
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            os.makedirs(f"{self._root}/partial", exist_ok=True)
            storage.sweep_partial(f"{self._root}/partial")
        except OSError as e:
            self._give_up(e)

    def name(self, digest: str, n: int) -> str:
        """What block `n` of the file of SHA-256 `digest` (hex) is called. ValueError if it is no such digest."""
        name = f"{digest}-{self.block}-{n}"
        if not _NAME.fullmatch(name):  # or a hostile dataset could name files anywhere
            raise ValueError(f"{digest!r} is not a SHA-256 in hex")
        return name

    def keeps(self) -> bool:
        """Whether `put` has a chance: the disk takes writes, and not all that is here is in use."""
        return not self._broken and time.monotonic() >= self._full_until

    def has(self, name: str) -> bool:
        """Whether a block is here, undamaged or not."""
        return os.path.exists(self._path(name))

    def get(self, name: str, low: int, high: int) -> bytes | None:
        """Bytes [low, high) of a block; None if it is not here, or not any more because it was damaged."""
        first, pages = low // _PAGE, -(-high // _PAGE) - low // _PAGE
        try:
            fd = os.open(self._path(name), os.O_RDONLY)
        except OSError:  # not here, or the folder is gone or closed to us
            return None
        try:
            sums = os.pread(fd, 8 * pages, 8 * first)
            data = os.pread(fd, _PAGE * pages, self._head + _PAGE * first)
            used = os.fstat(fd).st_mtime
            if used < self._began or time.time() - used > _FRESH:
                with contextlib.suppress(OSError):  # a folder that we may only read
                    os.utime(fd)
        except OSError:  # a sector that cannot be read
            data = sums = b""
        finally:
            os.close(fd)
        low, high = low - _PAGE * first, high - _PAGE * first
        if len(data) < high or _sums(data) != sums:
            self.drop(name)
            with self._lock:
                self.errors += 1
            return None
        return data[low:high]  # no copy where it is the whole

    def put(self, name: str, data: memoryview) -> None:
        """Keeps a block of at least one byte, if there is room for it or room can be made."""
        size = self._head + len(data)
        try:
            if self._use(size) > self.limit and not self._make_room(size):
                self._use(-size)
                return
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(self._path(name)))
            with local.in_flight(f"{self._root}/partial/{name}") as (file, temporary):
                file.write(_sums(data).ljust(self._head, b"\0"))
                file.write(data)
                file.flush()
                os.replace(temporary, self._path(name))
        except OSError as e:
            self._give_up(e)

    def drop(self, name: str) -> None:
        """Removes a block, if it is here."""
        with contextlib.suppress(OSError):  # gone already, or a folder that we may only read
            size = os.stat(self._path(name)).st_size
            os.unlink(self._path(name))
            self._use(-size)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name[:2]}/{name}"

    def _use(self, change: int) -> int:
        """Adds to the bytes in use, of which all processes keep one count, and returns them."""
        fd = os.open(f"{self._root}/usage", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):  # no locks on this file system: the count is rough then
                fcntl.flock(fd, fcntl.LOCK_EX)
            count = os.pread(fd, 8, 0)
            used = int.from_bytes(count, "little") if len(count) == 8 else sum(size for _, size, _ in self._found())
            used = max(0, used + change)
            os.pwrite(fd, used.to_bytes(8, "little"), 0)
            return used
        finally:
            os.close(fd)

    def _make_room(self, needed: int) -> bool:
        """Deletes what was unused for longest, down to nine tenths of the limit; False if `needed` bytes have no room.

        By one thread on the node at a time, the others meanwhile keep nothing. Corrects the count by the way, in which
        killed writers have left room that they took and did not fill.
        """
        fd = os.open(self._root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # no locks here
                pass
            counted, found = self._use(0), sorted(self._found())
            used = sum(size for _, size, _ in found) + needed
            change, goal = used - counted, max(self.limit * 9 // 10, needed)
            in_use = max(self._began, time.time() - _LONG)
            for last_used, size, path in found:
                if used <= goal or last_used >= in_use:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                used, change = used - size, change - size
            self._use(change)
        finally:
            os.close(fd)
        if used > self.limit:
            self._full_until = time.monotonic() + _PAUSE
        return used <= self.limit

    def _found(self) -> Iterator[tuple[float, int, str]]:
        """(last used, bytes, path) of every block here, in no order."""
        for folder in os.scandir(self._root):
            if re.fullmatch("[0-9a-f]{2}", folder.name):
                for entry in os.scandir(folder.path):
                    if _NAME.fullmatch(entry.name):
                        with contextlib.suppress(FileNotFoundError):  # another process dropped it
                            info = entry.stat(follow_symlinks=False)
                            yield info.st_mtime, info.st_size, entry.path

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            self.errors += 1
            first, self._broken = not self._broken, True
        if first:
            warnings.warn(f"the cache keeps nothing more, reading goes on from the store: {error}", stacklevel=2)


def _sums(data: bytes | memoryview) -> bytes:
    """The XXH3 (8 bytes) of each page of `data`."""
    pages = memoryview(data)
    return b"".join(xxhash.xxh3_64_digest(pages[at : at + _PAGE]) for at in range(0, len(pages), _PAGE))
