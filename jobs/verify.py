"""Reads a dataset again and compares it with its checksums; --repair makes again what is damaged."""

from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from jobs.command import absolute, absolute_source, execute, parse, progress, say
from pipeline.shards import index, verify


@dataclass(frozen=True)
class Args:
    """Read everything a dataset holds and compare it with its checksums; say exactly what is wrong.

    Exit code 0: all is well, or was repaired; 1: something is wrong.
    """

    dataset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATASET")]
    """What `millstream shard` wrote, local or s3://..."""
    repair: str | None = None
    """SOURCE, as `millstream shard` was given it: damaged and missing shards are made again from it, nothing else."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{shards, samples, problems [{file, kind, detail}], repaired}."""
    root = absolute(args.dataset)
    problems = _verify(root)
    repaired = 0
    if problems and args.repair:
        left = verify.repair(root, absolute_source(args.repair), problems)
        for problem in left:
            say(f"not repaired: {problem.file}: {problem.detail}")
        after = _verify(root)
        repaired, problems = len(problems) - len(after), after
    info = index.load(root).info
    return {"shards": len(info["shards"]), "samples": info["samples"], "repaired": repaired,
            "problems": [asdict(problem) for problem in problems]}  # fmt: skip


def _verify(root: str) -> list[verify.Problem]:
    with progress("shards") as bar:
        task = bar.add_task("verifying", total=None, note="")
        problems = verify.verify(root, lambda done, total: bar.update(task, completed=done, total=total))
    for problem in problems:
        say(f"{problem.kind}: {problem.file}: {problem.detail}")
    return problems


def main(argv: list[str]) -> int:
    args, found = parse(Args, "verify", argv), {}

    def verified() -> dict:
        found.update(run(args))
        if not found["problems"]:
            repaired = f", {found['repaired']} problems repaired" if found["repaired"] else ""
            say(f"{args.dataset}: {found['samples']:,} samples in {found['shards']} shards are as committed{repaired}")
        return found

    return execute(verified, args.json) or (1 if found["problems"] else 0)
