"""Training rate of the whole pipeline against bare torch loops on the same cores."""

import dataclasses
import itertools
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from cluster.session import ray_session
from jobs import presets
from jobs.bench.rounds import alternate, dataset
from jobs.command import absolute, execute, parse, say
from pipeline.shards import index
from pipeline.training import checkpoint, fit
from pipeline.training.resources import Resources
from pipeline.training.run import start

_SKIPPED = 20  # first steps of each measurement: threads, caches and the allocator warm up
_BARE_START_S = 120


@dataclass(frozen=True)
class Args:
    """Training rate from shards under Ray Train, against bare torch loops with every image in memory.

    1 worker x 2 threads against one bare process of 2 threads; 2 workers x 1 thread against two independent bare
    processes of 1 thread each (their rates added). Same network, batch and optimiser; start-up is not counted.
    """

    data: str | None = None
    """DATASET; default: Fashion-MNIST from Debian's dataset-fashion-mnist, sharded for the occasion."""
    preset: str = "fashion_cnn"
    """Which preset's network, batch, optimiser and augmentation."""
    steps: int = 120
    """Steps in a measurement."""
    rounds: int = 5
    """Rounds; each measures every side once."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{rate, limit, ratio, baselines} of one worker, and the same of two under `two_workers`."""
    if args.steps < 1 or args.rounds < 1:
        raise ValueError(f"steps {args.steps} and rounds {args.rounds} must be at least 1")
    with dataset(absolute(args.data) if args.data else None) as data, tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()
        config = presets.get(args.preset)
        samples = index.load(data).info["splits"]["train"]["samples"]
        epochs = (args.steps + _SKIPPED) * config.loop.batch / samples
        config = dataclasses.replace(
            config, loop=dataclasses.replace(config.loop, epochs=epochs, validate_every=1 << 60)
        )

        def opened():
            return start(f"{folder}/{next(numbers)}", args.preset, config, data, 2)

        shape = opened()
        with ray_session(2):
            say("1 worker x 2 threads against one bare process of 2 threads")
            one = alternate(args.rounds, lambda: ours(opened(), 1, 2), lambda: bare(shape.path, args.steps, 1, 2))
            say("2 workers x 1 thread against two bare processes of 1 thread")
            two = alternate(args.rounds, lambda: ours(opened(), 2, 1), lambda: bare(shape.path, args.steps, 2, 1))
    for name, side in (("1 worker", one), ("2 workers", two)):
        say(f"{name}: {side['rate']:,.0f} images/s of {side['limit']:,.0f} bare, ratio {side['ratio']:.3f}")
    return one | {"baselines": {"bare torch loop": one["limit"]}, "two_workers": two}


def ours(opened, workers: int, threads: int) -> float:
    """Images per second of a short run, from the times its own rows carry."""
    fit.train(opened, Resources(workers=workers, threads=threads), lambda row: None)
    rows = checkpoint.read_metrics(opened.path)
    first, last = rows[_SKIPPED - 1], rows[-1]
    return (last["samples"] - first["samples"]) / (last["time"] - first["time"])


def bare(path: str, steps: int, processes: int, threads: int) -> float:
    """Images per second of `processes` bare loops that run at the same time, added."""
    command = [sys.executable, "-m", "jobs.bench.bare_train", path, str(steps), str(_SKIPPED), str(threads)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    try:
        for process in running:
            assert process.stdout.readline().strip() == "ready"
        for process in running:
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(float(process.communicate(timeout=_BARE_START_S + steps)[0]) for process in running)
    finally:
        for process in running:
            process.kill()
            process.wait()


def main(argv: list[str]) -> int:
    args = parse(Args, "bench train", argv)
    return execute(lambda: run(args), args.json)
