"""What an epoch holds, where that is not each sample of a split once: some of them, or some more often than others.

    subset, fold, classes       split -> a split of some of its samples
    class_balanced, weighted,
    newest_first                split -> weights, float64 (n,): how often to draw each sample, in proportion
    draws                       split and weights -> `Draws`: how often each is in each epoch, which `order` asks for
    mixture                     several splits -> one split, and its `Draws`
    choose                      a split and a run's `Selection` -> all of that

Nothing has a state. Which samples a subset or a fold holds is a hash of their keys, so none changes sides when the
dataset grows; how often an epoch holds one is a function of weights, seed and epoch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import draw
from pipeline.loading.order import Order
from pipeline.shards.index import Split

_SUBSET, _FOLD, _PHASE, _PLACES = (draw.text_bits(f"selection/{use}") for use in ("subset", "fold", "phase", "places"))
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio
_UNIT = 20  # bits after the point of an expectation: whole numbers add up exactly


@dataclass(frozen=True)
class Selection:
    """Which samples a run trains on, and how often."""

    fraction: float = 1.0
    """Share of the training samples, by hash of their keys: a smaller share is part of a larger one."""
    folds: int = 0
    """Cross-validation: train without fold --fold of so many, and validate on it instead of `val`; 0: none."""
    fold: int = 0
    """Which fold is held out, from 0 on."""
    balance: bool = False
    """Draw each class as often as any other, rare ones several times an epoch."""
    recent: float = 0.0
    """Share of each epoch drawn from the dataset's newest generations; 0: as much as there is of them."""
    recent_generations: int = 1
    """How many of its generations --recent means."""

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction {self.fraction}: above 0, and 1 at most")
        if (self.folds or self.fold) and not (self.folds >= 2 and 0 <= self.fold < self.folds):
            raise ValueError(f"fold {self.fold} of {self.folds}: at least 2 folds, numbered from 0")
        if not 0 <= self.recent < 1 or self.recent_generations < 1:
            raise ValueError(
                f"recent {self.recent} of {self.recent_generations} generations: a share below 1, of at least one"
            )


@dataclass(frozen=True)
class Chosen:
    """What a selection makes of a split: its samples, how often epochs hold each (None: once), the fold held out."""

    split: Split
    draws: "Draws | None"
    held_out: Split | None

    def order(self, seed: int) -> Order:
        """The order in which a run of this seed draws them."""
        return Order(self.split.counts, seed, joined=self.split.joined, draws=self.draws)


def choose(split: Split, selection: Selection, seed: int) -> Chosen:
    """Applies a selection. ValueError: it leaves nothing, or there are no classes to balance."""
    held_out = None
    if selection.folds:
        split, held_out = fold(split, selection.folds, selection.fold)
    split = subset(split, selection.fraction)
    weights, strata = class_balanced(split) if selection.balance else None, split.label
    if selection.recent:
        recent = split.generation >= split.generations - selection.recent_generations
        weights = newest_first(split, recent, selection.recent, weights)
        strata = strata + recent * (int(strata.max(initial=0)) + 2)  # so that every epoch keeps to the share
    if weights is None:
        return Chosen(split, None, held_out)
    return Chosen(split, Draws(weighted(split, weights), strata, len(split), seed), held_out)


def newest_first(
    split: Split, recent: np.ndarray, share: float, weights: np.ndarray | None = None
) -> np.ndarray | None:
    """Weights, float64 (n,), under which the `recent` samples, bool (n,), make up `share` of an epoch and the others
    the rest; `weights` (None: all alike) hold within each. Where either has none, `weights` as they are."""
    if recent.all() or not recent.any():
        return weights
    inside = np.ones(len(split)) if weights is None else weights
    of_recent, of_others = inside[recent].sum(), inside[~recent].sum()
    return inside * np.where(recent, share / of_recent, (1 - share) / of_others)


def subset(split: Split, fraction: float, seed: int = 0) -> Split:
    """About `fraction` of the samples, by hash of seed and key: a smaller fraction's are all in a larger one's.

    ValueError for a fraction outside (0, 1], or one that leaves nothing.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction}: above 0, and 1 at most")
    if fraction == 1:
        return split
    return _taken(split, _hashed(split, _SUBSET, seed) < fraction, f"a fraction of {fraction}: use a larger one")


def fold(split: Split, k: int, i: int) -> tuple[Split, Split]:
    """(to train on, held out) of fold `i` of `k`: each sample is held out in one fold, by hash of its key.

    Without a seed, as the validation split (`shards.split`). ValueError for no such fold, or one with an empty side.
    """
    if k < 2 or not 0 <= i < k:
        raise ValueError(f"fold {i} of {k}: at least 2 folds, numbered from 0")
    held_out = (_hashed(split, _FOLD) * k).astype(np.int64) == i
    wanted = f"fold {i} of {k}: use fewer folds"
    return _taken(split, ~held_out, wanted), _taken(split, held_out, wanted)


def classes(split: Split, labels: Collection[int]) -> Split:
    """The samples of some classes; labels stay as they are. ValueError if there are none of one of them."""
    for label in labels:
        if not (split.label == label).any():
            raise ValueError(f"{split.name} holds no sample of class {label}: leave it out")
    return _taken(split, np.isin(split.label, list(labels)), f"of classes {list(labels)}: name at least one")


def class_balanced(split: Split) -> np.ndarray:
    """Weights, float64 (n,), under which each class that occurs is drawn as often. ValueError without classes."""
    if not len(split) or split.label.min() < 0:
        raise ValueError(f"{split.name} has samples without a class, so classes cannot be balanced: shard it with some")
    return 1 / np.bincount(split.label)[split.label]


def weighted(split: Split, weights: np.ndarray | Mapping[int, float]) -> np.ndarray:
    """Weights, float64 (n,): `weights` as they are, or of each sample's class, 1 where it is not named.

    ValueError: not one a sample, a negative one or none above 0, a class of which there is no sample.
    """
    if isinstance(weights, Mapping):
        if strange := sorted(set(weights) - set(np.unique(split.label).tolist())):
            raise ValueError(f"{split.name} holds no sample of class {strange[0]}: leave out its weight")
        by_class, weights = weights, np.ones(len(split))
        for label, weight in by_class.items():
            weights[split.label == label] = weight
    weights = np.asarray(weights, np.float64)
    if weights.shape != (len(split),):
        raise ValueError(f"{weights.shape} weights for the {len(split)} samples of {split.name}: give one a sample")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(
            f"weights from {weights.min()} to {weights.max()}: none below 0, one at least above, all finite"
        )
    return weights


class Draws:
    """How often an epoch of `length` draws holds each row: its expectation, rounded down or up.

    weights: float64 (rows,), expectations in proportion. strata: int (rows,), any numbers: what is expected of the rows
    of a stratum together is likewise met to within one draw in every epoch, so with labels as strata no class is short.

    Systematic sampling (Madow 1949): expectations are laid end to end, stratum after stratum, and one row is drawn at
    each whole number plus the epoch's phase. Phases advance by the golden ratio, so that over epochs, too, every row
    is drawn as often as expected, to within a few: independent draws of one tenth of a class would leave a third of it
    unseen after ten epochs. Places inside a stratum are shuffled, once: a source that repeats itself every ten
    images, as turntable photos do, would otherwise show one side an epoch.
    """

    def __init__(self, weights: np.ndarray, strata: np.ndarray, length: int, seed: int):
        if length < 1:
            raise ValueError(f"an epoch of {length} samples: at least 1")
        self.rows, self.length = len(weights), length
        self._order = np.lexsort((draw.bits(_PLACES, seed, np.arange(self.rows)), strata))
        ends = np.cumsum(weights[self._order] / weights.max())  # any finite weights: neither sum nor share overflows
        ends = np.rint(ends / ends[-1] * (length << _UNIT)).astype(np.int64)
        ends[-1] = length << _UNIT  # whatever was lost on the way
        self._edges = np.concatenate([[0], np.minimum(ends, ends[-1])])
        self._phase = int(draw.bits(_PHASE, seed))

    def times(self, epoch: int) -> np.ndarray:
        """How often epoch `epoch` holds each row: int64 (rows,), `length` in all."""
        phase = (self._phase + epoch * _GOLDEN) % (1 << 64) >> (64 - _UNIT)
        times = np.empty(self.rows, np.int64)
        times[self._order] = np.diff((self._edges + ((1 << _UNIT) - 1 - phase)) >> _UNIT)  # whole + phase below an edge
        return times


def draws(split: Split, weights: np.ndarray, seed: int, length: int | None = None) -> Draws:
    """Epochs of `length` draws (None: as many as the split has samples) by `weights`, classes in proportion."""
    return Draws(weighted(split, weights), split.label, len(split) if length is None else length, seed)


def mixture(
    parts: Sequence[tuple[Split, float]],
    seed: int,
    length: int | None = None,
    weights: Sequence[np.ndarray | None] | None = None,
) -> tuple[Split, Draws]:
    """Several splits as one, of which each makes up its share of every epoch, to within one draw.

    parts: (split, share), shares in proportion; length: draws in an epoch, None: as many as there are samples;
    weights: of the samples inside each part, None: all alike. Labels must mean the same in all parts: whoever has the
    datasets compares their classes. ValueError for no parts, a share that is not above 0, or an empty part.
    """
    if not parts:
        raise ValueError("a mixture of nothing: name at least one dataset")
    of_rows = []
    for (split, share), inside in zip(parts, weights or [None] * len(parts), strict=True):
        if not 0 < share < np.inf or not len(split):
            raise ValueError(f"{split.root} {split.name}: {len(split)} samples at a share of {share}: both above 0")
        inside = weighted(split, np.ones(len(split)) if inside is None else inside)
        inside = inside / inside.max()
        of_rows.append(inside * (share / inside.sum()))
    joined = _joined([split for split, _ in parts])
    part = np.repeat(np.arange(len(parts)), [len(split) for split, _ in parts])
    strata = part * (int(joined.label.max()) + 2) + joined.label  # labels from -1 on: part after part, class by class
    return joined, Draws(np.concatenate(of_rows), strata, len(joined) if length is None else length, seed)


def _joined(splits: list[Split]) -> Split:
    shards_before = np.cumsum([0, *(len(split.shards) for split in splits)])
    columns = {c: np.concatenate([getattr(split, c) for split in splits])
               for c in ("counts", "offset", "size", "label", "width", "height", "channels", "crc32")}  # fmt: skip
    columns["shard"] = np.concatenate(
        [split.shard + np.int32(before) for split, before in zip(splits, shards_before[:-1], strict=True)]
    )
    picked, before = [], 0
    for split in splits:
        picked.append(before + (np.arange(len(split)) if split.picked is None else split.picked))
        before += sum(end - first for _, first, end in split._rows)
    return Split(
        root="",
        name="+".join(dict.fromkeys(split.name for split in splits)),
        shards=[split.path(shard) for split in splits for shard in split.shards],
        digests=[digest for split in splits for digest in split.digests],
        shard_bytes=[size for split in splits for size in split.shard_bytes],
        **columns,
        _rows=[(split.path(file), first, end) for split in splits for file, first, end in split._rows],
        picked=np.concatenate(picked),
    )


def _hashed(split: Split, *key: int) -> np.ndarray:
    """Numbers in [0, 1) by sample, float64 (n,), from its key alone."""
    words = np.array(split.keys.to_pylist(), "S24").view("<u8").reshape(-1, 3)  # keys are 20 hex digits, `plan.key`
    return draw.uniform(*key, *words.T)


def _taken(split: Split, chosen: np.ndarray, what: str) -> Split:
    if not chosen.any():
        raise ValueError(f"no sample of the {len(split)} of {split.name} is left by {what}")
    return split.take(np.flatnonzero(chosen))
