"""PNGs passed through: the coded picture stays, everything else goes."""

import io

import cv2
import numpy as np
import pytest
from hostile import chunk
from pictures import photo, saved
from PIL import Image, ImageCms, PngImagePlugin

from pipeline.shards.image import ImageRecipe, Reject, decode, encode, pixel_sums

SECRET = b"52.5163N 13.3777E"
PNG, KEEP = ImageRecipe(format="png"), ImageRecipe(format="keep", keep_metadata=True)


def loaded(image, **options):
    """A PNG with everything in it that people and programs put there."""
    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    info.add_text("Comment", SECRET.decode())
    info.add_text("Long", SECRET.decode(), zip=True)
    info.add_itxt("Where", SECRET.decode(), zip=False)
    exif[0x010E] = SECRET.decode()
    raw = saved(image, "PNG", pnginfo=info, exif=exif, dpi=(72, 72), **options)
    extra = chunk(b"gAMA", (45_455).to_bytes(4, "big")) + chunk(b"prVt", SECRET) + chunk(b"tIME", bytes(7))
    return raw[:33] + extra + raw[33:] + SECRET


def names(raw):
    found, at = [], 8
    while at < len(raw):
        found.append(raw[at + 4 : at + 8])
        at += 12 + int.from_bytes(raw[at : at + 4], "big")
    return found


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("form", ["png", "keep"])
def test_what_is_passed_through_loses_its_metadata_and_not_one_pixel(mode, form):
    image = photo().convert(mode)
    made = encode(loaded(image), ImageRecipe(format=form))
    assert made.passed
    assert made.extension == "png"
    assert set(names(made.data)) == {b"IHDR", b"IDAT", b"IEND"}
    assert made.data == encode(made.data, PNG).data
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(made.data))), np.asarray(image))
    read = cv2.imdecode(np.frombuffer(made.data, np.uint8), -1)
    assert np.array_equal(read if mode == "L" else read[..., ::-1], np.asarray(image))
    assert made.summed == pixel_sums(decode(made.data))


def test_metadata_is_kept_where_that_is_asked():
    raw = loaded(photo())
    made = encode(raw, KEEP)
    assert made.passed
    assert made.data == raw[: -len(SECRET)]
    assert SECRET not in encode(raw, ImageRecipe(50, format="keep", keep_metadata=True)).data  # PNGs made anew: none


def test_of_an_animation_the_first_frame_is_passed_through_alone():
    raw = saved(photo(seed=1), "PNG", save_all=True, append_images=[photo(seed=2)])
    for recipe in (PNG, KEEP):
        made = encode(raw, recipe)
        assert (made.passed, made.animated) == (True, True)
        assert names(made.data) == [b"IHDR", b"IDAT", b"IEND"]
        assert np.array_equal(decode(made.data), np.asarray(photo(seed=1)))


def test_what_is_no_plain_grey_or_rgb_is_encoded_anew():
    raw, exif = saved(photo(), "PNG"), Image.Exif()
    exif[0x0112] = 3
    sixteen = np.asarray(photo().convert("L")).astype(np.uint16) * 257
    others = [
        saved(photo().convert("P"), "PNG"),
        saved(photo().convert("RGBA"), "PNG"),
        saved(photo().convert("LA"), "PNG"),
        saved(photo().convert("1"), "PNG"),
        saved(Image.fromarray(sixteen), "PNG"),
        saved(photo(), "PNG", transparency=(1, 2, 3)),
        saved(photo(), "PNG", exif=exif),
        raw[:33] + chunk(b"gAMA", (100_000).to_bytes(4, "big")) + raw[33:],
        saved(photo(), "JPEG"),
    ]
    for other in others:
        made = encode(other, PNG)
        assert not made.passed
        assert np.array_equal(decode(made.data), decode(other))
        assert set(names(made.data)) == {b"IHDR", b"IDAT", b"IEND"}
    assert not encode(raw, ImageRecipe(format="jpg")).passed
    assert not encode(raw, ImageRecipe(50, format="png")).passed
    assert encode(
        saved(photo(), "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()), PNG
    ).passed


@pytest.mark.parametrize("name", [b"IHDR", b"IDAT", b"prVt"])
def test_a_wrong_checksum_is_corrupt(name):
    raw = bytearray(loaded(photo()))
    raw[raw.index(name) + 9] ^= 1
    with pytest.raises(Reject, match=f"checksum of {name.decode()}") as caught:
        encode(bytes(raw), PNG)
    assert caught.value.reason == "corrupt"
