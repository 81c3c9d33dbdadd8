"""S3 alone: wrong credentials, an endpoint that fails, a fork, Ctrl-C."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
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
    real, kept = multipart.each, []

    async def each(work, size):
        monkeypatch.setattr(multipart, "each", real)
        replaced = asyncio.Event()

        async def one(number, start, end):
            if number > 0:
                await replaced.wait()
                return await work(number, start, end)
            kept.append(await work(number, start, end))
            client = await objects.filesystem(path)[0].set_session()
            await multipart.put(client, objects._address(path), memoryview(after))
            replaced.set()
            return kept[0]

        return await real(one, size)

    monkeypatch.setattr(multipart, "each", each)
    assert storage.read(path) == after
    assert kept == [before[: multipart.PART_BYTES]]


@contextlib.contextmanager
def interrupted(call, path, begun):
    """A process whose `call` on `path` met Ctrl-C once `begun()`, and which lives on after it."""
    code = f"""
import signal, sys
from pipeline import storage
from pipeline.storage import multipart
multipart._AT_ONCE = 2  # so that a slow proxy keeps us here for seconds
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
try:
    {call}
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_for(begun, 60, "request of the child")
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_an_interrupted_write_leaves_neither_an_object_nor_an_upload(faulty, s3, monkeypatch, method):
    place, passed_on = s3.fresh(), faulty.fault_for

    def late(method):
        passed_on(method)
        time.sleep(0.5 if method in ("POST", "PUT") else 0)  # what is under way reaches the store after the abort

    monkeypatch.setattr(faulty, "fault_for", late)
    call = "storage.write(sys.argv[1], bytes(12 * multipart.PART_BYTES))"
    with interrupted(call, f"{place}/x", lambda: faulty.seen.get(method)):
        time.sleep(1)
        assert faulty.seen.get("PUT", 0) < 12
        assert faulty.seen["DELETE"] == 1
        assert not uploads(s3, place)
        assert not storage.exists(f"{place}/x")


def test_an_interrupted_read_asks_for_no_more(faulty, s3):
    path = f"{s3.fresh()}/x"
    storage.write(path, bytes(12 * multipart.PART_BYTES))
    faulty.fault_every(1, "GET", ["slow"])
    with interrupted("storage.read(sys.argv[1])", path, lambda: faulty.seen.get("GET", 0) > 1):
        time.sleep(3)  # a read that went on would end in it
        assert faulty.seen["GET"] < 13


class Unwilling:
    """A client that starts uploads and can neither add to them nor abort them."""

    async def create_multipart_upload(self, **_):
        return {"UploadId": "u1"}

    async def upload_part(self, **_):
        raise RuntimeError("power cut")

    async def abort_multipart_upload(self, **_):
        raise RuntimeError("no abort")


def test_an_abort_that_fails_does_not_hide_what_went_wrong_before():
    with pytest.raises(RuntimeError, match="power cut") as e:
        asyncio.run(multipart.put(Unwilling(), {"Bucket": "b", "Key": "k"}, memoryview(bytes(LARGE))))
    assert any("u1" in note and "no abort" in note for note in e.value.__notes__)


def test_parts_are_never_more_than_an_upload_may_have():
    assert len(multipart.spans(10**12)) <= 10_000
    assert multipart.spans(10**12)[-1][1] == 10**12
    assert multipart.spans(1) == [(0, 1)]


def test_what_other_tools_mark_folders_by_is_no_file(s3):
    place = s3.fresh()
    for key in ("", "sub/", "sub/x"):
        objects._s3(f"{place}/{key}", "put_object", Body=b"")
    assert [file.path for file in storage.list_files(place)] == ["sub/x"]
