"""The shard format: a USTAR archive in which nothing depends on when, where or by whom it was written.

A sample is KEY.cls (its class as an ASCII number; absent when there are none), KEY.jpg or KEY.png, and KEY.json (flat,
the same fields in every sample), together and sorted by name. These are the rules webdataset, Ray Data, Hugging Face
datasets, Energon and DALI share: the key is ASCII without a dot, names have at most 99 characters, no PAX headers.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline import storage

BLOCK = 512
_RECORD = 20 * BLOCK  # tar pads archives to this
_MODE = b"0000644\0"
_IDS = b"0000000\0" * 2
_MTIME = b"00000000000\0"
_AFTER = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)  # from the type flag on
_PLAIN_SUM = sum(_MODE + _IDS + _MTIME + _AFTER) + 8 * 0x20  # the sum counts its own field as spaces


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a file of `size` bytes, as Python's tarfile writes them (USTAR, mode 644, all else zero).

    Filled into a template: tarfile takes 20 microseconds a header, as long as encoding a small image.
    ValueError: a name or size that not every reader takes.
    """
    text = name.encode("ascii", "replace")
    if len(text) > 99 or not name.isascii():
        raise ValueError(f"member name {name!r}: at most 99 ASCII characters")
    if size >= 8**11:
        raise ValueError(f"{name}: {size} bytes, a tar member has less than 8 GiB")
    length = b"%011o\0" % size
    checksum = b"%06o\0 " % (_PLAIN_SUM + sum(text) + sum(length))
    return b"".join((text.ljust(100, b"\0"), _MODE, _IDS, length, _MTIME, checksum, _AFTER))


@dataclass(frozen=True)
class Written:
    """bytes, sha256 (hex) of the whole file; offsets: for each sample {extension: (offset, size)} of the payloads."""

    bytes: int
    sha256: str
    offsets: list[dict[str, tuple[int, int]]]


def write_shard(path: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Written:
    """Writes (key, {extension: payload}) one after the other; the file appears when it is whole."""
    digest, position, offsets = hashlib.sha256(), 0, []
    with storage.writer(path) as file:
        for key, members in samples:
            pieces, where = [], {}
            for extension in sorted(members):
                payload = members[extension]
                where[extension] = (position + BLOCK, len(payload))
                padding = -len(payload) % BLOCK
                pieces += (header(f"{key}.{extension}", len(payload)), payload, bytes(padding))
                position += BLOCK + len(payload) + padding
            offsets.append(where)
            sample = b"".join(pieces)
            digest.update(sample)
            file.write(sample)
        end = bytes(2 * BLOCK + -(position + 2 * BLOCK) % _RECORD)
        digest.update(end)
        file.write(end)
    return Written(position + len(end), digest.hexdigest(), offsets)


def laid_out(sizes: Iterable[dict[str, int]]) -> list[dict[str, tuple[int, int]]]:
    """Where `write_shard` puts members of these sizes, {extension: bytes}: {extension: (offset, size)} a sample."""
    samples, position = [], 0
    for members in sizes:
        where = {}
        for extension in sorted(members):
            where[extension] = (position + BLOCK, members[extension])
            position += BLOCK + members[extension] + -members[extension] % BLOCK
        samples.append(where)
    return samples


def read_sample(path: str, offset: int, size: int) -> bytes:
    """One payload, by one ranged read."""
    return storage.read_range(path, offset, offset + size)


@dataclass(frozen=True)
class Sample:
    """What a shard says of one sample; offset and size of the image's bytes, extension jpg or png, label None or a
    class, facts: the .json member."""

    key: str
    extension: str
    offset: int
    size: int
    label: int | None
    facts: dict


def read_shard(path: str) -> Iterator[tuple[str, dict[str, tuple[int, int, bytes]]]]:
    """(key, {extension: (offset, size, payload)}) of each sample, from end to end. ValueError: it is damaged."""
    filesystem, inside = storage.filesystem(path)
    held: dict[str, tuple[int, int, bytes]] = {}
    current = None
    with filesystem.open(inside, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    key, _, extension = member.name.partition(".")
                    if key != current and held:
                        yield current, held
                        held = {}
                    current = key
                    held[extension] = (member.offset_data, member.size, archive.extractfile(member).read())
        except tarfile.TarError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    if held:
        yield current, held


def scan(path: str) -> Iterator[Sample]:
    """Reads a finished shard from end to end. ValueError: damaged, or not a shard of ours."""
    return (_sample(path, key, members) for key, members in read_shard(path))


def _sample(path: str, key: str, members: dict[str, tuple[int, int, bytes]]) -> Sample:
    images = [extension for extension in members if extension in ("jpg", "png")]
    if len(images) != 1 or "json" not in members:
        raise ValueError(f"{path}: sample {key!r} has {', '.join(members)}: an image and a .json are needed")
    offset, size, _ = members[images[0]]
    label = int(members["cls"][2]) if "cls" in members else None
    return Sample(key, images[0], offset, size, label, json.loads(members["json"][2]))
