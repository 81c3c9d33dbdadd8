"""Bytes at a path: a local file or `s3://bucket/key` (plain reads and writes of `gs://` too, with gcsfs installed).

What appears, appears whole: local files by rename, objects by completed upload. `write_new` (create-only) and
`replace` (compare-and-swap) let several processes agree without a server; `lease.py` and the registry stand on them.

S3 is set up by the standard variables: AWS_ENDPOINT_URL(_S3), AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION.
Failures of a store come out as FileNotFoundError (missing key or bucket), PermissionError (names the variable to
set), or StorageError after retries; nothing of the client library's does. s3fs is imported at the first remote path,
so that local work does not pay for it.
"""

import contextlib
import errno
from collections.abc import Callable
from typing import BinaryIO

from pipeline.storage import local
from pipeline.storage.paths import Conflict, File, StorageError, is_remote, join, name, partial

__all__ = [
    "Conflict",
    "File",
    "StorageError",
    "change",
    "delete",
    "delete_tree",
    "exists",
    "filesystem",
    "is_remote",
    "join",
]
__all__ += ["list_files", "name", "partial", "read", "read_range", "read_tagged", "replace", "sweep_partial"]
__all__ += ["will_read", "write", "write_new", "writer"]

_CHANGES = 20


def _home(path: str):
    """The module that keeps `path`; both have the functions below."""
    if not is_remote(path):
        return local
    from pipeline.storage import objects

    return objects


def list_files(path: str) -> list[File]:
    """Every file below the folder or prefix `path`, sorted bytewise by path; our files in flight are left out.

    Local symbolic links are followed, except back into a folder that holds them. One that leads nowhere is listed
    with size 0, so that its reader can name it. FIFOs, sockets and devices are not listed.
    FileNotFoundError if the local folder or the bucket is missing; a prefix with nothing below it gives [].
    """
    return sorted(_home(path).list_files(path), key=lambda file: file.path.encode("utf-8", "surrogateescape"))


def exists(path: str) -> bool:
    """Whether a file (not a folder or prefix) is at `path`."""
    return _home(path).exists(path)


def read(path: str) -> bytes:
    """The whole file. FileNotFoundError if missing."""
    return _home(path).read(path)


def will_read(path: str) -> None:
    """Tells the kernel that a local file is about to be read, and returns at once; a missing one is no error yet."""
    local.will_read(path)


def read_range(path: str, start: int, end: int) -> bytes:
    """Bytes [start, end). StorageError if the file ends before `end`. Thread-safe; nothing is kept open."""
    if not 0 <= start <= end:
        raise ValueError(f"{path}: no such range [{start}, {end})")
    data = _home(path).read_range(path, start, end) if start < end else b""
    if len(data) != end - start:
        raise StorageError(errno.EIO, f"truncated: bytes {start} to {end} wanted, {len(data)} of them found", path)
    return data


def read_tagged(path: str) -> tuple[bytes, str]:
    """The whole file and the tag that `replace` compares (not that of `list_files`). FileNotFoundError if missing."""
    return _home(path).read_tagged(path)


def write(path: str, data: bytes) -> None:
    """Put `data` at `path`, replacing what was there in one step; makes the folders above it. OSError names `path`."""
    _home(path).write(path, data)


def writer(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """A binary file that is at `path` once the `with` block ends, and nowhere if it raises. No seeking in it.

    A killed process leaves nothing at `path`: locally a hidden file for `sweep_partial`, in a store an incomplete
    upload, which a lifecycle rule (AbortIncompleteMultipartUpload) removes. OSError (disk full) names `path`.
    """
    return _home(path).writer(path)


def write_new(path: str, data: bytes) -> str:
    """Create `path` with `data` and return its tag. FileExistsError if something is there: one racer wins."""
    return _home(path).write_new(path, data)


def replace(path: str, data: bytes, tag: str) -> str:
    """Put `data` at `path` if its content is still what `read_tagged` saw, and return the new tag; else Conflict."""
    return _home(path).replace(path, data, tag)


def change(path: str, new_of: Callable[[bytes | None], bytes]) -> bytes:
    """Put `new_of(what is there, None if nothing)` at `path`, by compare-and-swap, again until no other process came in
    between; returns what then stands there. Nothing is written where it is the same. Conflict after 20 times."""
    for _ in range(_CHANGES):
        try:
            old, tag = read_tagged(path)
        except FileNotFoundError:
            old = tag = None
        if (new := new_of(old)) == old:
            return new
        try:
            replace(path, new, tag) if tag else write_new(path, new)
            return new
        except (Conflict, FileExistsError):
            continue
    raise Conflict(f"{path} is changed all the time by other processes")


def delete(path: str, tag: str | None = None) -> None:
    """Remove the file; a missing one is fine. With a tag (see `read_tagged`), Conflict if the content is another.

    Stores without conditional deletes ignore the tag."""
    with contextlib.suppress(FileNotFoundError):
        _home(path).delete(path, tag)


def delete_tree(path: str) -> None:
    """Remove everything below `path`; missing is fine. Readers may see part of it meanwhile: delete a manifest first.

    ValueError for a whole bucket or disk."""
    with contextlib.suppress(FileNotFoundError):
        _home(path).delete_tree(path)


def sweep_partial(path: str) -> list[str]:
    """Remove what killed writers left in flight below the local folder `path` and return the paths removed.

    A writer holds a lock (flock) on its file in flight until it is in place, and the kernel drops the lock with the
    process: a file that can be locked has no writer. Nothing to do in a store: what is in flight there has no name.
    """
    return [] if is_remote(path) else local.sweep_partial(path)


def filesystem(path: str):
    """(fsspec filesystem, path inside it): for pyarrow and others. Picklable; holds no credentials."""
    return _home(path).filesystem(path)
