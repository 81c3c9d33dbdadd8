"""One image, bytes to bytes: check, decode, orient, to sRGB, shrink, encode. No files, no state.

What comes out is 8-bit greyscale or RGB, upright, without metadata; what cannot is a `Reject` that says why. JPEG is
decoded by simplejpeg (libjpeg-turbo, strict: it reports what libjpeg itself pads over in silence) and everything else
by Pillow, which also gets the JPEGs simplejpeg does not take (CMYK, stray bytes between markers).
"""

import io
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageCms, UnidentifiedImageError

MAX_PIXELS = 178_000_000  # Pillow's own line for "this is a decompression bomb"
MAX_BYTES = 256_000_000
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # never EPS: Pillow would run Ghostscript
Image.init()  # registers every plugin: `formats=` looks them up by name, and a bare import knows none of the rarer ones
REASONS = ("empty", "not_an_image", "truncated", "corrupt", "too_large", "unsupported")
_JPEG_SIDE = 65_535  # the format's own limit
_ORIENTATION = 0x0112
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"P4", b"P5", b"P6")
_OTHER_IMAGES = {
    b"8BPS": "Photoshop",
    b"%!PS": "PostScript",
    b"<svg": "SVG",
    b"\0\0\1\0": "an icon",
    b"\0\0\0\x0c": "JPEG 2000 or JPEG XL",
}


class Reject(Exception):
    """An input that cannot become a sample. reason: one of REASONS; detail: a sentence for a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ImageRecipe:
    """size: short side at most this many pixels, never enlarged, None: as it is; quality: of JPEG; format: jpg, png."""

    size: int | None = None
    quality: int = 90
    format: str = "jpg"

    def __post_init__(self):
        if self.size is not None and not 1 <= self.size <= 16_384:
            raise ValueError(f"size {self.size}: the short side in pixels, 1 to 16384, or none")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality}: JPEG quality is 1 to 100")
        if self.format not in ("jpg", "png"):
            raise ValueError(f"format {self.format!r}: jpg or png")


@dataclass(frozen=True)
class Encoded:
    """data: the file's bytes; width, height in pixels; channels 1 or 3; sums, squares: exact, per channel, over the
    values 0..255 given to the encoder."""

    data: bytes
    width: int
    height: int
    channels: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]


def encode(raw: bytes | np.ndarray, recipe: ImageRecipe) -> Encoded:
    """The sample made of `raw`: an image file's bytes, or pixels as uint8 (h, w, 1 or 3), RGB. Raises Reject."""
    pixels = _checked(raw) if isinstance(raw, np.ndarray) else decode(raw)
    pixels = np.ascontiguousarray(_shrink(pixels, recipe.size))
    height, width, channels = pixels.shape
    data = _jpeg(pixels, recipe.quality) if recipe.format == "jpg" else _png(pixels)
    return Encoded(data, width, height, channels, *_sums(pixels))


def _sums(pixels: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Exact whole numbers, so that statistics do not depend on who adds them up in which order.

    OpenCV sums whole numbers too and divides at the end: rounding undoes that, as the largest sum of squares we allow
    (1.2e13) keeps an error far below one half. Five times faster than any way to have them directly.
    """
    count = pixels.shape[0] * pixels.shape[1]
    mean, deviation = (values[:, 0] for values in cv2.meanStdDev(pixels))
    squares = (deviation**2 + mean**2) * count
    return tuple(np.rint(mean * count).astype(int).tolist()), tuple(np.rint(squares).astype(int).tolist())


def decode(raw: bytes) -> np.ndarray:
    """Pixels of an image file: uint8 (h, w, 1 or 3), upright, sRGB, alpha over white, first frame. Raises Reject."""
    if not raw:
        raise Reject("empty", "0 bytes")
    if len(raw) > MAX_BYTES:
        raise Reject("too_large", f"{len(raw)} bytes, the limit is {MAX_BYTES}")
    pixels = _decode_jpeg(raw) if raw.startswith(b"\xff\xd8\xff") else None
    if pixels is not None:
        return pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; the checks here decide
        return _decode_any(raw)


def _checked(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}: uint8 (height, width, 1 or 3) is needed")
    return pixels


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Reject("too_large", f"{width} x {height} pixels, the limit is {MAX_PIXELS}")


def _decode_jpeg(raw: bytes) -> np.ndarray | None:
    """The fast road for JPEG; None where Pillow has to judge."""
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(raw, strict=False)
    except (ValueError, KeyError):  # KeyError: a colour space or subsampling that simplejpeg has no name for
        return None
    _check_pixels(width, height)
    if colour not in ("YCbCr", "RGB", "Gray"):  # CMYK and YCCK: what Adobe inverted, only Pillow turns back
        return None
    try:
        pixels = simplejpeg.decode_jpeg(raw, "GRAY" if colour == "Gray" else "RGB")
    except ValueError as error:
        message = str(error)
        if "Premature end of JPEG file" in message:
            raise Reject("truncated", message) from None
        if "premature end of data" in message or "bad Huffman" in message:
            raise Reject("corrupt", message) from None  # Pillow would hand out grey or garbled blocks
        return None
    head = raw[: raw.find(b"\xff\xda")]  # up to the scan, or a thumbnail's: that one lies inside the Exif segment
    if b"Exif\0" not in head and b"ICC_PROFILE" not in head and b"adobe.com/xap" not in head:
        return pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw), formats=("JPEG",)) as header:  # metadata only, nothing is decoded
                orientation, profile = _orientation(header), header.info.get("icc_profile")
    except Exception:  # broken metadata is no broken picture, and Pillow raises a dozen kinds over it
        return pixels
    if profile:
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        pixels = _array(_to_srgb(picture, profile))
    return _turn(pixels, orientation)


def _decode_any(raw: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            _check_pixels(*image.size)
            image.load()
            return _turn(_array(_flat(image)), _orientation(image))
    except Reject:
        raise
    except UnidentifiedImageError:
        raise _unidentified(raw) from None
    except Image.DecompressionBombError as error:
        raise Reject("too_large", str(error)) from None
    except Exception as error:  # a hostile file makes Pillow raise nearly anything; each becomes a row of the rejects
        cut = "truncated" in str(error) or _ends_early(raw)
        detail = _ADDRESS.sub("", f"{type(error).__name__}: {error}")  # it goes into an index promised byte-identical
        raise Reject("truncated" if cut else "corrupt", detail) from None


def _unidentified(raw: bytes) -> Reject:
    if raw.startswith(_MAGIC):
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


def _flat(image: Image.Image) -> Image.Image:
    """To mode L or RGB: palettes resolved, 16 bits to 8, colours to sRGB, alpha over white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image)
    profile = image.info.get("icc_profile")
    grey = image.mode in ("1", "L", "LA", "La")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
    if image.mode != "CMYK":
        image = image.convert("L" if grey else "RGB")
    image = _to_srgb(image, profile)
    return image if alpha is None else Image.composite(image, Image.new(image.mode, image.size, "white"), alpha)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
        span = f"{values.min()} to {values.max()}"
        raise Reject("unsupported", f"values of mode {image.mode} from {span}: no known white")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _srgb_transform(profile, image.mode) if profile else None
    if transform is None:
        return image.convert("RGB") if image.mode == "CMYK" else image
    grey = image.mode == "L"
    image = ImageCms.applyTransform(image, transform)
    return image.getchannel(1) if grey else image


@lru_cache(maxsize=16)  # a camera writes the same profile into every file, and making a transform takes milliseconds
def _srgb_transform(profile: bytes, mode: str):
    """None where nothing is to be done: the profile is sRGB, broken, or meant for another kind of pixel."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != {"L": "GRAY"}.get(mode, mode) or ImageCms.getProfileDescription(source).startswith("sRGB"):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as above: metadata may be broken in any way
        return 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Upright by EXIF 2.32's eight orientations; any other value is taken as 1."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _shrink(pixels: np.ndarray, size: int | None) -> np.ndarray:
    height, width = pixels.shape[:2]
    short = min(height, width)
    if size is None or short <= size:
        return pixels
    # In whole numbers, so that no machine rounds half a pixel its own way.
    target = [(2 * side * size + short) // (2 * short) for side in (width, height)]
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
