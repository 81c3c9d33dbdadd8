"""A reverse proxy before the S3 server that fails on request. It leaves Host alone, so signatures stay valid."""

import contextlib
import http.client
import socket
import struct
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class FaultyProxy(ThreadingHTTPServer):
    """Each request takes the next of `faults` that names its method, as ("PUT", fault); none left: passed on whole.

    Faults: "slow down" (503, not passed on), "unacknowledged" (passed on, then the connection is closed without an
    answer), "cut" (half of the answer's body), "reset" (half of it, then the connection breaks), "slow" (half of it,
    the rest after 0.5 s), "zeros" (for each byte of it). `seen` counts the requests by method, `done` the faults.
    """

    daemon_threads = True

    def __init__(self, target: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urllib.parse.urlsplit(target).netloc
        self.faults: list[tuple[str, str]] = []
        self.seen: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.steady: tuple[str, int, list[str]] = ("", 1, [])
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault_every(self, n: int, method: str, faults: list[str]) -> None:
        """From now on every n-th request of `method` fails too, by `faults` in turn."""
        self.steady = (method, n, faults)

    def fault_for(self, method: str) -> str | None:
        with self.lock:
            self.seen[method] = count = self.seen.get(method, 0) + 1
            fault = self._fault(method, count)
            self.done[fault] = self.done.get(fault, 0) + 1
            return fault

    def _fault(self, method: str, count: int) -> str | None:
        for at, (wanted, fault) in enumerate(self.faults):
            if wanted == method:
                del self.faults[at]
                return fault
        steady, n, faults = self.steady
        return faults[count // n % len(faults)] if method == steady and count % n == 0 else None

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault_for(self.command)
        self.close_connection = True
        if fault == "slow down":
            self._answer(503, [("Content-Type", "application/xml")], _SLOW_DOWN, len(_SLOW_DOWN))
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
        with contextlib.closing(http.client.HTTPConnection(self.server.target, timeout=30)) as server:
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            data = answer.read()
        if fault == "unacknowledged":
            return
        kept = [pair for pair in answer.getheaders() if pair[0].lower() not in ("transfer-encoding", "content-length")]
        length = int(answer.headers.get("Content-Length", len(data)))
        data = bytes(len(data)) if fault == "zeros" else data
        half = len(data) // 2 if fault in ("cut", "reset", "slow") else len(data)
        self._answer(answer.status, kept, data[:half], length)
        if fault == "slow":
            time.sleep(0.5)
            self.wfile.write(data[half:])
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # what `finish` does next would end it in order

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in [*headers, ("Content-Length", str(length)), ("Connection", "close")]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on

    def log_message(self, *_) -> None:
        pass
