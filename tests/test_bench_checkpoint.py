"""The checkpoint bench: what it measures is what it says, at a hundredth of the size."""

import json
import socket
import threading
import time

import pytest

from jobs.__main__ import main
from jobs.bench.checkpoint import resnet50, tensors
from jobs.bench.slow_road import slow_road
from pipeline import storage

SMALL = ["--saves", "2", "--every", "0.5", "--size", "0.05", "--rounds", "1", "--json"]


def test_the_state_has_the_size_of_resnet_50_with_momentum_and_an_average():
    assert sum(t.numel() for t in resnet50(1.0)["model"].values()) == 25_557_032
    assert sum(t.nbytes for t in tensors(resnet50(1.0))) == 3 * 4 * 25_557_032


@pytest.mark.slow
def test_it_measures_what_it_says_and_leaves_nothing(ray_local, s3, capsys):
    store = s3.fresh()
    storage.write(storage.join(store, "theirs"), b"stays")
    assert main(["bench", "checkpoint", "--store", store, *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["ratio"] < 1
    assert len(found["blocked_s"]) == len(found["ray"]["blocked_s"]) == 2
    assert found["slow_down"] < 1
    assert found["upload"]["ours"] == found["rate"] > 0
    assert found["slow_road"].keys() == found["upload"].keys()
    assert [file.path for file in storage.list_files(store)] == ["theirs"]


def test_the_slow_road_carries_so_many_bytes_a_second_and_answers_late():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo():
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

        threading.Thread(target=echo, daemon=True).start()
        with (
            slow_road(*server.getsockname(), 1e6, 0.1) as port,
            socket.create_connection(("127.0.0.1", port)) as client,
        ):
            began = time.monotonic()
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            assert time.monotonic() - began >= 0.2
            began, got = time.monotonic(), 0
            client.sendall(bytes(300_000))
            while got < 300_000:
                got += len(client.recv(1 << 16))
            assert time.monotonic() - began >= 0.3
