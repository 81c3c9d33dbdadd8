"""A VM's metadata server, of EC2 (IMDSv2) or GCE, that gives notice on request and answers as badly as it is told."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class MetadataServer(ThreadingHTTPServer):
    """cloud: "ec2" or "gce". `notice(seconds)` announces the end; `faults` are taken one a request: a status, or bytes
    for the body, "hang up" or "hang" (no answer until the server ends). A context manager."""

    daemon_threads = True

    def __init__(self, cloud: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.cloud, self.body, self.maintenance, self.advice, self.faults = cloud, None, "NONE", None, []
        self.tokens, self.seen, self.over = {"first"}, [], threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def notice(self, seconds: float = 120) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
        self.body = json.dumps({"action": "terminate", "time": at}).encode() if self.cloud == "ec2" else b"TRUE"

    def __enter__(self) -> "MetadataServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no matter."""


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_PUT(self) -> None:
        ours = self.server.cloud == "ec2" and self.path == "/latest/api/token"
        if ours and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
            token = f"token-{len(self.server.seen)}"
            self.server.tokens.add(token)
            self._answer(200, token.encode())
        else:
            self._answer(404, b"")

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "hang up":
            self.connection.close()
        elif fault == "hang":
            self.server.over.wait()
        elif isinstance(fault, int):
            self._answer(fault, b"trouble")
        elif self.server.cloud == "ec2":
            self._ec2(fault)
        else:
            self._gce(fault)

    def _ec2(self, fault: bytes | None) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens:
            self._answer(401, b"")
        elif self.path.endswith("/spot/instance-action") and (fault or self.server.body):
            self._answer(200, fault or self.server.body)
        elif self.path.endswith("/events/recommendations/rebalance") and self.server.advice:
            self._answer(200, self.server.advice)
        else:
            self._answer(404, b"")

    def _gce(self, fault: bytes | None) -> None:
        if self.headers.get("Metadata-Flavor") != "Google":
            self._answer(403, b"")
        elif "/preempted" in self.path:
            time.sleep(0 if self.server.body else 0.05)
            self._answer(200, fault or self.server.body or b"FALSE")
        elif self.path.endswith("/maintenance-event"):
            self._answer(200, self.server.maintenance.encode())
        else:
            self._answer(200, b"1234")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response_only(status)
        if self.server.cloud == "gce":
            self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass
