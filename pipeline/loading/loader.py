"""The loader for anyone's torch loop: batches of a dataset, without Ray and without our trainer.

    loader = Loader("s3://lake/photos", batch=256, augment=Augment(224, crop="resized", flip=True), rank=0, world=1)
    for batch in loader:
        loss = f.cross_entropy(model(loader.to_float(batch.images.to(device))), batch.labels.to(device))
        ...
        saved = loader.position

The one number `position` is all there is to save. A loader made with it, at any world size, goes on with the very next
sample: none repeated, none dropped, and each with the pixels it would have had.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import torch

from pipeline.loading import augment as aug
from pipeline.loading.augment import Augment
from pipeline.loading.cache import Cache
from pipeline.loading.order import Batching
from pipeline.loading.reader import Batch
from pipeline.loading.selection import Chosen, Selection, choose, mixture
from pipeline.loading.steps import Steps
from pipeline.shards import index
from pipeline.shards.index import Dataset


class Loader:
    """Endless batches: this rank's share of each global batch of `batch` samples, from `position` on.

    dataset: path of one, or an opened one, or several with their shares of an epoch, [(path, share), ...], whose
    classes are the same; rank, world: of the processes that share each global batch, `world` a power of two up to 64
    that divides it; position: samples seen by all ranks, a multiple of `batch`; seed: decides order and augmentation;
    selection: part of a dataset, or classes balanced; threads: that decode (default: all cores); cache: for shards in a
    store; pinned: page-locked batches (default: where there is a GPU).

    Iterated again, it goes on where it stopped. Raises ValueError for what does not divide, for datasets of other
    classes, and for one whose images differ in size where `augment` names none.
    """

    def __init__(
        self,
        dataset: str | Dataset | Sequence[tuple[str | Dataset, float]],
        split: str = "train",
        batch: int = 256,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
        seed: int = 0,
        augment: Augment | None = None,
        selection: Selection | None = None,
        threads: int | None = None,
        cache: Cache | None = None,
        pinned: bool | None = None,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: ranks are numbered from 0")
        parts = [(dataset, 1.0)] if isinstance(dataset, str | Dataset) else dataset
        if not parts:
            raise ValueError("no dataset: name at least one")
        parts = [(index.load(part) if isinstance(part, str) else part, share) for part, share in parts]
        self.dataset, self.batch = parts[0][0], batch
        chosen = _chosen(parts, split, selection or Selection(), seed)
        self.split = chosen.split
        of_each = [aug.resolved(augment or Augment(), part) for part, _ in parts]
        self.augment = dataclasses.replace(of_each[0], channels=max(each.channels for each in of_each))
        self._steps = Steps(
            self.split,
            self.augment,
            seed,
            Batching(batch, world, world),
            rank,
            position,
            threads or os.cpu_count() or 1,
            cache=cache,
            pinned=torch.cuda.is_available() if pinned is None else pinned,
            draws=chosen.draws,
        )

    def __iter__(self) -> Iterator[Batch]:
        for step in self._steps:
            yield step.micro_batches[0]

    @property
    def position(self) -> int:
        """Samples seen by all ranks, those of the batch that was given out last among them."""
        return self._steps.position

    @property
    def epoch(self) -> float:
        """Epochs so far."""
        return self.position / self._steps.order.n

    def keys(self, batch: Batch) -> list[str]:
        """Key of each sample of a batch, as in the shards."""
        return self.split.keys.take(batch.rows).to_pylist()

    def to_float(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, s, s, c) on any device -> float32 (n, c, s, s), less the mean, over the standard deviation of the
        dataset (of several, the first)."""
        mean, std = (torch.tensor(x, device=images.device) for x in aug.statistics(self.dataset, self.augment.channels))
        return aug.to_float(images, mean, std)

    def report(self) -> dict:
        """Where time went, bad samples, cache hits: as `Steps.report`."""
        return self._steps.report()


def _chosen(parts: list[tuple[Dataset, float]], split: str, selection: Selection, seed: int) -> Chosen:
    (first, _), *others = parts
    if not others:
        return choose(first.split(split), selection, seed)
    for other, _ in others:
        if other.classes != first.classes:
            raise ValueError(f"{other.root} has other classes than {first.root}: labels would not mean the same")
    if selection.balance:
        raise ValueError("balance is for one dataset: weigh a mixture by its shares")
    chosen = [(choose(part.split(split), selection, seed).split, share) for part, share in parts]
    return Chosen(*mixture(chosen, seed), held_out=None)
