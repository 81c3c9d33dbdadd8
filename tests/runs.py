"""Small, quick runs on digits for the tests of what surrounds training, and how to compare where they ended."""

import torch

from pipeline.loading.augment import Augment
from pipeline.training import checkpoint
from pipeline.training.cadence import LoopConfig
from pipeline.training.compute import ComputeConfig
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


def with_options(task=None, optim=None, augment=None, compute=None, **loop) -> TrainConfig:
    task, optim = ClassifyConfig(**(task or {})), OptimConfig(**({"warmup_epochs": 0.2} | (optim or {})))
    augment, compute = Augment(16, **({"crop": "pad"} | (augment or {}))), ComputeConfig(**(compute or {}))
    return TrainConfig(task, optim, cnn(**loop).loop, augment, compute=compute)


# What a run may ask for besides, a few at a time: each resumes, and is shared by ranks, as exactly as the plain ones.
OPTIONS = {
    "bf16": with_options(
        {"model": "resnet9", "width": 4, "mixup": 0.2, "cutmix": 1.0, "loss": "bce", "ema_half_life": 300},
        {"optimizer": "sgd", "lr": 0.2, "nesterov": True, "schedule": "triangular", "clip": 1.0, "weight_decay": 1e-3},
        {"flip": True, "policy": "rand", "erase": 0.5},
        {"precision": "bf16", "channels_last": True},
    ),
    "fp16": with_options(
        {"model": "resnet9", "width": 2, "flip_test": True, "ema_snapshots": 3},
        {"optimizer": "lamb"},
        {"start_size": 8, "ramp_to": 1, "eval_size": 20, "eval_share": 0.8},
        {"precision": "fp16"},
    ),
    "frozen": with_options(
        {"freeze": "features.0,features.3", "label_smoothing": 0.1},
        {"optimizer": "muon", "lr": 0.02, "l1": 1e-5, "l2": 1e-5},
        validate_every=320,
        patience=1,
    ),
}


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
