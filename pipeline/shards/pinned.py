"""A dataset as it was: what was begun on some generations goes on with just these, however it has grown since."""

from collections.abc import Collection, Sequence

from pipeline.shards.index import Dataset, digest


def generations(dataset: Dataset) -> list[str]:
    """What identifies each generation: SHA-256 of its shards' names, sizes and digests, hex. These fix every image, its
    label and its place in the order; a generation that is appended leaves those before it as they were.
    """
    marks = {generation["generation"]: [] for generation in dataset.info["generations"]}
    for shard in dataset.info["shards"]:
        marks[shard["generation"]].append([shard[name] for name in ("name", "split", "samples", "sha256")])
    return [digest(mark) for mark in marks.values()]


def at(dataset: Dataset, pins: Sequence[str]) -> Dataset:
    """The dataset of those generations alone to which `generations` gave `pins`. Classes, pixel statistics and counts
    by class remain those of the whole.

    ValueError if it has one of them no longer: it was pruned or built anew, or is another one.
    """
    have = generations(dataset)
    if missing := [pin for pin in pins if pin not in have]:
        number = list(pins).index(missing[0])
        found = "is another now: pruned, or built anew" if number < len(have) else "is not there"
        raise ValueError(
            f"{dataset.root} is not the dataset that was: its generation {number} {found}. What was begun on it cannot "
            f"go on: bring that dataset back, or begin anew with another --out"
        )
    numbers = [generation["generation"] for generation in dataset.info["generations"]]
    return of(dataset, [number for number, mark in zip(numbers, have, strict=True) if mark in pins])


def of(dataset: Dataset, numbers: Collection[int]) -> Dataset:
    """The dataset of the generations of these numbers alone, as `at`. ValueError if it has one of them not."""
    if strange := sorted({*numbers} - {generation["generation"] for generation in dataset.info["generations"]}):
        raise ValueError(f"{dataset.root} has no generation {strange[0]}")
    if len({*numbers}) == len(dataset.info["generations"]):
        return dataset
    kept = [generation for generation in dataset.info["generations"] if generation["generation"] in numbers]
    shards = [shard for shard in dataset.info["shards"] if shard["generation"] in numbers]
    splits = {}
    for name, split in dataset.info["splits"].items():
        if mine := [shard for shard in shards if shard["split"] == name]:
            splits[name] = split | {"samples": sum(shard["samples"] for shard in mine), "shards": len(mine)}
    samples = sum(split["samples"] for split in splits.values())
    info = dataset.info | {"generations": kept, "shards": shards, "splits": splits, "samples": samples}
    return Dataset(dataset.root, info, dataset.classes)
