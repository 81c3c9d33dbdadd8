"""The files that describe a cluster: lint names what would go wrong, plan what it costs and who can reach it."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

from cluster import plan
from cluster.lint import lint
from jobs.command import execute, parse, say


@dataclass(frozen=True)
class Args:
    """Read `ray up` files and Kubernetes manifests, offline.

    plan: machines, the most they can cost an hour, what goes when idle, who can reach what.
    lint: Ray's and Kubernetes' schemas, KubeRay's rules, and traps (open ports, full-access roles, nightly wheels, no
    grace to save in, ...). Exit code 1 if there are errors.
    """

    action: Annotated[Literal["lint", "plan"], tyro.conf.Positional]
    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...")]
    crds: str | None = None
    """lint: a folder with KubeRay's CRDs, to hold its kinds against them."""
    strict: bool = False
    """lint: warnings are errors."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{plans: [...]}, as `cluster.plan` has them, or {findings: [{file, where, trap, message, severity}], exit_code}"""
    if not args.files:
        raise ValueError(f"millstream cluster {args.action} FILE...: which file?")
    if args.action == "plan":
        plans = [plan.plan(file) for file in args.files]
        for line in [line for found in plans for line in plan.lines(found)]:
            say(line)
        return {"plans": plans}
    found = lint(list(args.files), args.crds)
    for finding in found:
        say(str(finding))
    errors = sum(args.strict or finding.severity == "error" for finding in found)
    say(f"{len(args.files)} files, {errors} errors, {len(found) - errors} warnings")
    return {"findings": [asdict(finding) for finding in found], "exit_code": int(errors > 0)}


def main(argv: list[str]) -> int:
    args = parse(Args, "cluster", argv)
    return execute(lambda: run(args), args.json)
