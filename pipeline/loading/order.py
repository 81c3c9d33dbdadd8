"""Which sample is trained on when: a pure function of (dataset, seed, position).

    g            samples drawn since the run began; the loader's whole state
    epoch e      g // N                      N samples in the split
    lane l       g % 64                      64 lanes, whatever the world size
    row          (g - g0) / 64               g0: the smallest g of epoch e in lane l
    sample       row of lane l's list of epoch e

    step s       g in [sB, (s+1)B)           B the global batch; steps cross epochs freely
    micro-batch  g % V == j                  V divides 64 and B; each holds exactly B/V samples
    rank r of w  micro-batches j % w == r    w divides V

Shards are permuted once for a run, laid end to end and cut into 64 contiguous stretches, one a lane, of just as many
samples as the epoch has positions in that lane (cutting at i*N//64 instead leaves holes when 64 does not divide N).
A shard thus stays with its lane for the whole run, give or take the few samples a boundary moves by. A lane reads
windows of consecutive samples of one shard - one ranged read each - visits them in an order drawn anew each epoch, and
shuffles across a few open ones. Because V divides 64, all samples of a lane belong to one micro-batch, hence one rank.

A split small enough to lie in the open windows whole is shuffled whole: lanes of a few samples would otherwise meet in
the same batches epoch after epoch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline import draw

LANES = 64

# What a draw is for: the first word of its key, so that no two uses share numbers.
_SHARDS, _WINDOWS, _ROWS, _ALL = (draw.text_bits(f"order/{use}") for use in ("shards", "windows", "rows", "all"))


@dataclass(frozen=True)
class Batching:
    """How positions become steps. `batch`: B; `micro_batches`: V; `world`: w. ValueError if they do not divide."""

    batch: int
    micro_batches: int = 1
    world: int = 1

    def __post_init__(self):
        b, v, w = self.batch, self.micro_batches, self.world
        if b < 1 or v < 1 or w < 1:
            raise ValueError(f"batch {b}, micro-batches {v} and workers {w} must be at least 1")
        if LANES % v:
            raise ValueError(f"micro-batches {v} must divide {LANES}: use 1, 2, 4, 8, 16, 32 or 64")
        if b % v:
            raise ValueError(f"batch {b} is not a multiple of its {v} micro-batches: use {max(v, b // v * v)}")
        if v % w:
            sizes = [d for d in range(1, v + 1) if v % d == 0]
            raise ValueError(
                f"{w} workers cannot share {v} micro-batches a step evenly: use one of {sizes} workers, "
                f"or start a new run with more --micro-batches"
            )

    def steps(self, samples: int) -> int:
        """Steps that draw at least `samples` positions."""
        return -(-samples // self.batch)

    def own(self, rank: int) -> range:
        """The micro-batches of a step that `rank` works on."""
        return range(rank, self.micro_batches, self.world)

    def positions(self, step: int, micro_batch: int) -> np.ndarray:
        """The positions g (int64, B/V of them) of one micro-batch of one step."""
        start = step * self.batch
        return np.arange(start + (micro_batch - start) % self.micro_batches, start + self.batch, self.micro_batches)


class Order:
    """The order of a split. `counts`: samples in each shard, in the index's order; `seed`: the run's.

    `window` consecutive samples are one read; `open_windows` of a lane are shuffled together, so a rank's memory is
    its lanes x open_windows x window samples. Instances hold nothing but caches: any two made alike agree.
    Raises ValueError for a split without samples.
    """

    def __init__(self, counts, seed: int, window: int = 16, open_windows: int = 8):
        counts = np.asarray(counts, dtype=np.int64)
        if counts.sum() < 1:
            raise ValueError("the split holds no samples, so there is nothing to order")
        self.n, self.seed, self.window, self.open_windows = int(counts.sum()), seed, window, open_windows
        shards = draw.permutation(len(counts), _SHARDS, seed)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])[shards]
        self._laid = counts[shards]  # shard sizes in laid-out order
        self._ends = np.cumsum(self._laid)  # ... and where each ends in the list
        self._shift = starts - (self._ends - self._laid)  # list place + shift = row of the index
        self._all_open = self.n <= LANES * open_windows * window
        self._lane = lru_cache(maxsize=4 * LANES)(self._make_lane)
        self._bounds = lru_cache(maxsize=8)(self._make_bounds)
        self._whole = lru_cache(maxsize=4)(lambda e: draw.permutation(self.n, _ALL, seed, e))

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """int64 (3, n) for n positions g: the row of the index, and the first and last + 1 row of its window."""
        positions = np.asarray(positions, dtype=np.int64)
        drawn = np.empty((3, len(positions)), np.int64)
        epoch, lane = positions // self.n, positions % LANES
        for e, l in set(zip(epoch.tolist(), lane.tolist(), strict=True)):
            at = np.flatnonzero((epoch == e) & (lane == l))
            first = e * self.n + (l - e * self.n) % LANES
            place = (positions[at] - first) // LANES
            drawn[:, at] = self._lane(e, l)[:, place]
        return drawn

    def epoch(self, e: int) -> np.ndarray:
        """All rows of the index in the order epoch `e` draws them: int64 (N,), a permutation."""
        return self.samples(np.arange(e * self.n, (e + 1) * self.n))[0]

    def _make_bounds(self, e: int) -> np.ndarray:
        first = (np.arange(LANES) - e * self.n) % LANES  # offset of each lane's first position in the epoch
        lengths = np.maximum(0, (self.n - first + LANES - 1) // LANES)
        return np.concatenate([[0], np.cumsum(lengths)])

    def _make_lane(self, e: int, l: int) -> np.ndarray:
        low, high = (int(bound) for bound in self._bounds(e)[l : l + 2])
        if self._all_open:
            places = self._whole(e)[low:high]
            starts, sizes = self._windows(0, self.n)
            nth = np.searchsorted(starts, places, side="right") - 1
            return self._rows(places, starts[nth], sizes[nth])
        starts, sizes = self._windows(low, high)
        visit = draw.permutation(len(starts), _WINDOWS, self.seed, e, l)
        starts, sizes = starts[visit], sizes[visit]
        # The first group is shorter by a lane-dependent number of windows: else all lanes would change groups, and
        # ask storage for their next windows, in the same step.
        group = (np.arange(len(starts)) + l % self.open_windows) // self.open_windows
        nth = np.repeat(np.arange(len(starts)), sizes)
        places = starts[nth] + np.arange(len(nth)) - (np.cumsum(sizes) - sizes)[nth]
        shuffled = np.lexsort((draw.bits(_ROWS, self.seed, e, places), group[nth]))
        places, nth = places[shuffled], nth[shuffled]
        return self._rows(places, starts[nth], sizes[nth])

    def _rows(self, places: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        shift = self._shift[np.searchsorted(self._ends, places, side="right")]
        return np.stack([places + shift, starts + shift, starts + sizes + shift])

    def _windows(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, sizes) of the windows of list places [low, high): none crosses a shard, none exceeds `window`."""
        first, last = np.searchsorted(self._ends, [low, high - 1], side="right")
        ends = np.minimum(self._ends[first : last + 1], high)
        begins = np.concatenate([[low], ends[:-1]])
        per_shard = -(-(ends - begins) // self.window)  # zero for an empty shard
        shard = np.repeat(np.arange(len(per_shard)), per_shard)
        nth = np.arange(len(shard)) - np.repeat(np.cumsum(per_shard) - per_shard, per_shard)
        starts = begins[shard] + nth * self.window
        return starts, np.minimum(starts + self.window, ends[shard]) - starts
