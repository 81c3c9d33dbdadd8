"""A trained model on its own: what is published, scored and started from. safetensors and JSON, nothing pickled.

model.safetensors           the classifier's averaged weights, or the GAN's averaged generator
discriminator.safetensors   of a GAN: to go on training with
code/FILE.py                where the module is the user's own: `load` runs it for whom it is known to (`own`)
model.json                  `registry` writes it; "model" in it is what `described` gives, and builds the module

What a run begins with may also be another run's checkpoint, or a file of weights (`foreign`).
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass

import safetensors.torch
import torch

from pipeline import registry, storage
from pipeline.loading.augment import Augment
from pipeline.training import checkpoint, foreign, own
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
_PINNED = re.compile(r"#[0-9a-f]{64}$")
_CHECKPOINT = re.compile(r"(?P<run>.+)/checkpoints/(?P<name>\d{12}-\d{4,6})")
_SHOWN = 3  # tensors in a message
_SAME = "model, image size and channels must be the same (--model, --stem; for grey pictures --channels 3)"


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
    """{name: content} of the weights that are published, and of the code where the model is the user's own."""
    found = {f"code/{task.builder.file}": task.builder.content} if task.builder else {}
    for name, (first, other, _) in _FILES[kind(config)].items():
        state = task.modules.get(first, task.modules[other]).state_dict()
        whole = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        found[name] = safetensors.torch.save(whole, {"format": "pt"})
    return found


def load(path: str, device="cpu") -> Published:
    """The published model at `path`. ValueError: there is none, it is damaged, or made by code that nobody trusts."""
    info = registry.describe(path)
    config, facts, augment = _parts(info["model"], path)
    builder = None
    if own.is_spec(config.model):
        code = registry.read_file(path, info, f"code/{own.split(config.model)[0]}")
        builder = own.published(config.model, path, code)
    task = make_task(config, facts, OptimConfig(), 0, device, builder=builder)
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


@dataclass(frozen=True)
class _Weights:
    """path: with what tells whether it is still the same; states: by the file they are in, or would be; classes: of
    their head, None where nobody says."""

    path: str
    kind: str
    states: dict[str, dict[str, torch.Tensor]]
    classes: tuple[str, ...] | None


def begin_from(
    task: Task, path: str, config: ClassifyConfig | GanConfig, facts: Facts, optim: OptimConfig
) -> tuple[str, str]:
    """Puts weights into a fresh task: of a published model, of a run (its best checkpoint's average) or one of its
    checkpoints, of a file that holds a classifier's. Of what has a row a class, the rows of the classes that both know
    are taken, by their names; those of new classes stay as they were drawn. A file does not say its classes: its rows
    are taken if they are as many, else all of them stay so.

    Returns the path as it must be given to begin with the same bits again (RUN/checkpoints/NAME#SHA-256, FILE#SHA-256),
    and a line that says what starts anew, or "". ValueError: damaged, changed, or not weights of such a model.
    """
    found = _found(path)
    if found.kind != kind(config):
        raise ValueError(f"{path} holds a {found.kind} model, not a {kind(config)}")
    known = found.classes
    rows = [(facts.classes.index(name), at) for at, name in enumerate(known or ()) if name in facts.classes]
    heads = _heads(task, config, facts, optim) if known != facts.classes else {}
    anew: dict[str, str] = {}
    for name, state in found.states.items():
        for module in {*_FILES[kind(config)][name][2]} & {*task.modules}:
            head = heads.get(module, set())
            if known is None:
                anew |= _left(task.modules[module].state_dict(), state, head)
                head = set()
            _put(task.modules[module], state, head, rows, anew, path)
    said = f"{', '.join(anew)} of {path} ({', '.join(dict.fromkeys(anew.values()))})"
    said = f"{said} do not fit this run's {len(facts.classes)} classes: the head starts anew" if anew else ""
    return found.path, said


def _found(path: str) -> _Weights:
    given = path
    path, _, sha256 = path.rpartition("#") if _PINNED.search(path) else (path.rstrip("/"), "", "")
    changed = f"{path} is not what it was when the run began: put it back, or begin anew with another --out"
    if match := _CHECKPOINT.fullmatch(path):
        manifest = _manifest(match["run"], match["name"])
        pinned = f"{path}#{manifest.files['state.pt']['sha256']}"
        if sha256 and pinned != given:
            raise ValueError(changed)
        stored = json.loads(storage.read(storage.join(match["run"], "config.json")))
        modules = checkpoint.read_state(match["run"], manifest)["task"]["modules"]
        names = _FILES[stored["kind"]].items()
        states = {name: modules[first if first in modules else other] for name, (first, other, _) in names}
        return _Weights(pinned, stored["kind"], states, tuple(stored["facts"]["classes"]))
    if sha256 or storage.exists(path):
        content = storage.read(path)
        now = hashlib.sha256(content).hexdigest()
        if sha256 and now != sha256:
            raise ValueError(changed)
        return _Weights(f"{path}#{now}", "classify", {"model.safetensors": foreign.state_dict(content, path)}, None)
    if not storage.exists(storage.join(path, "model.json")) and storage.exists(storage.join(path, "config.json")):
        best = checkpoint.best(path)
        if best is None:
            raise ValueError(f"{path} has no checkpoint to begin from: train it first")
        return _found(f"{path}/checkpoints/{best.name}")
    return _published(path)


def _published(path: str) -> _Weights:
    try:
        info = registry.describe(path)
    except ValueError as error:
        more = ", no run and no file of weights either" if "no published model" in str(error) else ""
        raise ValueError(f"{error}{more}") from None
    theirs = info["model"]
    names = _FILES.get(theirs.get("kind"), {})
    states = {name: safetensors.torch.load(registry.read_file(path, info, name)) for name in names}
    return _Weights(path, theirs.get("kind"), states, tuple(theirs["facts"]["classes"]))


def _manifest(run: str, name: str) -> checkpoint.Manifest:
    found = next((m for m in checkpoint.lineage(run) if m.name == name), None)
    if found is None:
        raise ValueError(f"{run} has no checkpoint {name} to begin from (any more): use another --out, and `millstream "
                         "checkpoints RUN --pin NAME` to keep one")  # fmt: skip
    return found


def _heads(task: Task, config, facts: Facts, optim: OptimConfig) -> dict[str, set[str]]:
    """Of each module the tensors that have a row a class: those that another class would make longer."""
    more = dataclasses.replace(facts, classes=(*facts.classes, "\0"))
    with torch.random.fork_rng():
        larger = make_task(config, more, optim, 0, "cpu", builder=task.builder)
    found = {}
    for name, module in task.modules.items():
        state = larger.modules[name].state_dict()
        found[name] = {key for key, value in module.state_dict().items() if value.shape != state[key].shape}
    return found


def _left(here: dict, state: dict, heads: set[str]) -> dict[str, str]:
    """{name: what a file has of it} of a head that cannot be taken: all of it, or none."""
    if all(key in state and state[key].shape == here[key].shape for key in heads):
        return {}
    return {key: f"{len(state[key])} rows" if key in state else "not there" for key in sorted(heads)}


def _put(module: torch.nn.Module, state: dict, heads, rows: list[tuple[int, int]], anew, path: str) -> None:
    """heads: what is taken by `rows` alone, (ours, theirs); anew: what is not taken at all."""
    here = {key: value for key, value in module.state_dict().items() if key not in anew}
    missing = [key for key in here if key not in state and not key.endswith("num_batches_tracked")]  # old files' BN
    unknown = [key for key in state if key not in here and key not in anew]
    if missing or unknown:
        said = [f"{key} {tuple(here[key].shape)} is missing" for key in missing[:_SHOWN]]
        said += [f"{key} {tuple(state[key].shape)} is unknown to this run's" for key in unknown[:_SHOWN]]
        raise ValueError(f"{path} holds weights of another model ({'; '.join(said)}): {_SAME}")
    new, odd = {}, []
    for key, mine in here.items():
        there = state[key].to(mine.device) if key in state else mine
        if key in heads and mine.shape[1:] == there.shape[1:]:
            new[key] = mine.clone()
            for ours, theirs in rows:
                new[key][ours] = there[theirs].to(mine.dtype)
        elif mine.shape == there.shape:
            new[key] = there
        else:
            odd.append(f"{key} is {tuple(there.shape)}, this run's is {tuple(mine.shape)}")
    if odd:
        more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        raise ValueError(f"{path}: {'; '.join(odd[:_SHOWN])}{more}: {_SAME}")
    module.load_state_dict(new, strict=not anew)
