"""A job's exit code is its own, whatever happens to the connections and to the dashboard meanwhile."""

import asyncio
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ray_head import TOKEN, CuttingProxy, RayHead

from cluster import follow
from cluster.follow import FAILED, LOST, STOPPED, _Log, outcome
from cluster.head import Head, Unreachable

RUNS = int(os.environ.get("MILLSTREAM_TEST_RUNS", "30"))  # 200 for the README's figure


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def test_each_way_to_end_has_an_exit_code_of_its_own():
    def code(status, **more):
        return outcome("j", {"status": status} | more).exit_code

    assert code("SUCCEEDED", driver_exit_code=0) == 0
    assert code("FAILED", driver_exit_code=2, error_type="JOB_ENTRYPOINT_COMMAND_ERROR") == 2
    assert code("FAILED", driver_exit_code=-9) == 137
    assert code("FAILED", error_type="RUNTIME_ENV_SETUP_FAILURE", message="a\nno such zip") == FAILED
    assert code("STOPPED") == STOPPED
    assert outcome("j", None).exit_code == LOST
    assert outcome("j", {"status": "RUNNING"}) is outcome("j", {"status": "PENDING"}) is None


def test_a_log_that_is_sent_again_from_its_beginning_is_shown_once():
    for seed in range(50):
        draw, text, shown = random.Random(seed), "".join(f"line {i}\n" for i in range(60)), []
        log = _Log(shown.append)
        for _ in range(8):
            log.restart()
            at, end = 0, draw.randrange(len(text))
            while at < end:
                step = draw.randrange(1, 50)
                log.more(text[at : min(at + step, end)])
                at += step
        log.whole(text)
        assert "".join(shown) == text


class NodeIsGone(BaseHTTPRequestHandler):
    """A head that knows how a job ended, and cannot reach the node that has its log."""

    def do_GET(self) -> None:
        ended = self.path == "/api/jobs/j"
        self.send_response(200 if ended else 500)
        self.end_headers()
        self.wfile.write(b'{"status": "FAILED", "driver_exit_code": 3}' if ended else b"Traceback\nTimeoutError")

    def log_message(self, *_) -> None:
        pass


def test_the_outcome_counts_though_the_log_is_gone_with_its_node(monkeypatch):
    monkeypatch.setattr("cluster.head._LOG_S", 1.0)
    shown: list[str] = []

    async def wait(address: str):
        async with Head(address, patience=60) as head:
            return await follow.follow(head, "j", shown.append)

    with ThreadingHTTPServer(("127.0.0.1", 0), NodeIsGone) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ended = asyncio.run(wait(f"http://127.0.0.1:{server.server_address[1]}"))
        server.shutdown()
    assert (ended.exit_code, shown) == (3, [])


class TakesNoJob(NodeIsGone):
    """A head that knows no job, and fails at each that it is given."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.end_headers()
        self.wfile.write(b"Job j does not exist")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b"No available agent to submit job, please try again later.")


def test_a_head_that_takes_no_job_is_not_asked_for_ever():
    async def submit(address: str):
        async with Head(address, patience=1) as head:
            await head.submit({"submission_id": "j"})

    with ThreadingHTTPServer(("127.0.0.1", 0), TakesNoJob) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(Unreachable, match="No available agent"):
            asyncio.run(submit(f"http://127.0.0.1:{server.server_address[1]}"))
        server.shutdown()


async def one(address: str, job: str, code: int, seconds: float) -> tuple[follow.Outcome, str]:
    """Submits a job of `seconds` that prints 20 lines and exits with `code`, and follows it."""
    script = f"for i in $(seq 20); do echo {job} $i; sleep {seconds / 20:.3f}; done; exit {code}"
    shown: list[str] = []
    async with Head(address, patience=120) as head:
        await head.submit({"entrypoint": script, "submission_id": job, "runtime_env": {}, "metadata": {}})
        return await follow.follow(head, job, shown.append), "".join(shown)


async def many(address: str, runs: int, at_once: int) -> list[tuple[int, follow.Outcome, str, str]]:
    draw, free = random.Random(1), asyncio.Semaphore(at_once)

    async def bounded(n: int, code: int, seconds: float):
        async with free:
            ended, text = await one(address, f"cut-{n}", code, seconds)
            return code, ended, text, f"cut-{n}"

    codes = [draw.choice([0, 0, 1, 2, 3, 42, 130, 143]) for _ in range(runs)]
    return await asyncio.gather(*(bounded(n, code, draw.uniform(0.5, 6)) for n, code in enumerate(codes)))


def check(found) -> None:
    for code, ended, text, job in found:
        assert ended.exit_code == code, (job, code, ended)
        lines = [line for line in text.splitlines() if line.startswith(f"{job} ")]
        assert lines == [f"{job} {i}" for i in range(1, 21)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_exit_codes_and_logs_are_right_through_cut_connections_and_restarts_of_the_dashboard(token):
    with RayHead() as head, CuttingProxy(head.dashboard, (1, 5)) as proxy:
        restarts, enough = 0, threading.Event()

        def restart() -> None:
            nonlocal restarts
            while not enough.wait(12):
                head.restart_dashboard()
                restarts += 1

        with ThreadPoolExecutor() as pool:
            restarting = pool.submit(restart)
            try:
                found = asyncio.run(many(proxy.address, RUNS, 6))
            finally:
                enough.set()
            restarting.result()
        check(found)
        print(f"{RUNS} runs, {proxy.cuts} connections cut, {restarts} restarts of the dashboard")
        assert proxy.cuts > RUNS / 2
        assert restarts >= 2
