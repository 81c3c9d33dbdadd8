"""Says what a dataset holds, and draws it."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from rich.filesize import decimal
from rich.table import Table

from jobs import dataset_page
from jobs.command import absolute, absolute_source, console, execute, parse, say
from jobs.report_page import dataset_facts, images_of
from pipeline import storage
from pipeline.evaluation import histograms, report
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
    _say_counts(args.dataset, dataset)
    _say_images(dataset)
    _say_rejects(dataset.info, rejects)
    _say_shards(dataset, mixed)
    if args.preview:
        _preview(dataset, absolute(args.preview), args.n)
        say(f"preview: {args.preview}")
    if args.html:
        page = dataset_page.page(dataset, rejects, mixed, args.source and absolute_source(args.source))
        storage.write(absolute(args.html), page.encode())
        say(f"page: {args.html} ({decimal(len(page))})")
    return dataset.info | {"rejects": rejects, "mixing": mixed}


def _say_counts(title: str, dataset: index.Dataset) -> None:
    splits, classes = dataset.info["splits"], dataset.classes
    table = Table("", *splits, "all", title=title, box=None, title_justify="left")
    listed = range(len(classes)) if len(classes) <= histograms.LISTED_CLASSES else ()
    rows = [(name, [split[name] for split in splits.values()]) for name in ("samples", "shards")]
    rows += [(f"  {classes[label]}", [split["classes"][label] for split in splits.values()]) for label in listed]
    for name, numbers in rows:
        table.add_row(name, *(f"{n:,}" for n in [*numbers, sum(numbers)]))
    console.print(table, markup=False)
    if classes and not listed:
        sizes = np.sum([split["classes"] for split in splits.values()], axis=0)
        order = np.argsort(sizes, kind="stable")
        few, many = (f"{classes[label]} {sizes[label]:,}" for label in (order[0], order[-1]))
        say(f"classes: {len(classes):,}; smallest {few}, median {np.median(sizes):,.0f}, largest {many}")


def _say_images(dataset: index.Dataset) -> None:
    info, facts = dataset.info, dataset_facts(dataset)
    say(f"images: {facts['images']}")
    if "bytes" in info:
        source, stored = info["bytes"]["source"], info["bytes"]["stored"]
        say(f"bytes: {decimal(source)} of source -> {decimal(stored)} stored, {stored / max(source, 1):.2f} of it")
    for name, says in dataset_page.measured(dataset).items():
        drawn = info.get("histograms", {}).get(name)
        line = histograms.sparkline(drawn["edges"], drawn["counts"]) if drawn else ""
        say(f"{dataset_page.MEASURES[name]}: {says}  {line}".rstrip())
    if info.get("passed") or info.get("animated"):
        say(f"passed through unchanged: {info.get('passed', 0):,}; animated: {info.get('animated', 0):,}")


def _say_rejects(info: dict, rejects: list[dict]) -> None:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in info["rejected"].items())
    say(f"rejects: {len(rejects):,}" + (f" ({reasons})" if reasons else ""))
    for reject in rejects[:20]:
        say(f"rejected: {reject['source']}: {reject['reason']} ({reject['detail']})")
    if len(rejects) > 20:
        say(f"... and {len(rejects) - 20} more: --json lists them all")


def _say_shards(dataset: index.Dataset, mixed: dict[str, dict | None]) -> None:
    shards = dataset_page.shard_facts(dataset.info)
    say(f"shards: {shards['shards']:,} of {shards['samples in each']} samples, {shards['size']}")
    for g in dataset.info["generations"]:
        say(f"generation {g['generation']}: {g['samples']:,} samples of {g['source']['items']:,} items")
    say(f"sidecars: {', '.join(dataset_page.present_sidecars(dataset)) or 'none'}")
    for split, of_split in mixed.items():
        say(f"mixing of {split}: {dataset_page.mixing_line(of_split)}")
        if warning := dataset_page.mixing_warning(split, of_split):
            say(f"warning: {warning}")


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
