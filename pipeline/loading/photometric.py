"""Colour jitter and random erasing of uint8 images, every draw keyed; and the operations on pixel values themselves.

The single operations are Pillow's (ImageEnhance, ImageOps), which torchvision runs on PIL images; jitter and erasing
are torchvision's too. Images are uint8 (height, width, c), c 1 (grey) or 3 (RGB), contiguous. Only `random_erase`
writes to what it is given; an operation that has nothing to do returns its image. The work is OpenCV's, which releases
the interpreter lock, so threads share the cores.
"""

import math

import cv2
import numpy as np

from pipeline import draw

_JITTER, _ERASE = (draw.text_bits(f"photometric/{use}") for use in ("jitter", "erase"))
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH
# Added where OpenCV rounds and Pillow drops the fraction. At -0.5 whole numbers would be ties, and go to the even side.
_TRUNCATE = -0.49


def color_jitter(
    image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float, *key: int
) -> np.ndarray:
    """The four adjustments in a random order, each by a factor from [max(0, 1 - x), 1 + x], hue from [-x, x] of a turn.

    torchvision's ColorJitter. Each factor is a draw of its own: leaving one adjustment out changes no other. Of a grey
    image only brightness and contrast change. Raises ValueError for an amount below 0 and a hue above 0.5.
    """
    amounts = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    for name, amount in amounts.items():
        if not 0 <= amount < math.inf:
            raise ValueError(f"{name} {amount}: use a number from 0 up")
    if hue > 0.5:
        raise ValueError(f"hue {hue}: use a share of the circle from 0 to 0.5")
    adjustments = adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue
    drawn = draw.uniform(_JITTER, *key, np.arange(8))
    for which in np.argsort(drawn[4:], kind="stable"):
        amount = (brightness, contrast, saturation, hue)[which]
        low, high = (-amount, amount) if which == 3 else (max(0, 1 - amount), 1 + amount)
        if amount:
            image = adjustments[which](image, low + (high - low) * float(drawn[which]))
    return image


def random_erase(
    images: np.ndarray,
    probability: float,
    seed: int,
    epochs: np.ndarray,
    rows: np.ndarray,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 3.3),
    value: int | tuple[int, ...] = 0,
) -> np.ndarray:
    """A rectangle of each image, by chance, set to `value`: uint8 (n, h, w, c), in place, keyed per image.

    Random Erasing (Zhong et al. 2017) as torchvision has it: `scale` bounds the rectangle's share of the area, `ratio`
    its height over width; of ten tries the first that is smaller than the image both ways, else the image is left.
    `value` is one number or one a channel. Raises ValueError for a probability, scale, ratio or value out of range.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability {probability}: use a number from 0 to 1")
    if not 0 <= scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale {scale}: use two shares of the area from 0 to 1, the smaller first")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio {ratio}: use two numbers above 0, the smaller first")
    if not all(0 <= v <= 255 for v in np.ravel(value)):
        raise ValueError(f"value {value}: use pixel values from 0 to 255")
    height, width = images.shape[1:3]
    chosen = np.flatnonzero(draw.uniform(_ERASE, seed, epochs, rows, 40) < probability)
    epochs, rows = np.broadcast_to(epochs, len(images))[chosen, None], np.broadcast_to(rows, len(images))[chosen, None]
    tries = draw.uniform(_ERASE, seed, epochs, rows, np.arange(40)).reshape(-1, 10, 4)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[:, :, 0])
    tall = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * tries[:, :, 1])
    h, w = np.rint(np.sqrt(area * tall)).astype(int), np.rint(np.sqrt(area / tall)).astype(int)
    fits = (h < height) & (w < width)
    for i, image in enumerate(chosen):
        if fits[i].any():
            t = fits[i].argmax()
            top, left = int(tries[i, t, 2] * (height - h[i, t] + 1)), int(tries[i, t, 3] * (width - w[i, t] + 1))
            images[image, top : top + h[i, t], left : left + w[i, t]] = value
    return images


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Black at factor 0, the image at 1, brighter above: ImageEnhance.Brightness."""
    return _blend_with(image, 0, factor)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """The mean grey everywhere at factor 0, the image at 1: ImageEnhance.Contrast."""
    grey = image if image.shape[2] == 1 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return _blend_with(image, int(cv2.mean(grey)[0] + 0.5), factor)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Grey at factor 0, the image at 1: ImageEnhance.Color. A grey image stays as it is."""
    if image.shape[2] == 1:
        return image
    # One cv2.transform would be quicker, but its fixed point rounds each channel's row apart and tints what is grey.
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, _TRUNCATE)


def adjust_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Hue in HSV moved by `turn` of the circle, -0.5 to 0.5. A grey image stays as it is.

    In floats, as torchvision does with tensors: through Pillow's 8-bit HSV a hue is off by up to 1/255 of the circle.
    """
    if image.shape[2] == 1:
        return image
    hsv = cv2.cvtColor(np.multiply(image, np.float32(1 / 255)), cv2.COLOR_RGB2HSV)
    hsv[:, :, 0] += np.float32(360 * turn % 360)  # OpenCV takes angles above 360 as well
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), alpha=255)


def adjust_sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Smoothed 3 x 3 at factor 0, the image at 1, sharpened above: ImageEnhance.Sharpness; the outer pixels stay."""
    smooth = cv2.filter2D(image, -1, _SMOOTH, borderType=cv2.BORDER_REPLICATE)
    blended = cv2.addWeighted(image, factor, smooth, 1 - factor, _TRUNCATE).reshape(image.shape)
    blended[[0, -1]], blended[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    return blended


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """The upper `bits` (1-8) of each value: ImageOps.posterize."""
    return _look_up(image, np.arange(256) & ~(2 ** (8 - bits) - 1))


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Values at or above `threshold` (0-256) inverted: ImageOps.solarize."""
    values = np.arange(256)
    return _look_up(image, np.where(values < threshold, values, 255 - values))


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Each channel stretched to 0-255, one that has a single value as it is: ImageOps.autocontrast."""
    values, tables = np.arange(256), []
    for counts in _histograms(image):
        low, high = np.flatnonzero(counts)[[0, -1]]
        scale = 255 / max(1, high - low)
        tables.append(values * scale - low * scale if high > low else values)
    return _look_up(image, *tables)


def equalize(image: np.ndarray) -> np.ndarray:
    """Each channel's histogram made flat: ImageOps.equalize."""
    tables = []
    for counts in _histograms(image):
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        below = np.cumsum(counts) - counts
        tables.append((step // 2 + below) // step if step else np.arange(256))
    return _look_up(image, *tables)


def _blend_with(image: np.ndarray, grey: int, factor: float) -> np.ndarray:
    values = np.arange(256, dtype=np.float32)
    return _look_up(image, grey + np.float32(factor) * (values - grey))


def _look_up(image: np.ndarray, *tables: np.ndarray) -> np.ndarray:
    """One table of 256 for all channels or one each; fractions dropped, what is out of range at its end."""
    table = np.stack(tables, axis=-1).clip(0, 255).astype(np.uint8)
    return cv2.LUT(image, table[None]).reshape(image.shape)


def _histograms(image: np.ndarray) -> np.ndarray:
    """int64 (c, 256)."""
    counts = [cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel() for channel in range(image.shape[2])]
    return np.array(counts).astype(np.int64)
