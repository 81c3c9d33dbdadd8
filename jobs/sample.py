"""Draws images from a trained GAN."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.command import absolute, execute, parse, say
from pipeline import registry, storage
from pipeline.evaluation import report
from pipeline.training import weights
from pipeline.training.rank import draw_classes
from pipeline.training.run import Run, open_run


@dataclass(frozen=True)
class Args:
    """Draw a grid of images from a trained GAN's averaged generator: one class a row where it knows classes."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The directory `millstream train` wrote for a GAN preset, or models:NAME@champion."""
    out: str
    """Where the PNG goes, local or s3://..."""
    n: int = 64
    """How many images."""
    seed: int = 0
    """Another seed draws other images."""
    label: str | None = None
    """Only this class, by its name."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{out, images, checkpoint}"""
    if not 1 <= args.n <= 100_000:
        raise ValueError(f"n {args.n}: ask for 1 to 100000 images")
    named = registry.is_spec(args.run)
    opened = weights.load(registry.resolve(args.run)) if named else open_run(absolute(args.run))
    images, checkpoint = draw_classes(opened, args.n, args.seed, args.label)
    storage.write(absolute(args.out), report.png(report.grid(images, columns=_columns(opened, args.n, args.label))))
    say(f"{args.n} images from {checkpoint}: {args.out}")
    return {"out": absolute(args.out), "images": args.n, "checkpoint": checkpoint}


def _columns(opened: Run | weights.Published, n: int, label: str | None) -> int | None:
    return -(-n // len(opened.facts.classes)) if opened.facts.classes and label is None else None


def main(argv: list[str]) -> int:
    args = parse(Args, "sample", argv)
    return execute(lambda: run(args), args.json)
