"""Local files: whole or absent, by writing beside the place and renaming."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from typing import BinaryIO

from pipeline.storage.paths import IN_FLIGHT, Conflict, File, partial

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}  # exFAT and some mounts of object stores


def list_files(root: str) -> Iterator[File]:
    folders = [("", ())]
    while folders:
        folder, above = folders.pop()
        try:
            info = os.stat(os.path.join(root, folder))
            if (info.st_dev, info.st_ino) in above:
                continue  # a link back up
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        folders.append((f"{folder}{entry.name}/", (*above, (info.st_dev, info.st_ino))))
                    elif not IN_FLIGHT.fullmatch(entry.name):
                        yield from _file(folder + entry.name, entry)
        except FileNotFoundError:  # a subfolder deleted while we list is no news
            if not folder:
                raise


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or one into a folder that is closed to us
        return False


def _file(path: str, entry: os.DirEntry) -> Iterator[File]:
    try:
        info = entry.stat()
        if stat.S_ISREG(info.st_mode):
            yield File(path, info.st_size, str(info.st_mtime_ns))
    except OSError:
        if entry.is_symlink():
            yield File(path, 0, "leads nowhere")


def exists(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def will_read(path: str) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO put in its place must not hold us up
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)


def read_range(path: str, start: int, end: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(fd, end - start, start)
        while len(data) < end - start and (more := os.pread(fd, end - start - len(data), start + len(data))):
            data += more  # one read stops at 2 GiB
        return data
    finally:
        os.close(fd)


def read_tagged(path: str) -> tuple[bytes, str]:
    data = read(path)
    return data, _digest(data)


def _digest(data: bytes) -> str:
    # Not the modification time: two writes within a tick of the kernel's clock share it.
    return hashlib.sha256(data).hexdigest()


def write(path: str, data: bytes) -> None:
    with writer(path) as file:
        file.write(data)


@contextlib.contextmanager
def writer(path: str) -> Iterator[BinaryIO]:
    with in_flight(path) as (file, temporary):
        yield file
        _settle(file)
        os.replace(temporary, path)


@contextlib.contextmanager
def in_flight(path: str) -> Iterator[tuple[BinaryIO, str]]:
    """A locked temporary file beside `path`, gone at the end unless it was renamed."""
    temporary, file = partial(path), None
    try:
        os.makedirs(os.path.dirname(temporary), exist_ok=True)
        while file is None or os.fstat(file.fileno()).st_nlink == 0:  # a sweep came between open and lock
            if file:
                file.close()
            file = open(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666), "wb")  # noqa: SIM115
            with contextlib.suppress(OSError):  # no locks on this file system: then nothing is swept either
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file, temporary
    except OSError as e:
        if e.filename == temporary or (e.filename is None and e.errno in _FULL):
            raise type(e)(e.errno, e.strerror, path) from e
        raise
    finally:
        if file:
            with contextlib.suppress(OSError):  # a full disk, met again while flushing
                file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_new(path: str, data: bytes) -> str:
    with in_flight(path) as (file, temporary):
        file.write(data)
        _settle(file)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise FileExistsError(errno.EEXIST, "exists", path) from None
        except OSError as e:
            if e.errno not in _NO_LINKS:
                raise
            with _locked_folder(path):
                if os.path.lexists(path):
                    raise FileExistsError(errno.EEXIST, "exists", path) from None
                os.replace(temporary, path)
    return _digest(data)


def replace(path: str, data: bytes, tag: str) -> str:
    with _unchanged(path, tag):
        write(path, data)
    return _digest(data)


@contextlib.contextmanager
def _unchanged(path: str, tag: str) -> Iterator[None]:
    with _locked_folder(path):
        if not exists(path) or read_tagged(path)[1] != tag:
            raise Conflict(f"{path} was changed by another process")
        yield


@contextlib.contextmanager
def _locked_folder(path: str) -> Iterator[None]:
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY)  # the folder itself is the lock: no file is left behind
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def delete(path: str, tag: str | None) -> None:
    with _unchanged(path, tag) if tag and exists(path) else contextlib.nullcontext():
        os.unlink(path)


def delete_tree(path: str) -> None:
    if os.path.abspath(path) == "/":
        raise ValueError("will not delete /")
    shutil.rmtree(path)


def sweep_partial(root: str) -> list[str]:
    removed = []
    for folder, _, names in os.walk(root):
        for left in (os.path.join(folder, name) for name in names if IN_FLIGHT.fullmatch(name)):
            # OSError: still locked by its writer, already gone, not ours to touch, or no locks here.
            with contextlib.suppress(OSError), open(left, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(left)
                removed.append(left)
    return removed


def filesystem(path: str):
    from fsspec.implementations.local import LocalFileSystem

    return LocalFileSystem(), os.path.abspath(path)
