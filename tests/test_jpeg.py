"""JPEGs passed through: the coded picture stays, everything else goes."""

import io
import warnings

import cv2
import numpy as np
import pytest
import simplejpeg
from pictures import distance, photo, saved, ycck
from PIL import Image, ImageCms, ImageOps

from pipeline.shards.image import ImageRecipe, Reject, decode, encode, pixel_sums

SECRET = b"52.5163N 13.3777E"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
KEEP = ImageRecipe(keep_metadata=True)


def segment(marker, payload):
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def exif(orientation=1):
    tags = Image.Exif()
    tags[0x010E], tags[0x0112] = SECRET.decode(), orientation
    return tags


def rgb():
    """Without colour transform, as Adobe marks it: APP14 alone says that the components are RGB."""
    raw = saved(photo(), "JPEG", quality=95, keep_rgb=True)
    assert b"Adobe" in raw
    assert simplejpeg.decode_jpeg_header(raw)[2] == "RGB"
    return raw


def by_opencv(raw):
    return cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_UNCHANGED)


def by_pillow(raw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the list of further pictures below is none
        return np.asarray(Image.open(io.BytesIO(raw)))


def loaded(raw):
    """The same picture with everything in it that people and cameras put there."""
    jfif = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\2\1" + SECRET[:6]) if b"JFIF" in raw else b""
    body = raw[20:] if jfif else raw[2:]
    icc = [segment(0xE2, b"ICC_PROFILE\0" + bytes([n, 2]) + part) for n, part in ((1, SRGB[:300]), (2, SRGB[300:]))]
    between = [
        *(jfif, segment(0xE0, b"JFXX\0\x10" + SECRET), segment(0xE1, b"Exif\0\0" + exif().tobytes()[6:])),
        *(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x>" + SECRET + b"</x>"), icc[1], icc[0]),
        *(segment(0xE2, b"MPF\0" + SECRET), segment(0xED, b"Photoshop 3.0\0" + SECRET), segment(0xFE, SECRET)),
        *(segment(0xEE, b"not from " + SECRET), b"\xff\xff\xff"),  # fill bytes before the next marker
    ]
    scan = body.rindex(b"\xff\xda")
    body = body[:scan] + segment(0xFE, SECRET) + body[scan:]
    return raw[:2] + b"".join(between) + body + saved(photo(20, 20), "JPEG") + SECRET


KINDS = {
    "baseline": lambda: saved(photo(), "JPEG"),
    "fine": lambda: saved(photo(), "JPEG", quality=97, subsampling=0, optimize=True),
    "progressive": lambda: saved(photo(), "JPEG", progressive=True),
    "restarts": lambda: saved(photo(), "JPEG", restart_marker_blocks=3),
    "grey": lambda: saved(photo().convert("L"), "JPEG"),
    "rgb": rgb,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_passed_through_loses_its_metadata_and_not_one_pixel(kind):
    raw = KINDS[kind]()
    made = encode(loaded(raw), ImageRecipe())
    assert made.passed
    for word in (SECRET, SECRET[:6], b"Exif", b"ICC_PROFILE", b"http", b"MPF", b"JFXX"):
        assert word not in made.data
    assert len(made.data) == len(raw)  # tables and scans are all there is left
    for source in (raw, loaded(raw)):
        for judge in (simplejpeg.decode_jpeg, by_opencv, by_pillow):
            assert np.array_equal(judge(made.data), judge(source))
    pixels = decode(made.data).astype(int)
    assert (made.height, made.width, made.channels) == pixels.shape
    assert made.summed == pixel_sums(decode(made.data))
    assert encode(made.data, ImageRecipe()).data == made.data


def test_a_clean_file_is_passed_through_as_it_is_whatever_its_quality():
    raw = saved(photo(), "JPEG", quality=35)
    same = ImageRecipe(quality=95), ImageRecipe(90), ImageRecipe(120, "long"), ImageRecipe(format="keep")
    for recipe in same:
        assert encode(raw, recipe).data == raw
    for recipe in (ImageRecipe(89), ImageRecipe(119, "long"), ImageRecipe(90, "crop"), ImageRecipe(format="png")):
        assert not encode(raw, recipe).passed
    assert encode(saved(photo(90, 90), "JPEG"), ImageRecipe(90, "crop")).passed


def test_a_colour_profile_decides_by_what_it_does():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    renamed = SRGB.replace(b"\0s\0R\0G\0B", b"\0o\0d\0d\0!")
    assert renamed != SRGB
    for profile in (SRGB, renamed, lab, b"nonsense"):  # one for Lab says nothing about RGB
        assert encode(saved(photo(), "JPEG", icc_profile=profile), ImageRecipe()).passed
    swapped = renamed.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
    raw = saved(photo(), "JPEG", icc_profile=swapped)
    made = encode(raw, ImageRecipe(quality=97))
    assert not made.passed
    assert distance(decode(made.data), decode(saved(photo(), "JPEG"))[..., ::-1]) < 3  # red means blue in it


def test_what_needs_a_change_is_encoded_anew():
    for raw in (saved(photo(), "JPEG", exif=exif(6)), saved(photo().convert("CMYK"), "JPEG"), ycck(photo())):
        made = encode(raw, ImageRecipe())
        assert not made.passed
        assert simplejpeg.decode_jpeg_header(made.data)[2] == "YCbCr"
        assert SECRET not in made.data
        judge = ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB")
        assert distance(decode(made.data), judge) < 2


def test_the_orientation_in_xmp_counts_where_exif_has_none():
    packet = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    raw = saved(photo(), "JPEG")
    turned = raw[:20] + segment(0xE1, packet) + raw[20:]
    assert (encode(turned, ImageRecipe()).width, encode(turned, ImageRecipe()).passed) == (90, False)
    both = raw[:20] + segment(0xE1, b"Exif\0\0" + exif().tobytes()[6:]) + segment(0xE1, packet) + raw[20:]
    assert encode(both, ImageRecipe()).passed


def test_broken_metadata_is_no_broken_picture():
    raw = saved(photo(), "JPEG")
    endless = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(12)
    for junk in (b"Exif\0\0", b"Exif\0\0MM\0*" + b"\xff" * 40, endless, bytes(9)):
        for recipe in (ImageRecipe(), KEEP, ImageRecipe(50, keep_metadata=True)):
            made = encode(raw[:20] + segment(0xE1, junk) + raw[20:], recipe)
            assert made.passed == (recipe.size is None)
            assert decode(made.data).shape == (made.height, made.width, 3)


def test_metadata_is_kept_where_that_is_asked():
    raw = loaded(saved(photo(), "JPEG"))
    made = encode(raw, KEEP)
    assert made.passed
    assert np.array_equal(decode(made.data), decode(raw))
    assert Image.open(io.BytesIO(made.data)).getexif()[0x010E] == SECRET.decode()
    assert made.data.count(SECRET) == raw.count(SECRET) - 2  # the list of further pictures, and what follows the end
    assert b"ICC_PROFILE" in made.data
    assert b"MPF" not in made.data


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_goes_into_a_jpeg_made_anew_with_its_orientation_reset(form):
    raw = saved(photo(), form, exif=exif(6))
    made = encode(raw, ImageRecipe(50, keep_metadata=True))
    image = Image.open(io.BytesIO(made.data))
    assert (image.size, image.getexif()[0x0112], image.getexif()[0x010E]) == ((50, 67), 1, SECRET.decode())
    assert simplejpeg.decode_jpeg(made.data).shape == (67, 50, 3)
    assert SECRET not in encode(raw, ImageRecipe(50)).data


def test_exif_too_long_for_a_segment_is_left_out():
    tags = exif()
    tags[0x9286] = "x" * 65_400
    raw = saved(photo(), "PNG", exif=tags)
    assert decode(encode(raw, KEEP).data).shape == (90, 120, 3)


@pytest.mark.parametrize("stray", [b"stray", b"\xff\xd3"])  # decoders skip the one with a warning, the other in silence
def test_what_is_strange_between_segments_is_encoded_anew(stray):
    raw = saved(photo(), "JPEG")
    made = encode(raw[:20] + stray + raw[20:], ImageRecipe())
    assert not made.passed
    assert distance(decode(made.data), decode(raw)) < 2


def test_a_damaged_scan_is_rejected_or_passed_through_as_the_decoder_shows_it():
    random, raw = np.random.default_rng(3), loaded(saved(photo(), "JPEG", restart_marker_blocks=4))
    passed = 0
    for _ in range(150):
        bad = bytearray(raw)
        bad[random.integers(len(raw))] ^= 1 << random.integers(8)
        try:
            made = encode(bytes(bad), ImageRecipe())
        except Reject:
            continue
        passed += made.passed
        if made.passed:
            assert np.array_equal(simplejpeg.decode_jpeg(made.data), simplejpeg.decode_jpeg(bytes(bad)))
    assert passed > 20
