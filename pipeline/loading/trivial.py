"""TrivialAugment and RandAugment: operations drawn from one table of 14, every draw keyed.

Table and magnitudes are torchvision's, the operations Pillow's (`photometric`, and here shears, shifts and turns).
Images are uint8 (height, width, c), c 1 (grey) or 3 (RGB), contiguous, sides up to 10,000; none is written to, and the
same one comes back where there is nothing to do.
"""

import math

import cv2
import numpy as np

from pipeline import draw
from pipeline.loading.photometric import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_sharpness,
    autocontrast,
    equalize,
    posterize,
    solarize,
)

BINS = 31
"""Magnitudes an operation has: 0, 1/30, ... 30/30 of its greatest."""

_TRIVIAL, _RAND = (draw.text_bits(f"trivial/{use}") for use in ("trivial", "rand"))


def trivial_augment(image: np.ndarray, *key: int) -> np.ndarray:
    """One operation out of 14 at one magnitude out of 31: TrivialAugmentWide (Mueller and Hutter 2021)."""
    which, level, sign = draw.uniform(_TRIVIAL, *key, np.arange(3))
    return _operate(image, which, _GREATEST_WIDE, int(level * BINS), sign)


def rand_augment(image: np.ndarray, n: int, magnitude: int, *key: int) -> np.ndarray:
    """`n` operations out of 14, one after another, at magnitude 0-30: RandAugment (Cubuk et al. 2019).

    An operation may come again. Raises ValueError for an n below 0 and a magnitude out of range.
    """
    if n < 0 or n != int(n):
        raise ValueError(f"n {n}: use a whole number of operations, 0 or more")
    if not 0 <= magnitude < BINS or magnitude != int(magnitude):
        raise ValueError(f"magnitude {magnitude}: use a whole number from 0 to {BINS - 1}")
    height, width = image.shape[:2]
    greatest = _GREATEST_RAND | {"TranslateX": 150 / 331 * width, "TranslateY": 150 / 331 * height}
    for which, sign in draw.uniform(_RAND, *key, np.arange(2 * n)).reshape(n, 2):
        image = _operate(image, which, greatest, magnitude, sign)
    return image


def affine(image: np.ndarray, a: float, b: float, c: float, d: float, e: float, f: float) -> np.ndarray:
    """Pixel (x, y) taken from (ax + by + c, dx + ey + f), nearest, 0 outside: Image.transform(AFFINE).

    In Pillow's 16.16 fixed point: a shear of 0.2 puts every fifth row exactly between two pixels, where cv2.warpAffine
    takes one or the other as its version likes.
    """
    height, width = image.shape[:2]
    fixed = [math.floor(v * 65536 + 0.5) for v in (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)]
    x, y = np.arange(width, dtype=np.int32), np.arange(height, dtype=np.int32)[:, None]
    source = np.empty((height, width, 2), np.int16)
    for axis, (across, down, start) in enumerate((fixed[:3], fixed[3:])):
        source[:, :, axis] = (across * x + (down * y + start)) >> 16
    return cv2.remap(image, source, None, cv2.INTER_NEAREST).reshape(image.shape)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Turned counter-clockwise about the centre, nearest, 0 outside: Image.rotate."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.shape[1] / 2, image.shape[0] / 2
    return affine(image, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


OPERATIONS = {
    "Identity": lambda image, m: image,
    "ShearX": lambda image, m: affine(image, 1, m, 0, 0, 1, 0),
    "ShearY": lambda image, m: affine(image, 1, 0, 0, m, 1, 0),
    "TranslateX": lambda image, m: affine(image, 1, 0, -int(m), 0, 1, 0),
    "TranslateY": lambda image, m: affine(image, 1, 0, 0, 0, 1, -int(m)),
    "Rotate": rotate,
    "Brightness": lambda image, m: adjust_brightness(image, 1 + m),
    "Color": lambda image, m: adjust_saturation(image, 1 + m),
    "Contrast": lambda image, m: adjust_contrast(image, 1 + m),
    "Sharpness": lambda image, m: adjust_sharpness(image, 1 + m),
    "Posterize": lambda image, m: posterize(image, 8 - round(abs(m))),
    "Solarize": lambda image, m: solarize(image, 255 - abs(m)),
    "AutoContrast": lambda image, m: autocontrast(image),
    "Equalize": lambda image, m: equalize(image),
}
"""What each does to an image at magnitude m, which has a sign: some turn or shift the other way, some do not mind."""

# The greatest magnitudes: pixels, degrees, bits and grey levels, else plain factors. What is not here has none.
_ENHANCE = ("Brightness", "Color", "Contrast", "Sharpness")
_GREATEST_WIDE = dict.fromkeys(("ShearX", "ShearY", *_ENHANCE), 0.99)
_GREATEST_WIDE |= {"TranslateX": 32, "TranslateY": 32, "Rotate": 135, "Posterize": 6, "Solarize": 255}
_GREATEST_RAND = dict.fromkeys(_ENHANCE, 0.9) | {"ShearX": 0.3, "ShearY": 0.3}
_GREATEST_RAND |= {"Rotate": 30, "Posterize": 4, "Solarize": 255}  # translations depend on the image's sides


def _operate(image: np.ndarray, which: float, greatest: dict[str, float], level: int, sign: float) -> np.ndarray:
    """The operation at `which` (0-1) of the table at level/30 of its greatest magnitude, negative if sign < 0.5."""
    name = list(OPERATIONS)[int(which * len(OPERATIONS))]
    magnitude = greatest.get(name, 0) * level / (BINS - 1)
    return OPERATIONS[name](image, -magnitude if sign < 0.5 else magnitude)
