"""Averages of the weights over training. Their length is chosen before it (`halving`), or after.

After it: a run keeps two averages in which the weights of time s count as s ** gamma (`power_law`), and a few of its
checkpoints stay. The average of any other gamma, up to any of these times, is close to a combination of those stored
(`combination`). Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

# Of the two kept, as shares of the run: the standard deviation of the times whose weights count.
SPREADS = {"average_5": 0.05, "average_10": 0.1}
WIDEST = 0.25  # of a power law; 0.29 is the mean over the whole run

Average = tuple[str, str, Callable[[int, int], float]]  # its name, that of its source, keep(samples, seen)


def averages(source: str, half_life: float | None, snapshots: int) -> list[Average]:
    """Those that a run keeps. half_life: in samples, None: not this one; snapshots: 0: no other."""
    one = [] if half_life is None else [("average", source, halving(half_life))]
    return one + [(name, source, power_law(spread)) for name, spread in SPREADS.items() if snapshots]


def average_into(average: nn.Module, module: nn.Module, keep: float) -> None:
    """Moves `average` towards `module`, but for the share `keep`; buffers are taken as they are."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - keep)
        if old := list(average.buffers()):
            torch._foreach_copy_(old, list(module.buffers()))


def halving(half_life: float) -> Callable[[int, int], float]:
    """keep(samples, seen) of an average in a step of `samples`, the last of `seen`: a weight's share halves every
    `half_life` samples (0: at once)."""
    return lambda samples, seen: 0.5 ** (samples / half_life) if half_life else 0.0


def power_law(spread: float) -> Callable[[int, int], float]:
    """keep(samples, seen) of an average whose times have the standard deviation `spread`, as a share of `seen`."""
    exponent = gamma(spread)
    return lambda samples, seen: (1 - samples / seen) ** (exponent + 1)


def gamma(spread: float) -> float:
    """The exponent of a power law of that spread. ValueError if there is none to be had from those kept."""
    if not 0 < spread <= WIDEST:
        raise ValueError(f"spread {spread}: more than 0 and at most {WIDEST} of the run")
    return float(np.roots([1, 7, 16 - spread**-2, 12 - spread**-2]).real.max())


def combination(kept: list[tuple[float, float]], wanted: tuple[float, float]) -> tuple[np.ndarray, float]:
    """What of each average that is kept, by (time, gamma), goes into the one that is wanted: float64 (n,), sum 1, by
    least squares between the profiles; and how far from it that is, 0 to 1 of the profile's own norm."""
    times, gammas = np.array([*kept, wanted]).T
    times = times / times.max()
    shared = np.minimum.outer(times, times)
    one = np.log(gammas + 1) - (gammas + 1) * np.log(times)
    power = np.add.outer(gammas, gammas) + 1
    products = np.exp(np.add.outer(one, one) + power * np.log(shared)) / power
    scale = 1 / np.sqrt(np.diag(products))  # late and narrow profiles are tall: all of norm 1, or rounding decides
    unit = products * np.outer(scale, scale)
    shares = np.linalg.lstsq(unit[:-1, :-1], unit[:-1, -1], rcond=1e-12)[0]
    away = 1 - 2 * shares @ unit[:-1, -1] + shares @ unit[:-1, :-1] @ shares
    found = shares * scale[:-1] / scale[-1]
    return found / found.sum(), float(np.sqrt(max(away, 0)))
