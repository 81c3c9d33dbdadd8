"""S3 alone: wrong credentials, an endpoint that fails, a fork."""

import os
import signal
import time

import pytest
from faulty_proxy import FaultyProxy
from s3_server import wait_for

from pipeline import storage


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_or_missing_credentials_name_the_variable(s3, monkeypatch, variable):
    place = s3.fresh()
    for change in (lambda: monkeypatch.setenv(variable, "wrong"), lambda: monkeypatch.delenv(variable)):
        change()
        for call in (storage.read, storage.exists, storage.list_files, lambda path: storage.write(path, bytes(2**25))):
            with pytest.raises(PermissionError, match=variable):
                call(f"{place}/x")


def test_an_endpoint_that_is_not_there_is_reported_soon(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(storage.StorageError, match=r"127\.0\.0\.1:9") as e:
        storage.read("s3://bucket/key")
    assert time.monotonic() - began < 15
    assert e.value.filename == "s3://bucket/key"


def test_a_forked_child_reads_with_a_connection_of_its_own(s3):
    path = f"{s3.fresh()}/x"
    storage.write(path, b"1")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if storage.read(path) == b"1" else 1)
    try:
        status = wait_for(lambda: (done := os.waitpid(pid, os.WNOHANG))[0] and [done[1]], 30, "answer of the child")
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        raise
    assert status == [0]


@pytest.fixture
def faulty(s3, monkeypatch):
    with FaultyProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def test_a_body_cut_midway_is_fetched_again(faulty, s3):
    path, data = f"{s3.fresh()}/x", os.urandom(100_000)
    storage.write(path, data)
    faulty.faults = [("GET", "cut")] * 2
    assert storage.read(path) == data
    faulty.faults = [("GET", "cut")]
    assert storage.read_range(path, 10, 90_000) == data[10:90_000]
    faulty.faults = [("GET", "cut")] * 20
    with pytest.raises(storage.StorageError):
        storage.read(path)
    assert 10 < len(faulty.faults) < 20


def test_slow_down_and_lost_connections_are_waited_out(faulty, s3):
    path, data = f"{s3.fresh()}/x", os.urandom(20 * 2**20)
    faulty.faults = [("PUT", "slow down"), ("PUT", "unacknowledged"), ("GET", "unacknowledged"), ("GET", "slow down")]
    storage.write(path, data)
    assert storage.read(path) == data
    assert faulty.faults == []


def test_a_create_only_write_knows_its_own_success_when_the_acknowledgement_was_lost(faulty, s3):
    path = f"{s3.fresh()}/x"
    faulty.faults = [("PUT", "unacknowledged")]
    tag = storage.write_new(path, b"mine")
    assert (faulty.faults, faulty.seen["PUT"]) == ([], 2)
    faulty.faults = [("PUT", "unacknowledged")]
    tag = storage.replace(path, b"mine again", tag)
    assert storage.read_tagged(path) == (b"mine again", tag)
    faulty.faults = [("PUT", "slow down")]
    with pytest.raises(FileExistsError):
        storage.write_new(path, b"another's")
