"""Any picture Pillow opens -> 8-bit greyscale or RGB in sRGB: palettes, 16 bits, CMYK, alpha, ICC profiles."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_GREY = ("1", "L", "LA", "La")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_NO_CHANGE = 2  # of 255: a profile that moves no colour by more is sRGB under whatever name
_LATTICE = np.stack(np.meshgrid(*[np.linspace(0, 255, 9, dtype=np.uint8)] * 3), -1).reshape(27, 27, 3)


class NotShown(Exception):
    """A kind of pixel nothing says the look of. The message is a sentence for a person."""


def flat(image: Image.Image) -> Image.Image:
    """A loaded image as mode L or RGB: sRGB, alpha over white. Raises NotShown."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image)
    if image.mode not in _GREY + _COLOUR:
        raise NotShown(f"pixels of mode {image.mode} are not read; convert the file to RGB first")
    profile = image.info.get("icc_profile")
    grey = image.mode in _GREY
    alpha = None
    if image.has_transparency_data:
        image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
    if image.mode != "CMYK":
        image = image.convert("L" if grey else "RGB")
    image = to_srgb(image, profile)
    return image if alpha is None else Image.composite(image, Image.new(image.mode, image.size, "white"), alpha)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.format == "TIFF" and image.mode == "I":  # 32 bits, or 16 with a sign
        raise NotShown(f"whole numbers from {values.min()} to {values.max()}: no known white")
    if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
        raise NotShown(f"values of mode {image.mode} from {values.min()} to {values.max()}: no known white")
    small = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    clear = image.info.get("transparency")  # a PNG's one grey that is not there
    return Image.fromarray(small if clear is None else np.where(values == clear, 255, small).astype(np.uint8))


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Mode L, RGB or CMYK by its ICC profile to L or RGB; by Pillow's arithmetic where the profile says nothing."""
    transform = srgb_transform(profile, image.mode) if profile else None
    if transform is None:
        return image.convert("RGB") if image.mode == "CMYK" else image
    grey = image.mode == "L"
    image = ImageCms.applyTransform(image, transform)
    return image.getchannel(1) if grey else image


@lru_cache(maxsize=16)  # a camera writes the same profile into every file, and making a transform takes milliseconds
def srgb_transform(profile: bytes, mode: str):
    """None where nothing is to be done: the profile is sRGB, broken, or meant for another kind of pixel."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != {"L": "GRAY"}.get(mode, mode) or ImageCms.getProfileDescription(source).startswith("sRGB"):
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "RGB":
        shown = np.asarray(ImageCms.applyTransform(Image.fromarray(_LATTICE), transform), dtype=np.int16)
        if np.abs(shown - _LATTICE).max() <= _NO_CHANGE:
            return None
    return transform


def array(image: Image.Image) -> np.ndarray:
    """uint8 (h, w, 1 or 3) of mode L or RGB."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
