import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from faulty_proxy import FaultyProxy
from s3_server import wait_for

from pipeline import lease, storage

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TTL = 1.5
HOLDER = """
import sys
from pipeline import lease
held = lease.claim(sys.argv[1], "the holder", ttl=float(sys.argv[2]))
print(held.token, flush=True)
for line in sys.stdin:
    try:
        print(held.check() or "ours", flush=True)
    except lease.Lost as e:
        print("lost", flush=True)
held.release()
"""


@contextlib.contextmanager
def holder(path: str, ttl: float = TTL) -> Iterator[subprocess.Popen]:
    """A process that holds the lease; it answers each line of its input with "ours" or "lost"."""
    command = [sys.executable, "-c", HOLDER, path, str(ttl)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        process.token = int(process.stdout.readline())
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def ask(process: subprocess.Popen) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def files(place: str) -> list[str]:
    return [file.path for file in storage.list_files(place)]


def test_a_lease_excludes_others_and_leaves_nothing_when_released(place):
    path = f"{place}/lease"
    with lease.claim(path, "first", ttl=TTL) as first:
        first.check()
        assert files(place) == ["lease"]
        with pytest.raises(lease.Held, match=f"first.*{socket.gethostname()}.*{os.getpid()}"):
            lease.claim(path, "second", ttl=TTL)
        first.check()
    assert files(place) == []
    with pytest.raises(lease.Lost):
        first.check()
    first.release()
    with lease.claim(path, "second", ttl=TTL) as second:
        first.release()
        second.check()
        assert second.token > first.token
    assert files(place) == []


def test_a_live_holder_in_another_process_is_named_and_keeps_its_lease(place):
    path, said = f"{place}/lease", []
    with holder(path) as process:
        with pytest.raises(lease.Held, match=f"the holder.*{process.pid}"):
            lease.claim(path, "another", ttl=TTL, waiting=said.append)
        assert ask(process) == "ours"
        process.communicate(timeout=30)
    assert files(place) == []
    assert len(said) == storage.is_remote(place)


def test_a_killed_holder_is_followed_by_one_with_a_greater_token(place):
    path = f"{place}/lease"
    with holder(path) as process:
        process.kill()
        process.wait(10)
        assert files(place) == ["lease"]
        began = time.monotonic()
        with lease.claim(path, "next", ttl=TTL) as mine:
            took = time.monotonic() - began
            mine.check()
            assert mine.token > process.token
    assert took > TTL if storage.is_remote(place) else took < 1
    assert files(place) == []


def test_one_of_several_claimants_wins(place):
    with ThreadPoolExecutor(5) as pool:

        def try_claim(path: str) -> lease.Lease | None:
            try:
                return lease.claim(path, threading.current_thread().name, ttl=TTL)
            except lease.Held:
                return None

        for n in range(2):
            won = [one for one in pool.map(try_claim, [f"{place}/{n}/lease"] * 5) if one]
            assert len(won) == 1
            won[0].check()
            won[0].release()


def test_one_of_several_claimants_takes_over_from_a_dead_holder(place):
    path = f"{place}/lease"
    with holder(path) as process:
        process.kill()
        process.wait(10)
    won = []

    def try_claim(name: str) -> None:
        with contextlib.suppress(lease.Held):
            won.append(lease.claim(path, name, ttl=TTL))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(try_claim, "abcd"))
    assert len(won) == 1
    won[0].check()
    won[0].release()


def test_taking_turns_under_contention_never_overlaps(place):
    path, inside, turns = f"{place}/lease", threading.Lock(), []

    def take_turns(name: str) -> None:
        end = time.monotonic() + 30
        for _ in range(4):
            while time.monotonic() < end:
                try:
                    with lease.claim(path, name, ttl=TTL):
                        assert inside.acquire(blocking=False)
                        turns.append(name)
                        inside.release()
                    break
                except lease.Held:
                    time.sleep(0.01)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(take_turns, "abc"))
    assert sorted(turns) == sorted("abc" * 4)
    assert files(place) == []


def test_a_lease_released_between_opening_and_locking_its_file_is_claimed_anew(tmp_path, monkeypatch):
    path = f"{tmp_path}/lease"
    first = lease.claim(path, "first")
    lock = lease.fcntl.flock

    def release_then_lock(fd, how):
        first.release()
        lock(fd, how)

    monkeypatch.setattr(lease.fcntl, "flock", release_then_lock)
    with lease.claim(path, "second") as second:  # not a lock on the file that is gone
        second.check()
        assert os.path.exists(path)


def test_a_holder_stopped_for_too_long_is_lost_on_s3_and_keeps_its_lock_locally(place):
    path = f"{place}/lease"
    with holder(path) as process:
        process.send_signal(signal.SIGSTOP)
        if storage.is_remote(place):
            with lease.claim(path, "next", ttl=TTL) as mine:
                assert mine.token > process.token
                process.send_signal(signal.SIGCONT)
                assert ask(process) == "lost"
                process.communicate(timeout=30)  # its release leaves ours alone
                mine.check()
                assert files(place) == ["lease"]
        else:
            with pytest.raises(lease.Held):
                lease.claim(path, "next", ttl=TTL)
            process.send_signal(signal.SIGCONT)
            assert ask(process) == "ours"


def test_a_lease_whose_file_was_removed_is_lost(place):
    with lease.claim(f"{place}/lease", "careless", ttl=0.6) as mine:
        storage.delete(f"{place}/lease")

        def lost():
            try:
                return mine.check()
            except lease.Lost:
                return True

        wait_for(lost, 10, "Lost")
    assert files(place) == []


def test_a_forked_child_neither_has_the_lease_nor_keeps_it_alive(place):
    path = f"{place}/lease"
    mine = lease.claim(path, "parent", ttl=TTL)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def live_on():
        try:
            theirs.send(mine.check())
        except lease.Lost:
            theirs.send("lost")
        mine.release()
        theirs.recv()

    child = context.Process(target=live_on)
    child.start()
    try:
        assert ours.poll(30)
        assert ours.recv() == "lost"
        mine.check()
        mine.release()
        with lease.claim(path, "next", ttl=TTL) as following:
            following.check()
    finally:
        ours.send("end")
        child.join(10)
        child.kill()
        child.join(10)


def test_what_cannot_hold_a_lease_is_refused():
    with pytest.raises(ValueError, match="leases need"):
        lease.claim("gs://bucket/lease", "nobody")
    with pytest.raises(ValueError, match="ttl"):
        lease.claim("lease", "nobody", ttl=0)


@pytest.fixture
def careless_store(s3, monkeypatch):
    """An S3 endpoint that accepts every write, whatever its conditions."""

    class Yes(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # answers Expect: 100-continue

        def do_PUT(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("ETag", '"0"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_DELETE = do_PUT

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Yes) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield
        server.shutdown()


def test_a_store_that_ignores_conditions_is_refused(careless_store):
    with pytest.raises(storage.StorageError, match="ignores If-None-Match"):
        lease.claim("s3://bucket/lease", "nobody")


def test_a_holder_cut_off_from_the_store_knows_itself_lost_before_another_takes_over(s3, monkeypatch):
    path = f"{s3.fresh()}/lease"
    with FaultyProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with holder(path) as process:
            proxy.faults = [("PUT", "slow down")] * 1000
            monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
            with lease.claim(path, "next", ttl=TTL) as mine:
                assert ask(process) == "lost"
                proxy.faults = []
                mine.check()


def test_a_renewal_whose_acknowledgement_was_lost_is_no_loss(s3, monkeypatch):
    with FaultyProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with lease.claim(f"{s3.fresh()}/lease", "patient", ttl=6) as mine:
            sent = proxy.seen["PUT"]
            proxy.faults = [("PUT", "unacknowledged")]
            wait_for(lambda: proxy.seen["PUT"] >= sent + 3, 20, "third renewal")
            mine.check()
