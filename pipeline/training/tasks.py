"""The tasks that a run may have, and how one is made."""

from collections.abc import Callable

import numpy as np
import torch

from pipeline import draw
from pipeline.training.adversarial import GanConfig, draw_images, gan
from pipeline.training.classify import ClassifyConfig, Predictions, classify, predict
from pipeline.training.compute import ComputeConfig
from pipeline.training.optim import OptimConfig
from pipeline.training.task import Facts, Phase, Task

__all__ = [
    "ClassifyConfig",
    "Facts",
    "GanConfig",
    "Phase",
    "Predictions",
    "Task",
    "draw_images",
    "make_task",
    "predict",
]
_INIT = draw.text_bits("tasks/init")


def make_task(
    config: ClassifyConfig | GanConfig,
    facts: Facts,
    optim: OptimConfig,
    seed: int,
    device,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008 - frozen
    builder: Callable | None = None,
) -> Task:
    """The task of a config, its weights drawn from `seed`. builder: makes the classifier, where it is none of our
    table (`own.builder`). Raises ValueError if the data cannot serve it."""
    torch.manual_seed(int(draw.bits(_INIT, seed) >> np.uint64(1)))
    if isinstance(config, ClassifyConfig):
        return classify(config, facts, optim, device, compute, builder)
    return gan(config, facts, optim, device, compute)
