"""What `submit` and `job` share: where the head is, and following a job until Ctrl-C or its end."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

from cluster import auth
from cluster.follow import UNREACHABLE, follow
from cluster.head import DEFAULT, Head, Unreachable
from jobs.command import absolute, say


@dataclass(frozen=True)
class Where:
    address: str | None = None
    """The head's dashboard, http(s)://HOST:8265; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    store: str | None = os.environ.get("MILLSTREAM_STORE")
    """s3://bucket/prefix for code and for what is known of runs, which outlives the head; default: MILLSTREAM_STORE."""
    patience: float = 600.0
    """Seconds without any answer of the head before it counts as unreachable."""
    insecure: bool = False
    """Speak plain http to another machine."""
    ca: str | None = None
    """A file with the certificate authority of an https:// address."""

    def head_address(self) -> str:
        given = self.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT
        if not given.startswith(("http://", "https://")):
            raise ValueError(f"--address {given!r}: the head's dashboard is wanted, like {DEFAULT}")
        return given

    def place(self) -> str | None:
        return absolute(self.store) if self.store else None


def on_head(where: Where, ask: Callable[[Head], Awaitable]):
    """What `ask(head)` returns. Raises what Head does; Unreachable, after a shorter patience than when following."""
    if file := auth.readable_by_others():
        say(f"warning: {file} can be read by others on this machine: chmod 600 {file}")

    async def asked():
        async with Head(where.head_address(), min(where.patience, 30), where.insecure, where.ca, say) as head:
            return await ask(head)

    return asyncio.run(asked())


def followed(where: Where, job: str, as_json: bool, log: bool = True) -> dict:
    """Follows a job to its end; {job, state, exit_code, why}. Ctrl-C asks whether to leave it running or to stop it."""

    def show(text: str) -> None:
        print(text, end="", flush=True, file=sys.stderr if as_json else sys.stdout)

    async def wait():
        async with Head(where.head_address(), where.patience, where.insecure, where.ca, say) as head:
            return await follow(head, job, show if log else None, where.place())

    while True:
        try:
            ended = asyncio.run(wait())
        except KeyboardInterrupt:
            if not _stops(job):
                say(f"{job} goes on: millstream job wait {job} follows it, millstream job stop {job} ends it")
                return {"job": job, "state": "detached", "exit_code": 130, "why": ""}
            on_head(where, lambda head: head.stop(job))
            log = False  # it was shown
            continue
        say(f"{job} {ended.state}{f': {ended.why}' if ended.why else ''}")
        return asdict(ended)


def _stops(job: str) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    say(f"\nstop {job}, or leave it running (detach)? [s/D] ")
    try:
        return input().strip().lower().startswith("s")
    except (KeyboardInterrupt, EOFError):
        return False


def unreachable(job: str, error: Unreachable) -> dict:
    say(f"failed: {error}")
    return {"job": job, "state": "unreachable", "exit_code": UNREACHABLE, "why": str(error)}
