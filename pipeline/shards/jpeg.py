"""A JPEG file by its markers (ITU-T T.81 annex B): what it holds, and the same coded picture without its metadata.

Nothing is decoded here. What is kept is what decoders look at: tables, frame, scans, JFIF and Adobe's APP14, which say
what the components mean. A decoder gives the very same pixels for a stripped file.
"""

import re
from dataclasses import dataclass

MAX_SEGMENTS = 100_000  # real files have a few dozen; beyond, walking them is what an attacker wants us to do
_SOS, _EOI, _APP0, _APP14, _COM = 0xDA, 0xD9, 0xE0, 0xEE, 0xFE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn; the others are tables
_BARE = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # have no length, and no business between segments
_SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # stuffed zeros and restart markers belong to the scan
_EXIF, _XMP, _ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"


@dataclass(frozen=True)
class Jpeg:
    """segments: (marker, start, end) in bytes, a scan's data with its header; process: n of SOFn (0 baseline, 1
    extended, 2 progressive), -1 without a frame; bits: of a component; whole: it reaches its end mark with nothing
    between its segments; crowded: more than MAX_SEGMENTS."""

    segments: tuple[tuple[int, int, int], ...]
    process: int
    bits: int
    whole: bool
    crowded: bool


def walk(raw: bytes) -> Jpeg:
    """The segments of a file that begins as a JPEG, as far as they make sense."""
    segments, process, bits, at = [], -1, 0, 2
    while len(segments) < MAX_SEGMENTS:
        while raw[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        marker = raw[at + 1] if raw[at : at + 1] == b"\xff" and at + 1 < len(raw) else 0
        if marker == _EOI:
            segments.append((marker, at, at + 2))
            return Jpeg(tuple(segments), process, bits, True, False)
        end = at + 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
        if marker in _BARE or end < at + 4 or end > len(raw):
            return Jpeg(tuple(segments), process, bits, False, False)
        if marker == _SOS:
            found = _SCAN_END.search(raw, end)
            end = found.start() if found else len(raw)
        elif marker in _FRAMES and process < 0 and end > at + 4:
            process, bits = marker - 0xC0, raw[at + 4]
        segments.append((marker, at, end))
        at = end
    return Jpeg(tuple(segments), process, bits, False, True)


def scans(raw: bytes, jpeg: Jpeg) -> int:
    """How many scans it has; of a broken file, how many it may have."""
    if jpeg.whole:
        return sum(marker == _SOS for marker, _, _ in jpeg.segments)
    return raw.count(b"\xff\xda")


def _payloads(raw: bytes, jpeg: Jpeg, marker: int, name: bytes) -> list[bytes]:
    start = len(name) + 4
    found = [(a, b) for kind, a, b in jpeg.segments if kind == marker]
    return [raw[a + start : b] for a, b in found if raw.startswith(name, a + 4, b)]


def exif(raw: bytes, jpeg: Jpeg) -> bytes:
    """The TIFF structure of its Exif, joined where it is spread over segments; empty if there is none."""
    return b"".join(_payloads(raw, jpeg, 0xE1, _EXIF))


def xmp(raw: bytes, jpeg: Jpeg) -> bytes:
    """The XMP packet, empty if there is none."""
    return b"".join(_payloads(raw, jpeg, 0xE1, _XMP)[:1])


def profile(raw: bytes, jpeg: Jpeg) -> bytes:
    """The ICC profile, put together by the numbers of its parts; empty if there is none."""
    return b"".join(part[2:] for part in sorted(_payloads(raw, jpeg, 0xE2, _ICC), key=lambda part: part[:1]))


def passable(jpeg: Jpeg) -> bool:
    """Whether every decoder can be expected to read it: 8 bits, Huffman-coded, nothing odd between the segments."""
    return jpeg.whole and jpeg.bits == 8 and jpeg.process in (0, 1, 2)


def stripped(raw: bytes, jpeg: Jpeg, keep_metadata: bool) -> bytes:
    """A passable file without metadata, thumbnails and what follows its end mark; its pixels stay what they are.

    keep_metadata leaves APPn and comments in, but for the list of further pictures (MPF): those lie behind the end.
    """
    kept, view = [raw[:2]], memoryview(raw)
    for marker, start, end in jpeg.segments:
        if keep_metadata:
            if not raw.startswith(b"MPF\0", start + 4):
                kept.append(view[start:end])
        elif marker == _APP0:
            if raw.startswith(b"JFIF\0", start + 4) and end >= start + 18:  # shorter ones are no JFIF to decoders
                kept.append(b"\xff\xe0\0\x10" + raw[start + 4 : start + 16] + b"\0\0")  # a thumbnail of 0 x 0
        elif marker == _APP14:
            if raw.startswith(b"Adobe", start + 4) and end >= start + 16:
                kept.append(b"\xff\xee\0\x0e" + raw[start + 4 : start + 16])
        elif not (_APP0 <= marker < _APP0 + 16 or marker == _COM):
            kept.append(view[start:end])
    return b"".join(kept)


def with_exif(raw: bytes, tiff: bytes) -> bytes:
    """A JPEG that begins with JFIF, with this Exif behind it. One too long for a segment is left out."""
    if not tiff or len(tiff) + len(_EXIF) + 2 > 0xFFFF:
        return raw
    after = 4 + int.from_bytes(raw[4:6], "big")
    segment = b"\xff\xe1" + (len(tiff) + len(_EXIF) + 2).to_bytes(2, "big") + _EXIF + tiff
    return raw[:after] + segment + raw[after:]
