"""Runs a nightly when its schedule says, in the foreground; or prints the files with which others would."""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

import tyro
from apscheduler.events import EVENT_JOB_MAX_INSTANCES
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger

from cluster import timers
from jobs.command import Stop, absolute, asked_to_stop, execute, parse, say
from pipeline import storage
from pipeline.nightly import ticks
from pipeline.nightly.config import NightConfig
from pipeline.nightly.config import load as load_config

_PAUSES_S = (60.0, 300.0)  # before a night that failed is tried again
# It ended well, by the user's mistake, or because somebody stopped it: the same again would end the same.
_FINAL = {0, 2, 130, 143}
_LOOK_S, _WAKE_S = 0.2, 30.0  # for a signal; at the clock, which a suspended machine has moved on
_LONGEST_S, _MOST = 366 * 86400, 500  # how many ticks tell the shortest time between two


@dataclass(frozen=True)
class Args:
    """Run `millstream nightly CONFIG` at the times of its schedule, until Ctrl-C; or print the files for another timer.

    A night that comes while one runs follows it, the newest of them alone. One that failed is tried again after 1 and
    5 minutes, not if CONFIG is at fault; either way the next one comes. The first Ctrl-C or SIGTERM has the running
    night save and waits for it; the second kills it. SIGKILL here leaves the night running: it is claimed, and nobody
    runs it a second time meanwhile. The schedule is read at the start, the rest of CONFIG each night.
    """

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """The nightly's YAML file, local or s3://..., with schedule and timezone."""
    print: Literal["cron", "systemd", "k8s", "raycron"] | None = None
    """Print what that timer needs on stdout, and run nothing. k8s: a CronJob that submits; raycron: KubeRay's own."""
    catch_up: bool = False
    """Begin with the newest night that is due, if it has not ended."""
    image: str | None = None
    """k8s, raycron: the image with millstream in it."""
    store: str | None = None
    """k8s: s3://bucket/prefix of `millstream submit`."""
    address: str | None = None
    """k8s: the head's dashboard, http(s)://HOST:8265."""
    json: bool = False
    """Print one JSON object on stdout for each night: {tick, exit_code, seconds}."""


def run(args: Args) -> dict:
    """{exit_code}, once it has been stopped."""
    path = absolute(args.config)
    config = load_config(path)
    if not config.schedule:
        raise ValueError(f'{args.config} has no schedule: give it one, such as schedule: "0 2 * * *"')
    ticks.check(config.schedule, config.timezone)
    if args.print:
        if args.json or args.catch_up:
            raise ValueError(f"--print {args.print} runs no nights: leave --json and --catch-up out")
        print(text(args, config, path), end="")
        return {}
    for option, value in (("--image", args.image), ("--store", args.store), ("--address", args.address)):
        if value:
            raise ValueError(f"{option} {value}: goes with --print k8s")
    # APScheduler speaks of ticks that it skips; what becomes of them is ours to say.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    with asked_to_stop() as stop:
        return {"exit_code": follow(Nights(path, config, stop, args.json), args.catch_up)}


def text(args: Args, config: NightConfig, path: str) -> str:
    """What `--print` prints."""
    name, program = f"millstream-{config.name}", _program()
    if args.print in ("k8s", "raycron"):
        name = re.sub("[^a-z0-9-]+", "-", name.lower()).strip("-")
        if not storage.is_remote(path):
            say(f"warning: {path} is a path of this machine: the nodes need it there too, or give s3://...")
    options = {"image": args.image, "store": args.store, "address": args.address}
    words = ["nightly", path]
    return timers.render(
        args.print, name, config.schedule, config.timezone, words, program, every_s=_shortest(config), **options
    )


class Nights:
    """The nights of a configuration, one at a time, each a child process in a group of its own."""

    def __init__(self, path: str, config: NightConfig, stop: Stop, as_json: bool):
        self.path, self.config, self.stop, self.as_json = path, config, stop, as_json
        self.begun: datetime | None = None  # the newest tick that has had its night, or needs none
        self.child: subprocess.Popen | None = None
        self.at_it = threading.Lock()  # as long as nights are run
        self.hand = threading.Lock()  # on the child: none starts once it was said to stop

    def newest(self) -> datetime:
        return ticks.latest(self.config.schedule, self.config.timezone, datetime.now(UTC))

    def after(self, when: datetime) -> datetime:
        return ticks.after(self.config.schedule, self.config.timezone, when)

    def run(self) -> None:
        """Runs the newest night that is due, and what has become due meanwhile, until there is none."""
        with self.at_it:
            while not self.stop.is_set() and (self.begun is None or self.newest() > self.begun):
                self.begun = self.newest()
                self._night(ticks.name(self.begun))
        if not self.stop.is_set():
            self.say_next()

    def say_next(self) -> None:
        tick = self.after(datetime.now(UTC))
        there = tick.astimezone(ZoneInfo(self.config.timezone))
        say(f"next night: {there:%a %Y-%m-%d %H:%M %Z} ({tick:%Y-%m-%d %H:%M} UTC)")

    def say_waits(self, event) -> None:
        say(f"{ticks.name(event.scheduled_run_times[-1])} is due while a night runs, and follows it")

    def ask(self) -> None:
        """SIGTERM to the night alone: what it started must live while it saves."""
        with self.hand:
            if self.child:
                self.child.terminate()

    def kill(self) -> None:
        """SIGKILL to the night and what it started."""
        with self.hand:
            if self.child:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.killpg(self.child.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Returns once no night runs; a signal's handler is run meanwhile."""
        while not self.at_it.acquire(timeout=_LOOK_S):
            pass
        self.at_it.release()

    def _night(self, tick: str) -> None:
        start = time.monotonic()
        for pause in (*_PAUSES_S, None):
            say(f"{tick}: begins")
            code = self._process(tick)
            if code is None or code in _FINAL or pause is None:
                break
            say(f"{tick}: failed with {code}: again in {pause:.0f} s")
            if self.stop.wait(pause):
                break
        if code is None:
            return
        seconds = round(time.monotonic() - start, 1)
        say(f"{tick}: ended with {code} after {seconds:,.0f} s")
        if self.as_json:
            print(json.dumps({"tick": tick, "exit_code": code, "seconds": seconds}), flush=True)

    def _process(self, tick: str) -> int | None:
        """The exit code of one try at a night, as shells give it; None if it was not to start any more."""
        try:
            with self.hand:
                if self.stop.is_set():
                    return None
                # Of its own group: Ctrl-C in the terminal reaches us alone. stdout is ours where it carries JSON.
                out = sys.stderr if self.as_json else None
                self.child = subprocess.Popen(
                    _command(self.path, tick), stdin=subprocess.DEVNULL, stdout=out, process_group=0
                )
            code = self.child.wait()
            return code if code >= 0 else 128 - code
        except OSError as error:  # no memory for another process, say: later there may be
            say(f"{tick}: cannot be started: {error}")
            return 1
        finally:
            with self.hand:
                self.child = None


class _Ticks(BaseTrigger):
    """APScheduler's view of a schedule. Its own CronTrigger has other ideas of days on which clocks change."""

    def __init__(self, nights: Nights, start: datetime):
        self.nights, self.start = nights, start

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime:
        return self.nights.after(previous or self.start)


def follow(nights: Nights, catch_up: bool) -> int:
    """Runs nights until `nights.stop` is set, and ends the one that runs; returns the exit code."""
    start = datetime.now(UTC)
    scheduler = BackgroundScheduler(timezone=UTC, executors={"default": ThreadPoolExecutor(1)})
    scheduler.add_listener(nights.say_waits, EVENT_JOB_MAX_INSTANCES)
    # However late, a night is run; of several that were missed, one is.
    at_once = {"next_run_time": start} if catch_up else {}
    nights.begun = None if catch_up else ticks.latest(nights.config.schedule, nights.config.timezone, start)
    scheduler.add_job(
        nights.run, _Ticks(nights, start), coalesce=True, max_instances=1, misfire_grace_time=None, **at_once
    )
    nights.say_next()
    try:
        scheduler.start()
        looks = 0
        # No stop.wait() here: the handler runs in this thread, and would hang if wait() just held the lock it needs.
        while not nights.stop.is_set():
            time.sleep(_LOOK_S)
            looks += 1
            if looks % round(_WAKE_S / _LOOK_S) == 0:
                scheduler.wakeup()
        nights.ask()
        nights.wait()
    except KeyboardInterrupt:  # the second
        say("killed: the night goes on from its newest checkpoint when it is run again")
        nights.kill()
        nights.wait()
    scheduler.shutdown(wait=False)
    return nights.stop.exit_code


def _command(path: str, tick: str) -> list[str]:
    return [sys.executable, "-m", "jobs", "nightly", path, "--tick", tick]


def _program() -> tuple[str, ...]:
    """How a timer that knows no PATH of ours calls millstream."""
    beside = Path(sys.executable).with_name("millstream")
    return (str(beside),) if os.access(beside, os.X_OK) else (sys.executable, "-m", "jobs")


def _shortest(config: NightConfig) -> int:
    """Seconds between two nights at least, of those of a year."""
    start = tick = ticks.after(config.schedule, config.timezone, datetime.now(UTC))
    shortest = _LONGEST_S
    for _ in range(_MOST):
        following = ticks.after(config.schedule, config.timezone, tick)
        shortest = min(shortest, round((following - tick).total_seconds()))
        if (following - start).total_seconds() > _LONGEST_S:
            break
        tick = following
    return shortest


def main(argv: list[str]) -> int:
    args = parse(Args, "schedule", argv)
    return execute(lambda: run(args), False)
