"""What came tonight against what the champion was trained on: each difference is found, and no other is."""

import json
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from test_report import Markup

from pipeline.nightly import drift, profile
from pipeline.nightly.drift import DriftConfig, Profile, compare, measure, section
from pipeline.shards import index
from pipeline.shards.build import build
from pipeline.shards.plan import Recipe

RECIPE, CONFIG = Recipe(format="keep", samples_per_shard=100), DriftConfig()
CLASSES = {"boot": 0.4, "sandal": 0.4, "shoe": 0.2}


def paint(root, stem, count, classes=CLASSES, seed=0, darker=0, sides=0, **saved):
    """Grey PNGs of noise: heights of 60 to 120 px, a third of them wider than high; classes by their shares.

    The noise has two values, so that bytes depend on its area, brightness on its mean and contrast on their distance,
    each drawn by itself (odd, so that no bin ends at half of it). sides: height of a larger canvas with as much noise
    on it, stronger, so that nothing else moves.
    """
    random = np.random.default_rng([seed, *stem.encode()])
    names = random.permutation(np.repeat(list(classes), np.round(np.array([*classes.values()]) * count).astype(int)))
    for i, name in enumerate(names):
        height, ratio = int(random.integers(60, 121)), random.choice([1, 1, 4 / 3])
        base, step = int(random.integers(100, 151)), 2 * int(random.integers(5, 20)) + 1
        area, width = height * round(height * ratio), round(height * ratio)
        if sides:
            height, width = sides, round(sides * ratio)
            step = round(step * (height * width / area) ** 0.5)
        pixels = np.full(height * width, base - darker)
        pixels[:area] += random.integers(0, 2, area) * step - step // 2
        path = root / str(name) / f"{stem}-{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.reshape(height, width).astype(np.uint8)).save(path, **saved)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A source of 400 images and its dataset."""
    root = tmp_path_factory.mktemp("before")
    paint(root / "in", "old", 400)
    build(str(root / "in"), str(root / "out"), RECIPE, workers=0)
    return root


@pytest.fixture
def root(before, tmp_path):
    return shutil.copytree(before, tmp_path / "grown")


def grow(root, recipe=RECIPE):
    """What the source has got since becomes a generation; the dataset with it."""
    build(str(root / "in"), str(root / "out"), recipe, workers=0, max_rejects=1000)
    return index.load(str(root / "out"))


def judged(data, config=CONFIG, images=1000):
    """Report of the last generation against all before, after a trip of both profiles through JSON."""
    numbers = [generation["generation"] for generation in data.info["generations"]]
    profiles = [measure(data, numbers[:-1], images), measure(data, numbers[-1:], images)]
    return compare(*(Profile(**json.loads(json.dumps(asdict(each)))) for each in profiles), config)


def found(report):
    return {finding.feature: finding.verdict for finding in report.findings if finding.verdict != "ok"}


def details(report):
    return {finding.feature: finding.detail for finding in report.findings}


# ---- what each difference shows as


def test_a_night_like_all_before_has_no_finding(root):
    paint(root / "in", "night", 150)
    report = judged(grow(root))
    assert (report.verdict, found(report)) == ("ok", {})
    assert re.fullmatch(r"\d+ images in train are like the 3\d\d before", report.reason)
    assert json.loads(json.dumps(asdict(report)))["findings"][0]["feature"] == "rejects"


@pytest.mark.parametrize(
    ("night", "feature", "said"),
    [
        ({"darker": 70}, "brightness", r"mean brightness 12\d\.?\d* -> 5\d\.?\d*; \d+ to \d+: .* before, .* now"),
        ({"sides": 200}, "short side", r"mean short side (89|9\d)(\.\d+)? -> 200 px; .*: 0 % before, 100 % now"),
        ({"compress_level": 0}, "file size", r"mean file size \d,?\d+(\.\d)? -> .* bytes; .*"),
        ({"classes": {"boot": 0.1, "shoe": 0.9}}, "classes", r"class 'shoe': (19|2\d)(\.\d)? % before, (8|9)\S+ % now"),
    ],
    ids=["darker images", "another size", "other compression", "a class that takes over"],
)
def test_a_difference_is_the_one_finding_and_fails_in_words(root, night, feature, said):
    paint(root / "in", "night", 150, **night)
    report = judged(grow(root))
    assert found(report) == {feature: "fail"}
    assert re.fullmatch(said, details(report)[feature])
    assert (report.verdict, report.reason) == ("fail", f"{feature}: {details(report)[feature]}")


def test_a_class_that_is_new_is_named_and_is_no_drift_of_the_others(root):
    paint(root / "in", "night", 150, CLASSES | {"clog": 0.2})
    data = grow(root)
    report = judged(data)
    assert (found(report), report.verdict) == ({"new classes": "warn"}, "warn")
    assert re.fullmatch(r"never seen before: 'clog' \(2\d\)", details(report)["new classes"])
    for verdict in ("ok", "fail"):
        assert judged(data, DriftConfig(new_classes=verdict)).verdict == verdict


def test_files_that_are_corrupt_are_a_finding_above_the_limit(root):
    paint(root / "in", "night", 150)
    for i in range(30):
        (root / "in/boot" / f"bad{i}.png").write_bytes(b"nothing" + bytes([i]))
    data = grow(root)
    report = judged(data)
    assert found(report) == {"rejects": "fail"}
    said = "30 of 180 items could not become samples (not_an_image 30); the limit is 5 %"
    assert details(report)["rejects"] == said
    assert judged(data, DriftConfig(max_rejects=30 / 180)).verdict == "ok"
    assert measure(data, [0], 0).rejects == {}


def test_twenty_images_of_one_class_are_a_warning_and_never_fail(root):
    paint(root / "in", "night", 24, {"shoe": 1})
    report = judged(grow(root))
    assert found(report) == {"classes": "warn"}
    assert re.fullmatch(r"class 'shoe': .* now \(of 2\d: too few to fail\)", details(report)["classes"])


def test_five_images_of_one_class_are_chance(root):
    paint(root / "in", "night", 6, {"boot": 1})
    report = judged(grow(root), DriftConfig(missing_classes="fail"))
    assert (report.verdict, found(report)) == ("ok", {})
    assert details(report)["missing classes"] == "2 of 3 classes have no image, which so few images explain"


def test_a_class_that_should_be_there_is_missing(root):
    paint(root / "in", "night", 150, {"boot": 0.6, "shoe": 0.4})
    data = grow(root)
    report = judged(data, DriftConfig(missing_classes="warn"))
    assert found(report) == {"classes": "fail", "missing classes": "warn"}
    assert re.fullmatch(r"no image of 'sandal' \(1\d\d before\)", details(report)["missing classes"])
    assert found(judged(data)) == {"classes": "fail"}


# ---- what there is to compare


def test_a_generation_with_nothing_in_train_is_told_and_not_compared(tmp_path):
    for split in ("train", "val"):
        paint(tmp_path / "in" / split, "old", 30)
    grow(tmp_path)
    paint(tmp_path / "in/val", "night", 20)
    report = judged(grow(tmp_path))
    assert found(report) == {"samples": "warn"}
    assert report.reason == "samples: no image of the night is in train: not compared"


def test_one_class_alone_can_be_compared(tmp_path):
    paint(tmp_path / "in", "old", 100, {"boot": 1})
    grow(tmp_path)
    paint(tmp_path / "in", "night", 80, {"boot": 1}, darker=70)
    report = judged(grow(tmp_path))
    assert found(report) == {"brightness": "fail"}
    assert details(report)["classes"] == "class 'boot': 100 % before, 100 % now"


def test_without_classes_images_are_compared(tmp_path):
    recipe = replace(RECIPE, labels="none")
    paint(tmp_path / "in", "old", 100)
    grow(tmp_path, recipe)
    paint(tmp_path / "in", "night", 80, darker=70)
    data = grow(tmp_path, recipe)
    report = judged(data)
    assert data.classes == ()
    assert found(report) == {"brightness": "fail"}
    assert not [name for name in details(report) if "class" in name]
    assert "Classes" not in section(report, measure(data, [0], 9), measure(data, [1], 9))


def test_images_need_not_be_decoded(root):
    paint(root / "in", "night", 150, darker=70)
    data = grow(root)
    for file in (root / "out").glob("*.tar"):
        file.unlink()
    report = judged(data, images=0)
    assert (report.verdict, details(report)["brightness"]) == ("ok", "not measured on both sides")


def test_a_damaged_image_is_an_error_that_names_its_shard(root):
    for file in (root / "out").glob("train-*.tar"):
        data = bytearray(file.read_bytes())
        data[500:] = bytes(byte ^ 1 for byte in data[500:])
        file.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-\d+\.tar is damaged"):
        measure(index.load(str(root / "out")), [0], 5)


# ---- the sample of images, and profiles


def test_the_sample_of_images_is_the_same_whatever_generations_came_before(before, tmp_path):
    """Once the old images in one generation, once in two, and the night's after them."""
    one, two = (shutil.copytree(before, tmp_path / name) for name in ("one", "two"))
    shutil.rmtree(two / "out")
    (two / "later").mkdir()
    later = sorted((two / "in/boot").iterdir())[::2]
    for file in later:
        file.rename(two / "later" / file.name)
    grow(two)
    for file in later:
        (two / "later" / file.name).rename(file)
    grow(two)
    for root in (one, two):
        paint(root / "in", "night", 150)
    one, two = grow(one), grow(two)
    assert measure(one, [0], 40) == measure(two, [0, 1], 40)
    assert measure(one, [1], 40) == measure(two, [2], 40)
    assert measure(one, [0, 1], 40) == measure(two, [2, 0, 1], 40)
    assert sum(measure(one, [1], 40).histograms["brightness"]["counts"]) == 40
    assert measure(one, [1], 40) != measure(one, [1], 41)


def test_a_profile_is_what_the_images_are(root):
    data = index.load(str(root / "out"))
    held = measure(data, [0], 1000)
    sources = [root / "in" / name for name in data.split("train").source.to_pylist()]
    pictures = [np.asarray(Image.open(path), np.float64) for path in sources]
    assert held.samples == len(sources) == sum(held.classes.values())
    assert held.items == 400
    for feature, values in {
        "short side": [min(p.shape) for p in pictures],
        "aspect ratio": [p.shape[1] / p.shape[0] for p in pictures],
        "brightness": [p.mean() for p in pictures],
        "contrast": [p.std() for p in pictures],
    }.items():
        counts, _ = np.histogram(values, profile.FEATURES[feature][0])
        assert held.histograms[feature]["counts"] == counts.tolist(), feature
        assert held.histograms[feature]["mean"] == pytest.approx(np.mean(values)), feature


def test_the_contrast_of_colours_is_over_all_their_values(photos):
    data = index.load(photos)
    split = data.split("train")
    reader = profile.Reader(split, profile.Augment())
    pictures = [reader.stored(row) for row in range(len(split))]
    held = measure(data, [0], 1000).histograms
    assert {p.shape[2] for p in pictures} == {1, 3}
    assert held["contrast"]["mean"] == pytest.approx(np.mean([p.std() for p in pictures]))
    assert held["brightness"]["mean"] == pytest.approx(np.mean([p.mean() for p in pictures]))


def test_what_lies_beyond_all_bins_is_in_the_outermost():
    held = profile.tally("aspect ratio", np.array([1e-3, 1, 2e4]))
    assert (held["counts"][0], sum(held["counts"][1:-1]), held["counts"][-1]) == (1, 1, 1)


def test_generations_that_are_not_there_are_refused(before):
    data = index.load(str(before / "out"))
    with pytest.raises(ValueError, match=r"no generation 3 in .*out: it has 0"):
        measure(data, [0, 3], 0)
    with pytest.raises(ValueError, match="name at least one of 0"):
        measure(data, [], 0)


def test_a_profile_with_other_bins_is_refused():
    held = asdict(profile_of({}))
    held["histograms"]["brightness"]["edges"][1] = 9.0
    with pytest.raises(ValueError, match="bins of brightness are another millstream's: measure the data again"):
        Profile(**json.loads(json.dumps(held)))
    del held["histograms"]["contrast"]
    held["histograms"]["brightness"]["edges"][1] = 8.0
    with pytest.raises(ValueError, match="bins of contrast"):
        Profile(**held)


# ---- the numbers, on profiles made of arrays


def profile_of(columns, rows=slice(None), rejects=None, items=0):
    """A profile of some rows of columns: `label` (whole numbers) and any of the features."""
    labels = np.asarray(columns.get("label", []), int)[rows]
    tallies = {name: profile.tally(name, np.asarray(columns.get(name, []), float)[rows]) for name in profile.FEATURES}
    samples = max([len(labels), *(sum(tally["counts"]) for tally in tallies.values())])
    classes = {f"class {i}": int(n) for i, n in enumerate(np.bincount(labels)) if n}
    return Profile(samples, items or samples, rejects or {}, classes, json.loads(json.dumps(tallies)))


def population(n, classes, seed):
    random, shares = np.random.default_rng(seed), 1 / np.arange(1, classes + 1)
    return {
        "label": random.choice(classes, n, p=shares / shares.sum()),
        "short side": np.where(random.random(n) < 0.6, 224, random.integers(100, 500, n)),
        "aspect ratio": np.where(random.random(n) < 0.5, 1, random.lognormal(0, 0.3, n)),
        "file size": random.lognormal(9, 0.6, n),
        "brightness": random.normal(120, 30, n),
        "contrast": random.normal(50, 12, n),
    }


@pytest.mark.parametrize(("night", "alarms"), [(2000, 0), (200, 4), (60, 4)])
def test_parts_of_one_population_differ_by_chance_alone(night, alarms):
    """Six features, each with at most one chance in a thousand: 1.2 of 200 nights if a PSI of 0.1 were not asked too.

    Measured on 4,000 nights a size against 1.28 million images, any finding (of these, fails): none of 10,000 or of
    1,000 images, 0.15 % (0) of 200, 0.7 % (0.05 %) of 100, 0.85 % (0.4 %) of 50; p below 0.001 in 0.09 to 0.15 %.
    """
    columns, random, reports = population(4000, 10, 3), np.random.default_rng(4), []
    for _ in range(200):
        rows = random.permutation(4000)
        reports.append(compare(profile_of(columns, rows[night:]), profile_of(columns, rows[:night]), CONFIG))
    assert sum(report.verdict != "ok" for report in reports) <= alarms
    for i, feature in enumerate(["classes", *profile.FEATURES], start=3):
        of_feature = [report.findings[i] for report in reports]
        assert {finding.feature for finding in of_feature} == {feature}
        p_values, psis = zip(*((finding.p_value, finding.psi) for finding in of_feature), strict=True)
        assert stats.binomtest(sum(p <= 0.05 for p in p_values), 200, 0.05).pvalue > 1e-4, feature
        assert stats.binomtest(sum(p <= 0.5 for p in p_values), 200, 0.5).pvalue > 1e-4, feature
        assert min(psis) >= 0, feature
        assert np.mean(psis) < 10 / night, feature  # chance alone adds about as much, and it is taken off


def test_the_index_is_that_of_the_book_less_what_chance_adds():
    """Bins of a half and a quarter against a quarter and a half, of images enough for neither term to matter."""
    n = 400_000
    side = {"brightness": np.repeat([12, 100, 204], [n // 2, n // 4, n // 4])}
    other = {"brightness": np.repeat([12, 100, 204], [n // 4, n // 2, n // 4])}
    finding = compare(profile_of(side), profile_of(other), CONFIG).findings[4]
    assert finding.feature == "brightness"
    assert finding.psi == pytest.approx(2 * 0.25 * np.log(2), abs=1e-4)
    assert (finding.verdict, finding.p_value) == ("fail", 0)


@pytest.mark.parametrize("now", [1, 2, 3, 4])
def test_the_probability_is_exact_where_few_are_expected(now):
    before = {"brightness": np.repeat([12, 204], [990, 10])}
    night = {"brightness": np.repeat([12, 204], [40 - now, now])}
    finding = compare(profile_of(before), profile_of(night), CONFIG).findings[4]
    assert finding.feature == "brightness"
    likelier = np.abs(np.arange(51) - 40 * (10 + now) / 1040) < abs(now - 40 * (10 + now) / 1040) - 1e-9
    exact = 1 - stats.hypergeom.pmf(np.flatnonzero(likelier), 1040, 10 + now, 40).sum()
    assert finding.p_value == pytest.approx(exact, abs=0.015)


def test_a_size_that_a_million_images_never_had_is_seen():
    """No decile of the old has an edge between 32 px and 64 px, or anywhere."""
    before, night = {"short side": np.full(1_280_000, 32)}, {"short side": np.repeat([32, 64], [800, 200])}
    report = compare(profile_of(before), profile_of(night), CONFIG)
    assert found(report) == {"short side": "fail"}
    assert details(report)["short side"] == "mean short side 32 -> 38.4 px; 64 to 70: 0 % before, 20 % now"
    assert compare(profile_of(night), profile_of(before), CONFIG).verdict == "fail"
    assert compare(profile_of(before), profile_of(night), DriftConfig(chance=1e-9)).verdict == "fail"


def test_bins_are_merged_until_they_can_be_judged_and_large_ones_never():
    many, few = np.array([30, 60, 400, 5, 50, 50, 345, 20, 40]), np.zeros(9, int)
    few[[2, 6]] = 500
    assert drift._neighbours_together(np.stack([many, few])).tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4]
    assert drift._neighbours_together(np.full((2, 25), 20)).tolist() == [i // 3 for i in range(24)] + [7]
    few = np.ones(20, int)  # a quarter of twenty images is five
    assert drift._neighbours_together(np.stack([few * 1000, few])).tolist() == [i // 5 for i in range(20)]
    assert set(drift._neighbours_together(np.stack([few[:4] * 1000, few[:4]]))) == {0}


def test_of_many_classes_one_is_absent_by_chance():
    before = {"label": np.repeat(np.arange(100), 1000)}
    night = {"label": np.repeat(np.arange(1, 100), 8)}  # a given class is absent once in 3,000 nights
    report = compare(profile_of(before), profile_of(night), DriftConfig(missing_classes="fail"))
    assert (report.verdict, details(report)["missing classes"][:24]) == ("ok", "1 of 100 classes have no")


def test_what_is_certain_and_small_is_no_drift():
    n = 1_000_000
    before, night = ({"label": np.repeat([0, 1], [n // 2 - more, n // 2 + more])} for more in (0, 20_000))
    finding = compare(profile_of(before), profile_of(night), CONFIG).findings[3]
    assert finding.p_value < 1e-100
    assert finding.verdict == "ok"


def test_between_the_limits_is_a_warning_and_without_a_limit_nothing_fails():
    before, night = ({"label": np.repeat([0, 1], split)} for split in ([500, 500], [330, 670]))
    assert found(compare(profile_of(before), profile_of(night), CONFIG)) == {"classes": "warn"}
    assert found(compare(profile_of(before), profile_of(night), DriftConfig(fail=0.1))) == {"classes": "fail"}
    assert found(compare(profile_of(before), profile_of(night), DriftConfig(warn=0.2))) == {}
    night = {"label": np.repeat([0, 1], [10, 990])}
    assert found(compare(profile_of(before), profile_of(night), DriftConfig(fail=0))) == {"classes": "warn"}


def test_one_class_of_a_thousand_that_takes_over_is_seen():
    random = np.random.default_rng(0)
    before, night = {"label": random.integers(0, 1000, 100_000)}, {"label": random.integers(0, 1000, 1000)}
    assert compare(profile_of(before), profile_of(night), CONFIG).verdict == "ok"
    night["label"][:300] = 777
    report = compare(profile_of(before), profile_of(night), CONFIG)
    assert found(report) == {"classes": "fail"}
    assert re.match(r"class 'class 777': 0.\d+ % before, 30.\d % now", details(report)["classes"])


def test_duplicates_are_no_rejects_and_few_items_never_fail():
    before, night = population(400, 3, 0), population(400, 3, 1)
    held = profile_of(night, rejects={"duplicate": 500}, items=900)
    assert compare(profile_of(before), held, CONFIG).verdict == "ok"
    held = profile_of(night, rejects={"duplicate": 500, "unreadable": 30}, items=930)
    assert found(compare(profile_of(before), held, CONFIG)) == {"rejects": "fail"}
    held = profile_of(night, slice(0, 30), rejects={"unreadable": 5}, items=35)
    assert found(compare(profile_of(before), held, CONFIG)) == {"rejects": "warn"}


def test_all_that_failed_is_the_reason_and_warnings_only_if_nothing_did():
    before, night = population(4000, 3, 0), population(400, 4, 1)
    night["brightness"], night["contrast"] = night["brightness"] - 60, night["contrast"] + 40
    report = compare(profile_of(before), profile_of(night), CONFIG)
    assert found(report) == {"new classes": "warn", "brightness": "fail", "contrast": "fail"}
    assert report.reason == "; ".join(f"{name}: {details(report)[name]}" for name in ("brightness", "contrast"))


def test_a_reference_without_images_is_told():
    report = compare(profile_of({}), profile_of(population(50, 3, 0)), CONFIG)
    assert report.reason == "samples: no image of the reference is in train: not compared"


@pytest.mark.parametrize(
    "wrong",
    [
        {"warn": 0},
        {"warn": float("nan")},
        {"fail": 0.05},
        {"fail": -1},
        {"fail": float("nan")},
        {"chance": 0},
        {"chance": 1},
        {"max_rejects": 1.5},
        {"images": -1},
        {"new_classes": "maybe"},
        {"missing_classes": ""},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused_by_name(wrong):
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(
        ValueError, match=re.escape(f"{name} {value!r}:" if isinstance(value, str) else f"{name} {value}:")
    ):
        DriftConfig(**wrong)


# ---- the page


def test_the_section_is_markup_in_which_no_name_is_any():
    before, night = profile_of(population(400, 40, 0)), profile_of(population(60, 40, 1))
    nasty = {"<script>alert(1)</script>": 90, "'\"><img src=x>": 3, "bad\udc80\n猫": 2}
    night = replace(night, classes=night.classes | nasty, rejects={"<b>": 30}, items=90)
    report = compare(before, night, CONFIG)
    page = Markup(section(report, before, night))
    assert not {"script", "img"} & {name for name, _ in page.tags}
    assert "<script>" in page.text
    assert [name for name, _ in page.tags].count("figure") >= 2 * len(profile.FEATURES)
    assert "bad" in [attributes.get("class") for attributes in page.all("td")]
    for finding in report.findings:
        assert finding.feature in page.text
    section(compare(before, profile_of({}), CONFIG), before, profile_of({})).encode()
