"""Proves that the order holds at every world size and over every stop; --run compares what a run logged with it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Annotated

import numpy as np
import tyro

from jobs.command import absolute, execute, parse, say
from pipeline import storage
from pipeline.loading import audit
from pipeline.loading.order import LANES, Batching, Order
from pipeline.shards import index, pinned
from pipeline.shards.mixing import mixing
from pipeline.training import checkpoint
from pipeline.training.cadence import total_steps
from pipeline.training.run import Run, open_run

_NEAR = 0.05  # of random, beyond what chance varies by: further off is said to be
_SHOWN = 3  # digests, and steps of each trouble, that people are shown


@dataclass(frozen=True)
class Args:
    """Prove, without reading an image, that a dataset is drawn alike at every world size and over every stop and
    resume, each sample once an epoch; and say how well the order shuffles. --run: that a run drew what it should.

    Exit code 0: all holds; 1: something does not.
    """

    dataset: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="DATASET")] = None
    """What `millstream shard` wrote, local or s3://... With --run: where the run's data is now, if it has moved."""
    run: str | None = None
    """RUN, finished or still running: compare the samples that each of its steps logged with the order."""
    split: str = "train"
    """Which split."""
    seed: int = 0
    """The seed of a run: decides the order."""
    world: str = "1,2,4,8"
    """World sizes: workers that share a step, separated by commas."""
    batch: int = 256
    """Samples in a step, over all workers."""
    stop: int | None = None
    """Samples after which a run stops and goes on at the next of the world sizes, over and over; rounded to steps.
    Default: 0.4 of an epoch."""
    epochs: float = 2.0
    """Epochs to replay."""
    json: bool = False
    """Print the result, with the digest of every step, as one JSON object on stdout."""


def run(args: Args) -> dict:
    """What `_replay` or `_check_run` finds; `holds`: whether all does."""
    if args.run:
        own = ("dataset", "run", "json")
        given = [f.name for f in fields(Args) if f.name not in own and getattr(args, f.name) != f.default]
        if given:
            raise ValueError(f"--{given[0]} is the run's own with --run: leave it out")
        return _check_run(open_run(absolute(args.run)), args.dataset and absolute(args.dataset))
    if not args.dataset:
        raise ValueError("say what to audit: millstream audit DATASET, or millstream audit --run RUN")
    return _replay(args, index.load(absolute(args.dataset)).split(args.split))


# ---- a dataset: every world size, every chain


def _replay(args: Args, split: index.Split) -> dict:
    worlds = _sizes(args.world)
    served = [w for w in worlds if LANES % w == 0]
    # As `train` does: a power of two that serves the most workers asked for, at least two.
    batching = Batching(args.batch, max(2, *served) if served else 2)
    if not 0 < args.epochs < float("inf") or (args.stop is not None and args.stop < 1):
        raise ValueError(f"epochs {args.epochs} must be above 0, and an end; stop {args.stop} at least 1")
    steps, n = batching.steps(max(1, round(args.epochs * len(split)))), len(split)
    stop = max(1, round((args.stop or 0.4 * n) / args.batch))

    def replayed(starts) -> audit.Replay:
        return audit.replay(lambda: Order(split.counts, args.seed), args.batch, batching.micro_batches, starts)

    say(f"{args.split}: {n:,} samples, seed {args.seed}: {steps:,} global batches of {args.batch:,}")
    alone = replayed([(1, 0, steps)])
    digests = [audit.written(int(digest)) for digest in alone.digests]
    for step in sorted({*range(1, min(_SHOWN, steps) + 1), steps}):
        say(f"step {step:,}: {digests[step - 1]}")
    say(f"all: {alone.whole}; {alone.epochs} epochs to their end: {alone.repeats:,} repeats, {alone.drops:,} drops")
    found = []
    for name, starts in _starts(served, stop, steps, args.batch):
        one = replayed(starts)
        found.append({"name": name, "starts": len(starts), "digest": one.whole, "same": one.same(alone),
                      "repeats": one.repeats, "drops": one.drops})  # fmt: skip
        same = "the same global batches" if one.same(alone) else f"OTHER global batches: {one.whole}"
        say(f"{name}: {same}, {one.repeats:,} repeats, {one.drops:,} drops")
    for world in (w for w in worlds if w not in served):
        say(f"{_workers(world)}: cannot share {LANES} lanes evenly, so a run refuses it: use a power of two up to 64")
    shuffle = _shuffle(args, split)
    holds = not (alone.repeats or alone.drops)
    holds &= all(one["same"] and not (one["repeats"] or one["drops"]) for one in found)
    _say_verdict(holds)
    return {
        "holds": holds, "samples": n, "steps": steps, "epochs": alone.epochs, "batch": args.batch, "seed": args.seed,
        "digest": alone.whole, "repeats": alone.repeats, "drops": alone.drops, "replays": found,
        "refused": [w for w in worlds if w not in served], "shuffle": shuffle, "digests": digests,
    }  # fmt: skip


def _starts(worlds: list[int], stop: int, steps: int, batch: int) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    """(name, starts) of a run at each world size, and of chains of them that begin with each."""
    for world in dict.fromkeys(worlds):
        yield _workers(world), [(world, 0, steps)]
    for i in range(len(worlds)):
        turn = worlds[i:] + worlds[:i]
        starts = audit.chain(turn, stop, steps)
        sizes = " -> ".join(str(world) for world, _, _ in starts[: len(turn) + 1])
        more = " -> ..." if len(starts) > len(turn) + 1 else ""
        yield f"{sizes}{more} workers, a stop every {stop * batch:,} samples", starts


def _sizes(text: str) -> list[int]:
    words = [word for word in text.replace(",", " ").split() if word]
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ValueError(f"world {text!r}: give numbers of workers, such as --world 1,2,4,8")
    return [int(word) for word in words]


def _workers(world: int) -> str:
    return f"{world} worker{'s' if world > 1 else ''}"


def _shuffle(args: Args, split: index.Split) -> dict:
    """How far the order is from a random permutation: neighbours of one class, labels in a batch, and `travel`."""
    order, n = Order(split.counts, args.seed), len(split)
    batches = np.diff([*range(0, n, args.batch), n])
    mixed = mixing(split.label[order.epoch(0)], batches)
    noise = np.sqrt(0.6 / n)  # deviation of a mean of n distances, neighbouring ones of which share an end
    found = {"travel": audit.travel(order), "lane_travel": audit.travel(order, LANES), "travel_noise": float(noise)}
    if mixed:
        say(f"neighbours of one class: {mixed['adjacent']:.2%}, {mixed['adjacent_ratio']:.3f} of random "
            f"(chance alone: ± {mixed['adjacent_noise']:.3f})")  # fmt: skip
        say(f"labels in a global batch: {mixed['entropy']:.3f} bits, {mixed['entropy_ratio']:.4f} of random")
        found |= {k: v for k, v in mixed.items() if k != "mixed"}
    say(f"neighbours of an epoch lie {found['travel'] / 3:.3f} N apart in the next, {found['travel']:.3f} of random "
        f"(chance alone: ± {noise:.3f}); those of a lane {found['lane_travel']:.3f}")  # fmt: skip
    off = [name for name in ("adjacent_ratio", "entropy_ratio", "travel") if name in found
           and abs(found[name] - 1) > _NEAR + 4 * found[f"{name.removesuffix('_ratio')}_noise"]]  # fmt: skip
    if off:
        say(f"warning: further than {_NEAR:.0%} from random: {', '.join(off)}. Where samples lie sorted in the shards, "
            f"millstream shard tars:DATASET OUT mixes them")  # fmt: skip
    return found | {"near_random": not off}


# ---- a run


def _check_run(opened: Run, data: str | None) -> dict:
    dataset, loop = pinned.at(index.load(data or opened.data), opened.generations), opened.config.loop
    chain = checkpoint.lineage(opened.path)
    if not chain:
        raise ValueError(f"{opened.path} has no checkpoint yet: what its steps drew is stored with the first")
    steps, chosen = chain[0].samples // loop.batch, opened.chosen(dataset)
    rows, copy = _rows(opened.path, steps)
    if not any("samples_digest" in row for row in rows):
        raise ValueError(
            f"the steps of {opened.path} logged no digest of their samples, an older millstream took them: nothing can "
            f"be compared. millstream audit {dataset.root} --seed {loop.seed} --batch {loop.batch} replays its order"
        )

    digests = audit.replay(lambda: chosen.order(loop.seed), loop.batch, loop.micro_batches, [(1, 0, steps)]).digests
    found = {"": audit.check(rows, digests)}
    found[" in metrics.jsonl"] = audit.check(copy, digests[: max((row["step"] for row in copy), default=0)])
    say(f"{opened.path}: {steps:,} of {total_steps(loop, len(chosen.split)):,} steps are stored")
    for where, logged in found.items():
        _say_logged(logged, where)
    holds = all(logged.holds for logged in found.values())
    _say_verdict(holds)
    return {"holds": holds, "steps": steps, **asdict(found[""]), "metrics.jsonl": asdict(found[" in metrics.jsonl"])}


def _rows(path: str, steps: int) -> tuple[list[dict], list[dict]]:
    """The rows that the newest checkpoint names, and those of metrics.jsonl, people's copy of them, up to it: that one
    may be shorter after a kill, and longer where a checkpoint turned out damaged."""
    try:
        rows = checkpoint.read_metrics(path)
        name = storage.join(path, "metrics.jsonl")
        lines = storage.read(name).splitlines() if storage.exists(name) else []
        return rows, [row for row in map(json.loads, lines) if row["step"] <= steps]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RuntimeError(f"a line of the metrics of {path} is damaged ({error})") from None


def _say_logged(logged: audit.Logged, where: str) -> None:
    say(f"drew just what the order says{where}: {logged.checked:,} steps")
    for step, samples in logged.set_aside.items():
        say(f"step {step:,}{where}: {samples} of its samples could not be read, so it cannot be compared")
    if logged.unlogged:
        say(f"taken{where} by an older millstream, which logged no digest: the first {logged.unlogged:,} steps")
    troubles = {"drew other samples": logged.differ, "missing": logged.missing, "there twice": logged.repeated}
    for trouble, steps in troubles.items():
        if steps:
            more = f" and {len(steps) - _SHOWN:,} more" if len(steps) > _SHOWN else ""
            say(f"{trouble}{where}: step {', '.join(f'{step:,}' for step in steps[:_SHOWN])}{more}")
    if logged.strange:
        say(f"of no step of this run{where}: {logged.strange:,} rows")


def _say_verdict(holds: bool) -> None:
    say("all of it holds" if holds else "IT DOES NOT HOLD: see above")


def main(argv: list[str]) -> int:
    args, found = parse(Args, "audit", argv), {}

    def audited() -> dict:
        found.update(run(args))
        return found

    return execute(audited, args.json) or (0 if found["holds"] else 1)
