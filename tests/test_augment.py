"""Bytes to pixels: decoded right, varied by key alone, and in the amounts the options say."""

import io
import itertools
import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import draw
from pipeline.loading.augment import Augment, crop_boxes, crop_into, decode, fit, to_float, vary


def picture(height=48, width=64, channels=3, seed=0):
    """Smooth enough that two JPEG decoders agree about it."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    large = np.asarray(Image.fromarray(small.squeeze()).resize((width, height), Image.Resampling.BICUBIC))
    return large.reshape(height, width, channels)


def coded(pixels, form):
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, form, **({"quality": 95} if form == "JPEG" else {}))
    return buffer.getvalue()


def random_resized_crop(image, side, seed, epoch, row):
    height, width, channels = image.shape
    out = np.empty((side, side, channels), np.uint8)
    box = crop_boxes(np.array([height]), np.array([width]), seed, np.array([epoch]), np.array([row]))[0]
    crop_into(image, box.tolist(), False, out)
    return out


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("stored", [1, 3])
@pytest.mark.parametrize("asked", [1, 3])
def test_decoding_agrees_with_pillow(form, stored, asked):
    data = coded(picture(channels=stored), form)
    pixels = decode(data, asked)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L" if asked == 1 else "RGB"), dtype=int)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (48, 64, asked)
    tolerance = 0 if form == "PNG" and stored == asked else 2
    assert np.abs(pixels.astype(int).squeeze() - expected).max() <= tolerance


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_no_whole_image_is_a_value_error(form, channels):
    data = coded(picture(), form)
    for bad in (b"", b"\xff\xd8", b"GIF89a", data[:1], data[:30], data[: len(data) // 2], data[: len(data) - 20]):
        with pytest.raises(ValueError, match=r"."):
            decode(bad, channels)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (30, 91), (32, 32), (32, 80), (7, 9), (1, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_fit_gives_the_centre_square(height, width, channels):
    image = picture(height, width, channels)
    fitted = fit(image, 32)
    assert fitted.shape == (32, 32, channels)
    if height == 32:
        left = (width - 32) // 2
        assert np.array_equal(fitted, image[:, left : left + 32])


@pytest.mark.parametrize(("height", "width"), [(48, 64), (37, 91), (32, 32)])
def test_fit_of_a_longer_short_side_is_the_centre_of_the_larger_square(height, width):
    image = picture(height, width, 3)
    assert np.array_equal(fit(image, 32, 40), fit(image, 40)[4:36, 4:36])


def test_fit_keeps_a_constant_image_constant_and_mirrors_with_its_input():
    assert np.unique(fit(np.full((50, 70, 1), 131, np.uint8), 32)).tolist() == [131]
    image = picture(40, 72)
    assert np.abs(fit(image[:, ::-1], 32)[:, ::-1].astype(int) - fit(image, 32)).max() <= 1


def test_crops_take_the_areas_and_ratios_they_should():
    ys, xs = np.mgrid[0:200, 0:240]
    image = np.stack([ys, xs, 0 * xs], axis=2).astype(np.uint8)  # each pixel says where it was
    areas, ratios, tops = [], [], []
    for row in range(3000):
        crop = random_resized_crop(image, 64, 1, 0, row).astype(float)
        height, width = (np.ptp(crop[:, :, c].mean(axis=1 - c)) * 64 / 63 for c in (0, 1))
        areas.append(height * width / image[:, :, 0].size)
        ratios.append(width / height)
        tops.append(crop[:, :, 0].min() / max(1.0, 200 - height))
    areas, ratios, tops = np.array(areas), np.array(ratios), np.array(tops)
    assert 0.075 < areas.min() < 0.1
    assert 0.9 < areas.max() < 1.03
    assert 0.72 < ratios.min() < 0.78
    assert 1.28 < ratios.max() < 1.38
    # Near the whole area not all ratios fit in, so large crops are rarer than drawn and wide as the image is.
    assert abs(np.log(ratios[areas < 0.5]).mean()) < 0.02
    below = np.histogram(areas[areas < 0.5], bins=6, range=(0.08, 0.5))[0]
    assert below.min() > 0.8 * below.mean()
    assert 0.45 < tops.mean() < 0.55


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (3, 400, [0, 198, 3, 4]),
        (400, 3, [198, 0, 4, 3]),
        (1, 90, [0, 44, 1, 1]),
        (30, 900, [0, 430, 30, 40]),
        (900, 30, [430, 0, 40, 30]),
    ],
)
def test_where_no_crop_fits_the_largest_centred_one_is_taken(height, width, box):
    n = np.arange(20)
    assert crop_boxes(np.full(20, height), np.full(20, width), 0, 0 * n, n).tolist() == [box] * 20
    image = picture(height, width)
    assert random_resized_crop(image, 16, 0, 0, 1).shape == (16, 16, 3)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (3, 2), (5, 5), (224, 224), (341, 256), (20, 29)])
def test_boxes_lie_inside_the_image_and_are_those_of_the_published_algorithm(height, width):
    n = np.arange(200)
    boxes = crop_boxes(np.full(200, height), np.full(200, width), 7, n % 3, n)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()
    assert boxes.tolist() == [published(height, width, 7, row % 3, row) for row in range(200)]


def published(height, width, *key):
    """torchvision's RandomResizedCrop.get_params, step by step, with our draws in place of torch's."""
    draws = iter(draw.uniform(draw.text_bits("augment/crop"), *key, np.arange(40)).tolist())
    for _ in range(10):
        area = height * width * (0.08 + 0.92 * next(draws))
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * next(draws))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        down, right = next(draws), next(draws)
        if 0 < w <= width and 0 < h <= height:
            return [int(down * (height - h + 1)), int(right * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_decoded_smaller_is_the_same_picture(shrink, channels):
    pixels = picture(1203, 1605, channels)
    small, whole = decode(coded(pixels, "JPEG"), channels, shrink), decode(coded(pixels, "JPEG"), channels)
    assert small.shape == (-(-1203 // shrink), -(-1605 // shrink), channels)
    expected = cv2.resize(whole, small.shape[1::-1], interpolation=cv2.INTER_AREA).reshape(small.shape)
    assert np.abs(small.astype(int) - expected).mean() < 1.5


def test_room_is_used_where_it_is_large_enough():
    data, room = coded(picture(), "JPEG"), np.zeros(48 * 64 * 3, np.uint8)
    assert np.shares_memory(decode(data, 3, room=room), room)
    assert np.array_equal(decode(data, 3, room=room[:-1]), decode(data, 3, room=room))
    assert not np.shares_memory(decode(data, 3, room=room[:-1]), room)


def test_a_crop_depends_on_its_key_alone():
    image = picture()
    assert np.array_equal(random_resized_crop(image, 24, 1, 2, 3), random_resized_crop(image, 24, 1, 2, 3))
    others = [random_resized_crop(image, 24, *key) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1))]
    assert not any(np.array_equal(random_resized_crop(image, 24, 1, 2, 3), other) for other in others)


@pytest.mark.parametrize("augment", [Augment(crop="pad", pad=3), Augment(flip=True), Augment(crop="pad", flip=True)])
def test_an_image_varies_the_same_in_any_batch(augment):
    images = np.stack([picture(32, 32, seed=i) for i in range(20)])
    rows, epochs = np.arange(20) * 7, np.arange(20) % 3
    together = vary(images.copy(), augment, 11, epochs, rows)
    backwards = vary(images[::-1].copy(), augment, 11, epochs[::-1], rows[::-1])[::-1]
    alone = [vary(images[i : i + 1].copy(), augment, 11, epochs[i : i + 1], rows[i : i + 1])[0] for i in range(20)]
    assert np.array_equal(together, backwards)
    assert np.array_equal(together, np.stack(alone))


def test_about_half_are_mirrored_anew_in_each_epoch_and_for_each_seed():
    images = np.zeros((4000, 1, 2, 1), np.uint8)
    images[:, :, 1] = 255

    def mirrored(seed, epoch):
        return vary(images.copy(), Augment(flip=True), seed, np.full(4000, epoch), np.arange(4000))[:, 0, 0, 0] == 255

    draws = [mirrored(0, 0), mirrored(0, 1), mirrored(1, 0)]
    assert all(0.46 < d.mean() < 0.54 for d in draws)
    assert all(0.46 < (a == b).mean() < 0.54 for a, b in itertools.pairwise(draws))
    assert np.array_equal(draws[0], mirrored(0, 0))


@pytest.mark.parametrize("reach", [0, 1, 3, 40])
def test_shifts_stay_within_reach_are_all_met_and_repeat_the_edges(reach):
    image, n = picture(16, 16), 2000 if reach < 40 else 20
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    shifted = vary(np.stack([image] * n), Augment(crop="pad", pad=reach), 3, np.zeros(n, int), np.arange(n))
    places = {
        padded[top : top + 16, left : left + 16].tobytes(): (top, left)
        for top in range(2 * reach + 1)
        for left in range(2 * reach + 1)
    }
    met = [places[one.tobytes()] for one in shifted]
    if reach < 40:
        assert set(met) == set(places.values())
        assert abs(np.mean(met) - reach) < 0.2


def test_without_options_nothing_varies():
    images = np.stack([picture(8, 8, seed=i) for i in range(5)])
    assert np.array_equal(vary(images.copy(), Augment(), 0, np.zeros(5, int), np.arange(5)), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_floats_are_the_pixels_less_the_mean_over_the_deviation(channels):
    images = torch.from_numpy(np.stack([picture(8, 9, channels, seed=i) for i in range(4)]))
    mean, std = torch.tensor([0.3, 0.4, 0.5][:channels]), torch.tensor([0.2, 0.25, 0.3][:channels])
    floats = to_float(images, mean, std)
    assert (floats.dtype, floats.shape) == (torch.float32, (4, channels, 8, 9))
    assert floats.is_contiguous()
    as_it_lies = to_float(images, mean, std, channels_last=True)
    assert as_it_lies.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(as_it_lies, floats)
    expected = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    assert torch.allclose(floats.double(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"crop": "centre"}, "crop 'centre': use one of none, pad, resized"),
        ({"image_size": -1}, "image size -1"),
        ({"pad": -2}, "pad -2"),
        ({"channels": 2}, "channels 2"),
        ({"policy": "auto"}, "policy 'auto': use one of none, trivial, rand"),
        ({"policy_ops": 0}, "policy ops 0"),
        ({"policy_magnitude": 31}, "magnitude 31"),
        ({"jitter": 1.5}, "jitter 1.5"),
        ({"hue": 0.6}, "hue 0.6"),
        ({"erase": -0.1}, "erase -0.1"),
        ({"eval_size": -1}, "eval size -1"),
        ({"eval_share": 0.0}, "eval share 0.0"),
        ({"eval_share": 1.2}, "eval share 1.2"),
    ],
)
def test_a_bad_option_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        Augment(**options)


def test_images_grow_from_epoch_to_epoch_as_asked():
    grown = Augment(192, start_size=160, ramp_from=35, ramp_to=41)
    assert [grown.side(e) for e in (0, 34, 35, 37, 38, 39, 40, 41, 90)] == [160] * 4 + [192] * 5
    assert [Augment(32, start_size=16, ramp_to=4).side(e) for e in range(6)] == [16, 20, 24, 28, 32, 32]
    assert Augment(28).side(3) == 28
    for wrong in ({"start_size": 33}, {"start_size": -1}, {"ramp_from": 3, "ramp_to": 2}, {"ramp_from": -1}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            Augment(32, **wrong)
