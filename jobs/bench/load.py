"""Loading rate from shards against threads that only decode, and against other loaders; from a store; and seeking."""

import contextlib
import dataclasses
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from jobs.bench.other_loaders import Memory, bare
from jobs.bench.rounds import apart, dataset, many_samples, photo_dataset, ratio, summary, take_turns
from jobs.command import absolute, execute, parse, say
from pipeline import storage
from pipeline.loading.augment import Augment
from pipeline.loading.cache import Cache
from pipeline.loading.order import Batching
from pipeline.loading.steps import Steps
from pipeline.shards import index
from pipeline.training.run import describe

# Other loaders (`other_loaders`) and what pip calls their packages.
OTHERS = {
    "webdataset": "webdataset",
    "webdataset+codec": "webdataset",
    "huggingface": "datasets",
    "litdata": "litdata",
    "ray": "ray[data]",
}
_WITH_OUR_CODEC = "webdataset+codec"
_OTHER_S = 600  # what one of them may take
_NAMES = 6  # of each photo: 24,000 samples are more than the loader holds in memory
_NAMES_IN_STORE = 12  # an epoch is timed from its start there: it must outweigh what a first batch fetches
_WARM = 4  # steps not counted
_SEEKS = 5  # first batches at each place
# images/s of ResNet-50 on one H100 in bf16, assumed; NVIDIA's DeepLearningExamples give 2,470 for an A100
_H100 = (2500, 3000)


@dataclass(frozen=True)
class Args:
    """Loading rate: shards to batches, against threads that decode and crop the same images from memory.

    webdataset (also with our codec), Hugging Face datasets, litdata and Ray Data load the same images in processes of
    their own, as their documentation shows it. No start-up is counted on any side.
    """

    dataset: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="DATASET")] = None
    """What `millstream shard` wrote; default: photos like ImageNet's, cut from Debian's wallpapers, at 256 px."""
    data: str | None = None
    """The same, as an option."""
    fashion: bool = False
    """Measure Fashion-MNIST from Debian's dataset-fashion-mnist instead, images as they are."""
    photos: str | None = None
    """Folder where the photos are kept and found again; default: a temporary one."""
    count: int = 4000
    """How many of them are cut; each is in the dataset six times, with --s3 twelve."""
    augment: Augment = field(default_factory=lambda: Augment(image_size=224, crop="resized", flip=True))
    batch: int = 256
    """Images in a batch."""
    threads: int = os.cpu_count() or 1
    """Threads that decode, on both sides; processes of the other loaders."""
    seconds: float = 5.0
    """Length of a measurement."""
    rounds: int = 3
    """Rounds; each measures every side once."""
    baselines: bool = True
    """Measure other loaders, too (local DATASET, colour, --crop resized). --no-baselines: leave them out."""
    s3: str | None = None
    """s3://bucket/prefix to copy the dataset below for the occasion, and to load whole epochs from: without a cache,
    filling one, from a filled one; each against the same epoch from local disk."""
    seek: bool = False
    """Measure instead how soon a loader gives its first batch anywhere in an epoch of --samples made-up samples."""
    samples: int = 1_281_167
    """How many: as ImageNet has."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


@dataclass(frozen=True)
class Loaded:
    """One measurement of our side, in a process of its own. rate: images/s; first_epoch: those of epoch 0 alone, in
    which nothing is kept from before; waits: the loader's report; memory: peak of the process, MB."""

    rate: float
    first_epoch: float
    waits: dict
    memory: float


def run(args: Args) -> dict:
    """{rate, limit, ratio, ratios, first_epoch, baselines {name: rate}, ratio_to_best, ratio_to_codec (None without
    any), waits, memory, feeds {h100: [least, most], assumed}, partial (None, or the first four), s3 (None, or {side:
    ratio to local})}, in images/s and MB; medians over the rounds. With --seek what `seek` gives."""
    if bool(args.dataset) + bool(args.data) + args.fashion > 1:
        raise ValueError("a DATASET, --data and --fashion each say what to measure on: give one of them")
    for name in ("batch", "threads", "rounds", "samples", "count"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} {getattr(args, name)} must be at least 1")
    with _dataset(args) as data, tempfile.TemporaryDirectory(prefix="millstream-bench-") as scratch:
        opened = index.load(data)
        augment, _ = describe(opened, Augment() if args.fashion else args.augment)
        if args.seek:
            return seek(args, data, augment, scratch)
        split = opened.split("train")
        say(f"{len(split):,} images, batch {args.batch}, {args.threads} threads")
        memory, others = Memory.of(split), _others(args, augment, data)
        exact = dataclasses.replace(augment, exact_decode=True)
        result = measure(args, data, exact, memory, others, scratch) | {"partial": None, "s3": None}
        if max(memory.shrinks(augment)) > 1:
            say("JPEGs decoded only as far as their crops need, on both sides")
            partial = measure(args, data, augment, memory, (), scratch)
            result["partial"] = {name: partial[name] for name in ("rate", "limit", "ratio", "ratios")}
        if args.s3:
            result["s3"] = from_store(args, data, augment, scratch)
    return result


def measure(args: Args, data: str, augment: Augment, memory: Memory, others: tuple[str, ...], scratch: str) -> dict:
    """The rounds, what they say, and it said to people."""
    loaded = []

    def ours() -> float:
        loaded.append(apart(load, data, augment, args.batch, args.threads, args.seconds))
        return loaded[-1].rate

    sides = {"ours": ours, "bare codec": lambda: bare(memory, augment, args.threads, args.seconds)}
    sides |= {name: lambda name=name: other(name, args, augment, data, scratch) for name in others}
    rates = take_turns(args.rounds, sides)
    result = summary(rates["ours"], rates["bare codec"])
    result["first_epoch"] = statistics.median(each.first_epoch for each in loaded)
    baselines = {name: statistics.median(rates[name]) for name in others}
    best = max(baselines.keys() - {_WITH_OUR_CODEC}, key=baselines.get, default=None)
    to_best = ratio(rates["ours"], rates[best]) if best else None
    to_codec = ratio(rates["ours"], rates[_WITH_OUR_CODEC]) if _WITH_OUR_CODEC in others else None
    result |= {"baselines": baselines, "ratio_to_best": to_best, "ratio_to_codec": to_codec}
    result |= {"waits": loaded[-1].waits, "memory": max(each.memory for each in loaded)}
    result["feeds"] = {"h100": [result["rate"] / rate for rate in reversed(_H100)], "assumed": list(_H100)}
    say(f"loader: {result['rate']:,.0f} images/s, bare codec {result['limit']:,.0f}: ratio {result['ratio']:.3f}")
    say(f"  first epoch {result['first_epoch']:,.0f} images/s, peak {result['memory']:,.0f} MB")
    spent = {name: value for name, value in result["waits"].items() if isinstance(value, float)}
    say("  seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent.items()))
    if best:
        say(f"best of the others, {best}: {baselines[best]:,.0f}: ratio {to_best:.3f}")
    if to_codec:
        say(f"webdataset with our codec: {baselines[_WITH_OUR_CODEC]:,.0f}: ratio {to_codec:.3f}")
    least, most = result["feeds"]["h100"]
    say(f"feeds {least:.2f} to {most:.2f} H100s of ResNet-50 (bf16, {_H100[0]:,}-{_H100[1]:,} images/s: assumed)")
    return result


def _dataset(args: Args) -> contextlib.AbstractContextManager[str]:
    given = args.dataset or args.data
    if given or args.fashion:
        return dataset(absolute(given) if given else None)
    names = _NAMES_IN_STORE if args.s3 else _NAMES
    return photo_dataset(args.photos and absolute(args.photos), args.count, size=256, names=names)


def load(data: str, augment: Augment, batch: int, threads: int, seconds: float) -> Loaded:
    """Our side: steps of a loader for so many seconds, its first ones not counted."""
    split = index.load(data).split("train")
    loader = Steps(split, augment, 0, Batching(batch), threads=threads)
    steps = iter(loader)
    for _ in range(_WARM):
        next(steps)
    first, count, begin, now = None, 0, time.perf_counter(), 0.0
    while now < begin + seconds:
        count, now = count + sum(len(each.rows) for each in next(steps).micro_batches), time.perf_counter()
        if first is None and (_WARM * batch + count >= len(split) or now >= begin + seconds):
            first = count / (now - begin)
    steps.close()
    return Loaded(count / (now - begin), first, loader.report(), _peak())


def _peak() -> float:
    """Most memory this process held so far, MB. Of Linux itself: getrusage begins with what the parent held."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def _others(args: Args, augment: Augment, data: str) -> tuple[str, ...]:
    """The baselines that can take part."""
    if not args.baselines:
        return ()
    if augment.crop != "resized" or not augment.flip or augment.channels != 3 or storage.is_remote(data):
        say("the other loaders are left out: they take a local DATASET in colour, --crop resized --flip")
        return ()
    missing = [name for name, package in OTHERS.items() if not importlib.util.find_spec(package.partition("[")[0])]
    for name in missing:
        say(f"{name} is left out: pip install '{OTHERS[name]}'")
    return tuple(name for name in OTHERS if name not in missing)


def other(name: str, args: Args, augment: Augment, data: str, scratch: str) -> float:
    """Images per second of another loader, in a process of its own. RuntimeError: it failed."""
    words = [name, args.threads, augment.image_size, args.batch, args.seconds, data, scratch]
    command = [sys.executable, "-m", "jobs.bench.other_loaders", *map(str, words)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_OTHER_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{name} failed: it took more than {_OTHER_S} s") from None
    if done.returncode:
        raise RuntimeError(f"{name} failed: {(done.stderr.strip().splitlines() or ['no word why'])[-1]}")
    return float(done.stdout.split()[-1])


def from_store(args: Args, data: str, augment: Augment, scratch: str) -> dict[str, float]:
    """{side: ratio to local} of whole epochs of a copy at --s3, from the first request on."""
    copy, filled = storage.join(absolute(args.s3), f"millstream-bench-{uuid.uuid4().hex[:8]}"), f"{scratch}/filled"
    say(f"copying {data} to {copy}")
    try:
        for file in storage.list_files(data):
            storage.write(storage.join(copy, file.path), storage.read(storage.join(data, file.path)))

        def side(root: str, cache: str | None = None, number: int = 0):
            return lambda: apart(load_epoch, root, augment, args.batch, args.threads, cache, number)

        def filling() -> float:
            with tempfile.TemporaryDirectory(dir=scratch) as cache:
                return side(copy, cache)()

        side(copy, filled)()
        sides = {"local": side(data), "streaming": side(copy), "filling a cache": filling}
        rates = take_turns(args.rounds, sides | {"second epoch, cached": side(copy, filled, number=1)})
    finally:
        storage.delete_tree(copy)
    ratios = {name: ratio(rates[name], rates["local"]) for name in rates if name != "local"}
    say("of the local rate: " + ", ".join(f"{name} {share:.3f}" for name, share in ratios.items()))
    return ratios


def load_epoch(data: str, augment: Augment, batch: int, threads: int, cache: str | None, number: int) -> float:
    """Images per second of one epoch, number 0 or a later one, from a loader's construction to the epoch's last image.

    Not of a few seconds: what a loader asks for in its first steps lasts it for thousands of images.
    """
    split = index.load(data).split("train")
    first = -(-number * len(split) // batch) * batch
    begin, count = time.perf_counter(), 0
    kept = Cache(cache, limit=1 << 40) if cache else None
    steps = iter(Steps(split, augment, 0, Batching(batch), position=first, threads=threads, cache=kept))
    while count < len(split):
        count += sum(len(each.rows) for each in next(steps).micro_batches)
    rate = count / (time.perf_counter() - begin)
    steps.close()
    return rate


def seek(args: Args, data: str, augment: Augment, scratch: str) -> dict:
    """{samples, shards, index_s, first_batch_s {start, middle, end}, state_bytes, memory (MB)} of an index of so many
    samples, each said beside its bar. Its shards are one file under many names."""
    say(f"an index of {args.samples:,} samples")
    many_samples(data, f"{scratch}/many", args.samples)
    result = apart(_seek, f"{scratch}/many", augment, args.batch, args.threads)
    result["memory"] = apart(load, f"{scratch}/many", augment, args.batch, args.threads, args.seconds).memory
    first = result["first_batch_s"]
    spread = max(first.values()) - min(first.values())
    for name, value, unit, bar in (
        ("index loaded in", result["index_s"], "s", 1),
        *((f"first batch at the epoch's {place} in", took, "s", 1) for place, took in first.items()),
        ("between the places", spread, "s", 0.2),
        ("state", result["state_bytes"], "bytes", 1024),
        ("peak memory", result["memory"], "MB", 1000),
    ):
        say(f"{name} {value:,.3g} {unit}: {'under' if value < bar else 'NOT under'} {bar} {unit}")
    return result


def _seek(data: str, augment: Augment, batch: int, threads: int) -> dict:
    begin = time.perf_counter()
    split = index.load(data).split("train")
    index_s, idle = time.perf_counter() - begin, threading.active_count()
    last = max(len(split) // batch - 1, 0)
    places = {"start": 0, "middle": last // 2 * batch, "end": last * batch}
    took = {name: [] for name in places}
    for name in [*places] * _SEEKS:
        begin = time.perf_counter()
        loader = Steps(split, augment, 0, Batching(batch), position=places[name], threads=threads)
        steps = iter(loader)
        next(steps)
        took[name].append(time.perf_counter() - begin)
        steps.close()
        while threading.active_count() > idle:  # what it had begun is not to slow down the next one
            time.sleep(0.01)
    first = {name: statistics.median(times) for name, times in took.items()}
    facts = {"samples": len(split), "shards": len(split.shards), "index_s": index_s, "first_batch_s": first}
    return facts | {"state_bytes": len(str(loader.position))}


def main(argv: list[str]) -> int:
    args = parse(Args, "bench load", argv)
    return execute(lambda: run(args), args.json)
