"""Reading on through a store's outage: a run of days must not end because the store was gone for a minute."""

import errno
import random
import threading
import time
import warnings

from pipeline import storage

PATIENCE = 120.0  # seconds without an answer
_LONGEST = 5.0  # seconds between attempts: what is lost once the store is back

_waiting = 0  # threads that wait now: the first of them warns
_counting = threading.Lock()


def read_patiently(
    path: str, start: int, end: int, patience: float = PATIENCE, stop: threading.Event | None = None
) -> bytes:
    """Bytes [start, end) of `path`, as `storage.read_range`, asked for again while its store does not answer.

    Waits double up to 5 s, with jitter. StorageError names `path` once `patience` seconds are over or `stop` is set;
    what waiting does not mend is raised at once: FileNotFoundError, PermissionError, a file that ends too early.
    Warns once an outage, however many threads meet it.
    """
    began, failed, stop = time.monotonic(), 0, stop or threading.Event()
    try:
        while True:
            try:
                return storage.read_range(path, start, end)
            except storage.StorageError as e:
                if e.errno != errno.EAGAIN:
                    raise
                waited = time.monotonic() - began
                if waited >= patience or stop.is_set():
                    raise storage.StorageError(e.errno, f"gave up after {waited:.0f} s: {e.strerror}", path) from e
                failed += 1
                if failed == 1 and _wait_with(1) == 1:
                    warnings.warn(f"waiting up to {patience:.0f} s for the store: {e.strerror}: {path}", stacklevel=2)
            stop.wait(min(0.2 * 2**failed, _LONGEST, max(patience - waited, 0.01)) * random.uniform(0.5, 1))
    finally:
        if failed:
            _wait_with(-1)


def _wait_with(change: int) -> int:
    global _waiting
    with _counting:
        _waiting += change
        return _waiting
