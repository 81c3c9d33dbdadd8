"""Pictures for tests, and how far two of them are apart."""

import io

import cv2
import numpy as np
import simplejpeg
from PIL import Image


def photo(width=120, height=90, seed=0):
    """A smooth colour picture, as photographs are: JPEG must be able to hold it."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.float32)
    pixels = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def distance(a, b):
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    assert a.shape == b.shape
    return np.abs(a - b).mean()


def ycck(image):
    """A JPEG in Adobe's way of printing presses: YCCK, every ink inverted."""
    inverted = np.dstack([np.asarray(image), np.full(image.size[::-1], 255, np.uint8)])  # no black: light through all
    return simplejpeg.encode_jpeg(np.ascontiguousarray(inverted), 95, "CMYK", "444")
