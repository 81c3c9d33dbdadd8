"""The bench's own parts: its limit, its datasets, and that every loader it names does the work it is timed for."""

import json
import os
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.__main__ import main
from jobs.bench import load, other_loaders
from jobs.bench.load import OTHERS, Args
from jobs.bench.rounds import apart, many_samples
from pipeline import storage
from pipeline.loading.augment import Augment, decode
from pipeline.shards import build, index, tar
from pipeline.shards.plan import Recipe
from pipeline.shards.verify import verify

CROPPED = Augment(image_size=24, channels=3, crop="resized", flip=True)
QUICK = ["--seconds", "0.2", "--rounds", "1", "--batch", "16", "--image-size", "24"]
KEYS = {"rate", "limit", "ratio", "ratios", "first_epoch", "baselines", "ratio_to_best", "ratio_to_codec"}
KEYS |= {"waits", "memory", "feeds", "partial", "s3"}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A dataset of 80 JPEGs of 64 x 48 px in four shards, each of one colour that only its class has."""
    root = tmp_path_factory.mktemp("colours")
    for i in range(80):
        (root / "in" / f"c{i % 4}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (60 * (i % 4) + 20, 128, 40)).save(
            root / "in" / f"c{i % 4}" / f"{i}.jpg", quality=95
        )
    build.build(f"folder:{root / 'in'}", str(root / "out"), Recipe(samples_per_shard=20, val_fraction=0.0), workers=0)
    return str(root / "out")


def bench(capsys, *words) -> tuple[dict, str]:
    """(what it printed as JSON, what people read)"""
    capsys.readouterr()
    code = main(["bench", "load", *words, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out), err


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("ray", "litdata")])
def test_a_loader_gives_every_image_once_an_epoch_cropped_and_with_its_class(colours, tmp_path, name):
    labels = []
    for images, classes in other_loaders.LOADERS[name](colours, str(tmp_path), 2, 24, 16)():
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (24, 24, 3)
        red = images[..., 0].float().mean((1, 2))
        assert torch.allclose(red, 60.0 * torch.as_tensor(classes) + 20, atol=3)
        labels += [int(label) for label in classes]
    assert sorted(labels) == sorted(list(range(4)) * 20)


def test_rates_count_what_comes_after_the_first_batches_over_as_many_epochs_as_it_takes(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(other_loaders.time, "perf_counter", lambda: float(next(now)))
    epochs, batch = [], (torch.zeros(5, 8, 8, 3, dtype=torch.uint8), None)

    def epoch():
        epochs.append(len(epochs))
        return [batch] * 3

    assert other_loaders.rate(epoch, 8, seconds=7.0, skip=2) == 5.0  # a batch of 5 each second
    assert len(epochs) == 3
    with pytest.raises(AssertionError):
        other_loaders.rate(epoch, 9, 1.0, 0)


def test_areas_are_drawn_as_torchvision_draws_them():
    areas = np.array([other_loaders._area(320, 256) for _ in range(4000)])
    left, top, width, height = areas.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 320).all()
    assert (top + height <= 256).all()
    share = width * height / (320 * 256)
    assert 0.07 < share.min() < 0.1
    assert 0.9 < share.max() <= 1
    assert 0.72 < (width / height).min() < 0.77
    assert 1.3 < (width / height).max() < 1.37
    assert other_loaders._area(1000, 10) == (493, 0, 13, 10)  # nothing fits: the centre, not wider than 4:3


def test_the_limit_decodes_each_image_it_holds_as_it_lies_in_the_shards(colours):
    split = index.load(colours).split("train")
    memory = other_loaders.Memory.of(split)
    assert [zlib.crc32(data) for data in memory.images] == split.crc32.tolist()
    assert {decode(data, 3).shape for data in memory.images} == {(48, 64, 3)}
    assert all(height <= 48 and width <= 64 for _, _, height, width in memory.boxes(CROPPED))
    assert other_loaders.bare(memory, CROPPED, 2, 0.1) > 0
    assert other_loaders.bare(memory, Augment(image_size=24, channels=3), 100, 0.1) > 0


def test_the_limit_decodes_in_full_unless_the_side_it_is_compared_with_does_not(colours):
    memory = other_loaders.Memory.of(index.load(colours).split("train"))
    assert set(memory.shrinks(Augment(image_size=24, channels=3))) == {2}
    assert set(memory.shrinks(Augment(image_size=24, channels=3, exact_decode=True))) == {1}
    assert set(memory.shrinks(Augment(image_size=40, channels=3))) == {1}


def test_the_bench_says_where_time_went_and_how_it_compares_with_webdataset(colours, capsys, monkeypatch):
    monkeypatch.setattr(load, "OTHERS", {name: OTHERS[name] for name in ("webdataset", "webdataset+codec")})
    result, said = bench(capsys, colours, *QUICK)
    assert result.keys() == KEYS
    assert result["baselines"].keys() == {"webdataset", "webdataset+codec"}
    assert result["ratio_to_best"] == pytest.approx(result["rate"] / result["baselines"]["webdataset"])
    assert result["ratio_to_codec"] == pytest.approx(result["rate"] / result["baselines"]["webdataset+codec"])
    assert result["ratio"] == pytest.approx(result["rate"] / result["limit"])
    assert result["partial"]["rate"] > 0  # 24 px of 48
    assert result["waits"]["decode"] > 0
    assert 100 < result["memory"] < 4000
    assert result["feeds"]["h100"] == pytest.approx([result["rate"] / 3000, result["rate"] / 2500])
    assert "H100" in said


def test_whole_epochs_are_loaded_from_a_store_and_nothing_is_left_there(colours, s3, capsys, monkeypatch):
    monkeypatch.setattr(load, "apart", lambda function, *args: function(*args))  # six processes would take a while
    prefix = s3.fresh()
    result, _ = bench(capsys, "--data", colours, *QUICK, "--exact-decode", "--no-baselines", "--s3", prefix)
    assert result["baselines"] == {}
    assert result["ratio_to_best"] is None
    assert result["s3"].keys() == {"streaming", "filling a cache", "second epoch, cached"}
    assert all(share > 0 for share in result["s3"].values())
    assert storage.list_files(prefix) == []


def test_an_index_of_many_samples_is_a_dataset_whose_every_sample_can_be_read(colours, tmp_path):
    many_samples(colours, str(tmp_path / "many"), 170)
    assert verify(str(tmp_path / "many")) == []
    split = index.load(str(tmp_path / "many")).split("train")
    assert (len(split), len(split.shards), len(set(split.keys.to_pylist()))) == (180, 9, 180)
    for shard, offset, size, crc32 in zip(split.shard, split.offset, split.size, split.crc32, strict=True):
        data = tar.read_sample(f"{split.root}/{split.shards[shard]}", int(offset), int(size))
        assert zlib.crc32(data) == crc32
    assert len({os.stat(tmp_path / "many" / name).st_ino for name in split.shards}) == 1


def test_seeking_is_timed_at_three_places_and_compared_with_its_bars(colours, capsys):
    result, said = bench(capsys, colours, *QUICK, "--seek", "--samples", "1000")
    assert (result["samples"], result["shards"], result["state_bytes"]) == (1000, 50, 3)
    assert result["first_batch_s"].keys() == {"start", "middle", "end"}
    assert all(took > 0 for took in [*result["first_batch_s"].values(), result["index_s"], result["memory"]])
    assert said.count("under") == 7


def test_a_loader_that_fails_is_named_and_says_why(colours, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"webdataset failed: ValueError: no train-\*\.tar in"):
        load.other("webdataset", Args(), CROPPED, str(tmp_path), str(tmp_path))
    monkeypatch.setattr(load, "_OTHER_S", 0.2)
    with pytest.raises(RuntimeError, match=r"webdataset failed: it took more than 0.2 s"):
        load.other("webdataset", Args(), CROPPED, colours, str(tmp_path))


def test_loaders_take_part_where_they_are_installed_and_can_do_the_work(colours, monkeypatch, capsys):
    assert set(load._others(Args(), CROPPED, colours)) >= {"webdataset", "webdataset+codec", "huggingface", "ray"}
    monkeypatch.setitem(OTHERS, "litdata", "no_such_package_here")
    assert "litdata" not in load._others(Args(), CROPPED, colours)
    assert "litdata is left out: pip install 'no_such_package_here'" in capsys.readouterr().err
    assert load._others(Args(baselines=False), CROPPED, colours) == ()
    for augment, data in (
        (Augment(24, 1, "resized", flip=True), colours),
        (Augment(24, 3), colours),
        (CROPPED, "s3://bucket/data"),
    ):
        assert load._others(Args(), augment, data) == ()


@pytest.mark.parametrize("words", [["a", "--data", "b"], ["--data", "b", "--fashion"], ["a", "--batch", "0"]])
def test_what_contradicts_itself_is_a_mistake(words, capsys):
    assert main(["bench", "load", *words]) == 2
    assert "error" in capsys.readouterr().err


def test_what_runs_apart_runs_in_another_process_and_its_errors_come_back():
    assert apart(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        apart(int, "x")
