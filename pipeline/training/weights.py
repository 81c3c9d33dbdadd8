"""A trained model on its own: what is published, scored and started from. safetensors and JSON, nothing pickled.

model.safetensors           the classifier's averaged weights, or the GAN's averaged generator
discriminator.safetensors   of a GAN: to go on training with
model.json                  `registry` writes it; "model" in it is what `described` gives, and builds the module
"""

import dataclasses
from dataclasses import dataclass

import safetensors.torch
import torch

from pipeline import registry
from pipeline.loading.augment import Augment
from pipeline.training.optim import OptimConfig
from pipeline.training.tasks import ClassifyConfig, Facts, GanConfig, Task, make_task

_KINDS = {"classify": ClassifyConfig, "gan": GanConfig}
# {file: (module it is taken from, the one taken if there is none of that name, modules it goes into)}
_FILES = {
    "classify": {"model.safetensors": ("average", "model", ("model", "average"))},
    "gan": {
        "model.safetensors": ("average", "generator", ("generator", "average")),
        "discriminator.safetensors": ("discriminator", "discriminator", ("discriminator",)),
    },
}


@dataclass(frozen=True)
class Published:
    """A published model, loaded. info: model.json; augment: how its images are brought into shape."""

    path: str
    info: dict
    config: ClassifyConfig | GanConfig
    facts: Facts
    augment: Augment
    task: Task


def kind(config: ClassifyConfig | GanConfig) -> str:
    return "gan" if isinstance(config, GanConfig) else "classify"


def described(config: ClassifyConfig | GanConfig, facts: Facts, augment: Augment) -> dict:
    """What builds the module and feeds it, plain JSON."""
    return {
        "kind": kind(config),
        "task": dataclasses.asdict(config),
        "facts": {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(facts).items()},
        "augment": dataclasses.asdict(augment),
    }


def files(config: ClassifyConfig | GanConfig, task: Task) -> dict[str, bytes]:
    """{name: content} of the weights that are published."""
    found = {}
    for name, (first, other, _) in _FILES[kind(config)].items():
        state = task.modules.get(first, task.modules[other]).state_dict()
        whole = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        found[name] = safetensors.torch.save(whole, {"format": "pt"})
    return found


def load(path: str, device="cpu") -> Published:
    """The published model at `path`. ValueError: there is none, or it is damaged."""
    info = registry.describe(path)
    config, facts, augment = _parts(info["model"], path)
    task = make_task(config, facts, OptimConfig(), 0, device)
    for name, (_, _, into) in _FILES[kind(config)].items():
        state = safetensors.torch.load(registry.read_file(path, info, name))
        for module in {*into} & {*task.modules}:
            task.modules[module].load_state_dict(state)
    return Published(path, info, config, facts, augment, task)


def _parts(model: dict, path: str) -> tuple[ClassifyConfig | GanConfig, Facts, Augment]:
    try:
        facts = Facts(**{name: tuple(v) if isinstance(v, list) else v for name, v in model["facts"].items()})
        return _KINDS[model["kind"]](**model["task"]), facts, Augment(**model["augment"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} was published by a millstream that this one cannot read ({error})") from None


def begin_from(task: Task, path: str, config: ClassifyConfig | GanConfig, facts: Facts, optim: OptimConfig) -> None:
    """Puts the weights published at `path` into a fresh task. Of what has a row a class, the rows of the classes that
    both know are taken, by their names; those of new classes stay as they were drawn.

    ValueError: damaged, or not weights of such a model.
    """
    info = registry.describe(path)
    theirs = info["model"]
    if theirs.get("kind") != kind(config):
        raise ValueError(f"{path} holds a {theirs.get('kind')} model, not a {kind(config)}")
    known = tuple(theirs["facts"]["classes"])
    rows = [(facts.classes.index(name), at) for at, name in enumerate(known) if name in facts.classes]
    heads = _heads(task, config, facts, optim) if known != facts.classes else {}
    for name, (_, _, into) in _FILES[kind(config)].items():
        state = safetensors.torch.load(registry.read_file(path, info, name))
        for module in {*into} & {*task.modules}:
            _put(task.modules[module], state, heads.get(module, set()), rows, path)


def _heads(task: Task, config, facts: Facts, optim: OptimConfig) -> dict[str, set[str]]:
    """Of each module the tensors that have a row a class: those that another class would make longer."""
    with torch.random.fork_rng():
        larger = make_task(config, dataclasses.replace(facts, classes=(*facts.classes, "\0")), optim, 0, "cpu")
    found = {}
    for name, module in task.modules.items():
        more = larger.modules[name].state_dict()
        found[name] = {key for key, value in module.state_dict().items() if value.shape != more[key].shape}
    return found


def _put(module: torch.nn.Module, state: dict, heads: set[str], rows: list[tuple[int, int]], path: str) -> None:
    own = module.state_dict()
    if odd := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{path} holds weights of another model: {odd[0]} is in one of the two alone")
    new = {}
    for key, here in own.items():
        there = state[key].to(here.device)
        if key in heads and here.shape[1:] == there.shape[1:]:
            new[key] = here.clone()
            for mine, theirs in rows:
                new[key][mine] = there[theirs].to(here.dtype)
        elif here.shape == there.shape:
            new[key] = there
        else:
            shapes = f"{key} is {tuple(there.shape)}, this run's is {tuple(here.shape)}"
            raise ValueError(f"{path}: {shapes}: model, image size and channels must be the same")
    module.load_state_dict(new)
