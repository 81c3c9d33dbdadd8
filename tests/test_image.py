import contextlib
import io
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from hostile import chunk, claims
from pictures import distance, photo, saved, ycck
from PIL import Image, ImageCms, ImageFile, ImageOps, _webp

from pipeline.shards.image import REASONS, ImageRecipe, Reject, decode, encode, pixel_sums


def reject_of(raw):
    with pytest.raises(Reject) as caught:
        decode(raw)
    assert caught.value.reason in REASONS
    assert "0x" not in caught.value.detail  # an address in it would differ from run to run
    return caught.value.reason


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_every_format_decodes_as_pillow_decodes_it(form):
    raw = saved(photo(), form)
    assert distance(decode(raw), Image.open(io.BytesIO(raw)).convert("RGB")) < 0.5


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_file_cut_at_any_tenth_is_rejected_and_never_padded(form):
    raw = saved(photo(), form)
    reasons = [reject_of(raw[: len(raw) * tenth // 10]) for tenth in range(1, 10)]
    assert set(reasons) == {"truncated"}


@pytest.mark.parametrize("options", [{"progressive": True}, {"quality": 95, "subsampling": 0}, {"optimize": True}])
def test_jpegs_of_every_kind_cut_at_any_tenth_are_truncated(options):
    raw = saved(photo(), "JPEG", **options)
    assert {reject_of(raw[: len(raw) * tenth // 10]) for tenth in range(1, 10)} == {"truncated"}
    assert reject_of(raw[:-2]) == "truncated"


def test_junk_is_typed():
    assert reject_of(b"") == "empty"
    assert reject_of(b"hello, world" * 20) == "not_an_image"
    assert reject_of(b"PK\x03\x04" + bytes(300)) == "not_an_image"  # a zip renamed .jpg
    assert reject_of(b"\0\0\0\x18ftypavif" + bytes(300)) == "unsupported"
    assert reject_of(b"8BPS" + bytes(300)) == "unsupported"
    assert reject_of(b"\xff\xd8\xff\xe0" + b"\0\x10JFIF\0" + bytes(500) + b"\xff\xd9") == "corrupt"
    float_tiff = Image.fromarray(np.random.default_rng(0).random((9, 9)).astype(np.float32))
    assert reject_of(saved(float_tiff, "TIFF")) == "unsupported"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP"])
def test_a_bomb_is_refused_by_its_header_before_there_is_room_for_its_pixels(form, monkeypatch):
    def explode(*_):
        raise AssertionError("the bomb went off")

    for place, name in ((ImageFile.ImageFile, "load"), (_webp, "WebPAnimDecoder"), (simplejpeg, "decode_jpeg")):
        monkeypatch.setattr(place, name, explode)
    assert reject_of(claims(form, 16_383 if form == "WEBP" else 60_000)) == "too_large"
    monkeypatch.undo()
    assert decode(claims(form, 8)).shape[:2] == (8, 8)  # it is the claim that is refused


def test_bombs_of_time_and_of_text_are_refused():
    scans = saved(photo(1000, 1000), "JPEG", progressive=True)
    at = scans.rindex(b"\xff\xda")
    assert reject_of(scans[:at] + scans[at:-2] * 4000 + scans[-2:]) == "too_large"
    png, text = saved(photo(), "PNG"), b"a\0\0" + zlib.compress(bytes(100_000_000), 9)
    assert reject_of(png[:33] + chunk(b"zTXt", text) + png[33:]) == "too_large"
    assert reject_of(png[:33] + chunk(b"prVt", b"") * 100_001 + png[33:]) == "too_large"
    jpeg = saved(photo(), "JPEG")
    assert reject_of(jpeg[:2] + b"\xff\xfe\0\2" * 100_001 + jpeg[2:]) == "too_large"


def test_flipped_bits_give_an_image_or_a_reject_and_nothing_else():
    rng = np.random.default_rng(7)
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        raw = saved(photo(), form)
        for _ in range(40):
            bad = bytearray(raw)
            for at in rng.integers(0, len(raw), 4):
                bad[at] ^= 1 << rng.integers(8)
            with contextlib.suppress(Reject):
                assert decode(bytes(bad)).dtype == np.uint8


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = saved(photo(), form, exif=exif)
    assert distance(decode(raw), ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB")) < 0.5


def test_metadata_is_dropped():
    exif = Image.Exif()
    exif[0x010E] = "my address"
    raw = encode(saved(photo(), "JPEG", exif=exif, comment=b"my address"), ImageRecipe()).data
    assert b"my address" not in raw
    assert b"Exif" not in raw


def test_alpha_goes_over_white_and_grey_stays_one_channel():
    clear = photo().convert("RGBA")
    clear.putalpha(0)
    assert (decode(saved(clear, "PNG")) == 255).all()
    assert (decode(saved(clear, "WEBP", lossless=True)) == 255).all()
    grey = Image.new("LA", (8, 6), (10, 128))
    assert decode(saved(grey, "PNG")).shape == (6, 8, 1)
    assert abs(int(decode(saved(grey, "PNG"))[0, 0, 0]) - 132) <= 1
    palette = photo().convert("P", palette=Image.Palette.ADAPTIVE)
    assert distance(decode(saved(palette, "PNG")), palette.convert("RGB")) == 0
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert (decode(saved(palette, "PNG", transparency=palette.getpixel((0, 0))))[0, 0] == 255).all()
    for mode in ("L", "1"):
        flat = photo().convert(mode)
        assert distance(decode(saved(flat, "PNG"))[..., 0], flat.convert("L")) == 0
    assert distance(decode(saved(photo().convert("L"), "JPEG", quality=95))[..., 0], photo().convert("L")) < 1


def test_cmyk_and_ycck_are_turned_to_rgb_adobe_inversion_included():
    raw = saved(photo().convert("CMYK"), "JPEG", quality=95)
    assert distance(decode(raw), photo()) < 3
    assert not encode(raw, ImageRecipe()).passed
    raw = ycck(photo())
    assert raw[raw.index(b"Adobe") + 11] == 2  # Adobe's number for YCCK
    assert simplejpeg.decode_jpeg_header(raw)[2] == "YCCK"
    assert distance(decode(raw), photo()) < 3


def test_sixteen_bits_become_eight_grey_and_colour():
    values = np.linspace(0, 65_535, 100).astype(np.uint16).reshape(10, 10)
    for form in ("PNG", "TIFF"):
        assert np.array_equal(decode(saved(Image.fromarray(values), form))[..., 0], np.rint(values / 257))
    colour = np.asarray(photo()).astype(np.uint16) * 257 + np.arange(120, dtype=np.uint16)[:, None]
    for extension in (".png", ".tiff"):
        pixels = decode(cv2.imencode(extension, colour[..., ::-1])[1].tobytes())
        assert np.abs(pixels - colour / 257).max() < 1.01
    clear = decode(saved(Image.fromarray(values), "PNG", transparency=int(values[3, 3])))
    assert clear[3, 3, 0] == 255
    whole = Image.fromarray(np.arange(100, dtype=np.int32).reshape(10, 10))
    assert reject_of(saved(whole, "TIFF")) == "unsupported"  # taken as 16 bits it would be black


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_taken_and_said_to_be(form):
    options = {"lossless": True} if form == "WEBP" else {}
    raw = saved(photo(seed=1), form, save_all=True, append_images=[photo(seed=2), photo(seed=3)], **options)
    made = encode(raw, ImageRecipe(format="png"))
    assert distance(decode(made.data), Image.open(io.BytesIO(raw)).convert("RGB")) == 0
    assert distance(decode(made.data), photo(seed=1)) < (9 if form == "GIF" else 0.001)
    assert made.animated
    assert not encode(saved(photo(), form), ImageRecipe()).animated
    assert getattr(Image.open(io.BytesIO(made.data)), "n_frames", 1) == 1


def test_content_says_what_a_file_is():
    raw = saved(photo(), "PNG")  # ImageNet has one that is called .JPEG
    assert [encode(raw, ImageRecipe(format=form)).extension for form in ("jpg", "png", "keep")] == ["jpg", "png", "png"]
    raw = saved(photo(), "JPEG")
    assert [encode(raw, ImageRecipe(format=form)).extension for form in ("jpg", "png", "keep")] == ["jpg", "png", "jpg"]
    assert encode(np.asarray(photo()), ImageRecipe(format="keep")).extension == "png"
    assert encode(saved(photo(), "WEBP"), ImageRecipe(format="keep")).extension == "png"
    large = encode(saved(photo(500, 375), "JPEG"), ImageRecipe(format="keep", size=32))
    assert (large.extension, large.passed, large.data[:3]) == ("jpg", False, b"\xff\xd8\xff")


def test_a_colour_profile_is_converted_and_a_broken_one_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert distance(decode(saved(photo(), "PNG", icc_profile=srgb)), photo()) == 0
    assert distance(decode(saved(photo(), "PNG", icc_profile=b"nonsense")), photo()) == 0
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert distance(decode(saved(photo(), "PNG", icc_profile=lab)), photo()) == 0  # not a profile for RGB


def test_the_short_side_shrinks_to_size_and_is_never_enlarged():
    made = encode(saved(photo(500, 375), "JPEG"), ImageRecipe(size=256))
    assert (made.width, made.height, made.channels) == (341, 256, 3)
    assert encode(saved(photo(375, 500), "PNG"), ImageRecipe(size=256)).height == 341
    assert encode(saved(photo(120, 90), "PNG"), ImageRecipe(size=256)).width == 120
    small = encode(np.asarray(photo(500, 375)), ImageRecipe(size=100, format="png"))
    assert distance(decode(small.data), photo(500, 375).resize((133, 100), Image.Resampling.BOX)) < 2
    grey = encode(np.zeros((60, 50, 1), np.uint8), ImageRecipe(size=10, format="png"))
    assert decode(grey.data).shape == (12, 10, 1)


@pytest.mark.parametrize(
    ("fit", "size", "source", "made"),
    [
        ("long", 100, (500, 375), (100, 75)),
        ("long", 500, (500, 375), (500, 375)),
        ("long", 10, (700, 3), (10, 1)),
        ("crop", 100, (500, 375), (100, 100)),
        ("crop", 400, (500, 375), (375, 375)),
        ("crop", 400, (375, 375), (375, 375)),
        ("none", 100, (500, 375), (500, 375)),
        ("short", 100, (500, 375), (133, 100)),
        ("short", 400, (500, 375), (500, 375)),
    ],
)
def test_fit_says_what_size_bounds(fit, size, source, made):
    for raw in (np.asarray(photo(*source)), saved(photo(*source), "PNG"), saved(photo(*source), "JPEG")):
        done = encode(raw, ImageRecipe(size, fit))
        assert (done.width, done.height) == made
        turned = encode(np.asarray(photo(*source)).swapaxes(0, 1), ImageRecipe(size, fit))
        assert (turned.height, turned.width) == made
        assert decode(done.data).shape == (made[1], made[0], 3)


def test_the_centre_is_what_crop_keeps():
    pixels = np.zeros((40, 100, 1), np.uint8)
    pixels[:, 30:70] = 200
    assert (decode(encode(pixels, ImageRecipe(20, "crop", format="png")).data) == 200).all()


@pytest.mark.parametrize(("height", "step"), [(1, 1), (127, 1), (128, 2), (203, 3), (4000, 62)])
def test_sums_are_exact_over_every_row_or_evenly_spaced_ones(height, step):
    for pixels in (np.asarray(photo(301, height)), np.full((height, 1000, 1), 255, np.uint8)):
        wide = pixels[::step].astype(np.int64)
        count, sums, squares = pixel_sums(pixels)
        assert (count, sums) == (wide[..., 0].size, wide.sum((0, 1)).tolist())
        assert squares == (wide**2).sum((0, 1)).tolist()
        assert encode(pixels, ImageRecipe(format="png")).summed == (count, sums, squares)


def test_png_is_lossless_and_jpeg_close():
    pixels = np.asarray(photo())
    assert np.array_equal(decode(encode(pixels, ImageRecipe(format="png")).data), pixels)
    assert distance(decode(encode(pixels, ImageRecipe(quality=95)).data), pixels) < 2
    assert decode(encode(pixels[..., :1], ImageRecipe()).data).shape == (90, 120, 1)


def test_what_the_encoder_cannot_hold_is_rejected_or_refused():
    with pytest.raises(Reject, match="JPEG side"):
        encode(np.zeros((1, 70_000, 1), np.uint8), ImageRecipe())
    with pytest.raises(ValueError, match="uint8"):
        encode(np.zeros((4, 4)), ImageRecipe())
    for wrong in ({"size": 0}, {"quality": 101}, {"format": "jpeg"}, {"fit": "width"}, {"fit": "crop"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            ImageRecipe(**wrong)
