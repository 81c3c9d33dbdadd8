"""Optimisers, learning rates counted in samples, penalties and the moving average of weights."""

import math
from dataclasses import dataclass

import torch
from torch import nn

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class OptimConfig:
    """How weights move."""

    optimizer: str = "adamw"
    """sgd (with momentum), adam or adamw."""
    lr: float = 2e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd."""
    beta1: float = 0.9
    """Decay of the first moment of adam and adamw."""
    beta2: float = 0.999
    """Decay of the second moment of adam and adamw."""
    weight_decay: float = 0.0
    """The optimiser's own weight decay, on matrices and kernels only (never on biases and norms)."""
    l1: float = 0.0
    """Adds l1 * sum |w| over matrices and kernels to the objective."""
    l2: float = 0.0
    """Adds l2 * sum w^2 over matrices and kernels to the objective."""
    schedule: str = "cosine"
    """constant, or cosine down to zero at the run's last sample."""
    warmup_epochs: float = 0.0
    """Linear warm-up, in epochs."""

    def __post_init__(self):
        """ValueError, naming the field, for values that cannot work."""
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r}: use one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r}: use one of {', '.join(SCHEDULES)}")
        if not self.lr > 0:
            raise ValueError(f"lr {self.lr} must be above 0")
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be in [0, 1)")
        for name in ("weight_decay", "l1", "l2", "warmup_epochs"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} cannot be negative")


def weights(module: nn.Module) -> list[nn.Parameter]:
    """The matrices and kernels of a module: what decays and is penalised. Biases and norms are one-dimensional."""
    return [p for p in module.parameters() if p.ndim > 1]


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """An optimiser of the module's parameters; its learning rate is set before each step by `set_lr`."""
    groups = [
        {"params": weights(module), "weight_decay": config.weight_decay},
        {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, config.lr, betas=(config.beta1, config.beta2), foreach=True)


def learning_rate(config: OptimConfig, samples: int, total: int, epoch: int) -> float:
    """The rate for the step that begins at `samples` of `total`, with `epoch` samples an epoch."""
    warmup = config.warmup_epochs * epoch
    if samples < warmup:
        return config.lr * (samples + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (samples - warmup) / max(1.0, total - warmup))))


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def penalize(module: nn.Module, l1: float, l2: float) -> None:
    """Adds the gradients of l1 * sum |w| + l2 * sum w^2 to .grad: once a step, so they do not scale with ranks."""
    if not (l1 or l2):
        return
    with torch.no_grad():
        for p in weights(module):
            if l1:
                p.grad.add_(p.sign(), alpha=l1)
            if l2:
                p.grad.add_(p, alpha=2 * l2)


def average_into(average: nn.Module, module: nn.Module, samples: int, half_life: float) -> None:
    """Moves `average` towards `module` by one step of `samples`: a weight's share halves every `half_life` samples
    (0: at once)."""
    keep = 0.5 ** (samples / half_life) if half_life else 0.0
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - keep)
        for old, new in zip(average.buffers(), module.buffers(), strict=True):
            old.copy_(new)
