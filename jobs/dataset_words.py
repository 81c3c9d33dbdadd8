"""What a dataset holds, in words: the lines that `inspect` says, and the facts that its page has as well."""

import numpy as np
from rich.filesize import decimal
from rich.table import Table

from jobs.report_page import dataset_facts
from pipeline import storage
from pipeline.evaluation import histograms
from pipeline.shards import index, sidecars

MEASURES = {"short_side": "short side in px", "aspect": "width / height"}  # histograms of dataset.json, in words
LISTED_REJECTS = 20


def counts(title: str, dataset: index.Dataset) -> Table:
    """Samples and shards by split, and up to 30 classes; of more, `lines` has a summary."""
    splits, classes = dataset.info["splits"], dataset.classes
    table = Table("", *splits, "all", title=title, box=None, title_justify="left")
    rows = [(name, [split[name] for split in splits.values()]) for name in ("samples", "shards")]
    if len(classes) <= histograms.LISTED_CLASSES:
        rows += [(f"  {name}", [s["classes"][label] for s in splits.values()]) for label, name in enumerate(classes)]
    for name, numbers in rows:
        table.add_row(name, *(f"{n:,}" for n in [*numbers, sum(numbers)]))
    return table


def lines(dataset: index.Dataset, rejects: list[dict], mixed: dict[str, dict | None]) -> list[str]:
    """All the rest. rejects: rows of REJECTS; mixed: `mixing` by split."""
    info, shards = dataset.info, shard_facts(dataset.info)
    said = [f"images: {dataset_facts(dataset)['images']}"]
    if len(dataset.classes) > histograms.LISTED_CLASSES:
        sizes = np.sum([split["classes"] for split in info["splits"].values()], axis=0)
        few, many = (f"{dataset.classes[label]} {sizes[label]:,}" for label in (sizes.argmin(), sizes.argmax()))
        middle = f"{np.median(sizes):,.0f}"
        said.insert(0, f"classes: {len(sizes):,}; smallest {few}, median {middle}, largest {many}")
    for name, usual in measured(dataset).items():
        drawn = info.get("histograms", {}).get(name)
        line = histograms.sparkline(drawn["edges"], drawn["counts"]) if drawn else ""
        said.append(f"{MEASURES[name]}: {usual}  {line}".rstrip())
    if "bytes" in info:
        source, stored = info["bytes"]["source"], info["bytes"]["stored"]
        said.append(
            f"bytes: {decimal(source)} of source -> {decimal(stored)} stored, {stored / max(source, 1):.2f} of it"
        )
    if info.get("passed") or info.get("animated"):
        said.append(f"passed through unchanged: {info.get('passed', 0):,}; animated: {info.get('animated', 0):,}")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in info["rejected"].items())
    said.append(f"rejects: {len(rejects):,}" + (f" ({reasons})" if reasons else ""))
    said += [f"rejected: {r['source']}: {r['reason']} ({r['detail']})" for r in rejects[:LISTED_REJECTS]]
    if len(rejects) > LISTED_REJECTS:
        said.append(f"... and {len(rejects) - LISTED_REJECTS:,} more: --json lists them all")
    said.append(f"shards: {shards['shards']:,} of {shards['samples in each']} samples, {shards['size']}")
    for g in info["generations"]:
        items = f"{g['source']['items']:,} items"
        said.append(f"generation {g['generation']}: {g['samples']:,} samples of {items}")
    said.append(f"sidecars: {', '.join(present_sidecars(dataset)) or 'none'}")
    for split, of_split in mixed.items():
        said.append(f"mixing of {split}: {mixing_line(of_split)}")
        if warning := mixing_warning(split, of_split):
            said.append(f"warning: {warning}")
    return said


def shard_facts(info: dict) -> dict:
    """How many shards there are, and how large."""
    sizes = sorted(shard["bytes"] for shard in info["shards"])
    samples = [shard["samples"] for shard in info["shards"]]
    return {
        "shards": len(sizes),
        "size": f"{decimal(sizes[0])} to {decimal(sizes[-1])}, median {decimal(sizes[len(sizes) // 2])}",
        "samples in each": f"{min(samples):,} to {max(samples):,}",
    }


def present_sidecars(dataset: index.Dataset) -> list[str]:
    """The kinds of sidecars that lie beside the shards, and how many of their files if some are missing."""
    there, found = {file.path for file in storage.list_files(dataset.root)}, []
    for kind in sidecars.KINDS:
        wanted = sidecars.names(dataset.info, [kind])
        if present := len(there.intersection(wanted)):
            found.append(kind if present == len(wanted) else f"{kind} ({present:,} of {len(wanted):,} files)")
    return found


def measured(dataset: index.Dataset) -> dict[str, str]:
    """{each name of MEASURES: what is usual among the stored images, in words}."""
    splits, found = [dataset.split(name) for name in dataset.info["splits"]], {}
    width, height = (np.concatenate([getattr(split, side) for split in splits]) for side in ("width", "height"))
    for name, values in (("short_side", np.minimum(width, height)), ("aspect", width / height)):
        low, middle, high = (f"{v:.4g}" for v in np.percentile(values, (5, 50, 95), method="nearest"))
        found[name] = f"median {middle}, nine in ten from {low} to {high}" if low != high else f"nine in ten are {low}"
    return found


def mixing_line(mixed: dict | None) -> str:
    """`mixing` of one split."""
    if mixed is None:
        return "no labels"
    return (
        f"{mixed['entropy']:.3f} bits in a shard, {mixed['entropy_ratio']:.4f} of random; "
        f"{mixed['adjacent']:.2%} of neighbours of one class, {mixed['adjacent_ratio']:.3f} of random "
        f"(chance alone: ± {mixed['adjacent_noise']:.3f})"
    )


def mixing_warning(split: str, mixed: dict | None) -> str:
    """What to do where a split is not mixed, "" where it is."""
    if mixed is None or mixed["mixed"]:
        return ""
    return (
        f"{split} is sorted by class rather than mixed: readers that shuffle little see runs of one class. "
        "Shard it anew as a whole, with shuffling on; a sorted table by its shards: millstream shard tars:DATASET OUT."
    )
