"""Runs killed many times at random moments, resumed at other world sizes: they end as runs never disturbed, bit by bit.

A draw of the moments that fails is printed with its seed.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import runs
from ray_head import plain_environment
from s3_server import wait_for
from test_fit import HERE, rank_processes

from pipeline import storage
from pipeline.training import fit
from pipeline.training.resources import Resources
from pipeline.training.run import start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
OFTEN = {"checkpoint_every": 64}  # a checkpoint each step: most kills come while one is written

# The whole command, with a Ray of its own where it has workers; tells where that lies and when it takes its first step.
TRAINING = """
import os, sys
import runs
from cluster.session import ray_session
from pipeline.training import fit
from pipeline.training.resources import Resources
from pipeline.training.run import start
path, data, kind, epochs, workers = sys.argv[1:]
run = start(path, "test", runs.KINDS[kind](epochs=int(epochs), checkpoint_every=64), data, int(workers))
def train():
    print(os.environ.get("MILLSTREAM_SCRATCH", ""), flush=True)
    fit.train(run, Resources(workers=int(workers), threads=1), lambda row: "step" in row and print("row", flush=True))
if int(workers):
    with ray_session(int(workers)):
        train()
else:
    train()
"""


def killed(path, data, kind, epochs, workers, after):
    """Starts the command, SIGKILLs it once it has told of `after` steps and then at any moment of the next ones."""
    environment = plain_environment(PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path]))
    command = [sys.executable, "-c", TRAINING, path, data, kind, str(epochs), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        session = process.stdout.readline().strip()
        for _ in range(after):
            assert process.stdout.readline() == "row\n"
        time.sleep(random.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    # Workers write until the reaper has them; what they leave is the next start's to clear.
    wait_for(lambda: not session or not os.path.exists(session), 30, f"end of the session {session}")


def unbroken(root, kind, data, epochs):
    config = runs.KINDS[kind](epochs=epochs, **OFTEN)
    fit.train(start(str(root / "whole"), "test", config, data, 0), HERE, lambda row: None)
    return str(root / "whole")


def check(path, whole, attempts):
    assert runs.ends_alike(path, whole)
    assert runs.numbers(path) == runs.numbers(whole)
    rows = runs.numbers(path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(os.listdir(os.path.join(path, "attempts"))) >= attempts
    stray = [name for _, _, names in os.walk(path) for name in names if name.endswith(".part")]
    assert not stray
    kept = {file.path.partition("/")[0] for file in storage.list_files(os.path.join(path, "checkpoints"))}
    assert len(kept) <= 4  # newest two, best, the one resumed from


@pytest.mark.parametrize("kind", runs.KINDS)
def test_ten_kills_of_a_single_process(digits, tmp_path, kind):
    seed = random.randrange(10**6)
    print("seed", seed)
    moments, path = random.Random(seed), str(tmp_path / "run")
    for _ in range(10):
        killed(path, digits, kind, 24, 0, moments.randrange(1, 30))
    fit.train(start(path, "test", runs.KINDS[kind](epochs=24, **OFTEN), digits, 0), HERE, lambda row: None)
    check(path, unbroken(tmp_path, kind, digits, 24), 11)


@pytest.mark.timeout(900)
def test_ten_kills_of_workers_in_one_run(ray_local, digits, tmp_path):
    """A rank of two, at a random step each time; the command goes on by itself. Of the GAN alone: starts take long."""
    seed = random.randrange(10**6)
    print("seed", seed)
    draws, path, rows = random.Random(seed), str(tmp_path / "run"), []
    config = runs.gan(epochs=60, checkpoint_every=1280, validate_every=1 << 40)
    killed = []

    def kill():
        for _ in range(10):
            known = len(rows)
            last = draws.randrange(1, 60)
            wait_for(lambda k=known, s=last: any(row.get("step", 0) >= begun(k) + s for row in rows[k:]), 120, "step")
            restarts = sum("restart" in row for row in rows)
            os.kill(draws.choice(rank_processes()), signal.SIGKILL)
            killed.append(rows[-1])
            wait_for(lambda n=restarts: sum("restart" in row for row in rows) > n, 120, "restart")

    def begun(known):
        return next((row["step"] for row in rows[known:] if "step" in row), 1 << 60)

    thread = threading.Thread(target=kill)
    thread.start()
    resources = Resources(workers=2, threads=1, max_failures=20)
    result = fit.train(start(path, "test", config, digits, 2), resources, rows.append)
    thread.join()
    assert len(killed) == 10
    assert result["ledger"]["attempts"] == 11
    print("wasted samples", result["ledger"]["wasted_samples"], "recovery", result["ledger"]["seconds"]["recovery"])
    whole = str(tmp_path / "whole")
    fit.train(start(whole, "test", config, digits, 0), HERE, lambda row: None)
    assert runs.ends_alike(path, whole)
    assert runs.numbers(path) == runs.numbers(whole)


def test_kills_of_the_command_at_changing_numbers_of_workers(digits, tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    moments, path = random.Random(seed), str(tmp_path / "run")
    for workers in (2, 1):
        killed(path, digits, "gan", 24, workers, moments.randrange(1, 3))
    fit.train(start(path, "test", runs.gan(epochs=24, **OFTEN), digits, 0), HERE, lambda row: None)
    check(path, unbroken(tmp_path, "gan", digits, 24), 3)
