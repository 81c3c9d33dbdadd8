"""How well the classes of a split are mixed, measured against chance.

Two numbers say what a reader gets that only goes through the shards in order: the entropy of the labels inside a shard
(what shuffling a shard can mix) and how often two samples in a row are of one class (what not shuffling at all gives).
Beside each stands what a random permutation of the same labels gives, cut into the same shards.
"""

import numpy as np

from pipeline import draw

TOLERANCE = 0.01  # a split is mixed when it differs from chance by this at most, and what chance itself varies by
_DEVIATIONS = 4  # of chance, beyond the tolerance: one well-mixed split in 30,000 is called sorted
_DRAW = draw.text_bits("class mixing")
_DRAWN = 2_000_000  # labels permuted in all: twenty permutations of a small split, two of a large one


def mixing(labels: np.ndarray, counts: np.ndarray, seed: int = 0) -> dict | None:
    """The class mixing of one split as it is stored; None where no sample has a label.

    labels: integers (n,) in stored order, -1 for none, which counts as one more class; counts: integers (shards,),
    samples in each shard, n in all. seed: of the permutations. Fourteen million labels take seconds.

    entropy: bits, the mean over shards; adjacent: the share of the n - 1 pairs of neighbours, shard borders included,
    that are of one class. Each has `_random`, what chance gives (a mean over permutations; exact), `_ratio` to that, 1
    if it is 0, and `_noise`, the standard deviation of the ratio by chance alone: 1,000 classes of 1,300 have 0.03
    in `adjacent`. mixed: whether neither ratio is worse than chance by more than 1 % and four times its noise.

    ValueError: the counts do not add up to n.
    """
    labels, counts = np.asarray(labels), np.asarray(counts)
    if counts.sum() != len(labels):
        raise ValueError(
            f"{len(labels)} labels in shards of {counts.sum()} samples in all: pass the labels of one split"
        )
    if not len(labels) or labels.max() < 0:
        return None
    classes, labels = np.unique(labels, return_inverse=True)
    draws = int(np.clip(_DRAWN // len(labels), 2, 20))
    by_chance = [
        _entropy(labels[draw.permutation(len(labels), _DRAW, seed, i)], counts, len(classes)) for i in range(draws)
    ]
    entropy = _measured("entropy", _entropy(labels, counts, len(classes)), np.mean(by_chance), np.std(by_chance))
    same = labels[1:] == labels[:-1]
    adjacent = _measured("adjacent", same.mean() if len(same) else 0.0, *_adjacent_by_chance(np.bincount(labels)))
    mixed = entropy["entropy_ratio"] >= 1 - TOLERANCE - _DEVIATIONS * entropy["entropy_noise"]
    mixed &= adjacent["adjacent_ratio"] <= 1 + TOLERANCE + _DEVIATIONS * adjacent["adjacent_noise"]
    return {**entropy, **adjacent, "mixed": mixed}


def _measured(name: str, value: float, random: float, deviation: float) -> dict:
    value, random, deviation = float(value), float(random), float(deviation)
    ratio, noise = (value / random, deviation / random) if random else (1.0, 0.0)
    return {name: value, f"{name}_random": random, f"{name}_ratio": ratio, f"{name}_noise": noise}


def _entropy(labels: np.ndarray, counts: np.ndarray, classes: int) -> float:
    """Bits, the mean over the shards that hold a sample. labels: 0 to classes - 1."""
    counts = counts[counts > 0]
    # One sort for all shards: 14,000 of them with 21,000 classes each would be a table of 300 million numbers.
    found = np.sort(np.repeat(np.arange(len(counts), dtype=np.int64) * classes, counts) + labels)
    starts = np.flatnonzero(np.concatenate([[True], found[1:] != found[:-1]]))
    runs = np.diff(np.append(starts, len(found)))
    share = runs / counts[found[starts] // classes]
    return float(-(share * np.log2(share)).sum() / len(counts))


def _adjacent_by_chance(sizes: np.ndarray) -> tuple[float, float]:
    """Mean, exact, and standard deviation, for large n, of the same-class rate over all orders of these class sizes
    (int64 (classes,)). Mood 1940, The Distribution Theory of Runs: runs of several kinds."""
    n = int(sizes.sum())
    if n < 2:
        return 0.0, 0.0
    share = sizes / n
    two, three = (share**2).sum(), (share**3).sum()
    mean = (sizes * ((sizes - 1) / (n - 1))).sum() / n
    return mean, np.sqrt(max(two + two**2 - 2 * three, 0.0) / n)
