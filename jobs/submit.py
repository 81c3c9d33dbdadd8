"""Runs a verb on a Ray cluster: packs the code, submits, follows the log, ends with the job's own exit code."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from cluster import submit
from cluster.head import Unreachable
from cluster.submit import Wanted
from jobs.command import execute, parse, say
from jobs.job_words import Where, followed, on_head, unreachable
from pipeline import storage
from pipeline.training import own

_PLACES = ("--data", "--out")
_HERE = ("submit", "job", "cluster")  # verbs that speak to a cluster, and do not run on one


@dataclass(frozen=True)
class Args(Where):
    """millstream submit [OPTIONS] -- VERB ARGS: run any verb on a Ray cluster.

    The code travels with the job, also a FILE.py whose NAME the verb is given (train ./mine.py:my_run); data does not:
    paths are s3://, or absolute ones that every node has. The same run submitted twice is one run: the second follows
    the first. Exit code: the verb's own; 120 failed without one, 121 stopped, 122 lost, 123 unreachable.
    """

    workers: str | None = None
    """Handed to the verb as its --workers."""
    include: tuple[str, ...] = ()
    """Files and folders that travel with the code (a module of your own, a configuration)."""
    env: tuple[str, ...] = ()
    """NAME=VALUE for every process of the job. No secrets: give the nodes a role, or mount a file."""
    driver_on: tuple[str, ...] = ()
    """LABEL=VALUE of the node for the driver (market=on-demand); default: the head."""
    name: str | None = None
    """What the run is called; default: made of the verb and its words."""
    unpinned: bool = False
    """Run though packages of the nodes differ from constraints.txt."""
    take_over: bool = False
    """Have this cluster go on with a run that was submitted to another one."""
    detach: bool = False
    """Submit, print the job's name, and leave."""
    dry_run: bool = False
    """Say what would be sent, and send nothing."""
    json: bool = False
    """Print the result as one JSON object on stdout; the log goes to stderr."""


def run(args: Args, words: list[str]) -> dict:
    """{job, started, state, exit_code, why}"""
    words, mine = _own(words)
    words = _checked(words, args.workers)
    there = {Path(given).expanduser().resolve() for given in args.include}
    include = (*args.include, *(path for path in mine if Path(path) not in there))
    wanted = Wanted(
        tuple(words), include, args.env, args.driver_on, args.place(), args.name, args.unpinned, args.take_over
    )
    code, said = submit.check(wanted)
    name = submit.run_name(wanted)
    say(f"{name}: {code.files} files of code, {len(code.data) / 1e6:.1f} MB, to {args.head_address()}")
    if code.left_out:
        say(f"  {len(code.left_out)} files stay here (hidden, data, secrets): {', '.join(code.left_out[:5])}")
    if args.dry_run:
        return {"run": name, "words": words, "code": code.name, "bytes": len(code.data), "env": said["variables"]}

    try:
        job, started = on_head(args, lambda head: submit.submit(head, wanted, code, said))
    except Unreachable as error:
        return unreachable("", error)
    say(f"submitted as {job}" if started else f"{job} is under way already: following it")
    if args.detach:
        say(f"millstream job wait {job} follows it, millstream job stop {job} ends it")
        return {"job": job, "started": started}
    return {"started": started} | followed(args, job, args.json)


def _own(words: list[str]) -> tuple[list[str], list[str]]:
    """The words, FILE.py:NAME of this machine as it is called in the job's folder, and those files, which travel."""
    said, files = [], {}
    for word in words:
        option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        if own.is_spec(value) and not storage.is_remote(value):
            given, _ = own.split(value)
            path = Path(given).expanduser().resolve()
            if path.is_file():
                files[str(path)] = None
                value = path.name + value[len(given) :]
            elif not os.path.isabs(given):  # else it may be one of the nodes'
                raise ValueError(f"{word}: there is no file {path}")
        said.append(f"{option}{equals}{value}")
    return said, list(files)


def _checked(words: list[str], workers: str | None) -> list[str]:
    """The verb's words, once they mean the same on another machine."""
    verb = words[0]
    spec = verb.isidentifier() and not verb.startswith("_") and importlib.util.find_spec(f"jobs.{verb}")
    if (
        not spec
        or verb in _HERE
        or (not spec.submodule_search_locations and "def main(" not in Path(spec.origin).read_text())
    ):
        raise ValueError(f"{verb!r} is no verb to run on a cluster: millstream --help lists them")
    if workers and any(word.split("=")[0] == "--workers" for word in words):
        raise ValueError("--workers is given twice: before and after --")
    for before, word in zip(["", *words], words, strict=False):
        option, _, value = word.partition("=")
        path = value if value and option in _PLACES else word
        named = before in _PLACES or (value and option in _PLACES)
        scheme, colon, inside = path.partition(":")
        path = inside if colon and inside and not inside.startswith("//") and scheme.isalpha() else path
        if storage.is_remote(path) or os.path.isabs(path) or path.startswith("-"):
            continue
        if named or ("/" in path and os.path.exists(path)):
            raise ValueError(
                f"{word!r} lies in a folder of this machine: give s3://..., or an absolute path of the nodes"
            )
    return [*words, "--workers", workers] if workers else words


def main(argv: list[str]) -> int:
    if "--" not in argv and not {"-h", "--help"} & set(argv):
        say("error: millstream submit [OPTIONS] -- VERB ARGS: the verb comes after --")
        return 2
    at = argv.index("--") if "--" in argv else len(argv)
    args, words = parse(Args, "submit", argv[:at]), argv[at + 1 :]
    if not words:
        say("error: there is no verb after --")
        return 2
    return execute(lambda: run(args, words), args.json)
