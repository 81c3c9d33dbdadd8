"""The main line, end to end: raw images, shards, training under Ray, evaluation, samples, report; locally and on S3."""

import json
import os
import tarfile
from html.parser import HTMLParser

import pytest
import webdataset

from jobs.__main__ import main
from jobs.demo import write_raw
from pipeline import storage
from pipeline.shards import index
from pipeline.training import checkpoint


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("raw"))
    write_raw(folder)
    return folder


def run(capsys, *words) -> dict:
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


class Text(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.text, self.pictures = "", 0
        self.feed(page)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.pictures += tag in ("img", "svg")


@pytest.mark.parametrize("place", ["s3"], indirect=True)  # raw images on S3: test_build; all of it local: make demo
def test_digits_from_files_to_models_under_ray(raw, place, ray_local, capsys, tmp_path):
    data, cnn, gan = (storage.join(place, name) for name in ("data", "cnn", "gan"))
    made = run(capsys, "shard", f"folder:{raw}", data, "--samples-per-shard", 200, "--format", "png", "--workers", 2)
    assert made["rejected"] == 0
    assert made["samples"] == sum(split["samples"] for split in index.load(data).info["splits"].values())

    trained = run(capsys, "train", "digits_cnn", "--data", data, "--out", cnn, "--epochs", 6, "--workers", 2)
    assert trained["samples_seen"] >= 6 * made["splits"]["train"]["samples"]
    scores = [run(capsys, "evaluate", cnn, "--split", "test", "--workers", workers) for workers in (1, 2)]
    assert scores[0]["confusion"] == scores[1]["confusion"]
    assert scores[0]["samples"] == made["splits"]["test"]["samples"]
    assert scores[0]["accuracy"] > 0.93
    page = Text(storage.read(storage.join(cnn, "report.html")).decode())
    assert page.pictures > 20
    assert "Confusion" in page.text

    again = run(capsys, "train", "digits_cnn", "--data", data, "--out", cnn, "--epochs", 6, "--workers", 2)
    assert again["done"]
    assert again["checkpoint"] == trained["checkpoint"]
    rows = checkpoint.read_metrics(cnn)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert storage.read(storage.join(cnn, "metrics.jsonl")).count(b"\n") == len(rows)

    run(capsys, "train", "digits_gan", "--data", data, "--out", gan, "--epochs", 0.5, "--workers", 2)
    grid = storage.join(place, "grid.png")
    assert run(capsys, "sample", gan, "--n", 20, "--out", grid)["images"] == 20
    assert storage.read(grid).startswith(b"\x89PNG")
    left = [file.path for file in storage.list_files(place) if "/.lease" in file.path or file.path.endswith(".part")]
    assert not left


def test_shards_open_in_webdataset_with_the_same_images_and_labels(digits):
    split = index.load(str(digits)).split("train")
    shards = [os.path.join(str(digits), name) for name in split.shards]
    seen = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in seen] == split.keys.to_pylist()
    assert [sample["cls"] for sample in seen] == split.label.tolist()
    with tarfile.open(shards[0]) as tar:
        assert tar.extractfile(f"{seen[0]['__key__']}.png").read()[:4] == b"\x89PNG"


@pytest.mark.parametrize("bench", ["load", "shard", pytest.param("train", marks=pytest.mark.slow)])
def test_benches_print_the_rate_the_limit_and_their_ratio(bench, digits, ray_local, capsys):
    words = {
        "load": ["--data", digits, "--seconds", 0.3, "--rounds", 1],
        "shard": ["--source", "digits:", "--rounds", 1],
        "train": ["--data", digits, "--preset", "digits_cnn", "--steps", 4, "--rounds", 1],
    }
    result = run(capsys, "bench", bench, *words[bench])
    assert result.keys() >= {"rate", "limit", "ratio", "baselines"}
    assert result["ratio"] == pytest.approx(result["rate"] / result["limit"])
    assert result["rate"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_reaches_its_accuracy_and_is_done_the_second_time(tmp_path, capsys):
    first = run(capsys, "demo", "--out", tmp_path)
    assert first["accuracy"] >= 0.97
    assert os.path.getsize(first["report"]) > 100_000
    second = run(capsys, "demo", "--out", tmp_path)
    assert second["done"]
    assert second["accuracy"] == first["accuracy"]
