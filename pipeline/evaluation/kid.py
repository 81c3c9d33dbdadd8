"""How far generated images are from real ones: Kernel Inception Distance, and which of two generators is nearer.

    features(images)                              uint8 images -> float32 rows, of a fixed map that nothing trained
    kid(real, fake)                               rows -> one number, 0 on average where both are alike
    kid_difference(real, champion, challenger)    rows -> KidDifference: both, and bounds of their difference

Binkowski, Sutherland, Arbel and Gretton 2018, "Demystifying MMD GANs": the unbiased estimate of the squared maximum
mean discrepancy with the kernel (x.y / d + 1) ** 3. Unbiased, so that a small sample is no worse on average than a
large one, and so that it can be negative.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

_SIDE = 16  # cells of `features`, each way
_ROWS = 1024  # of the kernel matrix at a time, and images of `features`
_STEEP = 4.0  # brings the gradients of usual images to the size of their pixels


@dataclass(frozen=True)
class KidDifference:
    """KID of challenger and champion, block by block against the same real images; below 0 the challenger is nearer.

    challenger_blocks, champion_blocks: a KID a block, equally many, at least 2; the champion's None where there is
    none. Blocks share no image, so their differences are independent, alike distributed and about normal: bounds are
    Student's t on them. Where both generators are alike each difference is as likely to be below 0 as above.
    """

    challenger_blocks: tuple[float, ...]
    champion_blocks: tuple[float, ...] | None = None

    def __post_init__(self):
        blocks = len(self.challenger_blocks)
        if blocks < 2 or (self.champion_blocks is not None and len(self.champion_blocks) != blocks):
            ours = None if self.champion_blocks is None else len(self.champion_blocks)
            raise ValueError(
                f"{blocks} blocks of the challenger, {ours} of the champion: pass as many of both, 2 or more"
            )
        if not np.isfinite([*self.challenger_blocks, *(self.champion_blocks or ())]).all():
            raise ValueError(f"{self} is not all finite: look for NaN in the features")

    @property
    def blocks(self) -> int:
        return len(self.challenger_blocks)

    @property
    def challenger(self) -> float:
        """The challenger's KID, the mean of its blocks."""
        return float(np.mean(self.challenger_blocks))

    @property
    def champion(self) -> float | None:
        return None if self.champion_blocks is None else float(np.mean(self.champion_blocks))

    @property
    def difference(self) -> float:
        """Challenger - champion. Raises ValueError without a champion, as the bounds do."""
        return float(self._gaps(0.0).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Two-sided 95 % confidence interval of the difference."""
        return self.lower(0.025), self.upper(0.025)

    def upper(self, alpha: float, slack: float = 0.0) -> float:
        """Bound of the true challenger - (1 + slack) * champion, which is below it in 1 - alpha of all nights."""
        return self._bound(alpha, slack, 1)

    def lower(self, alpha: float, slack: float = 0.0) -> float:
        """The same from below."""
        return self._bound(alpha, slack, -1)

    def p_value(self, slack: float = 0.0) -> float:
        """One-sided, against "the challenger is no nearer than (1 + slack) times the champion's KID"."""
        gaps = self._gaps(slack)
        error = gaps.std(ddof=1) / np.sqrt(len(gaps))
        if not error:
            return float(gaps[0] >= 0)
        return float(stdtr(len(gaps) - 1, gaps.mean() / error))

    def _bound(self, alpha: float, slack: float, side: int) -> float:
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha is {alpha}: pass a chance between 0 and 0.5")
        gaps = self._gaps(slack)
        wide = -stdtrit(len(gaps) - 1, alpha) * gaps.std(ddof=1) / np.sqrt(len(gaps))
        return float(gaps.mean() + side * wide)

    def _gaps(self, slack: float) -> np.ndarray:
        if self.champion_blocks is None:
            raise ValueError("there is no champion to be compared with: pass its features to kid_difference")
        return np.array(self.challenger_blocks) - (1 + slack) * np.array(self.champion_blocks)


def kid(real: np.ndarray, fake: np.ndarray) -> float:
    """Unbiased KID of rows of features, floats of shape (n, d) and (m, d), n and m >= 2; time n * m * d.

    Raises ValueError for other shapes, and for features that are not finite.
    """
    real, fake = _rows("real", real), _rows("fake", fake)
    _same_width(real=real, fake=fake)
    return _within(real) + _within(fake) - 2 * _between(real, fake)


def kid_difference(
    real: np.ndarray, champion: np.ndarray | None, challenger: np.ndarray, blocks: int = 20
) -> KidDifference:
    """Which of two generators is nearer to the real images; features of shape (n, d), (m, d) and (m, d).

    Block b of `blocks` takes the rows b, b + blocks, ... of each, so that a holdout sorted by class gives every block
    all classes; rows left over are not used. Give both generators the same latents: what they share then cancels. More
    blocks narrow Student's t, and each estimate gets rougher; 20 cost little of either. champion: None before there is
    one. Raises ValueError as `kid` does, for fewer than 2 rows a block, and for generators of different numbers of
    images.
    """
    real, challenger = _rows("real", real), _rows("challenger", challenger)
    champion = challenger if (alone := champion is None) else _rows("champion", champion)
    _same_width(real=real, champion=champion, challenger=challenger)
    if len(champion) != len(challenger):
        raise ValueError(f"{len(champion)} images of the champion, {len(challenger)} of the challenger: make as many")
    fewest = min(len(real), len(challenger))
    if blocks < 2 or fewest < 2 * blocks:
        raise ValueError(f"blocks is {blocks} for {fewest} images: pass from 2 blocks to one for every 2 images")
    ours, theirs = [], []
    for block in range(blocks):
        true, old, new = (rows[block : len(rows) // blocks * blocks : blocks] for rows in (real, champion, challenger))
        same = _within(true)
        ours.append(same + _within(new) - 2 * _between(true, new))
        if not alone:
            theirs.append(same + _within(old) - 2 * _between(true, old))
    return KidDifference(tuple(ours), None if alone else tuple(theirs))


def features(images: np.ndarray) -> np.ndarray:
    """images: uint8 (n, s, s, c), s >= 2 -> float32 (n, 16 * 16 * c * 3); a fixed map, where no network is at hand.

    For each of 16 x 16 equal cells and each channel: the mean of the pixels, from -1 to 1, and the mean size of their
    steps to the right and down, which say how rough the image is there. This is no Inception network: it sees colour,
    coarse shape and texture, knows nothing of what is shown, and its distances are comparable with each other only,
    not with any published KID. The same images give the same rows on one machine.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[1] < 2:
        raise ValueError(f"images are {images.dtype} of shape {images.shape}: pass uint8 (n, s, s, c), s >= 2")
    n, channels = len(images), images.shape[3]
    rows = np.empty((n, 3 * _SIDE * _SIDE * channels), np.float32)
    for at in range(0, n, _ROWS):
        pixels = images[at : at + _ROWS].astype(np.float32) / 127.5 - 1
        right, down = np.abs(np.diff(pixels, axis=2)), np.abs(np.diff(pixels, axis=1))
        maps = (_cells(pixels), _STEEP * _cells(right), _STEEP * _cells(down))
        rows[at : at + _ROWS] = np.stack(maps, axis=1).reshape(len(pixels), -1)
    return rows


def _cells(maps: np.ndarray) -> np.ndarray:
    """(n, h, w, c) -> (n, 16, 16, c): means over equal cells, a pixel on an edge shared by its parts."""
    high, wide = _shares(maps.shape[1]), _shares(maps.shape[2])
    return np.einsum("ih,nhwc,jw->nijc", high, maps, wide, optimize=True)


def _shares(side: int) -> np.ndarray:
    """(16, side): what part of each cell each pixel covers."""
    cells, pixels = np.arange(_SIDE)[:, None], np.arange(side)
    ends = np.minimum((cells + 1) / _SIDE, (pixels + 1) / side)
    return (np.maximum(ends - np.maximum(cells / _SIDE, pixels / side), 0) * _SIDE).astype(np.float32)


def _kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one @ other.T / one.shape[1] + 1) ** 3


def _within(rows: np.ndarray) -> float:
    """Mean of the kernel over all pairs of different rows."""
    n = len(rows)
    diagonal = (np.einsum("nd,nd->n", rows, rows) / rows.shape[1] + 1) ** 3
    return (_between(rows, rows) * n * n - diagonal.sum()) / (n * (n - 1))


def _between(one: np.ndarray, other: np.ndarray) -> float:
    sums = [_kernel(one[at : at + _ROWS], other).sum() for at in range(0, len(one), _ROWS)]
    return float(np.sum(sums) / (len(one) * len(other)))


def _rows(name: str, rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 2 or len(rows) < 2 or not rows.shape[1] or rows.dtype.kind != "f":
        raise ValueError(f"{name} is {rows.dtype} of shape {rows.shape}: pass floats of shape (n, d), n >= 2")
    # Distances are small differences of large sums: float32 would leave two digits of them.
    rows = rows.astype(np.float64)
    if len(bad := np.flatnonzero(~np.isfinite(rows).all(1))):
        raise ValueError(f"{name}[{bad[0]}] is not finite: a generator or a network that has diverged")
    return rows


def _same_width(**named: np.ndarray) -> None:
    widths = {name: rows.shape[1] for name, rows in named.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"{widths} are the numbers of features: pass all through one map")
