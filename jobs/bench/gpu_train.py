"""`bench train --gpu`: shards to trained steps on one GPU, against what the GPU alone would do.

ours        the training loop, fed from shards on local disk by a thread a core
resident    the same loop and step, fed the same batch again and again, its images on the device already
timm        the step of timm's train.py on a resident batch of floats: same network, batch, precision, layout and
            optimiser (ours has blur pooling where the preset asks for it, and turns bytes into floats)
"""

import collections
import dataclasses
import importlib
import itertools
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import torch

from jobs.bench.rounds import ratio, summary, take_turns
from jobs.command import say
from pipeline.loading.steps import Step, Steps
from pipeline.training import loop
from pipeline.training.run import Run, TrainConfig, start
from pipeline.training.tasks import ClassifyConfig
from pipeline.training.world import Contact, World

IMAGENET = 1_281_167  # images
_BAR, _TIMM_BAR = 0.97, 1.0


def check(device: str) -> None:
    """ValueError if it is not there."""
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device {device!r}: use cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--gpu: torch {torch.__version__} finds no GPU here; --device cpu runs the same on the CPU, however slowly"
        )


def measure(config: TrainConfig, preset: str, data: str, device: str, steps: int, skip: int, rounds: int) -> dict:
    """{rate, limit (resident), ratio, ratios, baselines {timm: rate or None}, ratio_to_timm, timm (why it is missing),
    waits, batch, micro_batches, image_size, peak_bytes, sides {px: resident rate}, hours (of the preset on ImageNet),
    device, torch, cuda, cudnn}; rates in images/s, medians over the rounds."""
    if not isinstance(config.task, ClassifyConfig):
        raise ValueError("--gpu measures classifiers: use a --preset that is one")
    shown = config.augment
    still = dataclasses.replace(shown, start_size=0, ramp_from=0, ramp_to=0)
    endless = dataclasses.replace(config.loop, epochs=1e9, checkpoint_every=0, validate_every=0)
    with tempfile.TemporaryDirectory(prefix="millstream-bench-") as folder:
        run = start(f"{folder}/run", preset, dataclasses.replace(config, augment=still, loop=endless), data, 0)
    side, bench = run.config.augment.image_size, _Bench(run, torch.device(device), steps, skip)
    parts = f"batch {config.loop.batch} in {run.config.loop.micro_batches} parts"
    say(f"{config.task.model}, {side} px, {parts}, {bench.threads} threads, on {_name(bench.device)}")
    sides = {"ours": bench.ours, "resident": lambda: bench.resident(side)}
    step, missing = timm_step(run, side, bench.device)
    if step:
        sides["timm"] = lambda: bench.timm(step)
    else:
        say(f"timm is left out: {missing}")
    rates = take_turns(rounds, sides)
    result = summary(rates["ours"], rates["resident"])
    theirs = statistics.median(rates["timm"]) if step else None
    to_timm = ratio(rates["ours"], rates["timm"]) if step else None
    result |= {"baselines": {"timm": theirs}, "ratio_to_timm": to_timm, "timm": missing, "waits": bench.waits}
    result |= {
        "batch": config.loop.batch,
        "micro_batches": run.config.loop.micro_batches,
        "image_size": side,
        "peak_bytes": bench.peak,
    }
    epochs = epochs_of(shown if shown.start_size else still, side, config.loop.epochs)
    at = {px: result["limit"] if px == side else bench.resident(px) for px in sorted(epochs)}
    result |= {"sides": at, "hours": hours(epochs, at, result["ratio"])}
    result |= {"device": _name(bench.device), "torch": torch.__version__}
    result |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    _tell(result, config)
    return result


def epochs_of(augment, side: int, epochs: float) -> dict[int, float]:
    """{side in px: epochs that show it}, `side` where the augmentation has none of its own."""
    found = collections.Counter()
    for epoch in range(math.ceil(epochs)):
        found[augment.side(epoch) or side] += min(1.0, epochs - epoch)
    return dict(found)


def hours(epochs: dict[int, float], rates: dict[int, float], share: float) -> float:
    """Of training on ImageNet at `share` of these resident rates, images/s by side."""
    return sum(IMAGENET * count / rates[px] for px, count in epochs.items()) / share / 3600


class _Bench:
    """Rounds of `steps` steps, none of the first ones counted. One task serves all: it is compiled once a shape."""

    def __init__(self, run: Run, device: torch.device, steps: int, skip: int):
        self.run, self.device, self.steps, self.skip = run, device, steps, skip
        self.split, self.threads = run.chosen(run.dataset()).split, os.cpu_count() or 1
        self.world, self.task = World(device=device), run.task(device, training=True)
        self.position, self.waits, self.peak, self.cuda = 0, {}, 0, device.type == "cuda"
        self.images = run.config.loop.batch * steps  # of a round

    def loader(self, side: int = 0) -> Steps:
        augment, seed = self.run.config.augment, self.run.config.loop.seed
        if side:
            augment = dataclasses.replace(augment, image_size=side)
        more = {"threads": self.threads, "pinned": self.cuda}
        return Steps(self.split, augment, seed, self.run.batching, position=self.position, **more)

    def ours(self) -> float:
        loader = self.loader()
        steps = iter(loader)
        # What lies ready at first is not what can be kept up.
        rate = self.trained(steps, self.skip + loader.ahead)
        self.position, self.waits, self.peak = loader.position, loader.report(), max(self.peak, self.held())
        steps.close()
        return rate

    def resident(self, side: int) -> float:
        steps = iter(self.loader(side))
        step = next(steps)
        steps.close()
        there = [dataclasses.replace(b, images=b.images.to(self.device)) for b in step.micro_batches]
        return self.trained(itertools.repeat(dataclasses.replace(step, micro_batches=there)), self.skip)

    def trained(self, steps: Iterator[Step], skip: int) -> float:
        """Images per second of the training loop on these steps."""
        config, seconds = self.run.config, []

        def counted() -> Iterator[Step]:
            for number in range(skip + self.steps):
                if number == skip:
                    begin = self.now()
                    if self.cuda:
                        torch.cuda.reset_peak_memory_stats(self.device)
                yield next(steps)
            seconds.append(self.now() - begin)

        args = counted(), len(self.split), self.world, dict, None, Contact()
        loop.train(config.loop, config.optim, self.task, *args)
        return self.images / seconds[0]

    def timm(self, step: Callable[[], None]) -> float:
        for number in range(self.skip + self.steps):
            if number == self.skip:
                begin = self.now()
            step()
        return self.images / (self.now() - begin)

    def now(self) -> float:
        """Once the device has done what it was given."""
        self.world.settle()
        return time.perf_counter()

    def held(self) -> int:
        """Most bytes held at once, compiling and checking left out: of the device, or of this process."""
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timm_step(run: Run, side: int, device: torch.device) -> tuple[Callable[[], None] | None, str | None]:
    """A training step as timm's train.py takes it (`train_one_epoch`), or None and why there is none."""
    try:
        timm, optim, losses, utils = (
            importlib.import_module(f"timm{part}") for part in ("", ".optim", ".loss", ".utils")
        )
    except (ImportError, RuntimeError, OSError) as error:  # the last two: its torchvision is of another torch
        return None, f"pip install timm ({type(error).__name__}: {' '.join(str(error).split())})"
    config, compute, name = run.config.task, run.config.compute, run.config.task.model.removeprefix("timm:")
    if not timm.is_model(name):
        return None, f"it has no {name}"
    batch, classes = run.config.loop.batch, len(run.facts.classes)
    model = timm.create_model(name, num_classes=classes, in_chans=run.facts.channels).to(device)
    layout = torch.channels_last if compute.channels_last else torch.contiguous_format
    model = model.to(memory_format=layout).train()
    moved = run.config.optim
    kind = "momentum" if moved.optimizer == "sgd" and not moved.nesterov else moved.optimizer  # its sgd is nesterov's
    how = {"lr": 1e-3, "weight_decay": moved.weight_decay, "momentum": moved.momentum}
    optimizer = optim.create_optimizer_v2(model, opt=kind, **how)
    average = utils.ModelEmaV3(model) if config.ema_half_life else None
    if config.loss == "bce":
        loss = losses.BinaryCrossEntropy(smoothing=config.label_smoothing)
    else:
        loss = losses.LabelSmoothingCrossEntropy(config.label_smoothing)
    scaler, called = compute.scaler(device), torch.compile(model) if compute.compile else model
    images = torch.randn(batch, run.facts.channels, side, side, device=device).contiguous(memory_format=layout)
    labels = torch.randint(0, classes, (batch,), device=device)

    def step() -> None:
        with compute.autocast(device):
            value = loss(called(images), labels)
        if scaler:
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            value.backward()
            optimizer.step()
        optimizer.zero_grad()
        if average:
            average.update(model)

    return step, None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _tell(result: dict, config: TrainConfig) -> None:
    for name, rate, share, bar in (
        ("the same step on a resident batch", result["limit"], result["ratio"], _BAR),
        ("timm's", result["baselines"]["timm"], result["ratio_to_timm"], _TIMM_BAR),
    ):
        if rate is not None:
            met = "at least" if share >= bar else "NOT"
            say(f"ours {result['rate']:,.1f} images/s, {name} {rate:,.1f}: ratio {share:.3f}, {met} {bar}")
    waits = ", ".join(f"{kind} {result['waits'][kind]:.2f}" for kind in ("waiting", "consumer"))
    say(f"the loader's last round, seconds: {waits}; peak memory {result['peak_bytes'] / 2**30:.2f} GiB")
    sides = ", ".join(f"{px} px {rate:,.0f}" for px, rate in result["sides"].items())
    say(f"resident images/s: {sides}. {config.loop.epochs:g} epochs of ImageNet: {result['hours']:.2f} hours")
    say(f"{result['device']}, torch {result['torch']}, CUDA {result['cuda']}, cuDNN {result['cudnn']}")
