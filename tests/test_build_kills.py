"""Builds killed many times at random moments - the command, a worker, Ray's node - end as one never disturbed, to the
last byte.

A draw of the moments that fails is printed with its seed.
"""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from ray_head import plain_environment
from s3_server import wait_for

from cluster.reap import of_session
from pipeline import storage
from pipeline.shards import sidecars
from pipeline.shards.build import build
from pipeline.shards.plan import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RECIPE = Recipe(samples_per_shard=25)  # many shards: a kill in the middle of some, between others

# The whole command, with a Ray of its own; tells where that lies, and when the first shard is about to be made.
BUILDING = """
import os, sys
from cluster.session import ray_session
from pipeline.shards import sidecars
from pipeline.shards.build import build
from pipeline.shards.plan import Recipe
with ray_session(2):
    print(os.environ["MILLSTREAM_SCRATCH"], flush=True)
    show = lambda done, total, *_: done or print("begun", flush=True)
    build("digits:", sys.argv[1], Recipe(samples_per_shard=25), int(sys.argv[2]), show, beside=sidecars.KINDS)
    print("done", flush=True)
"""
VICTIMS = {"worker": ("ray::Map", "ray::IDLE"), "node": ("raylet/raylet",)}  # the first kind that there is


def content(root):
    """{path: SHA-256} of every file and object, hidden ones too."""
    files = [file.path for file in storage.list_files(root)]
    return {path: hashlib.sha256(storage.read(storage.join(root, path))).hexdigest() for path in files}


def killed(out, workers, victim, after):
    """Starts the command, SIGKILLs the victim `after` seconds of its work; whether it came to its end nevertheless."""
    environment = plain_environment(PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, "-c", BUILDING, out, str(workers)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        session = process.stdout.readline().strip()
        first = process.stdout.readline()
        assert first in ("begun\n", "done\n")  # done: all was there already, or only the index was missing
        time.sleep(after)
        for pid in victims(session, victim, process.pid):
            os.kill(pid, signal.SIGKILL)
        try:
            out, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    wait_for(lambda: not os.path.exists(session), 30, f"end of the session {session}")
    return process.returncode == 0


def victims(session, kind, driver):
    if kind == "command":
        return [driver]
    commands = {}
    for pid in of_session(session, {driver}):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
            commands[pid] = file.read()
    return next(([pid] for name in VICTIMS[kind] for pid, text in commands.items() if name in text), [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("whole") / "out")
    build("digits:", out, RECIPE, workers=0, beside=sidecars.KINDS)
    return content(out)


def disturb(out, kills):
    seed = random.randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    ends = []
    for _ in range(kills):
        victim = draw.choice(["command", "command", "worker", "node"])
        ends.append((victim, killed(out, draw.choice([1, 2]), victim, draw.uniform(0, 1.5))))
        print(ends[-1])
        assert ends[-1][1] or victim != "worker"  # its task is done again
        if ends[-1][1]:  # a worker's death does not stop a build; then it is begun anew elsewhere
            yield
    build("digits:", out, RECIPE, workers=0, beside=sidecars.KINDS)
    yield


def test_twenty_kills_on_local_disk(whole, tmp_path):
    out = str(tmp_path / "out")
    for _ in disturb(out, 20):
        left = [name for _, _, names in os.walk(out) for name in names if name.endswith(".part")]
        assert (content(out), left) == (whole, [])
        storage.delete_tree(out)


def test_kills_on_s3(whole, s3):
    out = s3.fresh()
    for _ in disturb(out, 4):
        assert content(out) == whole
        storage.delete_tree(out)
