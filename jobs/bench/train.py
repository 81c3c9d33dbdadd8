"""Training rate of the whole pipeline against bare torch loops on the same cores; --gpu: see `gpu_train`."""

import contextlib
import dataclasses
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.session import ray_session
from jobs import presets
from jobs.bench import gpu_train
from jobs.bench.rounds import alternate, dataset, photo_dataset
from jobs.command import absolute, execute, parse, say
from pipeline.shards import index
from pipeline.training import checkpoint, fit, ledger
from pipeline.training.compute import ComputeConfig
from pipeline.training.resources import Resources
from pipeline.training.run import Run, TrainConfig, start

_BARE_START_S = 120
_SHORT = 256 / 224  # of the image size: what ImageNet's custom keeps around a crop
_GPU_NAMES = 6  # of each photo; the loader keeps none of them as pixels, since their sizes differ


@dataclass(frozen=True)
class Args:
    """Training rate from shards under Ray Train, against bare torch loops with every image in memory.

    1 worker x 2 threads against one bare process of 2 threads; 2 workers x 1 thread against two independent bare
    processes of 1 thread each (their rates added). Same network, batch and optimiser, in float32; start-up is not
    counted. With --gpu another comparison: shards to one GPU against the same step on a batch that is there already,
    and against timm's training step.
    """

    data: str | None = None
    """DATASET; default: for a preset that crops, photos cut from Debian's wallpapers, else Fashion-MNIST from Debian's
    dataset-fashion-mnist; sharded for the occasion."""
    preset: str = "fashion_cnn"
    """Which preset's network, batch, optimiser and augmentation."""
    image_size: int | None = None
    """Side in px instead of the preset's."""
    batch: int | None = None
    """Images in a step instead of the preset's: over all workers, and of each bare process."""
    micro_batches: int | None = None
    """Parts of a step instead of the preset's; 0: two."""
    weak: bool = False
    """Each worker computes as many images a step as a bare process (weak scaling), not all workers together."""
    steps: int = 120
    """Steps in a measurement."""
    skip: int = 20
    """Steps before them that are not counted: threads, caches, the allocator and the compiler warm up."""
    rounds: int = 5
    """Rounds; each measures every side once."""
    two: bool = False
    """Only the two workers."""
    photos: str | None = None
    """Folder where the photos are kept and found again; default: a temporary one."""
    count: int = 2000
    """How many of them are cut; with --gpu each is in the dataset six times, at 256 px."""
    gpu: bool = False
    """Measure what feeds one GPU instead, without Ray."""
    device: str = "cuda"
    """Of --gpu: cpu runs the same on the CPU."""
    json: bool = False
    """Print the result as one JSON object on stdout."""

    def __post_init__(self):
        for name, least in (("steps", 1), ("rounds", 1), ("skip", 1), ("batch", 1), ("image_size", 1), ("count", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} {value} must be at least {least}")


def run(args: Args) -> dict:
    """{rate, limit, ratio, ratios, spent, baselines} of one worker, and the same of two under `two_workers`; with --gpu
    what `gpu_train.measure` gives."""
    if args.gpu:
        gpu_train.check(args.device)
    config = configured(args)
    with data_for(args, config) as data:
        if args.gpu:
            return gpu_train.measure(config, args.preset, data, args.device, args.steps, args.skip, args.rounds)
        with tempfile.TemporaryDirectory(prefix="millstream-bench-") as folder, ray_session(2):
            return processes(args, config, data, folder)


def configured(args: Args) -> TrainConfig:
    """The preset with what the command line says instead."""
    config = presets.get(args.preset)
    if args.image_size:
        augment = dataclasses.replace(config.augment, image_size=args.image_size, start_size=0, eval_size=0)
        config = dataclasses.replace(config, augment=augment)
    parts = config.loop.micro_batches if args.micro_batches is None else args.micro_batches
    loop = dataclasses.replace(config.loop, batch=args.batch or config.loop.batch, micro_batches=parts)
    return dataclasses.replace(config, loop=dataclasses.replace(loop, validate_every=1 << 60))


@contextlib.contextmanager
def data_for(args: Args, config: TrainConfig) -> Iterator[str]:
    """The dataset that is named, or one that suits the configuration."""
    if args.data or config.augment.crop != "resized":
        with dataset(absolute(args.data) if args.data else None) as data:
            yield data
        return
    size, names = (256, _GPU_NAMES) if args.gpu else (round(config.augment.image_size * _SHORT), 1)
    with photo_dataset(args.photos and absolute(args.photos), args.count, size, names) as data:
        yield data


def processes(args: Args, config: TrainConfig, data: str, folder: str) -> dict:
    """Both comparisons on the CPU."""
    config, numbers, sides = dataclasses.replace(config, compute=ComputeConfig()), itertools.count(), {}
    each = config.loop.batch

    def opened(workers: int) -> Run:
        loop = config.loop
        if args.weak:
            loop = dataclasses.replace(loop, batch=each * workers, micro_batches=workers)
        epochs = (args.steps + args.skip) * loop.batch / index.load(data).info["splits"]["train"]["samples"]
        asked = dataclasses.replace(config, loop=dataclasses.replace(loop, epochs=epochs))
        return start(f"{folder}/{next(numbers)}", args.preset, asked, data, workers)

    shape = opened(1)
    for workers, threads in ((2, 1),) if args.two else ((1, 2), (2, 1)):
        name, spent = ("2 workers x 1 thread", "1 worker x 2 threads")[workers == 1], []
        say(f"{name} against as many bare processes")
        sides[name] = alternate(
            args.rounds,
            lambda: ours(args, opened(workers), workers, threads, spent),  # noqa: B023
            lambda: bare(args, shape.path, each, workers, threads),  # noqa: B023
        )
        sides[name]["spent"] = {
            kind: sum(one[kind] for one in spent) / sum(sum(one.values()) for one in spent)
            for kind in ("data", "compute", "communication")
        }
    for name, side in sides.items():
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in side["spent"].items())
        say(f"{name}: {side['rate']:,.1f} images/s of {side['limit']:,.1f} bare, ratio {side['ratio']:.3f} ({shares})")
    first, last = next(iter(sides.values())), list(sides.values())[-1]
    return first | {"baselines": {"bare torch loop": first["limit"]}, "two_workers": last}


def ours(args: Args, opened: Run, workers: int, threads: int, spent: list[dict]) -> float:
    """Images per second of a short run, from the times its own rows carry. spent: gets where its seconds went."""
    fit.train(opened, Resources(workers=workers, threads=threads, device="cpu"), lambda row: None)
    rows, seconds = checkpoint.read_metrics(opened.path), ledger.read(opened.path)[-1]["seconds"]
    spent.append({kind: seconds.get(kind, 0.0) for kind in ("data", "compute", "communication")})
    first, last = rows[args.skip - 1], rows[-1]
    return (last["samples"] - first["samples"]) / (last["time"] - first["time"])


def bare(args: Args, path: str, batch: int, processes: int, threads: int) -> float:
    """Images per second of `processes` bare loops that run at the same time, added."""
    words = [path, *map(str, (batch, args.steps, args.skip, threads))]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "jobs.bench.bare_train", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    try:
        for process in running:
            assert process.stdout.readline().strip() == "ready"
        for process in running:
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(float(process.communicate(timeout=_BARE_START_S + 60 * args.steps)[0]) for process in running)
    finally:
        for process in running:
            process.kill()
            process.wait()


def main(argv: list[str]) -> int:
    args = parse(Args, "bench train", argv)
    return execute(lambda: run(args), args.json)
