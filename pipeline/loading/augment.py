"""An image's bytes -> the uint8 pixels training sees, and from there to floats on the device.

Every random number is keyed by (seed, epoch, sample), so a sample's pixels do not depend on rank, thread, batch or
restart. `random_resized_crop` follows torchvision's published algorithm (scale and log-ratio uniform, ten tries).
"""

from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
import torch

from pipeline import draw

cv2.setNumThreads(0)  # the loader's threads are the parallelism

CROPS = ("none", "pad", "resized")
_FLIP, _SHIFT, _CROP = (draw.text_bits(f"augment/{use}") for use in ("flip", "shift", "crop"))


@dataclass(frozen=True)
class Augment:
    """What happens to a training image on its way in. Evaluation only resizes and crops the centre."""

    image_size: int = 0
    """Side in px of the square the model sees; 0: the size the dataset's images have."""
    channels: int = 0
    """1 grey or 3 colour; 0: grey if every image of the dataset is."""
    crop: str = "none"
    """none: centre only. pad: shift by up to --pad px, edges repeated. resized: random area of 8-100 %, resized."""
    pad: int = 2
    """Greatest shift in px of --crop pad."""
    flip: bool = False
    """Mirror half of the images, left to right."""

    def __post_init__(self):
        if self.crop not in CROPS:
            raise ValueError(f"crop {self.crop!r}: use one of {', '.join(CROPS)}")
        if self.image_size < 0 or self.pad < 0 or self.channels not in (0, 1, 3):
            raise ValueError(
                f"image size {self.image_size} and pad {self.pad} cannot be negative, channels {self.channels} must "
                f"be 0 (as the dataset), 1 or 3"
            )


def decode(data: bytes, channels: int) -> np.ndarray:
    """JPEG or PNG bytes -> uint8 (height, width, channels). Raises ValueError if they are neither, or damaged."""
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(data, colorspace="GRAY" if channels == 1 else "RGB")
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:  # no bytes at all, or a size OpenCV refuses
        image = None
    if image is None:
        raise ValueError("neither a JPEG nor a PNG that can be decoded")
    return image if image.ndim == 3 else image[:, :, None]


def fit(image: np.ndarray, side: int) -> np.ndarray:
    """Short side resized to `side`, centre cropped: uint8 (h, w, c) -> (side, side, c)."""
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    if min(height, width) != side:
        scale = side / min(height, width)
        image = _resize(image, max(side, round(height * scale)), max(side, round(width * scale)))
        height, width = image.shape[:2]
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def random_resized_crop(image: np.ndarray, side: int, *key: int) -> np.ndarray:
    """A keyed random area (8-100 %, aspect 3/4-4/3) resized to (side, side, c), else the centre as `fit` takes it."""
    height, width = image.shape[:2]
    tries = draw.uniform(_CROP, *key, np.arange(40)).reshape(10, 4)
    area = height * width * (0.08 + 0.92 * tries[:, 0])
    ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * tries[:, 1])
    w, h = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    fits = np.flatnonzero((w > 0) & (w <= width) & (h > 0) & (h <= height))
    if not len(fits):
        return fit(image, side)
    t = fits[0]
    top, left = int(tries[t, 2] * (height - h[t] + 1)), int(tries[t, 3] * (width - w[t] + 1))
    return _resize(image[top : top + h[t], left : left + w[t]], side, side)


def vary(images: np.ndarray, augment: Augment, seed: int, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Shifts and flips of a whole micro-batch at once: uint8 (n, s, s, c), keyed per image; may work in place."""
    if augment.crop == "pad" and augment.pad:
        n, side, reach = len(images), images.shape[1], augment.pad
        shifts = draw.bits(_SHIFT, seed, epochs, rows)
        down, right = shifts % np.uint64(2 * reach + 1), (shifts >> np.uint64(32)) % np.uint64(2 * reach + 1)
        down, right = (shift.astype(np.int64)[:, None] + np.arange(side) - reach for shift in (down, right))
        down, right = down.clip(0, side - 1), right.clip(0, side - 1)
        images = images[np.arange(n)[:, None, None], down[:, :, None], right[:, None, :]]
    if augment.flip:
        mirrored = draw.uniform(_FLIP, seed, epochs, rows) < 0.5
        images[mirrored] = images[mirrored, :, ::-1]
    return images


def to_float(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 (n, s, s, c) on any device -> float32 (n, c, s, s), (x/255 - mean) / std with mean, std float32 (c,)."""
    return torch.addcmul(-mean / std, images.float(), 1 / (255 * std)).permute(0, 3, 1, 2).contiguous()


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrinking = height * width < image.shape[0] * image.shape[1]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    return resized if resized.ndim == 3 else resized[:, :, None]
