"""`digits:`: scikit-learn's 1,797 handwritten digits (UCI, 8x8 in 17 greys), enlarged to 32x32. Nothing to download."""

from collections.abc import Iterator
from functools import lru_cache

import cv2
import numpy as np
import pyarrow as pa

from pipeline.sources.listing import Item, Listing

SIDE = 32


@lru_cache(maxsize=1)
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (1797, 32, 32, 1), bicubic, greys 0..16 scaled to 0..255; labels int64 (1797,))."""
    from sklearn.datasets import load_digits  # a second to import, and only this source wants it

    digits = load_digits()
    enlarged = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for image in digits.images]
    images = np.rint(np.stack(enlarged) * (255 / 16)).clip(0, 255).astype(np.uint8)
    return images[..., None], digits.target.astype(np.int64)


def list_items(path: str, labels: str) -> Listing:
    """Items `0042`, no split. ValueError: a path was given."""
    if path:
        raise ValueError(f"digits:{path}: this source has no path, write digits:")
    images, targets = digit_images()
    count = len(images)
    columns = {
        "name": [f"{i:04d}" for i in range(count)],
        "label": targets.tolist() if labels == "auto" else [None] * count,
        "split": [None] * count,
        "size": [SIDE * SIDE] * count,
        "tag": [""] * count,
    }
    return Listing.of(columns, [str(digit) for digit in range(10)] if labels == "auto" else (), "png")


def read_items(path: str, items: pa.Table) -> Iterator[Item]:
    """Pixels, uint8 (32, 32, 1)."""
    images, _ = digit_images()
    for name in items["name"].to_pylist():
        yield images[int(name)], {}
