"""The ranks that train together. One process alone is a world of one: every operation is then a no-op."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

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

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

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


@dataclass(frozen=True)
class Contact:
    """What a rank has of the outside: whom it reports rows to, whether it was asked to take a checkpoint and stop, and
    who launched it when."""

    report: Callable[[dict], None] = lambda row: None
    asked: Callable[[], bool] = lambda: False
    launch: Launch = field(default_factory=Launch)
