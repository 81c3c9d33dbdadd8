"""What a run is computed on: free to differ at every start, and none of it shows in the result."""

import re
from dataclasses import dataclass

from pipeline.loading.order import Batching

_SPAN = re.compile(r"(\d+)(?:\.\.(\d+))?")


@dataclass(frozen=True)
class Resources:
    """What a run is computed on; may differ at every start."""

    workers: int | str = 1
    """Processes that share each step; 2..8: as many as there is room for, more or fewer as nodes come and go; 0: none
    besides this one, without Ray."""
    threads: int = 0
    """Threads of a worker; 0: the machine's cores divided among its workers."""
    device: str = "auto"
    """cpu, cuda (one GPU a worker) or auto."""
    max_failures: int = 3
    """Restarts in a row that bring no new checkpoint, after workers died. Nodes that gave notice do not count."""
    hang_seconds: float = 600.0
    """A run in which nothing moves for so long is restarted, and the rank that held it up is named."""
    resize_seconds: float = 60.0
    """With --workers 2..8: how long a run goes on at its size before it grows into room that has come free."""
    cache: str = "auto"
    """Where each node keeps shards of a store: a folder; auto: MILLSTREAM_CACHE, or millstream in the user's cache
    folder; none: nowhere."""
    cache_gb: float = 50.0
    """How much of them, in GB of disk."""

    def __post_init__(self):
        span(self.workers)
        if self.threads < 0 or self.max_failures < 0:
            raise ValueError(f"threads {self.threads} and max_failures {self.max_failures}: 0 or more")
        for name in ("hang_seconds", "resize_seconds", "cache_gb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: above 0" + ", or --cache none" * (name == "cache_gb"))
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device {self.device!r}: use auto, cpu or cuda")

    @property
    def most(self) -> int:
        return span(self.workers)[1]


def span(workers: int | str) -> tuple[int, int]:
    """(least, most) of `4` or `2..8`. ValueError for anything else."""
    match = _SPAN.fullmatch(str(workers))
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if least > most or (least == 0 and most):
        raise ValueError(f"workers {workers!r}: a number, or the fewest and the most, such as 2..8")
    return least, most


def sizes(workers: int | str, micro_batches: int) -> list[int]:
    """How many workers may share steps of so many micro-batches, ascending. ValueError if none of `workers` may."""
    least, most = span(workers)
    if least == most:
        Batching(micro_batches, micro_batches, max(most, 1))
        return [most]
    found = [size for size in range(least, most + 1) if micro_batches % size == 0]
    if not found:
        raise ValueError(
            f"{workers} workers cannot share {micro_batches} micro-batches a step evenly: ask for a number that "
            f"divides them, or for more --micro-batches in a new run"
        )
    return found
