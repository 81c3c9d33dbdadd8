"""Many schedulers, the same ticks, some killed, some paused: each night happens once, and no zombie does harm."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import scheduler
from s3_server import wait_for

from pipeline import registry, storage
from pipeline.nightly import record
from pipeline.nightly.config import NightConfig

HERE = Path(__file__).parent
TTL = 1.5


class Schedulers:
    """Processes that all run the same ticks; a killed one is started again. A context manager."""

    def __init__(self, root: str, folder: Path, count: int, ticks: int):
        self.root, self.folder, self.ticks, self.paused = root, folder, ticks, {}
        self.processes = [self.start(number) for number in range(count)]

    def start(self, number: int) -> subprocess.Popen:
        words = [sys.executable, str(HERE / "scheduler.py"), self.root, str(self.folder / f"{number}.log"), str(TTL)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
        with open(self.folder / f"{number}.err", "ab") as err:
            return subprocess.Popen([*words, str(self.ticks)], env=env, stdout=err, stderr=err)

    def __enter__(self) -> "Schedulers":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()  # a stopped one, too
            process.wait(20)

    def holder(self) -> int | None:
        """The place of the one that has the lease."""
        try:
            pid = json.loads(storage.read(storage.join(self.root, ".night")))["pid"]
        except (FileNotFoundError, ValueError):
            return None
        return next((at for at, process in enumerate(self.processes) if process.pid == pid), None)

    def hurt(self, random: random.Random) -> None:
        """SIGKILLs one, or pauses it for longer than its lease lasts; mostly the one at work."""
        at = self.holder() if random.random() < 0.7 else random.randrange(len(self.processes))
        if at is None or at in self.paused or self.processes[at].poll() is not None:
            return
        if random.random() < 0.5:
            self.processes[at].kill()
            self.processes[at].wait(20)
            self.processes[at] = self.start(at)
        else:
            self.processes[at].send_signal(signal.SIGSTOP)
            self.paused[at] = time.monotonic() + random.uniform(1.2, 2.5) * TTL

    def wake(self, everybody: bool = False) -> None:
        for at, until in list(self.paused.items()):
            if everybody or time.monotonic() > until:
                self.processes[at].send_signal(signal.SIGCONT)
                del self.paused[at]

    def over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def said(self) -> list[list[str]]:
        lines = [line.split() for file in self.folder.glob("*.log") for line in file.read_text().splitlines()]
        return [line for line in lines if line]


def race(root: str, folder: Path, count: int, ticks: int, hurts: int, bound: float) -> list[list[str]]:
    """Runs it to its end under blows; returns what the schedulers said."""
    config, chance, seen, over = NightConfig("race", "nowhere", root, "none"), random.Random(7), [], threading.Event()

    def read_on() -> None:
        while not over.is_set():
            seen.append(registry.champion(config.registry, config.name))

    reader = threading.Thread(target=read_on)
    reader.start()
    try:
        with Schedulers(root, folder, count, ticks) as them:
            end = time.monotonic() + bound
            wait_for(lambda: record.names(root), 60, "the first night")
            while not them.over():
                assert time.monotonic() < end, (record.names(root)[:1], them.said()[-5:])
                assert not [line for line in them.said() if line[0] == "broken"]
                if hurts:
                    them.hurt(chance)
                    hurts -= 1
                them.wake(everybody=not hurts)
                time.sleep(0.2)  # between blows; nothing waits for it
            said = them.said()
            assert [process.returncode for process in them.processes] == [0] * count
    finally:
        over.set()
        reader.join(30)
    # A reader never sees an epoch go back, and an epoch is one champion, whoever asks when.
    assert [now.epoch for now in seen] == sorted(now.epoch for now in seen)
    past = {entry["epoch"]: entry for entry in registry.history(config.registry, config.name)}
    assert {(now.epoch, now.version) for now in seen if now.epoch} <= {(e, past[e]["version"]) for e in past}
    return said


def check(root: str, ticks: int, said: list[list[str]]) -> None:
    """No tick was lost or done twice, the champions follow each other, nothing broke."""
    config = NightConfig("race", "nowhere", root, "none")
    outcomes = {tick: record.read(root, tick)["outcome"] for tick in record.names(root)}
    assert outcomes == {scheduler.name(number): scheduler.expected(number) for number in range(ticks)}
    promoted = [scheduler.name(number) for number in range(ticks) if scheduler.expected(number) == "promoted"]
    past = registry.history(config.registry, config.name)[::-1]
    assert [entry["epoch"] for entry in past] == list(range(1, len(promoted) + 1))
    assert [entry["night"] for entry in past] == promoted
    versions = [scheduler.published(config, tick) for tick in promoted]
    assert [entry["version"] for entry in past] == versions
    assert [entry["previous"] for entry in past] == [None, *versions[:-1]]
    assert registry.champion(config.registry, config.name).version == versions[-1]
    committed = [line[1] for line in said if line[0] == "committed"]
    assert len(committed) == len(set(committed))
    assert not [line for line in said if line[0] in ("broken", "failed")]


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_of_schedulers_that_are_killed_and_paused_each_tick_is_done_once(place, tmp_path):
    said = race(place, tmp_path, count=3, ticks=8, hurts=6, bound=200)
    check(place, 8, said)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_eight_schedulers_and_a_hundred_ticks(place, tmp_path):
    said = race(place, tmp_path, count=8, ticks=100, hurts=100, bound=1100)
    fenced = [line for line in said if line[0] == "fenced"]
    print(len(fenced), "fenced:", sorted(line[2] for line in fenced))
    check(place, 100, said)
    assert fenced  # some woke up as zombies
