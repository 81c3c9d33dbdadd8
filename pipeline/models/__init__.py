"""The table of models. Each module stands on torch alone; a builder takes what the data decides.

CLASSIFIERS[name](channels=, image_size=, classes=, **options) -> nn.Module: (n, channels, s, s) float -> (n, classes)
GANS[name](channels=, image_size=, classes=, **options) -> (generator, discriminator)

A classifier's options are those of its builder's signature that are in OPTIONS; `classifier` gives each what it knows.
"""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable

import torch
from torch import nn

from pipeline.models.cnn import CNN
from pipeline.models.gan import conditional_gan
from pipeline.models.resnet import RESNETS, resnet
from pipeline.models.resnet9 import ResNet9

CLASSIFIERS = {"cnn": CNN, "resnet9": ResNet9, **{name: functools.partial(resnet, name) for name in RESNETS}}
GANS = {"dcgan": conditional_gan}
OPTIONS = {"padding": 1, "width": 0, "stem": "imagenet", "blurpool": False, "drop_path": 0.0}  # 0: the model's own
_TIMM = "timm:"


def classifier(
    name: str, channels: int, image_size: int, classes: int, *, builder: Callable | None = None, **options
) -> nn.Module:
    """The classifier `name` of CLASSIFIERS or timm:NAME, or what `builder` makes: (n, channels, s, s) -> (n, classes).

    options: some of OPTIONS. `builder` is called with channels=, image_size= and classes= alone, and answers for what
    it gives; what timm gives is tried on two black images. Raises ValueError for a name that is not there, an option
    that the model has not, images it cannot take, and what is no classifier of `classes` classes.
    """
    assert options.keys() <= OPTIONS.keys()
    given = {key: value for key, value in options.items() if value != OPTIONS[key]}
    sizes = {"channels": channels, "image_size": image_size, "classes": classes}
    if not (builder or name.startswith(_TIMM) or name in CLASSIFIERS):
        raise ValueError(
            f"no model {name!r}: {_near(name, CLASSIFIERS)}there are {', '.join(CLASSIFIERS)}, timm:NAME, and "
            f"FILE.py:NAME of your own"
        )
    known = () if builder else {"drop_path"} if name.startswith(_TIMM) else _options(CLASSIFIERS[name])
    for key, value in given.items():
        if key not in known:
            raise _lacks(name, key, value)
    if name in CLASSIFIERS and not builder:
        return CLASSIFIERS[name](**sizes, **given)
    return builder(**sizes) if builder else _tried(name, _from_timm(name, **sizes, **given), **sizes)


def _options(builder: Callable) -> set[str]:
    return OPTIONS.keys() & inspect.signature(builder).parameters


def _lacks(name: str, key: str, value) -> ValueError:
    having = [other for other, builder in CLASSIFIERS.items() if key in _options(builder)]
    having += ["timm:NAME"] if key == "drop_path" and not name.startswith(_TIMM) else []
    flag = f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}")
    return ValueError(f"{flag}: {name} has none; {', '.join(having)} {'do' if having[1:] else 'does'}")


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(near)}? " if near else ""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _from_timm(name: str, channels: int, image_size: int, classes: int, drop_path: float = 0.0) -> nn.Module:
    bare = name.removeprefix(_TIMM)
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError, OSError) as error:  # the last two: its torchvision is of another torch
        raise ValueError(
            f"{name}: timm does not load ({_said(error)}): pip install timm, and the torchvision that belongs to torch "
            f"{torch.__version__}"
        ) from error
    if not timm.is_model(bare):  # hf-hub:NAME is none either: a model is made here, not fetched
        raise ValueError(
            f"timm has no model {bare!r}: {_near(bare, timm.list_models())}timm.list_models() has them all"
        )
    options = {"num_classes": classes, "in_chans": channels, "img_size": image_size}
    options |= {"drop_path_rate": drop_path} if drop_path else {}
    while True:
        try:
            return timm.create_model(bare, pretrained=False, **options)
        except TypeError as error:
            if "'img_size'" in str(error) and options.pop("img_size", None):
                continue  # any size will do; those made for one, as ViTs are, take it
            if drop_path and "'drop_path_rate'" in str(error):
                raise _lacks(name, "drop_path", drop_path) from error
            raise
        except (AssertionError, RuntimeError) as error:  # images that its windows do not divide; no such tag
            raise ValueError(f"{name} of {image_size} px images: {_said(error)}") from error


def _tried(name: str, module, channels: int, image_size: int, classes: int) -> nn.Module:
    """`module`, unchanged; ValueError if it is no nn.Module that answers two black images with (2, classes)."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} gave a {type(module).__name__}, not an nn.Module")
    images = torch.zeros(2, channels, image_size, image_size)
    modes = [(inner, inner.training) for inner in module.modules()]
    module.eval()  # statistics stay as they are, and dropout draws nothing
    try:
        with torch.no_grad():
            answer = module(images)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot take images {tuple(images.shape)}: {_said(error)}") from error
    for inner, training in modes:
        inner.training = training
    if not isinstance(answer, torch.Tensor) or answer.shape != (2, classes):
        what = tuple(answer.shape) if isinstance(answer, torch.Tensor) else f"a {type(answer).__name__}"
        raise ValueError(f"{name} answers images {tuple(images.shape)} with {what}, not (2, {classes})")
    return module
