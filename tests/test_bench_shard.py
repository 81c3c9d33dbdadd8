"""The bench's own parts: its photos, its limit, its rounds, and that a competitor does the work it is timed for."""

import dataclasses
import io
import tarfile

import cv2
import numpy as np
import pytest
from PIL import Image

from jobs.bench import photos as cut
from jobs.bench.rounds import alternate, summary, take_turns
from jobs.bench.shard import OTHERS, Args, _others, codec, other
from pipeline.shards import image
from pipeline.shards.plan import Recipe


@pytest.fixture(scope="module")
def wallpapers(tmp_path_factory):
    """{package: folder} of one picture as rough as a photograph, one flat, and the first again by a link."""
    root = tmp_path_factory.mktemp("wallpapers")
    rough = np.random.default_rng(3).integers(0, 256, (500, 700, 3), dtype=np.uint8)
    rough = cv2.resize(rough, (1400, 1000), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(root / "rough.png"), cv2.addWeighted(rough, 0.45, np.full_like(rough, 120), 0.55, 0))
    cv2.imwrite(str(root / "flat.png"), np.full((1000, 1400, 3), 90, np.uint8))
    (root / "1024x768.png").symlink_to("rough.png")
    return {"some-wallpapers": str(root)}


@pytest.fixture(scope="module")
def some_photos(wallpapers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    cut.photos(str(folder), 24, roots=wallpapers)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.jpg"))}


def test_photos_are_as_large_as_imagenets_and_lie_in_twenty_classes(some_photos):
    files = contents(some_photos)
    assert len(files) == 24
    assert len({name.split("/")[0] for name in files}) == 20
    assert all(75_000 <= len(data) <= 110_000 for data in files.values())
    sizes = [Image.open(io.BytesIO(data)).size for data in files.values()]
    assert all(345 <= min(size) < 406 and 460 <= max(size) < 541 for size in sizes)
    assert {width > height for width, height in sizes} == {True, False}
    assert len(set(sizes)) > 12


def test_photos_depend_on_seed_and_wallpapers_alone(some_photos, wallpapers, tmp_path):
    cut.photos(str(tmp_path / "again"), 24, roots=wallpapers)
    assert contents(tmp_path / "again") == contents(some_photos)
    made = cut.photos(str(tmp_path / "other"), 4, seed=1, roots=wallpapers)
    assert made["pictures"] == 1  # neither the flat one nor the link to the other
    assert not contents(tmp_path / "other").items() & contents(some_photos).items()


def test_photos_kept_are_found_again_and_nothing_else_is_taken_for_them(some_photos, wallpapers, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in some_photos.rglob("*")}
    assert cut.photos(str(some_photos), 24, roots={})["count"] == 24  # needs no wallpapers any more
    assert {file: file.stat().st_mtime_ns for file in some_photos.rglob("*")} == before
    with pytest.raises(ValueError, match="24 photos of seed 0, not 25 of 0"):
        cut.photos(str(some_photos), 25, roots=wallpapers)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="no finished set"):
        cut.photos(str(tmp_path), 24, roots=wallpapers)


def test_missing_wallpapers_are_named_with_what_installs_them(wallpapers, tmp_path):
    roots = wallpapers | {"gnome-backgrounds": str(tmp_path / "none")}
    with pytest.raises(ValueError, match="apt-get install gnome-backgrounds;"):
        cut.photos(str(tmp_path / "out"), 4, roots=roots)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", [Recipe(size=256), Recipe(size=100, fit="crop", quality=70), Recipe(format="png")])
def test_the_limit_does_the_very_work_that_sharding_does(some_photos, recipe):
    raw = next(iter(contents(some_photos).values()))
    form = recipe.image("jpg")
    assert codec(raw, form) == image.encode(raw, form).data


def test_the_limit_decodes_a_jpeg_that_stays_as_it_is_and_encodes_pixels(some_photos):
    raw = next(iter(contents(some_photos).values()))
    assert codec(raw, Recipe().image("jpg")) is raw
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 1), dtype=np.uint8)
    for form in (Recipe().image("png"), Recipe(size=16).image("jpg")):
        assert codec(pixels, form) == image.encode(pixels, form).data


def test_rounds_measure_every_side_once_in_turn_and_swap_ends():
    called, rates = [], iter(range(1, 10))

    def side(name):
        return lambda: called.append(name) or next(rates)

    taken = take_turns(3, {name: side(name) for name in "abc"})
    assert "".join(called) == "cbaabccba"
    assert taken == {"a": [3, 4, 9], "b": [2, 5, 8], "c": [1, 6, 7]}
    result = alternate(2, lambda: 6.0, lambda: 8.0)
    assert result == summary([6.0, 6.0], [8.0, 8.0]) == {"rate": 6, "limit": 8, "ratio": 0.75, "ratios": [0.75, 0.75]}


def test_a_baseline_writes_every_image_at_the_size_it_is_timed_for(some_photos, tmp_path):
    rate = other("webdataset", 2, Recipe(size=64), f"folder:{some_photos}", str(tmp_path / "out"))
    assert rate > 0
    members = {}
    for tar in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(tar) as archive:
            members |= {member.name: archive.extractfile(member).read() for member in archive}
    assert sorted(name for name in members if name.endswith(".jpg")) == [f"{i:06d}.jpg" for i in range(24)]
    assert [int(members[f"{i:06d}.cls"]) for i in range(24)] == [i % 20 for i in range(24)]
    assert all(min(Image.open(io.BytesIO(members[f"{i:06d}.jpg"])).size) == 64 for i in range(24))


def test_a_baseline_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"webdataset failed: .+Not a directory"):
        other("webdataset", 1, Recipe(), f"folder:{tmp_path}", "/dev/null/out")


def test_baselines_take_part_only_where_they_can(some_photos):
    folder = f"folder:{some_photos}"
    assert set(_others(Args(), folder)) >= {"webdataset", "ray"}
    assert set(_others(Args(), folder)) <= set(OTHERS)
    assert _others(Args(baselines=False), folder) == ()
    for source in ("digits:", "s3://bucket/photos", "folder:s3://bucket/photos"):
        assert _others(Args(), source) == ()
    for change in ({"fit": "crop"}, {"format": "png"}):
        assert _others(dataclasses.replace(Args(), recipe=Recipe(size=64, **change)), folder) == ()
