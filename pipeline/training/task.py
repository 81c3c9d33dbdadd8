"""What a step means. A task holds modules and a list of phases; the loop runs the same lines for each phase.

    Phase(name, module, optimizer, loss)   loss(batch) -> (loss of each sample (n,), {number: sum over samples})

A classifier has one phase, a GAN two (D, then G, on the same real images). Losses are weighted by the batch's weights:
the loop adds them up and divides by the global batch, so neither micro-batches nor ranks show in the result.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from pipeline.loading.augment import to_float
from pipeline.loading.steps import Batch
from pipeline.training.averaging import Average, average_into


@dataclass(frozen=True)
class Facts:
    """What the data decides: channels, side in px, class names (empty without labels), mean and std per channel."""

    channels: int
    image_size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class Phase:
    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass
class Task:
    """Modules by name, phases in the order they run, and averages. snapshots: checkpoints over the whole run that stay;
    scaler: of fp16's losses; flip_test: `predict` asks about the mirror image, too; builder: what made the classifier,
    if it is none of our table."""

    modules: dict[str, nn.Module]
    phases: list[Phase]
    averages: list[Average] = field(default_factory=list)
    snapshots: int = 0
    scaler: torch.amp.GradScaler | None = None
    flip_test: bool = False
    builder: Callable | None = None

    def after_step(self, samples: int, seen: int) -> None:
        """Of `samples`, the last of `seen`."""
        for average, source, keep in self.averages:
            average_into(self.modules[average], self.modules[source], keep(samples, seen))

    def state(self) -> dict:
        """Everything a resumed run needs besides its position; tensors are the live ones, not copies."""
        return {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": {phase.name: phase.optimizer.state_dict() for phase in self.phases},
        } | ({"scaler": self.scaler.state_dict()} if self.scaler else {})

    def load(self, state: dict) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for phase in self.phases:
            phase.optimizer.load_state_dict(state["optimizers"][phase.name])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])


def into_training(module: nn.Module) -> nn.Module:
    """In training mode, but for the parts that are frozen whole: their running statistics stay, too."""
    module.train()
    for part in module.modules():
        own = list(part.parameters())
        if own and not any(p.requires_grad for p in own):
            part.eval()
    return module


def to_device(
    batch: Batch, facts: Facts, device, channels_last: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch's images normalised, float32 (n, c, s, s) labels and weights."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (facts.mean, facts.std))
    images = to_float(batch.images.to(device, non_blocking=True), mean, std, channels_last)
    return images, batch.labels.to(device, non_blocking=True), batch.weights.to(device, non_blocking=True)
