"""Says what a dataset holds, and draws it."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from rich.table import Table

from jobs.command import absolute, console, execute, parse, say
from jobs.report_page import dataset_facts, images_of
from pipeline import storage
from pipeline.evaluation import report
from pipeline.shards import index


@dataclass(frozen=True)
class Args:
    """Say what a dataset holds: counts, classes, sizes, rejects, shards."""

    dataset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATASET")]
    """DATASET: what `millstream shard` wrote, local or s3://..."""
    preview: str | None = None
    """Draw a contact sheet of some samples of each split into this PNG file."""
    n: int = 100
    """Samples on the contact sheet."""
    json: bool = False
    """Print the facts as one JSON object on stdout."""


def run(args: Args) -> dict:
    """What dataset.json holds, with the rejects listed."""
    dataset = index.load(absolute(args.dataset))
    info, facts = dataset.info, dataset_facts(dataset)
    table = Table("", *info["splits"], "all", title=args.dataset, box=None, title_justify="left")
    splits = info["splits"].values()
    for name in ("samples", "shards"):
        numbers = [split[name] for split in splits]
        table.add_row(name, *(f"{n:,}" for n in [*numbers, sum(numbers)]))
    for label, name in enumerate(dataset.classes):
        numbers = [split["classes"][label] for split in splits]
        table.add_row(f"  {name}", *(f"{n:,}" for n in [*numbers, sum(numbers)]))
    console.print(table, markup=False)
    say(f"images: {facts['images']}; {facts['bytes'] / 1e6:,.1f} MB in shards")
    rejects = dataset.rejects().to_pylist()
    for reject in rejects[:20]:
        say(f"rejected: {reject['source']}: {reject['reason']} ({reject['detail']})")
    if len(rejects) > 20:
        say(f"... and {len(rejects) - 20} more: --json lists them all")
    if args.preview:
        _preview(dataset, absolute(args.preview), args.n)
        say(f"preview: {args.preview}")
    return info | {"rejects": rejects}


def _preview(dataset: index.Dataset, out: str, n: int) -> None:
    if not 1 <= n <= 10_000:
        raise ValueError(f"n {n}: ask for 1 to 10000 samples")
    images, labels = [], []
    for name, split in dataset.info["splits"].items():
        share = min(split["samples"], max(1, round(n * split["samples"] / dataset.info["samples"])))
        rows = np.linspace(0, split["samples"] - 1, share).astype(int)
        images += images_of(dataset, name, rows)
        of = dataset.split(name).label[rows]
        labels += [dataset.classes[label] if label >= 0 else name for label in of]
    storage.write(out, report.png(report.grid(images, cell=96, labels=labels)))


def main(argv: list[str]) -> int:
    args = parse(Args, "inspect", argv)
    return execute(lambda: run(args), args.json)
