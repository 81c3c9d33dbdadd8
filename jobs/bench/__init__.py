"""Measures Millstream against the bare machine: each side in turn, in one run, medians of the rounds' ratios.

millstream bench train        training rate against a bare torch loop with every image in memory; --gpu: shards to steps
                              on one GPU, against the step alone and timm's
millstream bench load         loading rate against threads that only decode
millstream bench shard        sharding rate against processes that only decode, resize and encode
millstream bench checkpoint   seconds that training stands still for a checkpoint, and how fast it is stored
millstream bench gate         how often the nightly's gate promotes what is no better, and misses what is (no rates)
"""

import difflib
import importlib

from jobs.command import say

BENCHES = ("train", "load", "shard", "checkpoint", "gate")


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        say(__doc__.strip() + "\n\nmillstream bench NAME --help says more")
        return 0 if argv else 2
    if argv[0] not in BENCHES:
        near = difflib.get_close_matches(argv[0], BENCHES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(BENCHES)}"
        say(f"error: no bench {argv[0]!r}: {hint}")
        return 2
    return importlib.import_module(f"jobs.bench.{argv[0]}").main(argv[1:])
