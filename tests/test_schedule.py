"""Nights by the schedule: in the foreground with real processes, and as the files of other timers."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
import yaml
from s3_server import wait_for

from cluster import timers
from cluster.lint import lint
from jobs import schedule
from jobs.command import Stop
from pipeline.nightly import ticks as real_ticks

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "cluster" / "kuberay"
FAR = timedelta(days=1000)
CONFIG = SimpleNamespace(name="digits", schedule="0 2 * * *", timezone="Europe/Berlin")


def ticks_at(*seconds: float) -> SimpleNamespace:
    """Stands for pipeline.nightly.ticks: ticks so many seconds from now (0 or less: past), then none for long."""
    start = datetime.now(UTC)
    times = [start - FAR, *(start + timedelta(seconds=s) for s in seconds), start + FAR]
    return SimpleNamespace(
        times=times[1:-1],
        check=lambda *_: None,
        after=lambda schedule, zone, when: min([t for t in times if t > when], default=start + 2 * FAR),
        latest=lambda schedule, zone, now: max(t for t in times if t <= now),
        name=lambda tick: f"{tick:%H%M%S.%f}",
    )


class Foreground:
    """`follow` in a thread; the night is a shell script that gets its tick as $1 and writes to `log`."""

    def __init__(self, folder: Path, patch):
        self.log, self.gate, self.patch = folder / "log", folder / "gate", patch
        self.stop, self.thread, self.code = Stop(), None, None
        self.log.touch()

    def start(self, script: str, times: SimpleNamespace, catch_up=False, as_json=False) -> "Foreground":
        whole = f"echo start $1 >> {self.log}; {script.format(log=self.log, gate=self.gate)}"
        self.patch.setattr(schedule, "ticks", times)
        self.patch.setattr(schedule, "_command", lambda path, tick: ["sh", "-c", whole, "night", tick])
        self.nights = schedule.Nights("nightly.yaml", CONFIG, self.stop, as_json)

        def follow():
            self.code = schedule.follow(self.nights, catch_up)

        self.thread = threading.Thread(target=follow)
        self.thread.start()
        return self

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def started(self) -> list[str]:
        return [line.split()[1] for line in self.lines() if line.startswith("start")]

    def quiet(self) -> bool:
        """Every tick has come, and no night runs."""
        last = self.nights.after(datetime.now(UTC)) - datetime.now(UTC) > FAR / 2
        return last and self.nights.begun == self.nights.newest() and not self.nights.at_it.locked()

    def end(self) -> None:
        self.stop.set()
        self.nights.kill()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def foreground(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "_PAUSES_S", (0.05, 0.1))
    made = Foreground(tmp_path, monkeypatch)
    yield made
    if made.thread:
        made.end()


def test_each_tick_has_its_night_under_its_name(foreground):
    times = ticks_at(2, 4.5, 7)
    foreground.start("exit 0", times)
    wait_for(foreground.quiet, 20, "end of three nights")
    assert foreground.started() == [times.name(t) for t in times.times]


def test_nights_never_overlap_and_the_newest_of_those_missed_follows(foreground):
    times = ticks_at(2, 5.5, 5.6, 5.7, 5.8)
    foreground.start("until [ -e {gate} ]; do sleep 0.02; done; echo end $1 >> {log}", times)
    wait_for(foreground.lines, 20, "first night")
    wait_for(lambda: datetime.now(UTC) > times.times[-1] + timedelta(seconds=0.3), 20, "four more ticks")
    first, last = times.name(times.times[0]), times.name(times.times[-1])
    assert foreground.lines() == [f"start {first}"]
    foreground.gate.touch()
    wait_for(foreground.quiet, 20, "end of the nights")
    assert foreground.lines() == [f"start {first}", f"end {first}", f"start {last}", f"end {last}"]


def test_a_night_that_is_due_while_one_runs_is_told_of(foreground, capfd):
    times = ticks_at(2, 5)
    foreground.start("until [ -e {gate} ]; do sleep 0.02; done", times)
    said = []
    wait_for(lambda: said.append(capfd.readouterr().err) or "follows it" in "".join(said), 20, "a line on it")
    assert f"{times.name(times.times[1])} is due while a night runs, and follows it" in "".join(said)
    foreground.gate.touch()
    wait_for(foreground.quiet, 20, "end of the nights")


def test_a_night_that_fails_is_tried_twice_more_and_the_next_one_comes(foreground):
    times = ticks_at(2, 6)
    foreground.start("exit 1", times)
    wait_for(foreground.quiet, 20, "end of the nights")
    first, second = map(times.name, times.times)
    assert foreground.started() == [first] * 3 + [second] * 3


def test_a_night_is_tried_again_until_it_succeeds(foreground, capfd):
    foreground.start("[ -e {gate} ] && exit 0; touch {gate}; kill -9 $$", ticks_at(2), as_json=True)
    wait_for(foreground.quiet, 20, "end of the night")
    assert len(foreground.started()) == 2
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(line["tick"], line["exit_code"]) for line in lines] == [(foreground.started()[0], 0)]


@pytest.mark.parametrize(
    ("ends", "code"),
    [("exit 2", 2), ("exit 130", 130), ("exit 143", 143), ("kill -TERM $$", 143), ("kill -INT $$", 130)],
)
def test_a_mistake_and_a_night_that_somebody_stopped_are_not_tried_again(foreground, capfd, ends, code):
    foreground.start(ends, ticks_at(2, 5), as_json=True)
    wait_for(foreground.quiet, 20, "end of the nights")
    assert len(foreground.started()) == len(set(foreground.started())) == 2
    assert [json.loads(line)["exit_code"] for line in capfd.readouterr().out.splitlines()] == [code, code]


def test_the_pauses_are_one_minute_and_five():
    assert schedule._PAUSES_S == (60, 300)


def test_the_end_does_not_wait_for_a_pause(foreground, monkeypatch):
    monkeypatch.setattr(schedule, "_PAUSES_S", (1000.0, 1000.0))
    foreground.start("echo failed >> {log}; exit 1", ticks_at(2))
    wait_for(lambda: "failed" in foreground.lines() and foreground.nights.child is None, 20, "pause")
    foreground.stop.set()
    foreground.thread.join(10)
    assert not foreground.thread.is_alive()
    assert len(foreground.started()) == 1


def test_a_night_that_cannot_be_started_does_not_end_the_scheduler(foreground, monkeypatch):
    times = ticks_at(2, 6)
    foreground.start("exit 0", times)
    runs, there = [], schedule._command

    def command(path, tick):
        runs.append(tick)
        return ["/nowhere/millstream"] if tick == times.name(times.times[0]) else there(path, tick)

    monkeypatch.setattr(schedule, "_command", command)
    wait_for(foreground.quiet, 20, "end of the nights")
    first, second = map(times.name, times.times)
    assert runs == [first] * 3 + [second]
    assert foreground.started() == [second]


def test_a_missed_night_is_made_up_for_if_asked(foreground):
    times = ticks_at(-7200, -3600, 2.5)
    foreground.start("exit 0", times, catch_up=True)
    wait_for(foreground.quiet, 20, "end of the nights")
    assert foreground.started() == [times.name(t) for t in times.times[1:]]


def test_a_missed_night_is_left_alone_otherwise(foreground):
    times = ticks_at(-7200, -3600, 2)
    foreground.start("exit 0", times)
    wait_for(foreground.quiet, 20, "end of the night")
    assert foreground.started() == [times.name(times.times[2])]


def test_when_the_machine_slept_a_late_tick_is_still_run(foreground, monkeypatch):
    """A suspended machine's clock jumps: APScheduler sleeps on, and wakes when it is told to look."""
    monkeypatch.setattr(schedule, "_WAKE_S", 0.4)
    times = ticks_at(3600)
    foreground.start("exit 0", times)
    wait_for(lambda: "APScheduler" in {thread.name for thread in threading.enumerate()}, 10, "start")
    hour = timedelta(hours=1, minutes=30)

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + hour

    monkeypatch.setattr("apscheduler.schedulers.base.datetime", Later)
    monkeypatch.setattr("apscheduler.executors.base.datetime", Later)
    monkeypatch.setattr(schedule, "datetime", Later)
    wait_for(foreground.started, 20, "night")
    assert foreground.started() == [times.name(times.times[0])]


def test_the_trigger_knows_what_clocks_do():
    nights = schedule.Nights("", SimpleNamespace(schedule="30 2 * * *", timezone="Europe/Berlin"), Stop(), False)
    trigger = schedule._Ticks(nights, datetime(2026, 3, 28, 12, tzinfo=UTC))
    first = trigger.get_next_fire_time(None, None)
    assert [real_ticks.name(t) for t in (first, trigger.get_next_fire_time(first, None))] == [
        "2026-03-29T0100Z",
        "2026-03-30T0030Z",
    ]


def test_the_next_night_is_told_in_local_time_and_utc(capsys):
    schedule.Nights("", CONFIG, Stop(), False).say_next()
    said = re.search(r"next night: (\w+ \S+ 02:00 CES?T) \((\S+ \S+) UTC\)", capsys.readouterr().err)
    told = datetime.strptime(said[2], "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
    assert said[1] == f"{told.astimezone(ZoneInfo('Europe/Berlin')):%a %Y-%m-%d %H:%M %Z}"


def test_a_night_is_the_verb_nightly_with_its_tick():
    assert schedule._command("/a b.yaml", "2026-11-28T0100Z") == [
        *(sys.executable, "-m", "jobs", "nightly"),
        *("/a b.yaml", "--tick", "2026-11-28T0100Z"),
    ]


# The whole command, as a process of its own.

DRIVER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from jobs import schedule
from test_schedule import ticks_at

def soon(*args, follow=schedule.follow):
    schedule.ticks = ticks_at(2)
    return follow(*args)

schedule.follow = soon
schedule._command = lambda path, tick: ["sh", {script!r}, tick]
sys.exit(schedule.main([{config!r}, *sys.argv[1:]]))
"""


@pytest.fixture
def command(tmp_path, nightly):
    """command(script, *options) -> (process, log): the verb, with a shell script for the one night it has."""
    running, log = [], tmp_path / "log"
    log.touch()

    def start(script: str, *options: str):
        (tmp_path / "night.sh").write_text(script.replace("LOG", str(log)))
        words = {"root": str(ROOT), "tests": str(ROOT / "tests"), "script": str(tmp_path / "night.sh")}
        (tmp_path / "driver.py").write_text(DRIVER.format(config=str(nightly), **words))
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "driver.py"), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process, log

    yield start
    for process in running:
        process.kill()
    for line in log.read_text().splitlines():  # "pid N": what a test that failed has left
        if line.startswith("pid ") and alive(int(line.split()[1])):
            os.kill(int(line.split()[1]), signal.SIGKILL)
    for process in running:
        process.communicate(timeout=20)


@pytest.fixture
def nightly(tmp_path):
    file = tmp_path / "nightly.yaml"
    keys = {"name": "digits", "source": "digits:", "root": str(tmp_path / "root"), "preset": "digits_cnn"}
    file.write_text(yaml.safe_dump(keys | {"schedule": CONFIG.schedule, "timezone": CONFIG.timezone}))
    return file


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(log: Path, count: int) -> list[int]:
    """Of the processes that wrote "pid N"."""

    def written() -> list[int]:
        return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("pid ")]

    return wait_for(lambda: len(written()) == count and written(), 60, f"{count} processes")


# Saves at SIGTERM, if what it started is still there; 143 is how the verbs end.
SAVES = """
sleep 300 & child=$!
trap 'kill -0 $child && echo saved >> LOG; kill $child; exit 143' TERM
echo pid $child >> LOG; echo pid $$ >> LOG; echo out of the night
wait
"""
# Neither it nor what it started cares for SIGTERM.
STUBBORN = """
trap 'echo heard >> LOG' TERM
(trap '' TERM; while :; do sleep 0.1; done) & echo pid $! >> LOG
echo pid $$ >> LOG
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_has_the_night_save_and_leaves_nothing(command, number, code):
    process, log = command(SAVES, "--json")
    mine = pids(log, 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "saved" in log.read_text().splitlines()
    assert not any(map(alive, mine))
    row = json.loads(out)  # one line, and what the night prints is not on stdout
    assert set(row) == {"tick", "exit_code", "seconds"}
    assert row["exit_code"] == 143
    assert "out of the night" in err
    assert err.count("next night") == 1


def test_without_json_what_the_night_prints_is_passed_through(command):
    process, log = command("echo out of the night; echo pid $$ >> LOG")
    pids(log, 1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert out == "out of the night\n"


def test_the_second_signal_kills_the_night_and_what_it_started(command):
    process, log = command(STUBBORN)
    mine = pids(log, 2)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "heard" in log.read_text(), 30, "SIGTERM at the night")
    assert all(map(alive, mine))
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    wait_for(lambda: not any(map(alive, mine)), 10, "end of the night's processes")


def test_ctrl_c_while_no_night_runs_ends_at_once(command):
    process, log = command("echo pid $$ >> LOG")
    pids(log, 1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_killed_scheduler_leaves_its_night_running(command):
    process, log = command(SAVES)
    child, night = pids(log, 2)
    process.kill()
    process.wait(timeout=30)
    assert alive(night)
    assert alive(child)
    os.kill(night, signal.SIGTERM)
    wait_for(lambda: "saved" in log.read_text(), 20, "a saved night")
    wait_for(lambda: not alive(night), 20, "end of the night")


# Other timers.


def printed(capsys, nightly, *words) -> tuple[int, str, str]:
    code = schedule.main([str(nightly), *words])
    out, err = capsys.readouterr()
    return code, out, err


def render(kind, cron="0 2 * * *", zone="Europe/Berlin", words=("nightly", "s3://b/nightly.yaml"), **more):
    return timers.render(kind, "millstream-digits", cron, zone, list(words), **more)


@pytest.mark.parametrize("kind", timers.KINDS)
def test_what_is_printed_is_the_file_and_nothing_else(capsys, nightly, kind):
    code, out, err = printed(capsys, nightly, "--print", kind)
    program = () if kind in ("k8s", "raycron") else (schedule._program(),)
    least = 3600 * 23  # the night when clocks are set forward
    assert code == 0
    assert out == timers.render(
        kind, "millstream-digits", "0 2 * * *", "Europe/Berlin", ["nightly", str(nightly)], *program, every_s=least
    )
    assert ("is a path of this machine" in err) == (kind in ("k8s", "raycron"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--print", "k8s", "--json"], "leave --json and --catch-up out"),
        (["--print", "cron", "--catch-up"], "leave --json and --catch-up out"),
        (["--print", "cron", "--image", "i:1"], "image 'i:1': cron has no place for it"),
        (["--print", "raycron", "--store", "s3://b"], "store 's3://b': raycron has no place for it"),
        (["--print", "k8s", "--address", "head:8265"], "address 'head:8265': the head's dashboard is wanted"),
        (["--store", "s3://b"], "--store s3://b: goes with --print k8s"),
    ],
)
def test_options_that_mean_nothing_are_mistakes(capsys, nightly, words, said):
    code, out, err = printed(capsys, nightly, *words)
    assert (code, out) == (2, "")
    assert said in err


def test_a_nightly_without_a_schedule_is_a_mistake(capsys, nightly):
    nightly.write_text(nightly.read_text().replace("schedule: 0 2 * * *", "schedule: ''"))
    code, out, err = printed(capsys, nightly)
    assert (code, out) == (2, "")
    assert "has no schedule" in err


CRONS = ["0 2 * * *", "30 1 1,15 jan,jul *", "*/15 9-17 * * mon-fri", "0 2 13 * 5-7", "5/10 * */2 * *"]


@pytest.mark.parametrize("cron", CRONS)
@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("k8s", {}),
        ("k8s", {"image": "r.example/m:1.2", "store": "s3://x/jobs", "address": "http://head-svc:8265"}),
        ("k8s", {"address": "https://head.example:8265"}),
        ("raycron", {}),
        ("raycron", {"image": "r.example/m:1.2"}),
    ],
)
def test_kubernetes_files_have_no_finding(schemas_read_once, tmp_path, kind, more, cron, zone):
    (tmp_path / "timer.yaml").write_text(render(kind, cron, zone, **more))
    assert lint([str(tmp_path / "timer.yaml")]) == []


def test_the_kubernetes_file_is_the_shipped_one_with_its_values():
    want = yaml.safe_load((KUBERAY / "cronjob.yaml").read_text())
    job = want["spec"]["jobTemplate"]["spec"]
    want["metadata"]["name"] = "millstream-digits"
    want["spec"] |= {"schedule": "0 3 * * 0,6", "timeZone": "Europe/Berlin"}
    job["activeDeadlineSeconds"] = 2700
    box = job["template"]["spec"]["containers"][0]
    box["image"] = "r.example/m:1"
    box["command"] = ["millstream", "submit", "--address", "http://svc:8265", "--insecure"]
    box["args"] = ["--store", 's3://my "b"/jobs', "--", "nightly", "s3://b/it's: {a}.yaml"]
    words = ["nightly", "s3://b/it's: {a}.yaml"]
    more = {"image": "r.example/m:1", "store": 's3://my "b"/jobs', "address": "http://svc:8265", "every_s": 3600}
    text = render("k8s", "0 3 * * 6-7", words=words, **more)
    assert yaml.safe_load(text) == want
    assert "To edit" not in text
    assert "4:00" not in text
    box["command"] = ["millstream", "submit", "--address", "https://svc:8265"]
    text = render("k8s", "0 3 * * 6-7", words=words, **more | {"address": "https://svc:8265"})
    assert yaml.safe_load(text) == want
    assert "insecure" not in text


def test_what_is_not_given_stays_to_edit():
    text = render("k8s")
    assert "To edit: the image, the bucket of --store. " in text
    assert "registry.example/millstream" in text
    assert '"s3://my-bucket/jobs"' in text


def test_the_raycron_file_is_the_shipped_one_with_its_values():
    want = yaml.safe_load((KUBERAY / "raycronjob.yaml").read_text())
    want["metadata"]["name"] = "millstream-digits"
    want["spec"] |= {"schedule": "0 2 * * *", "timeZone": "Europe/Berlin"}
    template = want["spec"]["jobTemplate"]
    template["activeDeadlineSeconds"] = 64800
    template["entrypoint"] = "millstream nightly 's3://b/n n.yaml'"
    template["submitterPodTemplate"]["spec"]["containers"][0]["image"] = "r.example/m:1"
    assert yaml.safe_load(render("raycron", words=["nightly", "s3://b/n n.yaml"], image="r.example/m:1")) == want


def test_a_value_that_reads_like_a_place_of_the_file_is_not_filled_in():
    words = ["nightly", 's3://my-bucket/"s3://my-bucket/jobs"']
    box = yaml.safe_load(render("k8s", words=words, store="s3://other"))
    args = box["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args == ["--store", "s3://other", "--", *words]


@pytest.mark.parametrize(
    ("cron", "same"),
    [
        ("0 2 * * *", "0 2 * * *"),
        ("*/15 */2 * * *", "*/15 */2 * * *"),
        ("5/10 * * * *", "5,15,25,35,45,55 * * * *"),
        ("0 2 * jan-mar,dec sun,tue", "0 2 * 1-3,12 0,2"),
        ("0 2 * * 5-7", "0 2 * * 0,5,6"),
        ("0 2 1-31 * mon", "0 2 * * *"),
        ("0 2 13 * fri", "0 2 13 * 5"),
        ("0 2 */1 * fri", "0 2 * * 5"),
    ],
)
def test_kubernetes_gets_numbers_that_its_parser_knows(cron, same):
    assert timers.in_numbers(timers.parsed(cron), "k8s") == same


def test_kubernetes_cannot_say_every_other_day_that_is_a_monday():
    for kind in ("k8s", "raycron"):
        with pytest.raises(ValueError, match=re.escape("'0 2 */2 * mon': cron means days in */2")):
            render(kind, "0 2 */2 * mon")
    assert "\n0 2 */2 * 1 " in render("cron", "0 2 */2 * mon")


# Each was compared with `systemd-analyze calendar` of systemd 252: it takes them, and their times are those of cron.
@pytest.mark.parametrize(
    ("cron", "calendar"),
    [
        ("0 2 * * *", ["*-*-* 02:00:00 UTC"]),
        ("* * * * *", ["*-*-* *:*:00 UTC"]),
        ("*/15 9-17 * * mon-fri", ["Mon..Fri *-*-* 09..17:00,15,30,45:00 UTC"]),
        ("5/20 * * * *", ["*-*-* *:05,25,45:00 UTC"]),
        ("0 2,14 1,15 jan,jul *", ["*-01,07-01,15 02,14:00:00 UTC"]),
        ("0 2 * * 5-7", ["Fri..Sun *-*-* 02:00:00 UTC"]),
        ("0 2 * * sun,tue", ["Tue,Sun *-*-* 02:00:00 UTC"]),
        ("0 2 */2 * mon", ["Mon *-*-01,03,05,07,09,11,13,15,17,19,21,23,25,27,29,31 02:00:00 UTC"]),
        ("0 2 1-31 * mon", ["*-*-* 02:00:00 UTC"]),
        ("0 2 1-7 * 0-7", ["*-*-* 02:00:00 UTC"]),
        ("30 2 13 * fri", ["*-*-13 02:30:00 UTC", "Fri *-*-* 02:30:00 UTC"]),
        ("0 2 29 feb *", ["*-02-29 02:00:00 UTC"]),
    ],
)
def test_systemd_is_told_the_times_of_cron(cron, calendar):
    assert timers.on_calendar(cron, "UTC") == calendar


def test_the_systemd_text_is_a_service_and_a_timer():
    text = render("systemd", "30 2 13 * fri", program=("/opt/my env/millstream",), words=["nightly", "/a%b/$x.yaml"])
    head, service, timer = re.split(
        r"^# ~/\.config/systemd/user/millstream-digits\.(?:service|timer)$", text, flags=re.M
    )
    assert all(line.startswith("#") or not line for line in head.splitlines())
    lines = service.splitlines()
    for line in ("Type=oneshot", "KillMode=mixed", "KillSignal=SIGTERM", "TimeoutStopSec=660", "Restart=on-failure",
                 "RestartPreventExitStatus=2", "SuccessExitStatus=130 143", "StartLimitBurst=3",
                 "StartLimitIntervalSec=64800"):  # fmt: skip
        assert line in lines
    assert 'ExecStart="/opt/my env/millstream" nightly /a%%b/$$x.yaml' in lines
    assert [line for line in timer.splitlines() if line.startswith("OnCalendar")] == [
        "OnCalendar=*-*-13 02:30:00 Europe/Berlin",
        "OnCalendar=Fri *-*-* 02:30:00 Europe/Berlin",
    ]
    assert "Persistent=true" in timer.splitlines()
    assert "AccuracySec=1s" in timer.splitlines()


def test_systemd_says_what_it_does_where_clocks_change():
    assert "spring" in render("systemd", zone="Europe/Berlin")
    assert "spring" not in render("systemd", zone="UTC")


def as_cron_runs(text: str) -> tuple[str, list[str]]:
    """(schedule, words): the first % that has no backslash ends a command, and cron takes the backslash away."""
    line = text.splitlines()[-1]
    times, command = re.match(r"((?:\S+ ){5})(.*)", line).groups()
    command = re.split(r"(?<!\\)%", command)[0].replace("\\%", "%")
    return times.strip(), shlex.split(command)


def test_a_crontab_line_comes_out_of_cron_and_shell_as_it_went_in():
    words = ["nightly", "/data/100% mine/it's $x.yaml"]
    times, split = as_cron_runs(render("cron", "0 2 * * sun", words=words, program=("/opt/m s/millstream",)))
    assert times == "0 2 * * 0"
    assert split == ["/opt/m s/millstream", *words, ">>", "$HOME/millstream-digits.log", "2>&1"]


def test_a_crontab_says_whose_time_it_is():
    lines = render("cron", zone="America/New_York").splitlines()
    assert lines[-2] == "CRON_TZ=America/New_York"
    assert any("Debian's and Ubuntu's cron takes it for" in line for line in lines)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("at", {}, "no timer 'at'"),
        ("cron", {"words": ["nightly", "a\nb"]}, "line break"),
        ("systemd", {"words": ["nightly", "a\x1bb"]}, "control character"),
        ("k8s", {"store": "s3://b\u2028c"}, "line break"),
        ("cron", {"words": ["nightly", "a\\%b"]}, "a backslash before a percent sign"),
        ("cron", {"zone": "UTC; rm"}, "time zone 'UTC; rm'"),
        ("cron", {"cron": "0 2 * *"}, "4 fields, not 5"),
        ("systemd", {"cron": "0 25 * * *"}, "bad hour"),
        ("systemd", {"cron": "0 2 L * *"}, "L and # are not cron's"),
    ],
)
def test_what_a_timer_cannot_say_is_a_mistake(kind, change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        render(kind, **change)


@pytest.mark.parametrize(
    ("kind", "name"), [("k8s", "a" * 53), ("raycron", "a" * 37), ("k8s", "My.Model"), ("cron", "a/b"), ("systemd", "")]
)
def test_a_name_that_the_timer_refuses_is_a_mistake(kind, name):
    with pytest.raises(ValueError, match="name "):
        timers.render(kind, name, "0 2 * * *", "UTC", ["nightly", "/x"])
