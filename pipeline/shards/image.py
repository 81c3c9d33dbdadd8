"""One image, bytes to bytes: check, decode, orient, to sRGB, shrink, encode. No files, no state.

What comes out is 8-bit greyscale or RGB, upright, without metadata; what cannot is a `Reject` that says why. A file
that needs no change keeps its own coded data: it is decoded in full all the same, since that is the check.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from pipeline.shards import exif, jpeg, picture
from pipeline.shards.picture import MAX_BYTES, MAX_PIXELS, REASONS, Reject

__all__ = ["MAX_BYTES", "MAX_PIXELS", "REASONS", "Encoded", "ImageRecipe", "Reject", "decode", "encode"]

FITS, FORMATS = ("short", "long", "crop", "none"), ("jpg", "png", "keep")
_JPEG_SIDE = 65_535  # the format's own limit
_STRIPE = 30_000  # pixels: fits the cache, and the heap's top stays, so that the next image finds its pages there


@dataclass(frozen=True)
class ImageRecipe:
    """size: in pixels, None: as it is; nothing is ever enlarged.
    fit: what `size` bounds: short (the short side), long (the long one), crop (the short one, of which the centre
    square is taken) or none (never resized).
    quality: of JPEG, 1 to 100; a JPEG passed through has whatever quality it had.
    format: jpg, png, or keep: JPEG stays JPEG and everything else becomes lossless PNG.
    keep_metadata: files passed through keep what they carry (not what follows their end mark, or further frames), and
    a JPEG encoded anew gets the source's Exif, orientation reset and thumbnail dropped. PNGs encoded anew get none.
    """

    size: int | None = None
    fit: str = "short"
    quality: int = 90
    format: str = "jpg"
    keep_metadata: bool = False

    def __post_init__(self):
        if self.size is not None and not 1 <= self.size <= 16_384:
            raise ValueError(f"size {self.size}: a side in pixels, 1 to 16384, or none")
        if self.fit not in FITS:
            raise ValueError(f"fit {self.fit!r}: one of {', '.join(FITS)}")
        if self.fit == "crop" and self.size is None:
            raise ValueError("fit 'crop': needs a size, the side of the square")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality}: JPEG quality is 1 to 100")
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r}: one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Encoded:
    """data: the file's bytes; extension: jpg or png; width, height in pixels; channels 1 or 3; sums, squares: exact,
    per channel, over the values 0..255 given to the encoder (or decoded from what is passed through); passed: `data`
    is the source's own coded data; animated: the source holds more frames or pages, this is its first."""

    data: bytes
    width: int
    height: int
    channels: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]
    extension: str
    passed: bool = False
    animated: bool = False


def encode(raw: bytes | np.ndarray, recipe: ImageRecipe) -> Encoded:
    """The sample made of `raw`: an image file's bytes, or pixels as uint8 (h, w, 1 or 3), RGB. Raises Reject."""
    source = picture.Picture(_checked(raw), "other") if isinstance(raw, np.ndarray) else picture.read(raw)
    extension = recipe.format if recipe.format != "keep" else "jpg" if source.kind == "jpg" else "png"
    pixels = fitted(source.pixels, recipe.size, recipe.fit)
    passed = source.own is not None and source.kind == extension and pixels is source.pixels
    pixels = np.ascontiguousarray(pixels)
    height, width, channels = pixels.shape
    if passed:
        data = source.own(recipe.keep_metadata)
    elif extension == "png":
        data = _png(pixels)
    else:
        data = _jpeg(pixels, recipe.quality)
        if recipe.keep_metadata and source.exif:
            data = jpeg.with_exif(data, exif.upright(source.exif))
    return Encoded(data, width, height, channels, *_sums(pixels), extension, passed, source.animated)


def decode(raw: bytes) -> np.ndarray:
    """Pixels of an image file: uint8 (h, w, 1 or 3), upright, sRGB, alpha over white, first frame. Raises Reject."""
    return picture.read(raw).pixels


def _checked(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}: uint8 (height, width, 1 or 3) is needed")
    return pixels


def _sums(pixels: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Exact whole numbers, so that statistics do not depend on who adds them up in which order.

    OpenCV sums bytes in whole numbers, but takes a root on the way to a sum of squares: rounding undoes that. Channel
    by channel in stripes this takes half of cv2.meanStdDev's time, a twentieth of the decoding.
    """
    height, width, channels = pixels.shape
    squares, rows = [0] * channels, max(1, _STRIPE // width)
    room = list(np.empty((channels, min(rows, height), width), np.uint8))
    for top in range(0, height, rows):
        stripe = pixels[top : top + rows]
        for c, plane in enumerate(cv2.split(stripe, room) if channels > 1 else (stripe,)):
            squares[c] += round(cv2.norm(plane, cv2.NORM_L2SQR))
    return tuple(int(s) for s in cv2.sumElems(pixels)[:channels]), tuple(squares)


def fitted(pixels: np.ndarray, size: int | None, fit: str) -> np.ndarray:
    """Pixels within `size` as ImageRecipe.fit says; `pixels` itself, the same object, where there is nothing to do."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if size is None or fit == "none":
        return pixels
    if fit == "crop" and height != width:
        top, left = (height - short) // 2, (width - short) // 2
        pixels = pixels[top : top + short, left : left + short]
        height = width = short
    bound = max(height, width) if fit == "long" else short
    if bound <= size:
        return pixels
    # In whole numbers, so that no machine rounds half a pixel its own way.
    target = [max(1, (2 * side * size + bound) // (2 * bound)) for side in (width, height)]
    smaller = cv2.resize(np.ascontiguousarray(pixels), target, interpolation=cv2.INTER_AREA)
    return smaller.reshape(target[1], target[0], pixels.shape[2])  # OpenCV drops an axis of one channel


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    if max(pixels.shape) > _JPEG_SIDE:
        height, width = pixels.shape[:2]
        raise Reject("unsupported", f"{width} x {height} pixels: a JPEG side is at most {_JPEG_SIDE}")
    if pixels.shape[2] == 1:
        return simplejpeg.encode_jpeg(pixels, quality, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", "420")


def _png(pixels: np.ndarray) -> bytes:
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.shape[2] == 3 else pixels
    done, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 4])
    assert done, "OpenCV could not write a PNG"
    return data.tobytes()
