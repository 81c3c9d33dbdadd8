"""What a step means. A task holds modules and a list of phases; the loop runs the same lines for each phase.

    Phase(name, module, optimizer, loss)   loss(batch) -> (loss of each sample (n,), {number: sum over samples})

A classifier has one phase, a GAN two (D, then G, on the same real images). Losses are weighted by the batch's weights:
the loop adds them up and divides by the global batch, so neither micro-batches nor ranks show in the result.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pipeline import draw
from pipeline.loading.augment import to_float
from pipeline.loading.mixup import mixed
from pipeline.loading.steps import Batch
from pipeline.models import CLASSIFIERS, GANS
from pipeline.training.optim import OptimConfig, average_into, make_optimizer
from pipeline.training.world import World

_INIT = draw.text_bits("tasks/init")


@dataclass(frozen=True)
class Facts:
    """What the data decides: channels, side in px, class names (empty without labels), mean and std per channel."""

    channels: int
    image_size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ClassifyConfig:
    """An image classifier."""

    model: str = "cnn"
    """Which classifier: cnn."""
    padding: int = 1
    """Padding of the cnn's convolutions: 0 as in the tutorial, or 1."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    mixup: float = 0.0
    """Alpha of mixup: images and targets of a batch are blended by Beta(alpha, alpha); 0: not at all."""
    cutmix: float = 0.0
    """Alpha of CutMix: a box of another image is pasted in; with mixup, each batch gets one of the two."""
    ema_half_life: float = 0.0
    """Half-life in samples of an average of the weights, used for validation and evaluation; 0: none."""

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing {self.label_smoothing} must be in [0, 1)")
        for name in ("mixup", "cutmix", "ema_half_life"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)} cannot be negative, or without end")


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

    def __post_init__(self):
        if self.latent < 1 or self.width < 4 or self.width % 4:
            raise ValueError(f"latent {self.latent} must be at least 1, width {self.width} a multiple of 4")
        for name in ("r1", "ema_half_life"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} cannot be negative")


@dataclass
class Phase:
    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass
class Predictions:
    """A classifier's answers to a split, in index order: labels, predicted int64 (n,), confidence float64 (n,)."""

    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    loss: float
    device: str = "cpu"  # what kind computed them

    @property
    def accuracy(self) -> float:
        return float((self.labels == self.predicted).mean())


@dataclass
class Task:
    """Modules by name, phases in the order they run, and (name of the average, of its source, half-life) triples."""

    modules: dict[str, nn.Module]
    phases: list[Phase]
    averages: list[tuple[str, str, float]] = field(default_factory=list)

    def after_step(self, samples: int) -> None:
        for average, source, half_life in self.averages:
            average_into(self.modules[average], self.modules[source], samples, half_life)

    def state(self) -> dict:
        """Everything a resumed run needs besides its position; tensors are the live ones, not copies."""
        return {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": {phase.name: phase.optimizer.state_dict() for phase in self.phases},
        }

    def load(self, state: dict) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for phase in self.phases:
            phase.optimizer.load_state_dict(state["optimizers"][phase.name])


def make_task(config: ClassifyConfig | GanConfig, facts: Facts, optim: OptimConfig, seed: int, device) -> Task:
    """The task of a config, its weights drawn from `seed`. Raises ValueError if the data cannot serve it."""
    torch.manual_seed(int(draw.bits(_INIT, seed) >> np.uint64(1)))
    if isinstance(config, ClassifyConfig):
        return _classify(config, facts, optim, device)
    return _gan(config, facts, optim, device)


def _build(table: dict, name: str, **options):
    if name not in table:
        raise ValueError(f"model {name!r}: use one of {', '.join(table)}")
    return table[name](**options)


def _to_device(batch: Batch, facts: Facts, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (facts.mean, facts.std))
    images = to_float(batch.images.to(device, non_blocking=True), mean, std)
    return images, batch.labels.to(device, non_blocking=True), batch.weights.to(device, non_blocking=True)


def _classify(config: ClassifyConfig, facts: Facts, optim: OptimConfig, device) -> Task:
    if len(facts.classes) < 2:
        raise ValueError(
            f"a classifier needs at least 2 classes, the dataset has {len(facts.classes)}: shard a folder with one "
            f"folder a class, or train a GAN, which needs none"
        )
    model = _build(
        CLASSIFIERS,
        config.model,
        channels=facts.channels,
        image_size=facts.image_size,
        classes=len(facts.classes),
        padding=config.padding,
    ).to(device)
    mixing = config.mixup > 0 or config.cutmix > 0

    def loss(batch: Batch):
        images, labels, weights = _to_device(batch, facts, device)
        targets = labels
        if mixing:
            images, targets = mixed(images, labels, len(facts.classes), config.mixup, config.cutmix)
        logits = model(images)
        each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=config.label_smoothing) * weights
        guess = logits.detach().argmax(1)
        right = targets.gather(1, guess[:, None])[:, 0] if mixing else guess == labels  # of what is mixed, its share
        return each, {"loss": each.detach().sum(), "accuracy": (right * weights).sum()}

    task = Task({"model": model}, [Phase("model", model, make_optimizer(model, optim), loss)])
    if config.ema_half_life:
        task.modules["average"] = copy.deepcopy(model)
        task.averages.append(("average", "model", config.ema_half_life))
    return task


def predict(task: Task, facts: Facts, batches: Iterable[Batch], samples: int, world: World) -> Predictions:
    """What the classifier says of each of `samples` samples, gathered on every rank; `batches`: this rank's share."""
    model = task.modules.get("average", task.modules["model"]).eval()
    answers = torch.zeros(4, samples, dtype=torch.float64)  # label, predicted, confidence, loss; each row on one rank
    with torch.inference_mode():
        for batch in batches:
            images, labels, weights = _to_device(batch, facts, world.device)
            logits = model(images).float()
            confidence, predicted = logits.softmax(1).max(1)
            each = F.cross_entropy(logits, labels, reduction="none")
            kept = (weights > 0).cpu()
            answers[:, torch.from_numpy(batch.rows)[kept]] = torch.stack(
                [t.double().cpu() for t in (labels, predicted, confidence, each)]
            )[:, kept]
    model.train()
    labels, predicted, confidence, each = world.sum_(answers.to(world.device)).cpu().numpy()
    kind = torch.device(world.device).type
    return Predictions(labels.astype(np.int64), predicted.astype(np.int64), confidence, float(each.mean()), kind)


def _gan(config: GanConfig, facts: Facts, optim: OptimConfig, device) -> Task:
    options = {"channels": facts.channels, "image_size": facts.image_size, "classes": len(facts.classes)}
    g, d = _build(GANS, config.model, latent=config.latent, width=config.width, **options)
    g, d = g.to(device), d.to(device)
    half = Facts(facts.channels, facts.image_size, facts.classes, (0.5,) * facts.channels, (0.5,) * facts.channels)

    def fake_of(labels: torch.Tensor) -> torch.Tensor:
        return g(torch.randn(len(labels), config.latent, device=device), labels)

    def d_loss(batch: Batch):
        real, labels, weights = _to_device(batch, half, device)
        with torch.no_grad():
            fake = fake_of(labels)
        real.requires_grad_(config.r1 > 0)
        scores = d(torch.cat([real, fake]), labels.repeat(2))
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
        each = F.softplus(-d(fake_of(labels), labels)) * weights
        return each, {"g_loss": each.detach().sum()}

    phases = [
        Phase("discriminator", d, make_optimizer(d, optim), d_loss),
        Phase("generator", g, make_optimizer(g, optim), g_loss),
    ]
    task = Task({"generator": g, "discriminator": d, "average": copy.deepcopy(g)}, phases)
    task.averages.append(("average", "generator", config.ema_half_life))
    return task


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
