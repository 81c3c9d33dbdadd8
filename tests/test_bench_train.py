"""The training bench: what each side is given to do, what is timed of it, and the same on a CPU as on a GPU."""

import contextlib
import dataclasses
import io
import itertools
import json
import sys
import types

import pytest
import torch
from PIL import Image
from torch import nn

from jobs.__main__ import main
from jobs.bench import bare_train, gpu_train, train
from jobs.bench.train import Args
from pipeline.loading.augment import Augment
from pipeline.shards import build
from pipeline.shards.plan import Recipe
from pipeline.training.cadence import LoopConfig
from pipeline.training.run import start

MINE = """
from pipeline.loading.augment import Augment
from pipeline.training.cadence import LoopConfig
from pipeline.training.compute import ComputeConfig
from pipeline.training.optim import OptimConfig
from pipeline.training.run import TrainConfig
from pipeline.training.tasks import ClassifyConfig


def small():
    return TrainConfig(
        ClassifyConfig(model="resnet18", label_smoothing=0.1),
        OptimConfig("sgd", lr=0.01),
        LoopConfig(epochs=2.5, batch=16, micro_batches=4),
        Augment(40, 3, "resized", flip=True, start_size=32, ramp_from=1, ramp_to=2),
        compute=ComputeConfig("bf16", channels_last=True),
    )
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 JPEGs of two classes."""
    root = tmp_path_factory.mktemp("bench")
    for i in range(40):
        (root / "in" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (200 * (i % 2), i, 40)).save(root / "in" / f"c{i % 2}" / f"{i}.jpg")
    build.build(f"folder:{root / 'in'}", str(root / "out"), Recipe(val_fraction=0.0), workers=0)
    return str(root / "out")


@pytest.fixture
def small(tmp_path):
    """A preset of one's own, on one thread: beside busy neighbours several would wait for each other."""
    (tmp_path / "mine.py").write_text(MINE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield f"{tmp_path}/mine.py:small"
    torch.set_num_threads(threads)


class TinyTimm(types.ModuleType):
    """What `timm_step` calls of timm."""

    def __init__(self):
        super().__init__("timm")
        self.made = []
        self.is_model = lambda name: name == "resnet18"
        self.optim, self.loss, self.utils = self, self, self
        self.LabelSmoothingCrossEntropy = lambda smoothing: nn.CrossEntropyLoss(label_smoothing=smoothing)

    def create_model(self, name, num_classes, in_chans):
        self.model = nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.model.append(nn.Linear(4, num_classes))
        return self.model

    def create_optimizer_v2(self, model, opt, lr, momentum, weight_decay):
        self.made.append(opt)
        return torch.optim.SGD(model.parameters(), lr, momentum, nesterov=opt == "sgd", weight_decay=weight_decay)


@pytest.fixture
def timm(monkeypatch):
    tiny = TinyTimm()
    for name in ("timm", "timm.optim", "timm.loss", "timm.utils"):
        monkeypatch.setitem(sys.modules, name, tiny)
    return tiny


@pytest.fixture
def no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)


def test_shards_to_steps_are_measured_against_the_step_alone_and_a_preset_is_projected(data, small, no_timm, capsys):
    words = ["--preset", small, "--data", data, "--batch", "4", "--micro-batches", "2", "--steps", "2", "--skip", "1"]
    assert main(["bench", "train", "--gpu", "--device", "cpu", *words, "--rounds", "1", "--json"]) == 0
    out, said = capsys.readouterr()
    result = json.loads(out)
    assert result["ratio"] == pytest.approx(result["rate"] / result["limit"])
    assert (result["batch"], result["micro_batches"], result["image_size"]) == (4, 2, 40)
    assert result["sides"].keys() == {"32", "40"}
    rates = {int(px): rate for px, rate in result["sides"].items()}
    assert rates[40] == result["limit"]
    assert result["hours"] == pytest.approx(gpu_train.hours({32: 2, 40: 0.5}, rates, result["ratio"]))
    assert result["baselines"] == {"timm": None}
    assert result["ratio_to_timm"] is None
    assert "pip install timm" in result["timm"]
    assert (result["device"], result["torch"]) == ("the CPU", torch.__version__)
    assert result["waits"]["decode"] > 0
    assert result["peak_bytes"] > 10e6
    assert "timm is left out" in said


def test_hours_are_those_of_the_epochs_at_each_side_at_the_share_reached():
    augment = Augment(192, 3, start_size=160, ramp_from=11, ramp_to=13)
    assert gpu_train.epochs_of(augment, 192, 16) == {160: 12, 192: 4}
    assert gpu_train.epochs_of(Augment(), 28, 2.5) == {28: 2.5}
    images = gpu_train.IMAGENET / 3600
    assert gpu_train.hours({160: 12, 192: 4}, {160: 3000, 192: 2000}, 0.5) == pytest.approx(images * 0.006 / 0.5)


def bench_of(small, data, folder, **options):
    args = Args(preset=small, data=data, batch=4, micro_batches=2, image_size=32)
    config = dataclasses.replace(train.configured(args), **options)
    run = start(str(folder / "run"), small, config, data, 0)
    return gpu_train._Bench(run, torch.device("cpu"), 3, 2)


def test_the_first_steps_and_what_the_loader_has_ready_are_not_timed(data, small, tmp_path, monkeypatch):
    bench, seen = bench_of(small, data, tmp_path), []
    monkeypatch.setattr(gpu_train.loop, "train", lambda config, optim, task, steps, *rest: seen.extend(steps))
    monkeypatch.setattr(bench, "now", lambda: float(len(seen)) * 2)  # two seconds a step
    assert bench.trained(itertools.repeat("step"), 5) == 4 * 3 / (3 * 2)
    assert len(seen) == 5 + 3
    seen.clear()
    assert bench.ours() == 2
    ahead = bench.loader().ahead
    assert [step.number for step in seen] == list(range(2 + ahead + 3))
    seen.clear()
    bench.ours()
    assert seen[0].number == 2 + ahead + 3  # goes on in the order
    seen.clear()
    assert bench.resident(36) == 2
    assert len({id(step) for step in seen}) == 1
    assert seen[0].micro_batches[0].images.shape == (2, 36, 36, 3)


def test_timms_step_moves_its_weights_and_clears_its_gradients(data, small, tmp_path, timm):
    bench = bench_of(small, data, tmp_path)
    step, missing = gpu_train.timm_step(bench.run, 32, bench.device)
    assert missing is None
    before = [p.clone() for p in timm.model.parameters()]
    step()
    assert not any(torch.equal(p, old) for p, old in zip(timm.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in timm.model.parameters())
    assert bench.timm(step) > 0
    assert timm.made == ["momentum"]  # what timm calls sgd has Nesterov's
    other = dataclasses.replace(bench.run.config, task=dataclasses.replace(bench.run.config.task, model="resnet9"))
    assert gpu_train.timm_step(dataclasses.replace(bench.run, config=other), 32, bench.device) == (
        None,
        "it has no resnet9",
    )


def test_a_gpu_that_is_not_there_is_a_mistake_of_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "train", "--gpu"]) == 2
    said = capsys.readouterr().err
    assert "--device cpu" in said
    assert said.count("\n") == 1
    assert main(["bench", "train", "--gpu", "--device", "tpu"]) == 2
    assert main(["bench", "train", "--gpu", "--device", "cpu", "--preset", "nothing"]) == 2


def test_the_preset_gives_way_to_the_command_line(small):
    assert train.configured(Args(preset=small)).loop == LoopConfig(2.5, 16, 4, validate_every=1 << 60)
    changed = train.configured(Args(preset=small, image_size=64, batch=8, micro_batches=0))
    assert (changed.loop.batch, changed.loop.micro_batches, changed.augment.image_size) == (8, 0, 64)
    assert changed.augment.side(0) == 64


@pytest.mark.parametrize("weak", [False, True])
def test_workers_share_a_bare_loops_batch_or_have_as_much_each(data, small, tmp_path, monkeypatch, weak):
    given = []

    def ours(args, opened, workers, threads, spent):
        spent.append({"data": 1.0, "compute": 6.0, "communication": 1.0})
        given.append((workers, threads, opened.config.loop.batch, opened.config.loop.micro_batches, opened.steps()))
        assert opened.config.compute.precision == "fp32"
        return 80.0

    monkeypatch.setattr(train, "ours", ours)
    monkeypatch.setattr(train, "bare", lambda args, path, batch, *how: given.append((batch, *how)) or 100.0)
    args = Args(preset=small, batch=8, micro_batches=0, steps=6, skip=2, rounds=1, weak=weak)
    result = train.processes(args, train.configured(args), data, str(tmp_path))
    one, two = ((8, 1), (16, 2)) if weak else ((8, 2), (8, 2))
    assert sorted(given) == sorted([(1, 2, *one, 8), (8, 1, 2), (2, 1, *two, 8), (8, 2, 1)])
    assert result["ratio"] == result["two_workers"]["ratio"] == 0.8
    assert result["two_workers"]["spent"] == {"data": 0.125, "compute": 0.75, "communication": 0.125}


def test_a_preset_that_crops_gets_photos_and_others_fashion_mnist(small, monkeypatch):
    asked = []

    @contextlib.contextmanager
    def noting(*what):
        asked.append(what)
        yield "there"

    monkeypatch.setattr(train, "photo_dataset", noting)
    monkeypatch.setattr(train, "dataset", noting)
    for args in (
        Args(preset=small, image_size=64),
        Args(preset=small, gpu=True, count=30),
        Args(),
        Args(preset=small, data="/mine"),
    ):
        with train.data_for(args, train.configured(args)) as place:
            assert place == "there"
    assert asked == [(None, 2000, 73, 1), (None, 30, 256, 6), (None,), ("/mine",)]


def test_the_bare_loop_waits_for_the_word_and_says_its_rate(data, small, tmp_path, monkeypatch, capsys):
    run = bench_of(small, data, tmp_path).run
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    bare_train.main(run.path, 8, 2, 1, 1)
    ready, rate = capsys.readouterr().out.split()
    assert ready == "ready"
    assert float(rate) > 0


@pytest.mark.parametrize("words", [["--steps", "0"], ["--batch", "0"], ["--rounds", "0"], ["--skip", "0"]])
def test_what_cannot_be_measured_is_a_mistake(words):
    with pytest.raises(SystemExit) as left:
        main(["bench", "train", *words])
    assert left.value.code == 2
