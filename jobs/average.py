"""Chooses the length of the average of a run's weights, after training."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.command import absolute, execute, parse, say
from pipeline.training import posthoc
from pipeline.training.resources import Resources
from pipeline.training.run import open_run
from pipeline.training.tasks import ClassifyConfig

_CLASSIFIERS = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2)


@dataclass(frozen=True)
class Args:
    """Validate averages of a finished run's weights of several lengths (post-hoc EMA), in this process; the one of the
    highest accuracy becomes the run's best checkpoint, if it is better than the best so far. The run must have been
    trained with --ema-snapshots."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The directory `millstream train` wrote."""
    spreads: tuple[float, ...] = ()
    """Lengths to try, as standard deviations of the times whose weights count, in shares of the run: up to 0.25;
    default: 0.03, 0.05, 0.07, 0.1, 0.15, 0.2. Of a GAN, which has no accuracy, the one that is taken."""
    device: str = "auto"
    """auto: a GPU if there is one. cpu. cuda."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    dry_run: bool = False
    """Say what there is to average, and do nothing."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> dict:
    """{run, best, averages: [{spread, away, accuracy, loss}], spread, checkpoint}; of a dry run {run, snapshots}."""
    opened = open_run(absolute(args.run))
    spreads = list(args.spreads or (_CLASSIFIERS if isinstance(opened.config.task, ClassifyConfig) else ()))
    found = posthoc.snapshots(opened)
    size = sum(file["size"] for manifest in found for file in manifest.files.values())
    say(f"{len(found)} snapshots, {size / 1e6:,.1f} MB, {found[0].samples:,} to {found[-1].samples:,} samples")
    if args.dry_run:
        return {"run": opened.path, "snapshots": [manifest.name for manifest in found]}
    resources = Resources(workers=0, device=args.device, threads=args.threads)
    result = posthoc.choose(opened, spreads, resources, _told)
    if result["checkpoint"]:
        said = f"; the best was {result['best']:.4f}" if result["best"] is not None else ""
        say(f"spread {result['spread']} is the run's best checkpoint now, {result['checkpoint']}{said}")
    else:
        say(f"none is better than the run's best checkpoint, {result['best']:.4f}: nothing is changed")
    return result


def _told(row: dict) -> None:
    scores = f": val accuracy {row['accuracy']:.4f}, loss {row['loss']:.4f}" if "accuracy" in row else ""
    say(f"spread {row['spread']}{scores} (its profile to {row['away']:.1%})")


def main(argv: list[str]) -> int:
    args = parse(Args, "average", argv)
    return execute(lambda: run(args), args.json)
