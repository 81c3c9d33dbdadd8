"""Scores a run's best checkpoint on a split, every sample counted once."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from cluster.session import ray_session
from jobs import report_page
from jobs.command import absolute, execute, parse, say
from pipeline import storage
from pipeline.shards import index
from pipeline.training.resources import Resources
from pipeline.training.run import Run, open_run
from pipeline.training.tasks import ClassifyConfig


@dataclass(frozen=True)
class Args:
    """Score a run's best checkpoint on a split; every sample counts once, at any number of workers.

    Writes RUN/evaluation-SPLIT.json and RUN/report.html.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The directory `millstream train` wrote, local or s3://..."""
    data: str | None = None
    """DATASET; default: the one the run was trained on."""
    split: str = "val"
    """Which split: val, test, train, as the dataset has them."""
    resources: Resources = field(default_factory=Resources)
    address: str | None = None
    """A running Ray cluster; default: RAY_ADDRESS, else a Ray of our own on this machine."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{samples, accuracy, per_class, confusion, ..., split, checkpoint, loss}"""
    opened = open_run(absolute(args.run))
    data = absolute(args.data) if args.data else opened.data
    check(opened, data, args.split)
    if args.resources.most == 0:
        scores, _ = report_page.evaluate(opened, data, args.split, args.resources)
    else:
        with ray_session(args.resources.most, args.address):
            scores, _ = report_page.evaluate(opened, data, args.split, args.resources)
    say(f"{args.split}: accuracy {scores['accuracy']:.4f} over {scores['samples']:,} samples")
    say(f"report: {storage.join(opened.path, 'report.html')}")
    return scores


def check(opened: Run, data: str, split: str) -> None:
    """Raises ValueError if the run cannot be scored on that split, before anything is started."""
    if not isinstance(opened.config.task, ClassifyConfig):
        raise ValueError(
            f"{opened.path} trains a GAN, which has no accuracy: look at `millstream sample {opened.path}`"
        )
    dataset = index.load(data)
    if dataset.classes != opened.facts.classes:
        raise ValueError(
            f"{data} has classes {list(dataset.classes)}, the run was trained on {list(opened.facts.classes)}"
        )
    dataset.split(split)


def main(argv: list[str]) -> int:
    args = parse(Args, "evaluate", argv)
    return execute(lambda: run(args), args.json)
