"""How a ratio is taken: the sides alternate, so that a machine that slows down slows all of them."""

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator

from jobs.command import say
from pipeline import sources
from pipeline.shards import build
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


def read_source(uri: str, first: int = 0, step: int = 1, most: int = 20_000) -> list:
    """Items first, first + step, ... of the first `most` of a source, in memory: bytes, or pixels."""
    items = sources.list_items(uri, "none" if uri.startswith("folder:") else "auto").items
    chosen = items.take(list(range(first, min(len(items), most), step)))
    return [raw for raw, _ in sources.read_items(uri, chosen)]
