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

__all__ = ["MAX_BYTES", "MAX_PIXELS", "REASONS", "Encoded", "ImageRecipe", "Reject"]
__all__ += ["add_sums", "decode", "encode", "pixel_sums"]

FITS, FORMATS = ("short", "long", "crop", "none"), ("jpg", "png", "keep")
_JPEG_SIDE = 65_535  # the format's own limit
_SUMMED_ROWS = 64


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
    """data: the file's bytes; extension: jpg or png; width, height in pixels; channels 1 or 3; summed: `pixel_sums` of
    what the encoder was given (or was decoded from what is passed through); passed: `data` is the source's own coded
    data; animated: the source holds more frames or pages, this is its first."""

    data: bytes
    width: int
    height: int
    channels: int
    summed: tuple[int, list[int], list[int]]
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
    return Encoded(data, width, height, channels, pixel_sums(pixels), extension, passed, source.animated)


def decode(raw: bytes) -> np.ndarray:
    """Pixels of an image file: uint8 (h, w, 1 or 3), upright, sRGB, alpha over white, first frame. Raises Reject."""
    return picture.read(raw).pixels


def _checked(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}: uint8 (height, width, 1 or 3) is needed")
    return pixels


def pixel_sums(pixels: np.ndarray) -> tuple[int, list[int], list[int]]:
    """(pixels counted, sums, squared sums by channel) over uint8 (h, w, c), for the mean and std of a dataset.

    Of a picture of 128 rows or more every second is counted, from 192 on every third, and so on: rows are much like
    their neighbours, and all of them would take a tenth of the decoding. Exact whole numbers, so that statistics do
    not depend on who adds them up in which order: OpenCV sums bytes in whole numbers, but takes a root on the way to
    a sum of squares, which rounding undoes.
    """
    rows = pixels[:: max(1, len(pixels) // _SUMMED_ROWS)]
    planes = cv2.split(rows) if pixels.shape[2] > 1 else (np.ascontiguousarray(rows),)
    sums = cv2.sumElems(rows)[: pixels.shape[2]]
    return planes[0].size, [int(s) for s in sums], [round(cv2.norm(plane, cv2.NORM_L2SQR)) for plane in planes]


def add_sums(total: dict[str, list], channels: int, summed: tuple[int, list[int], list[int]]) -> None:
    """Adds `pixel_sums` of a picture to those of a shard, {channels: [count, sums, squared sums]}."""
    there = total.setdefault(str(channels), [0, [0] * channels, [0] * channels])
    there[0] += summed[0]
    for kind in (1, 2):
        there[kind] = [a + b for a, b in zip(there[kind], summed[kind], strict=True)]


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
