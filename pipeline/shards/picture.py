"""The bytes of an image file -> its pixels: checked, decoded, upright, in sRGB. What cannot be is a typed `Reject`.

JPEG is decoded by simplejpeg (libjpeg-turbo, strict: it reports what libjpeg itself pads over in silence) and
everything else by Pillow, which also gets the JPEGs simplejpeg does not take (CMYK, stray bytes between markers).
What a file is, its content says, never its name.
"""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.shards import colour, exif, jpeg, png

MAX_PIXELS = 178_000_000  # Pillow's own line for "this is a decompression bomb"
MAX_BYTES = 256_000_000
MAX_SCANNED = 20 * MAX_PIXELS  # pixels times scans of a JPEG: a thousand empty scans are a bomb of time
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # never EPS: Pillow would run Ghostscript
Image.init()  # registers every plugin: `formats=` looks them up by name, and a bare import knows none of the rarer ones
# What `read` and the encoder say no with; then what is known before or beside the decoding.
REASONS = ("empty", "not_an_image", "truncated", "corrupt", "too_large", "unsupported")
REASONS += ("no_label", "duplicate", "unreadable")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_JPEG = b"\xff\xd8\xff"
_MAGIC = (_JPEG, b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"P4", b"P5", b"P6")
_OTHER_IMAGES = {
    b"8BPS": "Photoshop",
    b"%!PS": "PostScript",
    b"<svg": "SVG",
    b"\0\0\1\0": "an icon",
    b"\0\0\0\x0c": "JPEG 2000 or JPEG XL",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
_DAMAGE = ("premature end of data", "bad Huffman", "instead of RST")  # Pillow would hand out grey or garbled blocks


class Reject(Exception):
    """An input that cannot become a sample. reason: one of REASONS; detail: a sentence for a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Picture:
    """pixels: uint8 (h, w, 1 or 3), upright, sRGB, alpha over white; kind: jpg, png or other; animated: the first
    frame or page of several; exif: the TIFF structure of its metadata, may be empty; own(keep_metadata): the file
    itself as far as it is to be passed on, None unless a decoder gives exactly these pixels for it."""

    pixels: np.ndarray
    kind: str
    animated: bool = False
    exif: bytes = b""
    own: Callable[[bool], bytes] | None = None


def read(raw: bytes) -> Picture:
    """The picture in an image file. Raises Reject."""
    if not raw:
        raise Reject("empty", "0 bytes")
    if len(raw) > MAX_BYTES:
        raise Reject("too_large", f"{len(raw)} bytes, the limit is {MAX_BYTES}")
    parts = jpeg.walk(raw) if raw.startswith(_JPEG) else None
    if parts:
        if parts.crowded:
            raise Reject("too_large", f"a JPEG of more than {jpeg.MAX_SEGMENTS} segments")
        picture = _read_jpeg(raw, parts)
        if picture is not None:
            return picture
    chunks = png.walk(raw) if raw.startswith(png.SIGNATURE) else None
    if chunks and chunks.crowded:
        raise Reject("too_large", f"a PNG of more than {png.MAX_CHUNKS} chunks")
    if chunks and chunks.damaged:
        raise Reject("corrupt", f"checksum of {chunks.damaged} is wrong")
    if raw.startswith(b"RIFF"):
        _check_pixels(*_webp_size(raw))  # older Pillows make room for the canvas as they open the file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; the checks here decide
        return _read_any(raw, parts, chunks)


def _check_pixels(width: int, height: int, scans: int = 1) -> None:
    if width * height > MAX_PIXELS:
        raise Reject("too_large", f"{width} x {height} pixels, the limit is {MAX_PIXELS}")
    if scans > 1 and width * height * scans > MAX_SCANNED:
        raise Reject("too_large", f"{width} x {height} pixels in {scans} scans")


# ---- JPEG


def _read_jpeg(raw: bytes, parts: jpeg.Jpeg) -> Picture | None:
    """The fast road for JPEG; None where Pillow has to judge."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(raw, strict=False)
    except (ValueError, KeyError):  # KeyError: a colour space or subsampling that simplejpeg has no name for
        return None
    _check_pixels(width, height, jpeg.scans(raw, parts))
    if space not in ("YCbCr", "RGB", "Gray"):  # CMYK and YCCK: what Adobe inverted, only Pillow turns back
        return None
    try:
        pixels = simplejpeg.decode_jpeg(raw, "GRAY" if space == "Gray" else "RGB")
    except ValueError as error:
        message = str(error)
        if "Premature end of JPEG file" in message:
            raise Reject("truncated", message) from None
        if any(damage in message for damage in _DAMAGE):
            raise Reject("corrupt", message) from None
        return None
    tiff, profile = jpeg.exif(raw, parts), jpeg.profile(raw, parts)
    orientation = exif.orientation(tiff, jpeg.xmp(raw, parts))
    grey = pixels.shape[2] == 1
    if profile and colour.srgb_transform(profile, "L" if grey else "RGB") is not None:
        pixels = colour.array(colour.to_srgb(Image.fromarray(pixels[..., 0] if grey else pixels), profile))
    elif orientation == 1 and jpeg.passable(parts):
        return Picture(pixels, "jpg", exif=tiff, own=partial(jpeg.stripped, raw, parts))
    return Picture(exif.turn(pixels, orientation), "jpg", exif=tiff)


# ---- everything else


def _read_any(raw: bytes, parts: jpeg.Jpeg | None, chunks: png.Png | None) -> Picture:
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            _check_pixels(*image.size, jpeg.scans(raw, parts) if parts else 1)
            image.load()
            pixels, orientation = colour.array(colour.flat(image)), exif.of(image)
            animated = image.format != "MPO" and _of_several(image)  # an MPO's others are previews
            tiff = (image.info.get("exif") or b"").removeprefix(b"Exif\0\0")
            profile = image.info.get("icc_profile")
    except Reject:
        raise
    except colour.NotShown as error:
        raise Reject("unsupported", str(error)) from None
    except UnidentifiedImageError:
        raise _unidentified(raw, parts) from None
    except Image.DecompressionBombError as error:
        raise Reject("too_large", str(error)) from None
    except Exception as error:  # a hostile file makes Pillow raise nearly anything; each becomes a row of the rejects
        raise _broken(raw, error) from None
    kind = "jpg" if parts else "png" if chunks else "other"
    own = None
    if chunks and orientation == 1 and png.passable(raw, chunks):
        mode = "L" if pixels.shape[2] == 1 else "RGB"
        own = None if profile and colour.srgb_transform(profile, mode) else partial(png.stripped, raw, chunks)
    return Picture(exif.turn(pixels, orientation), kind, animated, tiff, own)


def _of_several(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # GIF looks for its second frame, which may be broken; the first one is all we take
        return True


def _broken(raw: bytes, error: Exception) -> Reject:
    message = str(error)
    detail = _ADDRESS.sub("", f"{type(error).__name__}: {message}")  # it goes into an index promised byte-identical
    if "Decompressed data too large" in message or isinstance(error, MemoryError):
        return Reject("too_large", detail)  # a text or profile that unpacks to more than Pillow allows
    if "truncated" in message or _ends_early(raw):
        return Reject("truncated", detail)
    return Reject("unsupported" if "nsupported" in message or "not supported" in message else "corrupt", detail)


def _unidentified(raw: bytes, parts: jpeg.Jpeg | None) -> Reject:
    if raw.startswith(_MAGIC):
        if parts and parts.whole and not (parts.bits == 8 and parts.process in (0, 1, 2)):
            return Reject("unsupported", f"a JPEG of process SOF{parts.process} and {parts.bits} bits")
        return Reject("truncated" if _ends_early(raw) else "corrupt", "begins as an image, but its header is broken")
    kind = _OTHER_IMAGES.get(raw[:4]) or (raw[4:8] == b"ftyp" and "HEIF, AVIF or video")
    if kind:
        return Reject("unsupported", f"{kind} is not read; convert it first")
    return Reject("not_an_image", f"begins with {raw[:8]!r}")


def _ends_early(raw: bytes) -> bool:
    """Whether the file is shorter than its own header or its missing end mark says."""
    if raw.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in raw
    if raw.startswith(b"\x89PNG"):
        return b"IEND" not in raw[-64:]
    if raw.startswith(b"GIF8"):
        return not raw.rstrip(b"\0").endswith(b";")
    if raw.startswith(b"RIFF"):
        return int.from_bytes(raw[4:8], "little") + 8 > len(raw)
    if raw.startswith((b"II*\0", b"MM\0*")):
        return int.from_bytes(raw[4:8], "little" if raw[:2] == b"II" else "big") + 2 > len(raw)
    return False


def _webp_size(raw: bytes) -> tuple[int, int]:
    """Width and height in a WebP's first chunk (RFC 9649); 0, 0 if that is none."""
    kind, word = raw[8:16], int.from_bytes(raw[24:27], "little")
    if kind == b"WEBPVP8X":
        return word + 1, int.from_bytes(raw[27:30], "little") + 1
    if kind == b"WEBPVP8L":
        bits = int.from_bytes(raw[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"WEBPVP8 ":
        return int.from_bytes(raw[26:28], "little") & 0x3FFF, int.from_bytes(raw[28:30], "little") & 0x3FFF
    return 0, 0
