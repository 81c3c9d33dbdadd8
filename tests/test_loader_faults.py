"""A store that fails, and kills: what is read is right, an outage is waited out, and nothing is left behind."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from faulty_proxy import FaultyProxy
from s3_server import wait_for

from pipeline import storage
from pipeline.loading.augment import Augment
from pipeline.loading.cache import Cache
from pipeline.loading.fetching import read_patiently
from pipeline.loading.order import Batching
from pipeline.loading.steps import Steps
from pipeline.shards import index
from pipeline.storage import objects

AUGMENT, BATCH, SEED = Augment(32, 1), 64, 11
BLOCK, HERE = 1 << 16, os.path.dirname(__file__)


def upload(folder, root):
    for file in storage.list_files(folder):
        storage.write(f"{root}/{file.path}", storage.read(f"{folder}/{file.path}"))
    return root


def split_of(root):
    return index.load(root).split("train")


def epoch(split, cache=None):
    """{row: its pixels} of the steps that lie in one epoch whole; none of them may stand in for another."""
    others, pixels = set(threading.enumerate()), {}
    steps = iter(Steps(split, AUGMENT, SEED, Batching(BATCH), cache=cache))
    try:
        for _ in range(len(split) // BATCH):
            (batch,) = next(steps).micro_batches
            assert batch.weights.numpy().all()
            pixels |= zip(batch.rows.tolist(), batch.images.numpy().copy(), strict=True)
    finally:
        steps.close()
        wait_for(lambda: not [t for t in set(threading.enumerate()) - others if "Pool" in t.name], 30, "end of threads")
    assert len(pixels) == len(split) // BATCH * BATCH
    return pixels


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[row], other[row]) for row in one)


@pytest.fixture(scope="module")
def whole(digits):
    """The epoch from local disk."""
    return epoch(split_of(digits))


@pytest.fixture(scope="module")
def uploaded(digits, s3):
    return upload(digits, s3.fresh())


@pytest.fixture
def faulty(s3, monkeypatch):
    with FaultyProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(params=["streamed", "cached"])
def cache(request, tmp_path):
    return Cache(str(tmp_path / "cache"), 1 << 30, BLOCK) if request.param == "cached" else None


def test_refusals_resets_cuts_and_slow_reads_change_no_pixel(uploaded, whole, faulty, cache):
    split = split_of(uploaded)
    kinds = ["slow down", "reset", "cut", "slow", "unacknowledged"]
    faulty.fault_every(4, "GET", kinds)  # each kind is 5 % of the requests
    assert same(epoch(split, cache), whole)
    if not cache:  # else the requests are few
        assert all(faulty.done.get(kind, 0) >= 2 for kind in kinds)
    assert sum(faulty.done.get(kind, 0) for kind in kinds) >= 2


def test_bytes_garbled_on_their_way_are_fetched_again_and_not_kept(uploaded, whole, faulty, cache):
    split = split_of(uploaded)
    faulty.faults = [("GET", "zeros")] * 2
    for _ in range(2 if cache else 1):
        assert same(epoch(split, cache), whole)
    assert faulty.done["zeros"] == 2


def messages(caught):
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


class Killing(FaultyProxy):
    """Kills the server at the request that takes `left` to 0."""

    left, server = 0, None

    def fault_for(self, method):
        fault = super().fault_for(method)
        with self.lock:
            self.left -= 1
            if self.left == 0:
                self.server.kill()
        return fault


# Alone, the store's client gives up after 2 to 6 s. That the reader waits on begins to show in its warning.
@pytest.mark.parametrize(
    ("kept", "seconds"),
    [(False, 0), pytest.param(False, 10, marks=pytest.mark.slow), pytest.param(True, 10, marks=pytest.mark.slow)],
)
def test_an_outage_in_the_middle_of_an_epoch_is_waited_out(uploaded, whole, s3, tmp_path, monkeypatch, kept, seconds):
    cache = Cache(str(tmp_path / "cache"), 1 << 30, BLOCK) if kept else None
    with Killing(s3.endpoint) as proxy, ThreadPoolExecutor(1) as pool, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        split = split_of(uploaded)
        proxy.server, proxy.left = s3, 10
        try:
            read = pool.submit(epoch, split, cache)
            wait_for(lambda: s3.process.poll() is not None, 20, "end of the server")
            wait_for(lambda: messages(caught) or read.done(), 20, "warning")
            time.sleep(seconds)
        finally:
            s3.start()  # from this thread: it ends with the one that started it
        assert same(read.result(60), whole)
    (told,) = messages(caught)
    assert told.startswith(f"waiting up to 120 s for the store: {proxy.endpoint}")


@pytest.fixture
def impatient(faulty, monkeypatch):
    """The proxy, before a client that does not try again by itself: what waits is `read_patiently`."""
    monkeypatch.setattr(objects, "_ATTEMPTS", 1)
    return faulty


def test_patience_ends_with_an_error_that_names_the_path(s3, impatient):
    path = f"{s3.fresh()}/x"
    storage.write(path, b"12345")
    impatient.fault_every(1, "GET", ["slow down"])
    began = time.monotonic()
    with pytest.warns(UserWarning, match="waiting up to 1 s"), pytest.raises(storage.StorageError) as e:
        read_patiently(path, 0, 5, patience=1)
    assert 1 <= time.monotonic() - began < 5
    assert e.value.filename == path
    assert "gave up after 1 s" in str(e.value)
    assert impatient.seen["GET"] > 2


@pytest.mark.parametrize("fault", ["slow down", "reset", "cut", "unacknowledged"])
def test_every_fault_of_a_store_is_waited_out_with_one_warning_for_all_threads(s3, impatient, fault):
    path, data = f"{s3.fresh()}/x", os.urandom(200_000)
    storage.write(path, data)
    impatient.fault_every(1, "GET", [fault])
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        reads = [pool.submit(read_patiently, path, 10, 200_000) for _ in range(4)]
        wait_for(lambda: impatient.done.get(fault, 0) >= 8, 20, "faults")
        impatient.fault_every(1, "GET", [None])
        assert all(read.result(30) == data[10:] for read in reads)
    assert len(messages(caught)) == 1


def test_a_reader_that_is_not_wanted_any_more_stops_waiting(s3, impatient):
    path, stop = f"{s3.fresh()}/x", threading.Event()
    impatient.fault_every(1, "GET", ["slow down"])
    with ThreadPoolExecutor(1) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = pool.submit(read_patiently, path, 0, 5, 100, stop)
        wait_for(lambda: impatient.seen.get("GET", 0) >= 2, 20, "second attempt")
        stop.set()
        with pytest.raises(storage.StorageError):
            read.result(10)


def test_what_waiting_does_not_mend_is_an_error_at_once(s3, faulty, monkeypatch):
    path = f"{s3.fresh()}/x"
    storage.write(path, bytes(100))
    before = faulty.seen.get("GET", 0)
    with pytest.raises(FileNotFoundError, match="/absent"):
        read_patiently(f"{path}/absent", 0, 5)
    for start in (50, 500):
        with pytest.raises(storage.StorageError, match=r"truncated.*/x"):
            read_patiently(path, start, start + 100)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionError, match="/x"):
        read_patiently(path, 0, 5)
    assert faulty.seen["GET"] == before + 4


def test_a_missing_or_truncated_shard_is_an_error_that_names_it_at_once(digits, s3, cache):
    root = upload(digits, s3.fresh())
    split = split_of(root)
    shard = f"{root}/{split.shards[2]}"
    data = storage.read(shard)
    for damage, error in ((data[: len(data) // 2], storage.StorageError), (None, FileNotFoundError)):
        storage.delete(shard) if damage is None else storage.write(shard, damage)
        began = time.monotonic()
        with pytest.raises(error, match=split.shards[2]):
            epoch(split, cache)
        assert time.monotonic() - began < 10


# Forks a loading process for each line it is told; that prints its id after an epoch, and its parent once it has ended.
LOADING = """
import os, sys
from test_loader_faults import BLOCK, Cache, epoch, split_of
for _ in sys.stdin:
    if (child := os.fork()) == 0:
        split, cache = split_of(sys.argv[1]), Cache(sys.argv[2], 1 << 30, BLOCK)
        while True:
            epoch(split, cache)
            print(os.getpid(), flush=True)
            for digest in split.digests:  # so that blocks are written all the time
                cache.forget(0, 1 << 24, digest)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_leave_nothing_behind_and_a_cache_that_reads_right(uploaded, whole, tmp_path, kills):
    seed = random.randrange(10**6)
    print("seed", seed)
    moments, folder, scratch = random.Random(seed), str(tmp_path / "cache"), tmp_path / "tmp"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join([HERE, *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING, uploaded, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    with process:
        try:
            for _ in range(kills):
                print(file=process.stdin, flush=True)
                child = int(process.stdout.readline())
                time.sleep(moments.uniform(0, 0.3))
                with open(f"/proc/{child}/maps") as file:
                    assert "/dev/shm" not in file.read()
                os.kill(child, signal.SIGKILL)
                while (line := process.stdout.readline()) != "ended\n":
                    assert line == f"{child}\n"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    cache = Cache(folder, 1 << 30, BLOCK)
    assert os.listdir(f"{folder}/blocks/partial") == []
    assert same(epoch(split_of(uploaded), cache), whole)
    assert cache.errors == 0
    assert os.listdir(scratch) == []
