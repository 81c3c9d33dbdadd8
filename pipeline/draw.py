"""Random numbers as a function of where they are used, never of who asks first.

A draw is keyed by whole numbers - (seed, epoch, sample), (seed, step, phase, micro-batch) - so no generator has
state to save, and ranks, threads and restarts cannot change it. The mixer is SplitMix64's finaliser (Steele, Lea,
Flood 2014), written in numpy's uint64 so that a stored seed means the same on every numpy version, which
`numpy.random.Generator` does not promise.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # wrapping is the arithmetic meant
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(*words) -> np.ndarray:
    """64 random bits for each key. `words`: ints or integer arrays, broadcast together. Returns uint64."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for word in words:
            state = _mix((state + np.asarray(word).astype(np.uint64)) + _GOLDEN)
    return state


def uniform(*words) -> np.ndarray:
    """A float64 in [0, 1) for each key."""
    return (bits(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, *words) -> np.ndarray:
    """A permutation of range(n) (int64) keyed by `words`: the stable argsort of n keyed draws."""
    return np.argsort(bits(*words, np.arange(n, dtype=np.uint64)), kind="stable")


def text_bits(text: str) -> int:
    """64 bits from a string: BLAKE2b, for keys that are names and for naming what a draw is for."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
