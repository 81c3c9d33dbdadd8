"""Where the members of a tar lie: read off its headers, local or in a store, without unpacking.

USTAR, GNU and PAX long names and sizes, as https://www.gnu.org/software/tar/manual/html_node/Standard.html and POSIX
pax(1) lay them out. Python's tarfile seeks in one open file and takes three times as long a header; here a tar may lie
inside another, several threads read one file, and what lies between two headers is fetched only if both fit a window.
"""

import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pipeline import storage

BLOCK = 512
LOCAL_WINDOW = 32 << 10  # bytes a read: a disk seeks soon, so the images between headers are passed over
REMOTE_WINDOW = 8 << 20  # in the time a store takes to answer it sends a megabyte or more
_SMALL = 1 << 20  # longer names, and longer members asked for, are no names and no labels
_END = bytes(BLOCK)
_FILES = (b"0", b"\0", b"7")
_WITHOUT_PAYLOAD = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, whatever size they state


class Member(NamedTuple):
    """A file in a tar. offset: of its first byte in the file that was scanned; data: its bytes, if they were wanted."""

    name: str
    offset: int
    size: int
    data: bytes | None


def scan(
    path: str, start: int, end: int, wanted: Callable[[str], bool] | None = None, window: int | None = None
) -> Iterator[Member]:
    """The regular files of the tar that is bytes [start, end) of `path`, as they lie; links and folders are left out.

    wanted: of which members (by name, up to 1 MiB) the bytes are given as well; window: bytes fetched at a time.
    Names that are not UTF-8 have their odd bytes spelled out (`\\xff`). ValueError: damaged, cut short or no tar.
    """
    window = window or (REMOTE_WINDOW if storage.is_remote(path) else LOCAL_WINDOW)
    held, held_at = b"", start

    def piece(offset: int, size: int) -> bytes:
        nonlocal held, held_at
        if not held_at <= offset <= offset + size <= held_at + len(held):
            held_at, held = offset, storage.read_range(path, offset, min(end, offset + max(size, window)))
        return held[offset - held_at : offset - held_at + size]

    at, told = start, {}  # told: what extended headers say of the next member
    while at < end:
        block = piece(at, min(BLOCK, end - at))
        if block == _END:
            return
        name, kind, size = _header(block, path, at, at == start)
        if "size" in told:
            size = int(told["size"]) if told["size"].isdecimal() else -1
        payload = 0 if kind in _WITHOUT_PAYLOAD else size
        at += BLOCK
        extends = kind in (b"L", b"K", b"x", b"X", b"g")
        if payload < 0 or (extends and payload > _SMALL):
            raise _damaged(path, at - BLOCK, f"a header of {size} bytes")
        if at + payload > end:
            raise _damaged(path, at - BLOCK, f"{name} has {payload} bytes, {end - at} are left: cut short?")
        if kind == b"L":
            told["path"] = _text(piece(at, size).split(b"\0", 1)[0])
        elif kind in (b"x", b"X"):
            told |= _records(piece(at, size), path, at)
        elif not extends:
            if kind == b"S" or "GNU.sparse.major" in told:
                raise _damaged(path, at - BLOCK, f"{name} is a sparse file, which is not read: pack it without -S")
            name = told.get("path", name)
            if kind in _FILES and not name.endswith("/"):
                yield Member(name, at, size, piece(at, size) if wanted and size <= _SMALL and wanted(name) else None)
            told = {}
        at += payload + -payload % BLOCK


def _header(block: bytes, path: str, at: int, first: bool) -> tuple[str, bytes, int]:
    """(name, type flag, size)."""
    try:
        if len(block) < BLOCK:
            raise tarfile.HeaderError
        stated, sums = tarfile.nti(block[148:156]), sum(block) - sum(block[148:156]) + 8 * 0x20
        if stated != sums and stated not in tarfile.calc_chksums(block):  # old tars summed signed bytes
            raise tarfile.HeaderError
        size = tarfile.nti(block[124:136])
    except tarfile.HeaderError:
        if first and block[:2] == b"\x1f\x8b":
            raise ValueError(f"{path} is compressed: only a plain tar is read by offset, so gunzip it first") from None
        if first:
            raise ValueError(f"{path} holds no tar at byte {at}: it begins with {block[:8].hex(' ')}") from None
        raise _damaged(path, at, "no header, or one whose checksum is wrong") from None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name), block[156:157], size


def _records(data: bytes, path: str, at: int) -> dict[str, str]:
    """PAX's `LENGTH KEY=VALUE` lines."""
    records = {}
    while data.strip(b"\0"):
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) + 3 <= int(length) <= len(data) or b"=" not in rest:
            raise _damaged(path, at, f"no PAX record: {data[:20]!r}")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        data = data[int(length) :]
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _damaged(path: str, at: int, what: str) -> ValueError:
    return ValueError(f"{path} is damaged at byte {at}: {what}")
