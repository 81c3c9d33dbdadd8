"""Scores a run's best checkpoint on a split, every sample counted once."""

import contextlib
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from cluster.session import ray_session
from jobs import report_page
from jobs.command import absolute, execute, parse, say
from pipeline import registry, storage
from pipeline.evaluation import classification
from pipeline.shards import index
from pipeline.training import fit, weights
from pipeline.training.resources import Resources
from pipeline.training.run import open_run
from pipeline.training.tasks import ClassifyConfig


@dataclass(frozen=True)
class Args:
    """Score a run's best checkpoint on a split; every sample counts once, at any number of workers.

    Writes RUN/evaluation-SPLIT.json and RUN/report.html.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The directory `millstream train` wrote, local or s3://..., or models:NAME@champion (of which only the numbers
    are given)."""
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
    if registry.is_spec(args.run):
        return _published(args, registry.resolve(args.run))
    opened = open_run(absolute(args.run))
    data = absolute(args.data) if args.data else opened.data
    check(opened.config.task, opened.facts.classes, opened.path, data, args.split)
    if args.resources.most == 0:
        scores, _ = report_page.evaluate(opened, data, args.split, args.resources)
    else:
        with ray_session(args.resources.most, args.address):
            scores, _ = report_page.evaluate(opened, data, args.split, args.resources)
    say(f"{args.split}: accuracy {scores['accuracy']:.4f} over {scores['samples']:,} samples")
    say(f"report: {storage.join(opened.path, 'report.html')}")
    return scores


def _published(args: Args, path: str) -> dict:
    model = weights.load(path)
    data = absolute(args.data) if args.data else model.info.get("lineage", {}).get("data", "")
    check(model.config, model.facts.classes, args.run, data, args.split)
    with ray_session(args.resources.most, args.address) if args.resources.most else contextlib.nullcontext():
        answers = fit.evaluate_published(path, data, args.split, args.resources)
    scores = classification.score(answers.labels, answers.predicted, answers.confidence, list(model.facts.classes))
    say(f"{args.split}: accuracy {scores['accuracy']:.4f} over {scores['samples']:,} samples")
    return scores | {"loss": answers.loss, "split": args.split, "data": data, "version": model.info["version"]}


def check(config, classes: tuple[str, ...], path: str, data: str, split: str) -> None:
    """Raises ValueError if the model cannot be scored on that split, before anything is started."""
    if not isinstance(config, ClassifyConfig):
        raise ValueError(f"{path} is a GAN, which has no accuracy: look at `millstream sample {path}`")
    dataset = index.load(data)
    if dataset.classes != classes:
        raise ValueError(f"{data} has classes {list(dataset.classes)}, the model was trained on {list(classes)}")
    dataset.split(split)


def main(argv: list[str]) -> int:
    args = parse(Args, "evaluate", argv)
    return execute(lambda: run(args), args.json)
