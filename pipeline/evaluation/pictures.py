"""Pictures of pictures: a grid of images as one array, an array as PNG bytes, an image inside a page."""

import base64
import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.evaluation.markup import escaped, printable

PAPER, INK = 255, (40, 40, 48)


def png(array: np.ndarray) -> bytes:
    """uint8 of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) -> the bytes of a PNG file, the same for the same array.

    Raises ValueError for any other shape or dtype.
    """
    array = np.asarray(array)
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise ValueError(f"an image is {array.dtype} of shape {array.shape}: pass uint8 of shape (h, w, 1, 3 or 4)")
    file = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array).save(file, "PNG")
    return file.getvalue()


def data_url(pixels: np.ndarray, form: str = "png") -> str:
    """What `png` takes as the `src` of an image; form jpeg: a third of the bytes for a photo, (h, w) or (h, w, 3)."""
    data = png(np.ascontiguousarray(pixels)) if form == "png" else _jpeg(pixels)
    return f"data:image/{form};base64," + base64.b64encode(data).decode()


def inline(pixels: np.ndarray, alt: str, kind: str, form: str = "png") -> str:
    """An array as `data_url` takes it -> an <img> that carries its own bytes. kind: its class in the page's style."""
    high, wide = pixels.shape[:2]
    size = f'width="{wide}" height="{high}"'
    return f'<img class="{kind}" {size} src="{data_url(pixels, form)}" alt="{escaped(alt)}">'


def thumbnail(image: np.ndarray, alt: str, side: int = 112) -> str:
    """An image as `rgb` takes it, its longer side at most `side` px -> an <img>; a few kB, so a page holds hundreds."""
    pixels = fit(rgb(image), side)
    # Few pixels are magnified, and should then look like pixels; a photo should not.
    return inline(pixels, alt, "pixels", "png") if max(pixels.shape) <= 64 else inline(pixels, alt, "photo", "jpeg")


def grid(
    images: list[np.ndarray],
    columns: int | None = None,
    pad: int = 2,
    cell: int | None = None,
    labels: list[str] | None = None,
) -> np.ndarray:
    """Images in rows on white -> uint8 of shape (H, W, 3).

    images: uint8 of shape (h, w), (h, w, 1) or (h, w, 3), of any sizes, each centred in a square cell of `cell` pixels
    (default: the largest side there is). A larger image is shrunk; a smaller one is magnified by a whole factor, so its
    pixels stay square. columns: default is the squarest grid. labels: one text per image, drawn under it and cut to
    the cell's width.

    Raises ValueError for no images, a wrong shape or dtype, or another number of labels than images.
    """
    pixels = [rgb(image) for image in images]
    if not pixels:
        raise ValueError("no images: a grid needs at least one")
    if labels is not None and len(labels) != len(pixels):
        raise ValueError(f"{len(labels)} labels for {len(pixels)} images: pass one for each, or None")
    cell = max(max(image.shape[:2]) for image in pixels) if cell is None else cell
    columns = math.ceil(math.sqrt(len(pixels))) if columns is None else columns
    if cell < 1 or columns < 1 or pad < 0:
        raise ValueError(f"cell {cell}, columns {columns}, pad {pad}: pass at least 1, 1 and 0")
    columns = min(columns, len(pixels))
    lines = math.ceil(len(pixels) / columns)
    size = min(max(cell // 7, 9), 18)
    caption = 0 if labels is None else size + 5
    stride_y, stride_x = cell + caption + pad, cell + pad
    sheet = np.full((lines * stride_y + pad, columns * stride_x + pad, 3), PAPER, np.uint8)
    for n, image in enumerate(pixels):
        image = fit(image, cell, magnify=True)
        high, wide = image.shape[:2]
        top = pad + n // columns * stride_y + (cell - high) // 2
        left = pad + n % columns * stride_x + (cell - wide) // 2
        sheet[top : top + high, left : left + wide] = image
    if labels is None:
        return sheet
    corners = [(pad + n % columns * stride_x, pad + n // columns * stride_y + cell) for n in range(len(labels))]
    return _lettered(sheet, labels, corners, cell, size)


def rgb(image: np.ndarray) -> np.ndarray:
    """uint8 (h, w), (h, w, 1) or (h, w, 3) -> uint8 (h, w, 3); ValueError for anything else."""
    image = np.asarray(image)
    shape = image.shape if image.ndim == 3 else (*image.shape, 1)
    if image.dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3) or not image.size:
        raise ValueError(f"an image is {image.dtype} of shape {image.shape}: pass uint8 of shape (h, w, 1 or 3)")
    return np.broadcast_to(image.reshape(shape), (*shape[:2], 3))


def fit(image: np.ndarray, side: int, magnify: bool = False) -> np.ndarray:
    """uint8 (h, w, 3) -> the same with its longer side at most `side`; magnify repeats pixels as often as will fit."""
    longest = max(image.shape[:2])
    if longest <= side:
        times = side // longest if magnify else 1
        return image.repeat(times, axis=0).repeat(times, axis=1)
    high, wide = (max(1, round(length * side / longest)) for length in image.shape[:2])
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((wide, high), Image.Resampling.LANCZOS))


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=80)
    return file.getvalue()


def _lettered(sheet: np.ndarray, labels: list[str], corners: list, width: int, size: int) -> np.ndarray:
    page = Image.fromarray(sheet)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size)
    for label, (left, top) in zip(labels, corners, strict=True):
        # The first line only, and never more letters than could fit: a label may be a whole file.
        words = " ".join(printable(label)[: width * 2].split())
        line = words
        while words and draw.textlength(line, font) > width:
            words = words[:-1]
            line = words.rstrip() + "..."
        draw.text((left + (width - draw.textlength(line, font)) // 2, top + 1), line, fill=INK, font=font)
    return np.asarray(page)
