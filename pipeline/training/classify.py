"""The task of an image classifier: its configuration, its loss, what it answers."""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.loading.mixup import mixed
from pipeline.loading.steps import Batch
from pipeline.models import classifier
from pipeline.training.averaging import averages
from pipeline.training.compute import ComputeConfig
from pipeline.training.optim import OptimConfig, make_optimizer
from pipeline.training.task import Facts, Phase, Task, into_training, to_device
from pipeline.training.world import World

LOSSES = ("ce", "bce")


@dataclass(frozen=True)
class ClassifyConfig:
    """An image classifier."""

    model: str = "cnn"
    """cnn, resnet9, resnet18 (34, 50, 101; with a d at the end: ResNet-D), timm:NAME, or FILE.py:NAME of your own."""
    padding: int = 1
    """Padding of the cnn's convolutions: 0 as in the tutorial, or 1."""
    width: int = 0
    """Channels of resnet9's first convolution; 0: 64."""
    stem: str = "imagenet"
    """How a resnet begins: imagenet (a quarter of the side), or small (the whole side), for images under 64 px."""
    blurpool: bool = False
    """A resnet that blurs before it takes every second pixel (Zhang 2019)."""
    drop_path: float = 0.0
    """Stochastic depth: the last block of a resnet is left out this often, earlier ones less."""
    loss: str = "ce"
    """ce (cross entropy), or bce: each class a yes or no of its own (Wightman et al. 2021)."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    mixup: float = 0.0
    """Alpha of mixup: images and targets of a batch are blended by Beta(alpha, alpha); 0: not at all."""
    cutmix: float = 0.0
    """Alpha of CutMix: a box of another image is pasted in; with mixup, each batch gets one of the two."""
    ema_half_life: float = 0.0
    """Half-life in samples of an average of the weights, used for validation and evaluation; 0: none."""
    ema_snapshots: int = 0
    """Checkpoints, spread over the run, that stay, so that `millstream average` can choose the average's length
    afterwards; 0: none, 8 to 16 will do."""
    flip_test: bool = False
    """Validation and evaluation answer with the mean over each image and its mirror image."""
    freeze: str = ""
    """Parameters that stay as they are, by how their names begin (layer1,layer2), or body: all but the last layer."""

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss {self.loss!r}: use one of {', '.join(LOSSES)}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path {self.drop_path} must be in [0, 1)")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing {self.label_smoothing} must be in [0, 1)")
        for name in ("mixup", "cutmix", "ema_half_life", "ema_snapshots"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)} cannot be negative, or without end")


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


def make_classifier(config: ClassifyConfig, facts: Facts, builder: Callable | None = None) -> nn.Module:
    """The module of a classifier's config, or that of `builder`. ValueError if the data cannot serve it."""
    if len(facts.classes) < 2:
        raise ValueError(
            f"a classifier needs at least 2 classes, the dataset has {len(facts.classes)}: shard a folder with one "
            f"folder a class, or train a GAN, which needs none"
        )
    options = {name: getattr(config, name) for name in ("padding", "width", "stem", "blurpool", "drop_path")}
    sizes = facts.channels, facts.image_size, len(facts.classes)
    return classifier(config.model, *sizes, builder=builder, **options)


def rows_per_class(config: ClassifyConfig, facts: Facts, builder: Callable | None = None) -> set[str]:
    """Names of the tensors that have a row a class, the classifier's last layer: one more class makes them longer."""
    # A module of the user's own may look at numbers while it is made.
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if builder else "meta"):
        here, more = (
            make_classifier(config, dataclasses.replace(facts, classes=(*facts.classes, *added)), builder).state_dict()
            for added in ((), ("\0",))
        )
    return {name for name, value in here.items() if value.shape != more[name].shape}


def _freeze(model: nn.Module, config: ClassifyConfig, facts: Facts, builder: Callable | None) -> None:
    """ValueError if nothing begins with one of the names, or nothing is left to train."""
    if not config.freeze:
        return
    names = [name for name, _ in model.named_parameters()]
    if config.freeze == "body":
        frozen = set(names) - rows_per_class(config, facts, builder)
    else:
        begins = [prefix.strip() for prefix in config.freeze.split(",")]
        if missing := [p for p in begins if not p or not any(name.startswith(p) for name in names)]:
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(f"freeze {missing[0]!r}: no parameter of {config.model} begins so; its parts are {parts}")
        frozen = {name for name in names if name.startswith(tuple(begins))}
    if frozen == set(names):
        raise ValueError(f"freeze {config.freeze!r} leaves nothing of {config.model} to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def classify(
    config: ClassifyConfig,
    facts: Facts,
    optim: OptimConfig,
    device,
    compute: ComputeConfig,
    builder: Callable | None = None,
) -> Task:
    """See `tasks.make_task`."""
    model = compute.laid_out(make_classifier(config, facts, builder).to(device))
    _freeze(model, config, facts, builder)
    into_training(model)
    mixing = config.mixup > 0 or config.cutmix > 0

    def loss(batch: Batch):
        images, labels, weights = to_device(batch, facts, device, compute.channels_last)
        targets = labels
        if mixing:
            images, targets = mixed(images, labels, len(facts.classes), config.mixup, config.cutmix)
        with compute.autocast(device):
            logits = model(images)
        logits = logits.float()
        if config.loss == "bce":
            each = _yes_or_no(logits, targets, config.label_smoothing) * weights
        else:
            each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=config.label_smoothing) * weights
        guess = logits.detach().argmax(1)
        right = targets.gather(1, guess[:, None])[:, 0] if mixing else guess == labels  # of what is mixed, its share
        return each, {"loss": each.detach().sum(), "accuracy": (right * weights).sum()}

    kept = averages("model", config.ema_half_life or None, config.ema_snapshots)
    modules = {"model": model} | {name: copy.deepcopy(model) for name, _, _ in kept}
    compute.compiled(model)
    phases = [Phase("model", model, make_optimizer(model, optim), loss)]
    return Task(modules, phases, kept, config.ema_snapshots, compute.scaler(device), config.flip_test, builder)


def _yes_or_no(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Mean over the classes of each one's binary cross entropy; float32 (n,). targets: int64 (n,), or shares (n, k)."""
    shares = targets if targets.ndim == 2 else F.one_hot(targets, logits.shape[1]).float()
    shares = shares * (1 - smoothing) + smoothing / logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits, shares, reduction="none").mean(1)


def predict(task: Task, facts: Facts, batches: Iterable[Batch], samples: int, world: World) -> Predictions:
    """What the classifier says of each of `samples` samples, gathered on every rank; `batches`: this rank's share."""
    model = task.modules.get("average", task.modules["model"]).eval()
    forward = model.forward  # float32 and not compiled: a score must not depend on how the model was trained
    answers = torch.zeros(4, samples, dtype=torch.float64)  # label, predicted, confidence, loss; each row on one rank
    with torch.inference_mode():
        for batch in batches:
            images, labels, weights = to_device(batch, facts, world.device)
            logits = forward(images).float()
            if task.flip_test:
                logits = (logits + forward(images.flip(-1)).float()) / 2
            confidence, predicted = logits.softmax(1).max(1)
            each = F.cross_entropy(logits, labels, reduction="none")
            kept = (weights > 0).cpu()
            answers[:, torch.from_numpy(batch.rows)[kept]] = torch.stack(
                [t.double().cpu() for t in (labels, predicted, confidence, each)]
            )[:, kept]
    into_training(model)
    labels, predicted, confidence, each = world.sum_(answers.to(world.device)).cpu().numpy()
    kind = torch.device(world.device).type
    return Predictions(labels.astype(np.int64), predicted.astype(np.int64), confidence, float(each.mean()), kind)
