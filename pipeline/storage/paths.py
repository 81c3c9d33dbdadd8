"""What a path is, and what can go wrong at one."""

import os
import re
import secrets
from typing import NamedTuple

IN_FLIGHT = re.compile(r"\.millstream-[0-9a-f]{16}\.part")


class StorageError(OSError):
    """The store failed, after retries, or answered what it should not; `filename` is the path.

    errno EAGAIN: it did not answer, or said that it is busy; EIO: asking again would change nothing."""


class Conflict(RuntimeError):
    """`replace` found other content than its tag names."""


class File(NamedTuple):
    path: str  # relative to the listed folder, "/" between segments
    size: int
    tag: str  # changes when the content does: modification time in ns, or the store's ETag


def is_remote(path: str) -> bool:
    """Whether `path` is in an object store. ValueError for a scheme other than s3 and gs."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
    if scheme and scheme[1] not in ("s3", "gs"):
        raise ValueError(f"{path}: unknown scheme {scheme[1]}://; give a local path, s3://... or gs://...")
    return scheme is not None


def join(base: str, *parts: str) -> str:
    """`base/part/...`. ValueError for an absolute part or one that climbs: a name read from a file may be hostile."""
    for part in parts:
        if part.startswith("/") or ".." in part.split("/"):
            raise ValueError(f"{part!r} leads out of {base}")
    return "/".join([base.rstrip("/") if base != "/" else "", *(part.rstrip("/") for part in parts)])


def name(path: str) -> str:
    """The last segment of `path`."""
    return path.rstrip("/").rpartition("/")[2]


def partial(path: str) -> str:
    """A fresh name beside `path` that `list_files` skips. Its length does not grow with that of the name."""
    return f"{os.path.dirname(path) or '.'}/.millstream-{secrets.token_hex(8)}.part"
