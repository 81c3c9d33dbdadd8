"""What `inspect` says and draws of a dataset."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import Markup

from jobs import dataset_page, dataset_words
from jobs.__main__ import main
from pipeline.shards import index
from pipeline.shards.build import build
from pipeline.shards.plan import Recipe

TAG = "<script>alert(1)<"


@pytest.fixture
def inspect(capsys):
    """inspect(*words) -> (exit code, stdout, stderr), in this process."""

    def call(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["inspect", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """(source folder, dataset): 40 noisy photos in two classes, one of a hostile name, and four rejects."""
    root = tmp_path_factory.mktemp("broken")
    random = np.random.default_rng(0)
    for i in range(40):
        path = root / "in" / ("ok", TAG)[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
        small.resize((160, 120)).save(path)
    whole = (root / "in" / "ok" / "0.jpg").read_bytes()
    (root / "in" / TAG / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "in" / "ok" / "empty.png").write_bytes(b"")
    (root / "in" / "ok" / "text.jpg").write_bytes(b"no picture at all")
    (root / "in" / "ok" / "zip.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    build(f"folder:{root / 'in'}", str(root / "out"), Recipe(samples_per_shard=10), workers=0)
    return root / "in", str(root / "out")


def with_classes(dataset: index.Dataset, count: int) -> index.Dataset:
    """The same with its first class cut into `count` - 1 pieces by position; in memory only."""
    sizes = [[1] * (count - 1) + [sum(s["classes"]) - count + 1] for s in dataset.info["splits"].values()]
    splits = {name: s | {"classes": c} for (name, s), c in zip(dataset.info["splits"].items(), sizes, strict=True)}
    names = [f"class {n}" for n in range(count)]
    return dataclasses.replace(dataset, info=dataset.info | {"splits": splits, "classes": names}, classes=tuple(names))


def test_json_holds_rejects_and_the_mixing_of_each_split(inspect, digits):
    code, out, _ = inspect(digits, "--json")
    info = json.loads(out)
    assert code == 0
    assert info["rejects"] == []
    assert info["mixing"].keys() == info["splits"].keys()
    assert all(abs(mixed["entropy_ratio"] - 1) < 0.01 and mixed["mixed"] for mixed in info["mixing"].values())


def test_people_read_counts_sizes_shards_and_mixing(inspect, photos):
    _, out, err = inspect(photos)
    assert not out
    for said in ("samples", "images: jpg", "short side in px: median", "width / height", "rejects: 0", "shards: ",
                 "generation 0: 90 samples of 90 items", "sidecars: ", "mixing of train: 1."):  # fmt: skip
        assert said in err, said
    assert "warning" not in err


def test_data_sorted_by_class_is_warned_of_on_both(inspect, tmp_path, broken):
    dataset = index.load(broken[1])
    found = {"train": {"mixed": False, "entropy": 0.1, "entropy_ratio": 0.1, "adjacent": 1.0, "adjacent_ratio": 2.0,
                       "adjacent_noise": 0.1}, "val": None}  # fmt: skip
    found = {name: found.get(name) for name in dataset.info["splits"]}
    assert "train is sorted by class" in dataset_words.mixing_warning("train", found["train"])
    assert dataset_words.mixing_warning("val", None) == ""
    assert 'class="warning"' in dataset_page.page(dataset, [], found, None)
    sorted_ = tmp_path / "sorted"
    for i in range(60):
        path = tmp_path / "in" / "train" / "ab"[i // 30] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (4 * i, 0, 0)).save(path)
    build(f"folder:{tmp_path / 'in'}", str(sorted_), Recipe(shuffle=False, val_fraction=0, samples_per_shard=20), 0)
    _, _, err = inspect(sorted_)
    assert "warning: train is sorted by class" in err


def test_a_thousand_classes_are_a_summary_not_a_thousand_lines(inspect, digits, monkeypatch):
    many = with_classes(index.load(digits), 120)
    monkeypatch.setattr(index, "load", lambda root: many)
    _, _, err = inspect(digits)
    assert len(err.splitlines()) < 25
    assert "classes: 120; smallest class 0 2, median 2, largest class 119" in err


def test_what_dataset_json_does_not_hold_is_left_out(inspect, digits, monkeypatch):
    dataset = index.load(digits)
    new = ("bytes", "histograms", "passed", "animated")
    old = dataclasses.replace(dataset, info={k: v for k, v in dataset.info.items() if k not in new})
    edges = {"short_side": {"edges": [1, 30, 40, 50], "counts": [0, 1000, 797]}}
    full = dataclasses.replace(
        dataset, info=old.info | {"bytes": {"source": 10**6, "stored": 5 * 10**5}, "passed": 3, "histograms": edges}
    )
    monkeypatch.setattr(index, "load", lambda root: old)
    code, _, err = inspect(digits)
    assert code == 0
    assert not re.search("bytes:|passed|█", err)
    monkeypatch.setattr(index, "load", lambda root: full)
    _, _, err = inspect(digits)
    assert "1.0 MB of source -> 500.0 kB stored, 0.50 of it" in err
    assert "passed through unchanged: 3" in err
    assert "nine in ten are 32  █▇" in err
    page = dataset_page.page(full, [], dict.fromkeys(full.info["splits"]), None)
    assert 'title="30 to 40: 1,000"' in page


def test_the_page_stands_alone_and_names_stay_text(inspect, tmp_path, broken):
    source, data = broken
    code, _, err = inspect(data, "--html", tmp_path / "page.html", "--source", f"folder:{source}")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    markup = Markup(page)
    assert TAG in markup.text
    assert not markup.all("script")
    assert all(image["src"].startswith("data:image/") and image["alt"].strip() for image in markup.all("img"))
    assert "http" not in page.replace("http-equiv", "")
    assert str(source) not in page
    assert str(Path(data).parent) not in page


def test_the_page_shows_samples_of_each_class_and_what_is_left_of_rejects(inspect, tmp_path, broken):
    source, data = broken
    shown = {}
    for name, words in (("plain", []), ("pictures", ["--source", f"folder:{source}"])):
        inspect(data, "--html", tmp_path / name, *words)
        shown[name] = Markup((tmp_path / name).read_text())
    alts = {name: [image["alt"] for image in markup.all("img")] for name, markup in shown.items()}
    assert alts["plain"].count("of ok") == alts["plain"].count(f"of {TAG}") == dataset_page.OF_EACH
    assert [alt for alt in alts["pictures"] if alt not in alts["plain"]] == [f"of {TAG}/cut.jpg"]
    for text in (f"{TAG}/cut.jpg", "ok/empty.png", "ok/text.jpg", "ok/zip.png", "truncated", "not_an_image", "0 bytes"):
        assert text in shown["plain"].text


def test_rejects_that_vanished_from_the_source_are_no_trouble(inspect, tmp_path, broken):
    Image.new("RGB", (9, 9)).save(tmp_path / "other.png")
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "other.png").rename(tmp_path / "src" / "a" / "other.png")
    code, _, err = inspect(broken[1], "--html", tmp_path / "p.html", "--source", f"folder:{tmp_path / 'src'}")
    assert code == 0, err
    assert "cut.jpg" in (tmp_path / "p.html").read_text()


def test_a_page_of_many_classes_shows_a_hundred_and_says_so(digits):
    many = with_classes(index.load(digits), 120)
    page = dataset_page.page(many, [], dict.fromkeys(many.info["splits"]), None)
    markup = Markup(page)
    assert "100 of the 120 classes" in markup.text
    assert len([figure for figure in markup.all("figure") if figure["class"].startswith("strip")]) == 100
    assert len(page) < 1_000_000


def test_a_dataset_without_labels_has_one_strip_and_no_mixing(inspect, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(60):
        Image.new("L", (20, 20), 4 * i).save(tmp_path / "in" / f"{i}.png")
    build(f"folder:{tmp_path / 'in'}", str(tmp_path / "out"), Recipe(labels="none", val_fraction=0), workers=0)
    code, out, err = inspect(tmp_path / "out", "--html", tmp_path / "p.html", "--json")
    assert code == 0, err
    assert json.loads(out)["mixing"] == {"train": None}
    assert "mixing of train: no labels" in err
    assert len(Markup((tmp_path / "p.html").read_text()).all("img")) == 48


def test_sidecars_are_named_and_missing_files_counted(digits, tmp_path):
    dataset = dataclasses.replace(index.load(digits), root=str(tmp_path))
    assert dataset_words.present_sidecars(dataset) == []
    (tmp_path / "sizes.json").write_text("{}")
    (tmp_path / "wids-train.json").write_text("{}")
    assert dataset_words.present_sidecars(dataset) == ["wids (1 of 2 files)", "open_clip"]


def test_a_source_without_a_page_is_a_mistake(inspect, digits):
    code, _, err = inspect(digits, "--source", "digits:")
    assert (code, "--html" in err) == (2, True)
