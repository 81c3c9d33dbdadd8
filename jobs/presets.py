"""Named runs. A preset is a function that returns a whole configuration; its docstring says what to expect of it.
One of the user's own is FILE.py:NAME, and may name a model of the same file (`pipeline.training.own`)."""

import difflib
from dataclasses import replace

from pipeline.loading.augment import Augment
from pipeline.training import own
from pipeline.training.cadence import LoopConfig
from pipeline.training.compute import ComputeConfig
from pipeline.training.optim import OptimConfig
from pipeline.training.run import TrainConfig
from pipeline.training.tasks import ClassifyConfig, GanConfig


def digits_cnn() -> TrainConfig:
    """Digits of 32 px, about 99 % in half a minute on 2 cores. Also the one to start from with a folder of your own."""
    return TrainConfig(
        ClassifyConfig(label_smoothing=0.1, ema_half_life=1000),
        OptimConfig(optimizer="adamw", lr=2e-3, weight_decay=0.01, warmup_epochs=0.5),
        LoopConfig(epochs=12, batch=64, micro_batches=2),
        Augment(crop="pad", pad=2),
    )


def digits_gan() -> TrainConfig:
    """Draws digits on request; they are readable after about a minute on 2 cores."""
    return TrainConfig(
        GanConfig(width=16, r1=0.1, ema_half_life=2000),
        OptimConfig(optimizer="adam", lr=5e-4, beta1=0.5, beta2=0.99, schedule="constant"),
        LoopConfig(epochs=16, batch=64, micro_batches=2),
    )


def fashion_cnn() -> TrainConfig:
    """Fashion-MNIST (28 px grey), three convolutions with padding: 92 % test accuracy after 10 epochs."""
    return TrainConfig(
        ClassifyConfig(padding=1),
        OptimConfig(optimizer="adamw", lr=2e-3, weight_decay=0.01),
        LoopConfig(epochs=10, batch=128, micro_batches=2),
        Augment(flip=True),
    )


def fashion_fast() -> TrainConfig:
    """Fashion-MNIST, a ResNet-9 of 0.93 million parameters, 12 epochs: 94.25 % test accuracy (one seed) in 22 minutes
    on one shared core. millstream train fashion_fast --data fashion --out runs/fast"""
    return TrainConfig(
        ClassifyConfig(model="resnet9", width=24, label_smoothing=0.1, ema_half_life=20_000, flip_test=True),
        OptimConfig("sgd", lr=0.4, nesterov=True, weight_decay=5e-4, schedule="triangular", warmup_epochs=2.4),
        LoopConfig(epochs=12, batch=256, micro_batches=2),
        Augment(crop="pad", pad=2, flip=True),
        compute=ComputeConfig("bf16", channels_last=True),
    )


def fashion_best() -> TrainConfig:
    """Fashion-MNIST, the network of fashion_fast for 80 epochs, at 20 px first, with random erasing: 95.4 % test
    accuracy (one seed, shards with --val-fraction 0.02) in 85 minutes on one shared core. millstream train fashion_best
    --data fashion --out runs/best"""
    fast = fashion_fast()
    return replace(
        fast,
        task=replace(fast.task, ema_half_life=54_000),
        optim=replace(fast.optim, warmup_epochs=12),
        loop=replace(fast.loop, epochs=80),
        augment=replace(fast.augment, erase=0.5, start_size=20, ramp_from=30, ramp_to=56),
    )


def fashion_gan() -> TrainConfig:
    """Draws Fashion-MNIST's ten kinds of clothing; recognisable after an epoch of minutes on 2 cores."""
    return TrainConfig(
        GanConfig(width=16, r1=0.1, ema_half_life=5000),
        OptimConfig(optimizer="adam", lr=5e-4, beta1=0.5, beta2=0.99, schedule="constant"),
        LoopConfig(epochs=5, batch=64, micro_batches=2),
        Augment(flip=True),
    )


def _ffcv(model: str, epochs: int, lr: float, weight_decay: float, ramp: tuple[int, int]) -> TrainConfig:
    """ffcv-imagenet's recipe (Leclerc et al. 2023), its rate for 1,024 images a step: sides grow from 160 to 192 px,
    scored at 256 px. Shards with a short side of 256 px or more."""
    return TrainConfig(
        ClassifyConfig(model=model, blurpool=True, label_smoothing=0.1, flip_test=True),
        OptimConfig("sgd", lr=lr, weight_decay=weight_decay, schedule="triangular", warmup_epochs=2),
        LoopConfig(epochs=epochs, batch=1024, micro_batches=4),
        Augment(192, 3, "resized", flip=True, start_size=160, ramp_from=ramp[0], ramp_to=ramp[1], eval_size=256,
                eval_share=0.875),
        compute=ComputeConfig("bf16", channels_last=True, compile=True),
    )  # fmt: skip


def imagenet_resnet18_16ep() -> TrainConfig:
    """ImageNet, ResNet-18, 16 epochs after ffcv-imagenet, which reports 66.9 %; not run here. Shards: millstream shard
    imagenet:PATH imagenet --size 256"""
    return _ffcv("resnet18", 16, 0.5, 5e-5, (11, 13))


def imagenet_resnet50_16ep() -> TrainConfig:
    """ImageNet, ResNet-50, 16 epochs after ffcv-imagenet, which reports 73.8 %; not run here."""
    return _ffcv("resnet50", 16, 0.425, 1e-4, (11, 13))


def imagenet_resnet50_88ep() -> TrainConfig:
    """ImageNet, ResNet-50, 88 epochs after ffcv-imagenet, which reports 78.4 %; not run here."""
    return _ffcv("resnet50", 88, 0.425, 1e-4, (65, 76))


def imagenet_resnet50_600ep() -> TrainConfig:
    """ImageNet, ResNet-50, 600 epochs after torchvision's second recipe, which reports 80.9 % and draws each image four
    times, which this does not; not run here."""
    return TrainConfig(
        ClassifyConfig(model="resnet50", label_smoothing=0.1, mixup=0.2, cutmix=1.0, ema_half_life=20_800_000),
        OptimConfig("sgd", lr=0.5, weight_decay=2e-5, warmup_epochs=5),
        LoopConfig(epochs=600, batch=1024, micro_batches=4),
        Augment(176, 3, "resized", flip=True, policy="trivial", erase=0.1, eval_size=224, eval_share=224 / 232),
        compute=ComputeConfig("bf16", channels_last=True, compile=True),
    )


def finetune_resnet50() -> TrainConfig:
    """Photos of your own, from a ResNet-50 that knows others; --freeze body: only its last layer learns.
    millstream train finetune_resnet50 --init resnet50.pth --data data --out runs/fine"""
    return TrainConfig(
        ClassifyConfig(model="resnet50", label_smoothing=0.1, ema_half_life=5000, flip_test=True),
        OptimConfig("sgd", lr=0.02, nesterov=True, weight_decay=1e-4, warmup_epochs=0.5),
        LoopConfig(epochs=10, batch=128, micro_batches=4),
        Augment(224, 3, "resized", flip=True, eval_share=0.875),
        compute=ComputeConfig("bf16", channels_last=True),
    )


_CLASSIFIERS = (digits_cnn, fashion_cnn, fashion_fast, fashion_best, finetune_resnet50)
_IMAGENET = (imagenet_resnet18_16ep, imagenet_resnet50_16ep, imagenet_resnet50_88ep, imagenet_resnet50_600ep)
PRESETS = {preset.__name__: preset for preset in (*_CLASSIFIERS, *_IMAGENET, digits_gan, fashion_gan)}


def get(name: str) -> TrainConfig:
    """The configuration of a preset, or of FILE.py:NAME, a function of the user's own that returns one.

    Raises ValueError that names the nearest one, or what is wrong with the file.
    """
    if name in PRESETS:
        return PRESETS[name]()
    if own.is_spec(name):
        return _own(name)
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}? There are" if near else "there are"
    raise ValueError(f"no preset {name!r}: {hint} {', '.join(PRESETS)}")


def _own(spec: str) -> TrainConfig:
    found = own.given(spec, "a function that returns a TrainConfig,")
    if wanting := found.wants():
        raise ValueError(f"{found.spec} wants arguments ({', '.join(wanting)}): a preset takes none")
    config = found.call()
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{found.spec} returns a {type(config).__name__}: a TrainConfig is wanted")
    if own.is_spec(config.task.model):
        config = replace(config, task=replace(config.task, model=own.beside(spec, config.task.model)))
    return config
