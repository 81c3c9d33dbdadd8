"""A notice of the cloud reaches Ray, whatever the metadata server answers before. With real nodes: test_nodes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from metadata_server import MetadataServer
from ray_head import ROOT
from s3_server import wait_for

from cluster import preemption
from cluster.preemption import Ec2, Gce, find_cloud, watch

CLOUDS = {"ec2": Ec2, "gce": Gce}


@pytest.fixture(params=CLOUDS)
def server(request):
    with MetadataServer(request.param) as server:
        yield server


def cloud(server):
    return CLOUDS[server.cloud](server.url)


def test_without_a_notice_there_is_none_and_one_has_its_deadline(server):
    one = cloud(server)
    assert one.look() is None
    server.notice(100)
    found = one.look()
    seconds = found.deadline - time.time()
    assert (95 < seconds <= 100) if server.cloud == "ec2" else (25 < seconds <= 30)
    assert "preempts" in found.why or "will terminate" in found.why
    later = one.look()
    assert later.deadline == pytest.approx(found.deadline, abs=1.5)  # asking again gives no more time


def test_of_both_clouds_the_one_that_answers_is_found(server):
    found = find_cloud([Gce(server.url), Ec2(server.url)], 5)
    assert type(found) is CLOUDS[server.cloud]


def test_maintenance_that_ends_a_vm_is_a_notice():
    with MetadataServer("gce") as server:
        server.maintenance = "MIGRATE_ON_HOST_MAINTENANCE"
        assert cloud(server).look() is None
        server.maintenance = "TERMINATE_ON_HOST_MAINTENANCE"
        assert "maintenance" in cloud(server).look().why


def test_a_notice_that_was_taken_back_and_comes_again_has_its_whole_time(monkeypatch):
    with MetadataServer("gce") as server:
        one = cloud(server)
        server.maintenance = "TERMINATE_ON_HOST_MAINTENANCE"
        first = one.look()
        server.maintenance = "NONE"
        assert one.look() is None
        monkeypatch.setattr("cluster.clouds.time.time", lambda: first.deadline + 1000)
        server.maintenance = "TERMINATE_ON_HOST_MAINTENANCE"
        assert one.look().deadline == first.deadline + 1060


def test_a_token_that_ended_before_its_time_is_asked_for_anew():
    with MetadataServer("ec2") as server:
        one = cloud(server)
        assert one.look() is None
        server.tokens.clear()
        server.notice()
        assert one.look()


@pytest.mark.parametrize("told", [b'{"action": "terminate"}', b'{"action": "terminate", "time": "soon"}'])
def test_a_notice_that_does_not_say_when_is_one_nevertheless(told):
    with MetadataServer("ec2") as server:
        server.body = told
        found = cloud(server).look()
        assert 100 < found.deadline - time.time() <= 120


def test_no_bad_answer_ends_the_watch_and_the_drain_is_repeated_until_ray_takes_it(server, capfd):
    garbage = [b"<html>", b"{}", b"[]", b"\xff\xfe", b'{"action": "dance"}']
    server.faults = [500, 503, "hang up", *garbage, 404, 429]
    drained, one = [], cloud(server)

    def look():
        if not server.faults:
            server.notice()
        return one.look()

    def drain(notice) -> None:
        drained.append(notice)
        if len(drained) < 3:
            raise RuntimeError("the head does not answer")

    watch(look, drain, 0.01)
    assert len(drained) == 3
    said = capfd.readouterr().err
    assert "Ray has not been told: the head does not answer" in said
    assert said.count("the head does not answer") == 1  # once, however often it was tried


def test_a_server_that_hangs_is_left_and_asked_again(server):
    server.faults = ["hang"]
    drained, one = [], cloud(server)

    def look():
        if not server.faults:
            server.notice()
        return one.look()

    watch(look, drained.append, 0.01)
    assert len(drained) == 1


def test_a_notice_that_the_machine_outlived_drains_nothing_and_a_new_one_does(capfd):
    with MetadataServer("ec2") as server:
        server.notice(-3600)
        drained, looks, one = [], [], cloud(server)

        def look():
            looks.append(1)
            if len(looks) == 4:
                server.notice(-5)  # seen late, or by a clock that is ahead: the machine is still there
            return one.look()

        watch(look, drained.append, 0.01)
        assert len(looks) == 4
        assert 0 < drained[0].deadline - time.time() <= 1
        assert capfd.readouterr().err.count("has outlived its notice") == 1


def test_a_raised_risk_is_told_once_and_not_acted_on(capfd):
    with MetadataServer("ec2") as server:
        server.advice, one = b'{"noticeTime": "2026-11-27T08:22:00Z"}', cloud(server)
        assert [one.look() for _ in range(3)] == [None] * 3
        assert capfd.readouterr().err.count("raised risk") == 1


def test_where_no_cloud_answers_it_says_so_and_a_signal_ends_it():
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def watcher(*words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "cluster.preemption", *words]
        return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)

    with watcher("--metadata", "http://127.0.0.1:9") as nowhere:
        _, said = nowhere.communicate(timeout=60)
    assert nowhere.returncode == 2
    assert "neither EC2 nor GCE answers" in said
    for number in (signal.SIGTERM, signal.SIGINT):
        with MetadataServer("ec2") as server, watcher("--metadata", server.url) as watching:
            wait_for(lambda server=server: any("instance-action" in path for path in server.seen), 60, "look")
            watching.send_signal(number)
            _, said = watching.communicate(timeout=30)
        assert watching.returncode == 128 + number
        assert "Traceback" not in said


@pytest.mark.parametrize(
    "words",
    [["--now"], ["--deadline", "5"], ["--node-id", "x"], ["--metadata", "ftp://a"], ["--interval", "0"],
     ["--address", "http://a:1"]],
)  # fmt: skip
def test_a_wrong_command_line_is_refused(words, capsys):
    with pytest.raises(SystemExit) as refused:
        preemption.parse(words)
    assert refused.value.code == 2
    assert "error:" in capsys.readouterr().err
