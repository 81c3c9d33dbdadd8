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

Where an epoch does not hold each sample once (`selection`), only its list differs: N rows, some left out, some there
several times. Repeats lie in one lane as its shard does, and are spread over the epoch. A read skips what nobody asked
for as long as that is cheaper than another read (`Split.joined`).
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

    joined: says of rows a and b (int64 (n,) both) whether one read goes on from a to b, bool (n,); None: inside a shard
    it always does. draws: a `selection.Draws`, where epochs hold some rows more often than others; None: each once.

    `window` samples at most are one read; `open_windows` of a lane are shuffled together, so a rank's memory is
    its lanes x open_windows x window samples. Instances hold nothing but caches: any two made alike agree.
    Raises ValueError for a split without samples.
    """

    def __init__(self, counts, seed: int, window: int = 16, open_windows: int = 8, joined=None, draws=None):
        counts = np.asarray(counts, dtype=np.int64)
        total = int(counts.sum())
        if total < 1:
            raise ValueError("the split holds no samples, so there is nothing to order")
        if draws is not None and draws.rows != total:
            raise ValueError(f"the draws are of {draws.rows} rows, the split holds {total}: make them of this split")
        self.n = total if draws is None else draws.length
        self.seed, self.window, self.open_windows = seed, window, open_windows
        shards, ends = draw.permutation(len(counts), _SHARDS, seed), np.cumsum(counts)
        sizes = counts[shards]
        self._laid = np.arange(total) + np.repeat((ends - counts)[shards] - (np.cumsum(sizes) - sizes), sizes)
        self._joined = joined or (lambda a, b: (a < b) & (b < ends[np.searchsorted(ends, a, side="right")]))
        self._draws = draws
        self._all_open = self.n <= LANES * open_windows * window
        self._lane = lru_cache(maxsize=4 * LANES)(self._make_lane)
        self._bounds = lru_cache(maxsize=8)(self._make_bounds)
        self._whole = lru_cache(maxsize=4)(self._make_whole)
        self._list = lru_cache(maxsize=2)(self._make_list)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """int64 (3, n) for n positions g: the row of the index, and the first and last + 1 row of its window."""
        return self._drawn(positions)[:3]

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """int64 (n,) for n positions g: what keys the augmentation of each, together with seed and row.

        The epoch, and in the upper half how often the epoch has listed that row before: it is seen anew each time.
        """
        positions = np.asarray(positions, dtype=np.int64)
        return positions // self.n + (0 if self._draws is None else self._drawn(positions)[3] << 32)

    def epoch(self, e: int) -> np.ndarray:
        """All rows of the index in the order epoch `e` draws them: int64 (N,), a permutation if there are no draws."""
        return self.samples(np.arange(e * self.n, (e + 1) * self.n))[0]

    def _drawn(self, positions: np.ndarray) -> np.ndarray:
        positions = np.asarray(positions, dtype=np.int64)
        drawn = np.empty((4, len(positions)), np.int64)
        epoch, lane = positions // self.n, positions % LANES
        for e, l in set(zip(epoch.tolist(), lane.tolist(), strict=True)):
            at = np.flatnonzero((epoch == e) & (lane == l))
            first = e * self.n + (l - e * self.n) % LANES
            place = (positions[at] - first) // LANES
            drawn[:, at] = self._lane(e, l)[:, place]
        return drawn

    def _make_bounds(self, e: int) -> np.ndarray:
        first = (np.arange(LANES) - e * self.n) % LANES  # offset of each lane's first position in the epoch
        lengths = np.maximum(0, (self.n - first + LANES - 1) // LANES)
        return np.concatenate([[0], np.cumsum(lengths)])

    def _make_list(self, e: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """What epoch `e` holds, as it is laid out: its rows, repeats side by side; how often the list had the row
        before; and, if there are draws, how often it has each row of the index. int64 (N,), (N,), (rows,)."""
        if self._draws is None:
            return self._laid, np.zeros(self.n, np.int64), None
        times = self._draws.times(e)
        laid = times[self._laid]
        return np.repeat(self._laid, laid), np.arange(self.n) - np.repeat(np.cumsum(laid) - laid, laid), times

    def _make_lane(self, e: int, l: int) -> np.ndarray:
        low, high = (int(bound) for bound in self._bounds(e)[l : l + 2])
        if self._all_open:
            return self._whole(e)[:, low:high]
        drawn, nth = self._windows(e, low, high)
        starts = np.flatnonzero(np.diff(nth, prepend=-1))
        if self._draws is None:
            visit = draw.permutation(len(starts), _WINDOWS, self.seed, e, l)
        else:
            visit = self._apart(e, drawn[:, starts], _WINDOWS, self.seed, e, l)
        turn = np.empty_like(visit)
        turn[visit] = np.arange(len(visit))
        # The first group is shorter by a lane-dependent number of windows: else all lanes would change groups, and
        # ask storage for their next windows, in the same step.
        group = (turn + l % self.open_windows) // self.open_windows
        return drawn[:, np.lexsort((draw.bits(_ROWS, self.seed, e, np.arange(low, high)), group[nth]))]

    def _make_whole(self, e: int) -> np.ndarray:
        """The epoch's list in the order lanes cut it in, when all of it is shuffled at once."""
        drawn, _ = self._windows(e, 0, self.n)
        if self._draws is None:
            return drawn[:, draw.permutation(self.n, _ALL, self.seed, e)]
        by_position = self._apart(e, drawn, _ALL, self.seed, e)
        by_lane = np.argsort(np.arange(e * self.n, (e + 1) * self.n) % LANES, kind="stable")
        return drawn[:, by_position[by_lane]]

    def _apart(self, e: int, drawn: np.ndarray, *key: int) -> np.ndarray:
        """An order of the columns of `drawn` that spreads the repeats of a row evenly: n of them, 1/n of it apart."""
        rows, repeat = drawn[0], drawn[3]
        return np.argsort((draw.uniform(*key, rows) + repeat / self._list(e)[2][rows]) % 1, kind="stable")

    def _windows(self, e: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Places [low, high) of the epoch's list: (int32 (4, n): row, first and last + 1 row of its window, repeats
        before it; the number of its window). First each row once, then those there again, and so on: else a row would
        share windows with itself. int32, for lanes are kept, and an index of 2**31 rows would not fit in memory."""
        rows, repeats = (column[low:high] for column in self._list(e)[:2])
        again = np.argsort(repeats, kind="stable")
        rows, repeats = rows[again], repeats[again]
        place = np.arange(len(rows))
        cut = np.concatenate([[True], ~self._joined(rows[:-1], rows[1:])])
        starts = (place - np.maximum.accumulate(np.where(cut, place, 0))) % self.window == 0
        nth = np.cumsum(starts) - 1
        first = np.flatnonzero(starts)
        last = np.concatenate([first[1:], [len(rows)]]) - 1
        return np.stack([rows, rows[first][nth], rows[last][nth] + 1, repeats]).astype(np.int32), nth
