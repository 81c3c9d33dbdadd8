"""Jobs on a cluster: status, logs, stop, wait, list."""

import time
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from cluster import book
from cluster.follow import outcome
from cluster.head import Unreachable
from jobs.command import execute, parse, say
from jobs.job_words import Where, followed, on_head, unreachable


@dataclass(frozen=True)
class Args(Where):
    """Ask for a job that `millstream submit` started, stop it, or wait for its end.

    `wait` and `logs --follow` end with the job's own exit code; 120 failed without one, 121 stopped, 122 lost, 123
    unreachable.
    """

    action: Annotated[Literal["status", "logs", "stop", "wait", "list"], tyro.conf.Positional] = "list"
    job: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[JOB]")] = ""
    """As `submit` names it."""
    follow: bool = False
    """logs: go on until the job has ended."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{job, state, exit_code, why} or {jobs: [...]}"""
    if args.action != "list" and not args.job:
        raise ValueError(f"millstream job {args.action} JOB: which job? millstream job list names them")
    try:
        return {"list": _list, "status": _status, "logs": _logs, "stop": _stop, "wait": _wait}[args.action](args)
    except Unreachable as error:
        return unreachable(args.job, error)


def _list(args: Args) -> dict:
    found = sorted(on_head(args, lambda head: head.jobs()), key=lambda job: job.get("start_time") or 0)
    for job in found:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.get("start_time") or 0) / 1000))
        say(f"{job['submission_id']:32} {job['status'].lower():10} {began}")
    if not found:
        say(f"{args.head_address()} knows no jobs")
    return {"jobs": [{"job": job["submission_id"], "state": job["status"].lower()} for job in found]}


def _status(args: Args) -> dict:
    info = on_head(args, lambda head: head.job(args.job))
    ended, place = outcome(args.job, info), args.place()
    state = ended.state if ended else info["status"].lower()
    found = {"job": args.job, "state": state, "why": ended.why if ended else ""}
    if info is None and place and (beat := book.heard(place, book.parse(args.job))) and beat["code"] is not None:
        found |= {"state": "failed" if beat["code"] else "succeeded", "why": f"it exited with {beat['code']}"}
    say(f"{args.job} {found['state']}{': ' + found['why'] if found['why'] else ''}")
    return found


def _logs(args: Args) -> dict | None:
    if args.follow:
        return followed(args, args.job, args.json)
    text, place = on_head(args, lambda head: head.logs(args.job)), args.place()
    if text is None:
        text = book.kept_log(place, book.parse(args.job)) if place else None
    if text is None:
        raise FileNotFoundError(f"{args.head_address()} knows no job {args.job!r}")
    if not args.json:
        print(text, end="", flush=True)
    return {"job": args.job, "log": text}


def _stop(args: Args) -> dict:
    stopped = on_head(args, lambda head: head.stop(args.job))
    if not stopped:
        info = on_head(args, lambda head: head.job(args.job))
        if info is None:
            raise FileNotFoundError(f"{args.head_address()} knows no job {args.job!r}")
        say(f"{args.job} has ended already: {info['status'].lower()}")
        return {"job": args.job, "state": info["status"].lower()}
    say(f"{args.job} was asked to stop, with a checkpoint; waiting for its end")
    ended = followed(args, args.job, args.json, log=False)
    return ended | {"exit_code": 0 if ended["state"] == "stopped" else ended["exit_code"]}


def _wait(args: Args) -> dict:
    return followed(args, args.job, args.json)


def main(argv: list[str]) -> int:
    args = parse(Args, "job", argv)
    return execute(lambda: run(args), args.json)
