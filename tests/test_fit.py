"""Training on workers: the same bits as in one process, at any number of them and after any death."""

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import runs
import torch
from s3_server import wait_for

from jobs import audit
from pipeline import lease
from pipeline.shards import index
from pipeline.training import checkpoint, fit, room
from pipeline.training.rank import evaluate_rank, restored, train_rank
from pipeline.training.resources import Resources
from pipeline.training.run import start

HERE = Resources(workers=0, threads=1)
ALL = {kind: config() for kind, config in runs.KINDS.items()} | runs.OPTIONS


def held(step, over):
    """What a rank does (`fit._train_body`), but before that step it waits until `over(contact)`: what a test does to a
    run finds it at work, however fast the machine."""

    def body(run, resources, world, threads, contact):
        calls = iter(range(1, 1 << 40))

        def asked():
            if next(calls) == step:
                while not over(contact):
                    time.sleep(0.05)
            return contact.asked()

        return train_rank(run, world, resources, threads, dataclasses.replace(contact, asked=asked))

    return body


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """Unbroken runs in this process, by kind."""
    root = tmp_path_factory.mktemp("whole")
    for kind, config in ALL.items():
        fit.train(start(str(root / kind), "test", config, digits, 0), HERE, lambda row: None)
    return root


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_end_with_the_weights_and_answers_of_one_process(ray_local, digits, whole, tmp_path, workers):
    """Runs of all kinds and an evaluation by one group of workers, which take longer to start than these to run."""

    def everything(trained, evaluated, world, threads, contact):  # in here, so that it travels to them by value
        for run in trained:
            train_rank(run, world, Resources(), threads, contact)
        task, _ = restored(evaluated, world.device)
        split = index.load(evaluated.data).split("train")
        return evaluate_rank(evaluated, task, split, world, threads), world.size, new_pages()

    def new_pages():
        """Of 80 MiB that were freed a moment ago, those that the system had to give once more."""
        found = []
        for _ in range(10):  # now and then another thread takes a little of what is free, and a new place is needed
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            torch.ones(20 << 20)
            found.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
        return found

    trained = [start(str(tmp_path / kind), "test", config, digits, workers) for kind, config in ALL.items()]
    evaluated = start(str(whole / "cnn"), "test", runs.cnn(), digits, workers)
    seen = []
    resources = Resources(workers=workers, threads=1)
    answers, size, pages = fit.launch(everything, (trained, evaluated), evaluated, resources, seen.append)
    assert size == workers
    assert min(pages) * os.sysconf("SC_PAGESIZE") < 8 << 20, pages
    for kind in ALL:
        assert runs.ends_alike(str(tmp_path / kind), str(whole / kind))
        assert runs.numbers(str(tmp_path / kind)) == runs.numbers(str(whole / kind))
    assert any("val_accuracy" in row for row in seen)
    expected, name = fit.evaluate(evaluated, digits, "train", HERE)
    assert name == checkpoint.best(evaluated.path).name
    assert len(answers.labels) == runs.SAMPLES
    for column in ("labels", "predicted", "confidence"):
        assert np.array_equal(getattr(answers, column), getattr(expected, column))
    assert answers.loss == expected.loss


@pytest.mark.parametrize("kind", runs.OPTIONS)
def test_a_run_with_any_option_that_is_stopped_and_gone_on_with_ends_as_one_unbroken(digits, whole, tmp_path, kind):
    run, stop = start(str(tmp_path / "run"), "test", runs.OPTIONS[kind], digits, 0), threading.Event()

    def report(row):
        if row["step"] in (3, 8):
            stop.set()

    for stopped in (True, True, False):
        stop.clear()
        assert fit.train(run, HERE, report, stop=stop)["stopped"] == stopped
    assert runs.ends_alike(run.path, str(whole / kind))
    assert runs.numbers(run.path) == runs.numbers(str(whole / kind))


def rank_processes() -> list[int]:
    """Ray Train's workers on the Ray of this process."""

    def read(pid, name):
        try:
            with open(f"/proc/{pid}/{name}") as file:
                return file.read()
        except OSError:
            return ""

    def parent(pid):
        return int(read(pid, "stat").rpartition(")")[2].split()[1] or 0) if read(pid, "stat") else 0

    ours = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if "RayTrainWorker" in read(pid, "cmdline") and parent(parent(pid)) == os.getpid():
            ours.append(int(pid))
    return ours


@pytest.mark.timeout(200)
def test_a_killed_worker_is_replaced_and_the_run_ends_alike(ray_local, digits, tmp_path, monkeypatch):
    """And while it runs, another training of it is told who has it."""
    config = runs.cnn(epochs=6, checkpoint_every=256)
    run = start(str(tmp_path / "run"), "test", config, digits, 2)
    told, killed, go = [], [], tmp_path / "go"
    monkeypatch.setattr(fit, "_train_body", held(20, lambda contact: os.path.exists(go)))

    def disturb():
        wait_for(lambda: checkpoint.lineage(run.path), 120, "checkpoint")
        try:
            fit.train(start(run.path, "test", config, digits, 0), HERE, lambda row: None)
        except lease.Held as held:
            told.append(str(held))
        pid = wait_for(rank_processes, 10, "worker")[0]
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
        go.touch()

    rows = []
    thread = threading.Thread(target=disturb)
    thread.start()
    result = fit.train(run, Resources(workers=2, threads=1), rows.append)
    thread.join()
    assert killed
    assert f"pid {os.getpid()}" in told[0]
    restarts = [row for row in rows if "restart" in row]
    assert [row["restart"] for row in restarts] == [1]
    assert len(restarts[0]["why"]) < 200
    assert sorted(int(name[:6]) for name in os.listdir(tmp_path / "run/attempts")) == [1, 2]
    assert result["samples_seen"] == 151 * 64
    fit.train(start(str(tmp_path / "whole"), "test", config, digits, 0), HERE, lambda row: None)
    assert runs.ends_alike(run.path, str(tmp_path / "whole"))
    assert runs.numbers(run.path) == runs.numbers(str(tmp_path / "whole"))


# A run that halts for good where it stands at a step.
HALTING = """
import sys, time
import runs
from pipeline.training import fit
from pipeline.training.resources import Resources
from pipeline.training.run import start
path, data, kind, step = sys.argv[1:]
def report(row):
    if row["step"] == int(step):
        print("halted", flush=True)
        time.sleep(600)
fit.train(start(path, "test", runs.KINDS[kind](), data, 0), Resources(workers=0, threads=1), report)
"""


def test_a_run_killed_at_world_1_and_resumed_at_world_2_ends_as_one_unbroken(ray_local, digits, whole, tmp_path):
    path = str(tmp_path / "run")
    command = [sys.executable, "-c", HALTING, path, digits, "gan", "13"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "halted\n"
        wait_for(lambda: checkpoint.lineage(path), 20, "checkpoint")
        process.send_signal(signal.SIGKILL)
    assert 0 < checkpoint.newest(path)[0].samples < 13 * 64
    fit.train(start(path, "test", runs.gan(), digits, 2), Resources(workers=2, threads=1), lambda row: None)
    assert runs.ends_alike(path, str(whole / "gan"))
    assert runs.numbers(path) == runs.numbers(str(whole / "gan"))
    assert [row["step"] for row in runs.numbers(path)] == list(range(1, 27))


def test_what_a_worker_cannot_do_surfaces_as_itself_and_is_not_tried_again(ray_local, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    run = start(str(tmp_path / "run"), "test", runs.cnn(), str(tmp_path / "data"), 2)
    shard = next(tmp_path.glob("data/train-*.tar"))
    shard.write_bytes(bytes(shard.stat().st_size))  # hundreds of bad samples
    rows, before = [], time.monotonic()
    with pytest.raises(ValueError, match="could not be read"):
        fit.train(run, Resources(workers=2, threads=1), rows.append)
    assert not [row for row in rows if "restart" in row]
    assert os.listdir(tmp_path / "run/attempts") == ["000001.json"]
    assert time.monotonic() - before < 60


def test_workers_asked_to_stop_save_the_step_in_flight_and_the_run_goes_on_alike(
    ray_local, digits, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(fit, "_train_body", held(4, lambda contact: contact.asked()))
    run, stop, seen = start(str(tmp_path / "run"), "test", runs.gan(), digits, 2), threading.Event(), []

    def report(row):
        if "step" in row:
            seen.append(row)
            stop.set()

    result = fit.train(run, Resources(workers=2, threads=1), report, stop=stop)
    assert result["stopped"]
    assert result["samples_seen"] == 4 * 64
    assert checkpoint.newest(run.path)[0].samples == result["samples_seen"]
    assert checkpoint.read_metrics(run.path)[-1]["samples"] == result["samples_seen"]
    assert {"data_wait", "workers"} <= seen[0].keys()
    monkeypatch.undo()
    found = fit.train(run, HERE, lambda row: None)
    assert found["ledger"]["wasted_samples"] == 0
    assert runs.ends_alike(run.path, str(whole / "gan"))
    assert runs.numbers(run.path) == runs.numbers(str(whole / "gan"))


def test_a_rank_that_holds_the_others_up_is_named(ray_local, digits, tmp_path):
    def body(world, threads, contact):
        world.clock.begin(7)
        world.clock.lap("data")
        if world.rank == 1:
            time.sleep(600)
        world.clock.lap("compute")
        world.sum_(torch.ones(1))

    run, began = start(str(tmp_path / "run"), "test", runs.cnn(), digits, 2), time.monotonic()
    resources = Resources(workers=2, threads=1, hang_seconds=3, max_failures=0)
    with pytest.raises(RuntimeError, match=r"rank 1 on .* holds the others up: at step 7 nothing has moved.*'data'"):
        fit.launch(body, (), run, resources, lambda row: None)
    assert time.monotonic() - began < 120
    wait_for(lambda: not rank_processes(), 20, "end of the ranks")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_grows_into_room_that_comes_free_and_saves_first(ray_local, digits, tmp_path):
    from ray.util.placement_group import placement_group, remove_placement_group

    held = placement_group([{"CPU": 1}] * (room.now(gpu=False) - 1))
    assert held.wait(30)
    run = start(str(tmp_path / "run"), "test", runs.cnn(epochs=500), digits, "1..2")
    stop, events, sizes = threading.Event(), [], []

    def report(row):
        if "step" not in row:
            events.append(row)
            return
        if not sizes:
            remove_placement_group(held)
        sizes.append(row["workers"])
        if row["workers"] == 2:
            stop.set()

    result = fit.train(run, Resources(workers="1..2", threads=1, resize_seconds=1), report, stop=stop)
    assert result["stopped"]
    assert sizes == sorted(sizes)
    assert set(sizes) == {1, 2}
    saved, resized = (next(row for row in events if kind in row) for kind in ("saved", "resize"))
    assert "room for 2 workers" in saved["why"]
    assert resized["resize"] == 2
    assert result["ledger"]["wasted_samples"] == 0
    assert [row["step"] for row in runs.numbers(run.path)] == list(range(1, result["samples_seen"] // 64 + 1))
    assert audit.main(["--run", run.path]) == 0


def test_more_workers_than_the_run_can_share_never_reach_ray(digits, tmp_path):
    with pytest.raises(ValueError, match=r"use one of \[1, 2\] workers"):
        start(str(tmp_path), "test", runs.cnn(), digits, 4)


def test_room_that_is_only_said_to_be_there_is_not_counted_on(ray_local, monkeypatch):
    from ray.util.placement_group import placement_group, remove_placement_group

    cpus = room.capacity(gpu=False)
    held = placement_group([{"CPU": 1}] * (cpus - 1))
    assert held.wait(30)
    monkeypatch.setattr(room, "_SETTLING_S", 1)
    monkeypatch.setattr(room, "now", lambda gpu: cpus)  # as a busy cluster's view of its nodes says, seconds later
    try:
        assert room.choose([1, cpus], gpu=False) == 1
    finally:
        remove_placement_group(held)
    wait_for(lambda: room.choose([1, cpus], gpu=False) == cpus, 30, "room that is there")
