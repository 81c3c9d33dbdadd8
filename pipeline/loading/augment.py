"""An image's bytes -> the uint8 pixels training sees, and from there to floats on the device.

Every random number is keyed by (seed, epoch, sample), so a sample's pixels do not depend on rank, thread, batch or
restart.
"""

import dataclasses
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
import torch

from pipeline import draw
from pipeline.loading.photometric import color_jitter, random_erase
from pipeline.loading.trivial import BINS, rand_augment, trivial_augment
from pipeline.shards.index import Dataset

cv2.setNumThreads(0)  # the loader's threads are the parallelism

JPEG = b"\xff\xd8"  # how one begins
_SOFT = 1.25

CROPS, POLICIES = ("none", "pad", "resized"), ("none", "trivial", "rand")
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
    exact_decode: bool = False
    """Decode every JPEG in full. Else one of which twice the pixels needed are left is decoded to a half, a quarter or
    an eighth of its sides: faster, and not the same to the last bit."""
    policy: str = "none"
    """trivial: one random operation an image (TrivialAugment). rand: --policy-ops of them (RandAugment). none."""
    policy_ops: int = 2
    """Operations of --policy rand."""
    policy_magnitude: int = 9
    """Their strength, 0 to 30."""
    jitter: float = 0.0
    """Brightness, contrast and saturation vary by up to this share (torchvision's ColorJitter)."""
    hue: float = 0.0
    """The hue varies by up to this part of a turn, 0 to 0.5."""
    erase: float = 0.0
    """Share of the images of which a random rectangle is blackened (random erasing)."""
    start_size: int = 0
    """Side in px until epoch --ramp-from, growing to the image size by --ramp-to; 0: the image size all along."""
    ramp_from: int = 0
    """Epoch in which the side begins to grow."""
    ramp_to: int = 0
    """First epoch at full size."""
    eval_size: int = 0
    """Side in px that evaluation sees, where it is not --image-size: what was trained at 176 px scores best at about
    224 (Touvron et al. 2019)."""
    eval_share: float = 1.0
    """Share of the short side that evaluation's centre crop keeps; ImageNet's custom is 0.875 (224 of 256)."""

    def __post_init__(self):
        if self.crop not in CROPS:
            raise ValueError(f"crop {self.crop!r}: use one of {', '.join(CROPS)}")
        if self.policy not in POLICIES:
            raise ValueError(f"policy {self.policy!r}: use one of {', '.join(POLICIES)}")
        if self.policy_ops < 1 or not 0 <= self.policy_magnitude < BINS:
            raise ValueError(
                f"policy ops {self.policy_ops} and magnitude {self.policy_magnitude}: 1 or more, 0 to {BINS - 1}"
            )
        if not (0 <= self.jitter <= 1 and 0 <= self.hue <= 0.5 and 0 <= self.erase <= 1):
            raise ValueError(f"jitter {self.jitter}, hue {self.hue}, erase {self.erase}: 0 to 1, 0 to 0.5, 0 to 1")
        if self.start_size and not (0 < self.start_size <= (self.image_size or self.start_size)):
            raise ValueError(f"start size {self.start_size}: from 1 to the image size, {self.image_size}")
        if self.eval_size < 0 or not 0 < self.eval_share <= 1:
            raise ValueError(
                f"eval size {self.eval_size} cannot be negative, eval share {self.eval_share}: above 0, to 1"
            )
        if not 0 <= self.ramp_from <= self.ramp_to:
            raise ValueError(f"ramp from {self.ramp_from} to {self.ramp_to}: epochs, the first not after the second")
        if self.image_size < 0 or self.pad < 0 or self.channels not in (0, 1, 3):
            raise ValueError(
                f"image size {self.image_size} and pad {self.pad} cannot be negative, channels {self.channels} must "
                f"be 0 (as the dataset), 1 or 3"
            )

    def side(self, epoch: int) -> int:
        """Side of the images in an epoch: grows in a straight line, in multiples of 32 px (of 4 below 128 px), as in
        FFCV's ImageNet recipe (Leclerc et al. 2023)."""
        if not self.start_size or epoch >= self.ramp_to:
            return self.image_size
        done = max(0, epoch - self.ramp_from) / max(1, self.ramp_to - self.ramp_from)
        grid = 32 if self.image_size >= 128 else 4
        side = self.start_size + done * (self.image_size - self.start_size)
        return min(self.image_size, max(self.start_size, grid * round(side / grid)))


def decode(data, channels: int, shrink: int = 1, room: np.ndarray | None = None) -> np.ndarray:
    """JPEG or PNG bytes -> uint8 (height, width, channels). Raises ValueError if they are neither, or damaged.

    data: bytes or a view of some; shrink: 1, or 2, 4, 8 to have a JPEG decoded to that part of its sides (rounded up),
    which saves most of the inverse transform; room: uint8 (n,), where a JPEG's pixels are put if it is large enough.
    Fresh memory for each image would cost a fifth of its decoding in page faults.
    """
    if data[:2] == JPEG:
        height, width = jpeg_size(data)
        least = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)} if shrink > 1 else {}
        buffer = room if room is not None and height * width * channels <= len(room) else None
        return simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", buffer=buffer, **least)
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:  # no bytes at all, or a size OpenCV refuses
        image = None
    if image is None:
        raise ValueError("neither a JPEG nor a PNG that can be decoded")
    return image if image.ndim == 3 else image[:, :, None]


def jpeg_size(data) -> tuple[int, int]:
    """(height, width) of a JPEG by its header. Raises ValueError if it has none."""
    return simplejpeg.decode_jpeg_header(data)[:2]


def fit(image: np.ndarray, side: int, short: int = 0) -> np.ndarray:
    """Short side resized to `short` px (0: `side`), centre cropped: uint8 (h, w, c) -> (side, side, c)."""
    height, width, short = *image.shape[:2], short or side
    if (height, width) == (side, side) == (short, short):
        return image
    if min(height, width) != short:
        scale = short / min(height, width)
        image = _resize(image, max(short, round(height * scale)), max(short, round(width * scale)))
        height, width = image.shape[:2]
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def crop_boxes(heights: np.ndarray, widths: np.ndarray, seed: int, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The keyed random areas of images of these sizes: int64 (n, 4) of top, left, height, width in px.

    As torchvision's RandomResizedCrop draws them: 8-100 % of the area, aspect 3/4-4/3, ten tries, else the largest
    centred area of such an aspect.
    """
    tries = draw.uniform(_CROP, seed, epochs[:, None], rows[:, None], np.arange(40)).reshape(-1, 10, 4)
    heights, widths = heights.astype(np.int64)[:, None], widths.astype(np.int64)[:, None]
    area = heights * widths * (0.08 + 0.92 * tries[..., 0])
    ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * tries[..., 1])
    w, h = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
    first = fits.argmax(1)[:, None]
    h, w, down, right = (np.take_along_axis(x, first, 1) for x in (h, w, tries[..., 2], tries[..., 3]))
    top, left = (down * (heights - h + 1)).astype(np.int64), (right * (widths - w + 1)).astype(np.int64)
    least_h = np.minimum(heights, np.maximum(1, np.rint(widths / (3 / 4)).astype(np.int64)))
    least_w = np.minimum(widths, np.maximum(1, np.rint(heights * (4 / 3)).astype(np.int64)))
    centre = [(heights - least_h) // 2, (widths - least_w) // 2, least_h, least_w]
    drawn = np.concatenate([top, left, h, w], 1)
    return np.where(fits.any(1)[:, None], drawn, np.concatenate(centre, 1))


def flips(seed: int, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which images are mirrored: bool (n,), half of them."""
    return draw.uniform(_FLIP, seed, epochs, rows) < 0.5


def shrinkable(height: int, width: int, side: int) -> int:
    """8, 4, 2 or 1: by how much an area of this size may be shrunk while decoding, and still fill `side` px."""
    least = min(height, width)
    return next(k for k in (8, 4, 2, 1) if k == 1 or least >= k * side)


def crop_into(image: np.ndarray, box: list[int], mirrored: bool, out: np.ndarray) -> None:
    """The area `box` (top, left, height, width) of uint8 (h, w, c), resized to fill `out` (side, side, c)."""
    top, left, height, width = box
    side = out.shape[0]
    area = image[top : top + height, left : left + width]
    # OpenCV's area filter takes five times the linear one's time; in small reductions they are hard to tell apart.
    soft = height < _SOFT * side and width < _SOFT * side
    flat = out[:, :, 0] if out.shape[2] == 1 else out  # OpenCV knows no axis of one channel
    cv2.resize(area, (side, side), dst=flat, interpolation=cv2.INTER_LINEAR if soft else cv2.INTER_AREA)
    if mirrored:
        cv2.flip(flat, 1, dst=flat)


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
        for i in np.flatnonzero(flips(seed, epochs, rows)).tolist():
            cv2.flip(images[i], 1, dst=images[i])
    return images


def recolour(images: np.ndarray, augment: Augment, seed: int, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Policy, colour jitter and erasing of uint8 (n, s, s, c), keyed per image; in place."""
    if augment.policy != "none" or augment.jitter or augment.hue:
        j = augment.jitter
        for i, epoch, row in zip(range(len(images)), epochs.tolist(), rows.tolist(), strict=True):
            image = images[i]
            if augment.policy == "trivial":
                image = trivial_augment(image, seed, epoch, row)
            elif augment.policy == "rand":
                image = rand_augment(image, augment.policy_ops, augment.policy_magnitude, seed, epoch, row)
            if j or augment.hue:
                image = color_jitter(image, j, j, j, augment.hue, seed, epoch, row)
            images[i] = image
    if augment.erase:
        images = random_erase(images, augment.erase, seed, epochs, rows)
    return images


def resolved(augment: Augment, dataset: Dataset) -> Augment:
    """With the image size and channels of the dataset, where `augment` names none. ValueError: its images differ."""
    info, side = dataset.info, augment.image_size
    channels = augment.channels or (1 if set(info["channels"]) == {"1"} else 3)
    if not side:
        uniform = info["image_size"]
        side = min(uniform) if uniform else info["recipe"].get("size")
    if not side:
        raise ValueError(f"the images of {dataset.root} differ in size: say which the model sees, --image-size 64 say")
    return dataclasses.replace(augment, image_size=side, channels=channels)


def statistics(dataset: Dataset, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel as the model sees it, 0..1, as `to_float` wants them."""
    mean, std = dataset.info["mean"] or [0.5], dataset.info["std"] or [0.25]
    if len(mean) != channels:
        mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
    return tuple(mean), tuple(max(s, 1e-3) for s in std)  # images of one flat colour


def to_float(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, channels_last: bool = False) -> torch.Tensor:
    """uint8 (n, s, s, c) on any device -> float32 (n, c, s, s), (x/255 - mean) / std with mean, std float32 (c,);
    channels_last: left as it lies in memory."""
    floats = torch.addcmul(-mean / std, images.float(), 1 / (255 * std)).permute(0, 3, 1, 2)
    return floats if channels_last else floats.contiguous()


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrinking = height * width < image.shape[0] * image.shape[1]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    return resized if resized.ndim == 3 else resized[:, :, None]
