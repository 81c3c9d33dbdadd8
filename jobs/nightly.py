"""One night of a nightly: new data in, a challenger trained, and promoted if it is better. The same command goes on."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import tyro

from jobs.command import absolute, execute, parse, say
from jobs.nights import bring_to_end
from pipeline import registry
from pipeline.nightly import config as nightly
from pipeline.nightly import holdout, record, ticks, verdicts
from pipeline.shards import build, index, pinned

_TICK = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]*")


@dataclass(frozen=True)
class Args:
    """Bring tonight's run to its end: look for new data, shard and judge it, train, compare with the champion, promote.

    The same command again goes on where it was killed, and does nothing once the night has ended. Ends with 0 whatever
    the outcome (promoted, rejected, skipped, or another process is at it), 1 if the night failed, 2 if the
    configuration is at fault.
    """

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """The nightly's YAML file, local or s3://..."""
    tick: str | None = None
    """Which night; default: the newest by the schedule, or today by UTC without one. now: one of its own."""
    force: bool = False
    """Train although there is nothing new."""
    accept: tuple[int, ...] = ()
    """Let these generations of the dataset in, which were held; nothing else is done."""
    hold: tuple[int, ...] = ()
    """Train on these generations no longer, from the next night on; nothing else is done."""
    freeze: bool = False
    """Freeze the holdout anew, from all data that is accepted; nothing else is done."""
    address: str | None = None
    """A running Ray cluster; default: RAY_ADDRESS, else a Ray of our own on this machine."""
    dry_run: bool = False
    """Say what is new and who is champion, and do nothing."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{tick, outcome, reason, stages, seconds, done}"""
    config = nightly.load(absolute(args.config))
    if args.accept or args.hold or args.freeze:
        return _by_hand(args, config)
    tick = args.tick or _newest(config)
    if tick == "now":
        tick = ticks.name(datetime.now(UTC))
    if not _TICK.fullmatch(tick):
        raise ValueError(f"tick {tick!r}: letters, digits, dots and dashes, such as 2026-11-28T0200Z")
    if args.dry_run:
        return _plan(config, tick)
    return bring_to_end(config, tick, args.address, args.force)


def _newest(config: nightly.NightConfig) -> str:
    now = datetime.now(UTC)
    return ticks.name(ticks.latest(config.schedule, config.timezone, now)) if config.schedule else f"{now:%Y-%m-%d}"


def _plan(config: nightly.NightConfig, tick: str) -> dict:
    found = build.describe(config.source, config.data, config.shard)
    now, held = registry.champion(config.registry, config.name), verdicts.read(config.root)
    waiting = [number for number, verdict in held.items() if verdict["verdict"] == verdicts.HELD]
    known = record.read(config.root, tick)["outcome"] if tick in record.names(config.root) else ""
    say(f"night {tick} of {config.name}: {known or 'not begun, or not ended'}")
    say(f"{config.source}: {found['samples']:,} new items, {len(found['changed'])} changed, "
        f"{len(found['vanished'])} gone; held generations: {', '.join(map(str, waiting)) or 'none'}")  # fmt: skip
    say(f"champion: {now.version or 'none'}{f' since {now.time}' if now.version else ''}")
    kept = {name: found[name] for name in ("samples", "changed", "vanished")}
    return {"tick": tick, "outcome": known or None, "champion": now.version, "held": waiting} | kept


def _by_hand(args: Args, config: nightly.NightConfig) -> dict:
    """Accepts, holds, freezes."""
    there = [generation["generation"] for generation in index.load(config.data).info["generations"]]
    if strange := [number for number in (*args.accept, *args.hold) if number not in there]:
        raise ValueError(f"{config.data} has no generation {strange[0]}: it has {', '.join(map(str, there))}")
    for numbers, verdict in ((args.accept, verdicts.ACCEPTED), (args.hold, verdicts.HELD)):
        if numbers:
            verdicts.give(config.root, list(numbers), verdict, "by hand", registry.who(), anew=True)
            say(f"generation {', '.join(map(str, numbers))}: {verdict}")
    if args.freeze:
        numbers = verdicts.accepted(config.root)
        dataset = pinned.of(index.load(config.data), numbers)
        made = holdout.freeze(config.root, dataset, config.holdout, numbers, anew=True)
        say(f"holdout: {made.samples:,} samples of {made.split}, frozen; nights on it are counted from here")
    return {"verdicts": {str(n): v["verdict"] for n, v in verdicts.read(config.root).items()}}


def main(argv: list[str]) -> int:
    args = parse(Args, "nightly", argv)
    return execute(lambda: run(args), args.json)
