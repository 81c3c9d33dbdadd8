"""Where the time of a run goes: seconds by kind of each attempt, and what of them was worth it.

    RUN/ledger/000002.json      of one attempt, by its rank 0, every ten seconds: so well is known what a SIGKILL ends

The terms are those of goodput reports (Google's ML Goodput, 2024): productive time over all time, the rest by cause.
"""

import contextlib
import json
import threading
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from pipeline import storage

KINDS = ("start", "data", "compute", "communication", "validation", "checkpoint")
_EVERY_S = 10.0


class Clock:
    """Where one rank's seconds go, and how far it has come. `lap(kind)` gives the time since the last lap to `kind`.

    seconds: {kind: s} so far; step: the one under way; laps: of that step; moves: signs of life; last: the last kind.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.step, self.laps, self.moves, self.last = -1, 0, 0, ""
        self.began, self._since = time.time(), time.perf_counter()

    def begin(self, step: int) -> None:
        """A step begins: its laps are counted from here."""
        self.step, self.laps = step, 0

    def lap(self, kind: str) -> None:
        now = time.perf_counter()
        self.seconds[kind] = self.seconds.get(kind, 0.0) + now - self._since
        self._since, self.last = now, kind
        self.laps += 1
        self.moves += 1

    def ticking(self, items: Iterable) -> Iterator:
        """The items; each of them is a sign of life."""
        for item in items:
            self.moves += 1
            yield item


@dataclass(frozen=True)
class Launch:
    """When an attempt was launched, unix time, and the command that did it: a restart is told from a user's return."""

    command: str = field(default_factory=lambda: uuid.uuid4().hex)
    time: float = field(default_factory=time.time)

    def again(self) -> "Launch":
        """The same command's next attempt, now."""
        return Launch(self.command)


class Ledger:
    """Rank 0's record of one attempt, from `samples` on. `launch`: of the attempt, by the command that made it."""

    def __init__(self, run: str, attempt: int, workers: int, samples: int, clock: Clock, device, launch: "Launch"):
        self.path, self.clock = storage.join(run, "ledger", f"{attempt:06d}.json"), clock
        self.cuda = torch.device(device).type == "cuda"
        self.record = {"attempt": attempt, "workers": workers, "device": str(device), "command": launch.command}
        self.record |= {"began": launch.time, "computing": clock.began, "from_samples": samples, "samples": samples}
        self.record |= {"first_step": None, "ended": None}
        self._over, self._failed = threading.Event(), False
        self._thread = threading.Thread(target=self._write_on, name="ledger", daemon=True)
        self._thread.start()

    def reached(self, samples: int) -> None:
        """After each step."""
        if self.record["first_step"] is None:
            self.record["first_step"] = time.time()
        self.record["samples"] = samples

    def end(self, why: str) -> None:
        """The last entry: finished, stopped, or what went wrong."""
        self.record["ended"] = why
        self._over.set()
        self._thread.join()
        self._write()

    def _write_on(self) -> None:
        self._write()
        while not self._over.wait(_EVERY_S):
            self._write()

    def _write(self) -> None:
        self.record |= {"updated": time.time(), "seconds": dict(self.clock.seconds)}
        if self.cuda:
            self.record["gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
        try:
            storage.write(self.path, json.dumps(self.record, indent=1).encode())
        except OSError as error:  # a record is no reason to stop training
            if not self._failed:
                warnings.warn(f"the ledger cannot be written: {error}", stacklevel=2)
            self._failed = True


def amend(run: str, row: dict) -> None:
    """Tells the record of the newest attempt, which died, of the last row that was seen of it."""
    records = read(run)
    if records and row and row["samples"] > records[-1]["samples"]:
        newer = {"samples": row["samples"], "updated": max(row["time"], records[-1]["updated"])}
        path = storage.join(run, "ledger", f"{records[-1]['attempt']:06d}.json")
        with contextlib.suppress(OSError):
            storage.write(path, json.dumps(records[-1] | newer, indent=1).encode())


def read(run: str) -> list[dict]:
    """The records of all attempts that took up work, in order."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for file in storage.list_files(storage.join(run, "ledger")):
            with contextlib.suppress(ValueError):
                records.append(json.loads(storage.read(storage.join(run, "ledger", file.path))))
    return sorted(records, key=lambda record: record["attempt"])


def summary(run: str) -> dict | None:
    """What became of a run's time, None if nothing was recorded.

    seconds: adds up to `wall`, which leaves out the time in which no command was running:
        data, compute, communication, validation, checkpoint    of work that counted
        wasted      all that was spent on samples which a later attempt had to draw again
        start       from the launch of the first attempt until it asks for its first batch
        recovery    of later attempts the same, and the time since the last sign of the one before, if the same command
                    went on
        other       what no clock saw, such as a last upload
    samples, wasted_samples, attempts; goodput: (data + compute + communication + validation) / wall; images_per_second:
    samples / wall; rate: samples / (data + compute + communication); gpu_memory_bytes where there was one.
    """
    records = read(run)
    if not records:
        return None
    seconds = dict.fromkeys((*KINDS, "recovery", "wasted", "other"), 0.0)
    wasted = wall = 0
    for number, record in enumerate(records):
        after = records[number + 1] if number + 1 < len(records) else None
        lost = max(0, record["samples"] - after["from_samples"]) if after else 0
        done = record["samples"] - record["from_samples"]
        share = lost / done if done else 0.0
        here, spent = record["updated"] - record["began"], record["seconds"]
        for kind in KINDS[1:]:
            seconds[kind] += spent.get(kind, 0.0) * (1 - share)
            seconds["wasted"] += spent.get(kind, 0.0) * share
        begun = record["computing"] - record["began"] + spent["start"] if "start" in spent else here
        gap = 0.0
        if number and record["command"] == records[number - 1]["command"]:
            gap = max(0.0, record["began"] - records[number - 1]["updated"])
        seconds["recovery" if number else "start"] += begun + gap
        wall += here + gap
        wasted += lost
    seconds["other"] = max(0.0, wall - sum(seconds.values()))
    samples = records[-1]["samples"] - records[0]["from_samples"]
    working = seconds["data"] + seconds["compute"] + seconds["communication"]
    memory = max((record.get("gpu_memory_bytes", 0) for record in records), default=0)
    return {
        "wall": wall,
        "seconds": seconds,
        "samples": samples,
        "wasted_samples": wasted,
        "attempts": len(records),
        "goodput": (working + seconds["validation"]) / wall if wall else 0.0,
        "images_per_second": samples / wall if wall else 0.0,
        "rate": samples / working if working else 0.0,
    } | ({"gpu_memory_bytes": memory} if memory else {})
