"""Hosts on one machine: network namespaces on a bridge, each with an address of its own. Needs root.

What runs on a host is in a control of its own: `kill` is the host's power cord, `cut` its network cable.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from ray_head import TOKEN
from s3_server import wait_for


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def no_namespaces() -> str:
    """Why this machine has none to give, if it has not: no root, no iproute2, a kernel or container without them."""
    try:
        with Hosts() as hosts:
            hosts.add("try")
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)
    return ""


class Hosts:
    """A bridge, and the hosts made on it. A context manager."""

    def __init__(self):
        mark = f"{random.randrange(1 << 24):06x}"  # two of them may run at once
        self.bridge, self.net = f"msb{mark}", f"10.{random.randrange(128, 250)}.{random.randrange(250)}"
        self.mark, self.hosts, self.folder = mark, {}, ""

    def __enter__(self) -> "Hosts":
        ip("link", "add", self.bridge, "type", "bridge")
        self.folder = tempfile.mkdtemp(prefix="ms-h-", dir="/tmp")
        ip("link", "set", self.bridge, "up")
        ip("addr", "add", f"{self.net}.1/24", "dev", self.bridge)
        return self

    def __exit__(self, *_) -> None:
        for host in self.hosts.values():
            with contextlib.suppress(Exception):
                host.kill()
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", host.space)
        ip("link", "del", self.bridge)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, name: str) -> "Host":
        host = self.hosts[name] = Host(self, name, f"{self.net}.{10 + len(self.hosts)}")
        return host


class Host:
    def __init__(self, hosts: Hosts, name: str, address: str):
        self.name, self.address, self.folder = name, address, f"{hosts.folder}/{name}"
        self.space, self.cable = f"ms{hosts.mark}-{name}", f"ms{hosts.mark}{name[:4]}"
        os.makedirs(self.folder)
        ip("netns", "add", self.space)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        ip("link", "set", self.cable, "master", hosts.bridge, "up")
        for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"],
                      ["link", "set", "lo", "up"], ["route", "add", "default", "via", f"{hosts.net}.1"]):  # fmt: skip
            ip("-n", self.space, *words)
        # Ray has every node keep its session below the path that the head has: each host has a disk of its own there.
        self.session = f"{hosts.folder}/session"
        for folder in (self.session, f"{self.folder}/disk"):
            os.makedirs(folder, exist_ok=True)
        disk = 'mount --bind "$0" "$1" && shift && exec "$@"'  # `ip netns exec` has given it mounts of its own
        self.disk = ("sh", "-c", disk, f"{self.folder}/disk", self.session)
        self.within, self.lives, self.over, self.thread = (
            ("ip", "netns", "exec", self.space),
            0,
            threading.Event(),
            None,
        )

    def ray(self, head: "Host | None", env: dict[str, str], cpus: int, labels: dict[str, str]) -> None:
        """Starts Ray, the head's if there is no other, and starts it again when it ends, as systemd would."""
        self.over.clear()
        self.thread = threading.Thread(target=self._keep, args=(head, env, cpus, labels), daemon=True)
        self.thread.start()

    def _keep(self, head: "Host | None", env: dict[str, str], cpus: int, labels: dict[str, str]) -> None:
        base = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_", "PYTHONPATH"))}
        base |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "HOME": self.folder}
        base["TMPDIR"] = self.folder  # of jobs that are killed
        base |= {"RAY_JOB_STOP_WAIT_TIME_S": "30", "PATH": f"{Path(sys.executable).parent}:{base['PATH']}"} | env
        command = [
            *self.within,
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--disable-usage-stats",
        ]
        command += [f"--node-ip-address={self.address}", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
        command += [f"--labels={','.join(f'{name}={value}' for name, value in labels.items())}"] if labels else []
        if head:
            command += [f"--address={head.address}:6379"]
        else:
            command += ["--head", "--port=6379", "--dashboard-host=0.0.0.0", "--dashboard-port=8265"]
        while not self.over.is_set():
            self.lives += 1
            more = [] if head else [f"--temp-dir={self.session}/{self.lives}"]
            with open(f"{self.folder}/log", "ab") as log:
                process = subprocess.Popen([*command, *more], env=base, cwd=self.folder, stdin=subprocess.DEVNULL,
                                           stdout=log, stderr=log, start_new_session=True)  # fmt: skip
            while process.poll() is None and not self.over.wait(0.2):
                pass
            self._end()  # what it left running would hold its ports
            process.wait(20)
            self.over.wait(1)

    def _end(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True, timeout=20)
        return [int(pid) for pid in found.stdout.split()]

    def has(self, program: str) -> bool:
        """Whether it runs on the host."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if os.path.basename(words[0]).decode(errors="replace") == program:
                    return True
        return False

    def kill(self) -> None:
        """SIGKILLs everything on the host, at once."""
        self.over.set()
        if self.thread:
            self.thread.join(30)
        wait_for(lambda: self._end() or not self.processes(), 20, f"end of {self.name}")

    def cut(self) -> None:
        ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        ip("link", "set", self.cable, "up")
