"""How a ratio is taken: the sides alternate, so that a machine that slows down slows all of them."""

import contextlib
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa

from jobs.bench.photos import photos
from jobs.command import say
from pipeline import sources, storage
from pipeline.shards import build, index
from pipeline.shards.commit import Generation, ShardRecord, commit
from pipeline.shards.plan import Recipe

FASHION = "/usr/share/datasets/fashion-mnist"


def take_turns(rounds: int, sides: dict[str, Callable[[], float]], unit: str = "images/s") -> dict[str, list[float]]:
    """{side: its rate in each round}: a round measures every side once, the order reversed from round to round."""
    rates = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            rates[name].append(sides[name]())
        say(f"  round {number + 1}, {unit}: " + ", ".join(f"{name} {rate[-1]:,.0f}" for name, rate in rates.items()))
    return rates


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the rounds' ratios: sides of one round met the machine in the same mood."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def summary(ours: list[float], limit: list[float]) -> dict:
    """{rate, limit, ratio (medians), ratios} of two sides' rates."""
    return {
        "rate": statistics.median(ours),
        "limit": statistics.median(limit),
        "ratio": ratio(ours, limit),
        "ratios": [a / b for a, b in zip(ours, limit, strict=True)],
    }


def alternate(rounds: int, ours: Callable[[], float], bare: Callable[[], float], unit: str = "images/s") -> dict:
    """{rate, limit, ratio (medians), ratios}: each round measures both sides, the order swapped from round to round."""
    rates = take_turns(rounds, {"ours": ours, "bare": bare}, unit)
    return summary(rates["ours"], rates["bare"])


@contextlib.contextmanager
def dataset(path: str | None) -> Iterator[str]:
    """A dataset to measure on: `path`, or Fashion-MNIST sharded into a temporary folder."""
    if path:
        yield path
        return
    if not os.path.isdir(FASHION):
        raise ValueError(
            f"{FASHION} is not there: apt-get install dataset-fashion-mnist, or name a DATASET with --data"
        )
    with tempfile.TemporaryDirectory(prefix="millstream-bench-") as folder:
        say(f"sharding {FASHION}")
        build.build(f"idx:{FASHION}", folder, Recipe(), workers=0)
        yield folder


@contextlib.contextmanager
def photo_dataset(kept: str | None, count: int, size: int, names: int = 1) -> Iterator[str]:
    """Photos like ImageNet's, short side at most `size` px, sharded into a temporary folder; all of it train.

    kept: where the photos are kept and found again; None: nowhere. names: how often each photo is in the dataset, so
    that a loader cannot hold all of it in memory; cutting so many would take minutes.
    """
    with tempfile.TemporaryDirectory(prefix="millstream-bench-") as folder:
        made = photos(kept or f"{folder}/photos", count)
        say(f"{made['count']:,} photos of {made['mean_bytes']:,} bytes, each {names} times: sharding at {size} px")
        for place in Path(kept or f"{folder}/photos").glob("c*"):
            os.makedirs(f"{folder}/source/{place.name}")
            for number in range(names):
                os.symlink(place, f"{folder}/source/{place.name}/{number}")
        build.build(f"folder:{folder}/source", f"{folder}/data", Recipe(size=size, val_fraction=0.0), workers=0)
        yield f"{folder}/data"


def many_samples(data: str, out: str, samples: int) -> None:
    """A dataset of at least so many samples: the first train shard of `data` under as many names as that takes.

    Every sample is there to be read, verified and decoded; nothing but the index grows with their number.
    """
    opened = index.load(data)
    entry = next(shard for shard in opened.info["shards"] if shard["split"] == "train")
    rows, shard = opened.shard_rows(entry["name"], index.SCHEMA.names), storage.join(data, entry["name"])
    names = [f"train-{number:06d}.tar" for number in range(-(-samples // len(rows)))]
    storage.write(f"{out}/{names[0]}", storage.read(shard))
    for name in names[1:]:
        os.link(f"{out}/{names[0]}", f"{out}/{name}")

    def records() -> Iterator[ShardRecord]:
        for number, name in enumerate(names):
            columns = {"key": [f"{number:06d}{i:06d}" for i in range(len(rows))], "shard": [name] * len(rows)}
            columns |= {"generation": [0] * len(rows)}
            renamed = pa.table({c: columns.get(c, rows[c]) for c in index.SCHEMA.names}, schema=index.SCHEMA)
            yield ShardRecord(entry | {"name": name, "generation": 0}, renamed, index.REJECTS.empty_table())

    made = Generation(0, {"one shard of": data}, index.SOURCES.empty_table, index.REJECTS.empty_table())
    commit(out, None, records(), made, opened.info["recipe"], opened.classes)


def apart(function: Callable, *args):
    """What `function` returns, called in a fresh process: its memory is its own, and no side warms another up."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def read_source(uri: str, first: int = 0, step: int = 1, most: int = 20_000) -> list:
    """Items first, first + step, ... of the first `most` of a source, in memory: bytes, or pixels."""
    items = sources.list_items(uri, "none" if uri.startswith("folder:") else "auto").items
    chosen = items.take(list(range(first, min(len(items), most), step)))
    return [raw for raw, _ in sources.read_items(uri, chosen)]
