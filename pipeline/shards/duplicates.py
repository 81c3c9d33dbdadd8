"""Which samples repeat others: the same bytes, or the same look. Numbers in, numbers out; nothing is read here.

The look is pHash (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, 3.2.1): the
signs of the 8 x 8 lowest frequencies of a 32 x 32 greyscale, against their median. Scaling, recompression and small
changes of tone leave most bits as they are; mirroring, turning and cropping do not.
"""

import hashlib
from itertools import combinations

import cv2
import numpy as np
import xxhash

RADIUS = 3  # bits of 64
_FLAT = 4  # of 255: what varies less has no look, only noise of compression
_TINT = 16  # of 255: steps of colour told apart between flat images
_CROWD = 300  # values with the same bits in three bands; more are told apart by further bands
_BITS = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)


def content_hash(raw: bytes | np.ndarray) -> bytes:
    """XXH3 of 128 bits (https://xxhash.com) of a file's bytes or of an array's type, shape and values; 16 bytes.

    Ten times faster than a cryptographic one, which would take a tenth of a decode. Two files meet by chance no sooner;
    by design they can be made to, so it tells what is the same, not what is safe.
    """
    if not isinstance(raw, np.ndarray):
        return xxhash.xxh3_128_digest(raw)
    digest = xxhash.xxh3_128(f"{raw.dtype.str}{raw.shape}".encode())
    digest.update(np.ascontiguousarray(raw).data)
    return digest.digest()


def perceptual_hash(pixels: np.ndarray) -> int:
    """pHash of uint8 (h, w, 1 or 3), RGB: 64 bits, the lowest frequency in the highest.

    An image without structure (white, black, one colour) would hash its noise. It gets 64 bits made of its mean colour
    in steps of 16 instead: flat images of one colour look the same, of different colours they do not, and neither
    looks like a picture. Two that straddle a step are told apart: rather keep one too many.
    """
    small = cv2.resize(np.ascontiguousarray(pixels), (32, 32), interpolation=cv2.INTER_AREA).reshape(32 * 32, -1)
    if np.ptp(small, axis=0).max() <= _FLAT:
        tint = (small.mean(axis=0) / _TINT).round().astype(np.uint8)
        text = b"flat" + np.resize(tint, 3).tobytes()  # a grey is the colour of three equal channels
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    grey = small @ np.array([0.299, 0.587, 0.114] if small.shape[1] == 3 else [1.0], np.float32)
    low = cv2.dct(grey.reshape(32, 32))[:8, :8]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def duplicates(
    keys: np.ndarray,
    hashes: np.ndarray,
    near: np.ndarray | None = None,
    earlier: np.ndarray | None = None,
    radius: int = RADIUS,
) -> np.ndarray:
    """Which samples to leave out, bool (n,): of each group of duplicates all but the one with the smallest key.

    keys: uint64 (n,); hashes: the content's, uint64 (n, 2), two halves of 16 bytes, since numpy's strings lose zeros
    at their end; near: perceptual hashes, uint64 (n,), None: only equal content is a duplicate; earlier: bool (n,),
    samples that are in the dataset already. Those are never left out, and where a group holds one, all others are.
    radius: bits in which near duplicates differ at most, 0 to 8. Groups are chains: A like B and B like C puts all
    three together. Who has no perceptual hash is given a half of the content's: nothing is near that by chance.

    14 million samples take some 6 seconds by content and 40 by look, 2 GB of memory, crowds of look-alikes included.
    """
    if not 0 <= radius <= 8:
        raise ValueError(f"radius {radius}: 0 to 8 of 64 bits; beyond, different pictures look the same")
    earlier = np.zeros(len(keys), bool) if earlier is None else earlier
    rows, group = _same(hashes)
    if near is not None:
        values, node = np.unique(near, return_inverse=True)
        parts = _Groups(len(values))
        alike = group[1:] == group[:-1]
        parts.join(node[rows[1:][alike]], node[rows[:-1][alike]])
        if radius and len(values) > 1:
            _join_close(parts, values, np.arange(len(values)), list(range(64)), radius)
        rows, group = np.arange(len(keys)), parts.roots(np.arange(len(values)))[node]
        crowd = np.bincount(group, minlength=len(values))[group] > 1
        rows, group = rows[crowd], group[crowd]
    order = np.lexsort((rows, keys[rows], ~earlier[rows], group))
    rows, group = rows[order], group[order]
    repeated = np.zeros(len(keys), bool)
    repeated[rows[1:][group[1:] == group[:-1]]] = True
    return repeated & ~earlier


def _same(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows whose content is not theirs alone, group of each): equal content, equal group, and next to each other."""
    first = np.ascontiguousarray(hashes[:, 0])
    order = np.argsort(first)
    same = np.zeros(len(order) + 1, bool)
    same[1:-1] = first[order[1:]] == first[order[:-1]]
    rows = order[same[1:] | same[:-1]]  # most samples are alone by the first half already, and sorting is all the work
    rows = rows[np.lexsort((hashes[rows, 1], hashes[rows, 0]))]
    new = np.ones(len(rows), bool)
    new[1:] = (hashes[rows[1:]] != hashes[rows[:-1]]).any(axis=1)
    return rows, np.cumsum(new)


class _Groups:
    """Disjoint sets of 0..n-1: each points towards the smallest of its set."""

    def __init__(self, count: int):
        self.parent = np.arange(count)

    def roots(self, nodes: np.ndarray) -> np.ndarray:
        found = self.parent[nodes]
        while not np.array_equal(above := self.parent[found], found):
            found = above
        self.parent[nodes] = found
        return found

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        while len(a):
            a, b = self.roots(a), self.roots(b)
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))


def _join_close(groups: _Groups, values: np.ndarray, nodes: np.ndarray, bits: list[int], radius: int) -> None:
    """Joins the nodes whose values, all distinct, differ in at most `radius` of `bits` and nowhere else.

    Multi-index hashing (Norouzi, Punjani, Fleet, CVPR 2012): cut into radius + 3 bands, two such values agree in at
    least three of them, so each choice of three is sorted by, and only runs of equal ones are compared. Long runs,
    which many look-alikes would make quadratic, are cut into bands again by the bits that are left.
    """
    bands = radius + 3
    for chosen in combinations(range(bands), 3):
        used = [bit for i, bit in enumerate(bits) if i % bands in chosen]
        masked = values[nodes] & np.uint64(sum(1 << bit for bit in used))
        order = np.argsort(masked)
        sorted_nodes, masked = nodes[order], masked[order]
        starts = np.flatnonzero(np.concatenate([[True], masked[1:] != masked[:-1]]))
        lengths = np.diff(np.append(starts, len(masked)))
        left = [bit for bit in bits if bit not in used]
        roots = groups.roots(sorted_nodes)
        open_runs = np.minimum.reduceat(roots, starts) != np.maximum.reduceat(roots, starts)
        long = open_runs & (lengths > _CROWD) & (len(left) >= bands)
        for start, length in zip(starts[long].tolist(), lengths[long].tolist(), strict=True):
            _join_close(groups, values, sorted_nodes[start : start + length], left, radius)
        at = np.repeat(np.where(open_runs & ~long, starts + lengths, 0), lengths)  # the end of each one's run
        here = np.arange(len(masked))
        step = 1
        while len(here := here[here + step < at[here]]):
            a, b = sorted_nodes[here], sorted_nodes[here + step]
            close = _differing(values[a] ^ values[b]) <= radius
            groups.join(a[close], b[close])
            step += 1


def _differing(bits: np.ndarray) -> np.ndarray:
    """Set bits of each, uint64 (n,)."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        return np.bitwise_count(bits)
    return _BITS[bits.view(np.uint16)].reshape(-1, 4).sum(axis=1)
