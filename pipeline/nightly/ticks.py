"""When the nights of a schedule are: a cron expression in a time zone, as Debian's cron means it where clocks change.

A job with its minute and hour written out runs once a day: where the clock jumps over it right after the gap, where its
hour comes twice the first time. One with a star in minute or hour follows real time (hourly is each hour that passes).
See cron(8) of Debian, "Notes"; the expressions are parsed, and days matched, by cronsim.
"""

import difflib
import functools
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

_SHAPE = 'write "minute hour day month weekday", such as "0 2 * * *" for each day at 2:00'
_FIELDS = {"minute": 60, "hour": 24, "day": 31, "month": 12, "weekday": 7}  # how many values each has
_FORMAT = "%Y-%m-%dT%H%MZ"
_YEARS = 50  # as far as cronsim looks: the rarest that there is, a 29 February on given weekdays, comes within 40


def check(schedule: str, zone: str) -> None:
    """ValueError, with how to write it, for a schedule that is none or never comes, and for a zone that is none."""
    after(schedule, zone, datetime(2024, 1, 1, tzinfo=UTC))


def after(schedule: str, zone: str, when: datetime) -> datetime:
    """The first tick later than `when` (aware), in UTC. ValueError as `check`, or if `when` has no zone."""
    if when.tzinfo is None:
        raise ValueError(f"{when}: a time without a zone: use datetime.now(UTC)")
    when, clock, expression = when.astimezone(UTC), _zone(zone), _parsed(schedule)
    real = schedule.split()[0].startswith("*") or schedule.split()[1].startswith("*")
    for tick in _by_real_time(expression, clock, when) if real else _by_the_clock(schedule, clock, when):
        if tick > when:
            return tick
    raise ValueError(f"schedule {schedule!r} never comes: {_SHAPE}")


def latest(schedule: str, zone: str, now: datetime) -> datetime:
    """The newest tick at or before `now` (aware), in UTC. ValueError as `after`.

    Found by halving, with `after` alone: the two agree on what a tick is, whatever clocks did.
    """
    early, late = now - timedelta(days=366 * _YEARS), now
    if after(schedule, zone, early) > now:
        raise ValueError(f"schedule {schedule!r} has not come for {_YEARS} years: {_SHAPE}")
    while late - early > timedelta(minutes=1):  # a tick at or before now comes after `early`, and none after `late`
        middle = early + (late - early) / 2
        early, late = (middle, late) if after(schedule, zone, middle) <= now else (early, middle)
    return after(schedule, zone, early)


def name(tick: datetime) -> str:
    """2026-11-28T0100Z: what a night is called, in UTC, so that names sort as times do. ValueError for a part of a
    minute, which cron knows nothing of, and for a time without a zone."""
    if tick.tzinfo is None or tick.second or tick.microsecond:
        raise ValueError(f"{tick}: a tick is a whole minute, and has a zone")
    return tick.astimezone(UTC).strftime(_FORMAT)


def parse(name: str) -> datetime:
    """The tick of that name, in UTC. ValueError if it is the name of none."""
    try:
        tick = datetime.strptime(name, _FORMAT).replace(tzinfo=UTC)
    except ValueError:
        tick = None
    if tick is None or tick.strftime(_FORMAT) != name:  # strptime takes 2026-1-8 as well
        raise ValueError(f"tick {name!r}: write it as 2026-11-28T0100Z, in UTC")
    return tick


def _by_the_clock(schedule: str, clock: ZoneInfo, when: datetime) -> Iterator[datetime]:
    """Those of minutes and hours that are written out; some at or before `when` where an hour comes twice."""
    for tick in CronSim(schedule, when.astimezone(clock)):
        yield tick.astimezone(UTC)


def _by_real_time(expression: CronSim, clock: ZoneInfo, when: datetime) -> Iterator[datetime]:
    """Those where minutes or hours have a star. cronsim's own loses ticks, or goes round for ever, where clocks
    change by half an hour or at a quarter to three (Lord Howe, Chatham)."""
    tick, end = when.replace(second=0, microsecond=0) + timedelta(minutes=1), when + timedelta(days=366 * _YEARS)
    while tick < end:
        there = tick.astimezone(clock)
        if not _on(expression, there.date()) and not _on(expression, there.date() + timedelta(days=1)):
            tick += timedelta(hours=21)  # at most to the end of tomorrow, though the clock be set forward by three
        elif not _on(expression, there.date()) or there.hour not in expression.hours:
            tick += timedelta(minutes=15 - there.minute % 15)  # clocks are changed at quarters
        else:
            if there.minute in expression.minutes:
                yield tick
            tick += timedelta(minutes=1)


def _on(expression: CronSim, day: date) -> bool:
    return day.month in expression.months and expression.match_day(day)


@functools.lru_cache(maxsize=16)
def _parsed(schedule: str) -> CronSim:
    """Its fields as sets of numbers. ValueError for what cron, systemd and Kubernetes do not all take."""
    fields = schedule.split()
    if len(fields) != len(_FIELDS):
        raise ValueError(f"schedule {schedule!r} has {len(fields)} fields, not 5: {_SHAPE}")
    for (field, count), text in zip(_FIELDS.items(), fields, strict=True):
        for step in re.findall(r"/(\d+)", text):
            if len(step) > 2 or int(step) >= count:  # */90 is once an hour, and no two nights are 90 minutes apart
                raise ValueError(f"schedule {schedule!r}: {field} {text!r}: a step is at most {count - 1}: {_SHAPE}")
    try:
        expression = CronSim(schedule, datetime(2024, 1, 1))
    except CronSimError as error:
        raise ValueError(f"schedule {schedule!r}: {_which(str(error))}: {_SHAPE}") from None
    values = expression.days | expression.weekdays
    if any(isinstance(value, tuple) or value < 0 for value in values):  # cronsim's own L and #
        raise ValueError(f"schedule {schedule!r}: L and # are not cron's: {_SHAPE}")
    return expression


def _which(error: str) -> str:
    """cronsim's complaint, with our names of the fields."""
    field = error.lower().removeprefix("bad ").replace("day-of-week", "weekday").replace("day-of-month", "day")
    return f"no such {field}"


@functools.lru_cache(maxsize=16)
def _zone(zone: str) -> ZoneInfo:
    known = available_timezones()
    if zone in known:
        return ZoneInfo(zone)
    by_word = {known_zone.rpartition("/")[2].lower(): known_zone for known_zone in sorted(known)}
    by_word |= {known_zone.lower(): known_zone for known_zone in known}
    near = difflib.get_close_matches(zone.strip().lower().replace(" ", "_"), by_word, n=1)
    hint = f"did you mean {by_word[near[0]]!r}?" if near else "write it as Europe/Berlin, or UTC"
    raise ValueError(f"no time zone {zone!r}: {hint}")
