"""The task of a GAN: its configuration, the losses of its two phases, what it draws."""

import contextlib
import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from pipeline import draw
from pipeline.loading.steps import Batch
from pipeline.models import GANS
from pipeline.training.averaging import averages
from pipeline.training.compute import ComputeConfig
from pipeline.training.optim import OptimConfig, make_optimizer
from pipeline.training.task import Facts, Phase, Task, to_device


@dataclass(frozen=True)
class GanConfig:
    """A class-conditional GAN with the non-saturating loss (Goodfellow et al. 2014) and an EMA generator."""

    model: str = "dcgan"
    """Which pair of networks: dcgan."""
    latent: int = 100
    """Numbers of noise an image is made from."""
    width: int = 32
    """Channels of the widest maps; deeper ones have multiples."""
    r1: float = 0.0
    """Zero-centred gradient penalty on real images (Mescheder et al. 2018), gamma / 2 * |grad|^2; 0: none."""
    ema_half_life: float = 5000.0
    """Half-life in samples of the generator's average, which is what `sample` draws from; 0: no average."""
    ema_snapshots: int = 0
    """Checkpoints, spread over the run, that stay, so that `millstream average` can choose the average's length
    afterwards; 0: none, 8 to 16 will do."""

    def __post_init__(self):
        if self.latent < 1 or self.width < 4 or self.width % 4:
            raise ValueError(f"latent {self.latent} must be at least 1, width {self.width} a multiple of 4")
        for name in ("r1", "ema_half_life", "ema_snapshots"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} cannot be negative")


def gan(config: GanConfig, facts: Facts, optim: OptimConfig, device, compute: ComputeConfig) -> Task:
    if compute.precision == "fp16":
        raise ValueError("precision 'fp16': a GAN's losses do not share a scale; use bf16")
    if compute.compile and config.r1:
        raise ValueError("--compile: torch cannot compile a gradient penalty (--r1): leave out one of the two")
    options = {"channels": facts.channels, "image_size": facts.image_size, "classes": len(facts.classes)}
    if config.model not in GANS:
        raise ValueError(f"model {config.model!r}: use one of {', '.join(GANS)}")
    g, d = GANS[config.model](latent=config.latent, width=config.width, **options)
    g, d = compute.laid_out(g.to(device)), compute.laid_out(d.to(device))
    kept = averages("generator", config.ema_half_life, config.ema_snapshots)
    copies = {name: copy.deepcopy(g) for name, _, _ in kept}
    compute.compiled(g)
    compute.compiled(d)
    half = Facts(facts.channels, facts.image_size, facts.classes, (0.5,) * facts.channels, (0.5,) * facts.channels)

    def fake_of(labels: torch.Tensor) -> torch.Tensor:
        with compute.autocast(device):
            return g(torch.randn(len(labels), config.latent, device=device), labels).float()

    def d_loss(batch: Batch):
        real, labels, weights = to_device(batch, half, device, compute.channels_last)
        with torch.no_grad():
            fake = fake_of(labels)
        real.requires_grad_(config.r1 > 0)
        with contextlib.nullcontext() if config.r1 else compute.autocast(device):  # a penalty needs all its digits
            scores = d(torch.cat([real, fake]), labels.repeat(2)).float()
        on_real, on_fake = scores.chunk(2)
        each = (F.softplus(-on_real) + F.softplus(on_fake)) * weights
        numbers = {
            "d_loss": each.detach().sum(),
            "d_real": (on_real.detach().sigmoid() * weights).sum(),
            "d_fake": (on_fake.detach().sigmoid() * weights).sum(),
        }
        if config.r1:
            (slope,) = torch.autograd.grad((on_real * weights).sum(), real, create_graph=True)
            each = each + config.r1 / 2 * slope.square().flatten(1).sum(1)
        return each, numbers

    def g_loss(batch: Batch):
        labels, weights = batch.labels.to(device), batch.weights.to(device)
        fake = fake_of(labels)
        with compute.autocast(device):
            scores = d(fake, labels).float()
        each = F.softplus(-scores) * weights
        return each, {"g_loss": each.detach().sum()}

    phases = [
        Phase("discriminator", d, make_optimizer(d, optim), d_loss),
        Phase("generator", g, make_optimizer(g, optim), g_loss),
    ]
    return Task({"generator": g, "discriminator": d} | copies, phases, kept, snapshots=config.ema_snapshots)


def draw_images(task: Task, labels: np.ndarray, seed: int) -> np.ndarray:
    """Images from the averaged generator: uint8 (n, s, s, c). Image i depends on (seed, i, its label) alone."""
    generator = task.modules["average"].eval()
    device = next(generator.parameters()).device
    noise = np.stack([draw.uniform(seed, i, np.arange(2 * generator.latent)) for i in range(len(labels))])
    radius, angle = np.sqrt(-2 * np.log1p(-noise[:, ::2])), 2 * np.pi * noise[:, 1::2]  # Box-Muller
    z = torch.from_numpy(radius * np.cos(angle)).float().to(device)
    with torch.inference_mode():
        parts = [
            generator(z[i : i + 256], torch.from_numpy(labels[i : i + 256]).to(device)) for i in range(0, len(z), 256)
        ]
    images = torch.cat(parts).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()
