"""Waits for a job to its end, through cut connections and restarts of the dashboard, and says how it ended.

The log is read by a stream that begins anew whenever it breaks; what was shown already is passed over, and what is
missing when the job has ended is fetched at once. The stream's end says nothing about the job: only its status does.
"""

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from cluster import book
from cluster.head import Head, Unreachable

FAILED, STOPPED, LOST, UNREACHABLE = 120, 121, 122, 123
_POLL_S = 1.0
_UNSURE = {"JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE"}  # the driver may live nevertheless


@dataclass(frozen=True)
class Outcome:
    """How a job ended. exit_code: its own where it has one, else FAILED, STOPPED, LOST or UNREACHABLE."""

    job: str
    state: str  # succeeded, failed, stopped, lost, unreachable
    exit_code: int
    why: str = ""


async def follow(head: Head, job: str, show: Callable[[str], None] | None, store: str | None = None) -> Outcome:
    """Returns when the job has ended, or nobody can say; `show` gets the log's text, each piece once."""
    log = _Log(show)
    stream = asyncio.create_task(_stream(head, job, log)) if show else None
    try:
        while not (ended := await _ended(head, job, store)):
            await asyncio.sleep(_POLL_S)
    except Unreachable as error:
        return _by_the_book(store, job) or Outcome(job, "unreachable", UNREACHABLE, str(error))
    finally:
        if stream:
            stream.cancel()
            await asyncio.wait([stream])
    if show:
        with contextlib.suppress(Unreachable, ValueError):  # the outcome is known, and counts
            log.whole(await _whole_log(head, job, store))
    return ended


async def _ended(head: Head, job: str, store: str | None) -> Outcome | None:
    """How the job ended, None while it has not. What its driver wrote in the store counts for more than Ray's word."""
    info = await head.job(job)
    ended = outcome(job, info)
    unsure = ended and (info is None or info.get("error_type") in _UNSURE)
    if unsure and store:
        if await asyncio.to_thread(book.alive, store, book.parse(job)):
            return None  # its driver goes on without its head, or a failover has lost sight of it
        return _by_the_book(store, job) or ended
    return ended


def outcome(job: str, info: dict | None) -> Outcome | None:
    """The outcome that `info`, the head's knowledge of a job, tells; None while it has not ended."""
    if info is None:
        return Outcome(job, "lost", LOST, "the head knows no such job: it was restarted, or never heard of it")
    status, code = info["status"], info.get("driver_exit_code")
    if status == "SUCCEEDED":
        return Outcome(job, "succeeded", 0)
    if status == "STOPPED":
        return Outcome(job, "stopped", STOPPED, "it was stopped")
    if status != "FAILED":
        return None
    if code is not None:
        code = 128 - code if code < 0 else code  # a signal, as shells say it
        return Outcome(job, "failed", code or FAILED, f"it exited with {code}")
    return Outcome(job, "failed", FAILED, f"{info.get('error_type') or 'failed'}: {_line(info.get('message') or '')}")


def _by_the_book(store: str | None, job: str) -> Outcome | None:
    """The outcome its driver left in the store, if it did."""
    beat = None
    if store:
        with contextlib.suppress(OSError):
            beat = book.heard(store, book.parse(job))
    if not beat or beat["code"] is None:
        return None
    code = beat["code"]
    return Outcome(job, "failed" if code else "succeeded", code, f"it exited with {code}" if code else "")


async def _whole_log(head: Head, job: str, store: str | None) -> str:
    found = await head.logs(job)
    if found is None and store:
        found = await asyncio.to_thread(book.kept_log, store, book.parse(job))
    return found or ""


async def _stream(head: Head, job: str, log: "_Log") -> None:
    while True:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            log.restart()
            async for text in head.tail(job):
                log.more(text)
        await asyncio.sleep(_POLL_S)


class _Log:
    """Shows each character of a log once, however often it is sent from its beginning."""

    def __init__(self, show):
        self.show, self.shown, self.at = show, 0, 0

    def restart(self) -> None:
        self.at = 0

    def more(self, text: str) -> None:
        new = text[max(0, self.shown - self.at) :]
        self.at += len(text)
        if new:
            self.shown = self.at
            self.show(new)

    def whole(self, text: str) -> None:
        self.restart()
        self.more(text)


def _line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[-1])[:300] if lines else ""
