"""Small, quick runs on digits for the tests of what surrounds training, and how to compare where they ended."""

import torch

from pipeline.loading.augment import Augment
from pipeline.training import checkpoint
from pipeline.training.cadence import LoopConfig
from pipeline.training.optim import OptimConfig
from pipeline.training.run import TrainConfig
from pipeline.training.tasks import ClassifyConfig, GanConfig

SAMPLES = 1608  # of digits' train split


def cnn(**loop) -> TrainConfig:
    loop = {"epochs": 1, "batch": 64, "micro_batches": 2, "checkpoint_every": 320, "seed": 5} | loop
    return TrainConfig(
        ClassifyConfig(ema_half_life=300), OptimConfig(warmup_epochs=0.2), LoopConfig(**loop), Augment(16, crop="pad")
    )


def gan(**loop) -> TrainConfig:
    loop = {"epochs": 1, "batch": 64, "micro_batches": 2, "checkpoint_every": 320, "seed": 5} | loop
    optim = OptimConfig(optimizer="adam", lr=5e-4, beta1=0.5, schedule="constant")
    return TrainConfig(GanConfig(latent=16, width=8, r1=0.1), optim, LoopConfig(**loop), Augment(16, flip=True))


KINDS = {"cnn": cnn, "gan": gan}


def ends_alike(one: str, other: str) -> bool:
    """Whether the newest checkpoints of two runs hold the same bits: weights, averages, optimisers, position."""
    (first, a), (second, b) = checkpoint.newest(one), checkpoint.newest(other)
    return first.samples == second.samples and _same(a, b)


def _same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def numbers(run: str) -> list[dict]:
    """The run's metrics without the times they were taken at."""
    return [{k: v for k, v in row.items() if k != "time"} for row in checkpoint.read_metrics(run)]
