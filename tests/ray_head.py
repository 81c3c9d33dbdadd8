"""A real Ray head with its dashboard, as `ray start --head` makes it, of our own and bounded; a proxy that cuts."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from s3_server import wait_for

from cluster.reap import of_session

ROOT = Path(__file__).parents[1]
TOKEN = "0123456789abcdef0123456789abcdef"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def plain_environment(**more: str) -> dict[str, str]:
    """Ours without what the tests' own Ray has put there."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "MILLSTREAM_SCRATCH"}
    return kept | {"RAY_USAGE_STATS_ENABLED": "0"} | more


class RayHead:
    """`ray start --head`; token: None for RAY_AUTH_MODE=disabled. A context manager. `kill` ends what `ray` started,
    and leaves what the jobs started; `start` begins anew with an empty memory, on the same port."""

    def __init__(self, token: str | None = TOKEN, cpus: int = 2, env: dict | None = None):
        self.token, self.cpus, self.env = token, cpus, env or {}
        self.folder = tempfile.mkdtemp(prefix="ms-head-", dir="/tmp")  # sockets below it have short names only
        self.port, self.dashboard = free_port(), free_port()
        self.process, self.lives = None, 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def start(self) -> "RayHead":
        env = plain_environment(**self.env)
        env |= {"RAY_AUTH_MODE": "token" if self.token else "disabled"}
        env |= {"RAY_AUTH_TOKEN": self.token} if self.token else {}
        env |= {
            "HOME": self.folder,
            "TMPDIR": self.folder,  # of jobs that are killed
            "RAY_JOB_STOP_WAIT_TIME_S": "30",
            "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
        }
        env.pop("PYTHONPATH", None)  # the code must come by the package
        self.lives += 1
        self.session = f"{self.folder}/{self.lives}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={self.port}"]
        command += [f"--dashboard-port={self.dashboard}", "--dashboard-host=127.0.0.1", f"--num-cpus={self.cpus}"]
        command += ["--node-ip-address=127.0.0.1", f"--temp-dir={self.session}", "--object-store-memory=150000000"]
        command += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", "--block"]
        with open(f"{self.folder}/log", "ab") as log:
            self.process = subprocess.Popen(
                command, env=env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        wait_for(self.ready, 120, f"Ray head, see {self.folder}/log")
        return self

    def ready(self) -> bool:
        assert self.process.poll() is None, Path(f"{self.folder}/log").read_text()[-2000:]
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{self.address}/api/jobs/", headers=headers), timeout=5
            ):
                return True
        except OSError:
            return False

    def processes(self, *words: str) -> list[int]:
        """Those of the head whose command line has one of `words`."""
        found = []
        for pid in of_session(self.session, set()):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if any(word in line for word in words):
                    found.append(pid)
        return found

    def restart_dashboard(self) -> None:
        """Ends the dashboard, starts it again, as its supervisor in a pod would, and waits until it answers."""
        pids = [pid for pid in self.processes("dashboard/dashboard.py") if not _is_fork(pid)]
        for pid in pids:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
            pairs = [pair.split(b"=", 1) for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if pair]
            os.kill(pid, signal.SIGTERM)  # after a SIGKILL `ray start --block` would end the whole head
            wait_for(lambda pid=pid: not _alive(pid), 30, "end of the dashboard")
            with open(f"{self.session}/log-of-dashboard", "ab") as log:
                subprocess.Popen(words, env=dict(pairs), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                 start_new_session=True)  # fmt: skip
        assert pids
        wait_for(self.ready, 60, f"dashboard, see {self.session}/log-of-dashboard")

    def kill(self, spare: tuple[int, ...] = ()) -> None:
        """SIGKILLs GCS, raylet, dashboard and agents at once: a head that dies."""
        pids = self.processes("gcs_server", "raylet", "dashboard", "ray/_private", "monitor.py", "ray::")
        for pid in [self.process.pid, *pids]:
            if pid not in spare:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(20)

    def stop(self) -> None:
        deadline = time.monotonic() + 20
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait(20)
        while (left := of_session(self.folder, set())) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "RayHead":
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_) -> None:
        self.stop()


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def _is_fork(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        parent = file.read().rpartition(")")[2].split()[1]
    with contextlib.suppress(OSError):
        return b"dashboard.py" in Path(f"/proc/{parent}/cmdline").read_bytes()
    return False


class CuttingProxy:
    """A TCP proxy before `port` that cuts each connection after a random time within `seconds`. A context manager."""

    def __init__(self, port: int, seconds: tuple[float, float], seed: int = 0):
        self.target, self.seconds, self.cuts = port, seconds, 0
        self.random, self.up = random.Random(seed), threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "CuttingProxy":
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        assert self.up.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)

    async def _serve(self) -> None:
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.up.set()
        await self.over.wait()
        server.close()

    async def _carry(self, reader, writer) -> None:
        try:
            back, out = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        pumps = [asyncio.create_task(_pump(*ends)) for ends in ((reader, out), (back, writer))]
        _, running = await asyncio.wait(pumps, timeout=self.random.uniform(*self.seconds),
                                        return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
        self.cuts += len(running) == 2
        for pump in running:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        writer.transport.abort()  # a reset, as from a load balancer that gives up
        out.transport.abort()


async def _pump(reader, writer) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
