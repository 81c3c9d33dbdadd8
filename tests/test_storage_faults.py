"""S3 alone: wrong credentials, an endpoint that fails, a fork."""

import os
import signal
import time

import pytest
from faulty_proxy import FaultyProxy
from s3_server import wait_for

from pipeline import storage
from pipeline.storage import multipart, objects


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


def uploads(s3, place):
    """Uploads under way below `place`."""
    bucket, _, prefix = place.removeprefix("s3://").partition("/")

    def ask(client):
        return client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)

    return objects._on_client(place, ask).get("Uploads", [])


LARGE = 3 * multipart.PART_BYTES + 12_345


@pytest.mark.parametrize("size", [2 * multipart.PART_BYTES - 1, 2 * multipart.PART_BYTES, LARGE])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_large_objects_go_up_and_come_down_in_parts_and_are_the_same(s3, size, kind):
    path, data = f"{s3.fresh()}/x", os.urandom(size)
    storage.write(path, kind(data))
    assert storage.read(path) == data
    read, tag = storage.read_tagged(path)
    assert read == data
    storage.replace(path, b"small", tag)
    assert storage.read(path) == b"small"


@pytest.mark.parametrize("fault", ["slow down", "unacknowledged"])
def test_parts_that_fail_are_sent_again(faulty, s3, fault):
    path, data = f"{s3.fresh()}/x", os.urandom(LARGE)
    faulty.faults = [("PUT", fault)] * 2
    storage.write(path, data)
    assert faulty.done[fault] == 2
    assert storage.read(path) == data


@pytest.mark.parametrize("fault", ["cut", "reset", "slow down"])
def test_parts_that_are_cut_are_fetched_again(faulty, s3, fault):
    path, data = f"{s3.fresh()}/x", os.urandom(LARGE)
    storage.write(path, data)
    faulty.fault_every(3, "GET", [fault])
    assert storage.read(path) == data
    assert faulty.done[fault] >= 1


def test_an_upload_that_fails_leaves_no_part_of_it(s3, monkeypatch):
    place = s3.fresh()
    storage.write(f"{place}/x", b"before")

    real = multipart.each

    async def half(work, size):
        await work(0, 0, multipart.PART_BYTES)
        raise RuntimeError("power cut")

    monkeypatch.setattr(multipart, "each", half)
    with pytest.raises(RuntimeError, match="power cut"):
        storage.write(f"{place}/x", bytes(LARGE))
    monkeypatch.setattr(multipart, "each", real)
    assert storage.read(f"{place}/x") == b"before"
    assert not uploads(s3, place)


def test_an_object_replaced_while_it_comes_down_is_read_as_one_or_the_other(s3, monkeypatch):
    path, before, after = f"{s3.fresh()}/x", os.urandom(LARGE), os.urandom(LARGE)
    storage.write(path, before)
    real, replaced = multipart.each, []

    async def each(work, size):
        if replaced == []:
            replaced.append(await work(0, 0, 1000))
            client = await objects.filesystem(path)[0].set_session()
            monkeypatch.setattr(multipart, "each", real)
            await multipart.put(client, objects._address(path), memoryview(after))
        return await real(work, size)

    monkeypatch.setattr(multipart, "each", each)
    assert storage.read(path) == after
    assert replaced == [before[:1000]]


def test_parts_are_never_more_than_an_upload_may_have():
    assert len(multipart.spans(10**12)) <= 10_000
    assert multipart.spans(10**12)[-1][1] == 10**12
    assert multipart.spans(1) == [(0, 1)]


def test_what_other_tools_mark_folders_by_is_no_file(s3):
    place = s3.fresh()
    for key in ("", "sub/", "sub/x"):
        objects._s3(f"{place}/{key}", "put_object", Body=b"")
    assert [file.path for file in storage.list_files(place)] == ["sub/x"]
