"""The ranks that train together. One process alone is a world of one: every operation is then a no-op."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """`rank` of `size`, computing on `device`. With size > 1 torch.distributed is initialised."""

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value):
        """Rank 0's value (a small picklable one), on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
