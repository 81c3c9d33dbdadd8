"""Who may write: at most one live process holds the lease at a path.

Local: flock on the lease file. The kernel frees it with the process, so that a killed holder blocks nobody.
S3: an object created by a create-only write and renewed by compare-and-swap. Nobody compares clocks of two hosts:
a claimant watches the object for `ttl` seconds of its own clock and takes it over if its tag has not changed, by
compare-and-swap, so that one of several claimants wins; a holder that has not renewed for `ttl` seconds of its own
clock, counted from before the renewal was sent, knows itself lost before that can happen. (Gray and Cheriton 1989;
the token is the fencing token of Kleppmann 2016: what accepts writes by token can refuse one delayed past `check`.)
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable

from pipeline import storage

_DRIFT = 1.1  # a claimant watches this much longer than `ttl`: clocks of two hosts may run at different rates
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while the machine is suspended


class Held(RuntimeError):
    """Another process holds the lease; the message names its owner, host, pid and since when."""


class Lost(RuntimeError):
    """The lease is no longer ours: stop writing."""


class Lease:
    """What `claim` returns. `token` grows with each claim. As a context manager it is released at the end."""

    token: int

    def check(self) -> None:
        """Raise Lost if the lease is no longer ours. Call it before each commit; it costs no request."""
        raise NotImplementedError

    def release(self) -> None:
        """Give the lease up and remove its file or object. No error if it was lost."""
        raise NotImplementedError

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_) -> None:
        self.release()


def claim(path: str, owner: str, ttl: float = 30, waiting: Callable[[str], None] | None = None) -> Lease:
    """Take the lease at `path` (a file or object of its own) for `owner`, a name that people will recognise.

    `ttl` (seconds) matters on S3 alone: a holder that died less than about `ttl` ago must be waited out, and
    `waiting` is called with a line that says so; finding out that it lives takes up to a third of its `ttl`.

    Raises Held, ValueError (gs://), StorageError (a store that ignores conditional writes, or a file system without
    locks), or what storage raises.
    """
    if ttl <= 0:
        raise ValueError(f"ttl {ttl}: must be more than 0 seconds")
    return _Object(path, owner, ttl, waiting) if storage.is_remote(path) else _LockedFile(path, owner)


def _claimant(owner: str, previous: dict) -> dict:
    # Not just one more than the last: a released lease leaves nothing to count from.
    token = max(previous.get("token", 0) + 1, time.time_ns() // 1000)
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "since": since, "token": token}


def _parse(data: bytes) -> dict:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("token"), int) else {}


def _described(path: str, holder: dict) -> str:
    if not holder:
        return f"{path} is held by a process that has not given its name"
    return f"{path} is held by {holder['owner']} (host {holder['host']}, pid {holder['pid']}, since {holder['since']})"


# ---- local

_files: "weakref.WeakSet[_LockedFile]" = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A forked child shares the lock and would keep it after its parent's death."""
    for file in [file for file in _files if file.fd >= 0]:
        os.close(file.fd)
        file.fd = -1


os.register_at_fork(after_in_child=_let_go_in_child)


class _LockedFile(Lease):
    def __init__(self, path: str, owner: str):
        self.path, self.fd = path, -1
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        while not self._lock():  # released between our opening and our locking it
            os.close(self.fd)
        _files.add(self)
        try:
            content = _claimant(owner, _parse(os.pread(self.fd, 1 << 16, 0)))
            data = json.dumps(content).encode()
            os.pwrite(self.fd, data, 0)
            os.ftruncate(self.fd, len(data))
        except BaseException:
            self.release()
            raise
        self.token = content["token"]

    def _lock(self) -> bool:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _parse(os.pread(self.fd, 1 << 16, 0))
            os.close(self.fd)
            raise Held(_described(self.path, holder)) from None
        except OSError as e:
            os.close(self.fd)
            raise storage.StorageError(e.errno, f"no locks on this file system ({e.strerror})", self.path) from e
        return self._in_place()

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def check(self) -> None:
        if self.fd < 0 or not self._in_place():
            raise Lost(
                f"the lease {self.path} is no longer ours: released, its file removed, or this is a forked child"
            )

    def release(self) -> None:
        if self.fd < 0:
            return
        if self._in_place():
            os.unlink(self.path)  # before the lock goes, so that nobody locks a file about to vanish
        fd, self.fd = self.fd, -1
        os.close(fd)


# ---- S3

_probed: set[tuple[str | None, ...]] = set()


def probe(path: str) -> None:
    """StorageError if the store at `path` does not honour conditional writes, ValueError for gs://. Asks once."""
    if not storage.is_remote(path):
        return
    if path.startswith("gs://"):
        raise ValueError(f"{path}: leases need a local path or s3://, for their conditional writes")
    variables = map(os.environ.get, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    bucket = ("/".join(path.split("/")[:3]), *variables)
    if bucket in _probed:
        return
    trial = storage.partial(path)
    try:
        tag = storage.write_new(trial, b"1")
    except FileNotFoundError as error:  # no such bucket; the trial's own name would only puzzle
        raise FileNotFoundError(str(error).replace(trial, path)) from None
    try:
        with contextlib.suppress(FileExistsError):
            storage.write_new(trial, b"2")
            raise storage.StorageError(
                errno.EIO, "the store ignores If-None-Match, so a lease would not exclude anyone", path
            )
        with contextlib.suppress(storage.Conflict):
            storage.replace(trial, b"3", '"00000000000000000000000000000000"')
            raise storage.StorageError(
                errno.EIO, "the store ignores If-Match, so a lease would not exclude anyone", path
            )
        try:
            storage.replace(trial, b"4", tag)
        except storage.Conflict as e:
            raise storage.StorageError(5, "the store refuses If-Match with its own ETag", path) from e
    finally:
        storage.delete(trial)
    _probed.add(bucket)


class _Object(Lease):
    def __init__(self, path: str, owner: str, ttl: float, waiting: Callable[[str], None] | None):
        probe(path)
        self.path, self.pid, self.ttl, self.lost = path, os.getpid(), ttl, ""
        self.beat, self.nonce = 0, secrets.token_hex(8)
        while not self._take(owner, waiting):
            pass
        self.token = self.content["token"]
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._renew, name=f"lease {path}", daemon=True)
        self.thread.start()

    def _body(self) -> bytes:
        # Each is different from all others, so that its ETag is.
        return json.dumps(self.content | {"ttl": self.ttl, "nonce": self.nonce, "beat": self.beat}).encode()

    def _take(self, owner: str, waiting: Callable[[str], None] | None) -> bool:
        """Whether we have the lease; False to try again, because it was released meanwhile. Raises Held."""
        sent, self.content = time.clock_gettime(_CLOCK), _claimant(owner, {})
        try:
            self.tag = storage.write_new(self.path, self._body())
        except FileExistsError:
            try:
                data, tag = storage.read_tagged(self.path)
                holder = _parse(data)
                self._watch(holder, tag, waiting)
                sent, self.content = time.clock_gettime(_CLOCK), _claimant(owner, holder)
                self.tag = storage.replace(self.path, self._body(), tag)
            except FileNotFoundError:
                return False
            except storage.Conflict:  # it lives after all, was released, or another claimant was faster
                with contextlib.suppress(FileNotFoundError):
                    raise Held(_described(self.path, _parse(storage.read(self.path)))) from None
                return False
        self.until = sent + self.ttl
        return True

    def _watch(self, holder: dict, tag: str, waiting: Callable[[str], None] | None) -> None:
        """Return once the holder has been silent for its `ttl`; Held if it renews. FileNotFoundError if released."""
        patience = max(self.ttl, holder.get("ttl", 0)) * _DRIFT
        if waiting:
            waiting(f"{_described(self.path, holder)}; taking over in {patience:.0f} s unless it shows that it lives")
        end = time.clock_gettime(_CLOCK) + patience
        while (left := end - time.clock_gettime(_CLOCK)) > 0:
            time.sleep(min(left, max(0.1, self.ttl / 15)))
            data, now = storage.read_tagged(self.path)
            if now != tag:
                raise Held(_described(self.path, _parse(data)))

    def _renew(self) -> None:
        pause = self.ttl / 3
        while not self.done.wait(pause):
            sent, pause = time.clock_gettime(_CLOCK), self.ttl / 3
            if sent >= self.until:
                return
            self.beat += 1
            try:
                self.tag = storage.replace(self.path, self._body(), self.tag)
                self.until = sent + self.ttl
            except storage.Conflict:
                if not self._still_ours():
                    return
            except OSError:  # `check` judges by the time since the last success
                pause = self.ttl / 15

    def _still_ours(self) -> bool:
        """After a conflict: a renewal that seemed to fail may have arrived. Its tag is the one to go on from."""
        try:
            data, tag = storage.read_tagged(self.path)
        except FileNotFoundError:
            self.lost = "its object was removed"
            return False
        except OSError:
            return True  # not known: the next renewal asks again
        if _parse(data).get("nonce") == self.nonce:
            self.tag = tag
            return True
        self.lost = f"taken over: {_described(self.path, _parse(data))}"
        return False

    def check(self) -> None:
        if not self.lost and (self.done.is_set() or self.pid != os.getpid()):
            self.lost = "released, or inherited by a forked process"
        if not self.lost and time.clock_gettime(_CLOCK) >= self.until:
            self.lost = f"not renewed for {self.ttl} s"
        if self.lost:
            raise Lost(f"the lease {self.path} is no longer ours: {self.lost}")

    def release(self) -> None:
        if self.done.is_set() or self.pid != os.getpid():
            return
        self.done.set()
        self.thread.join(self.ttl)
        if not self.lost and time.clock_gettime(_CLOCK) < self.until:  # nobody else can have it
            with contextlib.suppress(storage.Conflict):
                storage.delete(self.path, self.tag)
