"""Runs on real Ray nodes that die, come, and give notice before they go: no sample is lost or seen twice on the way."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
import runs
from ray_head import plain_environment
from test_fit import HERE

from jobs import audit
from pipeline.training import fit
from pipeline.training.run import start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

# A cluster of a head without places and of nodes with one each; a run on it; and what happens to its nodes, one after
# the other, once the run has taken a step at its size: kill (SIGKILL), drain (with a minute's notice), add, notice (two
# minutes' by the metadata server of the node's VM, which a watcher of its own asks). However fast the machine, the run
# does not get past its `steps`-th step after a start until it is asked to stop, or nothing more will happen to it.
SCENE = """
import json, os, subprocess, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from ray._private.state import state
import runs
from metadata_server import MetadataServer
from pipeline.training import checkpoint, fit
from pipeline.training.resources import Resources
from pipeline.training.run import start
from test_fit import held

path, data, config, workers, steps, calm, *events = sys.argv[1:]
fit._train_body = held(int(steps), lambda contact, calm=calm: contact.asked() or os.path.exists(calm))
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
run = start(path, "test", runs.KINDS["cnn"](**json.loads(config)), data, workers)
rows, told, result, log = [], [], {}, []

def report(row):
    (rows if "step" in row else told).append(row | {"at": time.time()})

def train():
    result.update(fit.train(run, Resources(workers=workers, threads=1, resize_seconds=1), report))

thread = threading.Thread(target=train)
thread.start()

def wait(size, known):
    # for a row of that size after those known
    while True:
        for row in rows[known:]:
            if row["workers"] == size:
                return row
        assert thread.is_alive(), (told, rows[-1:])
        time.sleep(0.05)

size = 2 if workers == "1..2" else 1
wait(size, 0)
for event in events:
    at, last, known = time.time(), rows[-1]["step"], len(told)
    if event == "add":
        nodes.append(cluster.add_node(num_cpus=1))
    else:
        free = state.available_resources_per_node()
        busy = next(node for node in nodes if not free.get(node.node_id, {}).get("CPU"))
        nodes.remove(busy)
        if event == "kill":
            while not checkpoint.lineage(path):
                time.sleep(0.05)
            cluster.remove_node(busy, allow_graceful=False)
        elif event == "notice":
            server = MetadataServer("ec2").__enter__()
            command = [sys.executable, "-m", "cluster.preemption", "--metadata", server.url, "--address"]
            watcher = subprocess.Popen([*command, cluster.address, "--node-id", busy.node_id], stderr=subprocess.PIPE)
            while not server.seen:
                time.sleep(0.05)
            at, last = time.time(), rows[-1]["step"]
            server.notice()
            _, said = watcher.communicate(timeout=60)
            assert watcher.returncode == 0, said
            server.__exit__()
        else:
            command = [os.path.join(os.path.dirname(sys.executable), "ray"), "drain-node"]
            command += ["--address", cluster.address, "--node-id", busy.node_id, "--deadline-remaining-seconds", "60"]
            command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        if workers != "1..2":
            nodes.append(cluster.add_node(num_cpus=1))
    if workers == "1..2":
        size = 2 if event == "add" else 1
    while not any("restart" in row or "saved" in row for row in told[known:]):
        assert thread.is_alive(), told
        time.sleep(0.05)
    saved = next((row["at"] - at for row in told[known:] if "saved" in row), None)
    first = wait(size, len(rows))
    log.append({"event": event, "step": last, "saved": saved, "seconds": first["at"] - at})
open(calm, "x").close()
thread.join(300)
print(json.dumps({"result": result, "told": told, "log": log}), flush=True)
ray.shutdown()
cluster.shutdown()
"""


def scene(path, data, config, workers, steps, events):
    """What the scene prints, as it prints it; its cluster is gone when this returns."""
    path_of_code = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    more = {"PYTHONPATH": path_of_code, "RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}
    words = [path, data, json.dumps(config), workers, str(steps), f"{path}-calm", *events]
    with tempfile.TemporaryDirectory(prefix="ms-n-", dir="/tmp", ignore_cleanup_errors=True) as short:  # for sockets
        done = subprocess.run(
            [sys.executable, "-c", SCENE, *words], capture_output=True, text=True, timeout=450,
            env=plain_environment(RAY_TMPDIR=short, **more),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_whose_nodes_die_come_and_give_notice_ends_as_one_undisturbed(digits, tmp_path):
    config, path, whole = {"epochs": 60, "checkpoint_every": 640}, str(tmp_path / "run"), str(tmp_path / "whole")
    found = scene(path, digits, config, "1..2", 150, ["kill", "add", "drain"])
    print(found["log"])
    told = [next(kind for kind in ("restart", "saved", "resize", "note") if kind in row) for row in found["told"]]
    assert [kind for kind in told if kind != "note"] == ["restart", "resize", "saved", "resize", "saved", "resize"]
    assert [row["resize"] for row in found["told"] if "resize" in row] == [1, 2, 1]
    assert "about to be taken away" in [row for row in found["told"] if "saved" in row][1]["why"]
    assert found["result"]["ledger"]["wasted_samples"] < 640 + 64  # of the kill; growth and notice waste none
    fit.train(start(whole, "test", runs.cnn(**config), digits, 0), HERE, lambda row: None)
    assert runs.ends_alike(path, whole)
    assert runs.numbers(path) == runs.numbers(whole)
    assert audit.main(["--run", path]) == 0


def test_four_preemptions_with_notice_waste_nothing(digits, tmp_path):
    """1,600 steps, a checkpoint every 400: without a save at the notice, each would go back to the last of these. Two
    are told to Ray, two come from the VM's metadata server, by the watcher."""
    config = {"epochs": 1600 * 64 / runs.SAMPLES, "checkpoint_every": 400 * 64, "validate_every": 1 << 40}
    path = str(tmp_path / "run")
    found = scene(path, digits, config, "1", 300, ["notice", "drain"] * 2)
    print(found["log"])
    assert found["result"]["samples_seen"] == 1600 * 64
    assert [row["step"] for row in runs.numbers(path)] == list(range(1, 1601))
    assert found["result"]["ledger"]["attempts"] == 5
    assert all(0 < event["saved"] < 120 for event in found["log"])  # before EC2 takes the machine
    without = sum(event["step"] % 400 for event in found["log"])
    assert found["result"]["ledger"]["wasted_samples"] / 64 <= without / 10
    assert found["result"]["ledger"]["wasted_samples"] == 0
