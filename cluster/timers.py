"""The same nights by other people's timers: texts for cron, systemd and Kubernetes, of one cron expression in a zone.

They differ in what they know of zones, of days and weekdays together, and of the days when clocks change; each text
says in a comment what its timer does otherwise than `millstream schedule`. The Kubernetes ones are the shipped files,
filled in. Pages: crontab(5), systemd.time(7), systemd.timer(5), "CronJob" of Kubernetes, robfig/cron v3, which reads
its schedules.
"""

import json
import re
import shlex
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from cronsim import CronSim, CronSimError

KINDS = ("cron", "systemd", "k8s", "raycron")
_SHIPPED = Path(__file__).parent / "kuberay"
_WEEKDAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
_ALL = {"minutes": range(60), "hours": range(24), "days": range(1, 32), "months": range(1, 13), "weekdays": range(7)}
_NAMES = {"k8s": 52, "raycron": 36}  # characters: Kubernetes and KubeRay append theirs
_SAVING_S = 660  # a store that fails is asked again for ten minutes
_SYSTEMD_CLOCKS = (
    "# Where clocks change, a night in the hour that spring skips is left out; one in autumn's hour comes once."
)


@dataclass(frozen=True)
class Fields:
    """An expression as sets of numbers (Sunday is 0), and as it was written. both: a day must be in `days` and in
    `weekdays`, not in either."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    both: bool
    written: tuple[str, ...]

    def all(self, field: str) -> bool:
        return getattr(self, field) == set(_ALL[field])


def render(
    kind: str,
    name: str,
    schedule: str,
    zone: str,
    words: list[str],
    program: tuple[str, ...] = ("millstream",),
    image: str | None = None,
    store: str | None = None,
    address: str | None = None,
    every_s: int = 86400,
) -> str:
    """The text of the files that run `PROGRAM WORDS` at `schedule` (five fields of cron) of `zone` (IANA).

    name: of the unit or the Kubernetes object. words: the verb and its arguments. program: how it is called, for cron
    and systemd; they know no PATH of yours. image, store (s3://...), address (http(s)://HOST:8265): for k8s, what stays
    None stays the placeholder of the shipped file; raycron takes the image only. every_s: seconds between two nights,
    at least: how long one may be retried or followed depends on it.

    Raises ValueError for what the kind cannot express, naming it.
    """
    if kind not in KINDS:
        raise ValueError(f"no timer {kind!r}: there are {', '.join(KINDS)}")
    for text in (name, schedule, zone, *words, *program, image or "", store or "", address or ""):
        if not text.isprintable():
            raise ValueError(f"{text!r} has a line break or a control character: no timer's file can hold it")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+/-]*", zone):
        raise ValueError(f"time zone {zone!r}: write it as Europe/Berlin, or UTC")
    takes = {"k8s": ("image", "store", "address"), "raycron": ("image",)}.get(kind, ())
    for option, value in (("image", image), ("store", store), ("address", address)):
        if value and option not in takes:
            raise ValueError(f"{option} {value!r}: {kind} has no place for it, k8s has")
    fields = parsed(schedule)
    if kind in _NAMES:
        _check_kubernetes_name(kind, name)
        following_s = max(60, every_s * 3 // 4)
        if kind == "k8s":
            return _k8s(name, in_numbers(fields, kind), zone, words, image, store, address, following_s)
        return _raycron(name, in_numbers(fields, kind), zone, words, image, following_s)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", name):
        raise ValueError(f"name {name!r}: letters, digits, dots, dashes and underscores, for the name of a file")
    if kind == "cron":
        return _cron(name, schedule, in_numbers(fields, kind), zone, [*program, *words])
    return _systemd(name, schedule, on_calendar(schedule, zone), zone, [*program, *words], every_s)


def parsed(schedule: str) -> Fields:
    """ValueError if it is no expression of five fields."""
    try:
        if len(schedule.split()) != 5:
            raise CronSimError(f"{len(schedule.split())} fields, not 5")
        read = CronSim(schedule, datetime(2024, 1, 1))
    except CronSimError as error:
        raise ValueError(
            f'schedule {schedule!r}: {str(error).lower()}: write "0 2 * * *" for each day at 2:00'
        ) from None
    if any(isinstance(value, tuple) or value < 0 for value in read.days | read.weekdays):
        raise ValueError(f"schedule {schedule!r}: L and # are not cron's: give numbers or names")
    weekdays = frozenset(day % 7 for day in read.weekdays)
    fields = Fields(frozenset(read.minutes), frozenset(read.hours), frozenset(read.days), frozenset(read.months),
                    weekdays, read.day_and, tuple(schedule.lower().split()))  # fmt: skip
    if not fields.both and (fields.all("days") or fields.all("weekdays")):  # one of all days: each day
        each = {name: frozenset(_ALL[name]) for name in ("days", "weekdays")}
        return replace(fields, both=True, **each, written=_starred(fields.written, "days", "weekdays"))
    return fields


def in_numbers(fields: Fields, kind: str) -> str:
    """The expression as every cron reads it: no names, no 7 for Sunday, no 5/10, which only some know."""
    found = []
    for name, text in zip(_ALL, fields.written, strict=True):
        found.append(text if text.startswith("*") else _runs(sorted(getattr(fields, name)), "-"))
    if fields.both:
        for at, name in ((2, "days"), (4, "weekdays")):
            found[at] = "*" if fields.all(name) else found[at]
        if kind in _NAMES and "*" not in (found[2], found[4]):  # robfig/cron takes */2 for a list: either
            raise ValueError(
                f"schedule {' '.join(fields.written)!r}: cron means days in {found[2]} that are weekdays in "
                f"{found[4]}, Kubernetes days of either: leave one of them *"
            )
    return " ".join(found)


def on_calendar(schedule: str, zone: str) -> list[str]:
    """What systemd's OnCalendar= says for it; two where a day and a weekday are given, which means either."""
    fields = parsed(schedule)
    time = f"{_systemd_field(fields, 'hours')}:{_systemd_field(fields, 'minutes')}:00 {zone}"
    month, day = _systemd_field(fields, "months"), _systemd_field(fields, "days")
    week = sorted((number - 1) % 7 for number in fields.weekdays)  # systemd's begins on Monday
    weekday = "" if fields.all("weekdays") else f"{_runs(week, '..', lambda n: _WEEKDAYS[(n + 1) % 7])} "
    if fields.both:
        return [f"{weekday}*-{month}-{day} {time}"]
    return [f"*-{month}-{day} {time}", f"{weekday}*-{month}-* {time}"]


def _starred(written: tuple[str, ...], *names: str) -> tuple[str, ...]:
    return tuple("*" if name in names else text for name, text in zip(_ALL, written, strict=True))


def _systemd_field(fields: Fields, name: str) -> str:
    return "*" if fields.all(name) else _runs(sorted(getattr(fields, name)), "..", "{:02d}".format)


def _runs(numbers: list[int], to: str, show=str) -> str:
    """1-3,5: at least three that follow each other become a range."""
    parts, at = [], 0
    while at < len(numbers):
        end = at
        while end + 1 < len(numbers) and numbers[end + 1] == numbers[end] + 1:
            end += 1
        one = [show(number) for number in numbers[at : end + 1]]
        parts += [f"{one[0]}{to}{one[-1]}"] if len(one) > 2 else one
        at = end + 1
    return ",".join(parts)


def _cron(name: str, schedule: str, numbers: str, zone: str, command: list[str]) -> str:
    line = shlex.join(command)
    if re.search(r"\\%", line):
        raise ValueError(f"{line!r}: a crontab cannot say a backslash before a percent sign: name the file otherwise")
    return f"""\
# {name}: {schedule}, meant in {zone}. Add it at the end of your crontab (crontab -e).
# CRON_TZ is cronie's (Fedora, RHEL, Arch), and holds for the lines below it. Debian's and Ubuntu's cron takes it for a
# variable like any other and goes by the machine's own zone: where `timedatectl` names another, use systemd.
# cron starts no night that was missed while the machine was off, and none again that failed.
CRON_TZ={zone}
{numbers} {line.replace("%", chr(92) + "%")} >> "$HOME/{name}.log" 2>&1
"""


def _systemd(name: str, schedule: str, calendar: list[str], zone: str, command: list[str], every_s: int) -> str:
    when = "\n".join(f"OnCalendar={one}" for one in calendar)
    clocks = "" if zone in ("UTC", "Etc/UTC") else f"{_SYSTEMD_CLOCKS}\n"
    return f"""\
# {name}: {schedule} of {zone}. Two files of yours, each below the line that names it. Then:
#   systemctl --user daemon-reload && systemctl --user enable --now {name}.timer
#   loginctl enable-linger      (it runs while you are logged out, too)
#   systemd-analyze calendar {shlex.quote(calendar[0])}
# The service knows nothing of your shell's variables: Environment= or EnvironmentFile= give it what a store needs.
{clocks}
# ~/.config/systemd/user/{name}.service
[Unit]
Description=millstream: a night of {name}
# Three starts between two nights: the first, and again after a failure. A night goes on where it was.
StartLimitIntervalSec={max(60, every_s * 3 // 4)}
StartLimitBurst=3

[Service]
Type=oneshot
ExecStart={" ".join(map(_systemd_word, command))}
# The command alone is asked to stop, and saves; what it started is ended after it.
KillMode=mixed
KillSignal=SIGTERM
TimeoutStopSec={_SAVING_S}
SuccessExitStatus=130 143
Restart=on-failure
RestartSec=60
# A mistake in the configuration stays one.
RestartPreventExitStatus=2

# ~/.config/systemd/user/{name}.timer
[Unit]
Description=millstream: when {name} has its nights

[Timer]
{when}
# A night that was missed while the machine was off is made up for, once.
Persistent=true
AccuracySec=1s

[Install]
WantedBy=timers.target
"""


def _systemd_word(word: str) -> str:
    """A word of ExecStart=: % and $ are systemd's, quotes and backslashes work as in C."""
    word = word.replace("%", "%%").replace("$", "$$").replace("\\", "\\\\").replace('"', '\\"')
    return word if re.fullmatch(r"[A-Za-z0-9_./:=@,+%$-]+", word) else f'"{word}"'


def _check_kubernetes_name(kind: str, name: str) -> None:
    most = _NAMES[kind]
    if len(name) > most or not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name):
        raise ValueError(
            f"name {name!r}: small letters, digits and dashes, at most {most}, for an object of Kubernetes"
        )


def _k8s(name, numbers, zone, words, image, store, address, following_s: int) -> str:
    left = [what for what, given in (("the image", image), ("the bucket of --store", store)) if not given]
    told = {
        "To edit: the image, the bucket (twice), the schedule. ": f"To edit: {', '.join(left)}. " if left else "",
        "could not start by 4:00": "could not start within two hours",
        'nightly, "s3://my-bucket/nightly.yaml"]': f"{', '.join(map(_quoted, words))}]",
    }
    if store:
        told['"s3://my-bucket/jobs"'] = _quoted(store)
    if address and not address.startswith(("http://", "https://")):
        raise ValueError(f"address {address!r}: the head's dashboard is wanted, like http://millstream-head-svc:8265")
    if address and address.startswith("http://"):
        told['"http://millstream-head-svc:8265"'] = _quoted(address)
    elif address:
        told['"http://millstream-head-svc:8265", --insecure]'] = f"{_quoted(address)}]"
        told[
            f"\n{' ' * 14}# --insecure: plain http, which stays within what the NetworkPolicy of access.yaml lets in."
        ] = ""
    return _filled("cronjob.yaml", told, name, numbers, zone, image, following_s)


def _raycron(name, numbers, zone, words, image, following_s: int) -> str:
    told = {"millstream nightly s3://my-bucket/nightly.yaml": _quoted(shlex.join(["millstream", *words]))}
    return _filled("raycronjob.yaml", told, name, numbers, zone, image, following_s)


def _filled(file: str, told: dict[str, str], name: str, numbers: str, zone: str, image, following_s: int) -> str:
    """A shipped file with other values in their places, and what its comments say of the schedule."""
    told = told | {
        "name: millstream-nightly": f"name: {_quoted(name)}",
        'schedule: "0 2 * * *"': f"schedule: {_quoted(numbers)}",
        "timeZone: Etc/UTC": f"timeZone: {_quoted(zone)}",
        "activeDeadlineSeconds: 64800": f"activeDeadlineSeconds: {following_s}",
    }
    if image:
        told["image: registry.example/millstream:0.1.0-ray2.60.0"] = f"image: {_quoted(image)}"
    text = (_SHIPPED / file).read_text()
    for old in told:
        assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times: this module is behind it"
    # At once: a value may read as a place does.
    return re.sub("|".join(map(re.escape, told)), lambda found: told[found[0]], text)


def _quoted(text: str) -> str:
    """A YAML string; JSON's are."""
    return json.dumps(text, ensure_ascii=False)
