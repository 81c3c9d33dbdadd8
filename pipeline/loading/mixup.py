"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a batch, on the device that holds it.

As torchvision's references do it: every sample is mixed with the one before it in the batch, one ratio a batch from
Beta(alpha, alpha). Who asks for both gets one of them, each as often, a batch. What is drawn comes from a generator on
the host alone, so it is the same on every device; a seeded one makes the batch a function of its seed.
"""

import math

import torch
from torch.nn import functional as F


def mixed(
    images: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, targets): float (n, c, h, w) mixed, and float32 (n, classes), rows summing to 1.

    images: float (n, c, h, w); labels: int64 (n,); mixup, cutmix: the alphas, 0: not that one; both 0, or n = 1:
    nothing is mixed. generator: a CPU one; default: torch's own.
    """
    targets = F.one_hot(labels, classes).float()
    chosen = [(kind, alpha) for kind, alpha in ((_blend, mixup), (_paste, cutmix)) if alpha > 0]
    if not chosen or len(images) < 2:
        return images, targets
    pick, *corner = torch.rand(3, generator=generator).tolist()
    mix, alpha = chosen[int(pick * len(chosen))]
    images, kept = mix(images, images.roll(1, 0), _beta(alpha, generator), corner)
    return images, targets.lerp(targets.roll(1, 0), 1 - kept)


def _beta(alpha: float, generator: torch.Generator | None) -> float:
    """One draw of Beta(alpha, alpha), as torch.distributions.Beta makes it, which takes no generator."""
    return float(torch._sample_dirichlet(torch.full((2,), alpha, dtype=torch.float64), generator=generator)[0])


def _blend(images: torch.Tensor, others: torch.Tensor, kept: float, corner: list[float]) -> tuple[torch.Tensor, float]:
    return images.lerp(others, 1 - kept), kept


def _paste(images: torch.Tensor, others: torch.Tensor, kept: float, corner: list[float]) -> tuple[torch.Tensor, float]:
    """A box of the other image, of share 1 - kept, around a centre anywhere; what sticks out is cut off and counted."""
    height, width = images.shape[-2:]
    top, bottom = _side(height, corner[0], kept)
    left, right = _side(width, corner[1], kept)
    images = images.clone()
    images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)


def _side(length: int, centre: float, kept: float) -> tuple[int, int]:
    middle, half = int(centre * length), int(0.5 * math.sqrt(1 - kept) * length)
    return max(0, middle - half), min(length, middle + half)
