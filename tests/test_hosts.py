"""The main line across hosts with addresses of their own, and what it survives: a worker host dies, one is cut off, the
head dies. Network namespaces on one machine stand for the hosts; the same commands are given as on a cluster."""

import asyncio
import json
import os
import subprocess
import sys
import time

import pytest
from hosts import Hosts, no_namespaces
from ray_head import ROOT, TOKEN
from s3_server import S3Server, wait_for

from cluster import book
from cluster.head import Head
from pipeline import storage
from pipeline.training import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


class Cluster:
    """A head, two workers of one CPU, an S3 host, and the commands of someone who sits elsewhere."""

    def __init__(self, hosts: Hosts, s3: S3Server):
        self.hosts, self.s3 = hosts, s3
        self.head, self.workers = hosts.hosts["head"], [hosts.hosts["w1"], hosts.hosts["w2"]]
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))} | s3.env
        self.env |= {"RAY_AUTH_TOKEN": TOKEN, "HOME": hosts.folder}

    def start(self, *hosts) -> None:
        for host in hosts or (self.head, *self.workers):
            labels = {"market": "on-demand"} if host is self.workers[0] else {}
            host.ray(None if host is self.head else self.head, self.s3.env, 0 if host is self.head else 1, labels)

    def submit(self, *words: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [sys.executable, "-m", "jobs", "submit", "--json", "--insecure", "--store", "s3://lake/store"]
        command += ["--address", f"http://{self.head.address}:8265", *options, "--", *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def done(self, job: subprocess.Popen, code: int = 0) -> str:
        """What a submitted verb said, once it has ended as it should."""
        out, said = job.communicate(timeout=400)
        assert job.returncode == code, said[-4000:]
        assert json.loads(out)["exit_code"] == code
        return said

    def train(self, name: str) -> subprocess.Popen:
        words = ["--workers", "2", "--epochs", "20", "--checkpoint-every", "1600", "--data", "s3://lake/digits"]
        return self.submit("train", "digits_cnn", "--out", f"s3://lake/{name}", *words, options=("--name", name))

    def accuracy(self, name: str) -> float:
        """Of the run's best checkpoint, scored by a job of its own; each of the run's steps stands once."""
        self.done(self.submit("evaluate", f"s3://lake/{name}", "--workers", "2"))
        rows = checkpoint.read_metrics(f"s3://lake/{name}")
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return json.loads(storage.read(f"s3://lake/{name}/evaluation-val.json"))["accuracy"]


@pytest.fixture(scope="module")
def cluster():
    if why := no_namespaces():
        pytest.skip(f"hosts are network namespaces, which cannot be made here: {why}")
    with Hosts() as hosts, pytest.MonkeyPatch.context() as patch:
        for name in ("head", "w1", "w2", "s3"):
            hosts.add(name)
        with S3Server(hosts.hosts["s3"].address, hosts.hosts["s3"].within) as s3:
            s3.create_bucket("lake")
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in s3.env.items():
                patch.setenv(name, value)
            found = Cluster(hosts, s3)
            found.start()
            yield found


@pytest.fixture(scope="module")
def undisturbed(cluster):
    """Accuracy of the run that nobody disturbs, on shards that the workers made."""
    said = cluster.done(cluster.submit("shard", "digits:", "s3://lake/digits", "--workers", "2"))
    assert "1,797 samples added" in said
    cluster.done(cluster.train("calm"))
    return cluster.accuracy("calm")


def test_the_main_line_runs_on_both_worker_hosts(cluster, undisturbed):
    rows = checkpoint.read_metrics("s3://lake/calm")
    assert {row["workers"] for row in rows if "workers" in row} <= {2}
    assert undisturbed > 0.95


def test_the_driver_runs_on_the_node_with_the_label_that_is_asked_for(cluster, undisturbed, monkeypatch):
    options = ("--driver-on", "market=on-demand", "--name", "labelled")
    cluster.done(cluster.submit("inspect", "s3://lake/digits", options=options))

    async def asked(address: str) -> dict:
        async with Head(address, insecure=True) as head:
            return await head.job("labelled-1")

    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    job = asyncio.run(asked(f"http://{cluster.head.address}:8265"))
    assert f"//{cluster.workers[0].address}:" in job["driver_agent_http_address"]


def test_a_run_that_loses_a_host_a_cable_and_its_head_ends_as_one_undisturbed(cluster, undisturbed):
    """A worker host dies, one is cut off for half a minute, the head dies and the same command is given again."""
    job, path = cluster.train("hit"), "s3://lake/hit"

    def further() -> None:
        """Waits for a checkpoint after those that there are."""
        before = checkpoint.lineage(path)
        wait_for(lambda: checkpoint.lineage(path)[:1] != before[:1], 300, "next checkpoint")

    further()
    further()
    cluster.workers[1].kill()
    cluster.start(cluster.workers[1])  # another machine, by the autoscaler
    further()
    cluster.workers[0].cut()
    try:
        time.sleep(30)  # the length of the outage is what is tested
    finally:
        cluster.workers[0].mend()
    further()
    assert job.poll() is None, "the run has ended before its head could die"
    cluster.head.kill()
    before = checkpoint.lineage(path)[0].samples
    cluster.start(cluster.head)
    _, said = job.communicate(timeout=400)
    assert job.returncode == 122, said[-3000:]
    assert said.count("restart") >= 1
    print(said, cluster.done(cluster.train("hit")))
    assert book.newest("s3://lake/store", "hit") == 2
    assert checkpoint.lineage(path)[0].samples > before
    assert abs(cluster.accuracy("hit") - undisturbed) <= 0.005


def test_a_host_that_is_stopped_drains_its_own_node_and_no_other(cluster, undisturbed):
    """The preStop hook: it finds the node by the host's addresses, among those of the cluster."""
    host = cluster.workers[1]
    command = [*host.within, sys.executable, "-m", "cluster.preemption", "--address", f"{cluster.head.address}:6379"]

    def stop(token: str, seconds: int) -> str:
        env = cluster.env | {"RAY_AUTH_TOKEN": token, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, "--now", "--deadline", str(seconds)], cwd=ROOT, env=env, timeout=seconds + 60,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = stop("0" * 32, 5)
    assert "Ray has not been told" in said
    assert host.has("raylet")  # a wrong token moves nothing
    said = stop(TOKEN, 60)
    assert said.count("is being drained") == 1
    assert "still at work" not in said
    wait_for(lambda: not host.has("raylet"), 60, "end of the drained node")
    assert cluster.workers[0].has("raylet")
