"""Turns raw images into a dataset: webdataset tar shards, an index, statistics."""

import os
import time
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from cluster.session import ray_session
from jobs.command import absolute, absolute_source, execute, parse, progress, say
from pipeline.shards import build, sidecars
from pipeline.shards.plan import Recipe


@dataclass(frozen=True)
class Args:
    """Turn raw images into a dataset: webdataset tar shards, an index, statistics.

    The same command again goes on from the shards that are finished; on a finished dataset it adds what the source has
    got since, or does nothing. Images that cannot be used are counted and listed with their reasons, not fatal up to
    --max-rejects.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """folder:PATH, image files in class folders, train/ and val/ below it are splits (a bare path means this);
    imagenet:PATH, the ILSVRC2012 tars with their devkit, or Kaggle's tree; tars:PATH, webdataset tars, a folder of
    them, one, or x-{000000..000009}.tar; table:PATH, Parquet, CSV or JSONL that names or holds images
    (?image=COL&label=COL where the columns are not guessed); idx:PATH, MNIST's format; digits:, scikit-learn's. PATH
    is local or s3://..."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Where the dataset is written, a local folder or s3://..."""
    recipe: Recipe = field(default_factory=Recipe)
    max_rejects: int | None = None
    """Items that may turn out unusable before the build fails, duplicates not counted; default: 1 %, at least 10."""
    prune: bool = False
    """Take out what the source no longer has, and replace what changed in it: its bytes are gone for every reader."""
    sidecars: tuple[str, ...] = ("all",)
    """Files for other readers beside the shards: wids, energon, dali, timm, open_clip; all, or none."""
    workers: int = os.cpu_count() or 1
    """Ray tasks that write shards; 0: this process alone, without Ray."""
    address: str | None = None
    """A running Ray cluster; default: RAY_ADDRESS, else a Ray of our own on this machine."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{samples, rejected, shards, seconds (listing to commit), startup_seconds (Ray's own), ...}"""
    source, out = absolute_source(args.source), absolute(args.out)
    plan = build.describe(source, out, args.recipe)
    splits = ", ".join(f"{name} {s['samples']:,} in {s['shards']} shards" for name, s in plan["splits"].items())
    more = f"{plan['samples']:,} items to add ({splits})" if splits else "nothing to add"
    say(f"{args.source} -> {args.out}: {more}, {len(plan['classes'])} classes")
    _say_some("changed under their names", [f"{name}: {what}" for name, what in plan["changed"].items()])
    if args.dry_run:
        _say_some("no longer in the source", plan["vanished"])
        return plan
    started = time.monotonic()
    if plan["done"] or args.workers == 0:
        result = _build(args, source, out, 0) | {"startup_seconds": 0.0}
    else:
        with ray_session(args.workers, args.address):
            startup = time.monotonic() - started
            result = _build(args, source, out, args.workers) | {"startup_seconds": startup}
    return result


def _build(args: Args, source: str, out: str, workers: int) -> dict:
    with progress("shards") as bar:
        task = bar.add_task("sharding", total=None, note="")

        def show(done: int, total: int, samples: int, rejects: int) -> None:
            bar.update(task, completed=done, total=total, note=f"{samples:,} samples, {rejects} rejects")

        result = build.build(
            source, out, args.recipe, workers, show, waiting=say, max_rejects=args.max_rejects, pruning=args.prune,
            beside=_kinds(args.sidecars),
        )  # fmt: skip
    _say_some("no longer in the source; --prune takes them out", result["vanished"])
    if result["done"]:
        say(f"{args.out} is finished already: {result['samples']:,} samples in {result['shards']} shards")
        return result
    rate = result["added"] / max(result["seconds"], 1e-9)
    pruned = f"{result['pruned']} items taken out, " if result["pruned"] else ""
    say(
        f"{pruned}{result['added']:,} samples added in {result['seconds']:.1f} s ({rate:,.0f} samples/s): now "
        f"{result['samples']:,} in {result['shards']} shards, {result['rejected']} rejected"
    )
    for reason, count in result["rejects"].items():
        say(f"  rejected: {reason} {count} (millstream inspect {args.out} lists them)")
    return result


def _kinds(asked: tuple[str, ...]) -> tuple[str, ...]:
    if asked in (("all",), ("none",)):
        return sidecars.KINDS if asked == ("all",) else ()
    if unknown := set(asked) - set(sidecars.KINDS):
        raise ValueError(f"sidecars {min(unknown)!r}: all, none, or some of {', '.join(sidecars.KINDS)}")
    return asked


def _say_some(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        say(f"{len(names)} {what}: {', '.join(names[:5])}{more}")


def main(argv: list[str]) -> int:
    args = parse(Args, "shard", argv)
    return execute(lambda: run(args), args.json)
