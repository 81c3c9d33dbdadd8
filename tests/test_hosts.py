"""The main line across hosts with addresses of their own, and what it survives: a worker host dies, one is cut off, the
head dies. Network namespaces on one machine stand for the hosts; the same commands are given as on a cluster."""

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
            host.ray(None if host is self.head else self.head, self.s3.env, 0 if host is self.head else 1)

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
        words = ["--workers", "2", "--epochs", "6", "--checkpoint-every", "1600", "--data", "s3://lake/digits"]
        return self.submit("train", "digits_cnn", "--out", f"s3://lake/{name}", *words, options=("--name", name))

    def underway(self, name: str) -> None:
        """Waits until the run has a checkpoint after its first."""
        wait_for(lambda: len(checkpoint.lineage(f"s3://lake/{name}")) > 1, 300, f"checkpoint of {name}")

    def accuracy(self, name: str) -> float:
        """Of the run's last validation; each of its steps stands once."""
        rows = checkpoint.read_metrics(f"s3://lake/{name}")
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return [row["val_accuracy"] for row in rows if "val_accuracy" in row][-1]


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
    cluster.done(cluster.submit("evaluate", "s3://lake/calm", "--workers", "2"))
    scored = json.loads(storage.read("s3://lake/calm/evaluation-val.json"))["accuracy"]  # of the best checkpoint
    assert abs(scored - undisturbed) <= 0.02
    rows = checkpoint.read_metrics("s3://lake/calm")
    assert {row["workers"] for row in rows if "workers" in row} <= {2}
    assert undisturbed > 0.95


def test_a_worker_host_that_dies_costs_no_accuracy(cluster, undisturbed):
    job = cluster.train("killed")
    cluster.underway("killed")
    cluster.workers[1].kill()
    cluster.start(cluster.workers[1])  # another machine, by the autoscaler
    said = cluster.done(job)
    print(said)
    assert abs(cluster.accuracy("killed") - undisturbed) <= 0.005


def test_a_worker_host_cut_off_for_half_a_minute_costs_no_accuracy(cluster, undisturbed):
    job = cluster.train("cut")
    cluster.underway("cut")
    cluster.workers[1].cut()
    try:
        time.sleep(30)  # the length of the outage is what is tested
    finally:
        cluster.workers[1].mend()
    print(cluster.done(job))
    assert abs(cluster.accuracy("cut") - undisturbed) <= 0.005


def test_after_the_head_died_the_same_command_goes_on_and_nothing_older_is_read(cluster, undisturbed):
    job = cluster.train("headless")
    cluster.underway("headless")
    cluster.head.kill()
    before = checkpoint.lineage("s3://lake/headless")[0].samples
    cluster.start(cluster.head)
    assert job.wait(400) == 122, job.communicate()[1][-3000:]
    job.communicate()
    again = cluster.train("headless")
    print(cluster.done(again))
    assert book.newest("s3://lake/store", "headless") == 2
    ledger = checkpoint.lineage("s3://lake/headless")
    assert ledger[0].samples > before
    assert abs(cluster.accuracy("headless") - undisturbed) <= 0.005
