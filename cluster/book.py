"""Which attempts there were at a run, in a store: what Ray forgets with its head.

    STORE/code/HASH.zip           code, by its content
    STORE/jobs/RUN/N.json         attempt N: who claimed it, where, with which code. Created once: one claimant wins
    STORE/jobs/RUN/N.beat.json    its driver's last sign of life; at the end its exit code
    STORE/jobs/RUN/N.log          the end of its log

The attempt of the highest number is the one; the driver of any other ends when it sees that. Each beat differs from
the last, so a reader needs no clock of the writer's to tell a live driver from a dead one.
"""

import json
import os
import re
import secrets
import socket
import time
from dataclasses import dataclass

from pipeline import storage

BEAT_S = 5.0
SILENT_S = 30.0  # without a new beat: dead, paused, or cut off


@dataclass(frozen=True)
class Attempt:
    run: str
    number: int

    @property
    def job(self) -> str:
        """The submission id in Ray."""
        return f"{self.run}-{self.number}"


def parse(job: str) -> Attempt:
    """The attempt of a submission id. ValueError if it is none of ours."""
    if not (match := re.fullmatch(r"([A-Za-z0-9_.-]+)-(\d+)", job)):
        raise ValueError(f"{job!r} is no job of `millstream submit`: these are like train-1a2b3c4d5e-1")
    return Attempt(match[1], int(match[2]))


def newest(store: str, run: str) -> int:
    """The number of the newest attempt, 0 if there is none."""
    return max((int(m[1]) for file in _files(store, run) if (m := re.fullmatch(r"(\d+)\.json", file))), default=0)


def claim(store: str, attempt: Attempt, facts: dict) -> None:
    """Claims an attempt. FileExistsError if another has."""
    by = {"user": os.environ.get("USER", ""), "host": socket.gethostname(), "time": time.time()}
    storage.write_new(_path(store, attempt, "json"), json.dumps(facts | {"by": by}, indent=1).encode())


def claimed(store: str, attempt: Attempt) -> dict:
    return json.loads(storage.read(_path(store, attempt, "json")))


def beat(store: str, attempt: Attempt, code: int | None = None) -> None:
    """A sign of life of the attempt's driver, or with `code` its end."""
    said = {"host": socket.gethostname(), "pid": os.getpid(), "mark": secrets.token_hex(8), "code": code}
    storage.write(_path(store, attempt, "beat.json"), json.dumps(said).encode())


def heard(store: str, attempt: Attempt) -> dict | None:
    """The last beat: {host, pid, mark, code}; None if its driver has not started."""
    try:
        return json.loads(storage.read(_path(store, attempt, "beat.json")))
    except FileNotFoundError:
        return None


def alive(store: str, attempt: Attempt, seconds: float = SILENT_S) -> bool:
    """Whether its driver shows a new sign of life within `seconds`; False at once if it never began, or has ended."""
    first, end = heard(store, attempt), time.monotonic() + seconds
    while first and first["code"] is None:
        if time.monotonic() > end:
            return False
        time.sleep(min(1.0, seconds / 10))
        now = heard(store, attempt)
        if now and now["mark"] != first["mark"]:
            return now["code"] is None
    return False


def keep_log(store: str, attempt: Attempt, tail: bytes) -> None:
    storage.write(_path(store, attempt, "log"), tail)


def kept_log(store: str, attempt: Attempt) -> str | None:
    try:
        return storage.read(_path(store, attempt, "log")).decode(errors="replace")
    except FileNotFoundError:
        return None


def code_path(store: str, name: str) -> str:
    return storage.join(store, "code", name)


def _path(store: str, attempt: Attempt, kind: str) -> str:
    return storage.join(store, "jobs", attempt.run, f"{attempt.number:04d}.{kind}")


def _files(store: str, run: str) -> list[str]:
    try:
        return [file.path for file in storage.list_files(storage.join(store, "jobs", run))]
    except FileNotFoundError:
        if storage.is_remote(store):
            raise  # no such bucket
        return []
