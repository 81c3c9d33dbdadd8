"""Bar 3: three hundred hostile files among good ones. Each is a faithful sample or a typed reject, and the rest stay
exactly what they are without them."""

import io
import os
import warnings

import numpy as np
import pytest
from hostile import IMAGE, write_good, write_hostile
from PIL import Image, ImageOps

from pipeline.shards import index, tar
from pipeline.shards.build import build
from pipeline.shards.image import REASONS, ImageRecipe, Reject, decode, encode
from pipeline.shards.plan import Recipe

RECIPE = Recipe(format="keep", samples_per_shard=25)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(good files alone, the same among hostile ones, {path: what may become of it})"""
    root = tmp_path_factory.mktemp("hostile")
    good = write_good(root / "good")
    write_good(root / "mixed")
    return root / "good", root / "mixed", {name: {IMAGE} for name in good} | write_hostile(root / "mixed")


@pytest.fixture(scope="module")
def built(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    for name, folder in zip(("good", "mixed"), folders, strict=False):
        build(f"folder:{folder}", str(root / name), RECIPE, workers=0, max_rejects=10**9)
    return index.load(str(root / "good")), index.load(str(root / "mixed"))


def judged(raw):
    """What Pillow makes of a file, uint8 (h, w, 3), alpha over white; None where it does not decode it in full."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(raw))
            image.load()
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image, dtype=float) / 257).round().astype(np.uint8))
            image = ImageOps.exif_transpose(image)
            clear = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            flat = Image.alpha_composite(white, clear) if image.has_transparency_data else image
            return np.asarray(flat.convert("RGB")).astype(int)
    except Exception:  # whatever it raises, it is no judge of this one
        return None


def faithful(raw, made, lossless):
    """Whether a sample shows what Pillow sees in the file; None where Pillow has nothing to say."""
    expected, shown = judged(raw), decode(made)
    if expected is None:
        return None
    if expected.shape[:2] != shown.shape[:2]:
        return False
    return np.abs(expected - shown).mean() < (1 if lossless else 5)


def spelled(path):
    return os.fsencode(path).decode("utf-8", "backslashreplace") if not path.isascii() else path


def test_there_are_three_hundred_of_them(folders):
    assert sum(IMAGE not in outcome or len(outcome) > 1 for outcome in folders[2].values()) >= 300


def test_each_file_becomes_a_faithful_sample_or_a_typed_reject(folders, built):
    _, mixed, expected = folders
    rows, rejects = built[1].rows().to_pylist(), built[1].rejects().to_pylist()
    found = {row["source"]: IMAGE for row in rows} | {row["source"]: row["reason"] for row in rejects}
    assert len(found) == len(rows) + len(rejects)
    wrong = {
        name: found.get(spelled(name))
        for name, outcome in expected.items()
        if found.get(spelled(name)) not in (outcome or {None})
    }
    assert not wrong
    assert {row["reason"] for row in rejects} <= set(REASONS)
    assert {spelled(name) for name, outcome in expected.items() if outcome} == found.keys()
    paths, unjudged = {spelled(name): os.path.join(mixed, name) for name in expected}, 0
    for row in rows:
        with open(paths[row["source"]], "rb") as file:
            raw = file.read()
        made = tar.read_sample(os.path.join(built[1].root, row["shard"]), row["offset"], row["size"])
        verdict = faithful(raw, made, row["format"] == "png" or row["passed"])
        assert verdict is not False, row["source"]
        unjudged += verdict is None
    assert unjudged <= 3


def test_what_was_cut_is_no_sample_unless_nothing_is_missing(folders, built):
    kept = {row["source"] for row in built[1].rows(["source"]).to_pylist()}
    cut = [spelled(name) for name, outcome in folders[2].items() if "/cut " in name and IMAGE not in outcome]
    assert len(cut) == 81
    assert not kept & set(cut)


def test_good_files_come_out_as_they_do_alone_and_in_the_same_order(built):
    alone, among = built
    columns = ["source", "key", "split", "label", "crc32", "width", "height", "size"]
    good = alone.rows(columns).to_pylist()
    names = {row["source"] for row in good}
    assert len(good) == 40
    assert [row for row in among.rows(columns).to_pylist() if row["source"] in names] == good


@pytest.mark.parametrize("recipe", [ImageRecipe(), ImageRecipe(48, "crop", keep_metadata=True)], ids=["jpg", "crop"])
def test_nothing_but_rejects_comes_out_of_the_encoder(folders, recipe):
    _, mixed, expected = folders
    found = {}
    for name, outcome in expected.items():
        path = os.path.join(mixed, name)
        if not os.path.isfile(path) or "unreadable" in outcome or not outcome:
            continue
        with open(path, "rb") as file:
            raw = file.read()
        try:
            made = encode(raw, recipe)
        except Reject as no:
            found[name] = no.reason
            continue
        found[name] = IMAGE
        pixels = decode(made.data)
        assert pixels.shape == (made.height, made.width, made.channels)
        assert recipe.size is None or made.height == made.width <= 48
        if recipe.size is None and "flipped" not in name:
            assert faithful(raw, made.data, made.passed) is not False, name
    assert len(found) > 350
    assert not {name: reason for name, reason in found.items() if reason not in expected[name]}
