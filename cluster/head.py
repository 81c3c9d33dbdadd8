"""The head of a Ray cluster, by its Jobs REST API: each request bounded, and repeated while the way there is cut.

Ray's own client has no timeouts, takes its address from the environment against what it is told, and ends a wait with 0
when a stream breaks. What is sent here is https://docs.ray.io/en/latest/cluster/running-applications/job-submission/.
"""

import asyncio
import json
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import aiohttp

from cluster import auth

DEFAULT = "http://127.0.0.1:8265"
_TIMEOUT = aiohttp.ClientTimeout(total=60, sock_connect=5, sock_read=20)
_LOG_S = 30.0
_AGAIN_S = (0.2, 0.5, 1, 2)


class Unreachable(RuntimeError):
    """The head did not answer for as long as we were to wait."""


class Head:
    """An open connection to the head at `address`; an asynchronous context manager.

    patience: seconds without any answer until Unreachable is raised. `said` gets a line when touch is lost and found.
    Requests raise PermissionError where the token is refused, ValueError where the head will not do what it is asked.
    """

    def __init__(self, address: str, patience: float = 600, insecure: bool = False, ca: str | None = None, said=None):
        self.address, self.patience, self.said = address.rstrip("/"), patience, said or (lambda line: None)
        auth.listeners(self.address, insecure)
        try:
            headers = json.loads(os.environ.get("RAY_JOB_HEADERS") or "{}")
            self.headers = {str(name): str(value) for name, value in headers.items()}
        except (ValueError, AttributeError):
            raise ValueError("RAY_JOB_HEADERS must be a JSON object of strings") from None
        if token := auth.token():
            self.headers["X-Ray-Authorization"] = f"Bearer {token}"  # Authorization may be a proxy's
            self.headers.setdefault("Authorization", f"Bearer {token}")
        self.ssl = ssl.create_default_context(cafile=ca) if ca else True
        self.answered, self.lost = time.monotonic(), 0

    async def __aenter__(self) -> "Head":
        beyond = urlsplit(self.address).hostname not in ("localhost", "127.0.0.1", "::1")
        self.session = aiohttp.ClientSession(
            headers=self.headers, timeout=_TIMEOUT, trust_env=beyond,
            connector=aiohttp.TCPConnector(ssl=self.ssl, force_close=True),
        )  # fmt: skip
        return self

    async def __aexit__(self, *_) -> None:
        await self.session.close()

    async def version(self) -> str:
        """Ray's version there."""
        return (await self._json("GET", "/api/version"))["ray_version"]

    async def job(self, job: str) -> dict | None:
        """What the head knows of a job: status, driver_exit_code, error_type, message, ...; None if it knows none."""
        return await self._json("GET", f"/api/jobs/{job}")

    async def jobs(self) -> list[dict]:
        return [found for found in await self._json("GET", "/api/jobs/") if found.get("submission_id")]

    async def logs(self, job: str) -> str | None:
        """The whole log; None if the head knows no such job. Unreachable soon: the node that has it may be gone."""
        found = await self._ask("GET", f"/api/jobs/{job}/logs", parsed=json.loads, within=_LOG_S)
        return None if found is None else found["logs"]

    async def stop(self, job: str) -> bool:
        """Asks a job to end; False if it had ended, or the head knows no such job."""
        found = await self._json("POST", f"/api/jobs/{job}/stop")
        return bool(found and found["stopped"])

    async def upload(self, name: str, data: bytes) -> str:
        """Keeps a package on the head for the time it lives, and returns its address there."""
        package = f"/api/packages/gcs/{name}"
        if await self._ask("GET", package) is None:
            await self._ask("PUT", package, data=data)
        return f"gcs://{name}"

    async def submit(self, wanted: dict) -> None:
        """Submits a job under its `submission_id`, once however often the request had to be repeated."""
        job = wanted["submission_id"]

        async def there() -> bool:
            return await self.job(job) is not None

        await self._ask("POST", "/api/jobs/", unless=there, json=wanted)

    async def tail(self, job: str) -> AsyncIterator[str]:
        """Pieces of the log from its beginning as they are written, until the job or the connection ends."""
        lost = self.lost
        where = f"{self.address}/api/jobs/{job}/logs/tail"
        async with self.session.ws_connect(where, timeout=aiohttp.ClientWSTimeout(ws_close=2)) as stream:
            while True:
                try:
                    message = await stream.receive(timeout=5)
                except TimeoutError:
                    if self.lost != lost:  # other requests failed meanwhile: nothing may ever come through this one
                        return
                    continue
                if message.type != aiohttp.WSMsgType.TEXT:
                    return
                yield message.data

    async def _json(self, method: str, path: str):
        return await self._ask(method, path, parsed=json.loads)

    async def _ask(self, method: str, path: str, parsed: Callable = bytes, unless=None, within: float = 0, **more):
        """The answer, parsed; None for 404. Repeats until nothing has answered for `patience` (or this request has
        taken `within`) seconds, or `unless()` says that it is done."""
        failures, why, began = 0, "", time.monotonic()
        within = within or (self.patience if unless else 0)  # else each answer to `unless` would give it more time
        while True:
            try:
                async with self.session.request(method, f"{self.address}{path}", **more) as answer:
                    body = await answer.read()
                    if answer.status < 300:
                        found = parsed(body)
                        self._touched()
                        return found
                    if answer.status in (401, 403):
                        raise PermissionError(self._refusal(answer.status))
                    said = body.decode(errors="replace").strip().splitlines() or [answer.reason or ""]
                    if answer.status == 404 and "does not exist" in said[-1]:  # Ray's word, not that of a proxy
                        self._touched()
                        return None
                    why = f"{answer.status} {said[-1][:300]}"
                    if answer.status in (400, 405, 413, 422):
                        raise ValueError(f"{self.address} refuses: {why}")
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if isinstance(error, PermissionError):
                    raise
                if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError | aiohttp.ClientSSLError):
                    raise ValueError(f"{self.address}: {error}; the address is like {DEFAULT}") from None
                why = f"{type(error).__name__} {error}".strip()
            except (json.JSONDecodeError, UnicodeDecodeError):
                why = "what answers there is no Ray dashboard"
            self.lost += 1
            silent, limit = time.monotonic() - (began if within else self.answered), within or self.patience
            if silent > limit:
                raise Unreachable(f"{self.address} has not answered for {silent:.0f} s: {why}")
            if failures == 2:
                self.said(f"{self.address} does not answer ({why}); asking for another {limit - silent:.0f} s")
            await asyncio.sleep(_AGAIN_S[min(failures, len(_AGAIN_S) - 1)])
            failures += 1
            if unless and await unless():  # the request arrived, its answer did not
                return None

    def _touched(self) -> None:
        self.answered = time.monotonic()

    def _refusal(self, status: int) -> str:
        if "X-Ray-Authorization" in self.headers:
            return f"{self.address} refuses our token ({status}): set RAY_AUTH_TOKEN to the cluster's"
        return f"{self.address} wants a token ({status}): set RAY_AUTH_TOKEN, or put it in ~/.ray/auth_token (mode 600)"
