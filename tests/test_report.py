import base64
import io
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.evaluation import histograms, report
from pipeline.evaluation import pictures as pictures_
from pipeline.evaluation.classification import score

ROOT = Path(__file__).parent.parent
VOID = {"meta", "img", "br", "link", "hr", "input"}
NASTY = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "😀 猫", "bad\udc80\x00byte", "$x_1$ & co", ""]


class Markup(HTMLParser):
    """Every tag with its attributes, the text, and a complaint at the first tag left open or closed twice."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def pictures(count: int, side: int = 8) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


def steps(count: int) -> list[dict]:
    return [
        {"samples": 64 * n, "step": n, "epoch": n / 9, "loss": 2.0 / (1 + n), "accuracy": n / count, "lr": 0.1}
        for n in range(1, count + 1)
    ]


def everything(classes: list[str]) -> str:
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, len(classes), (2, 60))
    confidence = random.random(60)
    result = score(labels, predicted, confidence, classes)
    sections = [
        ("", report.headline([("accuracy", result["accuracy"]), (classes[0], classes[0])])),
        (classes[0], report.curves(steps(50), [{"samples": 640, "loss": 1.0, "accuracy": 0.4}])),
        ("GAN", report.curves([{"samples": 1, classes[0]: 1.0, "d_loss": 2.0}, {"samples": 2, "d_loss": 1.0}], [])),
        ("Confusion", report.confusion_matrix(result["confusion"], classes)),
        ("Classes", report.per_class(result["per_class"])),
        ("Samples", report.sample_predictions(pictures(60), labels, predicted, confidence, classes)),
        ("Facts", report.facts({"classes": classes, classes[0]: {classes[1]: classes[2]}, "rejects": {}})),
        ("Grid", report.image_grid(pictures(5), classes[0])),
    ]
    return report.page(classes[0], classes[1], sections)


@pytest.fixture(scope="module")
def nasty_page() -> str:
    return everything(NASTY)


def test_the_page_is_balanced_html_that_utf8_can_write(nasty_page):
    markup = Markup(nasty_page)
    assert nasty_page.encode("utf-8")
    assert [len(markup.all(tag)) for tag in ("html", "head", "body", "title", "main", "h1")] == [1] * 6


def test_names_stay_text(nasty_page):
    markup = Markup(nasty_page)
    assert not markup.all("script")
    assert not [name for _, attributes in markup.tags for name in attributes if name.startswith("on")]
    assert NASTY[0] in markup.text
    assert NASTY[1] in markup.text
    assert "😀 猫" in markup.text
    assert "bad\ufffd\ufffdbyte" in markup.text


def test_nothing_outside_the_page_is_referred_to(nasty_page):
    markup = Markup(nasty_page)
    for _, attributes in markup.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert value.startswith(("data:image/png;base64,", "#")), value
            assert not re.search(r"url\((?!#)", value or "")
    assert not [tag for tag, _ in markup.tags if tag in ("link", "iframe", "object", "embed")]
    style = nasty_page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "http:" not in nasty_page
    assert "https:" not in nasty_page


def test_every_picture_says_what_it_shows(nasty_page):
    markup = Markup(nasty_page)
    assert all(image["alt"].strip() for image in markup.all("img"))
    assert all(plot["aria-label"].strip() and plot["role"] == "img" for plot in markup.all("svg"))


def test_ids_are_unique_and_every_inner_link_arrives(nasty_page):
    markup = Markup(nasty_page)
    ids = Counter(attributes["id"] for _, attributes in markup.tags if "id" in attributes)
    assert max(ids.values()) == 1
    targets = [link["href"] for link in markup.all("a")] + [use["xlink:href"] for use in markup.all("use")]
    targets += re.findall(r"url\((#[^)]*)\)", nasty_page)
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(ids)


def test_the_same_input_gives_the_same_bytes_in_another_process(nasty_page):
    code = "import sys; from tests.test_report import *; sys.stdout.buffer.write(everything(NASTY).encode())"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert other.stdout == nasty_page.encode()


def test_importing_the_report_does_not_wait_for_matplotlib():
    code = "import sys, pipeline.evaluation.report; sys.exit('matplotlib' in sys.modules or 'scipy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_plots_take_their_colours_from_the_page():
    svg = report.curves(steps(100), [])
    assert "var(--ink)" in svg
    assert "var(--series-0)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)


def test_losses_share_a_panel_accuracies_another_and_the_rest_have_their_own():
    row = {"samples": 1, "step": 1, "epoch": 0.1, "d_loss": 1.0, "g_loss": 2.0, "top5": 0.5, "lr": 0.1, "d_real": 0.6}
    markup = Markup(report.curves([row], [{"samples": 1, "accuracy": 0.4}]))
    assert [plot["aria-label"] for plot in markup.all("svg")] == [
        "loss: d_loss 1, g_loss 2",
        "accuracy: top5 0.5, validation accuracy 0.4",
        "lr: 0.1",
        "d_real: 0.6",
    ]


@pytest.mark.parametrize("count", [1, 2, 39, 80, 5000])
def test_runs_of_any_length_are_drawn_and_stay_small(count):
    fragment = report.curves(steps(count), [])
    assert len(Markup(fragment).all("svg")) == 3
    assert len(fragment) < 250_000


def test_a_spike_survives_the_thinning():
    rows = [{"samples": n, "loss": 1.0} for n in range(20_000)]
    calm = report.curves(rows, [])
    rows[777]["loss"] = 9.0
    assert "9" not in re.findall(r">([\d.]+)</text>", calm)
    assert any(float(tick) >= 8 for tick in re.findall(r">([\d.]+)</text>", report.curves(rows, [])))


def test_a_value_that_is_not_finite_is_counted_not_joined_up():
    rows = steps(100)
    rows[10]["loss"], rows[11]["loss"], rows[12]["loss"] = float("nan"), float("inf"), None
    assert "× 3 not finite" in Markup(report.curves(rows, [])).text
    assert "not finite" not in Markup(report.curves(steps(100), [])).text
    assert "× 2 not finite" in Markup(report.curves([{"samples": n, "loss": float("nan")} for n in (1, 2)], [])).text


def test_nothing_recorded_is_said():
    assert "No steps" in report.curves([], [])
    assert "No steps" in report.curves([{"samples": 0, "step": 0, "note": "x", "flag": True}], [])


def test_a_row_without_samples_is_an_error():
    with pytest.raises(KeyError, match="samples"):
        report.curves([{"step": 1, "loss": 1.0}], [])


values = st.one_of(st.floats(), st.integers(-(10**12), 10**12), st.none(), st.text(max_size=3), st.booleans())


@settings(max_examples=8, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["loss", "acc", "lr", "<x>"]), values), max_size=50), st.integers(0, 3))
def test_any_numbers_at_all_can_be_drawn(rows, validations):
    rows = [{"samples": n, **row} for n, row in enumerate(rows)]
    Markup(report.curves(rows, rows[:validations]))


@pytest.mark.parametrize("count", [2, 10, 30])
def test_a_small_confusion_matrix_shows_each_count(count):
    matrix = np.arange(count * count).reshape(count, count)
    markup = Markup(report.confusion_matrix(matrix, [f"class {n}" for n in range(count)]))
    cells = [cell for cell in markup.all("td") if "title" in cell]
    assert len(cells) == count * count
    assert cells[1]["title"].startswith("true class 0, predicted class 1: 1 (")
    assert not markup.all("img")


@pytest.mark.parametrize("count", [31, 1000])
def test_a_large_confusion_matrix_is_a_picture_and_names_the_worst_pairs(count):
    matrix = np.diag(np.full(count, 50))
    matrix[3, 7], matrix[7, 3] = 25, 10
    fragment = report.confusion_matrix(matrix, [f"class {n}" for n in range(count)])
    markup = Markup(fragment)
    (image,) = markup.all("img")
    assert f"35 of {50 * count + 35:,} samples off the diagonal" in image["alt"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))))
    assert pixels.shape == (count, count, 4)
    assert pixels[3, 7, 3] > pixels[7, 3, 3] > pixels[0, 1, 3] == 0
    assert re.search(r"class 3.*class 7.*25.*33\.3%.*class 7.*class 3.*10.*16\.7%", re.sub("<[^>]*>", " ", fragment))
    assert len(markup.all("tr")) == 3


def test_a_perfect_large_matrix_and_an_empty_row_are_no_trouble():
    matrix = np.diag(np.arange(40))
    assert "No sample was confused" in report.confusion_matrix(matrix, [str(n) for n in range(40)])


def test_a_matrix_that_does_not_fit_the_classes_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) for 2 classes"):
        report.confusion_matrix(np.zeros((2, 3), int), ["a", "b"])


def test_per_class_puts_the_worst_first_and_the_unknown_last():
    names = ["good", "none", "bad"]
    table = [
        {"name": name, "precision": f1, "recall": f1, "f1": f1, "support": 3}
        for name, f1 in zip(names, (0.9, None, 0.1), strict=True)
    ]
    text = Markup(report.per_class(table)).text
    assert text.index("bad") < text.index("good") < text.index("none")
    assert "—" in text


def test_wrong_answers_come_first_and_the_surest_of_them_foremost():
    labels, predicted = np.array([0, 0, 1, 1]), np.array([1, 0, 0, 1])
    fragment = report.sample_predictions(pictures(4), labels, predicted, np.array([0.6, 0.9, 0.8, 0.7]), ["cat", "dog"])
    text = Markup(fragment).text
    order = ["Wrong", "dog → cat", "80.0%", "cat → dog", "60.0%", "Right", "dog → dog", "70.0%", "cat → cat", "90.0%"]
    positions = [text.index(part) for part in order]
    assert positions == sorted(positions)


def test_images_of_any_size_and_one_or_three_channels_become_thumbnails():
    images = [np.zeros(shape, np.uint8) for shape in ((1, 1, 1), (8, 8), (400, 100, 3), (3, 900, 1))]
    fragment = report.sample_predictions(images, [0] * 4, [0] * 4, [0.1, 0.2, 0.3, 0.4], ["a"])
    sizes = [(int(image["width"]), int(image["height"])) for image in Markup(fragment).all("img")]
    assert sizes == [(1, 1), (8, 8), (32, 128), (128, 1)]
    kinds = [image["class"] for image in Markup(fragment).all("img")]
    assert kinds == ["pixels", "pixels", "photo", "photo"]


def test_a_gallery_keeps_to_its_limit_and_says_so():
    zeros = np.zeros(50, int)
    fragment = report.sample_predictions(pictures(50), zeros, zeros, np.ones(50), ["a"], limit=10)
    assert len(Markup(fragment).all("img")) == 10
    assert "(10 of 50)" in fragment
    assert "None among these" in fragment


def test_galleries_refuse_arrays_of_differing_lengths():
    with pytest.raises(ValueError, match="2 images, 1 labels"):
        report.sample_predictions(pictures(2), [0], [0], [1.0], ["a"])


def test_facts_read_as_people_write_them():
    mapping = {"n": 1234567, "share": np.float32(0.5), "on": True, "none": None, "list": range(0), "deep": {"a": {}}}
    text = Markup(report.facts({**mapping, "classes": list("abcdefghijklmnopqrstuvwxyz")})).text
    for part in ("1,234,567", "0.5", "yes", "—", "s, t … and 6 more", "none"):
        assert part in text


def test_png_gives_back_the_same_pixels():
    random = np.random.default_rng(0)
    for shape in ((5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)):
        pixels = random.integers(0, 256, shape, np.uint8)
        again = np.asarray(Image.open(io.BytesIO(report.png(pixels))))
        assert np.array_equal(again, pixels.squeeze() if shape[-1] == 1 else pixels)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 20), columns=st.integers(1, 25), pad=st.integers(0, 5), side=st.integers(1, 12))
def test_a_grid_holds_each_image_where_it_belongs(count, columns, pad, side):
    images = pictures(count, side)
    sheet = report.grid(images, columns, pad)
    wide = min(columns, count)
    assert sheet.shape == (-(-count // wide) * (side + pad) + pad, wide * (side + pad) + pad, 3)
    assert sheet.dtype == np.uint8
    for n, image in enumerate(images):
        top, left = (pad + at * (side + pad) for at in divmod(n, wide))
        assert np.array_equal(sheet[top : top + side, left : left + side], image)


def test_a_grid_magnifies_by_whole_pixels_and_shrinks_what_is_too_large():
    small = np.array([[[10], [20]], [[30], [40]]], np.uint8)
    sheet = report.grid([small, np.full((50, 100, 3), 7, np.uint8)], columns=2, pad=0, cell=5)
    assert sheet.shape == (5, 10, 3)
    assert sheet[:4, :4, 0].tolist() == [[10, 10, 20, 20]] * 2 + [[30, 30, 40, 40]] * 2
    assert (sheet[1:3, 5:] == 7).all()
    assert (sheet[3:, 5:] == 255).all()


def test_labels_are_drawn_under_their_cells_and_never_over_an_image():
    images = [np.zeros((64, 64, 3), np.uint8)] * len(NASTY)
    labels = [*NASTY[:-1], "a very long name " * 1000]
    plain = report.grid(images, columns=3)
    sheet = report.grid(images, columns=3, labels=labels)
    assert sheet.shape[0] > plain.shape[0]
    assert sheet.shape[1] == plain.shape[1]
    assert (sheet[2:66, 2:66] == 0).all()
    assert (sheet[66:82, 2:66] < 128).any()
    assert (sheet[:, :2] == 255).all()


@pytest.mark.parametrize(
    ("images", "options", "says"),
    [
        ([], {}, "no images"),
        ([np.zeros((2, 2), np.float32)], {}, "float32"),
        ([np.zeros((2, 2, 2), np.uint8)], {}, r"\(2, 2, 2\)"),
        ([np.zeros((0, 2, 3), np.uint8)], {}, r"\(0, 2, 3\)"),
        ([np.zeros((2, 2), np.uint8)], {"labels": []}, "0 labels for 1 images"),
        ([np.zeros((2, 2), np.uint8)], {"columns": 0}, "columns 0"),
    ],
)
def test_what_no_grid_can_hold_is_refused(images, options, says):
    with pytest.raises(ValueError, match=says):
        report.grid(images, **options)


def test_a_histogram_draws_what_was_counted_and_cuts_what_is_empty():
    markup = Markup(histograms.histogram([0, 1, 2, 4, 8, 16], [0, 5, 0, 10, 0], NASTY[0], "says <b>"))
    hints = [bar["title"] for bar in markup.all("i")]
    assert hints == ["1 to 2: 5", "2 to 4: 0", "4 to 8: 10"]
    assert [bar["style"] for bar in markup.all("i")] == ["height:50.0%", "height:0.0%", "height:100.0%"]
    assert NASTY[0] in markup.text
    assert "says <b>" in markup.text
    assert markup.text.endswith("1248")
    (bars,) = (tag for tag in markup.all("div") if tag["class"] == "bars")
    assert bars["role"] == "img"
    assert bars["aria-label"]


def test_one_in_a_million_is_still_a_bar():
    markup = Markup(histograms.histogram([0, 1, 2], [1, 1_000_000], "n", ""))
    assert float(re.search(r"height:([\d.]+)%", markup.all("i")[0]["style"])[1]) >= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=300), st.integers(1, 70))
def test_no_count_is_lost_between_the_bars(counts, bars):
    edges = np.arange(len(counts) + 1)
    line = histograms.sparkline(edges, counts, bars)
    held = [n for n, count in enumerate(counts) if count]
    assert len(line) <= bars
    assert bool(line.strip()) == bool(held)
    fragment = Markup(histograms.histogram(edges, counts, "n", ""))
    if len(set(held)) > 1:
        shown = [int(bar["title"].split(": ")[1].replace(",", "")) for bar in fragment.all("i")]
        assert sum(shown) == sum(counts)
        assert len(shown) <= histograms.BARS
        assert shown[0]
        assert shown[-1]


def test_edges_that_do_not_fit_the_counts_are_refused():
    with pytest.raises(ValueError, match="one edge more than bins"):
        histograms.histogram([0, 1], [1, 2], "n", "")


def test_few_classes_are_a_table_and_many_are_bars_with_both_ends():
    few = Markup(histograms.class_counts(NASTY, {"train": [6, 5, 4, 3, 2, 1], "val": [1] * 6}))
    assert len(few.all("tr")) == len(NASTY) + 1
    assert NASTY[1] in few.text
    names = [f"class {n}" for n in range(1000)]
    many = Markup(histograms.class_counts(names, {"train": list(range(1000)), "val": [0] * 1000}))
    assert len(many.all("tr")) == 2 * (histograms.ENDS + 1)
    assert "largest 999, median 499.5, smallest 0" in many.text
    assert many.text.index("class 999") < many.text.index("class 990") < many.text.index("class 0")
    assert 100 <= len([bar for bar in many.all("i") if "title" in bar]) <= 128


def test_a_thumbnail_of_a_photo_is_a_small_jpeg_and_one_of_few_pixels_is_exact():
    photo = np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8)
    (image,) = Markup(pictures_.thumbnail(photo, NASTY[1])).all("img")
    assert (image["width"], image["height"], image["alt"]) == ("112", "56", NASTY[1])
    assert image["src"].startswith("data:image/jpeg;base64,")
    assert len(image["src"]) < 12_000
    digit = np.random.default_rng(0).integers(0, 256, (28, 28, 1), np.uint8)
    (image,) = Markup(pictures_.thumbnail(digit, "7")).all("img")
    again = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
    assert np.array_equal(np.asarray(again)[..., :1], digit)


def test_where_the_time_of_a_run_went_is_a_table_with_the_largest_first():
    summary = {
        "wall": 200.0, "seconds": {"start": 20.0, "compute": 150.0, "wasted": 30.0}, "samples": 1000,
        "attempts": 3, "wasted_samples": 128, "goodput": 0.75, "images_per_second": 5.0,
        "rate": 6.7, "gpu_memory_bytes": 2_500_000_000,
    }  # fmt: skip
    shown = report.goodput(summary)
    assert shown.index(">compute<") < shown.index(">wasted<") < shown.index(">start<")
    for part in ("75.0%", "150.0", "128", "2.5 GB"):
        assert part in shown
