"""Proof that the order holds: replay it as the ranks of any world size would, compare, count; check what a run logged.

    digest of a step    four sums of 16 bits over its samples' keyed hashes of (epoch, row): the same whatever the order
                        they are added in, so ranks add up their shares, and a run logs it beside each step's loss
    replay              what a chain of starts draws: a digest a step, one over all, repeats and drops by epoch
    check               a run's rows against the digests that the order alone gives

No image is read: a replay costs what drawing the order costs, about a second for an epoch of 1.28 million.
"""

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline import draw
from pipeline.loading.order import Batching, Order

PARTS = 4
_MODULUS = 1 << 16
_SAMPLE = draw.text_bits("audit/sample")
_BLOCK = 1 << 20  # positions replayed at a time, at most: bounds memory for large splits


@dataclass(frozen=True)
class Replay:
    """What a chain of starts drew.

    digests: uint64 (steps,), one a global batch; whole: hex, over the row of every position in turn; repeats: draws of
    a row beyond its first in an epoch; drops: rows that an epoch, drawn to its end, never drew; epochs: how many were.
    """

    digests: np.ndarray
    whole: str
    repeats: int
    drops: int
    epochs: int

    def same(self, other: "Replay") -> bool:
        """Whether both drew the same samples at the same positions."""
        return self.whole == other.whole and np.array_equal(self.digests, other.digests)


@dataclass(frozen=True)
class Logged:
    """What a run's rows say of the samples it drew. Steps are counted from 1, as rows count them.

    checked: steps that agree with the order; differ, missing, repeated: steps; strange: rows that are of no step of the
    run; set_aside: {step: samples} of steps that cannot be compared, since samples of theirs could not be read;
    unlogged: steps before the first that logged a digest: an older millstream took them.
    """

    checked: int
    differ: list[int]
    missing: list[int]
    repeated: list[int]
    strange: int
    set_aside: dict[int, int]
    unlogged: int

    @property
    def holds(self) -> bool:
        return not (self.differ or self.missing or self.repeated or self.strange)


def digest_parts(epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What samples add to the digest of their step: int64 (4,), each below 65,536. epochs, rows: int64 (n,).

    Four small sums rather than one of 64 bits: those of up to 256 ranks still add up exactly in float32, hence in the
    one all-reduce that a step makes anyway.
    """
    return _hashes(epochs, rows).sum(0, dtype=np.int64) % _MODULUS


def digest(parts) -> int:
    """The digest of a step, 64 bits, from the sum over ranks of their parts (4,)."""
    return sum(int(part) % _MODULUS << 16 * i for i, part in enumerate(parts))


def written(digest: int) -> str:
    """A digest as rows and people have it: 16 hex digits."""
    return f"{digest:016x}"


def _hashes(epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return draw.bits(_SAMPLE, epochs, rows).astype("<u8").view("<u2").reshape(-1, PARTS)


def chain(worlds: list[int], stop: int, steps: int) -> list[tuple[int, int, int]]:
    """Starts (workers, first step, end) that go on where the one before stopped: `stop` steps at each size in turn,
    over and over, until all `steps` are taken."""
    starts = enumerate(range(0, steps, stop))
    return [(worlds[i % len(worlds)], first, min(first + stop, steps)) for i, first in starts]


def replay(
    make_order: Callable[[], Order], batch: int, micro_batches: int, starts: Iterable[tuple[int, int, int]]
) -> Replay:
    """Draws what the ranks of each start (workers, first step, end) would, one start after the other, from step 0 on.

    make_order: gives a new Order of the same split and seed; each rank of each start has its own, as processes would.
    ValueError where workers cannot share a step.
    """
    n, digests, whole = make_order().n, [np.empty(0, np.uint64)], hashlib.blake2b(digest_size=8)
    seen, repeats, drops, epochs = np.zeros(n, np.int64), 0, 0, 0
    for world, first, end in starts:
        for begin, stop, positions, rows in _drawn(make_order, Batching(batch, micro_batches, world), first, end):
            of_epoch = positions // n
            digests.append(_digests(positions // batch - begin, stop - begin, of_epoch, rows))
            whole.update(rows[np.argsort(positions, kind="stable")].astype("<i8").tobytes())
            for e in range(begin * batch // n, (stop * batch - 1) // n + 1):
                seen += np.bincount(rows[of_epoch == e], minlength=n)
                if (e + 1) * n <= stop * batch:
                    repeats, drops, epochs = repeats + _again(seen), drops + int((seen == 0).sum()), epochs + 1
                    seen[:] = 0
    return Replay(np.concatenate(digests), whole.hexdigest(), repeats + _again(seen), drops, epochs)


def _again(seen: np.ndarray) -> int:
    return int((seen - 1).clip(0).sum())


def _drawn(make_order, batching: Batching, first: int, end: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """(begin, stop, positions, rows) of some steps at a time, rank after rank: every draw of every rank is there."""
    each = max(1, min(make_order().n, _BLOCK) // batching.batch)
    for begin in range(first, end, each):
        stop, drawn = min(begin + each, end), []
        for rank in range(batching.world):
            own = [batching.positions(step, j) for step in range(begin, stop) for j in batching.own(rank)]
            positions = np.concatenate(own)
            drawn.append((positions, make_order().samples(positions)[0]))
            gc.collect(1)  # an Order's caches refer to it, so it would stay, and here one process is all the ranks
        yield begin, stop, *(np.concatenate(columns) for columns in zip(*drawn, strict=True))


def _digests(steps: np.ndarray, count: int, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """uint64 (count,): the digest of each step, from the step, epoch and row of every draw."""
    found = np.zeros(count, np.uint64)
    for i, part in enumerate(_hashes(epochs, rows).T):
        sums = np.bincount(steps, weights=part, minlength=count).astype(np.uint64)  # float64, and exact
        found |= sums % np.uint64(_MODULUS) << np.uint64(16 * i)
    return found


def check(rows: list[dict], digests: np.ndarray) -> Logged:
    """A run's metric rows against `digests`, uint64 (steps,), of the steps it has taken."""
    by_step: dict[int, list[dict]] = {}
    for row in rows:
        by_step.setdefault(row.get("step"), []).append(row)
    steps = [step for step in range(1, len(digests) + 1) if step in by_step]
    found = {step: by_step[step][0] for step in steps}
    logged = [step for step in steps if "samples_digest" in found[step]]
    set_aside = {step: found[step]["set_aside"] for step in logged if found[step].get("set_aside")}
    compared = [step for step in steps if step not in set_aside and step >= min(logged, default=len(digests) + 1)]
    differ = [s for s in compared if found[s].get("samples_digest") != written(int(digests[s - 1]))]
    return Logged(
        checked=len(compared) - len(differ),
        differ=differ,
        missing=[step for step in range(1, len(digests) + 1) if step not in by_step],
        repeated=[step for step in steps if len(by_step[step]) > 1],
        strange=len(rows) - sum(len(by_step[step]) for step in steps),
        set_aside=set_aside,
        unlogged=len(steps) - len(compared) - len(set_aside),
    )


def travel(order: Order, apart: int = 1, epoch: int = 0) -> float:
    """How far samples that an epoch draws `apart` positions from each other lie from each other in the next epoch:
    the mean distance over that of a random permutation, (N + 1) / 3. 1 is random. `apart` 64: those that follow each
    other in a lane, of which some share a window and stay near each other.
    """
    if order.n <= apart:
        return 1.0
    place = np.empty(order.n, np.int64)
    place[order.epoch(epoch + 1)] = np.arange(order.n)
    now = place[order.epoch(epoch)]
    return float(np.abs(now[apart:] - now[:-apart]).mean() * 3 / (order.n + 1))
