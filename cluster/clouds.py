"""What the metadata servers of EC2 and GCE say of the end of the VM that asks.

EC2: docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html, instancedata-data-retrieval
GCE: cloud.google.com/compute/docs/instances/create-use-spot, docs/metadata/getting-live-migration-notice
"""

import http.client
import json
import re
import sys
import time
import urllib.parse
from dataclasses import dataclass
from datetime import UTC, datetime

METADATA = "http://169.254.169.254"  # of both clouds; GCE's other name for it would need a DNS that works
_EC2_NOTICE_S, _GCE_NOTICE_S, _MAINTENANCE_S = 120.0, 30.0, 60.0  # GPU VMs hear of maintenance earlier, mostly
_TOKEN_S = 6 * 3600  # the longest that EC2 grants
_ANSWER_S, _FIND_S = 2.0, 5.0


@dataclass(frozen=True)
class Notice:
    """This machine goes at `deadline` (unix time, s), for the reason `why`."""

    why: str
    deadline: float


class Ec2:
    """A spot instance's notices, asked for with a session token (IMDSv2)."""

    def __init__(self, url: str):
        self.url, self.token, self.renew, self.advised = url, "", 0.0, ""

    def answers(self) -> bool:
        """Whether this is EC2: only there does the metadata server hand out tokens. Raises as `look` does."""
        self.token, self.renew = "", 0.0
        return bool(self._fresh_token())

    def look(self) -> Notice | None:
        """The notice, if there is one. OSError, HTTPException or ValueError if the answer is none."""
        text = self._get("spot/instance-action")
        if text is not None:
            return _ec2_notice(text, time.time())
        advice = self._get("events/recommendations/rebalance") or ""
        if advice != self.advised:
            # Most machines outlive it by hours: a drain now would cost more than the checkpoints it saves.
            say(f"EC2 sees a raised risk of an interruption, which is not acted on: {advice[:200]}" if advice else "")
            self.advised = advice
        return None

    def _get(self, name: str) -> str | None:
        for last in (False, True):
            headers = {"X-aws-ec2-metadata-token": self._fresh_token()}
            status, _, text = ask(self.url, f"/latest/meta-data/{name}", headers)
            if status != 401 or last:
                break
            self.renew = 0.0  # the token has ended before its time, as after a hibernation
        if status not in (200, 404):
            raise ValueError(f"{name}: HTTP {status}")
        return text if status == 200 else None

    def _fresh_token(self) -> str:
        if time.monotonic() >= self.renew:
            wanted = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
            status, _, text = ask(self.url, "/latest/api/token", wanted, "PUT")
            if status != 200 or not re.fullmatch(r"[!-~]{1,1000}", text):
                raise ValueError(f"no token: HTTP {status}")
            self.token, self.renew = text, time.monotonic() + _TOKEN_S / 2
        return self.token


def _ec2_notice(text: str, now: float) -> Notice | None:
    """What `spot/instance-action` says. ValueError if it says nothing that holds."""
    told = json.loads(text)
    action = told.get("action") if isinstance(told, dict) else None
    if action not in ("terminate", "stop", "hibernate"):
        raise ValueError(f"spot/instance-action: cannot be read: {text[:200]!r}")
    why = f"EC2 will {action} this spot instance"
    try:
        at = datetime.fromisoformat(told["time"])
        deadline = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return Notice(f"{why}, it does not say when", now + _EC2_NOTICE_S)  # that it goes is certain
    if deadline < now - _EC2_NOTICE_S:
        raise ValueError(f"spot/instance-action: this machine has outlived its notice of {told['time']}")
    # Not later than the notice is long: then our clock is wrong. Not in the past: Ray has to do something first.
    return Notice(why, min(max(deadline, now + 1), now + _EC2_NOTICE_S))


class Gce:
    """A Compute Engine VM's notices: of preemption, and of maintenance that ends it (VMs with GPUs)."""

    def __init__(self, url: str, wait: float = 1.0):
        self.url, self.wait, self.first = url, min(max(1, round(wait)), 10), {}

    def answers(self) -> bool:
        """Whether this is GCE: its metadata server names itself. Raises as `look` does."""
        return bool(self._get("id"))

    def look(self) -> Notice | None:
        """The notice, if there is one; waits up to `wait` s for one. Raises as `Ec2.look`."""
        # It answers when the value changes, or in the end with the value as it is: a wait without an end would
        # sleep through a notice that was there before it began.
        text = self._get(f"preempted?wait_for_change=true&timeout_sec={self.wait}", _ANSWER_S + self.wait)
        if text not in ("TRUE", "FALSE"):
            raise ValueError(f"instance/preempted: cannot be read: {text[:200]!r}")
        if text == "TRUE":
            return self._notice("GCE preempts this VM", _GCE_NOTICE_S)
        if self._get("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE":
            return self._notice("GCE stops this VM for maintenance of its host", _MAINTENANCE_S)
        self.first.clear()  # one that was taken back, and comes again, has its whole time
        return None

    def _notice(self, why: str, seconds: float) -> Notice:
        deadline = self.first.setdefault(why, time.time() + seconds)  # GCE does not say when
        return Notice(why, max(deadline, time.time() + 1))

    def _get(self, name: str, seconds: float = _ANSWER_S) -> str:
        path, google = f"/computeMetadata/v1/instance/{name}", {"Metadata-Flavor": "Google"}
        status, headers, text = ask(self.url, path, google, seconds=seconds)
        if status != 200 or headers.get("Metadata-Flavor") != "Google":
            raise ValueError(f"instance/{name.partition('?')[0]}: HTTP {status}")
        return text.strip()


def ask(url: str, path: str, headers: dict, method: str = "GET", seconds: float = _ANSWER_S):
    """(status, headers, text) of an HTTP request that knows no proxies and follows no redirect.

    OSError or HTTPException if there is no answer; ValueError if it is not text.
    """
    link = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=seconds)
    try:
        link.request(method, path, headers=headers)
        answer = link.getresponse()
        return answer.status, answer.headers, answer.read(1 << 16).decode()
    finally:
        link.close()


def find_cloud(clouds: list, seconds: float = _FIND_S):
    """The first of `clouds` that answers as itself within `seconds`; None: none does. Networks come up late."""
    end = time.monotonic() + seconds
    while True:
        for cloud in clouds:
            try:
                if cloud.answers():
                    return cloud
            except (OSError, http.client.HTTPException, ValueError):
                continue
        if time.monotonic() > end:
            return None
        time.sleep(0.2)


def say(line: str) -> None:
    """A line on stderr, with the time: who reads it wonders how long it took."""
    if line:
        print(f"{datetime.now(UTC):%H:%M:%S}Z preemption: {line}", file=sys.stderr, flush=True)
