"""A Ray of our own: no other Ray disturbs it or is disturbed, and nothing of it is left, however its verb ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_head import plain_environment
from s3_server import wait_for

from cluster.reap import of_session
from cluster.session import ray_session

# A verb that opens a session, tells where it lies, runs a task and waits for a line.
VERB = """
import os, sys
from cluster.session import ray_session
with ray_session(2):
    import ray
    task = ray.remote(lambda: os.getppid())
    ray.get(task.remote())
    context = ray.get_runtime_context()
    folder = os.path.dirname(ray._private.worker._global_node.get_temp_dir_path())
    print(folder, context.gcs_address, len(ray.nodes()), flush=True)
    sys.stdin.readline()
print("RAY_AUTH_TOKEN" in os.environ, flush=True)
"""


@contextlib.contextmanager
def verb(**environment):
    """(process, session folder, address, nodes) of a running VERB."""
    process = subprocess.Popen(
        [sys.executable, "-c", VERB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=plain_environment(**environment), start_new_session=True,
    )  # fmt: skip
    try:
        folder, address, nodes = process.stdout.readline().split()
        yield process, folder, address, int(nodes)
    finally:
        process.kill()
        process.communicate(timeout=30)


def ended(folder):
    return not os.path.exists(folder) and not of_session(folder, set())


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    """Somebody else's Ray: its address, where a plain `ray.init()` finds it as well."""
    folder = Path(tmp_path_factory.mktemp("r", numbered=True))
    short = Path("/tmp") / f"stale-{os.getpid()}"  # a socket's path ends at 107 characters
    short.symlink_to(folder)
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
        f"--temp-dir={short}", "--include-dashboard=false", "--object-store-memory=80000000",
        "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=plain_environment(RAY_AUTH_MODE="disabled"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: answers(port) and list(short.glob("session_latest/sockets/raylet*")), 60, "stale Ray")
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        wait_for(lambda: reap(str(folder)), 20, "end of the stale Ray")
        short.unlink()


def reap(folder):
    left = of_session(folder, {os.getpid()})
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return not left


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_stale_ray_is_neither_picked_up_nor_disturbed_and_is_used_when_asked_for(stale):
    with verb() as (process, folder, address, nodes):
        assert address.rpartition(":")[2] != stale.rpartition(":")[2]
        assert nodes == 1
        assert Path(folder).name.startswith("millstream-ray-")
        assert process.communicate("\n", timeout=60)[0] == "False\n"  # the token goes with the session
        assert process.returncode == 0
        wait_for(lambda: ended(folder), 20, "end of the session")
    assert answers(int(stale.rpartition(":")[2]))
    with verb(RAY_ADDRESS=stale, RAY_AUTH_MODE="disabled") as (process, folder, address, nodes):
        assert address.rpartition(":")[2] == stale.rpartition(":")[2]  # Ray prefers the machine's own address
        process.communicate("\n", timeout=60)
    assert answers(int(stale.rpartition(":")[2]))


@pytest.mark.slow  # Ray itself tries for twenty seconds
def test_a_ray_with_another_token_is_told_from_one_that_does_not_answer():
    """A Ray's own default is a token in the home folder, which other machines and users do not have."""
    with verb() as (_, _, address, _):  # has a token that only it knows
        program = f"""
from cluster.session import ray_session
try:
    with ray_session(1, {address!r}):
        print("a Ray")
except ValueError as error:
    print(error)
"""
        environment = plain_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=100, check=False)
        assert "RAY_AUTH_TOKEN" in done.stdout
        assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_of_a_session_outlives_its_verb_for_more_than_seconds(number):
    shared = set(os.listdir("/dev/shm"))
    with verb() as (process, folder, _, _):
        assert len(of_session(folder, {process.pid})) >= 3  # the store of the cluster, the node, workers
        process.send_signal(number)
        process.wait(30)
        wait_for(lambda: ended(folder), 15, f"end of the session {of_session(folder, set())}")
    assert set(os.listdir("/dev/shm")) <= shared


def test_the_folder_of_a_session_is_private_to_its_user():
    with verb() as (_, folder, _, _):
        assert os.stat(folder).st_mode & 0o077 == 0


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "nonsense"])
def test_an_address_where_no_ray_answers_is_an_error_within_seconds(address):
    address = address.format(free_port())
    program = f"""
from cluster.session import ray_session
try:
    with ray_session(1, {address!r}):
        print("a Ray")
except ValueError as error:
    print(error)
"""
    before = time.monotonic()
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=plain_environment(), stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert address in done.stdout
    assert done.returncode == 0
    assert time.monotonic() - before < 20


def test_a_ray_that_runs_in_this_process_is_used_and_left_as_it_is(ray_local):
    before = ray_local.get_runtime_context().gcs_address
    with ray_session(7, "127.0.0.1:1"):
        assert ray_local.get_runtime_context().gcs_address == before
    assert ray_local.is_initialized()
