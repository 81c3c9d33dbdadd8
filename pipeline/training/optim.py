"""Optimisers, learning rates counted in samples, penalties, clipping and the moving average of weights."""

import importlib
import math
from dataclasses import dataclass

import torch
from torch import nn

OPTIMIZERS = ("sgd", "adam", "adamw", "lamb", "muon")
SCHEDULES = ("constant", "cosine", "triangular")


@dataclass(frozen=True)
class OptimConfig:
    """How weights move."""

    optimizer: str = "adamw"
    """sgd (with momentum), adam, adamw; lamb and muon where pytorch-optimizer is installed. muon moves matrices and
    kernels, and leaves the rest, and the last layer, to AdamW."""
    lr: float = 2e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd and muon."""
    nesterov: bool = False
    """Nesterov's momentum for sgd (muon's is always that)."""
    beta1: float = 0.9
    """Decay of the first moment of adam, adamw and lamb."""
    beta2: float = 0.999
    """Decay of the second moment of adam, adamw and lamb."""
    adamw_lr: float = 1e-3
    """Peak learning rate of what muon leaves to AdamW."""
    weight_decay: float = 0.0
    """The optimiser's own weight decay, on matrices and kernels only (never on biases and norms)."""
    l1: float = 0.0
    """Adds l1 * sum |w| over matrices and kernels to the objective."""
    l2: float = 0.0
    """Adds l2 * sum w^2 over matrices and kernels to the objective."""
    clip: float = 0.0
    """Gradients are scaled down to this norm, over all parameters that move together; 0: never."""
    schedule: str = "cosine"
    """constant; or down to zero at the run's last sample, along a cosine or (triangular) in a line."""
    warmup_epochs: float = 0.0
    """Linear warm-up, in epochs."""

    def __post_init__(self):
        """ValueError, naming the field, for values that cannot work."""
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r}: use one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r}: use one of {', '.join(SCHEDULES)}")
        for name in ("lr", "adamw_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("nesterov belongs to --optimizer sgd with a --momentum above 0")
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be in [0, 1)")
        for name in ("weight_decay", "l1", "l2", "clip", "warmup_epochs"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} cannot be negative")


def weights(module: nn.Module) -> list[nn.Parameter]:
    """The matrices and kernels of a module: what decays and is penalised. Biases and norms are one-dimensional."""
    return [p for p in module.parameters() if p.ndim > 1 and p.requires_grad]


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """An optimiser of the module's parameters that are not frozen; its learning rate is set before each step by
    `set_lr`. ValueError if its library is not installed."""
    matrices, vectors = weights(module), [p for p in module.parameters() if p.ndim <= 1 and p.requires_grad]
    if config.optimizer == "muon":
        return _muon(matrices, vectors, config)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One kernel for all parameters; on the CPU it would gain nothing.
    how = {"fused": True} if next(module.parameters()).is_cuda else {"foreach": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum, nesterov=config.nesterov, **how)
    betas = config.beta1, config.beta2
    if config.optimizer == "lamb":
        return _library("Lamb")(groups, config.lr, betas)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, config.lr, betas=betas, **how)


def _muon(matrices: list, vectors: list, config: OptimConfig) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) on what lies between: a classifier's last layer has a row a class, and is no map."""
    hidden, last = matrices[:-1], matrices[-1:]
    beside = {"use_muon": False, "lr": config.adamw_lr, "lr_scale": config.adamw_lr / config.lr}
    groups = [
        {"params": hidden, "use_muon": True, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": last, "weight_decay": config.weight_decay, **beside},
        {"params": vectors, "weight_decay": 0.0, **beside},
    ]
    return _library("Muon")([group for group in groups if group["params"]], momentum=config.momentum)


def _library(name: str) -> type:
    try:
        return getattr(importlib.import_module("pytorch_optimizer"), name)
    except ImportError as error:
        raise ValueError(f"--optimizer {name.lower()}: pip install pytorch-optimizer ({error})") from None


def learning_rate(config: OptimConfig, samples: int, total: int, epoch: int) -> float:
    """The rate for the step that begins at `samples` of `total`, with `epoch` samples an epoch."""
    warmup = config.warmup_epochs * epoch
    if samples < warmup:
        return config.lr * (samples + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (samples - warmup) / max(1.0, total - warmup))
    if config.schedule == "triangular":
        return config.lr * (1 - done)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def clip(parameters: list[nn.Parameter], most: float) -> torch.Tensor:
    """Scales their gradients down to the norm `most` in all; returns the norm that they had, float32 ()."""
    return nn.utils.clip_grad_norm_(parameters, most, foreach=True)


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
