"""When nights are: each day's once, none double and none lost, on the days too when clocks change."""

import itertools
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.nightly import ticks

# What clocks do: an hour at night (north and south), at midnight, half an hour, at a quarter to three, nothing.
ZONES = ("Europe/Berlin", "America/New_York", "Australia/Sydney", "Africa/Cairo", "Australia/Lord_Howe",
         "Pacific/Chatham", "Asia/Kathmandu", "UTC")  # fmt: skip
_NUMBERS = {0: (0, 59), 1: (0, 23), 2: (1, 28), 3: (1, 12), 4: (0, 7)}


@st.composite
def schedules(draw) -> str:
    """Expressions that come: stars, numbers, ranges, steps, lists in each of the five fields."""

    def field(low: int, high: int) -> str:
        one = draw(st.integers(low, high))
        other = draw(st.integers(one, high))
        step = draw(st.integers(1, min(high - low, 6 if high == 7 else high)))
        return draw(st.sampled_from(["*", "*", str(one), f"{one}-{other}", f"*/{step}", f"{one}-{other}/{step}",
                                     f"{one},{other}"]))  # fmt: skip

    return " ".join(field(*_NUMBERS[at]) for at in range(5))


def year_of(schedule: str, zone: str, year: int) -> list[datetime]:
    """All ticks of a local year."""
    clock = ZoneInfo(zone)
    tick, end = datetime(year, 1, 1, tzinfo=clock) - timedelta(seconds=1), datetime(year + 1, 1, 1, tzinfo=clock)
    found = []
    while (tick := ticks.after(schedule, zone, tick)) < end:
        found.append(tick)
    return found


def local(tick: datetime, zone: str) -> str:
    return tick.astimezone(ZoneInfo(zone)).strftime("%m-%d %H:%M %Z")


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize(("year", "days"), [(2026, 365), (2028, 366)])
@pytest.mark.parametrize("schedule", ["30 2 * * *", "0 0 * * *", "0 3 * * *"])
def test_each_day_of_a_year_has_its_night_once(schedule, year, days, zone):
    found = year_of(schedule, zone, year)
    assert len({tick.astimezone(ZoneInfo(zone)).date() for tick in found}) == len(found) == days


@pytest.mark.parametrize(
    ("zone", "first", "at", "utc"),
    [
        ("Europe/Berlin", datetime(2026, 3, 29, tzinfo=UTC), "03-29 03:00 CEST", "2026-03-29T0100Z"),
        ("America/New_York", datetime(2026, 3, 8, 5, tzinfo=UTC), "03-08 03:00 EDT", "2026-03-08T0700Z"),
    ],
)
def test_a_night_in_the_spring_gap_runs_once_right_after_it(zone, first, at, utc):
    tick = ticks.after("30 2 * * *", zone, first)
    assert (local(tick, zone), ticks.name(tick)) == (at, utc)
    assert ticks.after("30 2 * * *", zone, tick) == tick + timedelta(hours=23, minutes=30)


@pytest.mark.parametrize(
    ("zone", "first", "at", "utc"),
    [
        ("Europe/Berlin", datetime(2026, 10, 24, 22, tzinfo=UTC), "10-25 02:30 CEST", "2026-10-25T0030Z"),
        ("America/New_York", datetime(2026, 11, 1, 4, tzinfo=UTC), "11-01 01:30 EDT", "2026-11-01T0530Z"),
    ],
)
def test_a_night_whose_hour_comes_twice_in_autumn_runs_the_first_time(zone, first, at, utc):
    schedule = "30 2 * * *" if zone == "Europe/Berlin" else "30 1 * * *"
    tick = ticks.after(schedule, zone, first)
    assert (local(tick, zone), ticks.name(tick)) == (at, utc)
    for minutes in range(0, 150, 10):  # also when asked within the hour that comes a second time
        assert ticks.after(schedule, zone, tick + timedelta(minutes=minutes)) == tick + timedelta(hours=25)
        assert ticks.latest(schedule, zone, tick + timedelta(minutes=minutes)) == tick


def test_two_nights_inside_the_gap_are_one():
    found = [tick for tick in year_of("0,30 2 * * *", "Europe/Berlin", 2026) if tick.date().isoformat() == "2026-03-29"]
    assert [ticks.name(tick) for tick in found] == ["2026-03-29T0100Z"]


@pytest.mark.parametrize("zone", ZONES)
def test_hourly_is_each_hour_that_passes(zone):
    found = year_of("0 * * * *", zone, 2026)
    gaps = {later - earlier for earlier, later in itertools.pairwise(found)}
    if zone not in ("Australia/Lord_Howe", "Pacific/Chatham"):  # whose full hour is another one after half an hour
        assert (len(found), gaps) == (8760, {timedelta(hours=1)})
    assert abs(len(found) - 8760) <= 1
    assert {tick.astimezone(ZoneInfo(zone)).minute for tick in found} == {0}


def as_defined(schedule: str, zone: str, start: datetime, end: datetime) -> list[datetime]:
    """Minute by minute: those that pass in (start, end], and whose local time the fields name."""
    expression, clock, found = ticks._parsed(schedule), ZoneInfo(zone), []
    minute = start.replace(second=0, microsecond=0) + timedelta(minutes=1)
    while minute <= end:
        there = minute.astimezone(clock)
        day = there.month in expression.months and expression.match_day(there.date())
        if day and there.hour in expression.hours and there.minute in expression.minutes:
            found.append(minute)
        minute += timedelta(minutes=1)
    return found


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("schedule", ["*/10 0 * * *", "*/7 3 * * *", "*/10 1-4 * * *", "20 * * * *", "5 */2 * * *"])
def test_stars_follow_real_time_wherever_clocks_are_changed(schedule, zone):
    clock, moment = ZoneInfo(zone), datetime(2026, 1, 1, tzinfo=UTC)
    for _ in range(365 * 24):
        before, moment = moment, moment + timedelta(hours=1)
        if before.astimezone(clock).utcoffset() == moment.astimezone(clock).utcoffset():
            continue
        start, end = moment - timedelta(hours=5, minutes=13), moment + timedelta(hours=30)
        wanted, tick, found = as_defined(schedule, zone, start, end), start, []
        while (tick := ticks.after(schedule, zone, tick)) <= end:
            found.append(tick)
        assert found == wanted


@given(schedules(), st.sampled_from(ZONES), st.datetimes(datetime(2024, 1, 1), datetime(2032, 1, 1)))
@example("30 2 * * *", "Europe/Berlin", datetime(2026, 3, 29, 1))
@example("30 2 * * *", "Europe/Berlin", datetime(2026, 10, 25, 1, 15))
@example("*/7 3 * * *", "Pacific/Chatham", datetime(2026, 9, 26, 13, 50))
@example("0 0 1 1 *", "UTC", datetime(2026, 1, 1))
@example("* * 29 2 *", "America/New_York", datetime(2027, 1, 1))
def test_the_newest_tick_is_past_and_the_one_after_it_to_come(schedule, zone, now):
    now = now.replace(tzinfo=UTC)
    newest = ticks.latest(schedule, zone, now)
    following = ticks.after(schedule, zone, newest)
    assert newest <= now < following
    assert following == ticks.after(schedule, zone, now)
    assert ticks.latest(schedule, zone, newest) == newest
    assert ticks.latest(schedule, zone, following) == following
    assert ticks.latest(schedule, zone, following - timedelta(microseconds=1)) == newest


@given(schedules(), st.sampled_from(ZONES), st.datetimes(datetime(2024, 1, 1), datetime(2032, 1, 1)))
def test_the_next_tick_is_the_same_from_wherever_before_it_one_asks(schedule, zone, when):
    when = when.replace(tzinfo=UTC)
    tick = ticks.after(schedule, zone, when)
    for part in (0.01, 0.5, 0.99):
        assert ticks.after(schedule, zone, when + (tick - when) * part) == tick


def test_a_year_ends_between_two_nights():
    eve = datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert ticks.name(ticks.after("0 0 * * *", "UTC", eve)) == "2027-01-01T0000Z"
    assert ticks.name(ticks.latest("0 0 * * *", "UTC", eve)) == "2026-12-31T0000Z"
    assert ticks.name(ticks.after("0 0 1 1 *", "Asia/Tokyo", eve - timedelta(days=1))) == "2026-12-31T1500Z"


def test_a_leap_day_comes_in_leap_years():
    when = datetime(2026, 1, 1, tzinfo=UTC)
    assert ticks.name(ticks.after("0 2 29 2 *", "UTC", when)) == "2028-02-29T0200Z"
    assert ticks.name(ticks.after("0 * 29 2 *", "UTC", when)) == "2028-02-29T0000Z"
    assert ticks.name(ticks.latest("0 2 29 2 *", "UTC", when)) == "2024-02-29T0200Z"


def test_a_day_and_a_weekday_mean_either():
    found = year_of("0 2 13 * fri", "UTC", 2026)
    assert len(found) == len([d for d in year_of("0 2 * * *", "UTC", 2026) if d.day == 13 or d.weekday() == 4])


def test_a_moment_within_a_minute_is_after_its_tick():
    tick = datetime(2026, 5, 1, 2, tzinfo=UTC)
    assert ticks.latest("0 2 * * *", "UTC", tick) == tick
    assert ticks.latest("0 2 * * *", "UTC", tick + timedelta(microseconds=1)) == tick
    assert ticks.after("0 2 * * *", "UTC", tick - timedelta(microseconds=1)) == tick
    assert ticks.after("0 2 * * *", "UTC", tick) == tick + timedelta(days=1)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("", "has 0 fields, not 5"),
        ("0 2 * *", "has 4 fields, not 5"),
        ("0 0 2 * * *", "has 6 fields, not 5"),
        ("@daily", "has 1 fields, not 5"),
        ("60 2 * * *", "no such minute"),
        ("0 24 * * *", "no such hour"),
        ("0 2 0 * *", "no such day"),
        ("0 2 * 13 *", "no such month"),
        ("0 2 * * 8", "no such weekday"),
        ("0 2 * * mo", "no such weekday"),
        ("0 2 * * fri-mon", "no such weekday"),
        ("*/0 2 * * *", "no such minute"),
        ("*/90 * * * *", "a step is at most 59"),
        ("0 */24 * * *", "a step is at most 23"),
        ("0 2 L * *", "L and # are not cron's"),
        ("0 2 * * 5L", "L and # are not cron's"),
        ("0 2 * * 1#2", "L and # are not cron's"),
        ("0 2 30 2 *", "no such day"),
        ("0 * 31 4,6 *", "no such day"),
    ],
)
def test_a_schedule_that_is_none_is_named_with_how_to_write_one(schedule, said):
    with pytest.raises(ValueError, match=r'such as "0 2 \* \* \*"') as mistake:
        ticks.check(schedule, "UTC")
    assert repr(schedule) in str(mistake.value)
    assert said in str(mistake.value)


@given(st.text(st.sampled_from("0123456789*/,-#LWmonja. "), max_size=30))
def test_any_text_is_a_schedule_or_a_mistake(text):
    try:
        ticks.check(text, "UTC")
    except ValueError:
        return
    ticks.latest(text, "Europe/Berlin", datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("zone", "hint"),
    [
        ("Europe/Berln", "did you mean 'Europe/Berlin'?"),
        ("Berlin", "did you mean 'Europe/Berlin'?"),
        ("new york", "did you mean 'America/New_York'?"),
        ("europe/berlin", "did you mean 'Europe/Berlin'?"),
        ("Middle/Earth", "write it as Europe/Berlin, or UTC"),
        ("../etc/passwd", "write it as Europe/Berlin, or UTC"),
        ("", "write it as Europe/Berlin, or UTC"),
    ],
)
def test_a_zone_that_is_none_is_named_with_the_nearest(zone, hint):
    with pytest.raises(ValueError, match="no time zone") as mistake:
        ticks.check("0 2 * * *", zone)
    assert str(mistake.value) == f"no time zone {zone!r}: {hint}"


def test_a_time_without_a_zone_is_a_mistake():
    for ask in (ticks.after, ticks.latest):
        with pytest.raises(ValueError, match="without a zone"):
            ask("0 2 * * *", "UTC", datetime(2026, 1, 1))


@given(st.datetimes(datetime(2000, 1, 1), datetime(2099, 1, 1)).map(lambda d: d.replace(second=0, microsecond=0)))
def test_a_name_says_which_tick_it_is_and_sorts_as_time_does(when):
    tick = when.replace(tzinfo=UTC)
    assert ticks.parse(ticks.name(tick)) == tick
    assert ticks.name(tick) == ticks.name(tick.astimezone(ZoneInfo("Asia/Kathmandu")))
    assert ticks.name(tick) < ticks.name(tick + timedelta(minutes=1))


@pytest.mark.parametrize("text", ["", "2026-11-28", "2026-1-8T0100Z", "2026-11-28T0160Z", "2026-11-28T010Z", "now"])
def test_what_names_no_tick_is_refused(text):
    with pytest.raises(ValueError, match="write it as 2026-11-28T0100Z"):
        ticks.parse(text)


@pytest.mark.parametrize("when", [datetime(2026, 1, 1), datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)])
def test_what_is_no_tick_has_no_name(when):
    with pytest.raises(ValueError, match="a whole minute"):
        ticks.name(when)
