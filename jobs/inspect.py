"""Says what a dataset holds, and draws it."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from rich.filesize import decimal

from jobs import dataset_page, dataset_words
from jobs.command import absolute, absolute_source, console, execute, parse, say
from jobs.report_page import images_of
from pipeline import storage
from pipeline.evaluation import report
from pipeline.shards import index
from pipeline.shards.mixing import mixing


@dataclass(frozen=True)
class Args:
    """Say what a dataset holds: counts, classes, sizes, rejects, shards, and how well its classes are mixed."""

    dataset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATASET")]
    """What `millstream shard` wrote, local or s3://..."""
    preview: str | None = None
    """Draw a contact sheet of some samples of each split into this PNG file."""
    n: int = 100
    """Samples on the contact sheet."""
    html: str | None = None
    """Write a page with samples of each class, histograms and rejects into this file; it needs no other."""
    source: str | None = None
    """SOURCE the dataset was made of, as `millstream shard` takes it: the page then shows what rejects look like."""
    json: bool = False
    """Print the facts as one JSON object on stdout."""


def run(args: Args) -> dict:
    """What dataset.json holds, with the rejects listed and the class mixing of each split."""
    if args.source and not args.html:
        raise ValueError(f"--source {args.source} is for the page's pictures of rejects: pass --html PAGE.html as well")
    dataset = index.load(absolute(args.dataset))
    rejects = dataset.rejects().to_pylist()
    splits = {name: dataset.split(name) for name in dataset.info["splits"]}
    mixed = {name: mixing(split.label, split.counts) for name, split in splits.items()}
    console.print(dataset_words.counts(args.dataset, dataset), markup=False)
    for line in dataset_words.lines(dataset, rejects, mixed):
        say(line)
    if args.preview:
        _preview(dataset, absolute(args.preview), args.n)
        say(f"preview: {args.preview}")
    if args.html:
        page = dataset_page.page(dataset, rejects, mixed, args.source and absolute_source(args.source))
        storage.write(absolute(args.html), page.encode())
        say(f"page: {args.html} ({decimal(len(page))})")
    return dataset.info | {"rejects": rejects, "mixing": mixed}


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
