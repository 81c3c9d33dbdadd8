"""What some generations' images are like: counts by class, histograms of sizes, bytes and brightness; plain JSON.

Of index columns all but brightness and contrast, for which a sample of the images is decoded: 1.28 million rows take
seconds.
"""

import math
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline import draw
from pipeline.loading.augment import Augment
from pipeline.loading.steps import Reader
from pipeline.shards.index import Dataset, Split

_DECODERS = 8
_SAMPLE = draw.text_bits("drift sample")


def _octaves(octaves: int, parts: int) -> list[float]:
    """Whole edges from 1 to 2 ** octaves, each octave cut into `parts`, where there are whole numbers enough."""
    return np.unique(np.ceil(2.0 ** (np.arange(octaves * parts + 1) / parts))).tolist()


# Edges of each feature's bins, and its unit. Fixed, so that a profile of today can be held against one of next year.
FEATURES = {
    "short side": (_octaves(16, 8), "px"),
    "aspect ratio": (np.round(2.0 ** ((np.arange(98) - 48.5) / 8), 4).tolist(), ""),  # width / height; 1 is in a middle
    "file size": (_octaves(36, 4), "bytes"),  # as stored
    "brightness": (np.arange(0.0, 257, 8).tolist(), ""),  # mean of an image's values, 0 to 255
    "contrast": (np.arange(0.0, 129, 4).tolist(), ""),  # their standard deviation
}


@dataclass(frozen=True)
class Profile:
    """What some generations' images are like; plain JSON by `asdict`, and back by `Profile(**json)`.

    samples: of train; items: samples of every split and everything rejected; rejects: {reason: count}, of every split;
    classes: {name: samples of train}, those that have any; histograms: {feature: {edges (bins + 1), counts (bins),
    mean, None without values}} of train. Of `samples` images all but brightness and contrast, these of some.
    """

    samples: int
    items: int
    rejects: dict[str, int]
    classes: dict[str, int]
    histograms: dict[str, dict]

    def __post_init__(self):
        """ValueError: measured by a millstream that had other features or other bins."""
        for feature, (edges, _) in FEATURES.items():
            found = self.histograms.get(feature, {})
            if found.get("edges") != edges or len(found.get("counts", ())) != len(edges) - 1:
                raise ValueError(f"this profile's bins of {feature} are another millstream's: measure the data again")


def measure(dataset: Dataset, generations: Collection[int], images: int) -> Profile:
    """The profile of what these generations (their numbers) hold. Only their index files are read.

    images: decoded at most. They are those whose keys have the smallest hashes, so that the same data gives the same
    sample, whatever generation or shard they lie in. ValueError: no such generation, or a sampled image is damaged.
    """
    part = _part(dataset, generations)
    rejects = part.rejects()["reason"].to_pylist()
    items = sum(shard["samples"] for shard in part.info["shards"]) + len(rejects)
    values, classes, samples = {feature: np.empty(0) for feature in FEATURES}, {}, 0
    if "train" in part.info["splits"]:
        split = part.split("train")
        samples, labels = len(split), np.bincount(split.label[split.label >= 0], minlength=len(part.classes))
        classes = {name: int(n) for name, n in zip(part.classes, labels, strict=True) if n}
        values["short side"] = np.minimum(split.width, split.height)
        values["aspect ratio"] = split.width / np.maximum(split.height, 1)
        values["file size"] = split.size
        if images and samples:
            values["brightness"], values["contrast"] = _looks(split.take(_sampled(split, images)))
    tallies = {feature: tally(feature, of_feature) for feature, of_feature in values.items()}
    return Profile(samples, items, dict(sorted(Counter(rejects).items())), classes, tallies)


def tally(feature: str, values: np.ndarray) -> dict:
    """Values (n,) of one of FEATURES -> what `Profile.histograms` holds of it; the outer bins take what is beyond."""
    edges = FEATURES[feature][0]
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    mean = math.fsum(values.tolist()) / len(values) if len(values) else None  # exact: in any order the same
    return {"edges": edges, "counts": counts.tolist(), "mean": mean}


def _part(dataset: Dataset, generations: Collection[int]) -> Dataset:
    """The dataset of these generations alone; of `info`, only what `measure` uses is theirs."""
    have = {generation["generation"]: generation for generation in dataset.info["generations"]}
    if strange := sorted(set(generations) - set(have)):
        raise ValueError(f"no generation {strange[0]} in {dataset.root}: it has {', '.join(map(str, have))}")
    if not generations:
        raise ValueError(
            f"no generation of {dataset.root} to measure: name at least one of {', '.join(map(str, have))}"
        )
    kept = [generation for number, generation in have.items() if number in generations]
    shards = [shard for shard in dataset.info["shards"] if shard["generation"] in generations]
    splits = {shard["split"]: dataset.info["splits"][shard["split"]] for shard in shards}
    info = dataset.info | {"generations": kept, "shards": shards, "splits": splits}
    return Dataset(dataset.root, info, dataset.classes)


def _sampled(split: Split, images: int) -> np.ndarray:
    """Rows of the `images` samples whose keys' hashes are smallest, int64 rising."""
    hashes = []
    for chunk in split.keys.chunks:  # keys are 20 hex digits, `shards.plan.key`
        digits = "".join(key[:16] for key in chunk.to_pylist())
        hashes.append(draw.bits(_SAMPLE, np.frombuffer(bytes.fromhex(digits), ">u8")))
    return np.sort(np.argsort(np.concatenate(hashes), kind="stable")[:images])


def _looks(split: Split) -> np.ndarray:
    """(brightness, contrast) of every image, float64 (2, n). Threads: the codecs release the GIL, and stores wait."""
    reader = Reader(split, Augment())

    def look(row: int) -> tuple[float, float]:
        # Not numpy's std, which would hold eight bytes a value of an image of any size.
        means, deviations = (numbers.ravel() for numbers in cv2.meanStdDev(reader.stored(row)))
        mean = float(means.mean())
        return mean, math.sqrt(max(float((deviations**2 + means**2).mean()) - mean**2, 0.0))

    with ThreadPoolExecutor(_DECODERS) as pool:
        return np.array(list(pool.map(look, range(len(split))))).T
