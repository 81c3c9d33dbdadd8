"""Sharding rate against processes that only decode, resize and encode."""

import itertools
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass, field

import cv2
import numpy as np
import simplejpeg

from cluster.session import ray_session
from jobs.bench.rounds import FASHION, alternate, read_source
from jobs.command import absolute_source, execute, parse, say
from pipeline import sources
from pipeline.shards import build
from pipeline.shards.plan import Recipe


@dataclass(frozen=True)
class Args:
    """Sharding rate: source to committed dataset, against the bare codec on all cores with nothing around it.

    The bare side decodes, resizes and encodes the same images from memory and writes nothing. Ray's start-up is not
    counted; the source is read from disk by our side.
    """

    source: str = f"idx:{FASHION}"
    """SOURCE, as for `millstream shard`; default: Fashion-MNIST from Debian's dataset-fashion-mnist."""
    recipe: Recipe = field(default_factory=Recipe)
    workers: int = os.cpu_count() or 1
    """Ray tasks on our side, processes on the bare one."""
    rounds: int = 3
    """Rounds; each measures both sides once."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{rate, limit, ratio, baselines}"""
    source = absolute_source(args.source)
    listing = sources.list_items(source, args.recipe.labels)
    form = args.recipe.image(listing.format).format
    memory = read_source(source, 20_000)
    say(f"{len(listing.items):,} images to {form}, {args.workers} workers")
    with ray_session(args.workers), tempfile.TemporaryDirectory(prefix="millstream-bench-") as folder:
        numbers = itertools.count()

        def ours() -> float:
            made = build.build(source, f"{folder}/{next(numbers)}", args.recipe, args.workers)
            return (made["samples"] + made["rejected"]) / made["seconds"]

        ours()  # Ray Data starts its worker processes with the first build; later ones find them there
        result = alternate(args.rounds, ours, lambda: bare(memory, args.recipe, form, args.workers))
    say(f"sharding: {result['rate']:,.0f} images/s, bare codec {result['limit']:,.0f}: ratio {result['ratio']:.3f}")
    return result | {"baselines": {"bare codec": result["limit"]}}


def bare(memory: list, recipe: Recipe, form: str, processes: int, seconds: float = 5.0) -> float:
    """Images per second of processes that run the codec on images in memory, added."""
    context = multiprocessing.get_context("fork")  # the images are there already, nothing is sent
    rates, ready = context.SimpleQueue(), context.Barrier(processes)

    def work(first: int) -> None:
        cv2.setNumThreads(1)
        ready.wait()
        count, begin = 0, time.perf_counter()
        for raw in itertools.islice(itertools.cycle(memory), first, None):
            _codec(raw, recipe, form)
            count += 1
            if count % 16 == 0 and time.perf_counter() - begin > seconds:
                break
        rates.put(count / (time.perf_counter() - begin))

    running = [context.Process(target=work, args=(i * len(memory) // processes,)) for i in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    return sum(rates.get() for _ in running)


def _codec(raw: bytes | np.ndarray, recipe: Recipe, form: str) -> bytes:
    if isinstance(raw, bytes):
        pixels = (
            simplejpeg.decode_jpeg(raw) if raw[:2] == b"\xff\xd8" else cv2.imdecode(np.frombuffer(raw, np.uint8), -1)
        )
    else:
        pixels = raw
    height, width = pixels.shape[:2]
    if recipe.size and min(height, width) > recipe.size:
        scale = recipe.size / min(height, width)
        pixels = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    if form == "png":
        return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 4])[1].tobytes()
    grey = pixels.ndim == 2 or pixels.shape[2] == 1
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return simplejpeg.encode_jpeg(pixels, recipe.quality, "GRAY" if grey else "RGB", "Gray" if grey else "420")


def main(argv: list[str]) -> int:
    args = parse(Args, "bench shard", argv)
    return execute(lambda: run(args), args.json)
