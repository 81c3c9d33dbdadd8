"""One night, for one tick: what is left of it is done, once, by whoever has the lease; the same command goes on.

    fresh -> data -> train -> score -> publish -> confirm -> promote            `stages`; each notes its result
                                                                    -> page, notifications, clearing up

A night ends promoted, rejected, skipped or failed. What it holds is `record`'s file, the champion the registry's; both
are changed by compare-and-swap alone, so that a process that was given up for dead can do no harm when it wakes.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline import lease, registry, storage
from pipeline.nightly import record
from pipeline.nightly.config import NightConfig
from pipeline.nightly.record import Record, Superseded
from pipeline.storage import Conflict
from pipeline.training.run import TrainConfig

_LEASE_S = 30.0
_MISTAKES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_FAILURES = (*_MISTAKES, OSError, RuntimeError, FloatingPointError)
_JUDGED = ("score", "publish", "confirm", "promote")  # what depends on who the champion is


class Stopped(Exception):
    """It was asked to stop; all is saved, and the same command goes on."""


@dataclass
class Night:
    """What a stage has to work with. ray: starts Ray, if it is not there yet; say: a line for people; report: sees rows
    of training; sharded: how far sharding is, as `build.build`'s progress; stop: set once it is to end early; champion:
    who is to be beaten, with the tag for the swap."""

    config: NightConfig
    train: TrainConfig
    tick: str
    ray: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda line: None
    report: Callable[[dict], None] = lambda row: None
    sharded: Callable[[int, int, int, int], None] = lambda *counts: None
    stop: threading.Event = field(default_factory=threading.Event)
    force: bool = False
    record: Record | None = None
    held: lease.Lease | None = None
    champion: registry.Champion = field(default_factory=registry.Champion)

    @property
    def results(self) -> dict[str, dict]:
        return self.record.stages


Stage = tuple[str, Callable[[Night], dict]]


def run(night: Night, stages: list[Stage], ttl: float = _LEASE_S, after: Callable[[Night], bool] = lambda night: True):
    """Brings the night to an end: {tick, outcome, reason, stages, seconds, done (it had ended before)}.

    after: what follows the outcome, until it returns True once. Raises lease.Held if another process is at work on the
    nightly, Stopped, or Superseded; all else that goes wrong is the outcome `failed`, with `mistake` if the user's.
    """
    began, config = time.monotonic(), night.config
    where = storage.join(config.root, ".night")
    with lease.claim(where, f"the night {night.tick}", ttl, night.say) as night.held:
        night.record = record.take(config.root, night.tick, night.held.check)
        done, failure = night.record.ended, {}
        if not done:
            record.close_earlier(config.root, night.tick, night.held.check)
            night.champion = registry.fence(config.registry, config.name, night.held.check)
            try:
                _go_through(night, stages)
            except (Superseded, lease.Lost, Stopped):
                raise
            except _FAILURES as error:
                night.record.end("failed", " ".join(str(error).split()) or type(error).__name__)
                failure = {"mistake": isinstance(error, _MISTAKES)}
        if not night.record.doc.get("told"):
            night.record.note(told=after(night))
        doc = night.record.doc
        kept = {name: doc[name] for name in ("tick", "outcome", "reason", "stages")}
        return kept | {"done": done, "seconds": time.monotonic() - began} | failure


def _go_through(night: Night, stages: list[Stage]) -> None:
    while True:
        _judge_anew(night)
        for name, stage in stages:
            if name in night.results:
                continue
            if night.stop.is_set():
                raise Stopped
            night.say(f"{night.tick}: {name}")
            began = time.monotonic()
            try:
                result = stage(night)
            except Conflict:
                if not _overtaken(night):
                    raise
                break
            took = {"seconds": round(time.monotonic() - began, 3)}
            night.record.mark(name, result | took, **_trained(night, result.get("outcome")))
            if night.record.ended:
                return
        else:
            raise AssertionError("the last stage ends the night")


def _trained(night: Night, outcome: str | None) -> dict:
    """What later nights need not train on again; one that failed or was skipped leaves it to them."""
    if outcome not in ("promoted", "rejected"):
        return {}
    numbers = night.results.get("data", {}).get("generations", [])
    return {"trained": numbers, "trained_at": time.time(), "trained_by": night.tick}


def _judge_anew(night: Night) -> None:
    """What was measured against another champion than today's is measured again."""
    against = night.results.get("score", {}).get("champion", night.champion.version)
    promoted = night.champion.night == night.tick  # by us, before we were killed
    if against != night.champion.version and not promoted:
        night.say(f"the champion is {night.champion.version} now, not {against}: the challenger is compared anew")
        night.record.forget(*_JUDGED)


def _overtaken(night: Night) -> bool:
    """After a swap that was refused: whether the champion was changed by hand, so that we go on against the new one."""
    now = registry.champion(night.config.registry, night.config.name)
    if now.mark != night.champion.mark:
        raise Superseded(f"the night {night.tick} was taken over by another process")
    changed = now.tag != night.champion.tag
    night.champion = now
    return changed
