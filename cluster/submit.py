"""A verb becomes a job on a Ray cluster. The same run submitted twice is one run.

A run is known by its words. With a store, its attempts are claimed there (`cluster.book`), so that a head that died and
came back empty, or another cluster, is not told a second time what goes on elsewhere. Without one, the head's list of
jobs is all there is to know, for as long as the head lives.
"""

import asyncio
import hashlib
import json
import re
import secrets
import shlex
from dataclasses import dataclass

from cluster import book, exposure, follow
from cluster import pack as packing
from cluster.head import Head
from pipeline import storage


@dataclass(frozen=True)
class Wanted:
    """What to run, and how. words: VERB ARGS; driver_on: labels of the node for the driver, (): the head."""

    words: tuple[str, ...]
    include: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    driver_on: tuple[str, ...] = ()
    store: str | None = None
    name: str | None = None
    unpinned: bool = False
    take_over: bool = False


def run_name(wanted: Wanted) -> str:
    """What a run is called in Ray and in the store: its verb and a hash of its words, or the name it was given."""
    if wanted.name:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}", wanted.name):
            raise ValueError(f"--name {wanted.name!r}: letters, digits, - and _, at most 61")
        return wanted.name
    return f"{wanted.words[0]}-{hashlib.sha256(json.dumps(wanted.words).encode()).hexdigest()[:10]}"


def check(wanted: Wanted) -> tuple[packing.Pack, dict]:
    """(code, environment) of the job, before anything is sent. ValueError where something must not travel."""
    variables, labels = _pairs("--env", wanted.env), _pairs("--driver-on", wanted.driver_on)
    for name, value in variables.items():
        exposure.refuse_variable(name, value)
    exposure.refuse_command(list(wanted.words))
    return packing.pack(wanted.include, packing.limit(wanted.store)), {"variables": variables, "labels": labels}


async def submit(head: Head, wanted: Wanted, code: packing.Pack, said: dict) -> tuple[str, bool]:
    """(submission id, whether this call started it). Attaches to the attempt that is under way, if one is."""
    from importlib.metadata import version

    theirs, ours = await head.version(), version("ray")
    if theirs != ours and not wanted.unpinned:
        raise ValueError(f"{head.address} runs Ray {theirs}, this is {ours}: use the same, or --unpinned")
    run = run_name(wanted)
    if not wanted.store:
        return await _by_the_head(head, run, wanted, code, said)
    return await _by_the_store(head, run, wanted, code, said)


async def _by_the_head(head: Head, run: str, wanted: Wanted, code, said: dict) -> tuple[str, bool]:
    known = {job["submission_id"]: job for job in await head.jobs()}
    numbers = [int(job.removeprefix(f"{run}-")) for job in known if re.fullmatch(rf"{re.escape(run)}-\d+", job)]
    last = max(numbers, default=0)
    if last and follow.outcome("", known[f"{run}-{last}"]) is None:
        return f"{run}-{last}", False
    attempt = book.Attempt(run, last + 1)
    where = await head.upload(f"_millstream_{code.name}", code.data)
    mark = secrets.token_hex(8)
    await head.submit(_request(attempt, wanted, where, said, mark))
    return attempt.job, ((await head.job(attempt.job) or {}).get("metadata") or {}).get("mark") == mark


async def _by_the_store(head: Head, run: str, wanted: Wanted, code, said: dict) -> tuple[str, bool]:
    store, number = wanted.store, await asyncio.to_thread(book.newest, wanted.store, run)
    while True:
        if number and await _goes_on(head, store, book.Attempt(run, number), wanted.take_over):
            return f"{run}-{number}", False
        attempt = book.Attempt(run, number + 1)
        where = await _stored(head, store, code)
        request = _request(attempt, wanted, where, said, secrets.token_hex(8))
        try:
            await asyncio.to_thread(book.claim, store, attempt, {"address": head.address, "request": request})
        except FileExistsError:  # another was faster: it is his attempt that counts
            number += 1
            continue
        await head.submit(request)
        return attempt.job, True


async def _goes_on(head: Head, store: str, attempt: book.Attempt, take_over: bool) -> bool:
    """Whether the newest attempt is under way; one that was claimed and never submitted is submitted now."""
    facts = await asyncio.to_thread(book.claimed, store, attempt)
    heard = await asyncio.to_thread(book.heard, store, attempt)
    if heard and heard["code"] is not None:
        return False
    info = await head.job(attempt.job)
    if info is not None:
        return follow.outcome("", info) is None
    if facts["address"] != head.address:
        if take_over or (heard and not await asyncio.to_thread(book.alive, store, attempt)):
            return False
        raise ValueError(
            f"{attempt.job} was submitted to {facts['address']}, and has not ended that anybody knows: follow it "
            "there, or let this cluster have it by --take-over"
        )
    if heard:  # it ran, and the head does not know it: the head is another one since
        return False
    await head.submit(facts["request"])
    return True


async def _stored(head: Head, store: str, code) -> str:
    """Puts the code where nodes find it. A local store is no place that Ray could fetch it from."""
    if not storage.is_remote(store):
        return await head.upload(f"_millstream_{code.name}", code.data)
    path = book.code_path(store, code.name)
    if not await asyncio.to_thread(storage.exists, path):
        await asyncio.to_thread(storage.write, path, code.data)
    return path


def _request(attempt: book.Attempt, wanted: Wanted, where: str, said: dict, mark: str) -> dict:
    words = ["python", "-m", "cluster.driver", *(("--unpinned",) if wanted.unpinned else ())]
    if wanted.store:
        words += ["--store", wanted.store, "--job", attempt.job]
    entrypoint = f"exec {shlex.join([*words, '--', *wanted.words])}"  # exec: signals reach it, not a shell
    request = {
        "entrypoint": entrypoint,
        "submission_id": attempt.job,
        "runtime_env": {"working_dir": where} | ({"env_vars": said["variables"]} if said["variables"] else {}),
        "metadata": {"mark": mark, "verb": wanted.words[0], "code": where.rpartition("/")[2]},
    }
    if said["labels"]:
        request["entrypoint_label_selector"] = said["labels"]
    return request


def _pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    for pair in given:
        if "=" not in pair:
            raise ValueError(f"{option} {pair.partition('=')[0]!r}: give NAME=VALUE")
    return dict(pair.split("=", 1) for pair in given)
