"""Small datasets, decoded once: pixels of a split that fits in memory as it is stored, kept from its first epoch on.

Of 28 x 28 pixels the calls around the codec cost more than the codec, and more threads only wait for each other.
"""

import numpy as np

from pipeline.shards.index import Split

LIMIT = 256 << 20  # bytes


class Kept:
    """Pixels by row, uint8 (h, w, channels) each; memory is taken as rows come in. Of a split whose images differ in
    size, or are too many, it keeps nothing. Verified when they were decoded, they are not verified again."""

    def __init__(self, split: Split, channels: int, limit: int = LIMIT):
        height, width = int(split.height[0]), int(split.width[0])
        uniform = (split.height == height).all() and (split.width == width).all()
        self.keeps = bool(uniform and len(split) * height * width * channels <= limit)
        self.size = (height, width)
        self._pixels = np.zeros((len(split), height, width, channels), np.uint8) if self.keeps else None
        self._has = np.zeros(len(split), bool)

    def has(self, rows: np.ndarray) -> np.ndarray:
        """Which of int64 (n,) are kept: bool (n,). Once kept, a row stays."""
        return self._has[rows]

    def put(self, row: int, pixels: np.ndarray) -> None:
        if self.keeps:
            self._pixels[row] = pixels
            self._has[row] = True  # last: another thread may look

    def get(self, rows) -> np.ndarray:
        """Pixels of rows that are kept: a copy for an array of them, a view for one."""
        return self._pixels[rows]
