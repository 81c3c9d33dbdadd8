"""A dataset as it was: what was begun on some generations goes on with just these, however it has grown since."""

from collections.abc import Sequence

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
    """The dataset as it was when `generations` gave `pins`, with shards and samples of theirs alone. Classes, pixel
    statistics and counts by class remain those of the whole.

    ValueError if these are not the first generations it has: it was pruned or built anew, or is another one.
    """
    have = generations(dataset)
    if list(pins) != have[: len(pins)]:
        number = next(i for i, pin in enumerate(pins) if have[i : i + 1] != [pin])
        found = "is another now: pruned, or built anew" if number < len(have) else "is not there"
        raise ValueError(
            f"{dataset.root} is not the dataset that was: its generation {number} {found}. What was begun on it cannot "
            f"go on: bring that dataset back, or begin anew with another --out"
        )
    if len(pins) == len(have):
        return dataset
    kept = dataset.info["generations"][: len(pins)]
    numbers = {generation["generation"] for generation in kept}
    shards = [shard for shard in dataset.info["shards"] if shard["generation"] in numbers]
    splits = {}
    for name, split in dataset.info["splits"].items():
        if mine := [shard for shard in shards if shard["split"] == name]:
            splits[name] = split | {"samples": sum(shard["samples"] for shard in mine), "shards": len(mine)}
    samples = sum(split["samples"] for split in splits.values())
    info = dataset.info | {"generations": kept, "shards": shards, "splits": splits, "samples": samples}
    return Dataset(dataset.root, info, dataset.classes)
