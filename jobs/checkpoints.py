"""Lists a run's checkpoints; pins those that must stay."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.table import Table

from jobs.command import absolute, console, execute, parse
from pipeline.training import checkpoint
from pipeline.training.run import open_run


@dataclass(frozen=True)
class Args:
    """List the checkpoints a run may go on from, newest first. Pinned ones are never deleted."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The directory `millstream train` wrote."""
    pin: str | None = None
    """Name of a checkpoint to keep, whatever comes after it."""
    why: str = "pinned by hand"
    """A note beside the pin."""
    unpin: str | None = None
    """Name of a checkpoint to let go with the others."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{run, checkpoints: [{name, samples, validation, bytes, best, pinned}]}"""
    path = open_run(absolute(args.run)).path
    if args.pin:
        checkpoint.pin(path, args.pin, args.why)
    if args.unpin:
        checkpoint.unpin(path, args.unpin)
    chain, kept = checkpoint.lineage(path), checkpoint.pinned(path)
    best = checkpoint.best(path, chain)
    found = [
        {
            "name": manifest.name,
            "samples": manifest.samples,
            "validation": manifest.validation,
            "bytes": sum(file["size"] for file in manifest.files.values()),
            "best": manifest == best,
            "pinned": manifest.name in kept,
        }
        for manifest in chain
    ]
    table = Table("checkpoint", "samples", "MB", "validation", "", box=None)
    for row in found:
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in row["validation"].items())
        marks = " ".join(mark for mark in ("best", "pinned") if row[mark])
        table.add_row(row["name"], f"{row['samples']:,}", f"{row['bytes'] / 1e6:.1f}", numbers, marks)
    console.print(table)
    return {"run": path, "checkpoints": found}


def main(argv: list[str]) -> int:
    args = parse(Args, "checkpoints", argv)
    return execute(lambda: run(args), args.json)
