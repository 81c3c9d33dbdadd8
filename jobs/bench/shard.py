"""Sharding rate against processes that only decode, resize and encode, and against other sharders."""

import contextlib
import dataclasses
import importlib.util
import itertools
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
import simplejpeg

from cluster.session import ray_session
from jobs.bench.photos import photos
from jobs.bench.rounds import ratio, read_source, summary, take_turns
from jobs.command import absolute, absolute_source, execute, parse, say
from pipeline import sources, storage
from pipeline.shards import build, image, sidecars
from pipeline.shards.plan import Recipe
from pipeline.sources import folder

OTHERS = ("webdataset", "ray", "litdata")
_OTHER_S = 600  # what a baseline may take
_READY_S = 120  # and the bare codec, to read its images


@dataclass(frozen=True)
class Args:
    """Sharding rate: source to committed dataset, against the bare codec on all cores with nothing around it.

    The bare side decodes, resizes and encodes the same images from memory and writes nothing; what needs no change it
    only decodes. webdataset's ShardWriter, Ray's write_webdataset and litdata's optimize, all with Pillow, read the
    same files from disk as our side and write shards. The start of Ray and of processes is counted on no side. Then
    the same images as they are (--size none), against bare decoding.
    """

    source: str | None = None
    """SOURCE, as for `millstream shard`; default: photos like ImageNet's, cut from Debian's wallpapers."""
    photos: str | None = None
    """Folder where these photos are kept and found again; default: a temporary one."""
    count: int = 4000
    """How many of them are cut; takes half a minute for 4000."""
    recipe: Recipe = field(default_factory=lambda: Recipe(size=256, val_fraction=0.0))
    """val_fraction is 0 here: one short shard more than the workers share out evenly would cost a tenth."""
    workers: int = os.cpu_count() or 1
    """Ray tasks on our side, processes on the others."""
    rounds: int = 3
    """Rounds; each measures every side once."""
    baselines: bool = True
    """Measure other sharders, too (SOURCE a local folder, written as JPEG). --no-baselines: leave them out."""
    passthrough: bool = True
    """Measure JPEGs as they are, too (--size none). --no-passthrough: leave that out."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{rate, limit, ratio, ratios, baselines {name: rate}, ratio_to_best (None without any), passthrough (None, or the
    first four)}, in images/s; medians over the rounds."""
    with _source(args) as source, ray_session(args.workers):
        recipe, others = args.recipe, _others(args, source)
        say(f"size {recipe.size}, quality {recipe.quality}, {args.workers} workers")
        rates = measure(args, source, recipe, others)
        result = summary(rates["ours"], rates["bare codec"])
        baselines = {name: statistics.median(rates[name]) for name in others}
        best = max(baselines, key=baselines.get, default=None)
        to_best = ratio(rates["ours"], rates[best]) if best else None
        unchanged = None
        if args.passthrough and recipe.size is not None and _is_jpeg(read_source(source, most=1)[0]):
            say("the same images as they are")
            rates = measure(args, source, dataclasses.replace(recipe, size=None, fit="short", format="jpg"), ())
            unchanged = summary(rates["ours"], rates["bare codec"])
    say(f"sharding: {result['rate']:,.0f} images/s, bare codec {result['limit']:,.0f}: ratio {result['ratio']:.3f}")
    if best:
        say(f"best of the others, {best}: {baselines[best]:,.0f}: ratio {to_best:.3f}")
    if unchanged:
        rate, limit = unchanged["rate"], unchanged["limit"]
        say(f"as they are: {rate:,.0f} images/s, bare decoding {limit:,.0f}: ratio {unchanged['ratio']:.3f}")
    return result | {"baselines": baselines, "ratio_to_best": to_best, "passthrough": unchanged}


@contextlib.contextmanager
def _source(args: Args) -> Iterator[str]:
    if args.source:
        yield absolute_source(args.source)
        return
    kept = contextlib.nullcontext(absolute(args.photos)) if args.photos else tempfile.TemporaryDirectory()
    with kept as path:
        made = photos(path, args.count)
        say(f"{made['count']:,} photos of {made['mean_bytes']:,} bytes on average, from {made['pictures']} wallpapers")
        yield f"folder:{path}"


def _others(args: Args, source: str) -> tuple[str, ...]:
    """The baselines that can take part."""
    module, path = sources.parse(source)
    recipe = args.recipe
    if not args.baselines:
        return ()
    if module is not folder or storage.is_remote(path) or recipe.fit != "short" or recipe.format not in ("auto", "jpg"):
        say("the other sharders are left out: they take a local folder, --fit short, and write JPEG")
        return ()
    missing = [name for name in OTHERS if importlib.util.find_spec(name) is None]
    for name in missing:
        say(f"{name} is left out: pip install {name}, into the environment of this bench only")
    return tuple(name for name in OTHERS if name not in missing)


def measure(args: Args, source: str, recipe: Recipe, others: tuple[str, ...]) -> dict[str, list[float]]:
    """{side: images per second in each round} of ours, the bare codec and `others`. Ray must run."""
    form = recipe.image(sources.list_items(source, recipe.labels).format)
    with tempfile.TemporaryDirectory(prefix="millstream-bench-") as place:
        numbers = itertools.count()

        def writing(side: Callable[[str], float]) -> Callable[[], float]:
            def measured() -> float:
                out = f"{place}/{next(numbers)}"
                rate = side(out)
                shutil.rmtree(out)
                os.sync()  # what one side left to be written is not the next one's load
                return rate

            return measured

        def ours(out: str) -> float:
            made = build.build(source, out, recipe, args.workers, beside=sidecars.KINDS)
            return (made["samples"] + made["rejected"]) / made["seconds"]

        writing(ours)()  # Ray Data starts its worker processes with the first build; later ones find them there
        sides = {"ours": writing(ours), "bare codec": lambda: bare(source, form, args.workers)}
        sides |= {
            name: writing(lambda out, name=name: other(name, args.workers, recipe, source, out)) for name in others
        }
        return take_turns(args.rounds, sides)


def other(name: str, workers: int, recipe: Recipe, source: str, out: str) -> float:
    """Images per second of another sharder, in a process of its own. RuntimeError: it failed."""
    words = [name, str(workers), str(recipe.size), str(recipe.quality), sources.parse(source)[1], out]
    command = [sys.executable, "-m", "jobs.bench.other_sharders", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_OTHER_S)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {(done.stderr.strip().splitlines() or ['no word why'])[-1]}")
    return float(done.stdout.split()[-1])


def bare(source: str, form: image.ImageRecipe, processes: int, seconds: float = 5.0) -> float:
    """Images per second of processes that run the codec on images in memory, added. RuntimeError: one failed.

    Spawned, not forked: a fork of a process in which Ray's threads run may wait for ever for a lock one of them held.
    """
    context = multiprocessing.get_context("spawn")
    rates, ready = context.SimpleQueue(), context.Barrier(processes, timeout=_READY_S)
    running = [
        context.Process(target=_run_codec, args=(source, form, i, processes, seconds, ready, rates))
        for i in range(processes)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        raise RuntimeError("a process of the bare codec failed; it says why above")
    return sum(rates.get() for _ in running)


def _run_codec(source: str, form: image.ImageRecipe, number: int, processes: int, seconds: float, ready, rates) -> None:
    """Puts the rate over this process's share of the images, read beforehand, into `rates`."""
    cv2.setNumThreads(1)
    memory = read_source(source, number, processes)
    ready.wait()
    count, begin = 0, time.perf_counter()
    for raw in itertools.cycle(memory):
        codec(raw, form)
        count += 1
        if count % 16 == 0 and time.perf_counter() - begin > seconds:
            break
    rates.put(count / (time.perf_counter() - begin))


def codec(raw: bytes | np.ndarray, form: image.ImageRecipe) -> bytes:
    """What no sharder can do without: decode, resize, encode. A JPEG that is to stay as it is, is decoded only."""
    if _is_jpeg(raw):
        pixels = simplejpeg.decode_jpeg(raw)
    elif isinstance(raw, bytes):
        pixels = _turned(cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_ANYCOLOR))
    else:
        pixels = raw
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    smaller = image.fitted(pixels, form.size, form.fit)
    if _is_jpeg(raw) and smaller is pixels and form.format != "png":
        return raw
    smaller = np.ascontiguousarray(smaller)
    if form.format == "png" or (form.format == "keep" and not _is_jpeg(raw)):
        return cv2.imencode(".png", _turned(smaller), [cv2.IMWRITE_PNG_COMPRESSION, 4])[1].tobytes()
    grey = smaller.shape[2] == 1
    return simplejpeg.encode_jpeg(smaller, form.quality, "GRAY" if grey else "RGB", "Gray" if grey else "420")


def _turned(pixels: np.ndarray) -> np.ndarray:
    """OpenCV's BGR to RGB, and back."""
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if pixels.ndim == 3 and pixels.shape[2] == 3 else pixels


def _is_jpeg(raw: bytes | np.ndarray) -> bool:
    return isinstance(raw, bytes) and raw[:2] == b"\xff\xd8"


def main(argv: list[str]) -> int:
    args = parse(Args, "bench shard", argv)
    return execute(lambda: run(args), args.json)
