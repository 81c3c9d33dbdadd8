"""A PNG file by its chunks (ISO/IEC 15948): what it holds, and the same coded picture without its metadata."""

import zlib
from dataclasses import dataclass

MAX_CHUNKS = 100_000  # 256 MB in chunks of 8 KB are 32,000; empty ones would keep us busy for minutes
SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PICTURE = frozenset({b"IHDR", b"IDAT", b"IEND"})
_ANIMATION = frozenset({b"acTL", b"fcTL", b"fdAT"})
_DISPLAY_GAMMA = 45_455  # 1 / 2.2, in hundred thousandths


@dataclass(frozen=True)
class Png:
    """chunks: (name, start, end) in bytes; bits, colour: of its header; whole: it reaches IEND; damaged: the first
    chunk whose checksum is wrong, or None; crowded: more than MAX_CHUNKS."""

    chunks: tuple[tuple[bytes, int, int], ...]
    bits: int
    colour: int
    whole: bool
    damaged: str | None
    crowded: bool


def walk(raw: bytes) -> Png:
    """The chunks of a file that begins as a PNG, as far as they make sense."""
    chunks, damaged, at, view = [], None, len(SIGNATURE), memoryview(raw)
    bits, colour = (raw[24], raw[25]) if len(raw) > 25 else (0, 0)
    while len(chunks) < MAX_CHUNKS:
        name, end = raw[at + 4 : at + 8], at + 12 + int.from_bytes(raw[at : at + 4], "big")
        if end > len(raw) or len(name) < 4:
            return Png(tuple(chunks), bits, colour, False, damaged, False)
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(raw[end - 4 : end], "big"):
            damaged = damaged or repr(name)[2:-1]
        chunks.append((name, at, end))
        if name == b"IEND":
            return Png(tuple(chunks), bits, colour, True, damaged, False)
        at = end
    return Png(tuple(chunks), bits, colour, False, damaged, True)


def passable(raw: bytes, png: Png) -> bool:
    """Whether it holds 8-bit grey or RGB that needs nothing but decoding. An ICC profile is for the caller to judge."""
    names = {name for name, _, _ in png.chunks}
    gamma = next((int.from_bytes(raw[a + 8 : b - 4], "big") for name, a, b in png.chunks if name == b"gAMA"), None)
    odd_gamma = gamma is not None and abs(gamma - _DISPLAY_GAMMA) > 500
    unknown = any(name[:1].isupper() for name in names - _PICTURE - {b"PLTE"})
    plain = png.bits == 8 and png.colour in (0, 2)
    return png.whole and plain and not (png.damaged or odd_gamma or unknown or names & {b"tRNS", b"cICP"})


def stripped(raw: bytes, png: Png, keep_metadata: bool) -> bytes:
    """A passable file with nothing but its picture: of an animation the default image, which is what decoders show.

    keep_metadata leaves the rest in, but for the animation and what follows IEND.
    """
    kept = [memoryview(raw)[: len(SIGNATURE)]]
    for name, start, end in png.chunks:
        if name in _PICTURE or (keep_metadata and name not in _ANIMATION):
            kept.append(memoryview(raw)[start:end])
    return b"".join(kept)
