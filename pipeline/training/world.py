"""The ranks that train together. One process alone is a world of one: every operation is then a no-op."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from pipeline.training import sums
from pipeline.training.ledger import Clock, Launch


@dataclass(frozen=True)
class World:
    """`rank` of `size`, computing on `device`. With size > 1 torch.distributed is initialised.

    clock: shows what the rank does, and where its time goes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"
    clock: Clock = field(default_factory=Clock, compare=False)
    _blocks: dict = field(default_factory=dict, compare=False, repr=False)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_all_(self, tensors: list[torch.Tensor]) -> None:
        """Sums many tensors over the ranks, in place; the ranks' have the same shapes, in the same order."""
        if self.size == 1:
            return
        sizes = tuple(t.numel() for t in tensors)
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
        if (dtype, sizes) not in self._blocks:
            self._blocks[dtype, sizes] = sums.block(self, sum(sizes), tensors[0].new_empty(0, dtype=dtype))
        block = self._blocks[dtype, sizes]
        torch._foreach_copy_(_as(tensors, sizes, block.mine), tensors)
        torch._foreach_copy_(tensors, _as(tensors, sizes, block.sum_()))

    def settle(self) -> None:
        """Waits until the device has computed what it was given."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)

    def from_first(self, value):
        """Rank 0's value (a small picklable one), on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def _as(tensors: list[torch.Tensor], sizes: tuple[int, ...], block: torch.Tensor) -> list[torch.Tensor]:
    """Pieces of `block` with the shapes of the tensors and their order in memory: else copying would transpose."""
    return [
        part.as_strided(t.shape, t.stride())
        if t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)
        else part.view(t.shape)
        for t, part in zip(tensors, block.split(sizes), strict=True)
    ]


@dataclass(frozen=True)
class Contact:
    """What a rank has of the outside: whom it reports rows to, whether it was asked to take a checkpoint and stop, and
    who launched it when."""

    report: Callable[[dict], None] = lambda row: None
    asked: Callable[[], bool] = lambda: False
    launch: Launch = field(default_factory=Launch)
