"""Loading rate from shards against threads that only decode."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from jobs.bench.rounds import alternate, dataset
from jobs.command import absolute, execute, parse, say
from pipeline.loading.augment import Augment, decode, fit, random_resized_crop
from pipeline.loading.loader import Loader, Reader
from pipeline.loading.order import Batching
from pipeline.shards import index
from pipeline.training.run import describe


@dataclass(frozen=True)
class Args:
    """Loading rate: shards to batches, against threads that decode (and crop) the same images from memory."""

    data: str | None = None
    """DATASET; default: Fashion-MNIST from Debian's dataset-fashion-mnist, sharded for the occasion."""
    augment: Augment = field(default_factory=Augment)
    batch: int = 256
    """Images in a batch."""
    threads: int = os.cpu_count() or 1
    """Threads that decode, on both sides."""
    seconds: float = 5.0
    """Length of a measurement."""
    rounds: int = 5
    """Rounds; each measures both sides once."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{rate, limit, ratio, baselines}"""
    with dataset(absolute(args.data) if args.data else None) as data:
        opened = index.load(data)
        augment, _ = describe(opened, args.augment)
        split = opened.split("train")
        reader = Reader(split, augment)
        most = min(len(split), 20_000)
        memory = [reader.fetch(row, row + 1) for row in range(most)]
        say(f"{len(split):,} images, batch {args.batch}, {args.threads} threads")
        result = alternate(
            args.rounds, lambda: ours(split, augment, args), lambda: bare(memory, augment, args.threads, args.seconds)
        )
    say(f"loader: {result['rate']:,.0f} images/s, bare codec {result['limit']:,.0f}: ratio {result['ratio']:.3f}")
    return result | {"baselines": {"bare codec": result["limit"]}}


def ours(split, augment: Augment, args: Args) -> float:
    """Images per second of the loader, its first batches not counted."""
    loader = Loader(split, augment, 0, Batching(args.batch), threads=args.threads)
    steps = iter(loader)
    for _ in range(4):
        next(steps)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < args.seconds:
        count += sum(len(batch.rows) for batch in next(steps).micro_batches)
    rate = count / (time.perf_counter() - begin)
    steps.close()
    return rate


def bare(memory: list[bytes], augment: Augment, threads: int, seconds: float) -> float:
    """Images per second of threads that decode and crop from memory, and do nothing else."""
    side, channels, end = augment.image_size, augment.channels, time.perf_counter() + seconds

    def work(first: int) -> int:
        count = 0
        while time.perf_counter() < end:
            for i in range(first, len(memory), threads):
                image = decode(memory[i], channels)
                if augment.crop == "resized":
                    random_resized_crop(image, side, 0, 0, i)
                else:
                    fit(image, side)
                count += 1
                if count % 64 == 0 and time.perf_counter() >= end:
                    break
        return count

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    return done / (time.perf_counter() - begin)


def main(argv: list[str]) -> int:
    args = parse(Args, "bench load", argv)
    return execute(lambda: run(args), args.json)
