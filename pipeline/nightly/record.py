"""One night, written down as it goes: ROOT/nights/TICK.json. What stands in it is not done again.

The file is replaced by compare-and-swap, each time from what this process last wrote. Whoever takes a night over puts
his mark on it first; what the one before writes after that is refused by the store, however long it slept.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator

from pipeline import storage
from pipeline.storage import Conflict

FINAL = ("promoted", "rejected", "skipped")  # of outcomes: a night that failed is gone on with by the same command


class Superseded(RuntimeError):
    """Another process has taken this night over; this one must stop writing."""


class Record:
    """A night that this process has taken: `stages` {name: result}, `outcome` and `reason` once it has ended."""

    def __init__(self, root: str, tick: str, doc: dict, tag: str, still_ours: Callable[[], None]):
        self.path, self.tick, self.doc, self._tag, self._still_ours = path_of(root, tick), tick, doc, tag, still_ours

    @property
    def stages(self) -> dict[str, dict]:
        return self.doc["stages"]

    @property
    def ended(self) -> bool:
        return self.doc["outcome"] in FINAL

    def mark(self, stage: str, result: dict, **more) -> None:
        """Notes the result (plain JSON) of a stage that is done; one with an `outcome` ends the night, with `more`.

        In one write: a kill between two would leave all stages done and no end. Superseded if it is no longer ours.
        """
        ending = {}
        if "outcome" in result:
            ending = {"outcome": result["outcome"], "reason": result["reason"], "ended": time.time(), **more}
        self._write(stages=self.stages | {stage: result}, **ending)

    def forget(self, *stages: str) -> None:
        """So that these are done again."""
        self._write(stages={name: result for name, result in self.stages.items() if name not in stages})

    def end(self, outcome: str, reason: str) -> None:
        self._write(outcome=outcome, reason=reason, ended=time.time())

    def note(self, **more) -> None:
        self._write(**more)

    def _write(self, **more) -> None:
        doc = self.doc | more
        self._still_ours()
        try:
            self._tag = storage.replace(self.path, _text(doc), self._tag)
        except Conflict:
            raise Superseded(f"the night {self.tick} was taken over by another process") from None
        self.doc = doc


def take(root: str, tick: str, still_ours: Callable[[], None]) -> Record:
    """The night, ours from now on; as it was left if it had begun. A night that has ended is not touched."""
    path = path_of(root, tick)
    by = {"host": socket.gethostname(), "pid": os.getpid(), "mark": secrets.token_hex(8)}
    fresh = {"tick": tick, "began": time.time(), "attempts": 1, "by": by, "stages": {}, "outcome": "", "reason": ""}
    still_ours()
    try:
        return Record(root, tick, fresh, storage.write_new(path, _text(fresh)), still_ours)
    except FileExistsError:
        data, tag = storage.read_tagged(path)
    record = Record(root, tick, _parsed(path, data), tag, still_ours)
    if not record.ended:
        record._write(attempts=record.doc["attempts"] + 1, by=by, outcome="", reason="", told=False)
    return record


def close_earlier(root: str, tick: str, still_ours: Callable[[], None]) -> None:
    """Ends the nights before `tick` that were left without an outcome: nobody goes on with them."""
    for before in names(root):
        if before < tick:
            if read(root, before)["outcome"]:
                return
            take(root, before, still_ours).end("failed", f"it was not brought to an end before the night {tick}")


def names(root: str) -> list[str]:
    """The ticks there are records of, the newest first."""
    folder = storage.join(root, "nights")
    try:
        files = [file.path for file in storage.list_files(folder)]
    except FileNotFoundError:
        return []
    return sorted((file.removesuffix(".json") for file in files if file.endswith(".json")), reverse=True)


def read(root: str, tick: str) -> dict:
    """The record of a night. FileNotFoundError if there is none."""
    path = path_of(root, tick)
    return _parsed(path, storage.read(path))


def newest_first(root: str) -> Iterator[dict]:
    return (read(root, tick) for tick in names(root))


def path_of(root: str, tick: str) -> str:
    return storage.join(root, "nights", f"{tick}.json")


def _text(doc: dict) -> bytes:
    return json.dumps(doc, indent=1).encode()


def _parsed(path: str, data: bytes) -> dict:
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
