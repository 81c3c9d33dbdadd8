"""Which way up a picture is: the orientation tag of EXIF 2.32, read, applied and reset."""

import re
import warnings

import numpy as np
from PIL import Image

_TAG = 0x0112
_XMP = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")


def orientation(tiff: bytes, xmp: bytes = b"") -> int:
    """1 to 8, by Exif's TIFF structure or else by the XMP packet; 1 where there is none or it is broken."""
    found = _load(tiff).get(_TAG) if tiff else None
    if found is None and xmp and (match := _XMP.search(xmp)):
        found = int(match[1])
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def of(image: Image.Image) -> int:
    """The same of an opened image."""
    try:
        found = image.getexif().get(_TAG, 1)
    except Exception:  # broken metadata is no broken picture, and Pillow raises a dozen kinds over it
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def upright(tiff: bytes) -> bytes:
    """The same TIFF structure for pixels that were turned: orientation 1, no thumbnail. Empty if it is broken."""
    tags = _load(tiff)
    if not tags:
        return b""
    if _TAG in tags:
        tags[_TAG] = 1
    try:
        return tags.tobytes().removeprefix(b"Exif\0\0")
    except Exception:  # as above
        return b""


def _load(tiff: bytes) -> Image.Exif:
    tags = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken tags, which the others need not mind
            tags.load(b"Exif\0\0" + tiff)
    except Exception:  # as above
        tags.clear()
    return tags


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of (h, w, c) that is upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
