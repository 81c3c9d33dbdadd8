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


def alternate(rounds: int, ours: Callable[[], float], bare: Callable[[], float], unit: str = "images/s") -> dict:
    """{rate, limit, ratio (medians), ratios}: each round measures both sides, the order swapped from round to round."""
    pairs = []
    for number in range(rounds):
        first, second = (bare, ours) if number % 2 == 0 else (ours, bare)
        a, b = first(), second()
        rate, limit = (b, a) if number % 2 == 0 else (a, b)
        pairs.append((rate, limit))
        say(f"  round {number + 1}: {rate:,.0f} of {limit:,.0f} {unit}: {rate / limit:.3f}")
    ratios = [rate / limit for rate, limit in pairs]
    return {
        "rate": statistics.median(rate for rate, _ in pairs),
        "limit": statistics.median(limit for _, limit in pairs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


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


def read_source(uri: str, most: int) -> list:
    """The first `most` items of a source in memory: bytes, or pixels."""
    items = sources.list_items(uri, "none" if uri.startswith("folder:") else "auto").items[:most]
    return [raw for raw, _ in sources.read_items(uri, items)]
