"""Colour jitter, erasing, TrivialAugment and RandAugment: Pillow's pixels, torchvision's ranges, keyed draws."""

import colorsys
import itertools
import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy.spatial.distance import cdist
from scipy.stats import chisquare, kstest

from pipeline.loading import photometric
from pipeline.loading.photometric import adjust_hue, color_jitter, random_erase
from pipeline.loading.trivial import BINS, OPERATIONS, affine, rand_augment, rotate, trivial_augment

GREATEST_WIDE = {
    **dict.fromkeys(("ShearX", "ShearY", "Brightness", "Color", "Contrast", "Sharpness"), 0.99),
    **dict.fromkeys(("TranslateX", "TranslateY"), 32),
    "Rotate": 135,
}
GREATEST_RAND = {
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9),
    **dict.fromkeys(("ShearX", "ShearY"), 0.3),
    "Rotate": 30,
}
UNSIGNED = "Identity", "Posterize", "Solarize", "AutoContrast", "Equalize"
# Pixel values apart from Pillow's: it drops fractions after two roundings in Color and Sharpness, OpenCV after one.
TOLERANCE = {"Color": 1, "Sharpness": 1}


def smooth(height=40, width=40, channels=3, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def noise(height=40, width=40, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


IMAGES = {
    "smooth": smooth(),
    "smooth, wide": smooth(37, 64),
    "noise": noise(),
    "noise, tall": noise(53, 31),
    "grey": smooth(channels=1),
    "grey noise, wide": noise(28, 33, 1),
    "flat": np.full((20, 20, 3), (3, 200, 90), np.uint8),
    "dull": smooth() // 4 + 60,
    "two values": (noise() > 99).astype(np.uint8) * 7 + 100,
    "few pixels": noise(2, 3),
    "one grey pixel": noise(1, 1, 1),
    "photo size": smooth(224, 224),
}


def pillow(image):
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def moved(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


REFERENCE = {
    "Identity": lambda image, m: image,
    "ShearX": lambda image, m: moved(image, 1, m, 0, 0, 1, 0),
    "ShearY": lambda image, m: moved(image, 1, 0, 0, m, 1, 0),
    "TranslateX": lambda image, m: moved(image, 1, 0, -int(m), 0, 1, 0),
    "TranslateY": lambda image, m: moved(image, 1, 0, 0, 0, 1, -int(m)),
    "Rotate": lambda image, m: image.rotate(m, Image.Resampling.NEAREST),
    "Brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m),
    "Color": lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
    "Contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
    "Posterize": lambda image, m: ImageOps.posterize(image, 8 - round(m)),
    "Solarize": lambda image, m: ImageOps.solarize(image, 255 - m),
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
}


def judged(name, image, magnitude):
    return np.asarray(REFERENCE[name](pillow(image), magnitude)).reshape(image.shape)


def magnitudes(name, greatest):
    """All that an operation has, both signs where it has them."""
    steps = (np.arange(BINS) / (BINS - 1) * greatest).tolist()
    return steps if name in UNSIGNED else [*steps, *(-m for m in steps)]


@pytest.mark.parametrize("name", REFERENCE)
def test_an_operation_is_pillows_at_every_magnitude(name):
    reach = {"Posterize": 7, "Solarize": 255, **GREATEST_WIDE}.get(name, 0)
    for kind, image in IMAGES.items():
        before = image.copy()
        for m in {*magnitudes(name, reach), *magnitudes(name, GREATEST_RAND.get(name, 0))}:
            result = OPERATIONS[name](image, m)
            assert (result.dtype, result.shape) == (np.uint8, image.shape), kind
            assert result.flags.c_contiguous
            apart = np.abs(result.astype(int) - judged(name, image, m)).max()
            assert apart <= TOLERANCE.get(name, 0), (kind, m)
        assert np.array_equal(image, before), "the image given was written to"


@pytest.mark.parametrize("degrees", [0, 1, 33.3, 45, 90, 180, 270, -90, 359])
def test_any_turn_and_any_affine_map_is_pillows(degrees):
    for image in IMAGES.values():
        expected = pillow(image).rotate(degrees, Image.Resampling.NEAREST)
        assert np.array_equal(rotate(image, degrees), np.asarray(expected).reshape(image.shape))
        matrix = (0.7, 0.2 + degrees / 300, -3.25, -0.4, 1.3, 5.5)
        assert np.array_equal(affine(image, *matrix), np.asarray(moved(pillow(image), *matrix)).reshape(image.shape))


@pytest.mark.parametrize("turn", [-0.5, -0.31, -0.1, 0.0, 0.01, 0.25, 1 / 3, 0.5])
def test_a_turned_hue_is_exact_but_for_rounding_and_near_pillows(turn):
    grid = np.stack(np.meshgrid(*[[0, 1, 2, 127, 128, 254, 255]] * 3), axis=-1).reshape(7, 49, 3).astype(np.uint8)
    for image in (grid, noise()):
        hsv = [colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in image.reshape(-1, 3)]
        exact = 255 * np.array([colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in hsv]).reshape(image.shape)
        assert np.abs(adjust_hue(image, turn) - exact).max() < 0.501
    # Pillow's 8-bit hue and saturation lose up to a step each: about 6 values of a pixel's brightest, and 1.
    bands = list(pillow(smooth()).convert("HSV").split())
    bands[0] = Image.fromarray((np.asarray(bands[0]).astype(int) + int(turn * 255)).astype(np.uint8))
    coarse = np.asarray(Image.merge("HSV", bands).convert("RGB")).astype(int)
    apart = np.abs(adjust_hue(smooth(), turn) - coarse)
    assert apart.max() <= 14
    assert apart.mean() < 4


def check_draws(results, image, greatest, levels):
    """All of `results` are images the published table makes of `image`, as often as it should make them."""
    made, drawn, shares = [], [], []
    for name in REFERENCE:
        signs = (1,) if name in UNSIGNED else (1, -1)
        for level, sign in itertools.product(levels, signs):
            made.append(judged(name, image, sign * greatest.get(name, 0) * level / (BINS - 1)).ravel())
            drawn.append((name, sign, level))
            shares.append(1 / len(REFERENCE) / len(signs) / len(levels))
    # Draws that make the same image (a shift by 0, a factor of 1) count for the first of them.
    made, first, same = np.unique(np.array(made), axis=0, return_index=True, return_inverse=True)
    expected = np.bincount(same.ravel(), shares) * len(results)
    some = slice(None, None, 7)  # values enough to tell images apart
    apart = cdist(np.array([result.ravel()[some] for result in results]), made[:, some], "chebyshev")
    assert apart.min(axis=1).max() <= max(TOLERANCE.values()), "an image that the table does not make"
    seen = np.bincount(apart.argmin(axis=1), minlength=len(made))
    drawn = [drawn[i] for i in first]
    groupings = {
        "operation": [name for name, _, _ in drawn],
        "sign": [sign for name, sign, _ in drawn if name not in UNSIGNED],
        "level": [level for _, _, level in drawn],
        "operation and level": [(name, level // 8) for name, _, level in drawn],
    }
    signed = np.array([name not in UNSIGNED for name, _, _ in drawn])
    for grouping, labels in groupings.items():
        of = signed if grouping == "sign" else np.ones(len(drawn), bool)
        groups = np.unique([str(label) for label in labels], return_inverse=True)[1]
        counts, means = np.bincount(groups, seen[of]), np.bincount(groups, expected[of])
        assert counts.all(), f"{grouping}: one is never drawn"
        if len(counts) > 1:
            assert chisquare(counts, means * counts.sum() / means.sum()).pvalue > 0.001, grouping


def test_trivial_augment_draws_operations_magnitudes_and_signs_of_its_table_alike():
    image = np.where(noise(70, 66, seed=3) > 250, 250, smooth(70, 66, seed=5) // 2 + noise(70, 66, seed=4) // 2)
    image = image.astype(np.uint8)
    results = [trivial_augment(image, 0, 1, row) for row in range(1500)]
    greatest = {**GREATEST_WIDE, "Posterize": 6, "Solarize": 255}
    check_draws(results, image, greatest, range(BINS))


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_rand_augment_draws_operations_and_signs_of_its_table_alike(magnitude):
    image = smooth(50, 80, seed=5) // 2 + noise(50, 80, seed=4) // 2
    results = [rand_augment(image, 1, magnitude, 0, 1, row) for row in range(600)]
    sides = {"TranslateX": 150 / 331 * 80, "TranslateY": 150 / 331 * 50}
    check_draws(results, image, {**GREATEST_RAND, **sides, "Posterize": 4, "Solarize": 255}, [magnitude])


def test_rand_augment_applies_n_operations_one_after_another(monkeypatch):
    image, run = smooth(), []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda image, m, name=name: run.append(name) or image + np.uint8(1))
    lists = []
    for row in range(2000):
        run.clear()
        assert np.array_equal(rand_augment(image, 3, 9, 5, row), image + np.uint8(3))
        lists.append(tuple(run))
    for places in ((0, 1), (0, 2), (1, 2)):  # any two are independent, repeats included
        pairs = [(names[places[0]], names[places[1]]) for names in lists]
        seen = [pairs.count(pair) for pair in itertools.product(OPERATIONS, repeat=2)]
        assert chisquare(seen).pvalue > 0.001
    assert np.array_equal(rand_augment(image, 0, 9, 5), image)


def recorded(monkeypatch, amounts, rows, image=None):
    """The (adjustment, factor) lists that color_jitter runs for each row."""
    names, runs = ("brightness", "contrast", "saturation", "hue"), []
    for name in names:
        monkeypatch.setattr(
            photometric, f"adjust_{name}", lambda image, factor, name=name: runs[-1].append((name, factor)) or image
        )
    for row in range(rows):
        runs.append([])
        color_jitter(smooth() if image is None else image, *amounts, 7, 2, row)
    return runs


def test_jitter_factors_are_uniform_in_torchvisions_ranges_in_any_order(monkeypatch):
    runs = recorded(monkeypatch, (0.4, 1.5, 0.8, 0.1), 2400)
    ranges = {"brightness": (0.6, 1.4), "contrast": (0, 2.5), "saturation": (0.2, 1.8), "hue": (-0.1, 0.1)}
    drawn = {name: np.array([dict(run)[name] for run in runs]) for name in ranges}
    for name, (low, high) in ranges.items():
        assert kstest(drawn[name], "uniform", (low, high - low)).pvalue > 0.001, name
    for one, other in itertools.combinations(drawn.values(), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
    orders = [tuple(name for name, _ in run) for run in runs]
    assert chisquare([orders.count(order) for order in itertools.permutations(ranges)]).pvalue > 0.001
    for name, factors in drawn.items():
        assert abs(np.corrcoef(factors, [order.index(name) for order in orders])[0, 1]) < 0.06, name


def test_leaving_an_adjustment_out_of_the_jitter_changes_no_other(monkeypatch):
    whole = recorded(monkeypatch, (0.4, 0.5, 0.6, 0.1), 50)
    for kept in itertools.product((False, True), repeat=4):
        amounts = [amount * keep for amount, keep in zip((0.4, 0.5, 0.6, 0.1), kept, strict=True)]
        names = [n for n, keep in zip(("brightness", "contrast", "saturation", "hue"), kept, strict=True) if keep]
        assert recorded(monkeypatch, amounts, 50) == [[step for step in run if step[0] in names] for run in whole]


def test_jittered_pixels_are_those_of_pillow_in_the_order_drawn(monkeypatch):
    image = smooth(48, 64)
    with monkeypatch.context() as patch:
        runs = recorded(patch, (0.4, 0.4, 0.4, 0), 40, image)
    for row, run in enumerate(runs):
        expected = pillow(image)
        for name, factor in run:
            enhance = {"saturation": "Color"}.get(name, name.title())
            expected = getattr(ImageEnhance, enhance)(expected).enhance(factor)
        apart = np.abs(color_jitter(image, 0.4, 0.4, 0.4, 0, 7, 2, row).astype(int) - np.asarray(expected))
        assert apart.max() <= 4  # 1 of Color, times brightness and contrast of 1.4 each, and what they truncate


AUGMENTATIONS = {
    "jitter": lambda image, *key: color_jitter(image, 0.4, 0.4, 0.4, 0.1, *key),
    "trivial": trivial_augment,
    "rand": lambda image, *key: rand_augment(image, 2, 9, *key),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_augmentation_depends_on_its_key_alone(name, channels):
    image, augment = noise(32, 48, channels), AUGMENTATIONS[name]
    before = image.copy()
    keys = [(seed, epoch, row) for seed in (0, 1) for epoch in (0, 1, 2) for row in range(20)]
    first = {key: augment(image, *key) for key in keys}
    again = {key: augment(image.copy(), *key) for key in reversed(keys)}
    assert np.array_equal(image, before)
    assert all(np.array_equal(first[key], again[key]) for key in keys)
    assert all((a.shape, a.dtype, a.flags.c_contiguous) == (image.shape, np.uint8, True) for a in first.values())
    for place in range(3):  # keys that differ in one number alone
        others = [tuple(n + 1 if i == place else n for i, n in enumerate(key)) for key in keys]
        same = [np.array_equal(first[key], first[o]) for key, o in zip(keys, others, strict=True) if o in first]
        assert np.mean(same) < 0.2  # few operations leave an image as it is


def test_a_grey_image_has_neither_saturation_nor_hue():
    image = noise(channels=1)
    assert all(np.array_equal(color_jitter(image, 0, 0, 0.9, 0.5, row), image) for row in range(20))
    for row in range(20):
        grey = color_jitter(image, 0.4, 0.4, 0.9, 0.5, row)
        assert np.array_equal(grey, color_jitter(image, 0.4, 0.4, 0, 0, row))
        # one that is grey in three channels stays grey
        assert np.ptp(color_jitter(image.repeat(3, axis=2), 0.4, 0.4, 0.9, 0.5, row).astype(int), axis=2).max() == 0


def boxes(images, value):
    """(top, left, height, width) of what was set to `value`, None where nothing was; it must be one whole rectangle."""
    found = []
    for image in images:
        ys, xs = np.nonzero((image == value).all(axis=2))
        if len(ys):
            found.append((ys.min(), xs.min(), np.ptp(ys) + 1, np.ptp(xs) + 1))
            assert len(ys) == found[-1][2] * found[-1][3]
        else:
            found.append(None)
    return found


def test_erased_rectangles_have_the_chances_areas_ratios_and_places_they_should():
    n, height, width = 4000, 64, 80
    images = np.ones((n, height, width, 1), np.uint8)
    assert random_erase(images, 0.5, 3, np.zeros(n, int), np.arange(n)) is images
    found = [box for box in boxes(images, 0) if box]
    assert 0.47 < len(found) / n < 0.53
    top, left, h, w = np.array(found).T
    share, ratio = h * w / (height * width), h / w
    assert (0.018 < share.min() < 0.025, 0.32 < share.max() < 0.34) == (True, True)
    assert (0.27 < ratio.min() < 0.34, 2.9 < ratio.max() < 3.6) == (True, True)
    small = share < 0.15  # every ratio fits there, so areas and log ratios are as drawn
    assert kstest(share[small], "uniform", (0.02, 0.13)).pvalue > 0.001
    logs = np.log(ratio[small])
    assert kstest(logs, "uniform", (math.log(0.3), math.log(3.3) - math.log(0.3))).pvalue > 0.001
    for start, room in ((top, height - h), (left, width - w)):
        assert start.min() == 0
        assert (start <= room).all()
        assert (start == room).any()
        assert abs((start / room).mean() - 0.5) < 0.03


@pytest.mark.parametrize("probability", [0, 0.3, 1])
@pytest.mark.parametrize(("channels", "value"), [(1, 0), (3, 255), (3, (9, 0, 77))])
def test_an_image_is_erased_the_same_in_any_batch(probability, channels, value):
    images = np.stack([np.full((24, 24, channels), 100 + i, np.uint8) for i in range(30)])
    rows, epochs = np.arange(30) * 7, np.arange(30) % 3
    together = random_erase(images.copy(), probability, 11, epochs, rows, value=value)
    backwards = random_erase(images[::-1].copy(), probability, 11, epochs[::-1], rows[::-1], value=value)[::-1]
    alone = [
        random_erase(images[i : i + 1].copy(), probability, 11, epochs[i : i + 1], rows[i : i + 1], value=value)[0]
        for i in range(30)
    ]
    assert np.array_equal(together, backwards)
    assert np.array_equal(together, np.stack(alone))
    erased = boxes(together, value)
    assert sum(box is not None for box in erased) in {0: [0], 1: [30]}.get(probability, range(2, 20))
    for image, before, box in zip(together, images, erased, strict=True):  # outside the rectangle nothing changed
        assert (image != before).any(axis=2).sum() == (box[2] * box[3] if box else 0)
    if probability:
        elsewhere = [(12, epochs, rows), (11, epochs + 1, rows), (11, epochs, rows + 1)]
        assert not any(
            np.array_equal(together, random_erase(images.copy(), probability, *key, value=value)) for key in elsewhere
        )


def test_a_rectangle_that_never_fits_leaves_the_image():
    images = np.ones((20, 16, 16, 3), np.uint8)
    random_erase(images, 1, 0, np.zeros(20, int), np.arange(20), scale=(1, 1), ratio=(1, 1))
    assert images.all()
    assert random_erase(images[:0], 1, 0, np.zeros(0, int), np.arange(0)).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: color_jitter(smooth(), -0.1, 0, 0, 0, 1), "brightness -0.1: use a number from 0 up"),
        (lambda: color_jitter(smooth(), 0, math.inf, 0, 0, 1), "contrast inf"),
        (lambda: color_jitter(smooth(), 0, 0, math.nan, 0, 1), "saturation nan"),
        (lambda: color_jitter(smooth(), 0, 0, 0, 0.51, 1), "hue 0.51: use a share of the circle from 0 to 0.5"),
        (lambda: rand_augment(smooth(), -1, 9, 1), "n -1"),
        (lambda: rand_augment(smooth(), 1.5, 9, 1), "n 1.5"),
        (lambda: rand_augment(smooth(), 2, 31, 1), "magnitude 31: use a whole number from 0 to 30"),
        (lambda: rand_augment(smooth(), 2, -1, 1), "magnitude -1"),
        (lambda: erase(probability=1.1), "probability 1.1"),
        (lambda: erase(probability=math.nan), "probability nan"),
        (lambda: erase(scale=(0.5, 0.2)), r"scale \(0.5, 0.2\)"),
        (lambda: erase(scale=(0.5, 1.2)), r"scale \(0.5, 1.2\)"),
        (lambda: erase(ratio=(0, 3)), r"ratio \(0, 3\)"),
        (lambda: erase(ratio=(2, 1)), r"ratio \(2, 1\)"),
        (lambda: erase(value=256), "value 256"),
        (lambda: erase(value=(1, -2, 3)), r"value \(1, -2, 3\)"),
    ],
)
def test_a_bad_range_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def erase(probability=0.5, **options):
    return random_erase(np.ones((2, 8, 8, 3), np.uint8), probability, 0, np.zeros(2, int), np.arange(2), **options)
